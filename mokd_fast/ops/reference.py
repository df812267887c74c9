"""Every operator in plain PyTorch: the specification, the fallback, the gradcheck oracle.

Letters: V student views, T teacher rows, B images, K prototypes; of the search Q queries, H heads,
N tokens, d width of a head.
"""

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


def joined(query: Tensor, tokens: Tensor) -> Tensor:
    """Each query before the repeated tokens. [Q, B, H, d], [B, H, N, d] -> [Q, B, H, 1 + N, d]"""
    return torch.cat([query.unsqueeze(3), tokens.expand(len(query), *tokens.shape)], dim=3)
