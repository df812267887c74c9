"""The official MOKD training step: four networks forward, eight losses, two updates, two EMAs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.baseline.losses import DINOLoss, SearchLoss, temperature_schedule
from bench.baseline.model import OfficialModel, ema_twin
from bench.baseline.optim import ModelSettings, Schedule, clip_per_tensor_, ema_, make_optimizer

KINDS = ("self_mlp", "self_t", "cross", "search")


class _Student(NamedTuple):
    mlp: Tensor  # [V*B, K], global crops first
    t: Tensor  # [V*B, K]
    t_searching: Tensor  # rows of t that a search is the target of
    query: Tensor  # one query for each of these rows, [rows, D]


class OfficialStep:
    """Two students, their EMA teachers, six centres and two optimizers, on the students' device.

    Model 1 is the CNN and model 2 the ViT of the official run, but any two OfficialModels with
    T-Heads of one width will do. `n_views` counts all crops, two global ones first. Temperatures
    warm up over `warmup_1` epochs for model 1's self losses and `warmup_2` for all others.
    `autocast` is None or a dtype; float16 brings one GradScaler a model. Single process: no DDP,
    no SyncBatchNorm. The official script also sets `torch.backends.cudnn.benchmark = True`.
    """

    def __init__(
        self,
        students: tuple[OfficialModel, OfficialModel],
        settings: tuple[ModelSettings, ModelSettings],
        ema_momentum: Schedule,
        *,
        out_dim: int,
        n_views: int = 10,
        epochs: int = 100,
        temperature: tuple[float, float] = (0.04, 0.07),
        warmup_1: int = 50,
        warmup_2: int = 30,
        freeze_epochs: int = 1,
        autocast: torch.dtype | None = None,
        teachers: tuple[OfficialModel, OfficialModel] | None = None,
    ) -> None:
        self.students = students
        self.teachers = teachers or (ema_twin(students[0]), ema_twin(students[1]))
        self.settings, self.ema_momentum = settings, ema_momentum
        self.freeze_epochs, self.autocast_dtype = freeze_epochs, autocast
        weight = students[0].mlp_head.last_layer.weight_v
        self.device = weight.device

        slow = temperature_schedule(*temperature, warmup_1, epochs)
        fast = temperature_schedule(*temperature, warmup_2, epochs)
        self.n_views = n_views
        self.centered = nn.ModuleDict()
        for i in (1, 2):
            for kind in KINDS[:3]:
                taus = slow if i == 1 and kind != "cross" else fast
                self.centered[f"{kind}_{i}"] = DINOLoss(out_dim, n_views, taus)
        self.centered.to(self.device, weight.dtype)
        self.search_loss = SearchLoss(fast)
        self.optimizers = [make_optimizer(*pair) for pair in zip(students, settings, strict=True)]
        scaled = autocast == torch.float16
        self.scalers = [torch.amp.GradScaler(self.device.type, enabled=scaled) for _ in students]
        self.logged: dict[str, float] = {}

    def _autocast(self) -> torch.autocast:
        on = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=on)

    def _run_student(self, i: int, images: Sequence[Tensor]) -> _Student:
        mlp, t, query = self.students[i](images[:2])
        if len(images) == 2:
            return _Student(mlp, t, t, query)
        # Two forwards, not one: global and local crops differ in size, and are two BN batches.
        mlp_local, t_local, query = self.students[i](images[2:])
        return _Student(torch.cat((mlp, mlp_local)), torch.cat((t, t_local)), t_local, query)

    def losses(self, images: Sequence[Tensor], epoch: int) -> dict[str, Tensor]:
        """The eight losses, unweighted, and `loss_1`, `loss_2`, all attached to the graph.

        Like the official loss modules, a call moves the six centres and the BatchNorm statistics.
        """
        if len(images) != self.n_views:
            raise ValueError(f"{len(images)} crops given to a step built for {self.n_views}")
        images = [x.to(self.device, non_blocking=True) for x in images]
        students, teachers = [], []
        for i in (0, 1):
            with self._autocast():
                students.append(self._run_student(i, images))
        for i in (0, 1):
            query = students[1 - i].query.detach()
            with self._autocast():
                teachers.append(self.teachers[i].teach(images[:2], query, len(images) - 2))
        out: dict[str, Tensor] = {}
        for i in (0, 1):
            with self._autocast():
                out |= self._model_losses(i, students[i], teachers[i], teachers[1 - i], epoch)
        return out

    def _model_losses(
        self, i: int, student: _Student, own: tuple, other: tuple, epoch: int
    ) -> dict[str, Tensor]:
        mlp, t, cross, search = (f"{kind}_{i + 1}" for kind in KINDS)
        out = {
            mlp: self.centered[mlp](student.mlp, own[0], epoch),
            t: self.centered[t](student.t, own[1], epoch),
            cross: self.centered[cross](student.mlp, other[0].detach(), epoch),
            search: self.search_loss(student.t_searching, other[2].detach(), epoch),
        }
        mutual = out[cross] + out[search]
        out[f"loss_{i + 1}"] = out[mlp] + out[t] + self.settings[i].weight * mutual
        return out

    def set_rates(self, it: int) -> None:
        """Write this iteration's lr and weight decay into the parameter groups."""
        for i, optimizer in enumerate(self.optimizers):
            own, other = self.settings[i], self.settings[1 - i]
            for number, group in enumerate(optimizer.param_groups):
                source = other if number == 2 else own
                group["lr"] = float(source.lr[it])
                if number != 1:  # group 1 is never decayed
                    group["weight_decay"] = float(source.weight_decay[it])

    def _update(self, i: int, loss: Tensor, it: int, epoch: int) -> None:
        student, optimizer, scaler = self.students[i], self.optimizers[i], self.scalers[i]
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # a scaler that is off passes everything through
        if self.settings[i].clip:
            scaler.unscale_(optimizer)
            clip_per_tensor_(student, self.settings[i].clip)
        if epoch < self.freeze_epochs:
            for name, p in student.named_parameters():
                if "last_layer" in name:
                    p.grad = None  # not zero: neither decay nor momentum may move it
        scaler.step(optimizer)
        scaler.update()
        ema_(self.teachers[i], student, float(self.ema_momentum[it]))

    def step(self, images: Sequence[Tensor], it: int, epoch: int) -> dict[str, Tensor]:
        """One training step on iteration `it`; returns the detached losses of this step.

        Model 1 is updated, EMA included, before model 2's backward begins. The host waits for the
        device at each number that the official loop reads: two checks, four logged values.
        """
        self.set_rates(it)
        out = self.losses(images, epoch)
        for name in ("loss_1", "loss_2"):
            if not math.isfinite(out[name].item()):
                raise FloatingPointError(f"{name} is {out[name].item()} at iteration {it}")
        self._update(0, out["loss_1"], it, epoch)
        self._update(1, out["loss_2"], it, epoch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        logged = ("loss_1", "loss_2", "self_mlp_1", "self_mlp_2")
        self.logged = {name: out[name].item() for name in logged}
        return {name: value.detach() for name, value in out.items()}
