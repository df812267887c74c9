"""Out of memory: which size would have fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..data.loader import Views
from ..nn import Temperatures

if TYPE_CHECKING:
    from .loop import Trainer

_CPU = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says with this error that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU)


def advice(trainer: Trainer) -> str:
    """What to set so that the step fits. Tried, not estimated: the networks are spoilt after it.

    The pictures of an optimizer step stay the same, so the learning rates do too.
    """
    train = trainer.recipe.train
    for parts in range(train.accumulate + 1, train.batch + 1):
        if train.batch % parts == 0 and _fits(trainer, train.batch // parts):
            return (
                f"Micro-batches of {train.batch // parts} fit, as just tried here: set "
                f"train.accumulate={parts}, which leaves train.batch={train.batch} as it is. That "
                "is another recipe: give a new run folder with --run, and --warm-start "
                f"{trainer.run} to keep what was learned"
            )
    return "Not even one picture at a time fits: choose smaller models, crops or prototypes"


def _fits(trainer: Trainer, images: int) -> bool:
    """Whether forward and backward of that many pictures go through."""
    augment, channels = trainer.recipe.augment, trainer.recipe.data.channels
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.recipe.train.precision)
    taus = [Temperatures(0.1, 0.1, 0.1)] * len(trainer.recipe.models)
    try:
        small = torch.zeros(augment.locals, images, *augment.local_hw, channels, dtype=torch.uint8)
        large = torch.zeros(2, images, *augment.global_hw, channels, dtype=torch.uint8)
        views = Views(large, small if augment.locals else None, torch.zeros(images), [])
        with torch.autocast(trainer.device.type, precision, enabled=precision is not None):
            out = trainer.mokd(*trainer.to_device(views), taus)
        torch.stack(out.totals).sum().backward()
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return False
        raise
    except ValueError:  # BatchNorm of a single row
        return False
    return True
