"""Whole-model updates without a host read: EMA, the per-tensor gradient clip, taking back."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from . import cpu
from .dispatch import pick, register

_LARGE = 2**18  # elements: moving them takes longer than a launch


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
    take = (1 - momentum).to(mine[0].dtype)
    if mine[0].is_cpu:
        torch._foreach_lerp_(mine, theirs, [take] * len(mine))
    else:  # where that would be a launch a tensor
        torch._foreach_mul_(mine, momentum.to(mine[0].dtype))
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
    return pick("clip_grad_per_tensor_", grads, max_norm).run(grads, max_norm)


@torch.no_grad()
def grad_norms(
    parameters: Iterable[Tensor], known: Mapping[Tensor, Tensor] | None = None
) -> dict[Tensor, Tensor]:
    """The L2 norm of each gradient there is, by its parameter: 0-d tensors on the device.

    What `clip_grad_per_tensor_` returns, and what `update_` takes to clip by. `known` are those
    that are there already, of gradients that have not changed since."""
    given = [p for p in parameters if p.grad is not None]
    found = {p: known[p] for p in given if p in known} if known else {}
    rest = [p for p in given if p not in found]
    found |= dict(zip(rest, clip_grad_per_tensor_(rest, math.inf), strict=True))
    return {p: found[p] for p in given}


def _clip(grads: list[Tensor], max_norm: float, norms: list[Tensor] | None = None) -> list[Tensor]:
    """With `norms`, if they are there already."""
    if norms is None:
        norms = list(torch._foreach_norm(grads, 2))
    if not math.isinf(max_norm):
        total = torch.stack(norms) + 1e-6
        scales = torch.full_like(total, max_norm).div_(total).clamp_(max=1)
        scale = torch._foreach_mul_ if grads[0].is_cpu else _scale_in_few_launches
        scale(grads, list(scales.unbind()))
    return norms


def _scale_in_few_launches(grads: list[Tensor], scales: list[Tensor]) -> None:
    """The bits of _foreach_mul_, which on a GPU launches once a 0-d number: all vectors (biases,
    norms: most of a model's tensors) at once, each by its number repeated."""
    alone: list[tuple[Tensor, Tensor]] = []
    together: list[tuple[Tensor, Tensor]] = []
    for grad, scale in zip(grads, scales, strict=True):
        vector = grad.ndim == 1 and 0 < grad.numel() <= _LARGE and grad.is_contiguous()
        pairs = together if vector and grad.dtype == scale.dtype else alone
        pairs.append((grad, scale))
    if together:
        sizes = [len(grad) for grad, _ in together]
        repeated = torch.cat([scale.expand(len(grad)) for grad, scale in together])
        torch._foreach_mul_([grad for grad, _ in together], list(repeated.split(sizes)))
    if alone:
        torch._foreach_mul_([grad for grad, _ in alone], [scale for _, scale in alone])


def _clip_cpu(
    grads: list[Tensor], max_norm: float, norms: list[Tensor] | None = None
) -> list[Tensor]:
    """The kernel for fp32 without gaps in memory, each gradient a plain tensor of its own."""
    if not torch.compiler.is_compiling():
        kinds = {(type(tensor), tensor.dtype) for tensor in (*grads, *(norms or ()))}
        apart = len({grad.data_ptr() for grad in grads if grad.numel()})
        apart += sum(not grad.numel() for grad in grads)
        dense = all(torch.ops.aten.is_non_overlapping_and_dense(grad) for grad in grads)
        if kinds == {(Tensor, torch.float32)} and apart == len(grads) and dense:
            return cpu.clip(grads, max_norm, norms)
    return _clip(grads, max_norm, norms)


def _clip_cpu_why_not(grads: list[Tensor], max_norm: float) -> str | None:
    return cpu.why_not(grads[0], grads[1:])


register("clip_grad_per_tensor_", "cpu", _clip_cpu, _clip_cpu_why_not)
register("clip_grad_per_tensor_", "reference", _clip)


class Snapshot:
    """Tensors as they are at a `take`, to go back to where a device flag says so.

    Small ones share a copy a dtype, so that hundreds of BatchNorm statistics cost a few launches;
    a large one is worth its own, and is restored without another. The tensors are dense, on one
    device, and changed in place alone: they are looked up once.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._small: dict[torch.dtype, list[Tensor]] = {}
        self._large: list[Tensor] = []
        for tensor in tensors:
            large = tensor.numel() > _LARGE
            group = self._large if large else self._small.setdefault(tensor.dtype, [])
            group.append(_in_memory_order(tensor))
        self._small_then: dict[torch.dtype, Tensor] = {}
        self._large_then: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        self._small_then = {dtype: torch.cat(group) for dtype, group in self._small.items()}
        self._large_then = [flat.clone() for flat in self._large]

    @torch.no_grad()
    def restore_(self, flag: Tensor) -> None:
        """In place, every tensor back to its bits of then if the 0-d bool `flag` is set."""
        # where, not a product: what is to be thrown away may be NaN.
        for now, then in zip(self._large, self._large_then, strict=True):
            torch.where(flag, then, now, out=now)
        for dtype, group in self._small.items():
            kept = torch.where(flag, self._small_then[dtype], torch.cat(group))
            torch._foreach_copy_(group, kept.split([len(flat) for flat in group]))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor (channels_last too) as a flat view of its memory."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)
