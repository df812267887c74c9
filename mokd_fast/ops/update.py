"""The end of a step in one pass over the model: the clip, the optimizer's step, the EMA.

Each of the three alone is bound by memory, and reads again what the one before has written.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import optimizer as hooks

from . import cpu
from .dispatch import pick, register
from .foreach import ema_update_

OP = "update_"
NO_GROUP = -1
PLAIN = (Tensor, nn.Parameter)  # a subclass may have its memory elsewhere
OTHER = ("amsgrad", "maximize", "nesterov", "dampening", "capturable", "differentiable")


class Clip(NamedTuple):
    """`clip_grad_per_tensor_` whose norms are there already."""

    norms: Mapping[Tensor, Tensor]  # a parameter -> the norm of its gradient: `grad_norms`
    max_norm: float

    @torch.no_grad()
    def apply(self) -> None:
        left = [(p.grad, norm) for p, norm in self.norms.items() if p.grad is not None]
        if left and not math.isinf(self.max_norm):
            grads, norms = [grad for grad, _ in left], [norm for _, norm in left]
            pick("clip_grad_per_tensor_", grads, self.max_norm).run(grads, self.max_norm, norms)


class Ema(NamedTuple):
    """`ema_update_` of these."""

    teacher: Sequence[Tensor]
    student: Sequence[Tensor]
    momentum: float | Tensor

    def apply(self) -> None:
        ema_update_(*self)


@torch.no_grad()
def update_(
    optimizer: Optimizer,
    clip: Clip | None = None,
    ema: Ema | None = None,
    skip: Tensor | None = None,
) -> None:
    """Clips each gradient, makes the optimizer's step and has the teacher follow.

    On a CPU the three are one pass over plain fp32 parameters of torch.optim.SGD or AdamW with
    `fused=True`, in PyTorch's own arithmetic; gradients are not changed then. Elsewhere they are
    `clip_grad_per_tensor_`, `optimizer.step()` and `ema_update_`, one after the other.

    Args:
        clip: norms of the gradients and what they may be. A parameter without one is not clipped.
        ema: teachers, students (in the same order, by which the teachers are found) and momentum;
            tensors that no optimizer moves follow as well.
        skip: a 0-d bool on the device. Set, nothing moves but the teachers, and steps do not count.
            For a fused optimizer.

    Raises ValueError where `skip` is no 0-d bool or for an optimizer that knows no flag, for a
    maximum that is not above 0, and for teachers that are not as many as the students.

    Example:
        >>> model, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> clip = Clip(grad_norms(model.parameters()), max_norm=3.0)
        >>> ema = Ema(list(teacher.parameters()), list(model.parameters()), momentum=0.996)
        >>> update_(optimizer, clip, ema)
    """
    _check(optimizer, clip, ema, skip)
    pick(OP, optimizer, clip, ema, skip).run(optimizer, clip, ema, skip)


def _check(optimizer: Optimizer, clip: Clip | None, ema: Ema | None, skip: Tensor | None) -> None:
    if skip is not None:
        if skip.dtype != torch.bool or skip.ndim:
            raise ValueError(f"skip must be a 0-d bool, got {skip.dtype} {list(skip.shape)}")
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                f"skip is for optimizers with fused=True, {type(optimizer).__name__} here is none: "
                "make it one, or leave skip out and the step undone"
            )
    if clip is not None and not (isinstance(clip.max_norm, float | int) and clip.max_norm > 0):
        raise ValueError(f"max_norm must be a number above 0, or no clip, got {clip.max_norm}")
    if ema is not None and len(ema.teacher) != len(ema.student):
        raise ValueError(
            f"an EMA takes a teacher a student, got {len(ema.teacher)} and {len(ema.student)}"
        )


def _one_by_one(
    optimizer: Optimizer, clip: Clip | None, ema: Ema | None, skip: Tensor | None
) -> None:
    if clip is not None:
        clip.apply()
    if skip is None:
        optimizer.step()
    else:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:  # the next step may be somebody else's
            del optimizer.found_inf  # type: ignore[attr-defined]
    if ema is not None:
        ema.apply()


class _Row(NamedTuple):
    """One tensor of the model, in the order of `Moved` in csrc/cpu/update.h."""

    weight: Tensor
    grad: Tensor | None
    first: Tensor | None
    second: Tensor | None
    step: Tensor | None
    teacher: Tensor | None
    norm: Tensor | None
    group: int

    def fits(self) -> bool:
        """Whether it is plain fp32 side by side in memory, in one order for all of it."""
        beside = (self.grad, self.first, self.second, self.teacher)
        numbers = [t for t in (self.step, self.norm) if t is not None]
        return (
            all(_plain(t) for t in (self.weight, *numbers))
            and not any(t.ndim for t in numbers)
            and all(t is None or _alike(t, self.weight) for t in beside)
            and torch.ops.aten.is_non_overlapping_and_dense(self.weight)
        )

    def call(self) -> tuple[int, ...]:
        """What the kernel takes: the size, where it all is, the group."""
        at = (0 if t is None else t.data_ptr() for t in self[:-1])
        return self.weight.numel(), *at, self.group

    def changed(self) -> list[Tensor]:
        moved = (self.weight, self.first, self.second, self.step) if self.grad is not None else ()
        return [t for t in (*moved, self.teacher) if t is not None]


def _plain(tensor: Tensor) -> bool:
    if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype != torch.float32:
        return False
    if tensor.is_neg() or tensor._is_zerotensor():
        return False
    return tensor.data_ptr() != 0 or not tensor.numel()  # whose memory is there


def _alike(tensor: Tensor, weight: Tensor) -> bool:
    return (
        _plain(tensor)
        and tensor.shape == weight.shape
        and (tensor.stride() == weight.stride() or _order(tensor) == _order(weight))
    )


def _order(tensor: Tensor) -> list[int]:
    """The strides that count: a dimension of one number may have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _rows(optimizer: Optimizer, clip: Clip | None, ema: Ema | None) -> list[_Row] | None:
    """All tensors that move, or None if one has no state yet: its first step makes it."""
    norms = {} if clip is None else clip.norms
    pairs = [] if ema is None else list(zip(ema.student, ema.teacher, strict=True))
    teachers = dict(reversed(pairs))  # the first of a student that has several
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is None:
                continue
            state = [optimizer.state.get(p, {}).get(key) for key in _state(optimizer, group)]
            if any(value is None for value in state):
                return None
            first, second, step = [*state, None, None, None][:3]
            rows.append(_Row(p, p.grad, first, second, step, teachers.get(p), norms.get(p), number))
    moved = {row.weight for row in rows}
    rest = [(p, t) for p, t in pairs if p not in moved or t is not teachers[p]]
    return rows + [_Row(p, None, None, None, None, t, None, NO_GROUP) for p, t in rest]


def _apart(rows: list[_Row], calls: list[tuple[int, ...]]) -> bool:
    """Whether no row changes what another one reads or changes: they run side by side."""
    stays = [row.weight for row in rows if row.grad is None]
    weights = {row.weight.untyped_storage().data_ptr() for row in rows if row.grad is not None}
    if any(weight.untyped_storage().data_ptr() in weights for weight in stays):
        return False
    # Weight, both moments, steps and teacher of each, without the empty ones.
    written = [at for call in calls for at in (*call[1:2], *call[3:7]) if at]
    return len(set(written)) == len(written)


def _state(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if group["momentum"] else ()
    return "exp_avg", "exp_avg_sq", "step"


def _rates(group: dict[str, Any]) -> tuple[float, ...]:
    """`Group` of csrc/cpu/update.h."""
    lr, decay = group["lr"], group["weight_decay"]
    if "momentum" in group:
        return lr, decay, group["momentum"], 0.0, 0.0
    return lr, decay, *group["betas"], group["eps"]


def _at_once(optimizer: Optimizer, clip: Clip | None, ema: Ema | None, skip: Tensor | None) -> None:
    rows = _rows(optimizer, clip, ema)
    if rows is None or not all(row.fits() for row in rows):
        return _one_by_one(optimizer, clip, ema, skip)
    calls = [row.call() for row in rows]
    momentum = 1.0 if ema is None else ema.momentum
    flags = [torch.as_tensor(momentum, dtype=torch.float64, device="cpu")]
    flags += [] if skip is None else [skip]
    plain = all(type(flag) is Tensor and flag.is_cpu and not flag.ndim for flag in flags)
    if not (plain and _apart(rows, calls)):
        return _one_by_one(optimizer, clip, ema, skip)
    max_norm = math.inf if clip is None else clip.max_norm
    groups = [_rates(group) for group in optimizer.param_groups]
    cpu.update(calls, groups, max_norm, skip, flags[0])
    torch.autograd.graph.increment_version([t for row in rows for t in row.changed()])
    optimizer._opt_called = True  # type: ignore[attr-defined]  # what a LRScheduler looks at


def _why_not(
    optimizer: Optimizer,
    clip: Clip | None = None,
    ema: Ema | None = None,
    skip: Tensor | None = None,
) -> str | None:
    if type(optimizer) not in (SGD, AdamW):
        return f"it makes the steps of torch.optim.SGD and AdamW, not of {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        if not group["fused"]:
            return "it has the arithmetic of fused=True, which this optimizer was not asked for"
        if others := [name for name in OTHER if group.get(name)]:
            return f"it has no {' and no '.join(others)}"
        if any(isinstance(group[key], Tensor) for key in ("lr", "weight_decay")):
            return "it takes rates as numbers of the host, one is a tensor"
    if _hooked(optimizer):
        return "the optimizer's step has hooks, which it would leave out"
    firsts = [group["params"][0] for group in optimizer.param_groups if group["params"]]
    if other := [p.dtype for p in firsts if p.dtype != torch.float32]:
        return f"it takes fp32, a parameter is {other[0]}"
    return cpu.why_not(firsts[0], firsts[1:]) if firsts else "there is nothing to move"


def _hooked(optimizer: Optimizer) -> bool:
    everywhere = hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    step = vars(optimizer).get("step")  # a LRScheduler's counts, and calls the class's
    counts = getattr(step, "__wrapped__", None) is type(optimizer).step
    return bool(everywhere or own) or (step is not None and not counts)


register(OP, "cpu", _at_once, _why_not)
register(OP, "reference", _one_by_one)
