"""An operator of ours for eager use: without torch.library's way to its kernels, which takes longer
than a small call does (library_cost_s of bench/distill.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def differentiable(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def no_second_derivative(op: str) -> Callable[..., None]:
    """The derivative of a backward operator: a refusal."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op} has no second derivative on this backend; the reference has "
            "(MOKD_FAST_BACKEND=reference, or backend='reference' where the call takes one)"
        )

    return refuse


def kernel(module: Function, name: str) -> Function:
    """The function of `module(backend)` for arguments whose last is the backend."""
    return lambda *inputs: getattr(module(inputs[-1]), name)(*inputs[:-1])


def no_gradient(needs: Any) -> Any:
    """For an entry of ctx.needs_input_grad, which torch.library has lists in."""
    return [no_gradient(need) for need in needs] if isinstance(needs, list) else None


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
        save(ctx, inputs, output): for backward. arguments(ctx, *grads): what that takes; of grads
            at least one is there, all where `save` leaves materialize_grads on. It does for
            several outputs with a gradient; else zeros would be made for those without one.
        back(ctx, grads, found): the gradients of forward's inputs, from what backward found.
    """
    forward, backward = operators

    def through_operator(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return tuple(map(no_gradient, ctx.needs_input_grad))
        return back(ctx, grads, backward(*arguments(ctx, *grads)))

    forward.register_autograd(through_operator, setup_context=save)
    backward.register_autograd(no_second_derivative(op))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # setup_context looks up signatures
            output = kernels[0](*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # With create_graph the gradient carries the refusal. (once_differentiable looks at the
            # gradients alone, and a gradient penalty would silently be a constant.)
            if torch.is_grad_enabled() or all(grad is None for grad in grads):
                return through_operator(ctx, *grads)
            # Kernels read memory, where the sign of such a view is another.
            grads = tuple(grad if grad is None else grad.resolve_neg() for grad in grads)
            return back(ctx, grads, kernels[1](*arguments(ctx, *grads)))

    named: Any = type(op, (Eager,), {})  # so a profiler calls it what it is
    apply: Function = named.apply
    return apply
