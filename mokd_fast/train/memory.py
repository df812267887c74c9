"""Out of memory: which size would have fitted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..data.batches import Views
from ..nn import checkpoint_activations

if TYPE_CHECKING:
    from .loop import Trainer
    from .recipe import Recipe

_CPU = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says with this error that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU)


def advice(trainer: Trainer) -> str:
    """What to set so that a step fits. Tried, not estimated: the trainer is spoilt after it.

    The pictures of an optimizer step stay the same, so the learning rates do too. Several processes
    try nothing: a step averages over all of them, and the others train on until they miss this one.
    """
    # Every step a logged one: its diagnostics need memory too.
    train = trainer.recipe.train.model_copy(update={"log_every": 1})
    # Which exclude each other.
    again = not (train.checkpoint_activations or train.pack_crops is True)
    if trainer.world.size > 1:
        free = ["train.checkpoint_activations=true"] * again
        free += ["loss.prototypes=fused-linear"] * (trainer.way != "fused-linear")
        goes_on = f"Set {' or '.join(free)} and the run goes on; or start" if free else "Start"
        return f"{goes_on} a new run (--run) with a larger train.accumulate or more processes"
    recipe = trainer.recipe = trainer.recipe.model_copy(update={"train": train})
    recorded = trainer.graph is not None
    if recorded:
        trainer.graph = None
        if _fits(trainer):
            return (
                "It fits without the graph, which keeps memory of its own, as just tried here: set "
                f"{_unrecorded(trainer)} and the run goes on"
            )

    def also() -> str:
        return f"{_unrecorded(trainer)} and " if recorded else ""

    if trainer.way != "fused-linear":
        trainer.mokd.prototype_loss = "fused-linear"
        if _fits(trainer):
            return (
                f"It fits without stored logits, as just tried here: set {also()}"
                "loss.prototypes=fused-linear and the run goes on"
            )
        trainer.mokd.prototype_loss = trainer.way
    if again:
        packed = [student.packed for student in trainer.mokd.students]
        for student in trainer.mokd.students:
            checkpoint_activations(student)  # type: ignore[arg-type]
            student.packed = False  # type: ignore[assignment]
        if _fits(trainer):
            return (
                f"It fits where backward makes activations again, as just tried here: set {also()}"
                "train.checkpoint_activations=true and the run goes on"
            )
        for student, before in zip(trainer.mokd.students, packed, strict=True):
            checkpoint_activations(student, False)  # type: ignore[arg-type]
            student.packed = before
    for parts in range(train.accumulate + 1, train.batch + 1):
        if train.batch % parts:
            continue
        divided = train.model_copy(update={"accumulate": parts})
        trainer.recipe = recipe.model_copy(update={"train": divided})
        if _fits(trainer):
            return (
                f"Micro-batches of {train.batch // parts} fit, as just tried here: set {also()}"
                f"train.accumulate={parts}, which leaves train.batch={train.batch} as it is. That "
                "is another recipe: give a new run folder with --run, and --warm-start "
                f"{trainer.run} to keep what was learned"
            )
    return "Not even one picture at a time fits: choose smaller models, crops or prototypes"


def _unrecorded(trainer: Trainer) -> str:
    """What makes the step that is tried here of a recorded one: `auto` follows the recording."""
    keys = ["train.cuda_graph=false"]
    if trainer.recipe.train.compile == "auto":
        keys.append("train.compile=true")
    packed = any(student.packed for student in trainer.mokd.students)
    if packed and trainer.recipe.train.pack_crops == "auto":
        keys.append("train.pack_crops=true")
    return " ".join(keys)


def _fits(trainer: Trainer) -> bool:
    """Whether steps of the trainer's recipe go through: the first makes the optimizer's state."""
    trainer.mokd.zero_grad(set_to_none=True)
    # Those of a step that broke off between unscale_ and update refuse the next one.
    trainer.scalers = [torch.amp.GradScaler(trainer.device.type) for _ in trainer.scalers]
    try:
        for _ in range(2):
            trainer.step(trainer.done, _black(trainer.recipe))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return False
        raise
    except ValueError:  # BatchNorm of a single row
        return False
    return True


def _black(recipe: Recipe) -> Iterator[Views]:
    """Micro-batches of black pictures, a tenth more of them: memory is in pieces by and by."""
    augment, C = recipe.augment, recipe.data.channels
    B = math.ceil(1.1 * recipe.train.batch / recipe.train.accumulate)
    while True:
        large = torch.zeros(2, B, *augment.global_hw, C, dtype=torch.uint8)
        small = torch.zeros(augment.locals, B, *augment.local_hw, C, dtype=torch.uint8)
        yield Views(large, small if augment.locals else None, torch.zeros(B), [])
