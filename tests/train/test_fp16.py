"""train.precision=fp16: one GradScaler a student, tried for real on the CPU."""

import functools
import json

import pytest
import torch

from mokd_fast.train.checkpoint import checkpoints, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import ADAMW, CNN, VIT, broken_off, pictures, silent, small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 14)


def fp16(data, *overrides, **more):
    return small(data, "train.precision=fp16", *overrides, **more)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def overflowing(model):
    """Inf in a gradient of this student, until the handle is removed."""
    return next(model.backbone.parameters()).register_hook(lambda g: g.fill_(torch.inf))


def weights(trainer, i):
    return [p.detach().clone() for p in trainer.mokd.students[i].parameters()]


def test_a_run_starts_like_one_in_fp32_and_resumes(data, tmp_path, monkeypatch):
    more = ("train.checkpoint_every=4it", "train.duration=8it", "train.log_every=1")
    alone = {"models": [VIT], "t_head": None}  # fp16 convolutions are slow on CPUs
    recipe = fp16(data, *more, **alone)
    # Gradients of up to 78 overflow at 2**10 (and would at torch's own start of 2**16).
    low = functools.partial(torch.amp.GradScaler, init_scale=2.0**10)
    monkeypatch.setattr(torch.amp, "GradScaler", low)
    whole = pretrain(recipe, run=tmp_path / "whole", console=silent())
    full = pretrain(small(data, *more, **alone), run=tmp_path / "full", console=silent())
    mine, theirs = rows_of(whole), rows_of(full)
    assert "grad_scale_1" not in theirs[0]
    assert 0 < mine[-1]["grad_scale_1"] < 2**10, "it found a scale that the gradients fit"
    assert sum(row["skipped"] for row in mine) == 0
    assert mine[0]["loss_1"] == pytest.approx(theirs[0]["loss_1"], rel=0.01)
    assert mine[0]["loss_1"] != pytest.approx(theirs[0]["loss_1"], rel=1e-6), "it ran in fp32"

    broken_off(recipe, tmp_path / "parts", 6)
    parts = pretrain(recipe, run=tmp_path / "parts", console=silent())
    one, two = (load_checkpoint(checkpoints(run / "checkpoints")[-1]) for run in (whole, parts))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert one["scalers"] == two["scalers"] and len(one["scalers"]) == 1
    assert one["scalers"][0]["_growth_tracker"] > 0


@pytest.mark.slow
def test_the_loss_falls_like_in_fp32(data, tmp_path, monkeypatch):
    """A pair, 20 steps: about the same fall of both losses (fp16 takes minutes on a CPU)."""
    # From 2**16 the search for a scale that gradients of 269 fit would take 9 of the 20 steps.
    low = functools.partial(torch.amp.GradScaler, init_scale=2.0**4)
    monkeypatch.setattr(torch.amp, "GradScaler", low)
    cnn = {**CNN, "optimizer": ADAMW}
    more = (
        *("train.batch=8", "train.duration=20it", "train.log_every=4", "train.warmup=2it"),
        *("train.freeze_last_layers=0it", "train.checkpoint_every=20it"),
        *(f"models.{i}.optimizer.lr=0.003" for i in (0, 1)),
    )
    falls = []
    for make in (small, fp16):
        recipe = make(data, *more, models=(cnn, VIT))
        rows = rows_of(pretrain(recipe, run=tmp_path / make.__name__, console=silent()))
        falls.append([1 - rows[-1][f"loss_{i}"] / rows[0][f"loss_{i}"] for i in (1, 2)])
        assert sum(row["skipped"] for row in rows) == 0
    assert all(fall > 0.2 for row in falls for fall in row), falls


def test_each_optimizer_skips_on_its_own_and_the_scale_resumes(data, tmp_path):
    recipe = fp16(data, "train.log_every=1", models=(VIT, VIT))
    trainer = Trainer(recipe, tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    trainer.step(0, batches)  # the first step of the warm-up has lr 0
    for scaler in trainer.scalers:
        scaler.update(16.0)  # this toy's gradients reach 269, so that 256 overflows
    before = [weights(trainer, i) for i in (0, 1)]
    center = trainer.mokd.centers["mlp_2"].clone()
    hook = overflowing(trainer.mokd.students[1])
    result = trainer.step(1, batches)
    hook.remove()
    assert not result.skipped, "a scaler that looks for its scale is no fault of the run"
    assert result.diagnostics["grad_scale_1"] == 16
    assert result.diagnostics["grad_scale_2"] == 8
    moved = [
        any(not torch.equal(p, q) for p, q in zip(weights(trainer, i), before[i], strict=True))
        for i in (0, 1)
    ]
    assert moved == [True, False]
    assert not torch.equal(trainer.mokd.centers["mlp_2"], center)
    trainer.done = 2
    trainer.save()
    trainer.lock.release()
    again = Trainer(trainer.recipe, tmp_path / "run", silent())
    assert [scaler.get_scale() for scaler in again.scalers] == [16, 8]


def test_a_gradient_that_no_scale_cures_is_a_skipped_step(data, tmp_path):
    trainer = Trainer(fp16(data, models=(VIT, VIT)), tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    trainer.step(0, batches)
    trainer.scalers[0].update(0.5)
    before = weights(trainer, 1)
    center = trainer.mokd.centers["mlp_2"].clone()
    overflowing(trainer.mokd.students[0])
    assert trainer.step(1, batches).skipped
    assert all(torch.equal(p, q) for p, q in zip(weights(trainer, 1), before, strict=True))
    assert torch.equal(trainer.mokd.centers["mlp_2"], center)
