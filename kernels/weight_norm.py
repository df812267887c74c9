"""weight_norm in Triton, one pass over the matrices each way:

    w = g v / |v|      dv = (g / |v|) (dw - (dw.v) v / |v|^2)      dg = dw.v / |v|

K prototypes (rows), D features. A program has ROWS whole rows, a power of two from D on wide, in
registers. Forward reads 4 K D bytes and writes 2 K D, backward reads 6 K D and writes 4 K D; norms,
g and its gradient are [K]. What is made, and of what: mokd_fast/ops/weight_norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 8192  # of a row, at most: 16 warps
# Numbers of a program (a longer row's are all its own) and of a warp: 8 KiB of v are on the way, 12
# with its 16-bit gradient, and a thread has 16 numbers. Other sizes were never tried.
TILE, WARP = 2048, 512


@triton.jit
def _place(K, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a program [ROWS]; where their numbers are, and which there are [ROWS, BLOCK]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    return row, row[:, None] * D + k[None, :], (row < K)[:, None] & (k < D)[None, :]


@triton.jit(do_not_specialize=["K"])
def _normalize(v, g, w, norms, K: tl.int64, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, at, mask = _place(K, D, ROWS, BLOCK)
    x = tl.load(v + at, mask=mask, other=0.0)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))  # the approximate root takes a sum below 2^-126 for 0
    scale = tl.load(g + row, mask=row < K, other=0.0) / norm
    tl.store(norms + row, norm, mask=row < K)
    tl.store(w + at, (x * scale[:, None]).to(w.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["K"])
def _gradients(grad, v, g, norms, for_v, for_g, K: tl.int64, D, ROWS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    row, at, mask = _place(K, D, ROWS, BLOCK)
    x = tl.load(v + at, mask=mask, other=0.0)
    dw = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(norms + row, mask=row < K, other=1.0)
    along = tl.sum(dw * x, 1) / norm
    scale = tl.load(g + row, mask=row < K, other=0.0) / norm
    tl.store(for_g + row, along, mask=row < K)
    back = scale * along / norm
    tl.store(for_v + at, dw * scale[:, None] - x * back[:, None], mask=mask)


def why_not(v: Tensor) -> str | None:
    """Why these kernels cannot take v [K, D], or None."""
    if v.shape[1] > WIDTH:
        return f"it takes rows of {WIDTH} numbers at most, these have {v.shape[1]}"
    return None


def weight_norm(v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments and results as `weight_norm._forward`."""
    w, norms = v.new_empty(v.shape, dtype=dtype), v.new_empty(len(v))
    _launch(_normalize, v.contiguous(), g.contiguous(), w, norms)
    return w, norms


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `weight_norm._backward`."""
    for_v, for_g = v.new_empty(v.shape), g.new_empty(g.shape)
    call = grad.contiguous(), v.contiguous(), g.contiguous(), norms
    _launch(_gradients, *call, for_v, for_g)
    return for_v, for_g


def _launch(kernel: triton.JITFunction, first: Tensor, *rest: Tensor) -> None:
    """A kernel on the rows of `first` [K, D], which has a number at least."""
    K, D = first.shape
    block = triton.next_power_of_2(D)
    rows = max(TILE // block, 1)
    warps = rows * block // WARP
    with torch.cuda.device_of(first):
        kernel[(triton.cdiv(K, rows),)](first, *rest, K, D, rows, block, num_warps=warps)
