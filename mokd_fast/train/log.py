"""What a run says of itself: progress bar, metrics.jsonl, TensorBoard."""

import json
import time
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
from torch.utils.tensorboard import SummaryWriter

LINE_EVERY = 10.0  # seconds between two lines where the output is not a terminal


def _step(row: str) -> float:
    """The step of a row of metrics.jsonl; infinite when it is not whole."""
    try:
        return json.loads(row)["step"] if row.endswith("\n") else float("inf")
    except ValueError:
        return float("inf")


class RunLog:
    """Writes every logged step to the run folder and shows the progress.

    Args:
        run: the run folder. metrics.jsonl and alarms.jsonl there lose the rows after step `start`,
            which a resumed run writes again, and a row that a crash cut in two.
        start, total: first step of this process and steps of the whole run.
    """

    def __init__(self, run: Path, start: int, total: int, console: Console) -> None:
        self.console = console
        for path in (run / "alarms.jsonl", run / "metrics.jsonl"):
            if path.exists():
                rows = path.read_text().splitlines(keepends=True)
                path.write_text("".join(row for row in rows if _step(row) <= start))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        # TensorBoard purges from this step on, and the row of `start` itself stays.
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
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
        self._file.close()
        self._board.close()

    def advance(self) -> None:
        self._bar.advance(self._task)

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics: `step` optimizer steps are done."""
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])
        losses = " ".join(f"{k} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
        note = f"{losses}  {row['images_per_s']:.0f} images/s  data wait {row['data_wait']:.0%}"
        self._bar.update(self._task, note=note)
        self._line(row["step"], note)

    def _line(self, step: int, note: str) -> None:
        """Where there is no terminal: a line now and then instead of a bar."""
        now = time.monotonic()
        if self.console.is_terminal or (now - self._last_line < LINE_EVERY and step < self._total):
            return
        self._last_line = now
        left = (now - self._begin) / max(step - self._start, 1) * (self._total - step)
        self.console.print(
            f"step {step}/{self._total}  {note}  eta {left:.0f} s", highlight=False, soft_wrap=True
        )
