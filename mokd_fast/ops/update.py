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
from .foreach import ema_update_, scale_grads_

OP = "update_"
NO_GROUP = -1
PLAIN = (Tensor, nn.Parameter)  # a subclass may have its memory elsewhere
OTHER = ("amsgrad", "maximize", "nesterov", "dampening", "capturable", "differentiable")


class Clip(NamedTuple):
    """`clip_grad_per_tensor_` whose norms are there already."""

    norms: Mapping[Tensor, Tensor]  # a parameter -> the norm of its gradient: `grad_norms`
    max_norm: float

    def apply(self) -> None:
        left = {p.grad: norm for p, norm in self.norms.items() if p.grad is not None}
        if left:
            scale_grads_(list(left), list(left.values()), self.max_norm)


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

    Raises ValueError where `skip` is given for an optimizer that knows no flag.

    Example:
        >>> model, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> clip = Clip(grad_norms(model.parameters()), max_norm=3.0)
        >>> ema = Ema(list(teacher.parameters()), list(model.parameters()), momentum=0.996)
        >>> update_(optimizer, clip, ema)
    """
    if skip is not None and not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"update_: skip is for optimizers with fused=True, {type(optimizer).__name__} here is "
            "none: make it one, or leave skip out and the step undone"
        )
    pick(OP, optimizer, clip, ema, skip).run(optimizer, clip, ema, skip)


def _one_by_one(
    optimizer: Optimizer, clip: Clip | None, ema: Ema | None, skip: Tensor | None
) -> None:
    if clip is not None:
        clip.apply()
    optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
    optimizer.step()
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
            all(
                type(t) in PLAIN and t.is_cpu and t.dtype == torch.float32
                for t in (self.weight, *numbers)
            )
            and all(t is None or _alike(t, self.weight) for t in beside)
            and torch.ops.aten.is_non_overlapping_and_dense(self.weight)
        )

    def numbers(self) -> tuple[int, ...]:
        at = (0 if t is None else t.data_ptr() for t in self[:-1])
        return self.weight.numel(), *at, self.group

    def changed(self) -> list[Tensor]:
        moved = (self.weight, self.first, self.second, self.step) if self.grad is not None else ()
        return [t for t in (*moved, self.teacher) if t is not None]


def _alike(tensor: Tensor, weight: Tensor) -> bool:
    return (
        type(tensor) in PLAIN
        and tensor.dtype == weight.dtype
        and tensor.is_cpu
        and tensor.shape == weight.shape
        and (tensor.stride() == weight.stride() or _steps(tensor) == _steps(weight))
    )


def _steps(tensor: Tensor) -> list[int]:
    """The strides that count: a dimension of one number may have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _rows(optimizer: Optimizer, clip: Clip | None, ema: Ema | None) -> list[_Row] | None:
    """All tensors that move, or None if one has no state yet: its first step makes it."""
    norms = {} if clip is None else clip.norms
    teachers = {} if ema is None else dict(zip(ema.student, ema.teacher, strict=True))
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is None:
                continue
            state = [optimizer.state.get(p, {}).get(key) for key in _state(optimizer, group)]
            if any(value is None for value in state):
                return None
            first, second, step = [*state, None, None, None][:3]
            teacher, norm = teachers.pop(p, None), norms.get(p)
            rows.append(_Row(p, p.grad, first, second, step, teacher, norm, number))
    rows += [_Row(p, None, None, None, None, t, None, NO_GROUP) for p, t in teachers.items()]
    return rows


def _state(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",) if group["momentum"] else ()
    return "exp_avg", "exp_avg_sq", "step"


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    """`Group` of csrc/cpu/update.h."""
    lr, decay = group["lr"], group["weight_decay"]
    if "momentum" in group:
        return lr, decay, group["momentum"], 0.0, 0.0
    return lr, decay, *group["betas"], group["eps"]


def _at_once(optimizer: Optimizer, clip: Clip | None, ema: Ema | None, skip: Tensor | None) -> None:
    rows = _rows(optimizer, clip, ema)
    if rows is None or not all(row.fits() for row in rows):
        return _one_by_one(optimizer, clip, ema, skip)
    momentum = None if ema is None else torch.as_tensor(ema.momentum, dtype=torch.float64)
    max_norm = math.inf if clip is None else clip.max_norm
    groups = [_numbers(group) for group in optimizer.param_groups]
    flag = None if skip is None else skip.to(torch.bool)
    cpu.update([row.numbers() for row in rows], groups, max_norm, flag, momentum)
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
    step = vars(optimizer).get("step")
    if _hooked(optimizer) or not (step is None or hasattr(step, "_wrapped_by_lr_sched")):
        return "the optimizer's step has hooks, which it would leave out"
    firsts = [group["params"][0] for group in optimizer.param_groups if group["params"]]
    return cpu.why_not(firsts[0], firsts[1:])


def _hooked(optimizer: Optimizer) -> bool:
    everywhere = hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(everywhere or own)


register(OP, "cpu", _at_once, _why_not)
register(OP, "reference", _one_by_one)
