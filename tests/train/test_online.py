"""Online kNN: the scores of `mokd-fast knn`, and a training that does not notice."""

import itertools
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mokd_fast
from mokd_fast.train import online
from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import CNN, VIT, broken_off, model, pictures, silent, small
from tests.train.test_loop import final_state, metrics
from tests.train.test_skipped import HostReads

TIMES = ("images_per_s", "data_wait")
ONE = {"models": [VIT], "t_head": None}  # quicker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("online") / "data", 14)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A bank and queries, (28, 40) pixels: they are resized and cropped."""
    folder = tmp_path_factory.mktemp("labelled")
    return pictures(folder / "train", 30, (28, 40)), pictures(folder / "test", 11, (28, 40))


def recipe_of(
    data, labelled, *more, every="4it", models=(CNN, {**VIT, "drop_path": 0.3}), **sections
):
    """12 steps; drop-path draws from torch's generator, BatchNorm has statistics."""
    roots = [f"evaluate.{k}={path}" for k, path in zip(("train", "test"), labelled, strict=True)]
    changes = ("train.checkpoint_every=3it", "train.log_every=5", "evaluate.k=[1,5]", *roots)
    return small(data, *changes, f"evaluate.every={every}", *more, models=models, **sections)


def scores(run):
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith("knn_")}
        for row in metrics(run)
        if any(k.startswith("knn_") for k in row)
    }


def same_weights(run, other):
    one, two = final_state(run)["model"], final_state(other)["model"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def whole(data, labelled, tmp_path_factory):
    """A run with evaluations; its console, and the states of others' generators around it."""
    console = silent()
    before = random.getstate(), np.random.get_state()[1].copy()
    run = pretrain(
        recipe_of(data, labelled), run=tmp_path_factory.mktemp("w") / "run", console=console
    )
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    return run, console.file.getvalue()


def test_the_weights_are_those_of_a_run_without(whole, data, labelled, tmp_path):
    """And the state of the generator, the optimizers, the losses of every row there is in both."""
    plain = pretrain(recipe_of(data, labelled, every=""), run=tmp_path / "plain", console=silent())
    one, two = final_state(plain), final_state(whole[0])
    same_weights(plain, whole[0])
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    for a, b in zip(one["optimizers"], two["optimizers"], strict=True):
        for i, row in a["state"].items():
            assert all(torch.equal(v, b["state"][i][k]) for k, v in row.items())
    assert scores(plain) == {}
    assert [row["step"] for row in metrics(plain)] == [3, 5, 6, 9, 10, 12]
    assert [row["step"] for row in metrics(whole[0])] == [3, 4, 5, 6, 8, 9, 10, 12]


def test_scores_are_those_of_the_knn_command(whole, labelled):
    run, said = whole
    found = scores(run)
    assert list(found) == [4, 8, 12]
    assert list(found[4]) == ["knn_1_k1", "knn_1_k5", "knn_2_k1", "knn_2_k5"]
    rows = list(mokd_fast.knn(run).values())[:2]
    for i, row in enumerate(rows, start=1):
        assert {k: found[12][f"knn_{i}_k{k}"] for k in ("1", "5")} == row["knn"]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    logged = {event.step: event.value for event in board.Scalars("knn_2_k5")}
    assert logged == {step: pytest.approx(row["knn_2_k5"]) for step, row in found.items()}
    for step, row in found.items():
        assert f"step {step}: knn_1_k1 {row['knn_1_k1']:.2f} %, knn_1_k5" in said


def test_the_evaluated_networks_move(data, labelled, tmp_path, monkeypatch):
    """Not the features of one network three times: a bank of noise would not show it."""
    seen, extract = [], online.extract

    def spied(models, *args, **options):
        found = extract(models, *args, **options)
        seen.append((trainer.done, found[0]["1"]))
        return found[0].copy(), found[1]

    trainer = Trainer(
        recipe_of(data, labelled, "teacher.momentum=0.5", **ONE), tmp_path / "run", silent()
    )
    monkeypatch.setattr(online, "extract", spied)
    trainer.fit()
    assert [done for done, _ in seen] == [4, 4, 8, 8, 12, 12]
    banks = [features for _, features in seen[::2]]
    assert not torch.equal(banks[0], banks[1]) and not torch.equal(banks[1], banks[2])


def test_modes_statistics_and_random_numbers_stay(data, labelled, tmp_path):
    trainer = Trainer(recipe_of(data, labelled), tmp_path / "run", silent())
    trainer.mokd.train()
    frozen = trainer.mokd.teachers[0].backbone
    next(m for m in frozen.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    trainer.step(0, trainer.loader.batches())
    trainer.done = 4
    modes = [m.training for m in trainer.mokd.modules()]
    before = {k: v.clone() for k, v in trainer.mokd.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.random.fork_rng():
        assert len(trainer.knn.scores(trainer, lambda: False)) == 4
        assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in trainer.mokd.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in trainer.mokd.state_dict().items())


def test_a_slow_evaluation_is_no_part_of_the_rate(data, labelled, tmp_path, monkeypatch):
    recipe = recipe_of(data, labelled, "train.log_every=1", "train.duration=2ep", **ONE)
    trainer = Trainer(recipe, tmp_path / "run", silent())
    monkeypatch.setattr(trainer.knn, "scores", lambda *_: time.sleep(1) or {"knn_1_k1": 50.0})
    trainer.fit()
    row = metrics(tmp_path / "run")[4]  # of step 5 alone: 4 pictures, after the second's sleep
    assert row["step"] == 5 and row["images_per_s"] > 4


def test_no_host_read_on_other_steps(data, labelled, tmp_path):
    """Between two evaluations there are those of a run without any."""
    found = []
    for every in ("", "6it"):
        rows = ("train.log_every=100", "train.checkpoint_every=100it")
        recipe = recipe_of(data, labelled, *rows, every=every, **ONE)
        trainer = Trainer(recipe, tmp_path / f"run{every}", silent())
        at, step = [], trainer.step
        with HostReads() as host:
            trainer.step = lambda k, batches, at=at, step=step, host=host: (
                at.append(len(host.found)) or step(k, batches)
            )
            trainer.fit()
        found.append([b - a for a, b in itertools.pairwise(at)])  # of each step and what follows
    without, with_it = found
    assert len(without) == 11 and with_it[5] > without[5]
    del without[5], with_it[5]
    assert without == with_it


def test_a_killed_run_gives_the_same_rows(whole, data, labelled, tmp_path):
    """Killed after the second evaluation; the checkpoint is older."""
    broken_off(recipe_of(data, labelled), tmp_path / "run", 8)
    run = pretrain(recipe_of(data, labelled), run=tmp_path / "run", console=silent())
    one, two = ([{k: v for k, v in row.items() if k not in TIMES} for row in metrics(r)]
                for r in (run, whole[0]))  # fmt: skip
    assert one == two


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_stop_does_not_wait_for_an_evaluation(whole, data, labelled, tmp_path, monkeypatch, when):
    """The checkpoint of the step is written, and the run that goes on makes up for the scores."""
    extract, calls = online.extract, []

    def stopped(*args, progress, **options):
        calls.append(1)

        def tell(done, total):
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            progress(done, total)

        return extract(*args, progress=tell, **options)

    step = Trainer.step

    def told(self, k, batches):
        if k == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, k, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        if when == "during":
            patch.setattr(online, "extract", stopped)
        else:
            patch.setattr(Trainer, "step", told)
        pretrain(recipe_of(data, labelled), run=tmp_path / "run", console=silent())
    assert stop.value.code == 143
    assert final_state(tmp_path / "run")["step"] == 8 and list(scores(tmp_path / "run")) == [4]
    run = pretrain(recipe_of(data, labelled), run=tmp_path / "run", console=silent())
    assert scores(run) == scores(whole[0])
    same_weights(run, whole[0])


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_stop_at_the_last_step_has_its_checkpoint(
    whole, data, labelled, tmp_path, monkeypatch, when
):
    """Whoever asks may kill it soon: the checkpoint comes first, and a finished run that is started
    again makes up for the scores, once."""
    extract, step = online.extract, Trainer.step

    def stopped(*args, progress, **options):
        if trainer.done == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return extract(*args, progress=progress, **options)

    def told(self, k, batches):
        if k == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, k, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        if when == "during":
            patch.setattr(online, "extract", stopped)
        else:
            patch.setattr(Trainer, "step", told)
        trainer = Trainer(recipe_of(data, labelled), tmp_path / "run", silent())
        trainer.fit()
    assert stop.value.code == 143
    assert final_state(tmp_path / "run")["step"] == 12
    assert list(scores(tmp_path / "run")) == [4, 8]
    run = pretrain(recipe_of(data, labelled), run=tmp_path / "run", console=silent())
    assert scores(run) == scores(whole[0])
    console, rows = silent(), (run / "metrics.jsonl").read_text()
    pretrain(recipe_of(data, labelled), run=run, console=console)
    assert "is finished" in console.file.getvalue()
    assert (run / "metrics.jsonl").read_text() == rows
    (run / "metrics.jsonl").unlink()
    assert list(scores(pretrain(recipe_of(data, labelled), run=run, console=silent()))) == [12]


def test_an_evaluation_that_fails_does_not_end_the_run(whole, data, labelled, tmp_path):
    """The pictures go away after the first one."""
    mine = [shutil.copytree(path, tmp_path / path.name) for path in labelled]
    console = silent()
    trainer = Trainer(recipe_of(data, mine), tmp_path / "run", console)
    shutil.rmtree(mine[1])
    trainer.fit()
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:  # of a finished run, which tries again, as well
        patch.setattr(online, "extract", lambda *_, **__: 1 / 0)
        pretrain(recipe_of(data, labelled), run=tmp_path / "run", console=silent())
    assert (tmp_path / "run/metrics.jsonl").read_text() == rows
    assert "step 4: no kNN, the training goes on without (none of the 11 pictures can be read" in (
        said := console.file.getvalue()
    ), said
    assert (
        scores(tmp_path / "run") == {} and [r["step"] for r in metrics(tmp_path / "run")][-1] == 12
    )
    same_weights(tmp_path / "run", whole[0])


def test_mistakes_are_known_before_the_first_step(data, labelled, tmp_path):
    flat, other, broken = tmp_path / "flat", tmp_path / "other", tmp_path / "broken"
    flat.mkdir()
    shutil.copy(next(data.rglob("*.png")), flat / "1.png")
    shutil.copytree(labelled[1], other)
    (other / "class1").rename(other / "class2")
    shutil.copytree(labelled[1], broken)
    for path in broken.rglob("*.png"):
        path.write_bytes(b"nothing")
    good = labelled[0]
    for roots, message in (
        ((good, tmp_path / "no"), r"evaluate.test: .*/no: no such folder"),
        ((flat, good), r"evaluate.train: .*this picture has no label"),
        ((good, other), r"evaluate.train and evaluate.test: train has 2 .*only in test: class2"),
        ((good, broken), r"evaluate.test: none of its first 5 pictures can be read \(.*png: "),
        (("", good), r"evaluate.train is not set"),
    ):
        with pytest.raises(mokd_fast.UserError, match=message):
            pretrain(recipe_of(data, roots), run=tmp_path / "run", console=silent())
    assert not (tmp_path / "run").exists()
    with pytest.raises(mokd_fast.UserError, match=r"evaluate.every: a duration is written 3ep"):
        recipe_of(data, labelled, every="often")
    with pytest.raises(mokd_fast.UserError, match=r"evaluate.every: 0 is no interval; .*'0ep'"):
        recipe_of(data, labelled, every="0ep")


@pytest.mark.slow
def test_a_torchvision_network_and_bf16(data, labelled, tmp_path):
    """Their graph is copied as well; features are fp32, as the command computes them."""
    recipe = recipe_of(
        data, labelled, "train.precision=bf16", "data.channels=3", "data.mean=[0.5,0.5,0.5]",
        "data.std=[0.2,0.2,0.2]", "train.duration=1ep", every="2it",
        models=[model("shufflenet_v2_x0_5", temperature_warmup=dict.fromkeys(
            ("self", "cross", "search"), "0it"))],
        augment={"global_size": 64, "local_size": 32, "locals": 1}, t_head=None,
    )  # fmt: skip
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    found = scores(run)
    assert list(found) == [2, 3]
    row = next(iter(mokd_fast.knn(run).values()))
    assert found[3] == {f"knn_1_k{k}": v for k, v in row["knn"].items()}
