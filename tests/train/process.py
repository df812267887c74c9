"""The command line in a fork of the tests: a process that can be killed, without torch's import."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mokd_fast import cli


class Child:
    """`mokd-fast WORDS` in a process group of its own, its output in files of `folder`.

    before: what the child does first (a limit, a patch); stdout: a descriptor for its output.
    """

    def __init__(
        self, folder: Path, *words: object, before: Callable = lambda: None, stdout: int = -1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        files = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
                 for path in (self.out, self.err)]  # fmt: skip
        self.pid = os.fork()
        if not self.pid:
            os.setpgid(0, 0)
            os.dup2(files[0] if stdout < 0 else stdout, 1)
            os.dup2(files[1], 2)
            _main([str(word) for word in words], before)
        for file in files:
            os.close(file)

    def wait(self, limit: float = 60) -> tuple[int, str, str]:
        """Exit code (or minus the signal), standard output, standard error in one line."""
        until = time.monotonic() + limit
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(self.err.read_text())
            time.sleep(0.01)
        err = " ".join(self.err.read_text().split())
        return os.waitstatus_to_exitcode(found[1]), self.out.read_text(), err

    def until(self, condition: Callable[[], object], limit: float = 60) -> None:
        """Waits until the child has come that far."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end or os.waitpid(self.pid, os.WNOHANG)[0]:
                raise TimeoutError(self.err.read_text())
            time.sleep(0.001)


def _main(words: list[str], before: Callable) -> None:
    code = 1
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = ["mokd-fast", *words]
        before()
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
