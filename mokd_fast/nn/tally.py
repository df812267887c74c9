"""How many batches each BatchNorm has seen, counted by the host and added to all at once: on a GPU
each `num_batches_tracked += 1` is a launch of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batches are counted by `add_counts`. A mean over all of them (momentum
    None) needs the count in every pass, and is left alone."""

    seen = 0  # batches that are not added yet

    def forward(self, x: Tensor) -> Tensor:
        counted = self.num_batches_tracked is not None and self.momentum is not None
        if not (self.training and counted):
            return super().forward(x)
        self._check_input_dim(x)
        if torch._C._current_graph_task_id() == -1:  # else made again in backward: checkpointing.py
            self.seen += 1
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)


def count_at_once(model: nn.Module) -> None:
    """From now on `add_counts` has to be called, for those of nn.BatchNorm2d itself."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d


def counters(model: nn.Module) -> list[BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, BatchNorm2d)]


@torch.no_grad()
def add_counts(norms: Sequence[BatchNorm2d]) -> None:
    """What they have seen since the last time."""
    moved = [norm for norm in norms if norm.seen]
    if not moved:
        return
    counts: list[Tensor] = [norm.num_batches_tracked for norm in moved]  # type: ignore[misc]
    torch._foreach_add_(counts, [norm.seen for norm in moved])
    for norm in moved:
        norm.seen = 0
