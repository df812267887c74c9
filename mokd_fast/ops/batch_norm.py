"""batch_norm: BatchNorm by the batch's own statistics, and the sum and ReLU that follow.

PyTorch makes four passes: statistics, result, sum, ReLU. Here the last three are one, and backward
has two, for two sums and for x's gradient (layers.json has what that saves). No more is kept than
there: the ReLU's mask is made again from x, or from the result where something was added.

The kernels take maps [B, C, H, W] with the channels innermost, in fp32 or bf16, in training, with
weights and statistics in fp32; for all others the backend of the CPU is PyTorch's operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, distill
from .dispatch import pick, register

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

    Gradients of first order, of x, weight, bias and added. The kernels round a bf16 result once,
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


@torch.library.custom_op("mokd_fast::batch_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """The result, and mean, 1 / std and unbiased variance of the channels [3, C]."""
    return cpu.batch_norm(x, weight, bias, added, eps, relu)


@_forward.register_fake
def _(x, weight, bias, added, eps, relu):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of what was added where y is given (else empty)."""
    return cpu.batch_norm_backward(grad, x, weight, bias, stats, y, relu)


@_backward.register_fake
def _(grad, x, weight, bias, stats, y, relu):
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), added


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, added, _, ctx.relu = inputs
    y, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.adds = added is not None
    ctx.save_for_backward(x, weight, bias, stats, y if ctx.adds and ctx.relu else None)


def _gradients(backward: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *found, for_added = backward(grad, *ctx.saved_tensors, ctx.relu)
    if not ctx.adds:
        for_added = None
    elif not ctx.relu:
        for_added = grad
    return *found, for_added, None, None


def _gradient(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, grad)


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(distill.no_second_derivative(OP))


class _Eager(torch.autograd.Function):
    """The same two operators without torch.library's way to them (as in distill)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Not by setup_context: a signature bound in Python takes longer than a small map does.
        output = cpu.batch_norm(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        # With create_graph the gradient must carry the refusal of `_backward`.
        return _gradients(
            _backward if torch.is_grad_enabled() else cpu.batch_norm_backward, ctx, grad
        )


def _cpu(
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
    channels = weight, bias, running_mean, running_var
    if not training or not _fits(x, added, *channels):
        numbers = training, momentum, eps
        return _reference(x, running_mean, running_var, weight, bias, *numbers, added, relu)
    run: Any = _forward
    if distill.plain(t for t in (x, added, *channels) if t is not None):
        run = _Eager.apply if torch.is_grad_enabled() else cpu.batch_norm
    y: Tensor
    y, stats = run(x, weight, bias, added, eps, relu)
    if running_mean is not None and running_var is not None:
        mean, _, var = stats.unbind()
        if not torch.compiler.is_compiling():
            # As in PyTorch they move unseen by autograd, which may have kept them for backward.
            running_mean, running_var = running_mean.data, running_var.data
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var, momentum)
    return y


def _fits(x: Tensor, added: Tensor | None, *of_channels: Tensor | None) -> bool:
    """Whether the kernels take these: layout and dtypes."""
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.bfloat16) or x.numel() <= x.shape[1]:
        return False  # one value a channel: PyTorch says what is wrong
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if added is not None and added.dtype != x.dtype:
        return False
    weight, bias, *running = of_channels
    if weight is None or bias is None or (running[0] is None) != (running[1] is None):
        return False
    given = [t for t in of_channels if t is not None]
    if not torch.compiler.is_compiling() and any(
        t.is_neg() for t in (x, x if added is None else added, *given)
    ):
        return False  # its numbers are not those in memory
    return all(t.shape == x.shape[1:2] and t.dtype == torch.float32 for t in given)


def _cpu_why_not(x: Tensor, *rest: Any, **options: Any) -> str | None:
    tensors = [t for t in (x, *rest, *options.values()) if isinstance(t, Tensor)]
    return distill.transformed(*tensors) or cpu.why_not(x, tensors)


def _reference(x: Tensor, *rest: Any) -> Tensor:
    *arguments, added, relu = rest
    y = F.batch_norm(x, *arguments)
    if added is not None:
        y = y + added
    return F.relu(y) if relu else y


register(OP, "cpu", _cpu, _cpu_why_not)
register(OP, "reference", _reference)
