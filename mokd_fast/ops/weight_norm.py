"""weight_norm: the prototypes g * v / |v| in the type that their products take.

PyTorch's own operator is fused in both directions and near the memory floor (linear_parts.json),
but gives v's type: under autocast a cast of the whole matrix follows, forward and backward. Here
one pass reads v and writes 16 bits, and one reads their gradient and v and writes v's: layers.json.
For other dtypes the backend of the CPU is PyTorch's operator.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register
from .eager import differentiable, with_autograd

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
def _forward(v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix, and the norms [K]."""
    return cpu.weight_norm(v, g, dtype)


@_forward.register_fake
def _(v, g, dtype):
    return v.new_empty(v.shape, dtype=dtype), v.new_empty(len(v))


@torch.library.custom_op("mokd_fast::weight_norm_backward", mutates_args=())
def _backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.weight_norm_backward(grad, v, g, norms)


@_backward.register_fake
def _(grad, v, g, norms):
    return v.new_empty(v.shape), g.new_empty(g.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, ...]:
    return grad, *ctx.saved_tensors


def _gradients(ctx: Any, grads: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return found[0], found[1] if ctx.needs_input_grad[1] else None, None


_KERNELS = cpu.weight_norm, cpu.weight_norm_backward
_eager = with_autograd(OP, (_forward, _backward), _KERNELS, _save, _arguments, _gradients)


def _cpu(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    if v.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        return _reference(v, g, dtype)
    v, g = v.resolve_neg(), g.resolve_neg()
    if not distill.plain((v, g)):
        found: Tensor = _forward(v, g, dtype)[0]
    else:
        found = (_eager if differentiable((v, g)) else cpu.weight_norm)(v, g, dtype)[0]
    return found


def _cpu_why_not(v: Tensor, g: Tensor, dtype: torch.dtype) -> str | None:
    return distill.transformed(v, g) or cpu.why_not(v)


def _reference(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch._weight_norm(v, g, 0) if v.numel() else v * g  # which would divide by 0
    return found.to(dtype)


register(OP, "cpu", _cpu, _cpu_why_not)
register(OP, "reference", _reference)
