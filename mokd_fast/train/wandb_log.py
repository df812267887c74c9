"""Weights & Biases beside TensorBoard: the same scalars, of the first process alone."""

from __future__ import annotations

import uuid
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .distributed import World
from .folder import write_whole

if TYPE_CHECKING:
    from .loop import Trainer

ID = "wandb_id.txt"  # in the run folder: a run that goes on is the same run there
_PATIENCE = 300.0  # seconds for the last uploads; W&B's own is without end
_WAY_OUT = (
    "WANDB_MODE=offline keeps everything in the run folder for `wandb sync`, train.wandb= trains "
    "without"
)


class WandB:
    """A run of the project `train.wandb`; without one nothing is imported and `add` does nothing.

    Raises UserError where the package is not installed, and from `begin` where a new run cannot be
    started. Whatever fails later is said once, and switches this off: the training goes on.
    """

    def __init__(self, project: str | None, world: World) -> None:
        self._project = project
        self._package: Any = None
        self._run: Any = None
        if project:
            world.decide(self._import)

    def _import(self) -> None:
        try:
            self._package = import_module("wandb")
            if not hasattr(self._package, "init"):  # a folder of that name is a package to Python
                raise ImportError("only a folder of that name is there")
        except ImportError as error:
            raise UserError(
                f"train.wandb={self._project} needs the package wandb ({error}): "
                "pip install 'mokd_fast[wandb]', or train.wandb= to train without"
            ) from error

    def begin(self, trainer: Trainer) -> None:
        """Starts the run, or goes on with that of the run folder."""
        self._say = trainer.say
        if self._project:
            trainer.world.decide(lambda: self._begin(trainer))

    def _begin(self, trainer: Trainer) -> None:
        settings = {"console": "off"}  # the bar and the lines are the console's
        if "finish_timeout" in getattr(self._package.Settings, "model_fields", ()):
            settings["finish_timeout"] = _PATIENCE  # type: ignore[assignment]
        try:
            self._run = self._package.init(
                project=self._project,
                id=_id(trainer.run),
                name=trainer.run.resolve().name,
                resume="allow",
                dir=str(trainer.run),
                config=trainer.recipe.model_dump(mode="json"),
                settings=self._package.Settings(**settings),
            )
            self._next = self._run.step  # what a killed run logged beyond its checkpoint is there
        except Exception as error:
            if not trainer.done:
                raise UserError(
                    f"train.wandb={self._project}: W&B does not start ({_reason(error)}). Log in "
                    f"with `wandb login`, or: {_WAY_OUT}"
                ) from error
            self._off(error)

    def add(self, row: dict[str, Any]) -> None:
        """A row of metrics, at its step; one that an earlier process logged is left out."""
        if self._run is None or row["step"] < self._next:
            return
        try:
            values = {key: value for key, value in row.items() if key != "step"}
            self._run.log(values, step=row["step"])
        except Exception as error:
            self._off(error)

    def finish(self, failed: bool) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._off(error)
        self._run = None

    def _off(self, error: Exception) -> None:
        self._run = None
        self._say(f"W&B failed and is switched off, the training goes on ({_reason(error)})")


def _id(run: Path) -> str:
    path = run / ID
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:8] + "\n")  # of the system's generator
    return path.read_text().strip()


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
