"""The cost of the flag and the diagnostics: that what they are left out of is the same step."""

import copy

import numpy as np
import pytest
import torch

from bench import watch
from mokd_fast.train import loop
from mokd_fast.train.loop import Trainer
from tests.train.recipes import pictures, silent, small

MORE = ("train.freeze_last_layers=0it", "train.batch=6", "train.accumulate=1")


def test_the_bare_step_is_the_step(tmp_path):
    """The same bits in every weight, statistic and centre; the EMA alone rounds otherwise."""
    recipe = small(pictures(tmp_path / "data", 24), *MORE, "train.log_every=1")
    states = []
    for name in ("watched", "bare"):
        trainer = Trainer(recipe, tmp_path / name, silent())
        trainer.mokd.train()
        start = copy.deepcopy(trainer.mokd.state_dict())
        getattr(watch, name)(trainer, 5, trainer.loader.batches())  # lr 0 at first
        states.append(trainer.mokd.state_dict())
    for key, value in states[0].items():
        rtol = 3e-7 if key.startswith("teachers") else 0
        torch.testing.assert_close(value, states[1][key], rtol=rtol, atol=rtol / 10)
    moved = [key for key, value in start.items() if not torch.equal(value, states[0][key])]
    assert {key.split(".")[0] for key in moved} == {"students", "teachers", "centers"}


def test_only_the_watched_interval_is_diagnosed(tmp_path, monkeypatch):
    recipe = small(pictures(tmp_path / "data", 24), *MORE, "train.log_every=2")
    trainer = Trainer(recipe, tmp_path / "run", silent())
    calls, diagnose = [], loop.diagnose
    monkeypatch.setattr(loop, "diagnose", lambda *args: calls.append(1) or diagnose(*args))
    trainer.mokd.train()
    batches = trainer.loader.batches()
    watch.bare(trainer, 0, batches)
    assert calls == []
    watch.watched(trainer, 2, batches)
    assert len(calls) == 1


def test_interval():
    """About right for the median of a normal sample, and of one value that value."""
    samples = np.random.Generator(np.random.Philox(1)).normal(1.0, 0.02, 400)
    low, high = watch.interval(samples)
    half = 1.96 * 1.2533 * 0.02 / 20  # the median's standard error is 1.2533 of the mean's
    assert low < 1 < high and high - low == pytest.approx(2 * half, rel=0.3)
    assert watch.interval([1.5] * 3) == (1.5, 1.5)
