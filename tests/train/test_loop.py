"""The trainer: what a run leaves behind, exact resume, accumulation, one-model recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mokd_fast
from mokd_fast.nn.fast import Conv2d, Linear
from mokd_fast.ops import cpu, grad_norms
from mokd_fast.train.checkpoint import checkpoints, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.recipe import load_recipe
from tests.train.recipes import (
    CNN,
    HEAD,
    SGD,
    T_HEAD,
    VIT,
    broken_off,
    model,
    pictures,
    silent,
    small,
)

TERMS = [f"{kind}_{i}" for i in (1, 2) for kind in ("self_mlp", "self_t", "cross", "search")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data", 14)


def final_state(run: Path) -> dict:
    return load_checkpoint(checkpoints(run / "checkpoints")[-1])


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(data, tmp_path):
    recipe = small(data)
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    assert load_recipe(run / "recipe.yaml") == recipe
    rows = metrics(run)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9, 10, 12]  # every 2 and every epoch
    assert rows[-1]["step"] == 12  # 4 epochs of 14 // 4 steps
    for key in (*TERMS, "loss_1", "loss_2", "images_per_s", "data_wait", "bad_files", "lr_1"):
        assert key in rows[-1]
    assert list((run / "tensorboard").iterdir())
    assert [path.name for path in checkpoints(run / "checkpoints")] == [
        "00000009.pt",
        "00000012.pt",
    ]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("forced", "line"),
    [
        ("", "fused (fused-linear: can run, but so few logits are stored as well)"),
        ("cpu", "fused (fused-linear: can run, but so few logits are stored as well)"),
        ("reference", "reference (MOKD_FAST_BACKEND=reference is set, this one runs or raises)"),
    ],
)
def test_what_stores_logits_is_said_with_the_reason(data, tmp_path, monkeypatch, forced, line):
    monkeypatch.setenv("MOKD_FAST_BACKEND", forced)
    console = silent()
    trainer = Trainer(small(data, models=[VIT], t_head=None), tmp_path / "run", console)
    assert console.file.getvalue() == f"loss.prototypes=auto: {line}\n"
    assert trainer.way == line.split()[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A recipe and its run. Drop-path draws from torch's generator: its state must come back."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = small(
        pictures(folder / "data", 14),
        "train.checkpoint_every=2it",
        "train.accumulate=2",
        models=({**CNN, "t_head_optimizer": T_HEAD}, {**VIT, "drop_path": 0.3}),
    )
    return recipe, pretrain(recipe, run=folder / "run", console=silent())


@pytest.mark.parametrize("stop", [1, 7])  # before the first checkpoint; between two of them
def test_resume_is_bit_equal(uninterrupted, tmp_path, stop):
    recipe, whole = uninterrupted
    broken_off(recipe, tmp_path / "parts", stop)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{}\nnull\n{"step": 7, "loss_')  # damaged rows, and one that was cut in two
    parts = pretrain(recipe, run=tmp_path / "parts", console=silent())
    one, two = final_state(whole), final_state(parts)
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    assert [row["step"] for row in metrics(parts)] == [2, 4, 6, 8, 10, 12]
    for mine, theirs in zip(metrics(parts), metrics(whole), strict=True):
        for key in (*TERMS, "loss_1", "loss_2", "lr_1", "ema_momentum"):
            assert mine[key] == theirs[key], key
    board = EventAccumulator(str(parts / "tensorboard"))
    board.Reload()
    logged = {event.step: event.value for event in board.Scalars("loss_1")}
    assert logged == {row["step"]: pytest.approx(row["loss_1"]) for row in metrics(parts)}


def test_every_loader_trains_and_resumes(data, tmp_path):
    """Bit-equal over a stop; nearly alike among each other, for so are their views."""
    losses = {}
    for loader in ("pillow", "cpu", "dali"):
        changes = (f"data.loader={loader}", "train.duration=2ep", "train.checkpoint_every=1it")
        recipe = small(data, *changes, "train.freeze_last_layers=0it", models=[VIT], t_head=None)
        whole = pretrain(recipe, run=tmp_path / loader, console=silent())
        broken_off(recipe, tmp_path / f"{loader} parts", 3)
        parts = pretrain(recipe, run=tmp_path / f"{loader} parts", console=silent())
        one, two = final_state(whole), final_state(parts)
        assert one["loader"] == loader and ("dali" in one["versions"]) == (loader == "dali")
        for name, value in one["model"].items():
            assert torch.equal(value, two["model"][name]), (loader, name)
        losses[loader] = [row["loss_1"] for row in metrics(whole)]
    assert losses["cpu"] != losses["pillow"] != losses["dali"]
    for loader in ("cpu", "dali"):
        assert losses[loader] == pytest.approx(losses["pillow"], rel=0.01)


def test_a_finished_run_does_nothing(uninterrupted):
    recipe, run = uninterrupted
    logged, kept = (run / "metrics.jsonl").read_text(), checkpoints(run / "checkpoints")
    times = [path.stat().st_mtime_ns for path in kept]
    console = silent()
    pretrain(recipe, run=run, console=console)
    assert f"{run} is finished: 12 steps are done" in console.file.getvalue()
    assert (run / "metrics.jsonl").read_text() == logged
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_the_last_layers_are_frozen_for_one_epoch(data, tmp_path):
    trainer = Trainer(small(data), tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    for k in range(trainer.steps_per_epoch + 2):
        before = {n: p.detach().clone() for n, p in trainer.mokd.students.named_parameters()}
        trainer.step(k, batches)
        for name, parameter in trainer.mokd.students.named_parameters():
            if not parameter.requires_grad or k == 0:  # the first step of the warm-up has lr 0
                continue
            frozen = ".last_layer." in name and k < trainer.steps_per_epoch
            moved = not torch.equal(parameter, before[name])
            assert not (frozen and moved), (k, name)
            if name.endswith("last_layer.weight_v"):
                assert frozen or moved, (k, name)


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
        emas = []
        first = trainer.optimizers[0]
        first.step = lambda *a, f=first.step, seen=emas: seen.append(a[2].momentum) or f(*a)
        moved, centers = [], trainer.mokd.centers
        centers.update = lambda m, f=centers.update, seen=moved, **skip: (
            seen.append(sorted(m)),
            f(m, **skip),
        )
        losses = [trainer.step(k, iter_from(trainer, k)).losses for k in range(2)]
        assert emas == list(trainer.momentum[:2])  # once an optimizer step
        assert moved == [["mlp_1", "mlp_2", "t_1", "t_2"]] * 2  # and all centres at once
        trainers.append((trainer, losses))
    (one, first), (two, second) = trainers
    assert any(name.startswith("centers.") for name in one.mokd.state_dict())
    for a, b in zip(first, second, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)
    for name, value in one.mokd.state_dict().items():
        torch.testing.assert_close(value, two.mokd.state_dict()[name], rtol=1e-7, atol=1e-9)


def iter_from(trainer: Trainer, k: int):
    return trainer.loader.batches(k * trainer.recipe.train.accumulate)


def test_bf16_autocast(data, tmp_path):
    precision = ("train.precision=bf16", "train.channels_last=true")
    run = pretrain(small(data, *precision), run=tmp_path / "run", console=silent())
    full = small(data, "train.channels_last=true")
    full = pretrain(full, run=tmp_path / "full", console=silent())
    mine, theirs = metrics(run)[0], metrics(full)[0]  # before the two drift apart
    for key in TERMS:
        assert mine[key] == pytest.approx(theirs[key], rel=0.1), key
    same = pytest.approx(theirs["self_mlp_1"], rel=1e-5)
    assert mine["self_mlp_1"] != same, "it ran in fp32"
    assert all(v.isfinite().all() for v in final_state(run)["model"].values())


@pytest.mark.parametrize(("t_head", "terms"), [(None, 1), ({"depth": 1, "heads": 4}, 2)])
def test_one_model_alone(data, tmp_path, t_head, terms):
    recipe = small(data, models=[VIT], t_head=t_head)
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    row = metrics(run)[-1]
    assert row["loss_1"] == pytest.approx(sum(row[key] for key in TERMS if key in row))
    assert "loss_2" not in row
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


def test_a_run_that_diverges(data, tmp_path):
    """The rate is absurd from the second step on, so the loss of the third shows it."""
    absurd = "models.1.optimizer.lr=1e30"
    recipe = small(data, absurd, "train.checkpoint_every=10it", "train.max_skipped=2")
    message = (
        r"2 steps in a row .* at step 3: [\w, ]*self_mlp_2[\w, ]*"
        r"\. No checkpoint was written yet\. Try a lower"
    )
    with pytest.raises(mokd_fast.UserError, match=message):
        pretrain(recipe, run=tmp_path / "one", console=silent())
    assert not checkpoints(tmp_path / "one" / "checkpoints")

    recipe = small(data, absurd, "train.checkpoint_every=1it")  # now a save comes first
    with pytest.raises(mokd_fast.UserError, match=r"not finite after step 2\. .*00000001.pt"):
        pretrain(recipe, run=tmp_path / "two", console=silent())
    assert all(v.isfinite().all() for v in final_state(tmp_path / "two")["model"].values())
    mokd_fast.load_run(tmp_path / "two")


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path):
    """The last step of a run has no loss after it that would show them."""
    trainer = Trainer(small(data), tmp_path / "run", silent())
    trainer.done = 3
    trainer.save()
    with torch.no_grad():
        next(trainer.mokd.students.parameters()).view(-1)[0] = torch.nan
    trainer.done = 4
    with pytest.raises(mokd_fast.UserError, match=r"not finite after step 4.*00000003.pt"):
        trainer.save()
    assert final_state(tmp_path / "run")["step"] == 3


def test_an_optimizer_state_that_is_not_finite_is_not_saved(data, tmp_path):
    trainer = Trainer(small(data), tmp_path / "run", silent())
    trainer.mokd.train()
    for k, batches in enumerate([trainer.loader.batches()] * 2):
        trainer.step(k, batches)
    trainer.done = 2
    trainer.save()
    moments = next(iter(trainer.optimizers[1].torch.state.values()))["exp_avg_sq"]
    moments.view(-1)[-1] = torch.inf
    trainer.done = 3
    with pytest.raises(mokd_fast.UserError, match=r"exp_avg_sq \d+ of optimizer 2 is not finite"):
        trainer.save()
    assert final_state(tmp_path / "run")["step"] == 2


def test_what_a_checkpoint_holds(uninterrupted):
    _, run = uninterrupted
    state = final_state(run)
    assert state["step"] == 12 and state["world"] == 1 and state["scalers"] == []
    assert state["versions"]["torch"] == torch.__version__
    assert state["versions"]["threads"] == str(torch.get_num_threads())
    assert {"centers.mlp_1", "centers.t_2"} <= state["model"].keys()


def test_another_version_is_a_warning_with_both(data, tmp_path, monkeypatch):
    recipe = small(data, "train.duration=8it", "train.checkpoint_every=4it")
    pretrain(recipe, run=tmp_path / "run", console=silent())
    (tmp_path / "run/checkpoints/00000008.pt").unlink()
    monkeypatch.setattr("mokd_fast.train.state.platform.python_version", lambda: "3.99")
    console = silent()
    pretrain(recipe, run=tmp_path / "run", console=console)
    now = "warning: not bit-equal to a run in one piece: python 3."
    assert now in console.file.getvalue() and "then, 3.99 now" in console.file.getvalue()


def test_warm_start_takes_the_weights_alone(uninterrupted, data, tmp_path):
    _, before = uninterrupted
    now = {"temperature_warmup": dict.fromkeys(("self", "cross", "search"), "0it")}
    recipe = small(
        data, "train.seed=5", "train.duration=2it", "train.warmup=1it",
        "train.freeze_last_layers=0it",
        models=({**CNN, "t_head_optimizer": T_HEAD, **now}, {**VIT, **now}),
    )  # fmt: skip
    console = silent()
    trainer = Trainer(recipe, tmp_path / "run", console, before)
    given = final_state(before)["model"]
    assert all(torch.equal(v, given[k]) for k, v in trainer.mokd.state_dict().items())
    assert trainer.done == 0 and not trainer.optimizers[0].torch.state
    assert f"warm start from {before}/checkpoints/00000012.pt (step 12)" in console.file.getvalue()
    assert final_state(tmp_path / "run")["step"] == 0  # so that a resume has it too
    trainer.fit()
    console = silent()
    pretrain(recipe, run=tmp_path / "run", warm_start=before, console=console)
    assert f"--warm-start {before} is not applied again" in console.file.getvalue()


def test_warm_start_from_other_networks(uninterrupted, data, tmp_path):
    _, before = uninterrupted
    recipe = small(data, "prototypes=32", models=(CNN, VIT))
    message = r"last_layer.weight_v is \[64, 16\] there, \[32, 16\] here; .* and \d+ more\."
    with pytest.raises(mokd_fast.UserError, match=message) as error:
        pretrain(recipe, run=tmp_path / "run", warm_start=before, console=silent())
    assert str(error.value).count(" there, ") == 3
    with pytest.raises(mokd_fast.UserError, match="no such run folder or checkpoint"):
        pretrain(recipe, run=tmp_path / "run", warm_start=tmp_path / "no", console=silent())
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_checkpoint_from_before_the_centres_had_their_names(uninterrupted, tmp_path):
    _, run = uninterrupted
    state = final_state(run)
    names = {k: k.replace("centers.", "center_") for k in state["model"]}
    torch.save(state | {"model": {names[k]: v for k, v in state["model"].items()}},
               tmp_path / "1.pt")  # fmt: skip
    old = torch.load(tmp_path / "1.pt", weights_only=True)
    del old["versions"]  # and no checksum either
    torch.save(old, tmp_path / "1.pt")
    with pytest.raises(mokd_fast.UserError, match=r"another version of mokd_fast: centers.mlp_1"):
        mokd_fast.load_run(tmp_path / "1.pt")


def test_a_gpu_that_is_not_there(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(mokd_fast.UserError, match=r"train.device=cuda but this torch sees no CUDA"):
        Trainer(small(data, "train.device=cuda"), tmp_path / "run", silent())


@pytest.mark.parametrize(("precision", "fast"), [("fp32", Linear), ("bf16", Conv2d)])
def test_a_step_is_made_the_fast_way(data, tmp_path, precision, fast):
    """The layers are quickened, and one model's backward comes before the next one's forward."""
    models = model("resnet18", SGD, kwargs={"layers": [1, 1, 1, 1]}), VIT
    recipe = small(data, f"train.precision={precision}", models=models)
    trainer = Trainer(recipe, tmp_path / "run", silent())
    assert any(type(module) is fast for module in trainer.mokd.modules())
    order = []
    for i, student in enumerate(trainer.mokd.students, start=1):
        student.register_forward_hook(lambda *_, i=i: order.append(f"forward {i}"))
        student.mlp_head.mlp[0].weight.register_post_accumulate_grad_hook(
            lambda _, i=i: order.append(f"backward {i}")
        )
    trainer.step(0, trainer.loader.batches(0))
    assert order == ["forward 1", "backward 1", "forward 2", "backward 2"]


@pytest.mark.skipif(cpu.fp32_why_not() is not None, reason="needs products of our own in fp32")
@pytest.mark.parametrize(("accumulate", "shared"), [(1, False), (2, False), (1, True)])
def test_a_norm_that_backward_has_seen_is_of_the_whole_gradient(
    data, tmp_path, monkeypatch, accumulate, shared
):
    recipe = small(
        data,
        f"train.accumulate={accumulate}",
        models=[model("mokd_vit_tiny", mlp_head={**HEAD, "bottleneck": 32, "batch_norm": False})],
        t_head=None,
    )
    trainer = Trainer(recipe, tmp_path / "run", silent())
    trainer.mokd.train()
    if shared:  # as DistributedDataParallel stands before the networks
        trainer.network = lambda *args: trainer.mokd(*args)
    known = []

    def looked_at(parameters, seen):
        parameters = list(parameters)
        known.append(dict(seen or {}))
        for parameter, norm in known[-1].items():
            torch.testing.assert_close(norm, parameter.grad.norm(), rtol=1e-5, atol=0)
        return grad_norms(parameters, seen)

    monkeypatch.setattr("mokd_fast.train.loop.grad_norms", looked_at)
    batches = trainer.loader.batches(0)
    for k in range(2):
        trainer.step(k, batches)
    assert [len(seen) for seen in known] == [accumulate == 1 and not shared] * 2


def test_a_resume_in_another_precision_is_said(data, tmp_path, monkeypatch):
    """auto on a machine that chooses otherwise."""
    recipe = small(data, "train.precision=auto", models=[VIT], t_head=None)
    choose = "mokd_fast.train.loop.choose_precision"
    monkeypatch.setattr(choose, lambda wish, device: ("fp32", "here"))
    broken_off(recipe, tmp_path / "run", 4)
    monkeypatch.setattr(choose, lambda wish, device: ("bf16", "there"))
    console = silent()
    Trainer(recipe, tmp_path / "run", console).lock.release()
    assert "not bit-equal" in console.file.getvalue()
    assert "precision fp32 then, bf16 now" in console.file.getvalue()
