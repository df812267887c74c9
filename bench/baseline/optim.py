"""Optimizers, their groups and schedules, clipping and EMA, as the official loop has them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bench.baseline.losses import cosine_schedule

Schedule = Sequence[float] | np.ndarray


@dataclass
class ModelSettings:
    """How one of the two models is trained. Schedules hold one value an iteration.

    `t_head_as_other` puts the whole T-Head, biases and norms included, into a third parameter group
    that follows the other model's lr and weight decay; the official CNN is trained so. `weight` is
    the lambda on this model's cross and search losses. `clip` 0 switches clipping off.
    """

    optimizer: str  # "sgd" (momentum 0.9) or "adamw"
    lr: Schedule
    weight_decay: Schedule
    weight: float = 1.0
    clip: float = 3.0
    t_head_as_other: bool = False


def official_settings(
    iters_per_epoch: int, epochs: int = 100, batch: int = 256
) -> tuple[ModelSettings, ModelSettings, np.ndarray]:
    """ResNet-50 + ViT-S/16 as the official README runs them: CNN, ViT, EMA momentum."""
    span = (epochs, iters_per_epoch)
    cnn = ModelSettings(
        optimizer="sgd",
        lr=cosine_schedule(0.1 * batch / 256, 0.0048, *span, warmup_epochs=10),
        weight_decay=cosine_schedule(1e-4, 1e-4, *span),
        weight=1.0,
        t_head_as_other=True,
    )
    vit = ModelSettings(
        optimizer="adamw",
        lr=cosine_schedule(3e-4 * batch / 256, 1e-5, *span, warmup_epochs=10),
        weight_decay=cosine_schedule(0.04, 0.4, *span),
        weight=0.1,
    )
    return cnn, vit, cosine_schedule(0.996, 1.0, *span)


def parameter_groups(model: nn.Module, t_head_apart: bool) -> list[dict]:
    """Decayed, not decayed (biases and 1-D), and, if `t_head_apart`, the T-Head as it stands."""
    decayed, plain, t_head = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if t_head_apart and name.startswith("t_head."):
            t_head.append(p)
        elif name.endswith(".bias") or p.ndim == 1:
            plain.append(p)
        else:
            decayed.append(p)
    groups: list[dict] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return groups + ([{"params": t_head}] if t_head_apart else [])


def make_optimizer(model: nn.Module, settings: ModelSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.t_head_as_other)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)  # lr is set before every step
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    raise ValueError(f"optimizer {settings.optimizer!r} is neither 'sgd' nor 'adamw'")


def clip_per_tensor_(model: nn.Module, limit: float) -> list[float]:
    """Scale each gradient tensor to norm <= limit. Two host syncs a tensor, as officially."""
    norms = []
    for p in model.parameters():
        if p.grad is not None:
            norm = p.grad.norm(2)
            norms.append(norm.item())
            coefficient = limit / (norm + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)
    return norms


@torch.no_grad()
def ema_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m * teacher + (1 - m) * student over parameters, one tensor at a time.

    Buffers are left alone: the teacher keeps the BatchNorm statistics of its own forwards.
    """
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.mul_(momentum).add_((1 - momentum) * theirs)
