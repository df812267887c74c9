"""train.precision=fp16: one GradScaler a student, tried for real on the CPU."""

import json

import pytest
import torch

from mokd_fast.train.checkpoint import checkpoints, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import pictures, silent, small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 14)


def fp16(data, *overrides):
    return small(data, "train.precision=fp16", *overrides)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def overflowing(model):
    """Inf in a gradient of this student, until the handle is removed."""
    return next(model.backbone.parameters()).register_hook(lambda g: g.fill_(torch.inf))


def weights(trainer, i):
    return [p.detach().clone() for p in trainer.mokd.students[i].parameters()]


def test_a_run_goes_like_one_in_fp32_and_resumes(data, tmp_path, monkeypatch):
    more = ("train.checkpoint_every=6it", "train.duration=12it", "train.log_every=3")
    recipe = fp16(data, *more)
    whole = pretrain(recipe, run=tmp_path / "whole", console=silent())
    full = pretrain(small(data, *more), run=tmp_path / "full", console=silent())
    mine, theirs = rows_of(whole), rows_of(full)
    assert "grad_scale_1" not in theirs[0]
    assert all(0 < row["grad_scale_1"] <= 2**16 for row in mine)
    assert sum(row["skipped"] for row in mine) == 0
    for i in (1, 2):
        key = f"loss_{i}"
        assert mine[0][key] == pytest.approx(theirs[0][key], rel=0.02)
        assert mine[0][key] != pytest.approx(theirs[0][key], rel=1e-6), "it ran in fp32"
        assert mine[-1][key] < 0.95 * mine[0][key] and theirs[-1][key] < 0.95 * theirs[0][key]

    step = Trainer.step

    def killed(self, k, batches):
        if k == 8:
            raise KeyboardInterrupt
        return step(self, k, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        pretrain(recipe, run=tmp_path / "parts", console=silent())
    parts = pretrain(recipe, run=tmp_path / "parts", console=silent())
    one, two = (load_checkpoint(checkpoints(run / "checkpoints")[-1]) for run in (whole, parts))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert one["scalers"] == two["scalers"] and len(one["scalers"]) == 2
    assert all(scaler["_growth_tracker"] > 0 for scaler in one["scalers"])


def test_each_optimizer_skips_on_its_own_and_the_scale_resumes(data, tmp_path):
    trainer = Trainer(fp16(data, "train.log_every=1"), tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    trainer.step(0, batches)  # the first step of the warm-up has lr 0
    for scaler in trainer.scalers:
        scaler.update(256.0)  # 2**16 is too much for this network's gradients
    before = [weights(trainer, i) for i in (0, 1)]
    center = trainer.mokd.centers["mlp_2"].clone()
    hook = overflowing(trainer.mokd.students[1])
    result = trainer.step(1, batches)
    hook.remove()
    assert not result.skipped, "a scaler that looks for its scale is no fault of the run"
    assert result.diagnostics["grad_scale_1"] == 256
    assert result.diagnostics["grad_scale_2"] == 128
    moved = [
        any(not torch.equal(p, q) for p, q in zip(weights(trainer, i), before[i], strict=True))
        for i in (0, 1)
    ]
    assert moved == [True, False]
    assert not torch.equal(trainer.mokd.centers["mlp_2"], center)
    trainer.done = 2
    trainer.save()
    again = Trainer(trainer.recipe, tmp_path / "run", silent())
    assert [scaler.get_scale() for scaler in again.scalers] == [256, 128]


def test_a_gradient_that_no_scale_cures_is_a_skipped_step(data, tmp_path):
    trainer = Trainer(fp16(data), tmp_path / "run", silent())
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
