"""SIGTERM and Ctrl-C: a run that is asked to stop finishes its step and writes a checkpoint."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

_TEXT = b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.\n"


class StopSignals:
    """Inside `with`, SIGTERM and Ctrl-C are a wish in `number`; a second Ctrl-C interrupts.

    Only the main thread can have handlers; in another one nothing is changed. Signals that are
    ignored already stay so.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._pid = os.getpid()
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)  # type: ignore
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader worker that has just been forked
        if self.number is None:
            self.number = number
            with contextlib.suppress(OSError):
                os.write(2, _TEXT)  # print is not allowed here: it may have been interrupted
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def leave(self) -> NoReturn:
        """Ends as the signal would have: KeyboardInterrupt, or exit code 143 for SIGTERM."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
