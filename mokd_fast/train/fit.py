"""The run: step after step, and what is kept when it cannot go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from ..data.batches import Views
from ..errors import UserError
from . import memory
from .alarms import replay
from .checkpoint import kept
from .log import RunLog
from .malloc import freed_memory_kept, huge_pages
from .meter import Meter, StepResult
from .stop import StopSignals

if TYPE_CHECKING:
    from .loop import Trainer


def fit(trainer: Trainer) -> None:
    """From the step a trainer is at to the end of its recipe."""
    run, done, total = trainer.run, trainer.done, trainer.total
    try:
        if done >= total and not trainer.knn.owed(done, run, trainer.world):
            trainer.say(f"{run} is finished: {total} steps are done")
            return
        if done:
            trainer.say(f"resuming {run} from step {done} of {total}")
        with freed_memory_kept():
            _steps(trainer)
    except (KeyboardInterrupt, SystemExit):
        trainer.say(f"Stopped at step {trainer.done} of {total}. {kept(run)}")
        raise
    except UserError:
        raise
    except Exception:  # a bug: with its traceback, but nobody has to wonder what is left
        trainer.say(f"The run failed in step {trainer.done + 1}. {kept(run)}")
        raise
    finally:
        trainer.lock.release()


def _steps(trainer: Trainer) -> None:
    total = trainer.total
    parts = trainer.recipe.train.accumulate
    trainer.wandb.begin(trainer)
    batches = _Counted(trainer.loader.batches(trainer.done * parts, total * parts))
    meter = Meter(batches, trainer.skipped)
    trainer.mokd.train()
    grown = trainer.done + 2  # steps, after which the heap has its size
    log = RunLog(trainer.run, trainer.done, total, trainer.console, trainer.wandb)
    with StopSignals() as stop, log:
        replay(trainer.alarms, trainer.run / "metrics.jsonl")
        if trainer.knn.owed(trainer.done, trainer.run, trainer.world):
            found = _evaluate(trainer, meter, stop)
            if found is None:
                stop.leave()
            if found:  # else the next start tries again
                log.write({"step": trainer.done} | found)
        while trainer.done < total:
            result = _try_step(trainer, meter, batches, log)
            trainer.done += 1
            if trainer.done == grown and trainer.device.type == "cpu":
                huge_pages()
            meter.add(trainer.done, result)
            log.advance()
            # One look: a signal may come at any time.
            stopping = trainer.world.stops(stop.number is not None)
            save = stopping or trainer.done == total or trainer.done % trainer.every == 0
            owed = False
            if save or trainer.is_logged(trainer.done):
                row = trainer._row(meter)  # raises when too many steps are skipped, before a save
                if trainer.knn.due(trainer.done):
                    found = None if stopping else _evaluate(trainer, meter, stop)
                    owed = found is None  # a run that goes on begins with it
                    stopping, save = stopping or owed, save or owed
                    row |= found or {}
                log.write(row)
                # Before alarms.jsonl, which is opened by its path; of one, so that all save.
                if trainer.world.decide(trainer.lock.lost):
                    _save_anew(trainer)
                log.alarm(trainer.alarms.see(row))
            if save:
                log.sync()  # a checkpoint never without the rows up to it
                trainer.save()
            if stopping and (trainer.done < total or owed):
                stop.leave()


def _evaluate(trainer: Trainer, meter: Meter, stop: StopSignals) -> dict[str, float] | None:
    """The online kNN; None where the run is asked to stop meanwhile: the checkpoint of this step is
    not written yet, and whoever asks may not wait."""
    begin = time.perf_counter()
    found = trainer.knn.scores(trainer, lambda: stop.number is not None)
    meter.leave_out(time.perf_counter() - begin)
    return found


def _try_step(trainer: Trainer, meter: Meter, batches: _Counted, log: RunLog) -> StepResult:
    """A step; where it cannot be made, a UserError that says what is kept and what to do."""
    try:
        return trainer.step(trainer.done, meter)
    except UserError as error:  # of the loader: the pictures are gone
        begun = batches.count % trainer.recipe.train.accumulate
        alone = trainer.world.size == 1  # the others may be well, and save for themselves
        if alone and not begun and trainer.done > trainer.saved:  # the state is whole, not saved
            if trainer.done > log.last:
                log.write(trainer._row(meter))
            trainer.save()
        raise UserError(f"{error}. {kept(trainer.run)}") from error
    except (RuntimeError, MemoryError) as error:
        if not memory.out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Out of the except block, so that the tensors of the failed step are free.
    where = f"out of memory in step {trainer.done + 1} ({reason})"
    raise UserError(f"{where}. {kept(trainer.run)} {memory.advice(trainer)}")


def _save_anew(trainer: Trainer) -> NoReturn:
    """The folder is gone or another one: the state goes to a new folder, and the run ends."""
    trainer.world.decide(trainer.lock.renew)  # refuses the folder of another run
    path = trainer.save()
    raise UserError(
        f"run folder {trainer.run} was removed or renamed while it was trained in. {path} was "
        "written to a new folder of that name, and the same command goes on from it; metrics and "
        "older checkpoints are where the folder went"
    )


class _Counted:
    """An iterator that knows how many it gave."""

    def __init__(self, batches: Iterator[Views]) -> None:
        self._batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Views]:
        return self

    def __next__(self) -> Views:
        views = next(self._batches)
        self.count += 1
        return views
