"""MOKD: two models that learn together, each from its own EMA teacher and from the other's.

Song et al., "Multi-Mode Online Knowledge Distillation for Self-Supervised Visual Representation
Learning", CVPR 2023, as the authors' code runs it. With one model it is DINO (MLP-Head alone) or
self-distillation with both heads.

Letters: V student views (2 global, L local), T = 2 teacher views, B images, K prototypes,
D T-Head width, C backbone width, N tokens, Q queries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import (
    Center,
    Target,
    column_mean,
    cross_view_pairs,
    distill_cross_entropy,
    matched_pairs,
)
from ..ops.distill import Pairs
from ..ops.foreach import ema_update_
from .backbones import Features, features
from .heads import MLPHead, THead

GLOBALS = 2


class Embedding(NamedTuple):
    """What one model says of a batch of views. The T-Head's two are None without a T-Head."""

    mlp: Tensor  # [views, B, K]
    t: Tensor | None  # [views, B, K]
    query: Tensor | None  # [views, B, D]
    features: Features


class Temperatures(NamedTuple):
    """Teacher temperatures of one model's losses at this step."""

    self: float | Tensor
    cross: float | Tensor
    search: float | Tensor


class StepLosses(NamedTuple):
    totals: list[Tensor]  # one 0-d loss a model, with gradient
    terms: dict[str, Tensor]  # every unscaled loss, detached: self_mlp_1, self_t_1, cross_1 ...
    center_means: dict[str, Tensor]  # mean teacher logits [K] a head, for `MOKD.centers.update`
    teacher_logits: dict[str, Tensor]  # [2, B, K] a head: mlp_1, t_1, mlp_2, t_2
    teacher_features: list[Tensor]  # pooled [2B, C] a model


class Model(nn.Module):
    """A backbone (a timm or torchvision module) with its heads."""

    def __init__(self, backbone: nn.Module, mlp_head: MLPHead, t_head: THead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.mlp_head = mlp_head
        self.t_head = t_head

    def forward(self, views: Tensor) -> Embedding:
        """Views of one size [views, B, channels, H, W]; one BatchNorm batch."""
        count = views.shape[:2]
        found = features(self.backbone, views.flatten(0, 1))
        mlp = self.mlp_head(found.pooled).unflatten(0, count)
        if self.t_head is None:
            return Embedding(mlp, None, None, found)
        t = self.t_head(found.tokens, found.grid).unflatten(0, count)
        return Embedding(mlp, t, self.t_head.query(found.pooled).unflatten(0, count), found)


class MOKD(nn.Module):
    """One or two students with their teachers, the centres and all losses of a step.

    Args:
        students, teachers: `Model`s pairwise of one architecture. The teachers should be built
            without drop-path and dropout; they start as copies of the students here.
        cross_weights: lambda of each model's cross-distillation and search losses.
        student_temperature, center_momentum: as in DINO.
    """

    def __init__(
        self,
        students: Sequence[Model],
        teachers: Sequence[Model],
        *,
        prototypes: int,
        cross_weights: Sequence[float] = (1.0, 1.0),
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.teachers = nn.ModuleList(teachers)
        for student, teacher in zip(students, teachers, strict=True):
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.cross_weights = tuple(cross_weights)
        self.student_temperature = student_temperature
        # The official code keeps six centres; two of them always equal the self-loss ones.
        heads = [
            f"{head}_{i}"
            for i, student in enumerate(students, start=1)
            for head in (["mlp"] if student.t_head is None else ["mlp", "t"])
        ]
        self.centers = Center(dict.fromkeys(heads, prototypes), center_momentum)

    def forward(
        self, global_views: Tensor, local_views: Tensor | None, temperatures: Sequence[Temperatures]
    ) -> StepLosses:
        """All losses of one batch.

        Args:
            global_views: [2, B, channels, H, W], normalised; local_views: [L, B, channels, h, w]
                or None.
            temperatures: teacher temperatures for each model's losses.
        """
        teachers = self._teach(global_views)
        students = [self._study(student, global_views, local_views) for student in self.students]
        totals, terms, logits = [], {}, {}
        for i in range(len(students)):
            total, found = self._losses(i, students, teachers, temperatures[i])
            totals.append(total)
            terms.update(found)
            logits[f"mlp_{i + 1}"] = teachers[i].mlp
            if (t := teachers[i].t) is not None:
                logits[f"t_{i + 1}"] = t
        means = {head: column_mean(rows) for head, rows in logits.items()}
        pooled = [teacher.features.pooled for teacher in teachers]
        return StepLosses(totals, terms, means, logits, pooled)

    @torch.no_grad()  # not inference mode: the losses save these tensors for backward
    def _teach(self, global_views: Tensor) -> list[Embedding]:
        return [teacher(global_views) for teacher in self.teachers]

    @staticmethod
    def _study(student: nn.Module, global_views: Tensor, local_views: Tensor | None) -> Embedding:
        """Globals and locals are two forward passes: two sizes and two BatchNorm batches."""
        first: Embedding = student(global_views)
        if local_views is None:
            return first
        second: Embedding = student(local_views)
        mlp = torch.cat([first.mlp, second.mlp])  # [V, B, K]
        t = None
        if first.t is not None and second.t is not None:
            t = torch.cat([first.t, second.t])
        return Embedding(mlp, t, second.query, first.features)

    def _losses(
        self, i: int, students: list[Embedding], teachers: list[Embedding], taus: Temperatures
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of model i, one fused call a head."""
        own, number, weight = students[i], i + 1, self.cross_weights[i]
        V = len(own.mlp)
        every = cross_view_pairs(GLOBALS, V)
        other = 1 - i
        names = [f"self_mlp_{number}"]
        targets = [self._target("mlp", i, teachers, every, taus.self)]
        if len(teachers) == 2:
            names.append(f"cross_{number}")
            targets.append(self._target("mlp", other, teachers, every, taus.cross, weight))
        total, found = distill_cross_entropy(own.mlp, targets, temperature=self.student_temperature)
        terms = dict(zip(names, found.unbind(), strict=True))
        if own.t is None:
            return total, terms
        names, targets = [f"self_t_{number}"], [self._target("t", i, teachers, every, taus.self)]
        if len(teachers) == 2:
            assert own.query is not None
            first = V - len(own.query)  # 2 with local crops, 0 without
            searched = self._search(other, teachers[other].features, own.query, crossed=first == 0)
            pairs = matched_pairs(V, first)
            names.append(f"search_{number}")
            # No centre, as official.
            targets.append(Target(pairs, searched, temperature=taus.search, weight=weight))
        t_total, found = distill_cross_entropy(own.t, targets, temperature=self.student_temperature)
        return total + t_total, terms | dict(zip(names, found.unbind(), strict=True))

    def _target(
        self,
        head: str,
        teacher: int,
        teachers: list[Embedding],
        pairs: Pairs,
        temperature: float | Tensor,
        weight: float = 1.0,
    ) -> Target:
        logits = getattr(teachers[teacher], head)
        center = self.centers[f"{head}_{teacher + 1}"]
        return Target(pairs, logits, None, temperature, center, weight)

    @torch.no_grad()
    def _search(self, teacher: int, found: Features, queries: Tensor, *, crossed: bool) -> Tensor:
        """Logits [Q, B, K] of the teacher's map as each query finds it.

        Local crops search the first global view. Without local crops (`crossed`) view 1 searches
        the map of view 2 and the other way round.
        """
        search: Callable[..., Tensor] = self.teachers[teacher].t_head.search  # type: ignore
        maps = found.tokens.unflatten(0, (GLOBALS, -1))  # [2, B, N, C]
        if not crossed:
            return search(maps[0], found.grid, queries)
        return torch.cat([search(maps[1 - v], found.grid, queries[v : v + 1]) for v in (0, 1)])

    def statistics(self) -> list[Tensor]:
        """Running statistics (BatchNorm), of students and teachers: what a forward pass moves."""
        return [
            value
            for name, value in self.named_buffers()
            if (last := name.rpartition(".")[2]).startswith("running_")
            or last == "num_batches_tracked"
        ]

    def update_teachers(self, momentum: float | Tensor) -> None:
        """EMA of the parameters. Buffers (BatchNorm statistics) are the teachers' own."""
        for student, teacher in zip(self.students, self.teachers, strict=True):
            ema_update_(list(teacher.parameters()), list(student.parameters()), momentum)
