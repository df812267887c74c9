"""What happened between two log rows; of the steps it is kept on the device until it is read."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import Views
from .distributed import World


class StepResult(NamedTuple):
    """One optimizer step, all on the device."""

    losses: dict[str, Tensor]  # every term and the totals, means over the micro-batches
    skipped: Tensor  # 0-d bool: a loss or a gradient was not finite, nothing was moved
    diagnostics: dict[str, Tensor]  # `diagnose`, on a step that is logged; else empty


class Meter:
    """An iterator over batches that times the wait for them, and sums of the losses.

    The host reads the sums once an interval (`read`), never in between. `skipped` is for
    the meter of a run that goes on: the steps skipped in a row up to the last read, and `_first`.
    """

    def __init__(self, batches: Iterator[Views], skipped: Sequence[float] = ()) -> None:
        self._batches, self.skipped = batches, list(skipped)
        # Of each loss and last of the gradient: the first non-finite step of those skipped in a
        # row up to now, or -1.
        self._first: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None  # of the steps that were not skipped
        self._steps, self._wait, self._begin = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Views]:
        return self

    def __next__(self) -> Views:
        begin = time.perf_counter()
        views = next(self._batches)
        self._wait += time.perf_counter() - begin
        return views

    def leave_out(self, seconds: float) -> None:
        """Time in which nothing was trained: no part of images/s or of the wait."""
        self._begin += seconds

    def add(self, step: int, result: StepResult) -> None:
        """The result of optimizer step number `step`, counted from 1."""
        values = torch.stack(list(result.losses.values()))
        skipped = result.skipped
        bad = torch.cat([~values.isfinite(), skipped[None]])
        if self._first is None:
            start = torch.tensor(self.skipped or [0.0, *[-1.0] * len(bad)], dtype=torch.float64)
            self._in_a_row, self._first = start.to(bad.device).split([1, len(bad)])
            self._in_a_row = self._in_a_row[0]
        if self._sums is None:
            self._sums = torch.zeros_like(values)
            self._skipped = torch.zeros_like(self._first[0])
        first = self._first.masked_fill((self._first < 0) & bad, step)
        self._first = first.masked_fill(~skipped, -1)
        self._in_a_row = (self._in_a_row + 1).masked_fill(~skipped, 0)
        self._skipped = self._skipped + skipped
        self._sums = self._sums + values.masked_fill(skipped, 0)
        self._steps += 1
        self._last = result

    def read(self, max_skipped: int) -> dict[str, float]:
        """A row of metrics: means of the losses over the steps that were not skipped, their number
        `skipped`, the last step's diagnostics, `steps_per_s` and the share `data_wait`.

        Starts a new interval. Losses are missing when every step was skipped, diagnostics when
        the last one was. Raises FloatingPointError when the last `max_skipped` steps or more were
        skipped; it names the first non-finite loss and its step.
        """
        assert self._sums is not None and self._first is not None, "no step was added"
        names, more = list(self._last.losses), self._last.diagnostics
        counts = torch.stack([self._skipped, self._in_a_row, self._last.skipped.double()])
        parts = [counts, self._first, self._sums, *(value[None] for value in more.values())]
        numbers = iter(torch.cat([part.double() for part in parts]).tolist())  # the one host read
        skipped, in_a_row, last = (next(numbers) for _ in range(3))
        first = [next(numbers) for _ in [*names, "gradient"]]
        self.skipped = [in_a_row, *first]
        if in_a_row >= max_skipped:
            raise FloatingPointError(_what_failed(names, first, int(in_a_row)))
        row: dict[str, float] = {"skipped": int(skipped)}
        sums = dict(zip(names, numbers, strict=False))
        if good := self._steps - skipped:
            row |= {name: value / good for name, value in sums.items()}
        if not last:
            row |= dict(zip(more, numbers, strict=True))
        seconds = time.perf_counter() - self._begin
        row |= {"steps_per_s": self._steps / seconds, "data_wait": self._wait / seconds}
        self._reset()
        return row


class BadFiles:
    """The unreadable pictures (name -> reason) that a process has met: in the first process those
    of all of them, each once, as they share the pictures of every epoch anew."""

    def __init__(self, met: dict[str, str], world: World) -> None:
        self._met, self._world, self._told = met, world, len(met)

    def count(self) -> int:
        """Their number. Asks the other processes, over the hosts alone; all must call it."""
        new = dict(itertools.islice(self._met.items(), self._told, None))
        for theirs in self._world.gather(new):
            for name, reason in theirs.items():
                self._met.setdefault(name, reason)
        self._told = len(self._met)
        return self._told


def _what_failed(names: list[str], first: list[float], in_a_row: int) -> str:
    step = first[-1]  # a step with a non-finite loss is skipped too
    losses = [n for n, at in zip(names, first, strict=False) if at == step]
    what = (
        f"loss at step {step:.0f}: {', '.join(losses)}"
        if losses
        else f"gradient at step {step:.0f}"
    )
    return f"{in_a_row} steps in a row were skipped, first for a non-finite {what}"


def accumulate(into: dict[str, Tensor], values: dict[str, Tensor], parts: int = 1) -> None:
    """into[name] += value / parts, for every name."""
    for name, value in values.items():
        value = value / parts if parts > 1 else value
        into[name] = into[name] + value if name in into else value
