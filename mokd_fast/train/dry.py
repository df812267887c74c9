"""What a run will take, from a few of its steps: nothing is kept."""

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from .distributed import World
from .graph import WARMUP
from .loop import Trainer
from .malloc import freed_memory_kept, huge_pages
from .meter import Meter
from .recipe import Recipe
from .state import capture

_STEPS = 3  # are timed, after the first one, which allocates and compiles


def dry_run(recipe: Recipe, console: Console) -> dict[str, float]:
    """Trains a few steps in a folder that goes away, and says what the whole run needs.

    Returns seconds a step, `hours` of the run's steps at that pace, `peak_bytes` (of the process
    on the CPU, of tensors on a GPU), `checkpoint_bytes`, and `data_wait`, the share of a step that
    waits for pictures. Of several processes, which have to be started alike, each returns its own
    and the first one's console speaks. The check of all pictures is left out. Raises UserError as
    `Trainer`.
    """
    unchecked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"check": False})})
    world = World(recipe.train.device)
    if not world.first:
        console = Console(quiet=True)
    try:
        with TemporaryDirectory(prefix="mokd-fast-") as folder:
            trainer = Trainer(unchecked, Path(folder) / "run", console, world=world)
            try:
                with freed_memory_kept():
                    found = _measure(trainer)
            finally:
                trainer.lock.release()
    finally:
        world.leave()
    more = "; evaluate.every comes on top" if recipe.evaluate.every else ""
    where = "GPU memory" if trainer.device.type == "cuda" else "memory"
    trainer.say(
        f"{trainer.total} steps of {found['seconds']:.3g} s take {found['hours']:.3g} hours, "
        f"{found['data_wait']:.0%} of them waiting for pictures; {where} "
        f"{found['peak_bytes'] / 2**30:.2f} GiB, a checkpoint "
        f"{found['checkpoint_bytes'] / 2**30:.2f} GiB{more}"
    )
    return found


def _measure(trainer: Trainer) -> dict[str, float]:
    cuda = trainer.device.type == "cuda"
    untimed = 1 if trainer.graph is None else WARMUP + 1  # the last of these records it
    steps = min(untimed + _STEPS, trainer.total)
    batches = trainer.loader.batches(0, steps * trainer.recipe.train.accumulate)
    meter = Meter(batches)
    trainer.mokd.train()
    begin = time.perf_counter()
    for k in range(steps):
        if k == untimed:
            if not cuda:
                huge_pages()
            begin = _now(cuda)
            meter = Meter(batches)
        meter.add(k + 1, trainer.step(k, meter))
        trainer.done = k + 1
    seconds = (_now(cuda) - begin) / (steps - untimed if steps > untimed else steps)
    peak = torch.cuda.max_memory_allocated(trainer.device) if cuda else _resident()
    tensors = [t for t in torch.utils._pytree.tree_leaves(capture(trainer)) if torch.is_tensor(t)]
    return {
        "seconds": seconds,
        "hours": seconds * trainer.total / 3600,
        "peak_bytes": peak,
        "checkpoint_bytes": sum(t.nbytes for t in tensors),
        "data_wait": meter.read(trainer.recipe.train.max_skipped)["data_wait"],
    }


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
