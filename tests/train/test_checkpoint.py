"""Checkpoints: whole or not there, no code in them, only for the recipe that wrote them."""

import copy
import os
from pathlib import Path

import pytest
import torch

from mokd_fast import UserError
from mokd_fast.train.checkpoint import (
    Damaged,
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    newest,
    save_checkpoint,
    way_out,
)
from mokd_fast.train.resume import resumable
from tests.train.recipes import small

RECIPE = small("pictures").model_dump(mode="json")


def state(step: int, **more) -> dict:
    found = {"step": step, "recipe": copy.deepcopy(RECIPE), "data": "abc", "loader": "cpu"}
    return {**found, "versions": {}, "x": torch.arange(step), **more}


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


def test_the_number_that_is_kept(tmp_path):
    for step in range(1, 6):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / "checkpoints", step, state(step), keep=3)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [
        f"0000000{step}.pt" for step in (3, 4, 5)
    ]


def test_plain_torch_load_takes_the_file(tmp_path):
    path = last_checkpoint(saved(tmp_path, 40))
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(40))


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    path = last_checkpoint(saved(tmp_path, 1000))
    whole = path.read_bytes()
    for offset in [*range(0, len(whole), 97), *range(len(whole) - 90, len(whole))]:
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match=r"not a readable checkpoint: .*checksum is"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1000


def test_a_file_that_ends_early_is_found(tmp_path):
    path = last_checkpoint(saved(tmp_path, 1000))
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 997), *range(len(whole) - 90, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged, match="not a readable checkpoint"):
            load_checkpoint(path)


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, caplog):
    run = saved(tmp_path, 3, 7)
    bad = run / "checkpoints" / "00000007.pt"
    bad.write_bytes(bad.read_bytes()[:-1])
    path, found = newest(run)
    assert found["step"] == 3 and path.name == "00000003.pt"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(bad) in warning and "checksum is" in warning and "00000003.pt is used" in warning
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["00000003.pt", "00000007.pt.damaged"]
    saved(run, 7, 9)  # it is not counted as one that is kept
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["00000007.pt", "00000009.pt"]


def test_a_run_does_not_begin_again_when_all_are_damaged(tmp_path):
    run = saved(tmp_path, 3, 7)
    for path in checkpoints(run / "checkpoints"):
        path.write_bytes(path.read_bytes()[:50])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint of .* can be used") as error:
            resumable(run, RECIPE, "abc", "cpu")
        assert "00000003.pt" in str(error.value) and "00000007.pt" in str(error.value)
        assert "--run" in str(error.value)


def test_a_checkpoint_from_before_checksums(tmp_path, caplog):
    old = state(3)
    del old["versions"], old["loader"], old["recipe"]["train"]["keep_checkpoints"]
    (tmp_path / "checkpoints").mkdir()
    torch.save(old, tmp_path / "checkpoints" / "00000003.pt")
    found = resumable(tmp_path, RECIPE, "abc", "pillow")  # the only loader there was
    assert found["step"] == 3  # a key that is new has its default
    assert "has no checksum: an older mokd_fast wrote it" in caplog.text


def test_another_number_of_processes(tmp_path):
    run = saved(tmp_path, 3)
    with pytest.raises(UserError, match="is of 1 processes, now there are 2"):
        resumable(run, RECIPE, "abc", "cpu", world=2)


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
    assert resumable(tmp_path, RECIPE, "abc", "cpu") is None  # nothing there yet
    run = saved(tmp_path, 3)
    assert resumable(run, RECIPE, "abc", "cpu")["step"] == 3
    other = small("pictures", "train.seed=5", "models.1.optimizer.lr=0.5", "t_head.depth=1")
    with pytest.raises(UserError, match="of another recipe") as error:
        resumable(run, other.model_dump(mode="json"), "abc", "cpu")
    for line in (
        "models.1.optimizer.lr: 0.001 there, 0.5 now",
        "t_head.depth: 2 there, 1 now",
        "train.seed: 0 there, 5 now",
        "--run",
    ):
        assert line in str(error.value)
    assert str(error.value).count(" there, ") == 3
    with pytest.raises(UserError, match=r"another list of pictures.*--run"):
        resumable(run, RECIPE, "another", "cpu")
    with pytest.raises(UserError, match=r"of the cpu loader, now it is dali. Set data.loader=cpu"):
        resumable(run, RECIPE, "abc", "dali")


@pytest.mark.parametrize(
    "free",
    [
        "data.workers=3",
        "data.loader=cpu",
        "train.device=cpu",
        "train.pack_crops=false",
        "train.log_every=7",
        "train.checkpoint_every=1it",
    ],
)
def test_keys_that_change_nothing_of_the_result_are_free(tmp_path, free):
    run = saved(tmp_path, 3)
    assert (
        resumable(run, small("pictures", free).model_dump(mode="json"), "abc", "cpu")["step"] == 3
    )


def test_the_way_out_names_the_last_checkpoint(tmp_path):
    assert "No checkpoint was written yet" in way_out(tmp_path)
    assert "00000003.pt" in way_out(saved(tmp_path, 3)) and "learning rate" in way_out(tmp_path)
