"""Every operator in plain PyTorch: the specification, the fallback, the gradcheck oracle.

Letters: V student views, T teacher rows, B images, K prototypes; of the search Q queries, H heads,
N tokens, d width of a head; of augment_crops B crops [H, W, C] and the columns of its params.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .distill import Target


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32 for 16-bit and fp32 tensors, fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def scalar(number: float | Tensor, like: Tensor) -> Tensor:
    """A temperature or weight beside `like`, 0-d, detached, of the arithmetic's dtype."""
    dtype, device = accumulation_dtype(like), like.device
    if isinstance(number, Tensor):
        return number.detach().to(device, dtype)
    # full() and not as_tensor() for a number: copying one to a GPU would synchronise.
    return torch.full((), number, dtype=dtype, device=device)


def scalars(numbers: "Sequence[float | Tensor]", like: Tensor, on_host: bool = False) -> Tensor:
    """All of them, [n]. `on_host`: numbers of the host may stay there, which costs no launch."""
    if (like.is_cpu or on_host) and not any(isinstance(number, Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=accumulation_dtype(like), device="cpu")
    return torch.stack([scalar(number, like) for number in numbers])


@torch.no_grad()
def target_probs(target: "Target", dtype: torch.dtype) -> Tensor:
    """q = softmax((logits - center) / temperature), or the given probabilities. [T, B, K]"""
    if target.probs is not None:
        return target.probs.detach().to(dtype)  # to() alone may return the tensor itself
    assert target.logits is not None
    logits = target.logits.to(dtype)
    if target.center is not None:
        logits = logits - target.center.to(dtype)
    return F.softmax(logits / target.temperature, dim=-1)


def distill_cross_entropy(
    student: Tensor, targets: "Sequence[Target]", temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The formula of `ops.distill.distill_cross_entropy`, one log-softmax a student view.

    Written with log_softmax and not as n * lse(z) - <z, Q>: the latter cancels when the logits
    carry a large offset (fp32, offset 1e4: loss off by 2.7e-5 where this form is off by 5e-6).
    """
    views, images, _ = student.shape
    dtype = accumulation_dtype(student)
    # Autocast would send the products below to 16 bit and with them the loss.
    with torch.autocast(student.device.type, enabled=False):
        probs = [target_probs(target, dtype) for target in targets]  # [T, B, K] each
        terms = [torch.zeros((), dtype=dtype, device=student.device) for _ in targets]
        for v in range(views):
            log_p = F.log_softmax(student[v].to(dtype) / temperature, dim=-1)  # [B, K]
            for i, (target, q) in enumerate(zip(targets, probs, strict=True)):
                pairs = [(t, row[v]) for t, row in enumerate(target.pairs) if row[v] != 0]
                if not pairs:
                    continue
                mix = sum(q[t] * weight for t, weight in pairs)  # Q_v [B, K]
                rows = -(mix * log_p).sum(dim=-1)  # [B]
                if target.row_weight is not None:
                    rows = rows * target.row_weight.detach().to(dtype)
                # Not mean(): without images the loss is 0, not NaN.
                terms[i] = terms[i] + rows.sum() / max(images, 1)
        weights = [scalar(target.weight, student) for target in targets]
        loss = (torch.stack(terms) * torch.stack(weights)).sum()
    return loss, torch.stack(terms).detach()


@torch.no_grad()
def column_mean(logits: Tensor) -> Tensor:
    """Mean over every dimension but the last, accumulated in fp32 (fp64 for fp64). [K]

    Without rows it is 0, as the loss is.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    return rows.sum(dim=0, dtype=accumulation_dtype(logits)) / max(len(rows), 1)


def feature_search(
    query: Tensor, key: Tensor, value: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor]:
    """The formula of `ops.search.feature_search`, with its weights [Q, B, H, N]."""
    dtype = accumulation_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        x, k, v = (t.to(dtype) for t in (query, key, value))
        scores = torch.einsum("qbhd,bhnd->qbhn", x, k) * x.shape[-1] ** -0.5
        shares = scores.softmax(dim=-1)
        return torch.einsum("qbhn,bhnd->qbhd", shares, v).to(query.dtype), shares


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, q_x: Tensor, k_x: Tensor, v_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Literally: each query before the repeated tokens, and self-attention over them."""
    dtype = accumulation_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_ = (joined(x, t).to(dtype) for x, t in ((q_x, q), (k_x, k), (v_x, v)))
        out = ((q_ @ k_.mT) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v_
        out = out.to(q.dtype)
        return out[..., 1:, :], out[..., 0, :]


def self_attention(qkv: Tensor, scale: float) -> Tensor:
    dtype = accumulation_dtype(qkv)
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        out = ((q @ k.mT) * scale).softmax(dim=-1) @ v
        return out.transpose(1, 2).to(qkv.dtype)


def joined(query: Tensor, tokens: Tensor) -> Tensor:
    """Each query before the repeated tokens. [Q, B, H, d], [B, H, N, d] -> [Q, B, H, 1 + N, d]"""
    return torch.cat([query.unsqueeze(3), tokens.expand(len(query), *tokens.shape)], dim=3)


LUMA = (19595, 38470, 7471)  # of red, green and blue: BT.601 in 65536ths, as Pillow has them
SIGMA_MAX = 100.0  # pixels


def augment_crops(
    crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The steps of `ops.augment.augment_crops`, crop by crop. Each leaves whole numbers, 0 to 255.

    Bit for bit what Pillow does, but for the blur, which is a Gaussian and not three boxes.
    """
    scale, shift = affine(mean, std)
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    steps = (_brightness, _contrast, _saturation, _hue)
    for crop, row, to in zip(crops, params.tolist(), out, strict=True):  # reads the params
        flip, *order, _, _, _, _, grey, sigma, solarize = row
        x = crop.float()  # [H, W, C]
        x = x.flip(1) if flip > 0 else x
        for op in dict.fromkeys(map(int, order)):  # each once
            x = steps[op](x, row[5 + op]) if 0 <= op < 4 else x
        x = _luma(x).expand_as(x) if grey > 0 else x
        x = _gaussian(x, min(sigma, SIGMA_MAX)) if sigma > 0 else x
        x = torch.where(x >= 128, 255 - x, x) if solarize > 0 else x
        to.copy_(x * x.new_tensor(scale) + x.new_tensor(shift))
    return out.permute(0, 3, 1, 2)


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(x / 255 - mean) / std as x * scale + shift."""
    scale = [1 / (255 * s) for s in std]
    return scale, [-m / s for m, s in zip(mean, std, strict=True)]


def _luma(x: Tensor) -> Tensor:
    """[H, W, 1]. All numbers are below 2^24: fp32 is exact."""
    if x.shape[-1] == 1:
        return x
    return ((x * x.new_tensor(LUMA)).sum(-1, keepdim=True) + 32768).div(65536).floor()


def _blend(flat: float | Tensor, x: Tensor, factor: float) -> Tensor:
    return (flat + (x - flat) * factor).clamp(0, 255).floor()


def _brightness(x: Tensor, factor: float) -> Tensor:
    return _blend(0.0, x, factor)


def _contrast(x: Tensor, factor: float) -> Tensor:
    """About the mean luma of the crop as it is now, a whole number."""
    luma = _luma(x)
    return _blend((luma.sum(dtype=torch.float64) / luma.numel() + 0.5).floor().float(), x, factor)


def _saturation(x: Tensor, factor: float) -> Tensor:
    return _blend(_luma(x), x, factor)


def _hue(x: Tensor, factor: float) -> Tensor:
    """There and back through HSV of a byte each, which is not neutral even for a shift of 0.

    Of the channels, the largest is v, and the middle one says where between two corners of the
    colour wheel the hue lies. In fp32 every rounding falls as Pillow's (the tests try all colours).
    """
    if factor == 0 or x.shape[-1] == 1:
        return x
    (r, g, b), v, low = x.unbind(-1), x.amax(-1), x.amin(-1)
    chroma = v - low
    part = (2 * v + low - r - g - b) / chroma.clamp(min=1)  # (v - middle) / chroma
    blue = torch.where(g == low, 5 - part, 3 + part)
    green = torch.where(r == low, 3 - part, 1 + part)
    red = torch.where(b == low, 1 - part, part - 1)
    hue = torch.where(r == v, red, torch.where(g == v, green, blue)) / 6  # turns, from -1/6 on
    hue = (torch.where(hue < 0, hue + 1, hue) * 255).floor()
    hue = (hue + int(factor * 255)).remainder(256) * 6
    saturation = (chroma / v.clamp(min=1) * 255).floor()
    # How far each channel falls from v, in 255ths of what the smallest does.
    red, green, blue = 510 - (hue - 765).abs(), (hue - 510).abs() - 255, (hue - 1020).abs() - 255
    fall = torch.stack([red, green, blue], -1).clamp(0, 255)
    fall = fall * (saturation * v).unsqueeze(-1) * (1 / 65025)
    return v.unsqueeze(-1) - (fall + 0.5).floor()


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Cut off at 3 sigma, edge pixels repeated; rounded once, after both passes."""
    R = math.ceil(3 * sigma)
    taps = [math.exp(-0.5 * (j / sigma) ** 2) for j in range(-R, R + 1)]
    for dim in (1, 0):
        n, far = x.shape[dim], torch.arange(-R, x.shape[dim] + R, device=x.device)
        wide = x.index_select(dim, far.clamp(0, n - 1))
        x = torch.zeros_like(x)
        for j, tap in enumerate(taps):
            x += wide.narrow(dim, j, n) * (tap / sum(taps))
    return (x + 0.5).floor()
