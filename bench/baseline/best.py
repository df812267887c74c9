"""The training step as well as plain PyTorch can do it, with none of our operators.

The official arithmetic with what its user could change in a day: fused attention, the searched map
embedded once, prototypes normalised once a step, every view of a head in one log_softmax and one
einsum, one backward for both models, fused optimizers, foreach clip and EMA, channels_last,
torch.compile, one host read a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baseline.layers import Attention, Block, WeightNormLinear, resize_positions
from bench.baseline.model import OfficialModel
from bench.baseline.optim import ModelSettings, parameter_groups
from bench.baseline.step import OfficialStep, _Student


class FusedAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Prototypes(WeightNormLinear):
    """Gives features and their matrix; the logits of all views are made together."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def logits(self, features: Tensor) -> Tensor:  # [V*B, D] -> [V*B, K]
        return F.linear(features, torch._weight_norm(self.weight_v, self.weight_g, 0))


class BestModel(OfficialModel):
    def teach(self, crops: Sequence[Tensor], queries: Tensor, n_local: int) -> tuple[Tensor, ...]:
        pooled, tokens, size = self.features(crops)
        head = self.t_head
        x = tokens if head.stem is None else head.stem(tokens)
        x = x + resize_positions(head.pos_embed, head.grid, size)
        first, second = x.chunk(2)  # each [B, N, D]
        maps = first.repeat(n_local, 1, 1) if n_local else torch.cat((second, first))
        joined = torch.cat((queries.unsqueeze(1).to(maps.dtype), maps), dim=1)
        plain, searched = self._embed(x), self._embed(joined)[:, 1:]
        mlp = self.mlp_head(pooled)
        t = head.last_layer.logits(torch.cat((plain.mean(dim=1), searched.mean(dim=1))))
        own, found = t.split([len(plain), len(searched)])
        return self.mlp_head.last_layer.logits(mlp), own, found

    def _embed(self, x: Tensor) -> Tensor:
        for block in self.t_head.blocks:
            x = block(x)
        return self.t_head.norm(x)


class BestStep(OfficialStep):
    """`OfficialStep`, faster; the same losses, weights and centres up to rounding.

    `attention`: "sdpa", or "explicit" for the official one, which bf16 on the CPU prefers.
    `compiled`: transformer blocks and losses go through torch.compile; CNNs do not.
    """

    def __init__(
        self,
        students: tuple[OfficialModel, OfficialModel],
        settings: tuple[ModelSettings, ModelSettings],
        ema_momentum: Any,
        *,
        attention: str = "sdpa",
        compiled: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(students, settings, ema_momentum, **options)
        self.loss = torch.compile(pair_loss) if compiled else pair_loss
        # One block's code serves students, teachers and searches, in many sizes.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for model in (*self.students, *self.teachers):
            model.__class__ = BestModel
            model.backbone.to(memory_format=torch.channels_last)
            for module in model.modules():
                if type(module) is WeightNormLinear:
                    module.__class__ = Prototypes
                elif type(module) is Block and compiled:
                    module.compile(fullgraph=True, dynamic=False)
        self.attend(attention)
        self.optimizers = [
            _fused(model, setting) for model, setting in zip(students, settings, strict=True)
        ]

    def attend(self, attention: str) -> None:
        kind = FusedAttention if attention == "sdpa" else Attention
        for model in (*self.students, *self.teachers):
            for module in model.modules():
                if isinstance(module, Attention):
                    module.__class__ = kind

    def losses(self, images: Sequence[Tensor], epoch: int) -> dict[str, Tensor]:
        images = [x.contiguous(memory_format=torch.channels_last) for x in images]
        return super().losses(images, epoch)

    def _run_student(self, i: int, images: Sequence[Tensor]) -> _Student:
        found, model = super()._run_student(i, images), self.students[i]
        t = model.t_head.last_layer.logits(found.t)
        searching = t[-len(found.t_searching) :]  # local rows, or all where there are none
        mlp = model.mlp_head.last_layer.logits(found.mlp)
        return _Student(mlp, t, searching, found.query)

    def _model_losses(
        self, i: int, student: _Student, own: tuple, other: tuple, epoch: int
    ) -> dict[str, Tensor]:
        n, V = i + 1, self.n_views
        kinds = [self.centered[f"{kind}_{n}"] for kind in ("self_mlp", "self_t", "cross")]
        by_self, by_t, cross = kinds
        tau = by_self.student_temperature

        def target(loss: Any, rows: Tensor) -> tuple[Tensor, Tensor, float]:
            return rows, loss.center, float(loss.temperatures[epoch])

        self_mlp, crossed = self.loss(
            student.mlp, [target(by_self, own[0]), target(cross, other[0])], V, tau
        )
        (self_t,) = self.loss(student.t, [target(by_t, own[1])], V, tau)
        taus = self.search_loss.temperatures[epoch]
        search = search_loss(student.t_searching, other[2], tau, float(taus))
        with torch.no_grad():
            for loss, rows in ((by_self, own[0]), (by_t, own[1]), (cross, other[0])):
                mean = _wide(rows).mean(dim=0, keepdim=True)
                loss.center.lerp_(mean, 1 - loss.center_momentum)
        total = self_mlp + self_t + self.settings[i].weight * (crossed + search)
        names = (f"self_mlp_{n}", f"self_t_{n}", f"cross_{n}", f"search_{n}", f"loss_{n}")
        return dict(zip(names, (self_mlp, self_t, crossed, search, total), strict=True))

    def step(self, images: Sequence[Tensor], it: int, epoch: int) -> dict[str, Tensor]:
        """As `OfficialStep.step`; a model trained by SGD must not start with frozen layers (torch's
        fused SGD wants momentum for all tensors at once)."""
        self.set_rates(it)
        out = self.losses(images, epoch)
        total = out["loss_1"] + out["loss_2"]
        total.backward()
        if not total.isfinite():  # the one host read
            raise FloatingPointError(f"the loss is {total.item()} at iteration {it}")
        for i, student in enumerate(self.students):
            limit = self.settings[i].clip
            if limit:
                _clip([p.grad for p in student.parameters() if p.grad is not None], limit)
            if epoch < self.freeze_epochs:
                for name, p in student.named_parameters():
                    if "last_layer" in name:
                        p.grad = None
            self.optimizers[i].step()
            self.optimizers[i].zero_grad()
            with torch.no_grad():
                mine, theirs = list(self.teachers[i].parameters()), list(student.parameters())
                torch._foreach_lerp_(mine, theirs, 1 - float(self.ema_momentum[it]))
        return {name: value.detach() for name, value in out.items()}


def pair_loss(
    student: Tensor, targets: list[tuple[Tensor, Tensor, float]], V: int, tau: float
) -> list[Tensor]:
    """Every target [2*B, K] (logits, centre, temperature) with every other view of [V*B, K]."""
    logp = F.log_softmax(_wide(student.unflatten(0, (V, -1))) / tau, dim=-1)  # [V, B, K]
    found = []
    for rows, center, temperature in targets:
        q = F.softmax((rows.unflatten(0, (2, -1)) - center) / temperature, dim=-1)  # [2, B, K]
        pairs = -torch.einsum("tbk,vbk->tv", q.to(logp.dtype), logp) / q.shape[1]
        found.append((pairs.sum() - pairs[0, 0] - pairs[1, 1]) / (2 * V - 2))
    return found


def search_loss(student: Tensor, found: Tensor, tau: float, temperature: float) -> Tensor:
    q = F.softmax(_wide(found) / temperature, dim=-1)
    return F.cross_entropy(_wide(student) / tau, q)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clip(grads: list[Tensor], limit: float) -> None:
    scales = torch._foreach_add(torch._foreach_norm(grads, 2), 1e-6)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, limit)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(grads, scales)


def _fused(model: nn.Module, settings: ModelSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.t_head_as_other)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, fused=True)
