"""The two losses of the official step and the schedules that they and the optimizers follow."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def temperature_schedule(first: float, last: float, warmup: int, epochs: int) -> np.ndarray:
    """One teacher temperature an epoch: linspace(first, last, warmup), end included, then last."""
    if warmup > epochs:
        raise ValueError(f"a temperature warm-up of {warmup} epochs is longer than {epochs} epochs")
    return np.concatenate((np.linspace(first, last, warmup), np.full(epochs - warmup, last)))


def cosine_schedule(
    first: float, last: float, epochs: int, iters_per_epoch: int, warmup_epochs: int = 0
) -> np.ndarray:
    """One value an iteration: a line from 0 to `first` (end included), then a half cosine.

    The cosine starts at `first` and stops one iteration short of `last`.
    """
    warmup, total = warmup_epochs * iters_per_epoch, epochs * iters_per_epoch
    if warmup > total:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs is longer than {epochs} epochs")
    phase = np.arange(total - warmup) / max(total - warmup, 1)
    cosine = last + 0.5 * (first - last) * (1 + np.cos(np.pi * phase))
    return np.concatenate((np.linspace(0.0, first, warmup), cosine))


class DINOLoss(nn.Module):
    """Cross-entropy of all student views against two centred teacher views, same views left out.

    forward(student [V*B, K], teacher [2*B, K], epoch) -> mean over the 2V - 2 pairs. The centre
    moves after the loss was taken, by the mean over teacher rows (and processes, where there are
    several). One kernel chain a pair is kept on purpose: this is what the official step runs.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        n_views: int,
        temperatures: Sequence[float] | np.ndarray,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.n_views = n_views
        self.temperatures = temperatures
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        views = (student / self.student_temperature).chunk(self.n_views)  # V x [B, K]
        sharp = (teacher - self.center) / float(self.temperatures[epoch])
        targets = F.softmax(sharp, dim=-1).detach().chunk(2)  # 2 x [B, K]
        terms = []
        for t, q in enumerate(targets):
            for v, s in enumerate(views):
                if v != t:
                    terms.append((-q * F.log_softmax(s, dim=-1)).sum(dim=-1).mean())
        loss = sum(terms[1:], terms[0]) / len(terms)
        self.update_center(teacher)
        return loss

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        total, rows = teacher.sum(dim=0, keepdim=True), len(teacher)  # [1, K]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)  # blocking, one a loss, on purpose
            rows *= dist.get_world_size()
        keep = self.center_momentum
        self.center = self.center * keep + total / rows * (1 - keep)


class SearchLoss(nn.Module):
    """Row-by-row cross-entropy against the searched teacher logits, without a centre.

    forward(student [R, K], searched [R, K], epoch) -> scalar.
    """

    def __init__(
        self, temperatures: Sequence[float] | np.ndarray, student_temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.temperatures = temperatures
        self.student_temperature = student_temperature

    def forward(self, student: Tensor, searched: Tensor, epoch: int) -> Tensor:
        q = F.softmax(searched / float(self.temperatures[epoch]), dim=-1)
        logp = F.log_softmax(student / self.student_temperature, dim=-1)
        return (-q * logp).sum(dim=-1).mean()
