"""Durations and schedules against the official ones."""

import numpy as np
import pytest

from bench.baseline import official
from mokd_fast.train.schedule import _duration, cosine, in_steps, teacher_temperature


def test_durations():
    assert in_steps("3ep", 7) == 21 and in_steps("200it", 7) == 200
    assert in_steps("8%", 7, 250) == 20 and in_steps("0.5ep", 10) == 5
    for wrong in ("3", "ep", "-1ep", "3 ep", "8percent"):
        with pytest.raises(ValueError, match="3ep, 200it or 8%"):
            _duration(wrong)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_cosine_is_the_official_one(warmup):
    theirs = official.cosine_schedule(0.1, 0.0048, 10, 7, warmup_epochs=warmup)
    np.testing.assert_allclose(cosine(0.1, 0.0048, 70, warmup * 7), theirs, rtol=1e-14)


def test_teacher_temperature():
    table = official.temperature_schedule(0.04, 0.07, 5, 10)
    found = teacher_temperature(0.04, 0.07, "5ep", 70, 7)
    np.testing.assert_array_equal(found, np.repeat(table, 7))  # whole epochs
    steps = teacher_temperature(0.04, 0.07, "20it", 70, 7)
    np.testing.assert_allclose(steps[:20], np.linspace(0.04, 0.07, 20))
    assert (steps[20:] == 0.07).all()
    percent = teacher_temperature(0.04, 0.07, "50%", 70, 7)
    assert (np.diff(percent[:35]) > 0).all() and (percent[34:] == 0.07).all()
    half = teacher_temperature(0.04, 0.07, "0.5ep", 70, 10)  # not whole: moves every step
    np.testing.assert_allclose(half[:5], np.linspace(0.04, 0.07, 5))
    for none in ("0ep", "0it", "0%"):
        assert (teacher_temperature(0.04, 0.07, none, 70, 7) == 0.07).all()
