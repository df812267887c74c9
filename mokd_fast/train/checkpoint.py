"""Checkpoints that are whole or not there: temporary file, checksum, fsync, rename.

A file is what torch.save writes and behind it a line with the SHA-256 of that: torch.load takes it
as it is, and a bit that flipped anywhere is found before anything is loaded.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import UserError
from .memory import out_of_memory

_MAGIC = b"\nmokd-fast sha256 "
_TRAILER = len(_MAGIC) + 64  # bytes
_log = logging.getLogger(__name__)


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written."""


class _Hashed:
    """A file for torch.save that hashes what passes and keeps the reason of a failure."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch makes a RuntimeError of it that does not say why
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes folder/00000123.pt and then removes all but the newest `keep`.

    A reader or a crash sees the old file or the new one, never a part. Raises UserError when the
    disk is full or the folder cannot be written; the checkpoints already there are untouched.
    """
    path = folder / f"{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    hashed = None
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)  # type: ignore[arg-type]
            file.write(_MAGIC + hashed.sha.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself
        finally:
            os.close(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):  # there is no such folder
            temporary.unlink(missing_ok=True)
        cause = (hashed and hashed.error) or error
        if not isinstance(error, OSError | RuntimeError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"checkpoint {path} cannot be written: {reason}") from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in RUN/checkpoints, oldest first."""
    return sorted(folder.glob("[0-9]*.pt"))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a checkpoint, loaded with weights_only=True: no code in it can run.

    Raises Damaged for wrong bytes, UserError for a file that cannot be read or is another thing.
    """
    try:
        checked = _checksum_is_right(path)
    except OSError as error:
        kind = Damaged if error.errno == errno.EIO else UserError  # EIO: the disk
        raise kind(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text tells to load it with weights_only=False
        reason = "it is damaged, or holds Python objects, which are never loaded"
        raise Damaged(f"{path} is not a readable checkpoint: {reason}") from error
    except Exception as error:  # a damaged zip raises half a dozen types
        if checked or out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise Damaged(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(state, dict) or "step" not in state or "recipe" not in state:
        raise UserError(f"{path} is not a checkpoint of mokd-fast: it has no step and no recipe")
    if not checked:
        if "versions" in state:  # as old as the checksum
            raise Damaged(f"{path} is not a readable checkpoint: its checksum is missing")
        _log.warning("%s has no checksum: an older mokd_fast wrote it", path)
    return state


def _checksum_is_right(path: Path) -> bool:
    """False where there is none; raises Damaged where it is wrong."""
    with open(path, "rb") as file:
        left = max(file.seek(0, os.SEEK_END) - _TRAILER, 0)
        file.seek(left)
        trailer = file.read()
        if not trailer.startswith(_MAGIC):
            return False
        file.seek(0)
        sha = hashlib.sha256()
        while left and (chunk := file.read(min(left, 1 << 20))):
            sha.update(chunk)
            left -= len(chunk)
    if trailer[len(_MAGIC) :] != sha.hexdigest().encode():
        raise Damaged(f"{path} is not a readable checkpoint: its checksum is wrong")
    return True


def find_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The newest good checkpoint of a run folder, or the one of a file, with its state."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    if not path.is_dir():
        return path, load_checkpoint(path)
    found = newest(path)
    if found is None:
        raise UserError(f"{path} holds no checkpoint: expected {path}/checkpoints/*.pt")
    return found


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint of a run folder and its state; None where there is none.

    Damaged ones that are newer are set aside as *.damaged, with a warning. Where all are damaged
    they stay as they are, and a UserError names them: a run must not begin again unasked.
    """
    damaged: list[tuple[Path, Damaged]] = []
    for path in reversed(checkpoints(run / "checkpoints")):
        try:
            state = load_checkpoint(path)
        except Damaged as error:
            damaged.append((path, error))
            continue
        for broken, fault in damaged:
            with contextlib.suppress(OSError):  # in a folder that is only read
                os.replace(broken, f"{broken}.damaged")
            _log.warning("%s; set aside as *.damaged. %s is used instead", fault, path.name)
        return path, state
    if damaged:
        rows = "".join(f"\n  {fault}" for _, fault in damaged)
        raise UserError(
            f"no checkpoint of {run} can be used:{rows}\nPut back a good copy of one to go on, or "
            "remove them (or give another --run) to begin again"
        )
    return None


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder by its name, or None."""
    found = checkpoints(run / "checkpoints")
    return found[-1] if found else None


def kept(run: Path, then: str = "; the same command goes on from it.") -> str:
    """What is there to go on from, as a sentence."""
    last = last_checkpoint(run)
    return f"The last good checkpoint is {last}{then}" if last else "No checkpoint was written yet."


def way_out(run: Path) -> str:
    """What to say when a run has diverged."""
    return (
        f"{kept(run, '.')} Try a lower learning rate, a longer warm-up or train.precision=fp32, "
        "in a new run folder"
    )
