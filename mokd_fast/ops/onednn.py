"""Linear layers by oneDNN, for the CPU: F.linear and mm leave fp32 to another library.

That takes about twice as long (linear_parts.json, by `bench/linear_distill.py --parts`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import constant

# Multiplications from which `trained_linear` takes oneDNN, which prepares a while: layers of tiny
# networks stay the plain way.
ENOUGH = 1 << 23

_BUILT = torch.backends.mkldnn.is_available()


def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether `linear` takes tensors of this type of device and dtype; it has no gradient."""
    if device != "cpu" or not _there():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _takes_bf16())


@constant
def _takes_bf16() -> bool:
    """Whether oneDNN has products of bf16 for this processor: it wants AVX-512."""
    return _asked()


@cache
def _asked() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _there() -> bool:
    # Whether the user has switched it off is nothing that torch.compile can trace.
    return _BUILT and (torch.compiler.is_compiling() or bool(torch.backends.mkldnn.enabled))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """gelu(x @ weight.T + bias), [.., D] and [N, D] -> [.., N]; x must not be empty."""
    then: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *then)
    return found


_kept: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("_kept", default=None)


@contextmanager
def copies_kept() -> Iterator[None]:
    """Within it, `half` makes one copy of a weight that is trained, as autocast does for PyTorch's
    own operators. Nothing may change weights in it: to be left before an optimizer's step.

    All that use a copy then share a node of the graph: their gradients are added in bf16 and cast
    once."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def half(weight: Tensor) -> Tensor:
    """A weight in bf16, with gradient."""
    kept = _kept.get()
    if kept is None or weight.dtype == torch.bfloat16 or not torch.is_grad_enabled():
        return weight.bfloat16()
    if id(weight) not in kept:
        kept[id(weight)] = weight, weight.bfloat16()  # with the weight: ids are given again
    return kept[id(weight)][1]


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) with its gradients (of first order), of any device, dtype and size.

    Where that is faster, on the CPU, oneDNN makes it: fp32 both ways, and what bf16 autocast makes
    without gradient, for F.linear adds the bias in a pass of its own there. (With gradient a
    Function of Python's takes as long as that pass.)
    """
    kind = x.device.type
    if x.ndim > 1 and x.numel() * len(weight) >= ENOUGH:
        if not torch.is_autocast_enabled(kind):
            if x.dtype == weight.dtype == torch.float32 and usable(kind, torch.float32):
                # Views are made outside: what lies inside a Function could not change in place.
                rows: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
                return rows.unflatten(0, x.shape[:-1])
        elif (
            torch.get_autocast_dtype(kind) == torch.bfloat16
            and not torch.is_grad_enabled()
            and usable(kind, torch.bfloat16)
        ):
            with_bias = None if bias is None else bias.bfloat16()
            return _product(x.bfloat16(), weight.bfloat16(), with_bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op("mokd_fast::onednn_linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Inductor has a lowering of oneDNN's own for weights that never change.
    return (_opaque if torch.compiler.is_compiling() else linear)(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grads = grad.contiguous()
        dx = _product(grads, weight.t()) if for_x else None
        dw = None
        if for_weight:  # the fewer rows the product has, the fewer times the other is read
            if weight.shape[0] <= weight.shape[1]:
                dw = _product(grads.t(), x.t())
            else:
                dw = _product(x.t(), grads.t()).t().contiguous()
        return dx, dw, grads.sum(0) if for_bias else None
