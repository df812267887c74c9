"""The device of a run, and whether the backend that somebody forces can run there."""

import torch

from ..errors import UserError
from ..ops import Target, cross_view_pairs
from ..ops.dispatch import pick
from .recipe import Recipe


def choose_device(name: str) -> torch.device:
    """The one of train.device; UserError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda but this torch sees no CUDA device; set cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # By its number: DDP and DALI take another process's GPU for one without.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def check_backend(recipe: Recipe, device: torch.device) -> None:
    """Finds out before the first step that a forced backend does not exist or cannot run."""
    logits = torch.empty(2, 1, recipe.prototypes, device=device)
    target = Target(cross_view_pairs(2, 2), logits)
    try:
        pick("distill_cross_entropy", logits, [target], recipe.loss.student_temperature)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{error}. Unset MOKD_FAST_BACKEND or choose another") from error
