"""feature_search and joint_attention in Triton. Formulas: mokd_fast/ops/search.py.

Q queries, B images, H heads, N tokens, d width of a head (padded to a power of two, D); M rows, one
tensor [B, H, M, d] by its strides: the queries, or in joint_attention first the tokens.

`_attend`: a program has ROWS rows of a head and walks its tokens with a running maximum, reading
K and V once a program: rows and stats (max of q k, sum), 4 (d + 2) bytes a row. `_merge`: a program
gives ROWS tokens to each query and writes Q N d numbers a head, which is what joint_attention is
bound by. Backward makes the scores again: `_row_gradients` for what asks, `_key_gradients` for keys
and values, each sum in one program in a fixed order: no atomic, same bits. What the shares say to a
query's key and value is left a tile of rows each, and summed after.
Products of 16-bit tensors take 16-bit operands, weights too, and add up in fp32; fp32 is IEEE.
Not here: fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distill import CAPABILITY, INTERPRETED, LOWEST, TYPES

SIZES = ("B", "M", "N", "Q", "M_all", "offset")
# numpy, which the interpreter is made of, has no product of bf16.
WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(x, stride, b, h, i, count, d, D: tl.constexpr):
    """Rows i of a head of x [B, H, count, d]: [len(i), D], zeros beyond."""
    k = tl.arange(0, D)
    at = x + b * stride[0] + h * stride[1] + i.to(tl.int64)[:, None] * stride[2] + k[None, :]
    return tl.load(at, mask=(i < count)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _store(to, b, h, i, B, H, count, M_all, offset, d, value, D: tl.constexpr):
    """Rows i to [B, M_all, H, d], from row `offset` on."""
    k = tl.arange(0, D)
    at = ((b * M_all + offset + i.to(tl.int64)) * H + h) * d
    mask = (i < count)[:, None] & (k < d)[None, :]
    tl.store(to + at[:, None] + k[None, :], value.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _place(H, M, ROWS: tl.constexpr):
    """Image, head and rows of a program."""
    tiles = tl.cdiv(M, ROWS)
    head = tl.program_id(0) // tiles
    i = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    return (head // H).to(tl.int64), (head % H).to(tl.int64), i


@triton.jit
def _stats(stats, b, h, i, H, M, M_all, offset):
    at = stats + ((b * M_all + offset + i.to(tl.int64)) * H + h) * 2
    return tl.load(at, mask=i < M, other=0.0), tl.load(at + 1, mask=i < M, other=1.0)


@triton.jit(do_not_specialize=SIZES)
def _attend(x, x_stride, k, k_stride, v, v_stride, rows, stats, scores, scale, B: tl.int64, H,
            M, N, M_all: tl.int64, offset: tl.int64, d, D: tl.constexpr, ROWS: tl.constexpr,
            KEYS: tl.constexpr, SCORES: tl.constexpr):  # fmt: skip
    b, h, i = _place(H, M, ROWS)
    q = _load(x, x_stride, b, h, i, M, d, D)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, D], tl.float32)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        s = _dot(q, tl.trans(_load(k, k_stride, b, h, j, N, d, D)))
        if SCORES:  # [Q, B, H, N]
            at = ((i.to(tl.int64) * B + b) * H + h) * N
            mask = (i < M)[:, None] & (j < N)[None, :]
            tl.store(scores + at[:, None] + j[None, :], s, mask=mask)
        s = tl.where((j < N)[None, :], s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp((top - high) * scale)
        w = tl.exp((s - high[:, None]) * scale)
        total = total * decay + tl.sum(w, 1)
        values = _load(v, v_stride, b, h, j, N, d, D)
        mean = mean * decay[:, None] + _dot(w.to(values.dtype), values)
        top = high
    _store(rows, b, h, i, B, H, M, M_all, offset, d, mean / total[:, None], D)
    at = stats + ((b * M_all + offset + i.to(tl.int64)) * H + h) * 2
    tl.store(at, top, mask=i < M)
    tl.store(at + 1, total, mask=i < M)


@triton.jit
def _share(e, top, total, scale):
    """Of a key at score e, beside those of the stats: w / (w + total), w = exp((e - top) scale)."""
    t = (e - top) * scale
    w = tl.exp(-tl.abs(t))
    return tl.where(t <= 0, w / (w + total), 1.0 / (1.0 + total * w))


@triton.jit
def _vector(x, stride, j, b, h, d, D: tl.constexpr):
    """Of query j, from [Q, B, H, d]. [D]"""
    k = tl.arange(0, D)
    at = x + j * stride[0] + b * stride[1] + h * stride[2]
    return tl.load(at + k, mask=k < d, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _merge(q, q_stride, kx, kx_stride, vx, vx_stride, rows, rows_stride, stats, tokens, scale,
           Q: tl.int64, B: tl.int64, H, N, M_all: tl.int64, d, D: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """tokens [Q, B, N, H, d]"""
    b, h, i = _place(H, N, ROWS)
    own = _load(q, q_stride, b, h, i, N, d, D).to(tl.float32)
    o = _load(rows, rows_stride, b, h, i, N, d, D)
    top, total = _stats(stats, b, h, i, H, N, M_all, 0)
    for j in range(Q):
        e = tl.sum(own * _vector(kx, kx_stride, j, b, h, d, D)[None, :], 1)
        share = _share(e, top, total, scale)
        found = o + share[:, None] * (_vector(vx, vx_stride, j, b, h, d, D)[None, :] - o)
        _store(tokens, j * B + b, h, i, B, H, N, N, 0, d, found, D)


@triton.jit(do_not_specialize=SIZES)
def _unmerge(grad, q, q_stride, kx, kx_stride, vx, vx_stride, rows, rows_stride, stats, out, delta,
             dq, dkx, dvx, scale, Q: tl.int64, B: tl.int64, H, N, M_all: tl.int64, d,
             D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """From the gradient of tokens [Q, B, N, H, d]: that of o to out [B, M, H, d], sum de to delta
    [B, M, H], dq [B, N, H, d], and of each tile dkx and dvx [tiles, Q, B, H, d]; all fp32."""
    b, h, i = _place(H, N, ROWS)
    own = _load(q, q_stride, b, h, i, N, d, D).to(tl.float32)
    o = _load(rows, rows_stride, b, h, i, N, d, D)
    top, total = _stats(stats, b, h, i, H, N, M_all, 0)
    k = tl.arange(0, D)
    to_o = tl.zeros([ROWS, D], tl.float32)
    to_q = tl.zeros([ROWS, D], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    tile = (tl.program_id(0) % tl.cdiv(N, ROWS)).to(tl.int64)
    for j in range(Q):
        key = _vector(kx, kx_stride, j, b, h, d, D)[None, :]
        share = _share(tl.sum(own * key, 1), top, total, scale)
        at = (((j * B + b) * N + i.to(tl.int64)) * H + h) * d
        mask = (i < N)[:, None] & (k < d)[None, :]
        g = tl.load(grad + at[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
        apart = _vector(vx, vx_stride, j, b, h, d, D)[None, :] - o
        de = tl.sum(g * apart, 1) * share * (1.0 - share)
        sums += de
        de *= scale
        to_o += (1.0 - share)[:, None] * g
        to_q += de[:, None] * key
        at = (((tile * Q + j) * B + b) * H + h) * d + k
        tl.store(dkx + at, tl.sum(de[:, None] * own, 0), mask=k < d)
        tl.store(dvx + at, tl.sum(share[:, None] * g, 0), mask=k < d)
    _store(out, b, h, i, B, H, N, M_all, 0, d, to_o, D)
    _store(dq, b, h, i, B, H, N, M_all, 0, d, to_q, D)
    tl.store(delta + (b * M_all + i.to(tl.int64)) * H + h, sums, mask=i < N)


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
    b, h, i = _place(H, M, ROWS)
    q = _load(x, x_stride, b, h, i, M, d, D)
    g = _load(out, out_stride, b, h, i, M, d, D)
    top, total = _stats(stats, b, h, i, H, M, M_all, offset)
    place = delta + (b * M_all + offset + i.to(tl.int64)) * H + h
    mean = tl.load(place, mask=i < M, other=0.0)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        w = _weights(q, _load(k, k_stride, b, h, j, N, d, D), top, total, i, j, M, N, scale)
        values = _load(v, v_stride, b, h, j, N, d, D)
        mean += tl.sum(w * _dot(g.to(values.dtype), tl.trans(values)), 1)
    tl.store(place, mean, mask=i < M)
    kk = tl.arange(0, D)
    at = ((b * M_all + offset + i.to(tl.int64)) * H + h) * d
    mask = (i < M)[:, None] & (kk < d)[None, :]
    found = tl.load(dx + at[:, None] + kk[None, :], mask=mask, other=0.0)
    for n in range(0, N, KEYS):
        j = n + tl.arange(0, KEYS)
        keys = _load(k, k_stride, b, h, j, N, d, D)
        w = _weights(q, keys, top, total, i, j, M, N, scale)
        values = _load(v, v_stride, b, h, j, N, d, D)
        ds = w * (_dot(g.to(values.dtype), tl.trans(values)) - mean[:, None]) * scale
        found += _dot(ds.to(keys.dtype), keys)
    tl.store(dx + at[:, None] + kk[None, :], found, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(x, x_stride, k, k_stride, v, v_stride, stats, out, out_stride, delta, dk, dv,
                   scale, B: tl.int64, H, M, N, M_all: tl.int64, offset: tl.int64, d,
                   D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Adds to dk and dv [B, N, H, d] fp32 what M rows say."""
    b, h, j = _place(H, N, KEYS)
    keys = _load(k, k_stride, b, h, j, N, d, D)
    values = _load(v, v_stride, b, h, j, N, d, D)
    kk = tl.arange(0, D)
    at = (((b * N + j.to(tl.int64)) * H + h) * d)[:, None] + kk[None, :]
    mask = (j < N)[:, None] & (kk < d)[None, :]
    to_k = tl.load(dk + at, mask=mask, other=0.0)
    to_v = tl.load(dv + at, mask=mask, other=0.0)
    for m in range(0, M, ROWS):
        i = m + tl.arange(0, ROWS)
        q = _load(x, x_stride, b, h, i, M, d, D)
        g = _load(out, out_stride, b, h, i, M, d, D).to(values.dtype)
        top, total = _stats(stats, b, h, i, H, M, M_all, offset)
        place = delta + (b * M_all + offset + i.to(tl.int64)) * H + h
        mean = tl.load(place, mask=i < M, other=0.0)
        w = _weights(q, keys, top, total, i, j, M, N, scale)
        ds = w * (_dot(g, tl.trans(values)) - mean[:, None]) * scale
        to_v += _dot(tl.trans(w.to(g.dtype)), g)
        to_k += _dot(tl.trans(ds.to(q.dtype)), q)
    tl.store(dk + at, to_k, mask=mask)
    tl.store(dv + at, to_v, mask=mask)


def why_not(first: Tensor, rest: Sequence[Tensor]) -> str | None:
    """Why these kernels cannot take the tensors, or None."""
    device = first.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it takes tensors on a GPU, these are on {device}"
    if first.dtype not in TYPES:
        return f"it takes fp32, bf16 and fp16, these are {first.dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it takes GPUs of compute capability 8.0 and above"
    return None


def _tile(x: Tensor, D: int) -> tuple[int, int, int]:
    """Rows and tokens at a time, and warps: the most that spills no register (AOT tests; no GPU has
    measured them). IEEE products of fp32 hold their operands in registers."""
    if x.dtype == torch.float32:
        return (16, 16, 8 if D > 64 else 4)
    return 32, 32, 4


class _Rows:
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


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _wide(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _attention(
    x: Tensor, k: Tensor, v: Tensor, rows: Tensor, stats: Tensor, offset: int, scores: Tensor
) -> None:
    if not x.numel():
        return
    call = _Rows(x, k, v, rows.shape[1], offset)
    with torch.cuda.device_of(x):
        _attend[call.grid](
            *call.tensors, rows, stats, scores, *call.sizes, scores.numel() > 0,
            num_warps=call.warps,
        )  # fmt: skip


def search_forward(x: Tensor, k: Tensor, v: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search`."""
    x, k, v = map(_dense, (x, k, v))
    (Q, B, H, d), N = x.shape, k.shape[2]
    rows, stats = _wide(x, B, Q, H, d), _wide(x, B, Q, H, 2)
    scores = _wide(x, *((Q, B, H, N) if weights else (0,)))
    _attention(x.permute(1, 2, 0, 3), k, v, rows, stats, 0, scores)
    if weights:
        top, total = stats.transpose(0, 1).unsqueeze(-1).unbind(3)
        scores.sub_(top).mul_(d**-0.5).exp_().div_(total)
    return rows, stats, scores


def search_backward(
    grad: Tensor, stats: Tensor, x: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search_backward`."""
    x, k, v = map(_dense, (x, k, v))
    (Q, B, H, d), N = x.shape, k.shape[2]
    dk, dv = _wide(x, B, N, H, d).zero_(), _wide(x, B, N, H, d).zero_()
    dx, delta = _wide(x, B, Q, H, d).zero_(), _wide(x, B, Q, H).zero_()
    _gradients(x.permute(1, 2, 0, 3), k, v, stats, grad.contiguous(), delta, dx, dk, dv, 0)
    return dx.transpose(0, 1).to(x.dtype).contiguous(), dk.to(k.dtype), dv.to(v.dtype)


def _gradients(
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
    call = _Rows(x, k, v, dx.shape[1], offset)
    mine = out[:, offset:].transpose(1, 2)
    given = *call.tensors, stats, mine, mine.stride(), delta
    with torch.cuda.device_of(x):
        _row_gradients[call.grid](*given, dx, *call.sizes, num_warps=call.warps)
        _key_gradients[call.key_grid](*given, dk, dv, *call.sizes, num_warps=call.warps)


def joint_forward(q: Tensor, k: Tensor, v: Tensor, *queries: Tensor) -> tuple[Tensor, ...]:
    """Arguments and results as `search._joint`."""
    q, k, v, q_x, k_x, v_x = map(_dense, (q, k, v, *queries))
    (Q, B, H, d), N = q_x.shape, q.shape[2]
    rows, stats, none = _wide(q, B, N + Q, H, d), _wide(q, B, N + Q, H, 2), _wide(q, 0)
    _attention(q, k, v, rows, stats, 0, none)
    _attention(q_x.permute(1, 2, 0, 3), k, v, rows, stats, N, none)
    tokens = q.new_empty(Q, B, N, H, d)
    if tokens.numel():
        call = _Rows(q, k, v, N + Q, 0)
        with torch.cuda.device_of(q):
            given = _merged(q, k_x, v_x, rows, stats)
            _merge[call.few_grid](*given, tokens, *_sizes(call, Q))
    share, apart, o, _ = _own(q_x, k_x, v_x, rows, stats)
    return tokens, (o + share * apart).to(q.dtype), rows, stats


def _merged(q: Tensor, k_x: Tensor, v_x: Tensor, rows: Tensor, stats: Tensor) -> tuple[Any, ...]:
    o = rows.transpose(1, 2)
    strides = (k_x, k_x.stride(), v_x, v_x.stride(), o, o.stride())
    return q, q.stride(), *strides, stats


def _sizes(call: _Rows, Q: int) -> tuple[Any, ...]:
    scale, B, H, M, _, M_all, _, d, D, *_ = call.sizes
    return scale, Q, B, H, M, M_all, d, D, call.few


def _own(
    q_x: Tensor, k_x: Tensor, v_x: Tensor, rows: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of the queries' own rows, a number each: share, v_x - o, o and x, k_x. fp32 [Q, B, H, ..]"""
    N, x, key, value = rows.shape[1] - len(q_x), q_x.float(), k_x.float(), v_x.float()
    o, (top, total) = rows[:, N:].transpose(0, 1), stats[:, N:].transpose(0, 1).split(1, -1)
    t = ((x * key).sum(-1, keepdim=True) - top) * x.shape[-1] ** -0.5
    w = torch.exp(-t.abs())
    share = torch.where(t <= 0, w / (w + total), 1 / (1 + total * w))
    return share, value - o, o, (x, key)


def joint_backward(
    grad_tokens: Tensor, grad_query: Tensor, rows: Tensor, stats: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._joint_backward`."""
    q, k, v, q_x, k_x, v_x = map(_dense, tensors)
    (Q, B, H, d), N = q_x.shape, q.shape[2]
    call = _Rows(q, k, v, N + Q, 0)
    out, dx = _wide(q, B, N + Q, H, d), _wide(q, B, N + Q, H, d)
    delta = _wide(q, B, N + Q, H)
    tiles = triton.cdiv(N, call.few)
    d_kx, d_vx = _wide(q, tiles, Q, B, H, d), _wide(q, tiles, Q, B, H, d)
    if q.numel():
        with torch.cuda.device_of(q):
            given = grad_tokens.contiguous(), *_merged(q, k_x, v_x, rows, stats)
            _unmerge[call.few_grid](*given, out, delta, dx, d_kx, d_vx, *_sizes(call, Q))
    share, apart, _, (x, key) = _own(q_x, k_x, v_x, rows, stats)
    g, scale = grad_query.float(), d**-0.5
    de = (g * apart).sum(-1, keepdim=True) * share * (1 - share)
    out[:, N:] = ((1 - share) * g).transpose(0, 1)
    dx[:, N:] = (de * scale * key).transpose(0, 1)
    delta[:, N:] = de[..., 0].transpose(0, 1)
    dk, dv = _wide(q, B, N, H, d).zero_(), _wide(q, B, N, H, d).zero_()
    rest = stats, out, delta, dx, dk, dv
    _gradients(q, k, v, *rest, 0)
    _gradients(q_x.permute(1, 2, 0, 3), k, v, *rest, N)
    found = dx[:, :N], dk, dv, dx[:, N:].transpose(0, 1)
    found = (*found, d_kx.sum(0) + de * scale * x, d_vx.sum(0) + share * g)
    return tuple(t.to(q.dtype).contiguous() for t in found)
