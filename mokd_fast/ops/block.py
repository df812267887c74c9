"""What stands between the products of a transformer block: add_norm, and mlp with its GELU.

In bf16 PyTorch makes it in many passes: a residual sum in fp32, LayerNorm in fp32, a cast, and the
same backward with another sum and another cast; GELU's gradient takes as long as a third of a
product. The CPU's kernels make one pass of each (layers.json has what that is worth).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, distill, onednn
from .dispatch import pick, register

NORM, MLP = "add_norm", "mlp"


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + y, and its LayerNorm over the last dimension in `dtype`. Of first order differentiable in
    all tensors.

    Args:
        x: [.., D], what a residual sum has so far. y: [.., D], what a layer adds; None for nothing.
        weight, bias: [D].

    Raises ValueError for a weight or bias of another shape.
    """
    if not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            f"weight and bias must be {list(x.shape[-1:])} for x of shape {list(x.shape)}, "
            f"got {list(weight.shape)} and {list(bias.shape)}"
        )
    sums, normed = pick(NORM, x, y, weight, bias, eps, dtype).run(x, y, weight, bias, eps, dtype)
    return sums, normed


def mlp(x: Tensor, fc1: tuple[Tensor, Tensor | None], fc2: tuple[Tensor, Tensor | None]) -> Tensor:
    """GELU(x @ w1.T + b1) @ w2.T + b2, the GELU of the error function, products in x's dtype. Of
    first order differentiable in all tensors.

    x [.., D]; fc1, fc2: weight and bias of the layers. Backward makes the GELU again: of the two
    large tensors between the products one is kept.
    """
    found: Tensor = pick(MLP, x, fc1, fc2).run(x, fc1, fc2)
    return found


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        sums, normed, stats = cpu.add_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(sums, weight, stats)
        ctx.kind = None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        return sums, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dsum: Tensor | None, dnormed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            dx, dweight, dbias, dy = dsum, None, None, None
            if dsum is not None and ctx.kind is not None:
                dy = dsum.to(ctx.kind)
            return dx, dy, dweight, dbias, None
        dsum, dnormed = None if dsum is None else dsum.resolve_neg(), dnormed.resolve_neg()
        half = ctx.kind == torch.bfloat16 and ctx.needs_input_grad[1]
        sums, weight, stats = ctx.saved_tensors
        dx, dy, dweight, dbias = cpu.add_norm_backward(dsum, dnormed, sums, weight, stats, half)
        if ctx.kind == torch.float32:
            dy = dx
        return dx, dy, dweight, dbias, None


def _norm_cpu(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    given = [x, weight, bias] if y is None else [x, weight, bias, y]
    fits = dtype == torch.bfloat16 and x.numel() and _here(given)
    fits = fits and x.dtype == weight.dtype == bias.dtype == torch.float32
    if y is not None:
        fits = fits and y.shape == x.shape and y.dtype in _SUMMANDS
    if not fits:
        return _norm_reference(x, y, weight, bias, eps, dtype)
    if torch.is_grad_enabled():
        sums, normed = _AddNorm.apply(x, y, weight, bias, eps)
        return sums, normed
    return cpu.add_norm(x, y, weight, bias, eps)[:2]


_SUMMANDS = (torch.float32, torch.bfloat16)


def _here(tensors: list[Tensor]) -> bool:
    """Whether the kernels see the numbers of these."""
    return distill.plain(tensors) and all(t.is_cpu and not t.is_neg() for t in tensors)


def _norm_reference(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    sums = x if y is None else x + y
    return sums, F.layer_norm(sums, weight.shape, weight, bias, eps).to(dtype)


def _norm_why_not(x: Tensor, y: Tensor | None, weight: Tensor, *rest: Any) -> str | None:
    summand = [] if y is None else [y]
    return distill.transformed(x, weight, *summand) or cpu.why_not(x)


class _Mlp(torch.autograd.Function):
    """Of rows and weights in bf16, biases in bf16 or fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
    ) -> Tensor:
        u = onednn.linear(x, w1, b1)
        ctx.save_for_backward(x, w1, w2, u)
        return onednn.linear(cpu.gelu(u), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, u = ctx.saved_tensors
        grad = grad.contiguous().resolve_neg()
        du, g, db1 = cpu.gelu_backward(u, grad @ w2)
        for_x, for_w1, for_b1, for_w2, for_b2 = ctx.needs_input_grad
        dw2 = grad.t() @ g if for_w2 else None
        del g
        return (
            du @ w1 if for_x else None,
            du.t() @ x if for_w1 else None,
            db1 if for_b1 else None,
            dw2,
            cpu.sum_rows(grad) if for_b2 else None,
        )


def _mlp_cpu(
    x: Tensor, fc1: tuple[Tensor, Tensor | None], fc2: tuple[Tensor, Tensor | None]
) -> Tensor:
    (w1, b1), (w2, b2) = fc1, fc2
    tensors = [t for t in (x, w1, b1, w2, b2) if t is not None]
    enough = x.ndim > 1 and x.numel() * len(w1) >= onednn.ENOUGH
    takes = enough and x.dtype == torch.bfloat16 and _here(tensors)
    if not takes or not onednn.usable("cpu", x.dtype):
        return _mlp_reference(x, fc1, fc2)
    halves = onednn.half(w1), onednn.half(w2)
    if torch.is_grad_enabled():
        rows: Tensor = _Mlp.apply(x.flatten(0, -2), halves[0], b1, halves[1], b2)
        return rows.unflatten(0, x.shape[:-1])
    return onednn.linear(onednn.linear(x, halves[0], b1, gelu=True), halves[1], b2)


def _mlp_reference(
    x: Tensor, fc1: tuple[Tensor, Tensor | None], fc2: tuple[Tensor, Tensor | None]
) -> Tensor:
    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return layer(F.gelu(layer(x, *fc1)), *fc2)


def _mlp_why_not(x: Tensor, fc1: tuple[Tensor, Any], fc2: tuple[Tensor, Any]) -> str | None:
    return distill.transformed(x, fc1[0], fc2[0]) or cpu.why_not(x)


register(NORM, "cpu", _norm_cpu, _norm_why_not)
register(NORM, "reference", _norm_reference)
register(MLP, "cpu", _mlp_cpu, _mlp_why_not)
register(MLP, "reference", _mlp_reference)
