"""batch_norm in Triton: by a batch's own statistics, with the sum and the ReLU that follow. The
formula stands in csrc/cpu/batch_norm.cpp.

x is [M, C], the channels innermost: M = B H W. Forward reads it twice, for its statistics and for
the result; backward reads what it needs twice, for two sums a channel and for x's gradient. A
program of a pass that sums has columns of its own and every `parts`-th tile of rows, a second,
small kernel joins what they say in a fixed order: no atomics, same bits. Sums go from the last tile
to the first, what follows them from the first to the last: it begins with what the L2 still has.

With something added the ReLU's mask comes from y, and its gradient, the masked one, is written by
the pass that sums and read by the other; else the mask is made again from x.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a tile, its columns at most, and warps of its program. This and what follows as an H200
# was fastest with (bench/batch_norm_gpu.py --sweep).
TILE, WIDEST, WARPS = 2048, 128, 4
STAGES = 3  # of the loop over a part's tiles
PROGRAMS = 512  # of a pass that sums, at most, unless there are more tiles of columns
MERGED = 4  # channels of a program that joins
Moving = tuple[Tensor, Tensor, float] | None  # running mean and variance, and their momentum


@triton.jit
def _within(C: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets in a tile: 32 bits, the same in all of them."""
    return tl.arange(0, ROWS)[:, None] * C.to(tl.int32) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _tile(i, M: tl.int64, C: tl.int64, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where tile number i of rows begins, 64 bits, and where it has numbers. at: first column."""
    rows, columns = M - i * ROWS, C - at
    mask = (tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, COLUMNS) < columns)[None, :]
    return i * ROWS * C + at, mask


@triton.jit
def _tiles(part, M: tl.int64, parts: tl.int64, ROWS: tl.constexpr):
    """Of a part: number of its first tile, how many it has, and their rows. It has every `parts`-th
    from the last of all back, which is the only one that may not be full."""
    all = (M + ROWS - 1) // ROWS
    own = (all - part + parts - 1) // parts
    rows = tl.where(part == 0, own * ROWS - (all * ROWS - M), own * ROWS)
    return all - 1 - part, own, rows.to(tl.float32)


@triton.jit(do_not_specialize=["M", "parts"])
def _statistics(x, means, squares, M: tl.int64, C: tl.int64, parts: tl.int64, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Of a part of the rows: mean and sum of squares about it, to [C, parts] each."""
    part = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * COLUMNS
    first, own, n = _tiles(part, M, parts, ROWS)
    within = _within(C, ROWS, COLUMNS)
    base, mask = _tile(first, M, C, at, ROWS, COLUMNS)
    # Sums of squares keep their digits about a number that is near the mean.
    count = tl.minimum(ROWS, M - first * ROWS).to(tl.float32)
    near = tl.sum(tl.load(x + base + within, mask=mask, other=0.0).to(tl.float32), 0) / count
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.range(own, num_stages=STAGES):  # none has a step below 0 that is no constant
        base, mask = _tile(first - j * parts, M, C, at, ROWS, COLUMNS)
        d = tl.load(x + base + within, mask=mask, other=0.0).to(tl.float32) - near[None, :]
        d = tl.where(mask, d, 0.0)
        total += d
        square += d * d
    off = tl.sum(total, 0) / n
    column = at + tl.arange(0, COLUMNS)
    to = column * parts + part
    tl.store(means + to, near + off, mask=column < C)
    tl.store(squares + to, tl.sum(square, 0) - off * off * n, mask=column < C)


@triton.jit(do_not_specialize=["M", "parts"])
def _join_statistics(means, squares, stats, moving_mean, moving_var, momentum, eps, M: tl.int64,
                     C: tl.int64, parts: tl.int64, ROWS: tl.constexpr, PARTS: tl.constexpr,
                     CHANNELS: tl.constexpr, MOVES: tl.constexpr):  # fmt: skip
    """stats [3, C]: mean, 1 / std and unbiased variance; and the running ones, moved."""
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS).to(tl.int64)
    mask = (c < C)[:, None] & (part < parts)[None, :]
    where = c[:, None] * parts + part[None, :]
    mean = tl.load(means + where, mask=mask, other=0.0)
    _, _, n = _tiles(part, M, parts, ROWS)
    n = tl.where(part < parts, n, 0.0)[None, :]
    first = tl.load(means + c * parts, mask=c < C, other=0.0)
    apart = tl.where(mask, mean - first[:, None], 0.0)
    count = M.to(tl.float32)
    off = tl.sum(n * apart, 1) / count
    apart -= off[:, None]
    square = tl.load(squares + where, mask=mask, other=0.0) + n * apart * apart
    square = tl.sum(tl.where(mask, square, 0.0), 1)
    mean = first + off
    one = tl.full([CHANNELS], 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.sqrt_rn(square / count + eps))
    var = square / (count - 1)
    tl.store(stats + c, mean, mask=c < C)
    tl.store(stats + C + c, inverse, mask=c < C)
    tl.store(stats + 2 * C + c, var, mask=c < C)
    if MOVES:
        old = tl.load(moving_mean + c, mask=c < C)
        tl.store(moving_mean + c, old + momentum * (mean - old), mask=c < C)
        old = tl.load(moving_var + c, mask=c < C)
        tl.store(moving_var + c, old + momentum * (var - old), mask=c < C)


@triton.jit
def _columns(values, at, C: tl.int64, COLUMNS: tl.constexpr):
    column = at + tl.arange(0, COLUMNS)
    return tl.load(values + column, mask=column < C, other=0.0)[None, :]


@triton.jit(do_not_specialize=["M"])
def _result(x, weight, bias, stats, added, y, M: tl.int64, C: tl.int64, ADDS: tl.constexpr,
            RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One tile of y."""
    at = tl.program_id(1).to(tl.int64) * COLUMNS
    base, mask = _tile(tl.program_id(0).to(tl.int64), M, C, at, ROWS, COLUMNS)
    within = _within(C, ROWS, COLUMNS)
    z = tl.load(x + base + within, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        more = tl.load(added + base + within, mask=mask, other=0.0)
    rate = _columns(weight, at, C, COLUMNS) * _columns(stats + C, at, C, COLUMNS)
    z = (z - _columns(stats, at, C, COLUMNS)) * rate + _columns(bias, at, C, COLUMNS)
    if ADDS:
        z += more.to(tl.float32)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    tl.store(y + base + within, z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "parts"])
def _sums(g, x, y, weight, bias, stats, for_added, sums, M: tl.int64, C: tl.int64, parts: tl.int64,
          FROM_Y: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """Of a part of the rows: sums of dz and of dz (x - mean), to [2, C, parts]. dz is the gradient
    after the ReLU's mask."""
    part = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * COLUMNS
    first, own, _ = _tiles(part, M, parts, ROWS)
    within = _within(C, ROWS, COLUMNS)
    mean = _columns(stats, at, C, COLUMNS)
    rate = _columns(weight, at, C, COLUMNS) * _columns(stats + C, at, C, COLUMNS)
    shift = _columns(bias, at, C, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.range(own, num_stages=STAGES):
        base, mask = _tile(first - j * parts, M, C, at, ROWS, COLUMNS)
        dz = tl.load(g + base + within, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(x + base + within, mask=mask, other=0.0).to(tl.float32) - mean
        if FROM_Y:
            dz = tl.where(tl.load(y + base + within, mask=mask, other=0.0) <= 0, 0.0, dz)
            tl.store(for_added + base + within, dz.to(for_added.dtype.element_ty), mask=mask)
        elif RELU:
            dz = tl.where(d * rate + shift <= 0, 0.0, dz)
        total += dz
        product += dz * tl.where(mask, d, 0.0)  # a NaN mean times 0 would be one
    column = at + tl.arange(0, COLUMNS)
    to = sums + column * parts + part
    tl.store(to, tl.sum(total, 0), mask=column < C)
    tl.store(to + C * parts, tl.sum(product, 0), mask=column < C)


@triton.jit(do_not_specialize=["M", "parts"])
def _join_sums(sums, stats, means, for_weight, for_bias, M: tl.int64, C: tl.int64, parts: tl.int64,
               PARTS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """The gradients of weight and bias; means [2, C] of dz and of dz (x - mean) / std^2."""
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS).to(tl.int64)
    mask = (c < C)[:, None] & (part < parts)[None, :]
    where = c[:, None] * parts + part[None, :]
    total = tl.sum(tl.load(sums + where, mask=mask, other=0.0), 1)
    product = tl.sum(tl.load(sums + C * parts + where, mask=mask, other=0.0), 1)
    inverse = tl.load(stats + C + c, mask=c < C, other=0.0)
    count = M.to(tl.float32)
    tl.store(for_bias + c, total, mask=c < C)
    tl.store(for_weight + c, product * inverse, mask=c < C)
    tl.store(means + c, total / count, mask=c < C)
    tl.store(means + C + c, product * inverse * inverse / count, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _for_x(g, x, weight, bias, stats, means, out, M: tl.int64, C: tl.int64, RELU: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One tile of x's gradient. g: of y; or of what was added, where something was."""
    at = tl.program_id(1).to(tl.int64) * COLUMNS
    base, mask = _tile(tl.program_id(0).to(tl.int64), M, C, at, ROWS, COLUMNS)
    within = _within(C, ROWS, COLUMNS)
    dz = tl.load(g + base + within, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(x + base + within, mask=mask, other=0.0).to(tl.float32)
    d -= _columns(stats, at, C, COLUMNS)
    rate = _columns(weight, at, C, COLUMNS) * _columns(stats + C, at, C, COLUMNS)
    if RELU:
        dz = tl.where(d * rate + _columns(bias, at, C, COLUMNS) <= 0, 0.0, dz)
    mean, slope = _columns(means, at, C, COLUMNS), _columns(means + C, at, C, COLUMNS)
    found = rate * (dz - mean - d * slope)
    tl.store(out + base + within, found.to(out.dtype.element_ty), mask=mask)


def _cut(x: Tensor) -> tuple[dict[str, Any], int, tuple[int, int], tuple[int, int]]:
    """What all kernels take, the parts of a sum, and the grids of passes that sum or do not."""
    C = x.shape[1]
    M = x.numel() // C
    columns = min(WIDEST, max(16, triton.next_power_of_2(C)))
    rows = TILE // columns
    tiles, across = triton.cdiv(M, rows), triton.cdiv(C, columns)
    parts = min(tiles, max(1, PROGRAMS // across))
    shape = {"M": M, "C": C, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
    return shape, parts, (parts, across), (tiles, across)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    eps: float,
    relu: bool,
    moving: Moving = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `batch_norm._forward`; `moving` statistics move in place."""
    x, weight, bias = _channels_last(x), weight.contiguous(), bias.contiguous()
    y, stats = torch.empty_like(x), weight.new_empty(3, len(weight))
    added = added if added is None else _channels_last(added)
    shape, parts, summing, each = _cut(x)
    M, C, rows = shape["M"], shape["C"], shape["ROWS"]
    partial = weight.new_empty(2, C, parts)
    mean, var, momentum = (stats, stats, 0.0) if moving is None else moving
    with torch.cuda.device_of(x):
        _statistics[summing](x, partial[0], partial[1], parts=parts, STAGES=STAGES, **shape)
        _join_statistics[(triton.cdiv(C, MERGED),)](
            partial[0], partial[1], stats, mean, var, momentum, eps, M, C, parts, rows,
            triton.next_power_of_2(parts), MERGED, moving is not None,
        )  # fmt: skip
        _result[each](
            x, weight, bias, stats, x if added is None else added, y, ADDS=added is not None,
            RELU=relu, **shape,
        )  # fmt: skip
    return y, stats


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    y: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as `batch_norm._backward`."""
    x, grad = _channels_last(x), _channels_last(grad)
    weight, bias = weight.contiguous(), bias.contiguous()
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    found, for_weight, for_bias = (torch.empty_like(t) for t in (x, weight, bias))
    shape, parts, summing, each = _cut(x)
    M, C = shape["M"], shape["C"]
    sums, means = weight.new_empty(2, C, parts), weight.new_empty(2, C)
    masked = y is None and relu
    with torch.cuda.device_of(x):
        _sums[summing](
            grad, x, x if y is None else y, weight, bias, stats, added, sums, parts=parts,
            FROM_Y=y is not None, RELU=masked, STAGES=STAGES, **shape,
        )  # fmt: skip
        _join_sums[(triton.cdiv(C, MERGED),)](
            sums, stats, means, for_weight, for_bias, M, C, parts, triton.next_power_of_2(parts),
            MERGED,
        )  # fmt: skip
        _for_x[each](
            grad if y is None else added, x, weight, bias, stats, means, found, RELU=masked, **shape
        )
    return found, for_weight, for_bias, added
