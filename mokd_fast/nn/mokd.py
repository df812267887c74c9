"""MOKD: two models that learn together, each from its own EMA teacher and from the other's.

Song et al., "Multi-Mode Online Knowledge Distillation for Self-Supervised Visual Representation
Learning", CVPR 2023, as the authors' code runs it. With one model it is DINO (MLP-Head alone) or
self-distillation with both heads.

Letters: V student views (2 global, L local), T = 2 teacher views, B images, K prototypes,
D width of a head's features, C backbone width, N tokens, Q queries.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from ..ops import (
    Center,
    LinearTarget,
    Target,
    column_mean,
    cross_view_pairs,
    onednn,
    prototype_loss,
)
from ..ops.center import LinearLogits
from ..ops.dispatch import pick
from ..ops.distill import Pairs
from ..ops.linear_distill import product_dtype
from ..ops.prototype_linear import needs_no_matrix, prototype_linear
from ..ops.prototype_loss import OP
from ..ops.update import Ema
from ..ops.weight_norm import WeightNormed
from .backbones import Features, features, packed_features
from .checkpointing import is_statistic
from .heads import Memory, MLPHead, THead
from .packed import packs, prepare
from .prototypes import Prototypes

GLOBALS = 2


class Embedding(NamedTuple):
    """What one model says of a batch of views. The T-Head's two are None without a T-Head."""

    mlp: Tensor  # [views, B, D of the MLP-Head]
    t: Tensor | None  # [views, B, D of the T-Head]
    query: Tensor | None  # [views, B, D of the T-Head]
    features: Features
    memory: Memory | None = None  # of all views' maps, for a cross search


class HeadRows(NamedTuple):
    """The two global views in one head of a model."""

    features: Tensor  # [2, B, D]
    prototypes: Tensor | WeightNormed  # [K, D], made if the losses are to
    logits: Tensor | None  # [2, B, K], where logits are stored

    def others(self, features: Tensor) -> "HeadRows":
        """Other features [T, B, D] in the same head."""
        if self.logits is None:
            return self._replace(features=features)
        logits = prototype_linear(features, self.prototypes, self.logits.dtype)
        return HeadRows(features, self.prototypes, logits)

    def target(
        self,
        pairs: Pairs,
        temperature: float | Tensor,
        center: Tensor | None = None,
        weight: float = 1.0,
    ) -> Target | LinearTarget:
        if self.logits is not None:
            return Target(pairs, self.logits, None, temperature, center, weight)
        assert isinstance(self.prototypes, Tensor)
        return LinearTarget(pairs, self.features, self.prototypes, temperature, center, weight)

    def mean(self) -> Tensor | LinearLogits:
        """Of the logits [K], for the centre. Where none are stored, that of the features [D] and
        what makes it of them: D numbers go to the other processes then, not K."""
        if self.logits is not None:
            return column_mean(self.logits)
        assert isinstance(self.prototypes, Tensor)
        return LinearLogits(column_mean(self.features), self.prototypes)


class Temperatures(NamedTuple):
    """Teacher temperatures of one model's losses at this step."""

    self: float | Tensor
    cross: float | Tensor
    search: float | Tensor


class StepLosses(NamedTuple):
    totals: list[Tensor]  # one 0-d loss a model, with gradient
    terms: dict[str, Tensor]  # every unscaled loss, detached: self_mlp_1, self_t_1, cross_1 ...
    center_means: dict[str, Tensor | LinearLogits]  # of a head: `HeadRows.mean`
    teachers: dict[str, HeadRows]  # a head: mlp_1, t_1, mlp_2, t_2
    students: dict[str, Tensor]  # features [2, B, D] of the same views a head, detached
    teacher_features: list[Tensor]  # pooled [2B, C] a model
    grad_norms: dict[Tensor, Tensor]  # after backward, of the parameters whose norm it has seen


class Model(nn.Module):
    """A backbone (a timm or torchvision module) with its heads."""

    def __init__(self, backbone: nn.Module, mlp_head: MLPHead, t_head: THead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.mlp_head = mlp_head
        self.t_head = t_head
        self.packed = False  # groups of views in one pass: see `pack`
        self.whole_again = False  # nn/checkpointing.py: the backbone is made again in backward

    def forward(self, *groups: Tensor, remember: bool = False) -> Embedding:
        """Groups of views, of one size each [views, B, channels, H, W].

        A group is one BatchNorm batch; heads without BatchNorm take all groups in one call.
        `features` are those of the first group. `remember`: keep what cross searches of its maps
        need of the T-Head's pass; then there is one group.
        """
        found = self._features([views.flatten(0, 1) for views in groups])
        pooled = torch.cat([each.pooled for each in found])
        together = [pooled] if self.mlp_head.whole else [each.pooled for each in found]
        mlp = self._apart(torch.cat([self.mlp_head(x) for x in together]), groups)
        if self.t_head is None:
            return Embedding(mlp, None, None, found[0])
        maps, memory = [(each.tokens, each.grid) for each in found], None
        if remember:
            one, memory = self.t_head.remember(*maps[0])
            t = [one]
        elif self.packed:
            t = self.t_head.packed(maps)
        else:
            t = [self.t_head(*each) for each in maps]
        query = self._apart(self.t_head.query(pooled), groups)
        return Embedding(mlp, self._apart(torch.cat(t), groups), query, found[0], memory)

    def _features(self, groups: list[Tensor]) -> list[Features]:
        if self.packed and packs(self.backbone):
            return packed_features(self.backbone, groups)  # type: ignore[arg-type]
        if self.whole_again:
            return [checkpoint(features, self.backbone, views) for views in groups]
        return [features(self.backbone, views) for views in groups]

    @staticmethod
    def _apart(rows: Tensor, groups: Sequence[Tensor]) -> Tensor:
        """Rows of all crops [V*B, D] -> [V, B, D]"""
        return rows.unflatten(0, (sum(len(views) for views in groups), -1))


class MOKD(nn.Module):
    """One or two students with their teachers, the centres and all losses of a step.

    Args:
        students, teachers: `Model`s pairwise of one architecture. The teachers should be built
            without drop-path and dropout; they start as copies of the students here.
        cross_weights: lambda of each model's cross-distillation and search losses.
        student_temperature, center_momentum: as in DINO.
        search_queries: which views search, "local" crops (the global views where there are none)
            or "all". A global view searches the other global view's map.
        search_maps: of which global views a local crop searches the map, "first" or "both". Both
            defaults are the official choice.
        search: False leaves the search losses out; self- and cross-distillation stay.
        prototype_loss: how logits are made, "fused" (stored), "fused-linear" (not) or "reference";
            None for the automatic choice of `mokd_fast.ops.prototype_loss`.
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
        search_queries: Literal["local", "all"] = "local",
        search_maps: Literal["first", "both"] = "first",
        search: bool = True,
        prototype_loss: str | None = None,
    ) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.teachers = nn.ModuleList(teachers)
        for student, teacher in zip(students, teachers, strict=True):
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.cross_weights = tuple(cross_weights)
        self.student_temperature = student_temperature
        self.search_queries, self.search_maps = search_queries, search_maps
        self.search = search
        self.prototype_loss = prototype_loss
        # The official code keeps six centres; two of them always equal the self-loss ones.
        heads = [
            f"{head}_{i}"
            for i, student in enumerate(students, start=1)
            for head in (["mlp"] if student.t_head is None else ["mlp", "t"])
        ]
        self.centers = Center(dict.fromkeys(heads, prototypes), center_momentum)

    def forward(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        temperatures: Sequence[Temperatures],
        backward: Callable[[int, Tensor], None] | None = None,
    ) -> StepLosses:
        """All losses of one batch.

        Args:
            global_views: [2, B, channels, H, W], normalised; local_views: [L, B, channels, h, w]
                or None.
            temperatures: teacher temperatures for each model's losses.
            backward: called with a model's number, from 0, and its loss before the next model's
                forward pass, so that of one model alone activations are alive at a time (graphs of
                students are disjoint). `totals` have no gradient then.
        """
        with onednn.copies_kept():
            return self._forward(global_views, local_views, temperatures, backward)

    def _forward(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        temperatures: Sequence[Temperatures],
        backward: Callable[[int, Tensor], None] | None,
    ) -> StepLosses:
        self.centers.wait()  # the last update may hold prototypes, which may go now
        found = self._teach(global_views)
        groups = [views for views in (global_views, local_views) if views is not None]
        teachers: dict[str, HeadRows] = {}
        totals, terms, own, way = [], {}, {}, ""
        seen: dict[Tensor, Tensor] = {}
        for i, student in enumerate(self.students):
            embedding: Embedding = student(*groups)
            if not teachers:
                way = self.way(embedding.mlp)
                teachers = self._rows(found, way)
            maps = found[1 - i] if len(found) == 2 else None
            total, named = self._losses(i, embedding, teachers, maps, temperatures[i], way, seen)
            terms.update(named)
            for head in ("mlp", "t"):
                if (rows := getattr(embedding, head)) is not None:
                    own[f"{head}_{i + 1}"] = rows[:GLOBALS].detach()
            del embedding, rows  # or what is below would free nothing
            if backward is not None:
                with torch.autocast(total.device.type, enabled=False):
                    backward(i, total)
                total = total.detach()
            totals.append(total)
        means = {head: rows.mean() for head, rows in teachers.items()}
        pooled = [teacher.features.pooled for teacher in found]
        return StepLosses(totals, terms, means, teachers, own, pooled, seen)

    def pack(self) -> list[int]:
        """Lets students take global and local crops in one pass where they are plain ViTs, their
        T-Heads in any case; the numbers of the models whose backbones do."""
        for student in self.students:
            student.packed = True  # type: ignore[assignment]
            prepare(student)
        return [i for i, s in enumerate(self.students, 1) if packs(s.backbone)]  # type: ignore

    def way(self, features: Tensor) -> str:
        """How `prototype_loss` is computed for students' MLP-Head features [V, B, D]."""
        return pick(OP, *self.example(features), backend=self.prototype_loss).name

    def example(self, features: Tensor) -> tuple[Tensor, WeightNormed, list[LinearTarget]]:
        """Arguments of a `prototype_loss` like this one's; no numbers are read."""
        normed = _prototypes(self.students[0], "mlp").normed()
        pairs = cross_view_pairs(GLOBALS, len(features))
        rows = LinearTarget(pairs, features[:GLOBALS], normed.v)
        return features, normed, [rows] * len(self.students)

    @torch.no_grad()  # not inference mode: the losses save these tensors for backward
    def _teach(self, global_views: Tensor) -> list[Embedding]:
        return [
            teacher(global_views, remember=self._remembers(teacher)) for teacher in self.teachers
        ]

    def _remembers(self, teacher: nn.Module) -> bool:
        """Whether cross searches look into this teacher's plain T-Head pass."""
        head = teacher.t_head
        return len(self.teachers) == 2 and isinstance(head, THead) and head.mode == "cross"

    @torch.no_grad()
    def _rows(self, found: list[Embedding], way: str) -> dict[str, HeadRows]:
        rows = {}
        for i, (teacher, embedding) in enumerate(zip(self.teachers, found, strict=True), start=1):
            for head in ("mlp", "t"):
                if (features := getattr(embedding, head)) is not None:
                    normed, dtype = _prototypes(teacher, head).normed(), product_dtype(features)
                    unmade = way == "fused" and needs_no_matrix(features, normed, dtype)
                    prototypes = normed if unmade else normed.matrix(dtype)
                    stored = way != "fused-linear"
                    logits = prototype_linear(features, prototypes, dtype) if stored else None
                    rows[f"{head}_{i}"] = HeadRows(features, prototypes, logits)
        return rows

    def _losses(
        self,
        i: int,
        own: Embedding,
        teachers: dict[str, HeadRows],
        maps: Embedding | None,
        taus: Temperatures,
        way: str,
        seen: dict[Tensor, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of model i, one call a head. maps: of the other teacher's global views."""
        number, other, weight = i + 1, 2 - i, self.cross_weights[i]
        student: Model = self.students[i]  # type: ignore[assignment]
        V = len(own.mlp)
        every = cross_view_pairs(GLOBALS, V)

        def centred(head: str, tau: float | Tensor, weight: float = 1.0) -> Target | LinearTarget:
            return teachers[head].target(every, tau, self.centers[head], weight)

        targets = {f"self_mlp_{number}": centred(f"mlp_{number}", taus.self)}
        if maps is not None:
            targets[f"cross_{number}"] = centred(f"mlp_{other}", taus.cross, weight)
        total, terms = self._loss(own.mlp, student.mlp_head.last_layer.normed(seen), targets, way)
        if own.t is None:
            return total, terms
        assert student.t_head is not None
        targets = {f"self_t_{number}": centred(f"t_{number}", taus.self)}
        if maps is not None and self.search:
            assert own.query is not None
            found, pairs = self._search(other - 1, maps, own.query)
            rows = teachers[f"t_{other}"].others(found)
            # No centre, as official.
            targets[f"search_{number}"] = rows.target(pairs, taus.search, weight=weight)
        t_total, t_terms = self._loss(own.t, student.t_head.last_layer.normed(seen), targets, way)
        return total + t_total, terms | t_terms

    def _loss(
        self,
        features: Tensor,
        prototypes: WeightNormed,
        targets: dict[str, Target | LinearTarget],
        way: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All losses of one head: features [V, B, D] with every target."""
        total, terms = prototype_loss(
            features,
            prototypes,
            list(targets.values()),
            temperature=self.student_temperature,
            backend=way,
        )
        return total, dict(zip(targets, terms.unbind(), strict=True))

    @torch.no_grad()
    def _search(self, teacher: int, found: Embedding, queries: Tensor) -> tuple[Tensor, Pairs]:
        """Features [T, B, D] of the teacher's maps as queries [V, B, D] find them, and their pairs:
        a row is the target of the view that asked, 1 / T each."""
        head: THead = self.teachers[teacher].t_head  # type: ignore
        V = len(queries)
        asking: list[list[int]] = [[], []]  # the views that search each map
        if self.search_queries == "all" or V == GLOBALS:
            asking = [[1], [0]]
        for views in asking[: 1 if self.search_maps == "first" else 2]:
            views.extend(range(GLOBALS, V))
        # stack: a list as an index is copied to a GPU, and the host waits for that.
        rows = [
            _searched(head, found, view, torch.stack([queries[v] for v in views]))
            for view, views in enumerate(asking)
            if views
        ]
        who = asking[0] + asking[1]
        return torch.cat(rows), tuple(
            tuple(1 / len(who) if v == view else 0.0 for v in range(V)) for view in who
        )

    def student_prototypes(self, head: str) -> Tensor:
        """[K, D] of a head mlp_1, t_1, mlp_2 or t_2."""
        name, _, number = head.partition("_")
        return _prototypes(self.students[int(number) - 1], name).matrix()

    def statistics(self) -> list[Tensor]:
        """Running statistics (BatchNorm), of students and teachers: what a forward pass moves."""
        return [
            value for name, value in self.named_buffers() if is_statistic(name.rpartition(".")[2])
        ]

    def emas(self, momentum: float | Tensor = 1.0) -> list[Ema]:
        """What each teacher's parameters follow: see `update_`. Buffers (BatchNorm statistics) are
        the teachers' own."""
        return [
            Ema(list(teacher.parameters()), list(student.parameters()), momentum)
            for student, teacher in zip(self.students, self.teachers, strict=True)
        ]


def _searched(head: THead, found: Embedding, view: int, queries: Tensor) -> Tensor:
    """What queries [Q, B, D] find in the maps of one global view. [Q, B, D]"""

    def of_view(rows: Tensor) -> Tensor:  # [2 * B, ...] -> [B, ...]
        return rows.unflatten(0, (GLOBALS, -1))[view]

    if found.memory is None:
        maps = found.features
        return head.search(of_view(maps.tokens), maps.grid, queries)
    return head.look([(of_view(k), of_view(v)) for k, v in found.memory], queries)[0]


def _prototypes(model: nn.Module, head: str) -> Prototypes:
    found: Prototypes = getattr(model, f"{head}_head").last_layer
    return found
