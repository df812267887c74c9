"""prototype_linear: logits of features and prototypes, x W^T.

A step has few features and many prototypes: oneDNN, which PyTorch's 16-bit products on a CPU are,
spends as long on the order that it wants W in as on the product. The CPU's own kernels, of bf16 and
of fp32, read W once as it lies. Of weight-normed prototypes they make W, and W's gradient, a few
rows at a time in the caches, forward and backward: layers.json.

Letters: K prototypes, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register
from .eager import differentiable, with_autograd
from .weight_norm import WeightNormed

OP = "prototype_linear"
BLOCK = 32  # of which K and D are multiples in the CPU's kernels
# Rows from which a product of bf16 with a matrix that is there is oneDNN's: worth its order of W.
MANY = 128


def prototype_linear(
    x: Tensor, weight: Tensor | WeightNormed, dtype: torch.dtype | None = None
) -> Tensor:
    """x @ weight.T, differentiable in x and weight (v and g). [.., D] -> [.., K]

    Args:
        x: floating [.., D]. weight: floating [K, D], made or not.
        dtype: of the product and its factors, floating, whatever autocast says; None for x's.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that is not floating.
    """
    v = weight.v if isinstance(weight, WeightNormed) else weight
    if v.ndim != 2 or not v.is_floating_point():
        raise ValueError(f"weight must be floating [K, D], got {v.dtype} of shape {list(v.shape)}")
    if x.ndim < 1 or x.shape[-1] != v.shape[1] or not x.is_floating_point() or x.device != v.device:
        raise ValueError(
            f"x must be floating [.., {v.shape[1]}] on {v.device} for prototypes {list(v.shape)}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    dtype = dtype or x.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    found: Tensor = pick(OP, x, weight, dtype).run(x, weight, dtype)
    return found


@torch.library.custom_op("mokd_fast::prototype_linear", mutates_args=())
def _product(x: Tensor, w: Tensor) -> Tensor:
    """The logits in w's dtype; no gradient."""
    return cpu.prototype_linear(x, w)


@_product.register_fake
def _(x, w):
    return w.new_empty(*x.shape[:-1], len(w))


@torch.library.custom_op("mokd_fast::normed_linear", mutates_args=())
def _forward(x: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits in `dtype`, and the norms [K]."""
    return cpu.normed_linear(x, v, g, dtype)


@_forward.register_fake
def _(x, v, g, dtype):
    return v.new_empty(*x.shape[:-1], len(v), dtype=dtype), v.new_empty(len(v))


@torch.library.custom_op("mokd_fast::normed_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, v: Tensor, g: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, v and g, and the L2 norm of v's."""
    return cpu.normed_linear_backward(grad, x, v, g, norms)


@_backward.register_fake
def _(grad, x, v, g, norms):
    return x.new_empty(x.shape), v.new_empty(v.shape), g.new_empty(g.shape), v.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.others = inputs[3:]  # the dtype and, of `_eager`, `WeightNormed.seen`
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, ...]:
    return grad, *ctx.saved_tensors


def _gradients(ctx: Any, grads: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    *given, norm = found
    for seen in ctx.others[1:]:
        if seen is not None:
            seen[ctx.saved_tensors[1]] = norm
    needed = zip(given, ctx.needs_input_grad[:3], strict=True)
    return *(t if n else None for t, n in needed), *[None for _ in ctx.others]


def _kernel(x: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype, seen: Any) -> Any:
    return cpu.normed_linear(x, v, g, dtype)


_KERNELS = _kernel, cpu.normed_linear_backward
_eager = with_autograd(OP, (_forward, _backward), _KERNELS, _save, _arguments, _gradients)


def _cpu(x: Tensor, weight: Tensor | WeightNormed, dtype: torch.dtype) -> Tensor:
    if _library(x, weight, dtype):
        return _reference(x, weight, dtype)
    if isinstance(weight, WeightNormed):
        x, v, g = (t.resolve_neg() for t in (x, weight.v, weight.g))
        if not distill.plain((x, v, g)):
            logits: Tensor = _forward(x, v, g, dtype)[0]
        elif differentiable((x, v, g)):
            logits, _ = _eager(x, v, g, dtype, weight.seen)
        else:
            logits, _ = cpu.normed_linear(x, v, g, dtype)
        return logits
    x, w = x.resolve_neg(), weight.to(dtype).resolve_neg()
    found: Tensor = (cpu.prototype_linear if distill.plain((x, w)) else _product)(x, w)
    return found


def _cpu_why_not(x: Tensor, weight: Tensor | WeightNormed, dtype: torch.dtype) -> str | None:
    return distill.transformed(x, *_tensors(weight)) or cpu.why_not(x, _tensors(weight))


def _library(x: Tensor, weight: Tensor | WeightNormed, dtype: torch.dtype) -> str | None:
    """Why the product is PyTorch's on the CPU as well, or None."""
    normed, tensors = isinstance(weight, WeightNormed), _tensors(weight)
    K, D = tensors[0].shape
    if dtype not in (torch.bfloat16, torch.float32):
        return f"but its own products are of bf16 and fp32, not of {dtype}"
    if not x.numel() or not K or K % BLOCK or D % BLOCK:
        return f"but its own product takes rows, and K and D by multiples of {BLOCK}"
    if normed and any(t.dtype != torch.float32 for t in tensors):
        return f"but it normalises v and g of fp32 itself, not of {tensors[0].dtype}"
    if not normed and dtype == torch.bfloat16 and x.numel() >= MANY * D:
        return f"but from {MANY} rows on oneDNN is as fast with a matrix that is there"
    if not normed and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return "but its own product has gradients for a WeightNormed alone"
    lacking = cpu.bf16_why_not() if dtype == torch.bfloat16 else cpu.fp32_why_not()
    return lacking and f"but {lacking}"


def needs_no_matrix(x: Tensor, weight: WeightNormed, dtype: torch.dtype) -> bool:
    """Whether the product runs on prototypes that are not made."""
    chosen = pick(OP, x, weight, dtype).name
    return chosen == "cpu" and not _library(x, weight, dtype)


def _tensors(weight: Tensor | WeightNormed) -> list[Tensor]:
    return [weight.v, weight.g] if isinstance(weight, WeightNormed) else [weight]


def _reference(x: Tensor, weight: Tensor | WeightNormed, dtype: torch.dtype) -> Tensor:
    matrix = weight.matrix(dtype) if isinstance(weight, WeightNormed) else weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), matrix)


register(OP, "cpu", _cpu, _cpu_why_not, avoid=_library)
register(OP, "reference", _reference)
