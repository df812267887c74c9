"""An operator of ours for eager use: without torch.library's way to its kernels, which takes longer
than a small call does (library_cost_s of bench/distill.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distill import no_second_derivative

Function = Callable[..., Any]


def differentiable(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def with_autograd(
    op: str,
    operators: tuple[Any, Any],
    kernels: tuple[Function, Function],
    save: Function,
    arguments: Function,
    back: Function,
) -> Function:
    """Registers the derivative of an operator; returns it for eager use, with the same derivative.

    Args:
        op: its name, for the refusal of a second derivative and in a profile.
        operators: torch.library's, forward and backward. kernels: what they call.
        save(ctx, inputs, output): for backward. arguments(ctx, *grads): what that takes.
        back(ctx, grads, found): the gradients of forward's inputs, from what backward found.
    """
    forward, backward = operators

    def through_operator(ctx: Any, *grads: Tensor) -> Any:
        return back(ctx, grads, backward(*arguments(ctx, *grads)))

    forward.register_autograd(through_operator, setup_context=save)
    backward.register_autograd(no_second_derivative(op))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # setup_context would cost 12 us a call
            output = kernels[0](*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if torch.is_grad_enabled():  # with create_graph: the gradient carries the refusal
                return through_operator(ctx, *grads)
            grads = tuple(grad.resolve_neg() for grad in grads)  # kernels read memory
            return back(ctx, grads, kernels[1](*arguments(ctx, *grads)))

    named: Any = type(op, (Eager,), {})  # so a profiler calls it what it is
    apply: Function = named.apply
    return apply
