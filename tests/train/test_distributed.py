"""Several processes: the curve of one with the same batch, one run folder, exact resume."""

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mokd_fast import UserError, cli, pretrain
from mokd_fast.train.checkpoint import last_checkpoint, load_checkpoint
from mokd_fast.train.distributed import Place, World, place, slurm_master
from tests.train.process import Child
from tests.train.recipes import CNN, SGD, VIT, pictures, silent, small

PAIR = [{**VIT, "name": "test_vit"}] * 2  # without BatchNorm, which sees a process's pictures
# At the small recipe's rate of 0.05 a BatchNorm network makes 1e-4 of a rounding in six steps.
MODELS = {**CNN, "optimizer": {**SGD, "lr": 0.005}}, PAIR[0]
AGAIN = "train.checkpoint_activations=true"
SIZES = {"global_size": 32, "local_size": 16, "locals": 2}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(recipe, folder, size, **environment):
    """`size` processes as a launcher starts them."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "mokd_fast", "pretrain", path, "--run", folder]
    return [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(size)
    ]


def fork(recipe, folder, size, *words, before=lambda: None):
    """The same in forks of the tests, which have imported torch already, to their end."""
    return [child.wait(200) for child in forks(recipe, folder, size, *words, before=before)]


def forks(recipe, folder, size, *words, before=lambda: None):
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    port = free_port()

    def ranked(rank):
        os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        before()

    return [
        Child(folder.with_name(f"{folder.name} {rank}"), "pretrain", path, *words,
              before=functools.partial(ranked, rank))
        for rank in range(size)
    ]  # fmt: skip


def wait(processes):
    out = [p.communicate(timeout=200)[0] for p in processes]
    return [p.returncode for p in processes], out


def losses(run):
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("loss", "self", "cross", "search"))}
            for row in rows]  # fmt: skip


def recipe_of(data, *more, models=PAIR):
    changes = ("train.batch=8", "train.log_every=1", "train.checkpoint_every=2it", *more)
    return small(data, *changes, models=models, augment=SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("many") / "data", 26)


def test_two_processes_are_one_with_the_same_batch(data, tmp_path):
    """Losses and weights to the rounding of other sums; one folder, one voice, and a stop."""
    recipe = recipe_of(data, "train.accumulate=2")
    whole = pretrain(recipe, run=tmp_path / "one", console=silent())
    codes, out = wait(start(recipe, tmp_path / "two", 2))
    assert codes == [0, 0], out
    assert "step 12/12" in out[0] and out[1] == ""
    one, two = losses(whole), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    one, two = (load_checkpoint(last_checkpoint(tmp_path / n)) for n in ("one", "two"))
    assert two["world"] == 2 and len(two["rng of the others"]) == 1
    for name, value in one["model"].items():
        if not name.endswith("qkv.bias"):  # a key's has no gradient; AdamW makes steps of its noise
            torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    of_one = ("--run", tmp_path / "one")
    found = fork(recipe_of(data), tmp_path / "again", 2, *of_one)
    assert [code for code, *_ in found] == [2, 2], found
    assert "is of another recipe" in found[0][2] and found[1][1:] == ("", "")


def changed_by(one, two):
    """The largest difference between the networks' parameters of two runs, and its name."""
    one, two = (load_checkpoint(last_checkpoint(run))["model"] for run in (one, two))
    return max(
        (float((one[name] - two[name]).abs().max()), name)
        for name in one
        if "running_" not in name and "num_batches" not in name
        and not name.endswith("qkv.bias")  # a key's has no gradient; AdamW makes steps of its noise
    )  # fmt: skip


@pytest.mark.parametrize(
    ("models", "size", "again"),
    [
        pytest.param("vit+vit", 4, False, marks=pytest.mark.slow),
        ("cnn+vit", 2, False),
        pytest.param("cnn+vit", 2, True, marks=pytest.mark.slow),
        ("cnn+vit", 4, False),
    ],
)
def test_processes_are_one_that_takes_their_parts_in_turn(data, tmp_path, models, size, again):
    """One process with train.accumulate=`size` takes the same pictures in the same parts, each of
    them a BatchNorm batch: its curve is theirs. With two to the bit (a sum of two has one order),
    with four to the rounding of another order (with this seed: with others that turns a ReLU over,
    and BatchNorm's gradients jump). Running statistics are of each one's own parts.
    again: the processes checkpoint activations.
    """
    models = PAIR if models == "vit+vit" else MODELS
    more = ("train.seed=2", *["train.checkpoint_activations=true"] * again)
    recipe = recipe_of(data, "train.duration=2ep", *more, models=models)
    found = fork(recipe, tmp_path / "many", size, "--run", tmp_path / "many")
    assert [code for code, *_ in found] == [0] * size, found
    parts = ("train.seed=2", f"train.accumulate={size}")
    alone = recipe_of(data, "train.duration=2ep", *parts, models=models)
    run = pretrain(alone, run=tmp_path / "one", console=silent())
    one, many = losses(run), losses(tmp_path / "many")
    assert len(one) == len(many) == 6
    for mine, theirs in zip(many, one, strict=True):
        assert mine == pytest.approx(theirs, rel=0 if size == 2 else 3e-6, abs=0)
    difference, name = changed_by(run, tmp_path / "many")
    assert difference <= (0 if size == 2 else 3e-5), name


def test_a_dry_run_leaves_its_process_group(data, tmp_path):
    def watched():
        main = cli.main

        def then_look():
            try:
                main()
            finally:  # it ends by SystemExit
                assert not torch.distributed.is_initialized(), "still there"

        cli.main = then_look  # of this fork alone

    recipe = recipe_of(data, "train.duration=4ep")
    first, other = fork(recipe, tmp_path / "dry", 2, "--dry-run", before=watched)
    assert (first[0], other[0]) == (0, 0), (first, other)
    assert "12 steps of" in " ".join(first[1].split()) and other[1] == ""


def test_a_process_without_memory_tries_no_steps(data, tmp_path):
    """The others would average theirs with those of black pictures, and may save that."""
    from mokd_fast.train.optim import ScheduledOptimizer

    def short():
        step, steps = ScheduledOptimizer.step, itertools.count()

        def failing(self, *args):
            # Two optimizers.
            if next(steps) == 2 * 4 and os.environ["RANK"] == "1":
                raise torch.OutOfMemoryError("CUDA out of memory")
            step(self, *args)

        ScheduledOptimizer.step = failing  # of this fork alone

    recipe = recipe_of(data, "train.duration=4ep", "train.checkpoint_every=1it")
    run = tmp_path / "run"
    first, other = fork(recipe, run, 2, "--run", run, before=short)
    assert other[0] == 2 and "out of memory in step 5" in other[2], other
    assert f"Set {AGAIN} or loss.prototypes=fused-linear and the run goes on" in other[2], other
    assert first[0] not in (0, 2)
    alone = pretrain(recipe_of(data, "train.duration=4ep", "train.accumulate=2"),
                     run=tmp_path / "one", console=silent())  # fmt: skip
    assert losses(run) == losses(alone)[: len(losses(run))] and len(losses(run)) in (4, 5)


def child(parent, variable):
    """The process that torchrun `parent` started with this environment variable, if it lives."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and variable in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
    return None


@pytest.mark.slow
def test_torchrun_starts_again_after_a_death(data, tmp_path):
    """From the last checkpoint, and bit-equal to two processes that were not stopped."""
    recipe = recipe_of(data, "train.duration=24ep")
    codes, out = wait(start(recipe, tmp_path / "whole", 2))
    assert codes == [0, 0], out
    run = tmp_path / "parts"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--max-restarts", "1", "-m", "--", "mokd_fast", "pretrain",
               tmp_path / "whole.yaml", "--run", run]  # fmt: skip
    with subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as torchrun:  # fmt: skip
        while not list(run.glob("checkpoints/*.pt")):
            assert torchrun.poll() is None
            time.sleep(0.05)
        os.kill(child(torchrun.pid, "LOCAL_RANK=1"), signal.SIGKILL)
        said = torchrun.communicate(timeout=200)[0]
    assert torchrun.returncode == 0, said
    assert f"resuming {run} from step" in said
    whole, parts = (load_checkpoint(last_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_sigterm_stops_all_of_them_at_one_step(data, tmp_path):
    run = tmp_path / "run"
    first, told = forks(recipe_of(data, "train.duration=60ep"), run, 2, "--run", run)
    first.until(lambda: list(run.glob("checkpoints/*.pt")))
    os.kill(told.pid, signal.SIGTERM)
    found = [child.wait(200) for child in (first, told)]
    assert [code for code, *_ in found] == [143, 143], found
    assert load_checkpoint(last_checkpoint(run))["step"] < 180


def test_another_list_of_pictures_in_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "gather", lambda _, value: [value, "another"])
    with pytest.raises(UserError, match="is another list of pictures in process 1 than in process"):
        pretrain(recipe_of(data), run=tmp_path / "run", console=silent())
    assert not (tmp_path / "run").exists()


def test_where_launchers_put_a_process():
    assert place({}) == Place(0, 1, 0)
    assert place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    assert place(slurm) == Place(0, 1, 0)  # sbatch's own shell: no step of srun
    slurm |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[003-004,7]"}
    assert place(slurm) == Place(3, 4, 1)
    assert slurm_master({**slurm, "SLURM_JOB_ID": "40001"}) == ("gpu003", "20001")
    assert slurm_master({"SLURM_STEP_NODELIST": "a-1,b-2"}) == ("a-1", "20000")
    with pytest.raises(UserError, match="names no node"):
        slurm_master({"SLURM_STEP_NODELIST": ""})
