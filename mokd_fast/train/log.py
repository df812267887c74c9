"""What a run says of itself: progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ..console import takes_output
from ..errors import UserError
from . import alarms
from .checkpoint import kept
from .folder import write_whole
from .wandb_log import WandB

LINE_EVERY = 10.0  # seconds between two lines where the output is not a terminal


def _step(row: str) -> float:
    """The step of a row of metrics.jsonl; infinite when it is not whole."""
    try:
        return json.loads(row)["step"] if row.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):  # cut, or damaged
        return float("inf")


class _Board:
    """TensorBoard's events, one a row.

    Written here and now: the thread of torch's SummaryWriter prints its own traceback when a disk
    is full. TensorBoard reads the files in the order of the seconds in their names, so a clock
    that went back must not put this one before those that are there.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        folder.mkdir(exist_ok=True)
        known = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        second = max([int(time.time()), *(int(n) + 1 for n in known if n.isdigit())])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115 (closed in close)
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # What earlier files hold from this step on is not shown.
        self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def add(self, row: dict[str, Any]) -> None:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step"]
        self._write(Event(step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()


class RunLog:
    """Writes every logged step to the run folder and shows the progress.

    Args:
        run: the run folder. metrics.jsonl and alarms.jsonl there lose the rows after step `start`,
            which a resumed run writes again, and a row that a crash cut in two.
        start, total: first step of this process and steps of the whole run.
        wandb: is told every row, and that the run ends.
    """

    def __init__(
        self, run: Path, start: int, total: int, console: Console, wandb: WandB | None = None
    ) -> None:
        self.console, self.run, self._wandb = console, run, wandb
        self.last = start  # the step of the last row
        with self._writing():
            for path in (run / "alarms.jsonl", run / "metrics.jsonl"):
                if path.exists():
                    rows = path.read_text(errors="replace").splitlines(keepends=True)
                    write_whole(path, "".join(row for row in rows if _step(row) <= start))
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
            self._board = _Board(run / "tensorboard", start + 1)  # the row of `start` stays
        self._bar = Progress(
            TextColumn("pre-training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start, note="")
        self._start, self._total = start, total
        self._begin = self._last_line = time.monotonic()

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # of a row that could not be written
                file.close()
        if self._wandb:
            self._wandb.finish(failed=error[0] is not None)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the metrics in {self.run} cannot be written: {error.strerror or error}. "
                f"{kept(self.run)} Make room there first"
            ) from error

    def sync(self) -> None:
        """Sees to it that all rows are on the disk."""
        with self._writing():
            os.fsync(self._file.fileno())

    def advance(self) -> None:
        self._bar.advance(self._task)

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics: `step` optimizer steps are done."""
        with self._writing():
            self._file.write(json.dumps(row) + "\n")
            self._board.add(row)
        if self._wandb:
            self._wandb.add(row)
        self.last = row["step"]
        if "images_per_s" not in row:  # of an evaluation alone
            return
        losses = " ".join(f"{k} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
        note = f"{losses}  {row['images_per_s']:.0f} images/s  data wait {row['data_wait']:.0%}"
        self._bar.update(self._task, note=note)
        self._line(row["step"], note)

    def alarm(self, events: Iterable[alarms.Event]) -> None:
        """Alarms that start, and those that are over: said, and rows of alarms.jsonl."""
        for event in events:
            with self._writing(), open(self.run / "alarms.jsonl", "a") as file:
                file.write(json.dumps(event._asdict()) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint after which it is not raised again
            text = f"step {event.step}: {event.text}"
            if takes_output(self.console):  # or a full pipe would hold the run up
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, step: int, note: str) -> None:
        """Where there is no terminal: a line now and then instead of a bar."""
        now = time.monotonic()
        if self.console.is_terminal or (now - self._last_line < LINE_EVERY and step < self._total):
            return
        self._last_line = now
        if not takes_output(self.console):
            return
        left = (now - self._begin) / max(step - self._start, 1) * (self._total - step)
        self.console.print(
            f"step {step}/{self._total}  {note}  eta {left:.0f} s", highlight=False, soft_wrap=True
        )
