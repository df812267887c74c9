"""The run folder: one process at a time, and files in it that are whole or not there."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from ..errors import UserError

_held: set[IO[str]] = set()


def _forget() -> None:
    """A forked loader worker would hold the lock on after the death of the run."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_forget)


class RunLock:
    """The claim of this process on a run folder, which is made if it is not there.

    An flock on RUN/.lock: the kernel drops it with the process, so the file of a dead one is no
    obstacle. Raises UserError for a folder that cannot be written or that another run is using.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file = self._take()

    def _take(self) -> IO[str]:
        try:
            checkpoints = self.run / "checkpoints"
            checkpoints.mkdir(parents=True, exist_ok=True)
            file = open(self.run / ".lock", "a+")  # noqa: SIM115 (closed in release)
            _held.add(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip()
                raise UserError(
                    f"run folder {self.run} is in use by {holder or 'another process'}: wait for "
                    "it, stop it, or give another folder with --run"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for part in checkpoints.glob("*.tmp"):  # of a save that was cut off
                part.unlink()
            probe = checkpoints / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run folder {self.run} cannot be written ({error.strerror}): give another one "
                "with --run"
            ) from error
        return file

    def lost(self) -> bool:
        """Whether the folder was removed or renamed, so that the path leads elsewhere now."""
        try:
            there = os.stat(self.run / ".lock")
        except OSError:
            return True
        return not os.path.samestat(there, os.fstat(self._file.fileno()))

    def renew(self) -> None:
        """Claims the folder at the path again; UserError if another run has it."""
        self.release()
        self._file = self._take()

    def release(self) -> None:
        _held.discard(self._file)
        self._file.close()


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file; whoever reads it, or a crash, sees the old or the new one.

    Raises OSError, with the old file as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
