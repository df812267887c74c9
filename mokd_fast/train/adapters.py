"""Optimizers that obey a flag on the device: a step with it set moves nothing, and nobody reads it.

Each names its own way to that end. `KINDS` in optim.py lists them all, apex.py has NVIDIA's.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.optim import Lars as TimmLars
from torch import Tensor, nn

from ..ops.foreach import Snapshot
from ..ops.update import Clip, Ema, update_
from .recipe import OptimizerConfig, ScheduleConfig


class Row(NamedTuple):
    """One parameter group: its tensors, their rates, and whether they are decayed."""

    parameters: list[nn.Parameter]
    rates: ScheduleConfig
    decayed: bool


class Adapter(ABC):
    """One optimizer behind the contract that `ScheduledOptimizer` needs."""

    # The size of a tensor's step follows its norm, so what is not decayed is not adapted either.
    by_layer: ClassVar[bool] = False
    # Steps are counted a group, so tensors that start later need a group of their own.
    counts_groups: ClassVar[bool] = False
    # Whether a CUDA graph can have its step in it: `Fused.rates_on_device`.
    recordable: ClassVar[bool] = False

    torch: torch.optim.Optimizer

    @abstractmethod
    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None: ...

    @abstractmethod
    def step(self, skip: Tensor) -> None:
        """One step of the gradients that are there; with `skip` (0-d bool) set, none."""

    def update(self, skip: Tensor, clip: Clip | None, ema: Ema | None) -> None:
        """The clip before it, the teacher's EMA after it."""
        if clip is not None:
            clip.apply()
        self.step(skip)
        if ema is not None:
            ema.apply()

    def load(self, state: dict[str, Any]) -> None:
        self.torch.load_state_dict(state)


def groups_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Parameter groups in torch's form; the schedules set the rates."""
    return [{"params": row.parameters, "weight_decay": 0.0} for row in rows]


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zero momentum for tensors of SGD or LARS that have none yet.

    Fused SGD (torch's, apex's) wants momentum for all tensors or for none, but the last layers,
    frozen at first, start later than the rest. Without dampening a start at 0 is the same
    arithmetic: m * 0 + g = g. A first step that is skipped leaves 0, not a gradient that is NaN.
    """
    for group in optimizer.param_groups:
        started = group["params"] if group.get("momentum") else []
        for parameter in (p for p in started if p.grad is not None):
            state = optimizer.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)


class Rates(NamedTuple):
    """Of a parameter group, 0-d tensors on the device."""

    lr: Tensor  # fp32, as PyTorch's fused ones want it
    decay: Tensor | None  # fp64, see `Fused._decay_number`; None for a group that has none


class Fused(Adapter):
    """torch's fused ones take the flag as GradScaler's `found_inf`, counters included."""

    recordable = True
    rates: Sequence[Rates] = ()

    def rates_on_device(self, decayed: Sequence[bool]) -> None:
        """From now on `step` takes the rates from tensors, and so does a CUDA graph of it: one
        that has recorded numbers would repeat them. `fill_rates` brings them in."""
        device = self.torch.param_groups[0]["params"][0].device

        def number(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.rates = [
            Rates(number(torch.float32), number(torch.float64) if has else None) for has in decayed
        ]

    def _groups(self) -> Iterable[tuple[dict[str, Any], Rates]]:
        return zip(self.torch.param_groups, self.rates, strict=True) if self.rates else ()

    def fill_rates(self) -> None:
        """Those of the groups into the tensors, without a wait; nothing where there are none."""
        for group, rates in self._groups():
            rates.lr.fill_(group["lr"])
            if rates.decay is not None:
                rates.decay.fill_(self._decay_number(group["lr"], group["weight_decay"]))

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        start_momentum(self.torch)
        for group, rates in self._groups():
            moved: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if rates.decay is not None and moved:
                self._decay(moved, rates.decay, skip)
        with self._given_rates():
            update_(self.torch, skip=skip)

    def update(self, skip: Tensor, clip: Clip | None, ema: Ema | None) -> None:
        """In one pass where `update_` has one."""
        if self.rates:
            return super().update(skip, clip, ema)
        start_momentum(self.torch)
        update_(self.torch, clip, ema, skip)

    @contextlib.contextmanager
    def _given_rates(self) -> Iterator[None]:
        """The groups with rates on the device, and no decay: a tensor of it torch does not take.
        After it they have numbers again, as in every checkpoint."""
        before = [dict(group) for group in self.torch.param_groups]
        for group, rates in self._groups():
            group.update(lr=rates.lr, weight_decay=0.0)
            if "capturable" in group:  # torch refuses a recording without, and warns elsewhere
                group["capturable"] = rates.lr.is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            yield
        finally:
            for group, numbers in zip(self.torch.param_groups, before, strict=True):
                group.update(numbers)

    @staticmethod
    @abstractmethod
    def _decay_number(lr: float, decay: float) -> float:
        """What `_decay` needs of them."""

    @staticmethod
    @abstractmethod
    def _decay(moved: list[Tensor], number: Tensor, skip: Tensor) -> None:
        """What the step itself would do with a weight decay, before it."""


class SGD(Fused):
    """g + decay * w in the place of g."""

    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        self.torch = torch.optim.SGD(groups_of(rows), lr=0.0, momentum=config.momentum, fused=True)

    @staticmethod
    def _decay_number(lr: float, decay: float) -> float:
        return decay

    @staticmethod
    def _decay(moved: list[Tensor], number: Tensor, skip: Tensor) -> None:
        grads = [p.grad for p in moved if p.grad is not None]  # a skipped step throws them away
        torch._foreach_add_(grads, torch._foreach_mul(moved, number.to(moved[0].dtype)))


class AdamW(Fused):
    """w *= 1 - lr * decay."""

    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        self.torch = torch.optim.AdamW(groups_of(rows), lr=0.0, fused=True)

    @staticmethod
    def _decay_number(lr: float, decay: float) -> float:
        return 1 - lr * decay

    @staticmethod
    def _decay(moved: list[Tensor], number: Tensor, skip: Tensor) -> None:
        torch._foreach_mul_(moved, number.masked_fill(skip, 1).to(moved[0].dtype))


class Lars(Adapter):
    """timm's LARS (arXiv:1708.03888): SGD whose step of a tensor w is scaled by
    trust * |w| / (|g| + decay * |w|).

    It knows no flag, so what it moves is copied first and taken back: more passes over them than
    the step itself makes, and twice the parameters' memory until its end, when the activations are
    gone. Decayed tensors are adapted (timm's own rule stops at a decay of 0), biases and 1-D ones
    are neither decayed nor adapted.
    """

    by_layer = True

    def __init__(self, rows: list[Row], config: OptimizerConfig) -> None:
        groups = [
            {**group, "always_adapt": row.decayed}
            for group, row in zip(groups_of(rows), rows, strict=True)
        ]
        self.torch = TimmLars(groups, lr=0.0, momentum=config.momentum, trust_coeff=config.trust)

    def step(self, skip: Tensor) -> None:
        start_momentum(self.torch)
        moved = [p for g in self.torch.param_groups for p in g["params"] if p.grad is not None]
        buffers = [buffer for p in moved for buffer in self.torch.state[p].values()]
        snapshot = Snapshot([*moved, *buffers])  # goes at the end of the step, as does its memory
        snapshot.take()
        self.torch.step()
        snapshot.restore_(skip)
