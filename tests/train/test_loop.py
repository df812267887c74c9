"""The trainer: what a run leaves behind, exact resume, accumulation, one-model recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mokd_fast
from mokd_fast.train.checkpoint import checkpoints, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.recipe import load_recipe
from tests.train.recipes import CNN, HEAD, VIT, model, pictures, silent, small

TERMS = [f"{kind}_{i}" for i in (1, 2) for kind in ("self_mlp", "self_t", "cross", "search")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data", 14)


def final_state(run: Path) -> dict:
    return load_checkpoint(checkpoints(run / "checkpoints")[-1])


def test_what_a_run_leaves_behind(data, tmp_path):
    recipe = small(data)
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    assert load_recipe(run / "recipe.yaml") == recipe
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12  # 4 epochs of 14 // 4 steps
    for key in (*TERMS, "loss_1", "loss_2", "images_per_s", "data_wait", "bad_files", "lr_1"):
        assert key in rows[-1]
    assert list((run / "tensorboard").iterdir())
    assert [path.name for path in checkpoints(run / "checkpoints")] == [
        "00000009.pt",
        "00000012.pt",
    ]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resume_is_bit_equal(data, tmp_path, monkeypatch, stop):
    """Drop-path draws from torch's generator, so its state must come back too."""
    recipe = small(
        data,
        "train.checkpoint_every=1it",
        "train.accumulate=2",
        models=(CNN, {**VIT, "drop_path": 0.3}),
    )
    whole = pretrain(recipe, run=tmp_path / "whole", console=silent())
    step = Trainer.step

    def killed(self, k, batches):
        if k == stop:
            raise KeyboardInterrupt
        return step(self, k, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        pretrain(recipe, run=tmp_path / "parts", console=silent())
    parts = pretrain(recipe, run=tmp_path / "parts", console=silent())
    one, two = final_state(whole), final_state(parts)
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    steps = [json.loads(x)["step"] for x in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_accumulation_is_the_whole_batch(data, tmp_path):
    """Without BatchNorm two halves give the loss, gradients and centres of the whole."""
    plain = {**HEAD, "batch_norm": False}
    kwargs = {"patch_size": 7, "depth": 1, "embed_dim": 24, "num_heads": 3}
    vit = model("vit_tiny_patch16_224", kwargs=kwargs, mlp_head=plain)
    trainers = []
    for i, parts in enumerate((1, 2)):
        recipe = small(data, "train.batch=8", f"train.accumulate={parts}", models=(vit, vit))
        trainer = Trainer(recipe, tmp_path / str(i), silent())
        trainer.mokd.double().train()
        convert = trainer.to_device
        trainer.to_device = lambda views, f=convert: tuple(v.double() for v in f(views))
        losses = [trainer.step(k, iter_from(trainer, k)) for k in range(2)]
        trainers.append((trainer, losses))
    (one, first), (two, second) = trainers
    for a, b in zip(first, second, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)
    for name, value in one.mokd.state_dict().items():
        torch.testing.assert_close(value, two.mokd.state_dict()[name], rtol=1e-7, atol=1e-9)


def iter_from(trainer: Trainer, k: int):
    return trainer.loader.batches(k * trainer.recipe.train.accumulate)


def test_bf16_autocast(data, tmp_path):
    run = pretrain(
        small(data, "train.precision=bf16", "train.channels_last=true"),
        run=tmp_path / "run",
        console=silent(),
    )
    assert all(v.isfinite().all() for v in final_state(run)["model"].values())


@pytest.mark.parametrize(("t_head", "terms"), [(None, 1), ({"depth": 1, "heads": 4}, 2)])
def test_one_model_alone(data, tmp_path, t_head, terms):
    recipe = small(data, models=[VIT], t_head=t_head)
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert [key for key in row if key in TERMS] == ["self_mlp_1", "self_t_1"][:terms]


def test_global_generators_of_python_and_numpy_are_left_alone(data, tmp_path):
    import random

    before = random.getstate(), np.random.get_state()[1].copy()
    pretrain(small(data), run=tmp_path / "run", console=silent())
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()


def test_checkpoint_every_and_a_failing_save(data, tmp_path, monkeypatch):
    """A disk that is full: the message says so, the checkpoint before stays and loads."""
    recipe = small(data, "train.checkpoint_every=2it")
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(mokd_fast.UserError, match="No space left"):
        pretrain(recipe, run=tmp_path / "run", console=silent())
    assert final_state(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").rglob("*.tmp"))
