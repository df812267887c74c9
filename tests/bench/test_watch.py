"""The cost of the flag and the diagnostics: that what they are left out of is the same step."""

import copy
import itertools

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
    recipe = small(pictures(tmp_path / "data", 24), *MORE, "train.warmup=0ep")
    states = []
    for name in ("watched", "bare"):
        trainer = Trainer(recipe, tmp_path / name, silent())
        trainer.mokd.train()
        start = copy.deepcopy(trainer.mokd.state_dict())
        next(getattr(watch, name)(trainer, trainer.loader.batches()))
        states.append(trainer.mokd.state_dict())
    for key, value in states[0].items():
        rtol = 3e-7 if key.startswith("teachers") else 0
        torch.testing.assert_close(value, states[1][key], rtol=rtol, atol=rtol / 10)
    moved = [key for key, value in start.items() if not torch.equal(value, states[0][key])]
    assert {key.split(".")[0] for key in moved} == {"students", "teachers", "centers"}


def test_only_the_watched_steps_are_diagnosed(tmp_path, monkeypatch):
    """Every second one is logged."""
    recipe = small(pictures(tmp_path / "data", 24), *MORE, "train.checkpoint_every=100%")
    calls, diagnose = [], loop.diagnose
    monkeypatch.setattr(loop, "diagnose", lambda *args: calls.append(1) or diagnose(*args))
    for name, expected in (("bare", 0), ("watched", 3)):
        trainer = Trainer(recipe, tmp_path / name, silent())
        steps = getattr(watch, name)(trainer, trainer.loader.batches())
        assert len(list(itertools.islice(steps, 6))) == 6
        assert len(calls) == expected


def test_the_share():
    """1 ms more a plain step and 6 ms more a logged one of 100 ms, whatever delays some."""
    rng = np.random.Generator(np.random.Philox(0))
    seconds = np.full((40, 10, 2), 0.1)
    seconds[..., 0] += 0.001
    seconds[:, -1, 0] += 0.005
    seconds += 0.05 * (rng.random(seconds.shape) < 0.2)
    seconds[rng.random(seconds.shape[:2]) < 0.3] = np.nan
    assert watch.share(seconds) == pytest.approx(0.015)
