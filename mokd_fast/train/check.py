"""The pictures are checked before a run trains: too many bad ones stop it, the others are skipped.

Which pictures are skipped unread is decided once, at the start of a run, and kept in its
checkpoints. A run that goes on takes that set, and not what a new check finds, so it makes the
batches of a run in one piece. A picture that turned bad since is met, named and replaced by the
loader, as it would be in one piece; one that was mended stays out until the next run.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import takes_output
from ..data import index
from ..data.files import shown
from ..data.sources import Source
from ..errors import UserError
from .folder import write_whole
from .recipe import DataConfig

NAME = "bad_files.txt"
_WORTH_A_LINE = 1000  # pictures checked; fewer take some seconds
_SHOWN = 5  # names in a message; all of them are in bad_files.txt


def check_pictures(
    data: DataConfig, source: Source, run: Path, console: Console, state: dict[str, Any] | None
) -> tuple[frozenset[int], dict[str, str]]:
    """(positions to skip unread, reasons by name) of a run that starts; (positions, {}) of one that
    goes on from `state`, which knows the rest.

    Writes RUN/bad_files.txt, a line `name<TAB>reason` for each unreadable picture, or removes it.
    Raises UserError with names when their share is above data.max_bad, or all are bad.
    """
    kept = frozenset() if state is None else frozenset(state.get("known_bad", ()))
    if not data.check:
        return kept, {}
    workers = min(data.workers, os.cpu_count() or 1)
    with _shown(console) as progress:
        found = index.check(
            source, str(data.root), channels=data.channels, workers=workers, progress=progress
        )
    reasons = {source.name(i): reason for i, reason in sorted(found.bad.items())}
    path = run / NAME
    _write(path, reasons)
    bad, count = len(found.bad), len(source)
    if bad > data.max_bad * count or bad == count:
        names = "".join(f"\n  {name}: {reason}" for name, reason in [*reasons.items()][:_SHOWN])
        raise UserError(
            f"{bad} of {count} pictures cannot be read, and data.max_bad={data.max_bad:g} allows "
            f"{int(data.max_bad * count)}. All are in {path}; the first:{names}\n"
            "Mend or remove them, or set a larger data.max_bad to train without them"
        )
    if bad:
        what = f"{bad} of {count} pictures cannot be read and are skipped"
        _say(console, f"{what}, listed in {path}: {shown([*reasons])}")
    if mended := len(kept - found.bad.keys()):
        _say(console, f"{mended} pictures that could not be read at first stay out of this run")
    return (frozenset(found.bad), reasons) if state is None else (kept, {})


def _say(console: Console, text: str) -> None:
    if takes_output(console):  # a full pipe would hold the run up
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write(path: Path, reasons: dict[str, str]) -> None:
    try:
        if reasons:
            lines = (f"{name}\t{reason}".replace("\n", " ") for name, reason in reasons.items())
            text = "\n".join(lines) + "\n"
            write_whole(path, text.encode("utf-8", "backslashreplace").decode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Make room, or give another run folder "
            "with --run"
        ) from error


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[index.Progress]:
    """A bar on a terminal, elsewhere a line at the end; nothing where little is to be checked."""
    bar = Progress(
        TextColumn("checking pictures"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with contextlib.ExitStack() as stack:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.update(task, completed=done, total=total)
            if done == total >= _WORTH_A_LINE:
                _say(console, f"checked {total} pictures")

        yield show
