"""Checkpoints: whole or not there, no code in them, only for the recipe that wrote them."""

import os
from pathlib import Path

import pytest
import torch

from mokd_fast import UserError
from mokd_fast.train.checkpoint import (
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    way_out,
)
from mokd_fast.train.resume import resumable
from tests.train.recipes import small

RECIPE = small("pictures").model_dump(mode="json")


def state(step: int, **more) -> dict:
    return {"step": step, "recipe": RECIPE, "data": "abc", "x": torch.arange(step), **more}


def saved(run: Path, *steps: int) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for step in steps:
        save_checkpoint(run / "checkpoints", step, state(step))
    return run


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["PROBE"]) / "ran"),)


def test_round_trip_and_the_two_newest_are_kept(tmp_path):
    run = saved(tmp_path, 5, 9, 100)
    assert [path.name for path in checkpoints(run / "checkpoints")] == [
        "00000009.pt",
        "00000100.pt",
    ]
    found = load_checkpoint(last_checkpoint(run))
    assert found["step"] == 100 and torch.equal(found["x"], torch.arange(100))
    assert found["recipe"] == RECIPE


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("zip")])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    run = saved(tmp_path, 2, 4)
    before = {path: path.read_bytes() for path in checkpoints(run / "checkpoints")}

    def half(_, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    for step in (4, 6):  # over an old one, and a new one
        with pytest.raises(UserError, match=rf"0000000{step}.pt cannot be written"):
            save_checkpoint(run / "checkpoints", step, state(step))
    assert {p: p.read_bytes() for p in (run / "checkpoints").iterdir()} == before


def test_written_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    saved(tmp_path, 1)
    assert calls == ["fsync", "rename", "fsync"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, state(1))


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE", str(tmp_path))
    path = tmp_path / "1.pt"
    torch.save(state(1, trap=Code()), path)
    with pytest.raises(UserError, match="holds Python objects, which are never loaded") as error:
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(error.value), "no advice to load it all the same"


def test_damaged_and_foreign_files(tmp_path):
    whole = last_checkpoint(saved(tmp_path, 7)).read_bytes()
    path = tmp_path / "bad.pt"
    for content in (whole[: len(whole) // 2], b"", b"PK no zip", b"text\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.pt is not a readable checkpoint: \w"):
            load_checkpoint(path)
    for foreign in ({"model": {}}, {"step": 3}, [1, 2]):
        torch.save(foreign, path)
        with pytest.raises(UserError, match=r"bad.pt is not a checkpoint of mokd-fast"):
            load_checkpoint(path)
    with pytest.raises(UserError, match=r"gone.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "gone.pt")


def test_only_the_same_recipe_and_data_go_on(tmp_path):
    assert resumable(tmp_path, RECIPE, "abc") is None  # nothing there yet
    run = saved(tmp_path, 3)
    assert resumable(run, RECIPE, "abc")["step"] == 3
    other = small("pictures", "train.seed=5", "models.1.optimizer.lr=0.5", "t_head.depth=1")
    with pytest.raises(UserError, match="of another recipe") as error:
        resumable(run, other.model_dump(mode="json"), "abc")
    for line in (
        "models.1.optimizer.lr: 0.001 there, 0.5 now",
        "t_head.depth: 2 there, 1 now",
        "train.seed: 0 there, 5 now",
        "--run",
    ):
        assert line in str(error.value)
    assert str(error.value).count(" there, ") == 3
    with pytest.raises(UserError, match=r"another list of pictures.*--run"):
        resumable(run, RECIPE, "another")


@pytest.mark.parametrize(
    "free",
    ["data.workers=3", "train.device=cpu", "train.log_every=7", "train.checkpoint_every=1it"],
)
def test_keys_that_change_nothing_of_the_result_are_free(tmp_path, free):
    run = saved(tmp_path, 3)
    assert resumable(run, small("pictures", free).model_dump(mode="json"), "abc")["step"] == 3


def test_the_way_out_names_the_last_checkpoint(tmp_path):
    assert "No checkpoint was written yet" in way_out(tmp_path)
    assert "00000003.pt" in way_out(saved(tmp_path, 3)) and "learning rate" in way_out(tmp_path)
