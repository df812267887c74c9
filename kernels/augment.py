"""augment_crops in Triton. What it does stands in mokd_fast/ops/augment.py; the steps are those of
mokd_fast/ops/reference.py, whose bits these are but for the blur's last one.

Four launches, and no number read by the host; crops that a launch has nothing to do for leave it:
    _sum_luma      what comes before contrast, and the sum of the luma (int64, so in any order)
    _colour        all of the colour; then the result, or bytes for the blur
    _blur_along    a row's neighbours, to fp32
    _blur_across   a column's, and the result
Bytes moved a pixel with three channels and b bytes a number: 3 read and 3 b written; 3 more read
with contrast; 30 more with blur (bytes and fp32, written and read; neighbours come from caches).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mokd_fast.ops.reference import SIGMA_MAX as _SIGMA_MAX
from mokd_fast.ops.reference import affine

COLUMNS: tl.constexpr = tl.constexpr(12)
ORDER: tl.constexpr = tl.constexpr(1)
FACTORS: tl.constexpr = tl.constexpr(5)
GREY: tl.constexpr = tl.constexpr(9)
SIGMA: tl.constexpr = tl.constexpr(10)
SOLARIZE: tl.constexpr = tl.constexpr(11)
CONTRAST: tl.constexpr = tl.constexpr(1)
SIGMA_MAX: tl.constexpr = tl.constexpr(_SIGMA_MAX)
# An argument of a kernel called `params` would meet a variable of Triton's launcher: `table` here.
PIXELS, NUMBERS = 256, 512  # of a program; no GPU has measured them
# Pillow rounds after each product; a fused a * b + c would show where fractions are cut off.
PLAIN = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _luma(r, g, b):
    return tl.floor((r * 19595.0 + g * 38470.0 + b * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _blend(flat, x, factor):
    return tl.floor(_clamp(flat + (x - flat) * factor))


@triton.jit
def _divide(a, b):
    return tl.div_rn(a, b)


@triton.jit
def _hue(r, g, b, factor):
    v = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = v - low
    part = _divide(v + v + low - r - g - b, tl.maximum(chroma, 1.0))
    red = tl.where(b == low, 1.0 - part, part - 1.0)
    green = tl.where(r == low, 3.0 - part, 1.0 + part)
    blue = tl.where(g == low, 5.0 - part, 3.0 + part)
    hue = tl.where(r == v, red, tl.where(g == v, green, blue))
    hue = _divide(hue, tl.full(hue.shape, 6.0, tl.float32))
    hue = tl.floor(tl.where(hue < 0, hue + 1.0, hue) * 255.0)
    hue += (factor.to(tl.float64) * 255.0).to(tl.int32).to(tl.float32)
    hue = tl.where(hue < 0, hue + 256.0, hue)
    hue = tl.where(hue >= 256, hue - 256.0, hue) * 6.0
    fall = tl.floor(_divide(chroma, tl.maximum(v, 1.0)) * 255.0) * v
    red = _clamp(510.0 - tl.abs(hue - 765.0))
    green = _clamp(tl.abs(hue - 510.0) - 255.0)
    blue = _clamp(tl.abs(hue - 1020.0) - 255.0)
    r = v - tl.floor(red * fall * (1.0 / 65025.0) + 0.5)
    g = v - tl.floor(green * fall * (1.0 / 65025.0) + 0.5)
    b = v - tl.floor(blue * fall * (1.0 / 65025.0) + 0.5)
    return r, g, b


@triton.jit
def _step(row, slot, C: tl.constexpr):
    """The code in this place of the order, -1 where nothing is done, and its factor."""
    code = tl.load(row + ORDER + slot)
    code = tl.where((code > -1) & (code < 4), code, -1.0).to(tl.int32)
    for i in range(slot):  # each counts once
        code = tl.where(tl.load(row + ORDER + i).to(tl.int32) == code, -1, code)
    factor = tl.load(row + FACTORS + tl.maximum(code, 0))
    neutral = tl.where(code == 3, 0.0, 1.0)
    return tl.where((factor == neutral) | ((C == 1) & (code > CONTRAST)), -1, code), factor


@triton.jit
def _load(crops, stride, crop, row, pixel, H, W, C: tl.constexpr):
    """Three channels of the pixels, flipped if the crop is; with one channel, three times that."""
    y = pixel // W
    x = pixel % W
    x = tl.where(tl.load(row) > 0, W - 1 - x, x)
    mask = pixel < H * W
    at = crops + crop * stride[0] + y.to(tl.int64) * stride[1] + x.to(tl.int64) * C
    r = tl.load(at, mask=mask, other=0).to(tl.float32)
    if C == 1:
        return r, r, r
    g = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
    b = tl.load(at + 2, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _grey(r, g, b, C: tl.constexpr):
    if C == 1:
        return r
    return _luma(r, g, b)


@triton.jit(do_not_specialize=["tiles"])
def _sum_luma(crops, stride, table, sums, H, W, tiles, C: tl.constexpr, PIXELS: tl.constexpr):
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    row = table + crop * COLUMNS
    wanted = False
    for slot in range(4):
        code, _ = _step(row, slot, C)
        wanted = wanted | (code == CONTRAST)
    if wanted:
        r, g, b = _load(crops, stride, crop, row, pixel, H, W, C)
        before = True
        for slot in range(4):
            code, factor = _step(row, slot, C)
            before = before & (code != CONTRAST)
            if before:
                r, g, b = _apply(r, g, b, code, factor, 0.0, C)
        grey = tl.where(pixel < H * W, _grey(r, g, b, C), 0.0).to(tl.int32)
        tl.atomic_add(sums + crop, tl.sum(grey).to(tl.int64), sem="relaxed")


@triton.jit
def _apply(r, g, b, code, factor, mean, C: tl.constexpr):
    """One step. mean: what contrast turns about."""
    if (code == 0) | (code == 1):
        flat = tl.where(code == 1, mean, 0.0)
        r, g, b = _blend(flat, r, factor), _blend(flat, g, factor), _blend(flat, b, factor)
    if C == 3:
        if code == 2:
            grey = _luma(r, g, b)
            r, g, b = _blend(grey, r, factor), _blend(grey, g, factor), _blend(grey, b, factor)
        if code == 3:
            r, g, b = _hue(r, g, b, factor)
    return r, g, b


@triton.jit
def _rounded(sum, n):
    """sum / n to the nearest whole number, halves up: fp32 guesses, integers correct it."""
    n = tl.cast(n, tl.int64)  # of one pixel it is a constant, which has no `to`
    guess = (sum.to(tl.float32) / n.to(tl.float32) + 0.5).to(tl.int64)
    twice = 2 * sum + n
    guess -= (twice < 2 * n * guess).to(tl.int64)
    guess += (twice >= 2 * n * (guess + 1)).to(tl.int64)
    return guess.to(tl.float32)


@triton.jit
def _finish(x, row, scale, shift):
    if tl.load(row + SOLARIZE) > 0:
        x = tl.where(x >= 128, 255.0 - x, x)
    return x * scale + shift


@triton.jit(do_not_specialize=["tiles"])
def _colour(crops, stride, table, sums, bytes, out, H, W, tiles, scale, shift, C: tl.constexpr,
            PIXELS: tl.constexpr):  # fmt: skip
    """To out [B, H, W, C], or to bytes [B, H, W, C] where the crop will be blurred."""
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    row = table + crop * COLUMNS
    r, g, b = _load(crops, stride, crop, row, pixel, H, W, C)
    mean = _rounded(tl.load(sums + crop), H * W)
    for slot in range(4):
        code, factor = _step(row, slot, C)
        r, g, b = _apply(r, g, b, code, factor, mean, C)
    if tl.load(row + GREY) > 0:
        r = _grey(r, g, b, C)
        g = r
        b = r
    at = crop * H * W * C + pixel.to(tl.int64) * C
    mask = pixel < H * W
    if tl.load(row + SIGMA) > 0:
        tl.store(bytes + at, r.to(tl.uint8), mask=mask)
        if C == 3:
            tl.store(bytes + at + 1, g.to(tl.uint8), mask=mask)
            tl.store(bytes + at + 2, b.to(tl.uint8), mask=mask)
    else:
        kind: tl.constexpr = out.dtype.element_ty
        tl.store(out + at, _finish(r, row, scale[0], shift[0]).to(kind), mask=mask)
        if C == 3:
            tl.store(out + at + 1, _finish(g, row, scale[1], shift[1]).to(kind), mask=mask)
            tl.store(out + at + 2, _finish(b, row, scale[2], shift[2]).to(kind), mask=mask)


@triton.jit
def _gaussian(x, at, place, step, last, sigma, mask):
    """Sum over neighbours of x[at], `step` apart; beyond 0 and `last` the edge goes on."""
    sigma = tl.minimum(sigma, SIGMA_MAX)
    R = tl.ceil(3.0 * sigma).to(tl.int32)
    total = 0.0
    sum = tl.zeros(place.shape, tl.float32)
    for j in range(-R, R + 1):
        far = j / sigma
        tap = tl.exp(-0.5 * far * far)
        near = tl.minimum(tl.maximum(place + j, 0), last) - place
        total += tap
        sum += tap * tl.load(x + at + near.to(tl.int64) * step, mask=mask, other=0).to(tl.float32)
    return sum / total


@triton.jit(do_not_specialize=["tiles"])
def _blur_along(bytes, table, wide, H, W, tiles, C: tl.constexpr, NUMBERS: tl.constexpr):
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    sigma = tl.load(table + crop * COLUMNS + SIGMA)
    if sigma > 0:
        mask = i < H * W * C
        x = ((i // C) % W).to(tl.int32)
        at = crop * H * W * C + i
        tl.store(wide + at, _gaussian(bytes, at, x, C, W - 1, sigma, mask), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def _blur_across(wide, table, out, H, W, tiles, scale, shift, C: tl.constexpr,
                 NUMBERS: tl.constexpr):  # fmt: skip
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    row = table + crop * COLUMNS
    sigma = tl.load(row + SIGMA)
    if sigma > 0:
        mask = i < H * W * C
        y = (i // (W * C)).to(tl.int32)
        at = crop * H * W * C + i
        x = tl.floor(_gaussian(wide, at, y, W * C, H - 1, sigma, mask) + 0.5)
        channel = i % C
        last: tl.constexpr = C - 1
        a = tl.where(channel == 0, scale[0], tl.where(channel == 1, scale[last // 2], scale[last]))
        b = tl.where(channel == 0, shift[0], tl.where(channel == 1, shift[last // 2], shift[last]))
        tl.store(out + at, _finish(x, row, a, b).to(out.dtype.element_ty), mask=mask)


def augment_why_not(crops: Tensor) -> str | None:
    """Why these kernels cannot take the crops, or None."""
    if crops[0:1].numel() >= 2**30:
        return "it takes crops of less than 2^30 numbers"
    return None


def augment_crops(
    crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Arguments and result as `augment.augment_crops`."""
    B, H, W, C = crops.shape
    scale, shift = map(tuple, affine(mean, std))
    out = crops.new_empty((B, H, W, C), dtype=dtype)
    bytes, wide = crops.new_empty(out.shape), crops.new_empty(out.shape, dtype=torch.float32)
    sums = crops.new_zeros(B, dtype=torch.int64)
    if not B:
        return out.permute(0, 3, 1, 2)
    stride, size = crops.stride()[:2], (H, W)
    pixels, numbers = triton.cdiv(H * W, PIXELS), triton.cdiv(H * W * C, NUMBERS)
    with torch.cuda.device_of(crops):
        _sum_luma[(B * pixels,)](crops, stride, params, sums, *size, pixels, C, PIXELS, **PLAIN)
        _colour[(B * pixels,)](
            crops, stride, params, sums, bytes, out, *size, pixels, scale, shift, C, PIXELS, **PLAIN
        )
        _blur_along[(B * numbers,)](bytes, params, wide, *size, numbers, C, NUMBERS)
        _blur_across[(B * numbers,)](
            wide, params, out, *size, numbers, scale, shift, C, NUMBERS, **PLAIN
        )
    return out.permute(0, 3, 1, 2)
