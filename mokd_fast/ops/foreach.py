"""Whole-model updates without a host read: EMA and the per-tensor gradient clip."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place, tensor by tensor.

    Both sequences are parameters in the same order; buffers (BN statistics) are not averaged,
    the teacher's come from its own forward passes (official MOKD and DINO).
    """
    if not teacher:
        return
    torch._foreach_mul_(list(teacher), momentum)
    torch._foreach_add_(list(teacher), list(student), alpha=1 - momentum)


@torch.no_grad()
def clip_grad_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> list[Tensor]:
    """Scales each gradient whose own L2 norm exceeds `max_norm`, in place.

    DINO's clip: every parameter by itself, g *= max_norm / (|g| + 1e-6) where that is below 1.
    Returns the norms before the clip as 0-d tensors on the device; nothing is read by the host.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return []
    norms = list(torch._foreach_norm(grads, 2))
    scales = torch._foreach_add(norms, 1e-6)
    scales = torch._foreach_reciprocal(scales)
    torch._foreach_mul_(scales, max_norm)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(grads, scales)
    return norms
