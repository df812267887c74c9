"""What happened between two log rows, kept on the device until it is read."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.loader import Views


class Meter:
    """An iterator over batches that times the wait for them, and sums of the losses.

    The host reads the sums once an interval (`read`), never in between.
    """

    def __init__(self, batches: Iterator[Views]) -> None:
        self._batches = batches
        self._bad_step: Tensor | None = None  # of each loss: its first non-finite step, or -1
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._wait, self._begin = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Views]:
        return self

    def __next__(self) -> Views:
        begin = time.perf_counter()
        views = next(self._batches)
        self._wait += time.perf_counter() - begin
        return views

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """The losses of optimizer step number `step`, counted from 1."""
        values = torch.stack(list(losses.values()))
        bad = torch.where(values.isfinite(), -1.0, float(step))
        if self._bad_step is None:
            self._bad_step = bad
        self._bad_step = torch.where(self._bad_step < 0, bad, self._bad_step)
        accumulate(self._sums, losses)
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means of the losses, `steps_per_s` and the share `data_wait`; starts a new interval.

        Raises FloatingPointError that names the first non-finite loss and its step.
        """
        assert self._bad_step is not None, "no step was added"
        names = list(self._sums)
        sums = torch.stack(list(self._sums.values())) / self._steps
        means, bad = torch.stack([sums, self._bad_step.to(sums)]).tolist()  # the one host read
        if failed := [step for step in bad if step >= 0]:
            first = min(failed)
            terms = ", ".join(n for n, step in zip(names, bad, strict=True) if step == first)
            raise FloatingPointError(f"non-finite loss at step {first:.0f}: {terms}")
        seconds = time.perf_counter() - self._begin
        row = dict(zip(names, means, strict=True))
        row |= {"steps_per_s": self._steps / seconds, "data_wait": self._wait / seconds}
        self._reset()
        return row


def accumulate(into: dict[str, Tensor], values: dict[str, Tensor], parts: int = 1) -> None:
    """into[name] += value / parts, for every name."""
    for name, value in values.items():
        value = value / parts if parts > 1 else value
        into[name] = into[name] + value if name in into else value
