"""Durations and the schedules they shape, one value an optimizer step."""

import re
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

Schedule = NDArray[np.float64]  # [steps]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ep|it|%)")


def _duration(given: Any) -> str:
    """Before any other check, which would ask of a number for a string."""
    if not isinstance(given, str) or not _DURATION.fullmatch(given):
        raise ValueError("a duration is written 3ep, 200it or 8%")
    return given


Duration = Annotated[str, BeforeValidator(_duration)]


def in_steps(duration: str, steps_per_epoch: int, total: int = 0) -> int:
    """Optimizer steps of '3ep', '200it' or '8%' (of `total` steps)."""
    match = _DURATION.fullmatch(duration)
    assert match is not None, duration
    unit = {"ep": steps_per_epoch, "it": 1, "%": total / 100}[match[2]]
    return round(float(match[1]) * unit)


def cosine(base: float, final: float, total: int, warmup: int = 0) -> Schedule:
    """Linear from 0 to `base` over `warmup` steps, then half a cosine to `final`.

    DINO's: the ramp reaches `base` on its last step, the cosine stops one step short of `final`.
    """
    ramp = np.linspace(0, base, warmup)
    n = total - warmup
    wave = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(n) / max(n, 1)))
    return np.concatenate([ramp, wave])


def teacher_temperature(
    start: float, final: float, warmup: str, total: int, steps_per_epoch: int
) -> Schedule:
    """linspace(start, final) with its end point over the warm-up, then `final`.

    A warm-up of whole epochs is indexed by them (official); any other moves every step.
    """
    step = np.arange(total)
    if warmup.endswith("ep") and float(warmup[:-2]).is_integer():
        count, position = in_steps(warmup, 1), step // steps_per_epoch
    else:
        count, position = in_steps(warmup, steps_per_epoch, total), step
    table = np.concatenate([np.linspace(start, final, count), [final]])
    return table[np.minimum(position, count)]
