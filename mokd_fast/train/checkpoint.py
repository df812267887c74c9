"""Checkpoints that are whole or not there: temporary file, fsync, rename."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

# What may differ between a checkpoint and the recipe that resumes it: nothing of the result.
# (Of the data the list of pictures counts, not the path; it has a fingerprint of its own.)
FREE_KEYS = (
    *("data.root", "data.workers", "evaluate."),
    *("train.device", "train.log_every", "train.checkpoint_every"),
)
KEEP = 2  # the newest ones; the older one is there in case the newest is damaged
_REMOVE = "Remove this file to go on from the checkpoint before it."


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes folder/00000123.pt and then removes all but the newest KEEP.

    A reader or a crash sees the old file or the new one, never a part. Raises UserError when the
    disk is full or the folder cannot be written; the checkpoints already there are untouched.
    """
    path = folder / f"{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        with contextlib.suppress(OSError):  # there is no such folder
            temporary.unlink(missing_ok=True)
        raise UserError(f"checkpoint {path} cannot be written: {error}") from error
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("[0-9]*.pt"))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a checkpoint, loaded with weights_only=True: no code in it can run."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # torch's text tells to load it with weights_only=False
        raise UserError(
            f"{path} is not a readable checkpoint: it is damaged, or holds Python objects, which "
            f"are never loaded. {_REMOVE}"
        ) from error
    except Exception as error:  # a damaged zip raises half a dozen types
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = reason.rstrip(".")
        raise UserError(f"{path} is not a readable checkpoint: {reason}. {_REMOVE}") from error
    if not isinstance(state, dict) or "step" not in state or "recipe" not in state:
        raise UserError(f"{path} is not a checkpoint of mokd-fast: it has no step and no recipe")
    return state


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    found = checkpoints(run / "checkpoints")
    return found[-1] if found else None


def resumable(run: Path, recipe: dict[str, Any], data: str) -> dict[str, Any] | None:
    """The newest state in a run folder if this recipe and data may go on from it; None without.

    Raises UserError naming the keys that differ, or when the list of pictures is another one.
    """
    path = last_checkpoint(run)
    if path is None:
        return None
    state = load_checkpoint(path)
    mine, theirs = _flat(recipe), _flat(state["recipe"])
    keys = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    keys = [key for key in keys if not key.startswith(FREE_KEYS)]
    remedy = "Give another run folder (--run), or the same recipe to go on."
    if keys:
        rows = "".join(f"\n  {k}: {theirs.get(k)} there, {mine.get(k)} now" for k in keys)
        raise UserError(f"{path} is of another recipe, these keys differ:{rows}\n{remedy}")
    if state["data"] != data:
        raise UserError(f"{path} was trained on another list of pictures. {remedy}")
    return state


def way_out(run: Path) -> str:
    """What to say when a run has diverged."""
    last = last_checkpoint(run)
    kept = f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."
    return f"{kept} Try a lower learning rate, a longer warm-up or train.precision=fp32."


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'train.batch': 64, 'models.0.name': ...} of a nested recipe."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, dict | list):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
