"""What a new run starts from where a recipe names files: models.N.weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UserError
from ..nn.weights import check_file, load_backbone
from .recipe import Recipe

if TYPE_CHECKING:
    from .loop import Trainer


def weight_files(recipe: Recipe) -> dict[int, Path]:
    """The files by the number of their model, from 0. UserError for one that is not there."""
    files = {
        i: Path(model.weights).expanduser()
        for i, model in enumerate(recipe.models)
        if model.weights
    }
    for i, path in files.items():
        try:
            check_file(path)
        except UserError as error:
            raise UserError(f"models.{i}.weights: {error}") from error
    return files


def load_files(trainer: Trainer, files: dict[int, Path]) -> None:
    """The files' weights into student and teacher backbones.

    The first process reads them, so no other machine needs them, and sends what it read.
    """
    for i, path in files.items():
        student, teacher = trainer.mokd.students[i].backbone, trainer.mokd.teachers[i].backbone

        def read(i: int = i, path: Path = path, student: object = student) -> dict[str, Tensor]:
            model, channels = trainer.recipe.models[i], trainer.recipe.data.channels
            try:
                said = load_backbone(student, model.name, path, channels)  # type: ignore[arg-type]
            except UserError as error:
                raise UserError(f"models.{i}.weights: {error}") from error
            trainer.say(f"models.{i}.weights: {said}; optimizers and schedules begin anew")
            state: dict[str, Tensor] = student.state_dict()  # type: ignore[attr-defined]
            return {key: value.cpu() for key, value in state.items()}  # to no GPU of the first one

        state = trainer.world.decide(read)
        if not trainer.world.first:
            student.load_state_dict(state)  # type: ignore[union-attr]
        teacher.load_state_dict(state)  # type: ignore[union-attr]
