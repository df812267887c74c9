"""kNN while a run trains: what the teachers' backbones are worth so far, on labelled pictures."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.sources import Source, open_source
from ..errors import UserError
from ..evaluate import Pictures, Pooled, extract, knn, same_classes
from .distributed import World
from .recipe import Recipe
from .schedule import in_steps

if TYPE_CHECKING:
    from .loop import Trainer

_TRIED = 5  # pictures of each source that are decoded before the first step
_log = logging.getLogger(__name__)


class OnlineKNN:
    """Weighted kNN every `evaluate.every` steps and after the last one, as `mokd-fast knn` does it.

    The first process evaluates, on copies of the teachers' backbones; the others wait for it in a
    gloo group, whose patience is a day and not NCCL's ten minutes. So modes, statistics, random
    numbers, compiled graphs and the loader of the training stay as they are, and its weights are
    bit for bit those of a run without. Features live as long as a call.

    Raises UserError, naming the key, for sources that are missing, cannot be read, have no labels
    or differ in their classes. Without evaluate.every nothing is opened and nothing ever due.
    """

    def __init__(self, recipe: Recipe, world: World, steps_per_epoch: int, total: int) -> None:
        self._recipe, self._total = recipe, total
        every = recipe.evaluate.every
        self._every = max(in_steps(every, steps_per_epoch, total), 1) if every else 0
        self._sources: tuple[Source, Source] | None = None
        if self._every:
            world.decide(self._open)

    def _open(self) -> None:
        self._sources = evaluation_sources(self._recipe)
        for key, source in zip(("train", "test"), self._sources, strict=True):
            _check(f"evaluate.{key}", source, self._recipe)
        try:
            same_classes(*self._sources)
        except UserError as error:
            raise UserError(f"evaluate.train and evaluate.test: {error}") from error

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return bool(self._every and done) and (done % self._every == 0 or done == self._total)

    def owed(self, done: int, run: Path, world: World) -> bool:
        """Whether a run that goes on was stopped between step `done` and its evaluation."""
        return self.due(done) and world.decide(lambda: not _is_there(run, done))

    def scores(self, trainer: Trainer, stop: Callable[[], bool]) -> dict[str, float] | None:
        """{"knn_1_k20": percent, ...} of every model and k, the same in every process.

        None once stop() holds (asked after each batch). Empty when it cannot be done: that is said,
        and no reason to end a training.
        """
        return trainer.world.decide(lambda: self._scores(trainer, stop))

    def _scores(self, trainer: Trainer, stop: Callable[[], bool]) -> dict[str, float] | None:
        def look(done: int, total: int) -> None:
            if stop():
                raise _Stopped

        begin = time.perf_counter()
        try:
            found = self._knn(trainer, look)
        except _Stopped:
            return None
        except Exception as error:
            _log.debug("online kNN", exc_info=True)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = f"{kind}{str(error).partition(chr(10))[0]}"
            text = f"no kNN, the training goes on without ({reason})"
            found = {}
        else:
            each = ", ".join(f"{key} {value:.2f} %" for key, value in found.items())
            text = f"{each} ({time.perf_counter() - begin:.1f} s)"
        trainer.note(f"step {trainer.done}: {text}")
        return found

    def _knn(self, trainer: Trainer, look: Callable[[int, int], None]) -> dict[str, float]:
        assert self._sources is not None
        settings, device = self._recipe.evaluate, trainer.device
        models = {
            str(i): Pooled(copy.deepcopy(teacher.backbone))  # type: ignore[arg-type]
            for i, teacher in enumerate(trainer.mokd.teachers, start=1)
        }
        limits = settings.train_limit, settings.test_limit
        (bank, bank_y), (test, test_y) = (
            extract(models, source, limit=limit, device=device, progress=look,
                    **picture_options(self._recipe))
            for source, limit in zip(self._sources, limits, strict=True)
        )  # fmt: skip
        rows: dict[str, float] = {}
        for name in models:
            x = bank.pop(name).to(device)
            found = knn(x, bank_y, test.pop(name), test_y, ks=settings.k)
            rows |= {f"knn_{name}_k{k}": top1 for k, top1 in found.items()}
        return rows


class _Stopped(Exception):
    """The run was asked to stop."""


def _is_there(run: Path, done: int) -> bool:
    """Whether metrics.jsonl has the scores of step `done`."""
    path = run / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return any(line.startswith(f'{{"step": {done},') and '"knn_' in line for line in lines)


def _check(key: str, source: Source, recipe: Recipe) -> None:
    """Refuses what no later step could evaluate; a few pictures are decoded."""
    options = picture_options(recipe)
    try:
        pictures = Pictures(source, **{k: options[k] for k in ("size", "resize", "channels")})
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    tried = min(_TRIED, len(pictures))
    reasons = [reason for _, _, reason in map(pictures.__getitem__, range(tried)) if reason]
    if len(reasons) == tried:
        raise UserError(
            f"{key}: none of its first {tried} pictures can be read ({reasons[0]}). Mend them, or "
            "set evaluate.every= to train without"
        )


def evaluation_sources(recipe: Recipe) -> tuple[Source, Source]:
    """evaluate.train and evaluate.test, opened; UserError naming the one that is not there."""
    found = []
    for key in ("train", "test"):
        root = getattr(recipe.evaluate, key)
        if root is None:
            raise UserError(
                f"evaluate.{key} is not set: give a folder with one folder a class, as "
                f"evaluate.{key}=/path/to/{key}"
            )
        try:
            found.append(open_source(root))
        except UserError as error:
            raise UserError(f"evaluate.{key}: {error}") from error
    return found[0], found[1]


def picture_options(recipe: Recipe) -> dict[str, Any]:
    """How an evaluation of this recipe reads pictures: arguments of `extract` and `evaluate`."""
    height, width = recipe.augment.global_hw
    data = recipe.data
    return {
        "size": (height, width),
        "resize": recipe.evaluate.resize or round(min(height, width) * 256 / 224),
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        # None where decoding costs less than handing a picture over.
        "workers": data.workers if max(height, width) > 64 else 0,
    }
