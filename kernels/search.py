"""feature_search and joint_attention in Triton. Formulas: mokd_fast/ops/search.py.

Letters and the attention itself: attend.py. `_merge`: a program gives ROWS tokens to each query
and writes Q N d numbers a head, which is what joint_attention is bound by. `_unmerge` is its
backward: what the shares say to a query's key and value is left a tile of rows each, and summed
after. Not here: fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend import (
    SIZES,
    Rows,
    attention,
    dense,
    gradients,
    load_rows,
    load_stats,
    place_of,
    store_rows,
    wide,
)
from .distill import TYPES


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
    b, h, i = place_of(H, N, ROWS)
    own = load_rows(q, q_stride, b, h, i, N, d, D).to(tl.float32)
    o = load_rows(rows, rows_stride, b, h, i, N, d, D)
    top, total = load_stats(stats, b, h, i, H, N, M_all, 0)
    for j in range(Q):
        e = tl.sum(own * _vector(kx, kx_stride, j, b, h, d, D)[None, :], 1)
        share = _share(e, top, total, scale)
        found = o + share[:, None] * (_vector(vx, vx_stride, j, b, h, d, D)[None, :] - o)
        store_rows(tokens, j * B + b, h, i, B, H, N, N, 0, d, found, D)


@triton.jit(do_not_specialize=SIZES)
def _unmerge(grad, q, q_stride, kx, kx_stride, vx, vx_stride, rows, rows_stride, stats, out, delta,
             dq, dkx, dvx, scale, Q: tl.int64, B: tl.int64, H, N, M_all: tl.int64, d,
             D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """From the gradient of tokens [Q, B, N, H, d]: that of o to out [B, M, H, d], sum de to delta
    [B, M, H], dq [B, N, H, d], and of each tile dkx and dvx [tiles, Q, B, H, d]; all fp32."""
    b, h, i = place_of(H, N, ROWS)
    own = load_rows(q, q_stride, b, h, i, N, d, D).to(tl.float32)
    o = load_rows(rows, rows_stride, b, h, i, N, d, D)
    top, total = load_stats(stats, b, h, i, H, N, M_all, 0)
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
    store_rows(out, b, h, i, B, H, N, M_all, 0, d, to_o, D)
    store_rows(dq, b, h, i, B, H, N, M_all, 0, d, to_q, D)
    tl.store(delta + (b * M_all + i.to(tl.int64)) * H + h, sums, mask=i < N)


def why_not(first: Tensor, rest: Sequence[Tensor]) -> str | None:
    """Why these kernels cannot take the tensors, or None."""
    if first.dtype not in TYPES:
        return f"it takes fp32, bf16 and fp16, these are {first.dtype}"
    return None


def search_forward(x: Tensor, k: Tensor, v: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search`."""
    x, k, v = map(dense, (x, k, v))
    (Q, B, H, d), N = x.shape, k.shape[2]
    rows, stats = wide(x, B, Q, H, d), wide(x, B, Q, H, 2)
    scores = wide(x, *((Q, B, H, N) if weights else (0,)))
    attention(x.permute(1, 2, 0, 3), k, v, rows, stats, 0, scores)
    if weights:
        top, total = stats.transpose(0, 1).unsqueeze(-1).unbind(3)
        scores.sub_(top).mul_(d**-0.5).exp_().div_(total)
    return rows, stats, scores


def search_backward(
    grad: Tensor, stats: Tensor, x: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search_backward`."""
    x, k, v = map(dense, (x, k, v))
    (Q, B, H, d), N = x.shape, k.shape[2]
    dk, dv = wide(x, B, N, H, d).zero_(), wide(x, B, N, H, d).zero_()
    dx, delta = wide(x, B, Q, H, d).zero_(), wide(x, B, Q, H).zero_()
    gradients(x.permute(1, 2, 0, 3), k, v, stats, grad.contiguous(), delta, dx, dk, dv, 0)
    return dx.transpose(0, 1).to(x.dtype).contiguous(), dk.to(k.dtype), dv.to(v.dtype)


def joint_forward(q: Tensor, k: Tensor, v: Tensor, *queries: Tensor) -> tuple[Tensor, ...]:
    """Arguments and results as `search._joint`."""
    q, k, v, q_x, k_x, v_x = map(dense, (q, k, v, *queries))
    (Q, B, H, d), N = q_x.shape, q.shape[2]
    rows, stats, none = wide(q, B, N + Q, H, d), wide(q, B, N + Q, H, 2), wide(q, 0)
    attention(q, k, v, rows, stats, 0, none)
    attention(q_x.permute(1, 2, 0, 3), k, v, rows, stats, N, none)
    tokens = q.new_empty(Q, B, N, H, d)
    if tokens.numel():
        call = Rows(q, k, v, N + Q, 0)
        with torch.cuda.device_of(q):
            given = _merged(q, k_x, v_x, rows, stats)
            _merge[call.few_grid](*given, tokens, *_sizes(call, Q))
    share, apart, o, _ = _own(q_x, k_x, v_x, rows, stats)
    return tokens, (o + share * apart).to(q.dtype), rows, stats


def _merged(q: Tensor, k_x: Tensor, v_x: Tensor, rows: Tensor, stats: Tensor) -> tuple[Any, ...]:
    o = rows.transpose(1, 2)
    strides = (k_x, k_x.stride(), v_x, v_x.stride(), o, o.stride())
    return q, q.stride(), *strides, stats


def _sizes(call: Rows, Q: int) -> tuple[Any, ...]:
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
    q, k, v, q_x, k_x, v_x = map(dense, tensors)
    (Q, B, H, d), N = q_x.shape, q.shape[2]
    call = Rows(q, k, v, N + Q, 0)
    out, dx = wide(q, B, N + Q, H, d), wide(q, B, N + Q, H, d)
    delta = wide(q, B, N + Q, H)
    tiles = triton.cdiv(N, call.few)
    d_kx, d_vx = wide(q, tiles, Q, B, H, d), wide(q, tiles, Q, B, H, d)
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
    dk, dv = wide(q, B, N, H, d).zero_(), wide(q, B, N, H, d).zero_()
    rest = stats, out, delta, dx, dk, dv
    gradients(q, k, v, *rest, 0)
    gradients(q_x.permute(1, 2, 0, 3), k, v, *rest, N)
    found = dx[:, :N], dk, dv, dx[:, N:].transpose(0, 1)
    found = (*found, d_kx.sum(0) + de * scale * x, d_vx.sum(0) + share * g)
    return tuple(t.to(q.dtype).contiguous() for t in found)
