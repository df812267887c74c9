"""weight_norm: the prototypes g * v / |v| in the type that their products take.

PyTorch's own operator is fused in both directions and near the memory floor (linear_parts.json),
but gives v's type: under autocast a cast of the whole matrix follows, forward and backward. Here
one pass reads v and writes 16 bits, and one reads their gradient and v and writes v's: layers.json.
For other dtypes every backend is PyTorch's operator.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register
from .eager import differentiable, kernel, with_autograd

OP = "weight_norm"


def weight_norm(v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """g * v / |v| with the L2 norm of each row, differentiable in v and g. [K, D]

    Args:
        v: floating [K, D]. g: [K, 1], of v's dtype.
        dtype: of the result, floating; None for v's. The arithmetic is in v's. Numbers from 2^111
            on may become infinite or NaN in bf16.

    Raises:
        ValueError: v or g of another shape, dtype or device, a dtype that is not floating.
    """
    _check(v, g)
    dtype = dtype or v.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    found: Tensor = pick(OP, v, g, dtype).run(v, g, dtype)
    return found


def _check(v: Tensor, g: Tensor) -> None:
    if v.ndim != 2 or not v.is_floating_point():
        raise ValueError(f"v must be floating [K, D], got {v.dtype} of shape {list(v.shape)}")
    if g.shape != (len(v), 1) or g.dtype != v.dtype or g.device != v.device:
        raise ValueError(
            f"g must be {v.dtype} [{len(v)}, 1] on {v.device} as v is, "
            f"got {g.dtype} {list(g.shape)} on {g.device}"
        )


@dataclass(frozen=True, eq=False)
class WeightNormed:
    """The prototypes g * v / |v| of `weight_norm` [K, D], which are not made yet; its errors.

    Args:
        seen: where a backward pass that makes the gradient of v in one go leaves its L2 norm, by v.
    """

    v: Tensor
    g: Tensor
    seen: dict[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        _check(self.v, self.g)

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        return weight_norm(self.v, self.g, dtype)

    def __len__(self) -> int:
        return len(self.v)


@torch.library.custom_op("mokd_fast::weight_norm", mutates_args=())
def _forward(v: Tensor, g: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """The matrix, and the norms [K]."""
    found: tuple[Tensor, Tensor] = _kernels(backend).weight_norm(v, g, dtype)
    return found


@_forward.register_fake
def _(v, g, dtype, backend):
    return v.new_empty(v.shape, dtype=dtype), v.new_empty(len(v))


@torch.library.custom_op("mokd_fast::weight_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _kernels(backend).weight_norm_backward(grad, v, g, norms)
    return found


@_backward.register_fake
def _(grad, v, g, norms, backend):
    return v.new_empty(v.shape), g.new_empty(g.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    v, g, _, ctx.backend = inputs
    ctx.save_for_backward(v, g, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.backend


def _gradients(ctx: Any, grads: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return found[0], found[1] if ctx.needs_input_grad[1] else None, None, None


def _kernels(backend: str) -> Any:
    """The module of a backend. Triton is imported at first use, as in `distill._kernels`."""
    if backend == "triton":
        from mokd_fast.kernels import weight_norm

        return weight_norm
    return cpu


_kernel = partial(kernel, lambda backend: _kernels(backend))  # as in ops/distill.py
_eager = with_autograd(
    OP,
    (_forward, _backward),
    (_kernel("weight_norm"), _kernel("weight_norm_backward")),
    _save,
    _arguments,
    _gradients,
)


def _run(backend: str, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    if _library(v, g, dtype):
        return _reference(v, g, dtype)
    v, g = v.resolve_neg(), g.resolve_neg()
    run: Any = _forward
    if distill.plain((v, g)):
        run = _eager if differentiable((v, g)) else _kernel("weight_norm")
    found: Tensor = run(v, g, dtype, backend)[0]
    return found


def _library(v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why every backend takes PyTorch's operator, or None."""
    dtype = dtype or v.dtype
    if v.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        return f"but its kernels make bf16 and fp16 of fp32, not {dtype} of {v.dtype}"
    return None if v.numel() else "but its kernels take at least one number"


def _why_not(backend: str, v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> str | None:
    if reason := distill.transformed(v, g):
        return reason
    if backend == "triton" and (reason := distill.triton_why_not(v)):
        return reason
    found: str | None = _kernels(backend).why_not(v)
    return found


def _reference(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch._weight_norm(v, g, 0) if v.numel() else v * g  # which would divide by 0
    return found.to(dtype)


for _name in ("triton", "cpu"):
    register(OP, _name, partial(_run, _name), partial(_why_not, _name), _library)
register(OP, "reference", _reference)
