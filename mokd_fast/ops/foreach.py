"""Whole-model updates without a host read: EMA, the per-tensor gradient clip, taking back."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place, tensor by tensor.

    Both sequences are parameters in the same order; buffers (BN statistics) are not averaged,
    the teacher's come from its own forward passes (official MOKD and DINO). `momentum` may be a 0-d
    tensor on the device (fp64: it is near 1); with 1 a teacher beside a finite student stays as it
    is. One pass over both; a GPU with a tensor makes a copy of the student on the way.
    """
    if not teacher:
        return
    mine, theirs = list(teacher), list(student)
    if not isinstance(momentum, Tensor):
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        return
    keep, take = (factor.to(mine[0].dtype) for factor in (momentum, 1 - momentum))
    if mine[0].is_cpu:
        torch._foreach_lerp_(mine, theirs, [take] * len(mine))
    else:  # where that would be a launch a tensor
        torch._foreach_mul_(mine, keep)
        torch._foreach_add_(mine, torch._foreach_mul(theirs, take))


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


class Snapshot:
    """Tensors as they are at a `take`, to go back to where a device flag says so.

    One copy a dtype, so that hundreds of BatchNorm statistics cost a few launches. The tensors are
    contiguous, on one device, and changed in place alone: they are looked up once.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self._groups.setdefault(tensor.dtype, []).append(tensor.view(-1))
        self._then: dict[torch.dtype, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        self._then = {dtype: torch.cat(group) for dtype, group in self._groups.items()}

    @torch.no_grad()
    def restore_(self, flag: Tensor) -> None:
        """In place, every tensor back to its bits of then if the 0-d bool `flag` is set."""
        for dtype, group in self._groups.items():
            # where, not a product: what is to be thrown away may be NaN.
            kept = torch.where(flag, self._then[dtype], torch.cat(group))
            torch._foreach_copy_(group, kept.split([len(flat) for flat in group]))
