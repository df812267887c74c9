"""Alarms on the rows of metrics: a run that collapses, or is stuck, says so and what to try.

Every rule looks at the median of a quantity (see `diagnose`) over the last `WINDOW` steps after the
warm-up, because every run starts near ln K and a collapsing one may jump. The thresholds lie
between the healthy and the collapsed runs of `python bench/alarms.py`; what these reached is in
bench/results/cpu-2core/alarms.json and in the README.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
WINDOW = 100  # steps
MIN_ROWS = 5  # of a window, or its median is one row's chance


class Rule(NamedTuple):
    name: str
    quantity: str  # the prefix of its keys in a row
    holds: Callable[[float, "Rows"], bool]  # of the median
    text: str


class Rows(NamedTuple):
    """What the medians are compared with."""

    ln_k: float
    most: int  # min(K, teacher rows of a micro-batch): prototypes that could be in use


RULES = (
    Rule(
        "loss at ln K",
        "teacher_entropy_",
        lambda entropy, rows: entropy > 0.98 * rows.ln_k,
        "the teacher's distribution is uniform: the loss sits at ln K and teaches nothing. Lower "
        "loss.teacher_temperature (0.02 to 0.04) or raise the learning rate; with few pictures "
        "fewer prototypes and teacher.momentum=0.99 help",
    ),
    Rule(
        "uniform student",
        "student_entropy_",
        lambda entropy, rows: entropy > 0.999 * rows.ln_k,
        "the student's distribution is uniform: the loss sits at ln K, however sharp the teacher "
        "is. Where the teacher is uniform too (loss at ln K) the student has followed it; else "
        "lower loss.student_temperature (0.1)",
    ),
    Rule(
        "few prototypes",
        "prototypes_used_",
        lambda used, rows: used * rows.most < 3.5 and used <= 1 / 8,
        "one to three prototypes win every picture. Lower loss.center_momentum (0.9; at 1 there is "
        "no centre), raise teacher.momentum (0.99 or more) or lower the learning rate",
    ),
    Rule(
        "loss at 0",
        "self_",
        lambda loss, rows: loss < 0.01 * rows.ln_k,
        "teacher and student agree on everything, nothing is left to learn. If few prototypes are "
        "in use it is a collapse: lower loss.center_momentum, raise teacher.momentum. If many are, "
        "the task is too easy: stronger augmentation or more prototypes",
    ),
    Rule(
        "constant features",
        "feature_std_",
        lambda std, rows: std < 0.005,
        "the backbone gives every picture the same feature. Lower the learning rate of this model, "
        "lengthen train.warmup, and look at its other alarms",
    ),
)


class Event(NamedTuple):
    step: int
    alarm: str
    text: str
    over: bool


class Alarms:
    """Turns rows of metrics, given in order, into events. It depends on nothing but the rows.

    Args:
        prototypes: K.
        rows: teacher rows of a micro-batch, 2B.
        warmup: steps whose rows do not count.
    """

    def __init__(self, prototypes: int, rows: int, warmup: int) -> None:
        self._limits = Rows(math.log(prototypes), min(prototypes, rows))
        self._warmup = warmup
        self._rows: list[Row] = []
        self._on: set[str] = set()
        self.medians: dict[str, float] = {}  # of the last window; empty until there is one

    def see(self, row: Row) -> list[Event]:
        """What starts with this row of metrics, and what is over with it."""
        # Without them the interval or its last step was skipped.
        if row["step"] <= self._warmup or not {"loss_1", "student_entropy_mlp_1"} <= row.keys():
            return []
        self._rows.append(row)
        while len(self._rows) > MIN_ROWS and self._rows[1]["step"] <= row["step"] - WINDOW:
            del self._rows[0]
        if len(self._rows) < MIN_ROWS or row["step"] - self._rows[0]["step"] < WINDOW:
            return []
        watched = tuple(rule.quantity for rule in RULES)
        self.medians = {
            key: statistics.median(row[key] for row in self._rows)
            for key in row
            if key.startswith(watched)
        }
        events = []
        for rule in RULES:
            places = [
                f"{key.removeprefix(rule.quantity)} ({median:.3g})"
                for key, median in self.medians.items()
                if key.startswith(rule.quantity) and rule.holds(median, self._limits)
            ]
            if places and rule.name not in self._on:
                text = f"{rule.name}: {rule.quantity}* of {', '.join(places)}: {rule.text}."
                events.append(Event(row["step"], rule.name, text, False))
                self._on.add(rule.name)
            elif not places and rule.name in self._on:
                events.append(Event(row["step"], rule.name, f"{rule.name}: over.", True))
                self._on.remove(rule.name)
        return events


def replay(alarms: Alarms, metrics: Path) -> None:
    """Brings `alarms` to where they were after the rows of a run that goes on."""
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            alarms.see(json.loads(line))
