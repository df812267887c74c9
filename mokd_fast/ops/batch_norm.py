"""batch_norm: BatchNorm by the batch's own statistics, and the sum and ReLU that follow.

PyTorch makes four passes: statistics, result, sum, ReLU. Here the last three are one, and backward
has two, for two sums and for x's gradient (layers.json has what that saves). No more is kept than
there: the ReLU's mask is made again from x, or from the result where something was added.

The kernels take maps [B, C, H, W] with the channels innermost, in fp32, bf16 or (Triton) fp16, in
training, with weights and statistics in fp32; for all others a backend is PyTorch's operators.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register
from .eager import kernel, with_autograd

OP = "batch_norm"


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    added: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`F.batch_norm`, + `added`, and with `relu` no less than 0. Of x's shape, and dtype (as of
    x + `added`).

    Gradients of first order, of x, weight, bias and added. The kernels round a 16-bit result once,
    after the sum. In bf16 numbers from 2^111 on may become infinite or NaN.

    Args:
        x to eps: those of `F.batch_norm`, running statistics move as there.
        added: of x's shape and device, a residual; or None.

    Raises:
        ValueError: one value a channel in training, `added` of another shape or device, in training
            an eps that is not positive.
    """
    if training and not eps > 0:
        raise ValueError(f"eps must be positive in training, got {eps}")
    if added is not None and (added.shape != x.shape or added.device != x.device):
        raise ValueError(
            f"added must be {list(x.shape)} on {x.device} as x is, "
            f"got {list(added.shape)} on {added.device}"
        )
    arguments = x, running_mean, running_var, weight, bias, training, momentum, eps, added, relu
    found: Tensor = pick(OP, *arguments).run(*arguments)
    return found


TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _kernels(backend: str) -> Any:
    """The module of a backend. Triton is imported at first use, as in `distill._kernels`."""
    if backend == "triton":
        from mokd_fast.kernels import batch_norm as kernels

        return kernels
    return cpu


@torch.library.custom_op("mokd_fast::batch_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    eps: float,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result, and mean, 1 / std and unbiased variance of the channels [3, C]."""
    return _kernels(backend).batch_norm(x, weight, bias, added, eps, relu)


@_forward.register_fake
def _(x, weight, bias, added, eps, relu, backend):
    return torch.empty_like(x), weight.new_empty(3, len(weight))


@torch.library.custom_op("mokd_fast::batch_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    y: Tensor | None,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of what was added where y is given (else empty)."""
    return _kernels(backend).batch_norm_backward(grad, x, weight, bias, stats, y, relu)


@_backward.register_fake
def _(grad, x, weight, bias, stats, y, relu, backend):
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), added


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, added, _, ctx.relu, *_, ctx.backend = inputs
    y, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.adds, ctx.inputs = added is not None, len(inputs)
    ctx.save_for_backward(x, weight, bias, stats, y if ctx.adds and ctx.relu else None)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.relu, ctx.backend


def _gradients(ctx: Any, grads: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    *own, for_added = found
    if ctx.adds and not ctx.relu:
        for_added = grads[0]
    return *own, for_added if ctx.adds else None, *[None] * (ctx.inputs - 4)


# The kernels' own forward takes what moves as well, which a functional operator must not.
_kernel = partial(kernel, lambda backend: _kernels(backend))  # as in ops/distill.py
_FUNCTIONS = _kernel("batch_norm"), _kernel("batch_norm_backward")
_eager = with_autograd(OP, (_forward, _backward), _FUNCTIONS, _setup, _arguments, _gradients)


def _run(
    backend: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    added: Tensor | None,
    relu: bool,
) -> Tensor:
    arguments = x, running_mean, running_var, weight, bias, training, momentum, eps, added, relu
    if _library(backend, *arguments):
        return _reference(*arguments)
    moving = None
    if running_mean is not None and running_var is not None:
        if not torch.compiler.is_compiling():
            # As in PyTorch they move unseen by autograd, which may have kept them for backward.
            running_mean, running_var = running_mean.data, running_var.data
        moving = running_mean, running_var, momentum
    if distill.plain(t for t in arguments if isinstance(t, Tensor)):
        run: Any = _eager if torch.is_grad_enabled() else _FUNCTIONS[0]
        y, _ = run(x, weight, bias, added, eps, relu, moving, backend)
    else:
        y, stats = _forward(x, weight, bias, added, eps, relu, backend)
        cpu.move_statistics(stats, moving)
    found: Tensor = y
    return found


def _library(
    backend: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    added: Tensor | None = None,
    relu: bool = False,
) -> str | None:
    """Why this backend takes PyTorch's operators as well, or None."""
    if not training:
        return "but its kernels are of training"
    if x.ndim != 4 or x.dtype not in TYPES[backend]:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in TYPES[backend])
        return f"but its kernels take [B, C, H, W] in {names}, this is {x.ndim}-D {x.dtype}"
    if x.numel() <= x.shape[1] or not x.is_contiguous(memory_format=torch.channels_last):
        return "but its kernels take several values a channel, the channels innermost"
    if added is not None and added.dtype != x.dtype:
        return f"but its kernels add {x.dtype} to {x.dtype}, this is {added.dtype}"
    of_channels = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    missing = weight is None or bias is None or (running_mean is None) != (running_var is None)
    if missing or any(t.shape != x.shape[1:2] or t.dtype != torch.float32 for t in of_channels):
        return "but its kernels take a weight and a bias, and statistics or none, [C] in fp32"
    if not all(t is None or t.is_contiguous() for t in (running_mean, running_var)):
        return "but its kernels move statistics that lie side by side"
    given = [x, *of_channels] if added is None else [x, added, *of_channels]
    if not torch.compiler.is_compiling() and any(t.is_neg() for t in given):
        return "but its kernels read memory, where a negative view's numbers are others"
    return None


def _why_not(backend: str, x: Tensor, *rest: Any, **options: Any) -> str | None:
    tensors = [t for t in (x, *rest, *options.values()) if isinstance(t, Tensor)]
    if reason := distill.transformed(*tensors):
        return reason
    if backend == "cpu":
        return cpu.why_not(x, tensors)
    if any(t.device != x.device for t in tensors):
        return "it takes tensors of one device"
    return distill.triton_why_not(x)


def _reference(x: Tensor, *rest: Any) -> Tensor:
    *arguments, added, relu = rest
    y = F.batch_norm(x, *arguments)
    if added is not None:
        y = y + added
    return F.relu(y) if relu else y


for _name in TYPES:
    _own = partial(_run, _name), partial(_why_not, _name)
    register(OP, _name, *_own, avoid=partial(_library, _name))
register(OP, "reference", _reference)
