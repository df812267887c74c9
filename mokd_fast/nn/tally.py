"""How many batches each BatchNorm has seen, counted by the host and added to all at once: on a GPU
each `num_batches_tracked += 1` is a launch of its own."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Counted:
    """A BatchNorm that counts its batches by `count`."""

    num_batches_tracked: Any
    seen: int | None = None  # batches that are not added yet; None: each is, when it comes

    def count(self) -> None:
        if self.seen is None:
            self.num_batches_tracked.add_(1)
        elif torch._C._current_graph_task_id() == -1:  # else made again: checkpointing.py
            self.seen += 1


class BatchNorm2d(Counted, nn.BatchNorm2d):
    """nn.BatchNorm2d. A mean over all batches (momentum None) needs the count in every pass, and is
    left alone."""

    def forward(self, x: Tensor) -> Tensor:
        counted = self.num_batches_tracked is not None and self.momentum is not None
        if not (self.training and counted):
            return super().forward(x)
        self._check_input_dim(x)
        self.count()
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)


def count_at_once(model: nn.Module) -> None:
    """From now on `add_counts` has to be called, for those of nn.BatchNorm2d itself and of ours."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
        if isinstance(module, Counted):
            module.seen = 0


def counters(model: nn.Module) -> list[Counted]:
    """Those whose batches `add_counts` adds."""
    found = [module for module in model.modules() if isinstance(module, Counted)]
    return [module for module in found if module.seen is not None]


@torch.no_grad()
def add_counts(norms: Sequence[Counted]) -> None:
    """What they have seen since the last time."""
    moved = [norm for norm in norms if norm.seen]
    if not moved:
        return
    counts: list[Tensor] = [norm.num_batches_tracked for norm in moved]
    torch._foreach_add_(counts, [norm.seen for norm in moved])  # type: ignore[misc]
    for norm in moved:
        norm.seen = 0
