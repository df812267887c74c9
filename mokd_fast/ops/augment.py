"""augment_crops: what follows crop and resize, on a batch of uint8 crops with numbers of their own.

    flip, jitter in the drawn order, grey, Gaussian blur, solarize, (x / 255 - mean) / std, cast

Jitter, grey and solarize are Pillow's, bit for bit, and so torchvision's on PIL pictures: every
step leaves whole numbers, contrast turns about the mean luma of the crop as it is at that point,
hue is that of HSV in bytes. The blur is a true Gaussian of each crop's sigma, cut off at 3 sigma,
with the edge pixels repeated (Pillow's: three box filters); it is rounded once, after both passes.
Of photographs with sigma from 1 to 2 the outer 6 pixels are then 0.4 to 0.6 grey levels from
Pillow's, where reflected edges, torchvision's, are 0.5 to 1.0 away.

Letters: B crops, H, W their height and width, C channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import pick, register
from .distill import plain, transformed, triton_why_not

AUGMENT_COLUMNS = (
    "flip",
    "first",
    "second",
    "third",
    "fourth",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grey",
    "sigma",
    "solarize",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIMITS = {"brightness": (0, 1e6), "contrast": (0, 1e6), "saturation": (0, 1e6), "hue": (-0.5, 0.5),
           "sigma": (0, reference.SIGMA_MAX)}  # fmt: skip
Numbers = float | Sequence[float] | Tensor


def augment_crops(
    crops: Tensor,
    params: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Colour jitter, grey, blur, solarize, normalise and cast of B crops in one call.

    Args:
        crops: uint8 [B, H, W, C], C of 1 or 3, any strides. With one channel jitter is brightness
            and contrast alone.
        params: float32 [B, 12] on the crops' device, as `augment_params` makes it. Columns: flip,
            the order of jitter (four codes: brightness 0, contrast 1, saturation 2, hue 3, none
            -1; each counts once), the factors of those four, grey, sigma in pixels (0: no blur;
            100 at most), solarize. What is above 0 in flip, grey and solarize means yes. The values
            are not looked at (a GPU would be waited for): NaN, and what `augment_params` would
            refuse, ends in pixels without a meaning, another one in each backend.
        mean, std: one number a channel, for pixels from 0 to 1.
        dtype: float32, bfloat16 or float16; the arithmetic is fp32 and rounds to it once.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does.

    Returns:
        [B, C, H, W] of `dtype`, channels_last in memory. No gradient.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> crops = torch.randint(256, (4, 96, 96, 3), dtype=torch.uint8)
        >>> params = augment_params(4, brightness=[0.8, 1.2, 1.0, 1.1], sigma=1.5, grey=True)
        >>> augment_crops(crops, params, mean=[0.5] * 3, std=[0.25] * 3).shape
        torch.Size([4, 3, 96, 96])
    """
    _check(crops, params, mean, std, dtype)
    chosen = pick("augment_crops", crops, params, mean, std, dtype, backend=backend)
    out: Tensor = chosen.run(crops, params, mean, std, dtype)
    return out


def augment_params(
    batch: int,
    *,
    flip: Numbers = 0,
    order: Sequence[int] | Sequence[Sequence[int]] | Tensor = (0, 1, 2, 3),
    brightness: Numbers = 1,
    contrast: Numbers = 1,
    saturation: Numbers = 1,
    hue: Numbers = 0,
    grey: Numbers = 0,
    sigma: Numbers = 0,
    solarize: Numbers = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The float32 [batch, 12] that `augment_crops` takes; each argument is one number or `batch`.

    order: four codes, or `batch` times four. hue is a part of a turn, -0.5 to 0.5; Pillow shifts
    it by the byte int(255 hue). Without arguments nothing but the normalisation is left to do.
    Values are checked here, on the host: to ask later would wait for the device. ValueError for
    numbers that are out of range or do not fit.
    """
    table = torch.zeros(batch, len(AUGMENT_COLUMNS), dtype=torch.float64)
    codes = torch.as_tensor(order, dtype=torch.float64, device="cpu")
    if codes.shape not in ((4,), (batch, 4)):
        raise ValueError(f"order must be [4] or [{batch}, 4], got {list(codes.shape)}")
    table[:, 1:5] = codes
    known = ((codes >= -1) & (codes <= 3) & (codes == codes.round())).all()
    every = table[:, 1:5].sort(-1).values
    if not known or ((every[:, 1:] == every[:, :-1]) & (every[:, 1:] >= 0)).any():
        raise ValueError("order holds -1 for none and each of 0, 1, 2, 3 once at most")
    named = {"flip": flip, "brightness": brightness, "contrast": contrast, "hue": hue}
    named |= {"saturation": saturation, "grey": grey, "sigma": sigma, "solarize": solarize}
    for name, numbers in named.items():
        values = torch.as_tensor(numbers, dtype=torch.float64, device="cpu")
        if values.shape not in ((), (batch,)):
            raise ValueError(f"{name} must be a number or {batch}, got {list(values.shape)}")
        low, high = _LIMITS.get(name, (0, 1))
        if not ((values >= low) & (values <= high)).all():
            raise ValueError(f"{name} must be from {low} to {high}, got {numbers}")
        table[:, AUGMENT_COLUMNS.index(name)] = values
    settle_hue_(table)
    return table.float().to(device)


def settle_hue_(table: Tensor) -> None:
    """Moves each hue of float64 [B, 12] to the middle of those that Pillow shifts by the same byte:
    fp32 then moves it to no other."""
    hue = table[:, AUGMENT_COLUMNS.index("hue")]
    shift = hue * 255
    hue.copy_((shift.trunc() + 0.5 * shift.sign()) / 255)


@torch.library.custom_op("mokd_fast::augment_crops", mutates_args=())
def _augment(
    crops: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _kernels(backend).augment_crops(crops, params, mean, std, dtype)


@_augment.register_fake
def _(crops, params, mean, std, dtype, backend):
    return crops.new_empty(crops.shape, dtype=dtype).permute(0, 3, 1, 2)


def _kernels(backend: str) -> Any:
    """The module of a backend. Triton is imported at first use, as in `distill._kernels`."""
    if backend == "triton":
        from mokd_fast.kernels import augment

        return augment
    return {"cpu": cpu, "reference": reference}[backend]


def _run(
    backend: str,
    crops: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    mean, std = [float(m) for m in mean], [float(s) for s in std]
    _, _, W, C = crops.shape
    if (crops.stride(2) != C and W > 1) or (crops.stride(3) != 1 and C > 1):
        crops = crops.contiguous()  # the kernels take any rows of dense pixels
    params = params.contiguous()
    out: Tensor
    if plain((crops, params)):  # the way through torch.library takes longer
        out = _kernels(backend).augment_crops(crops, params, mean, std, dtype)
    else:
        out = _augment(crops, params, mean, std, dtype, backend)
    return out


def why_not(backend: str, crops: Tensor, params: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why a backend cannot take these tensors, or None."""
    if reason := transformed(crops):
        return reason
    if backend == "triton" and (reason := triton_why_not(crops)):
        return reason
    found: str | None = _kernels(backend).augment_why_not(crops)
    return found


for _name in ("triton", "cpu"):
    register("augment_crops", _name, partial(_run, _name), partial(why_not, _name))
register("augment_crops", "reference", partial(_run, "reference"))


def _check(
    crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> None:
    if crops.dtype != torch.uint8 or crops.ndim != 4:
        raise ValueError(
            f"crops must be uint8 [B, H, W, C], got {crops.dtype} of shape {list(crops.shape)}"
        )
    B, H, W, C = crops.shape
    if C not in (1, 3) or H < 1 or W < 1:
        hint = "; they look like [B, C, H, W]: permute(0, 2, 3, 1)" if H in (1, 3) else ""
        raise ValueError(
            f"crops must be [B, H, W, C] with C of 1 or 3 and a pixel at least, "
            f"got {list(crops.shape)}{hint}"
        )
    columns = len(AUGMENT_COLUMNS)
    if params.dtype != torch.float32 or params.shape != (B, columns):
        raise ValueError(
            f"params must be float32 [B, {columns}] = [{B}, {columns}], a row a crop "
            f"(augment_params makes it), got {params.dtype} of shape {list(params.shape)}"
        )
    if params.device != crops.device:
        raise ValueError(f"params must be on {crops.device} like crops, got {params.device}")
    if not len(mean) == len(std) == C:
        raise ValueError(
            f"mean and std must have a number a channel, {C}, got {len(mean)} and {len(std)}"
        )
    if not all(s > 0 for s in std):
        raise ValueError(f"std must be above 0, got {list(std)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
