"""The attention that feature_search and joint_attention (search.py) are made of, in Triton.

Q queries, B images, H heads, N tokens, d width of a head (padded to a power of two, D); M rows, one
tensor [B, H, M, d] by its strides: the queries, or in joint_attention first the tokens.

`_attend`: a program has ROWS rows of a head and walks its tokens with a running maximum, reading
K and V once a program: rows and stats (max of q k, sum), 4 (d + 2) bytes a row. Backward makes the
scores again: `_row_gradients` for what asks, `_key_gradients` for keys and values, each sum in one
program in a fixed order: no atomic, same bits.
Products of 16-bit tensors take 16-bit operands, weights too, and add up in fp32; fp32 is IEEE.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distill import INTERPRETED, LOWEST

SIZES = ("B", "M", "N", "Q", "M_all", "offset")
# numpy, which the interpreter is made of, has no product of bf16.
WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_rows(x, stride, b, h, i, count, d, D: tl.constexpr):
    """Rows i of a head of x [B, H, count, d]: [len(i), D], zeros beyond."""
    k = tl.arange(0, D)
    at = x + b * stride[0] + h * stride[1] + i.to(tl.int64)[:, None] * stride[2] + k[None, :]
    return tl.load(at, mask=(i < count)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def store_rows(to, b, h, i, B, H, count, M_all, offset, d, value, D: tl.constexpr):
    """Rows i to [B, M_all, H, d], from row `offset` on."""
    k = tl.arange(0, D)
    at = ((b * M_all + offset + i.to(tl.int64)) * H + h) * d
    mask = (i < count)[:, None] & (k < d)[None, :]
    tl.store(to + at[:, None] + k[None, :], value.to(to.dtype.element_ty), mask=mask)


@triton.jit
def place_of(H, M, ROWS: tl.constexpr):
    """Image, head and rows of a program."""
    tiles = tl.cdiv(M, ROWS)
    head = tl.program_id(0) // tiles
    i = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    return (head // H).to(tl.int64), (head % H).to(tl.int64), i


@triton.jit
def load_stats(stats, b, h, i, H, M, M_all, offset):
    at = stats + ((b * M_all + offset + i.to(tl.int64)) * H + h) * 2
    return tl.load(at, mask=i < M, other=0.0), tl.load(at + 1, mask=i < M, other=1.0)


@triton.jit(do_not_specialize=SIZES)
def _attend(x, x_stride, k, k_stride, v, v_stride, rows, stats, scores, scale, B: tl.int64, H,
            M, N, M_all: tl.int64, offset: tl.int64, d, D: tl.constexpr, ROWS: tl.constexpr,
            KEYS: tl.constexpr, SCORES: tl.constexpr):  # fmt: skip
    b, h, i = place_of(H, M, ROWS)
    q = load_rows(x, x_stride, b, h, i, M, d, D)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, D], tl.float32)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        s = _dot(q, tl.trans(load_rows(k, k_stride, b, h, j, N, d, D)))
        if SCORES:  # [Q, B, H, N]
            at = ((i.to(tl.int64) * B + b) * H + h) * N
            mask = (i < M)[:, None] & (j < N)[None, :]
            tl.store(scores + at[:, None] + j[None, :], s, mask=mask)
        s = tl.where((j < N)[None, :], s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp((top - high) * scale)
        w = tl.exp((s - high[:, None]) * scale)
        total = total * decay + tl.sum(w, 1)
        values = load_rows(v, v_stride, b, h, j, N, d, D)
        mean = mean * decay[:, None] + _dot(w.to(values.dtype), values)
        top = high
    store_rows(rows, b, h, i, B, H, M, M_all, offset, d, mean / total[:, None], D)
    at = stats + ((b * M_all + offset + i.to(tl.int64)) * H + h) * 2
    tl.store(at, top, mask=i < M)
    tl.store(at + 1, total, mask=i < M)


@triton.jit
def _weights(q, keys, top, total, i, j, M, N, scale):
    s = _dot(q, tl.trans(keys))
    w = tl.exp((s - top[:, None]) * scale) / total[:, None]
    return tl.where((i < M)[:, None] & (j < N)[None, :], w, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _row_gradients(x, x_stride, k, k_stride, v, v_stride, stats, out, out_stride, delta, dx, scale,
                   B: tl.int64, H, M, N, M_all: tl.int64, offset: tl.int64, d, D: tl.constexpr,
                   ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Adds to dx [B, M, H, d] fp32 what the scores say, from the gradient `out` of o; delta gets
    the mean of out v, the very numbers that it is subtracted from."""
    b, h, i = place_of(H, M, ROWS)
    q = load_rows(x, x_stride, b, h, i, M, d, D)
    g = load_rows(out, out_stride, b, h, i, M, d, D)
    top, total = load_stats(stats, b, h, i, H, M, M_all, offset)
    place = delta + (b * M_all + offset + i.to(tl.int64)) * H + h
    mean = tl.load(place, mask=i < M, other=0.0)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        w = _weights(q, load_rows(k, k_stride, b, h, j, N, d, D), top, total, i, j, M, N, scale)
        values = load_rows(v, v_stride, b, h, j, N, d, D)
        mean += tl.sum(w * _dot(g.to(values.dtype), tl.trans(values)), 1)
    tl.store(place, mean, mask=i < M)
    kk = tl.arange(0, D)
    at = ((b * M_all + offset + i.to(tl.int64)) * H + h) * d
    mask = (i < M)[:, None] & (kk < d)[None, :]
    found = tl.load(dx + at[:, None] + kk[None, :], mask=mask, other=0.0)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        keys = load_rows(k, k_stride, b, h, j, N, d, D)
        w = _weights(q, keys, top, total, i, j, M, N, scale)
        values = load_rows(v, v_stride, b, h, j, N, d, D)
        ds = w * (_dot(g.to(values.dtype), tl.trans(values)) - mean[:, None]) * scale
        found += _dot(ds.to(keys.dtype), keys)
    tl.store(dx + at[:, None] + kk[None, :], found, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(x, x_stride, k, k_stride, v, v_stride, stats, out, out_stride, delta, dk, dv,
                   scale, B: tl.int64, H, M, N, M_all: tl.int64, offset: tl.int64, d,
                   D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Adds to dk and dv [B, N, H, d] fp32 what M rows say."""
    b, h, j = place_of(H, N, KEYS)
    keys = load_rows(k, k_stride, b, h, j, N, d, D)
    values = load_rows(v, v_stride, b, h, j, N, d, D)
    kk = tl.arange(0, D)
    at = (((b * N + j.to(tl.int64)) * H + h) * d)[:, None] + kk[None, :]
    mask = (j < N)[:, None] & (kk < d)[None, :]
    to_k = tl.load(dk + at, mask=mask, other=0.0)
    to_v = tl.load(dv + at, mask=mask, other=0.0)
    for m in range(0, M, ROWS):
        i = m + tl.arange(0, ROWS)
        q = load_rows(x, x_stride, b, h, i, M, d, D)
        g = load_rows(out, out_stride, b, h, i, M, d, D).to(values.dtype)
        top, total = load_stats(stats, b, h, i, H, M, M_all, offset)
        place = delta + (b * M_all + offset + i.to(tl.int64)) * H + h
        mean = tl.load(place, mask=i < M, other=0.0)
        w = _weights(q, keys, top, total, i, j, M, N, scale)
        ds = w * (_dot(g, tl.trans(values)) - mean[:, None]) * scale
        to_v += _dot(tl.trans(w.to(g.dtype)), g)
        to_k += _dot(tl.trans(ds.to(q.dtype)), q)
    tl.store(dk + at, to_k, mask=mask)
    tl.store(dv + at, to_v, mask=mask)


def _tile(x: Tensor, D: int) -> tuple[int, int, int]:
    """Rows and tokens at a time, and warps: the most that spills no register (AOT tests; no GPU has
    measured them). IEEE products of fp32 hold their operands in registers."""
    if x.dtype == torch.float32:
        return (16, 16, 8 if D > 64 else 4)
    return 32, 32, 4


class Rows:
    """What launches over M rows of x [B, H, M, d] share; M_all rows lie in what they write."""

    def __init__(self, x: Tensor, k: Tensor, v: Tensor, M_all: int, offset: int) -> None:
        (B, H, M, d), N = x.shape, k.shape[2]
        D = max(16, triton.next_power_of_2(d))
        self.rows, keys, self.warps = _tile(x, D)
        self.rows = 16 if M <= 16 else self.rows
        self.grid, self.key_grid = (
            (B * H * triton.cdiv(count, size),) for count, size in ((M, self.rows), (N, keys))
        )
        self.tensors = x, x.stride(), k, k.stride(), v, v.stride()
        self.sizes: tuple[Any, ...] = d**-0.5, B, H, M, N, M_all, offset, d, D, self.rows, keys
        # Merging keeps several fp32 tiles of rows in registers: few rows, or they spill.
        self.few = max(8, 1024 // D)
        self.few_grid = (B * H * triton.cdiv(M, self.few),)


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wide(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def attention(
    x: Tensor, k: Tensor, v: Tensor, rows: Tensor, stats: Tensor, offset: int, scores: Tensor
) -> None:
    if not x.numel():
        return
    call = Rows(x, k, v, rows.shape[1], offset)
    with torch.cuda.device_of(x):
        _attend[call.grid](
            *call.tensors, rows, stats, scores, *call.sizes, scores.numel() > 0,
            num_warps=call.warps,
        )  # fmt: skip


def gradients(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor,
    out: Tensor,
    delta: Tensor,
    dx: Tensor,
    dk: Tensor,
    dv: Tensor,
    offset: int,
) -> None:
    """Of the rows from `offset` on; out, delta and dx are those of all rows."""
    if not x.numel():
        return
    call = Rows(x, k, v, dx.shape[1], offset)
    mine = out[:, offset:].transpose(1, 2)
    given = *call.tensors, stats, mine, mine.stride(), delta
    with torch.cuda.device_of(x):
        _row_gradients[call.grid](*given, dx, *call.sizes, num_warps=call.warps)
        _key_gradients[call.key_grid](*given, dk, dv, *call.sizes, num_warps=call.warps)
