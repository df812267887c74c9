"""Where messages go: standard output, which never stops a run."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console


class _Output:
    """sys.stdout, except that what cannot be written is dropped and the run goes on: the reader
    of a pipe may end (`| head -1`), and the disk of a log file may be full."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        with self._dropped():
            return sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped():
            sys.stdout.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Python itself flushes what is left at its end, so the descriptor must take it.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


class RunConsole(Console):
    """The console of a run: standard output, which never stops it."""

    def __init__(self) -> None:
        super().__init__(file=_Output())  # type: ignore[arg-type]


def takes_output(console: Console) -> bool:
    """Whether a line can be printed at once: a pipe whose reader stands still is full."""
    try:
        return bool(select.select([], [console.file.fileno()], [], 0)[1])
    except (OSError, ValueError, AttributeError):  # it has no descriptor
        return True
