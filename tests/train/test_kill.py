"""kill -9 at any moment, then the same command: bit-equal to the run in one piece."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mokd_fast.train.checkpoint import last_checkpoint, load_checkpoint
from mokd_fast.train.loop import pretrain
from tests.train.process import Child
from tests.train.recipes import CNN, T_HEAD, VIT, pictures, silent, small
from tests.train.test_loop import metrics

DROP = {**VIT, "drop_path": 0.3}  # draws from torch's generator: its state must come back
MODELS = {
    "cnn+vit": ({**CNN, "t_head_optimizer": T_HEAD}, DROP),
    "vit+vit": (DROP, DROP),
    "accumulation": (CNN, DROP),
}
TIMES = ("images_per_s", "data_wait")


class Run:
    """A recipe, its uninterrupted run, and processes that are killed."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.out = folder, folder / "killed"
        parts = 3 if kind == "accumulation" else 1
        recipe = small(
            pictures(folder / "data", 14), f"train.accumulate={parts}",
            f"train.batch={6 if parts > 1 else 4}", "train.duration=12it", "train.log_every=1",
            "train.checkpoint_every=3it", "data.workers=1", "train.warmup=2it",
            models=MODELS[kind],
        )  # fmt: skip
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        self.whole = pretrain(recipe, run=folder / "whole", console=silent())

    @property
    def words(self) -> tuple:
        return "pretrain", self.recipe, "--run", self.out

    def kill_at(self, condition, pause: float = 0, *, fork: bool = False) -> bool:
        """Starts the run and kills it `pause` seconds after `condition()` holds; False if it had
        ended before."""
        log = self.folder / "output.txt"
        with open(log, "w") as file:
            if fork:
                pid = Child(self.folder, *self.words).pid
            else:
                command = [sys.executable, "-m", "mokd_fast.cli", *map(str, self.words)]
                pid = subprocess.Popen(command, stdout=file, stderr=file).pid
        end = time.monotonic() + 120
        while not condition():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                said = [file.read_text() for file in self.folder.glob("*.txt")]
                assert status == 0, said
                return False
            assert time.monotonic() < end, log.read_text()
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def step(self) -> int:
        """The step of the last row that is there."""
        path = self.out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def saving(self) -> bool:
        return any((self.out / "checkpoints").glob("*.tmp"))

    def finish(self) -> str:
        code, output, error = Child(self.folder, *self.words).wait()
        assert code == 0, error
        return output

    def check(self) -> None:
        """Model with its centres, optimizers, generator and metrics are those of the whole run."""
        one, two = (load_checkpoint(last_checkpoint(run)) for run in (self.whole, self.out))
        for part in ("model", "optimizers", "rng", "step", "bad_files"):
            assert equal(one[part], two[part]), part
        for mine, theirs in zip(metrics(self.out), metrics(self.whole), strict=True):
            assert mine.keys() == theirs.keys()
            assert {k: v for k, v in mine.items() if k not in TIMES} == {
                k: v for k, v in theirs.items() if k not in TIMES
            }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_equal_sees_a_difference():
    state = {"a": [torch.ones(2), {"b": 1}]}
    assert equal(state, {"a": [torch.ones(2), {"b": 1}]})
    assert not equal(state, {"a": [torch.tensor([1.0, 1.0001]), {"b": 1}]})
    assert not equal(state, {"a": [torch.ones(2), {"b": 2}]})


def test_killed_amid_an_epoch_and_amid_a_save(tmp_path):
    run = Run(tmp_path, "cnn+vit")
    assert run.kill_at(lambda: run.step() >= 4, fork=True)
    assert run.kill_at(run.saving, fork=True)
    assert run.saving(), "the kill did not meet the save"
    assert "resuming" in run.finish() and not run.saving()
    run.check()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("cnn+vit", 7), ("vit+vit", 7), ("accumulation", 6)])
def test_twenty_kills(tmp_path, kind, kills, monkeypatch):
    """Of `python -m mokd_fast.cli`, each at a random step and a random moment of it; every third
    amid a save."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draw, run = random.Random(kind), Run(tmp_path, kind)
    done = amid = 0
    while done < kills:
        run.out = tmp_path / f"killed{draw.random()}"
        if done % 3 == 2:
            step, pause = draw.randrange(8), 0.0
            killed = run.kill_at(lambda least=step: run.saving() and run.step() >= least)
        else:
            step, pause = draw.randrange(11), draw.uniform(0, 0.1)
            killed = run.kill_at(lambda least=step: run.step() >= least, pause)
        if not killed:
            continue  # it was faster than this loop, which is no kill
        done, amid = done + 1, amid + run.saving()
        print(f"kill {done}: row {run.step()}, amid a save: {run.saving()}")
        run.finish()
        run.check()
    assert amid, "no kill met a save"
