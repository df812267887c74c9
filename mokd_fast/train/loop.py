"""The pre-training loop: plain PyTorch, one process a GPU."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from ..console import RunConsole, takes_output
from ..data.batches import Views
from ..data.loader import ViewLoader, choose_loader, finish
from ..data.sources import open_source
from ..errors import UserError
from ..nn import Temperatures
from ..nn.mokd import StepLosses
from ..nn.tally import add_counts, counters
from ..ops import Clip, explain, grad_norms
from ..ops.center import LinearLogits
from ..ops.foreach import Snapshot
from ..ops.prototype_loss import OP
from . import apex
from .alarms import Alarms
from .check import check_pictures
from .checkpoint import find_checkpoint, kept, load_checkpoint, save_checkpoint, way_out
from .device import check_backend, choose_device
from .diagnose import diagnose
from .distributed import World
from .fit import fit
from .folder import RunLock, write_whole
from .graph import Batch, Kind, Recorder, StepGraph, records, refuse_graph
from .meter import BadFiles, Meter, StepResult, accumulate
from .networks import make_networks
from .online import OnlineKNN
from .optim import ScheduledOptimizer, freeze_last_layers
from .precision import choose_precision
from .recipe import Recipe, load_recipe, total_steps
from .resume import load_weights, resumable
from .schedule import cosine, in_steps, teacher_temperature
from .start import load_files, weight_files
from .state import capture, not_finite, restore
from .wandb_log import WandB


def pretrain(
    recipe: str | Path | dict[str, Any] | Recipe = "resnet50-vit_small",
    *overrides: str,
    run: str | Path | None = None,
    warm_start: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Pre-trains the models of a recipe; returns the run folder.

    Args:
        recipe: a published recipe's name, a YAML file, a dict of its keys or a `Recipe`.
        overrides: `key=value` on top of it, as on the command line.
        run: the run folder, default runs/<recipe name>. A run that was cut off there goes on
            from its last checkpoint.
        warm_start: a run folder or a checkpoint whose weights (students, teachers, centres) a new
            run starts from. A run that goes on leaves it alone.

    Raises UserError for whatever the user can mend; see `Trainer`. SIGTERM and Ctrl-C in the main
    thread end the step, write a checkpoint and raise SystemExit(143) or KeyboardInterrupt.

    Example:
        >>> import mokd_fast
        >>> run = mokd_fast.pretrain("fashion-mnist", "train.duration=2it")  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, list(overrides))
    elif overrides:
        recipe = load_recipe(recipe.model_dump(mode="json"), list(overrides))
    folder = Path(run) if run is not None else Path("runs") / recipe.name
    world = World(recipe.train.device)
    if not world.first:
        console = Console(quiet=True)
    try:
        Trainer(recipe, folder, console or RunConsole(), warm_start, world).fit()
    finally:
        world.leave()
    return folder


class Trainer:
    """Everything of one run. The cheap checks come first, the networks last.

    Raises UserError for a missing or empty data folder, a batch larger than the data set, more
    unreadable pictures than data.max_bad, a warm-up longer than the run, a run folder that cannot
    be written, is in use or holds another recipe's checkpoint, an unknown or unfit model, a warm
    start or file of weights that does not fit, evaluation sources that no step could evaluate, and
    a missing wandb.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        console: Console,
        warm_start: str | Path | None = None,
        world: World | None = None,
    ) -> None:
        self.recipe, self.console = recipe, console
        self.world = world or World(recipe.train.device)
        self.run = self.world.folder(run)
        train, data = recipe.train, recipe.data
        self.share = train.accumulate * self.world.size  # into so many parts a batch is cut
        if train.batch % self.share:
            raise UserError(
                f"train.batch={train.batch} must be a multiple of train.accumulate="
                f"{train.accumulate} times {self.world.size} processes"
            )
        if data.root is None:
            raise UserError("data.root is not set: data.root=/path/to/pictures, or fashion-mnist")
        self.device = choose_device(train.device)
        refuse_graph(recipe, self.device, self.world.size)
        self.precision, reason = choose_precision(train.precision, self.device)
        if reason:
            self.note(f"train.precision=auto: {self.precision} ({reason})")
        check_backend(recipe, self.device)
        for i, model in enumerate(recipe.models):
            apex.check(f"models.{i}.optimizer.name", model.optimizer.name, self.device)
        self.source = open_source(data.root)
        self.loader = self._loader(frozenset())  # refuses a batch that does not fit
        self.steps_per_epoch = self.loader.steps_per_epoch // train.accumulate
        self.total = total_steps(recipe, self.steps_per_epoch)
        self.wandb = WandB(train.wandb, self.world)
        self.knn = OnlineKNN(recipe, self.world, self.steps_per_epoch, self.total)
        self.fingerprint = self._one_list()
        self.lock = self._claim()
        try:
            self._prepare(run, warm_start)
        except BaseException:
            self.lock.release()
            raise

    def _one_list(self) -> str:
        """The fingerprint of the pictures, which is that of every process: else they would not all
        be seen, and some twice."""
        mine = self.source.fingerprint()
        found = self.world.gather(mine)

        def refuse() -> None:
            if other := [str(rank) for rank, theirs in enumerate(found) if theirs != found[0]]:
                raise UserError(
                    f"data.root={self.recipe.data.root} is another list of pictures in process "
                    f"{', '.join(other)} than in process 0: give every machine the same files"
                )

        self.world.decide(refuse)
        return mine

    def _claim(self) -> RunLock:
        locks: list[RunLock] = []
        self.world.decide(lambda: locks.append(RunLock(self.run)))
        return locks[0] if locks else RunLock(self.run)

    def _loader(self, known_bad: frozenset[int]) -> ViewLoader:
        train, data = self.recipe.train, self.recipe.data
        return ViewLoader(
            self.source,
            self.recipe.augment,
            batch=train.batch // self.share,
            accumulate=train.accumulate,
            rank=self.world.rank,
            world=self.world.size,
            channels=data.channels,
            seed=train.seed,
            workers=data.workers,
            drop_last=data.drop_last,
            loader=choose_loader(data.loader, self.device)[0],
            device=self.device,
            known_bad=known_bad,
        )

    def _state(self, run: Path) -> dict[str, Any] | None:
        """Of the checkpoint that the run goes on from, in every process."""
        found: list[dict[str, Any]] = []
        recipe = self.recipe.model_dump(mode="json")

        def newest() -> int | None:
            state = resumable(run, recipe, self.fingerprint, self.loader.loader, self.world.size)
            found.extend([] if state is None else [state])
            return None if state is None else state["step"]

        step = self.world.decide(newest)
        if step is not None and not found:
            found.append(load_checkpoint(run / "checkpoints" / f"{step:08d}.pt"))
        return found[0] if found else None

    def _prepare(self, run: Path, warm_start: str | Path | None) -> None:
        """The networks, as they start or as the newest checkpoint has them."""
        recipe = self.recipe
        state = self._state(run)
        given = find_checkpoint(warm_start) if warm_start and state is None else None
        files = {} if state else self.world.decide(lambda: weight_files(recipe))
        self.known_bad, reasons = self.world.decide(
            lambda: check_pictures(recipe.data, self.source, self.run, self.console, state)
        )
        self.loader = self._loader(self.known_bad)
        self.loader.bad_files.update(reasons)
        self.bad_files = BadFiles(self.loader.bad_files, self.world)
        self.mokd = make_networks(recipe, self.device, self.precision, self.world, self.note)
        self.recorded = records(recipe, self.device, self.world.size, self.mokd)
        self.statistics = Snapshot(self.mokd.statistics())
        self.counters = counters(self.mokd)
        self._schedules()
        self.way = self._prototype_loss()
        # fp16: one a student, so that each looks for its own scale.
        fp16 = self.precision == "fp16"
        self.scalers = [torch.amp.GradScaler(self.device.type) for _ in recipe.models if fp16]
        self.done = 0
        self.saved = 0  # the step of the newest checkpoint
        self.skipped: list[float] = []  # of the meter, for the next one
        if state is not None:
            restore(self, state)
            self.saved = self.done
            if warm_start:
                self.say(f"{self.run} goes on, so --warm-start {warm_start} is not applied again")
        elif given is not None:
            path, taken = given
            load_weights(self.mokd, taken, path)
            self.say(
                f"warm start from {path} (step {taken['step']}): students, teachers and centres "
                "are taken; optimizers and schedules begin anew"
            )
            for i in files:
                self.say(f"models.{i}.weights is left alone: --warm-start goes before it")
            self.save()  # else a run cut off before its first checkpoint would start without it
        elif files:
            load_files(self, files)
            self.save()  # as well: the files may be gone or others by then
        self.network = self.world.share(self.mokd, self.device)
        self.graph = StepGraph(self.mokd, self._step, Recorder()) if self.recorded else None
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        path = self.run / "recipe.yaml"
        try:
            write_whole(path, text)
        except OSError as error:
            reason = f"{path} cannot be written: {error.strerror}"
            raise UserError(f"{reason}. {kept(self.run)} Make room there first") from error

    def _schedules(self) -> None:
        recipe, total, per_epoch = self.recipe, self.total, self.steps_per_epoch
        train, loss = recipe.train, recipe.loss
        warmup = in_steps(train.warmup, per_epoch, total)
        scale = train.batch / train.lr_batch if train.lr_batch else 1.0
        self.optimizers = [
            ScheduledOptimizer(config, model, total=total, warmup=warmup, lr_scale=scale)
            for config, model in zip(recipe.models, self.mokd.students, strict=True)
        ]
        for optimizer in self.optimizers if self.recorded else []:
            optimizer.rates_on_device()
        self.emas = self.mokd.emas()
        self.momentum = cosine(recipe.teacher.momentum, recipe.teacher.final_momentum, total)
        self.alarms = Alarms(recipe.prototypes, 2 * (train.batch // self.share), warmup)
        self.every = max(in_steps(train.checkpoint_every, per_epoch, total), 1)
        self.frozen_steps = in_steps(train.freeze_last_layers, per_epoch, total)
        self.temperatures = [
            [
                teacher_temperature(
                    loss.warmup_teacher_temperature, loss.teacher_temperature, w, total, per_epoch
                )
                for _, w in config.temperature_warmup
            ]
            for config in recipe.models
        ]

    def _prototype_loss(self) -> str:
        """Whether logits are stored, said once with the reason."""
        train, views = self.recipe.train, 2 + self.recipe.augment.locals
        prototypes = self.mokd.students[0].mlp_head.last_layer.weight_v  # type: ignore[union-attr]
        features = prototypes[:1].expand(views, train.batch // self.share, -1)  # type: ignore
        with self._autocast():
            way = self.mokd.way(features)
            reasons = explain(OP, *self.mokd.example(features)).splitlines()
        text = f"loss.prototypes={self.recipe.loss.prototypes}: {way}"
        if self.mokd.prototype_loss is None:
            # The environment, where it forces one, and not what the automatic choice would weigh.
            forced = [r for r in reasons if r.endswith("this one runs or raises")]
            text += f" ({'; '.join(forced or [r for r in reasons if ': can run, but ' in r])})"
        self.note(text)
        return way

    def fit(self) -> None:
        """Runs to the end of the recipe, with a checkpoint at intervals and at the end."""
        fit(self)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)  # paths as they are

    def note(self, text: str) -> None:
        """Says what nobody has to answer, unless a full pipe would hold the run up."""
        if takes_output(self.console):
            self.say(text)

    def is_logged(self, done: int) -> bool:
        at = (done % self.recipe.train.log_every, done % self.every, self.total - done)
        return 0 in at or self.knn.due(done)

    def step(self, k: int, batches: Iterator[Views]) -> StepResult:
        """Optimizer step k: forward, backward, clip, freeze, update, EMA, centres.

        A step with a loss or gradient that is not finite is skipped: parameters, optimizer state,
        BatchNorm statistics and centres keep their bits, while the schedules and random numbers go
        on. That is decided on the device, the host reads nothing. In fp16 a scaler that overflows
        skips its own optimizer alone and looks on for its scale (a loss that is not finite halves
        it too); only below a scale of 1 is the gradient at fault.
        """
        for optimizer in self.optimizers:
            optimizer.schedule(k)
        taus = [Temperatures(*(float(t[k]) for t in rows)) for rows in self.temperatures]
        momentum = torch.full((), float(self.momentum[k]), dtype=torch.float64, device=self.device)
        kind = Kind(frozen=k < self.frozen_steps, logged=self.is_logged(k + 1))
        views = (self.to_device(next(batches)) for _ in range(self.recipe.train.accumulate))
        return (self.graph or self._step)(views, taus, momentum, kind)

    def _step(
        self, batches: Iterable[Batch], taus: Sequence[Temperatures], momentum: Tensor, kind: Kind
    ) -> StepResult:
        """What a CUDA graph records: all after the crops are on the device."""
        parts = self.recipe.train.accumulate
        losses: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        prototypes: dict[str, Tensor] = {}
        self.statistics.take()
        for part, views in enumerate(batches):
            prototypes.clear()  # the next micro-batch makes the same again
            with self.world.apart(self.network, part < parts - 1):
                out = self._losses(*views, taus)
            if kind.logged:
                accumulate(diagnostics, diagnose(out, self.mokd, taus), parts)
            if self.network is not self.mokd:
                totals = [self._part(i, total) for i, total in enumerate(out.totals)]
                torch.stack(totals).sum().backward()
            for i, total in enumerate(out.totals, start=1):
                out.terms[f"loss_{i}"] = total.detach()
            accumulate(losses, out.terms, parts)
            for head, mean in out.center_means.items():
                if isinstance(mean, LinearLogits):
                    mean, prototypes[head] = mean
                accumulate(means, {head: mean}, parts)
            # Where they are of the whole gradient, as it will be clipped.
            whole = parts == 1 and self.network is self.mokd and not self.scalers
            known = out.grad_norms if whole else None
            del out  # or the teachers' logits would live on into the next micro-batch
        losses = self.world.mean(losses)
        skip = ~torch.stack(list(losses.values())).isfinite().all()
        skip = self._update(kind, skip, momentum, known)
        logits = {h: LinearLogits(m, prototypes[h]) if prototypes else m for h, m in means.items()}
        self.mokd.centers.update(logits, skip=skip)
        add_counts(self.counters)
        self.statistics.restore_(skip)
        if diagnostics:
            for i in range(len(self.scalers)):
                one = torch.ones((), device=self.device)
                diagnostics[f"grad_scale_{i + 1}"] = self._scaled(i, one)
        return StepResult(losses, skip, diagnostics)

    def _losses(
        self, global_views: Tensor, local_views: Tensor | None, taus: Sequence[Temperatures]
    ) -> StepLosses:
        """Forward and, in one process, backward."""
        # One model after the other, for the memory; DDP wants one backward after its forward.
        alone = self.network is self.mokd
        backward = (lambda i, total: self._part(i, total).backward()) if alone else None
        with self._autocast():
            found: StepLosses = self.network(global_views, local_views, taus, backward)
        return found

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def _part(self, i: int, total: Tensor) -> Tensor:
        """Of model i's loss in the optimizer step, this micro-batch's part."""
        return self._scaled(i, total) / self.recipe.train.accumulate

    def _scaled(self, i: int, x: Tensor) -> Tensor:
        return self.scalers[i].scale(x) if self.scalers else x

    def _update(
        self,
        kind: Kind,
        skip: Tensor,
        momentum: Tensor,
        known: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Clip, freeze, optimizers and EMA; whether to skip the step, with the gradients seen."""
        overflows, clips = [], []
        for i, (config, ema) in enumerate(zip(self.recipe.models, self.emas, strict=True)):
            if self.scalers:
                self.scalers[i].unscale_(self.optimizers[i].torch)
            norms = grad_norms(ema.student, known)
            clips.append(Clip(norms, config.clip) if config.clip else None)
            overflow = ~torch.stack(list(norms.values())).isfinite().all()
            overflows.append(overflow)
            if self.scalers:
                one = torch.ones_like(next(iter(norms.values())))
                overflow = overflow & (self._scaled(i, one) < 1)
            skip = skip | overflow
            if kind.frozen:
                freeze_last_layers(self.mokd.students[i].named_parameters())
        momentum = momentum.masked_fill(skip, 1)
        rows = zip(self.optimizers, overflows, clips, self.emas, strict=True)
        for optimizer, overflow, clip, ema in rows:
            optimizer.step(skip | overflow, clip, ema._replace(momentum=momentum))
        for scaler in self.scalers:
            scaler.update()
        return skip

    def _row(self, meter: Meter) -> dict[str, float]:
        """The metrics after `self.done` steps: means since the last row, and the schedules."""
        k = self.done - 1
        try:
            found = meter.read(self.recipe.train.max_skipped)
            self.skipped = meter.skipped
        except FloatingPointError as error:
            raise UserError(f"{error}. {way_out(self.run)}") from error
        row = {"step": self.done, "epoch": self.done / self.steps_per_epoch, **found}
        row["images_per_s"] = row.pop("steps_per_s") * self.recipe.train.batch
        row["bad_files"] = self.bad_files.count()
        row["ema_momentum"] = float(self.momentum[k])
        for i, optimizer in enumerate(self.optimizers, start=1):
            row[f"lr_{i}"] = float(optimizer.schedules[0][0][k])
            row[f"temperature_self_{i}"] = float(self.temperatures[i - 1][0][k])
        return row

    def to_device(self, views: Views) -> tuple[Tensor, Tensor | None]:
        """Normalised float [views, B, channels, H, W] on the device."""
        data, train = self.recipe.data, self.recipe.train
        return finish(
            views, data.mean, data.std, device=self.device, channels_last=train.channels_last
        )

    def save(self) -> Path:
        """A checkpoint of this step. Refuses to save a state that is not finite."""
        if fault := not_finite(self):
            raise UserError(f"{fault} is not finite after step {self.done}. {way_out(self.run)}")
        state, keep = capture(self), self.recipe.train.keep_checkpoints

        def write() -> Path:
            try:
                return save_checkpoint(self.run / "checkpoints", self.done, state, keep)
            except UserError as error:
                raise UserError(f"{error}. {kept(self.run)} Make room there first") from error

        path = self.world.decide(write)
        self.saved = self.done
        return path
