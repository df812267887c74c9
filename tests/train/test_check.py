"""Pictures are checked before training; which are skipped is part of the run."""

import io

import pytest
import torch
from rich.console import Console

from mokd_fast.errors import UserError
from mokd_fast.train.checkpoint import last_checkpoint, load_checkpoint
from mokd_fast.train.loop import Trainer, pretrain
from tests.train.recipes import VIT, pictures, silent, small


@pytest.fixture
def data(tmp_path):
    return pictures(tmp_path / "data", 14)


def recipe(data, *overrides):
    """One model, 6 steps, a checkpoint every 3."""
    more = ("train.duration=6it", "train.checkpoint_every=3it", "data.max_bad=0.5", *overrides)
    return small(data, *more, models=[VIT], t_head=None)


def paths(data):
    return sorted(data.rglob("*.png"))


def broken(path):
    whole = path.read_bytes()
    path.write_bytes(b"broken")
    return whole


def state(run):
    return load_checkpoint(last_checkpoint(run))


def at(monkeypatch, k, do):
    """do() before step k, once."""
    step, done = Trainer.step, []

    def first(self, number, batches):
        if number == k and not done:
            done.append(1)
            do()
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", first)


def test_bad_pictures_are_listed_and_skipped(data, tmp_path):
    one, two = paths(data)[2], paths(data)[9]
    broken(one), two.write_bytes(b"")
    console, run = silent(), tmp_path / "run"
    pretrain(recipe(data), run=run, console=console)
    lines = [line.split("\t") for line in (run / "bad_files.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == [str(one), str(two)]
    assert lines[1][1] == "OSError: empty file (0 bytes)"
    said = f"2 of 14 pictures cannot be read and are skipped, listed in {run}/bad_files.txt: "
    assert f"{said}{one}, {two}\n" in console.file.getvalue()
    found = state(run)
    assert found["known_bad"] == [2, 9] and list(found["bad_files"]) == [str(one), str(two)]


def test_too_many_stop_the_run_before_it_trains(data, tmp_path):
    """After mending the same command runs."""
    before = {path: broken(path) for path in paths(data)[1:]}
    run = tmp_path / "run"
    with pytest.raises(UserError) as error:
        pretrain(recipe(data), run=run, console=silent())
    text = str(error.value)
    assert text.startswith("13 of 14 pictures cannot be read, and data.max_bad=0.5 allows 7. All")
    assert text.count("begins b'broken'") == 5 and "Mend or remove them, or set a larger" in text
    assert len((run / "bad_files.txt").read_text().splitlines()) == 13
    for path, good in before.items():
        path.write_bytes(good)
    pretrain(recipe(data), run=run, console=silent())
    assert not (run / "bad_files.txt").exists() and state(run)["known_bad"] == []


def test_all_bad(data, tmp_path):
    for path in paths(data):
        broken(path)
    with pytest.raises(UserError, match="14 of 14 pictures cannot be read"):
        pretrain(recipe(data, "data.max_bad=1.0"), run=tmp_path / "run", console=silent())


@pytest.mark.parametrize("checked", ["true", "false"])
def test_a_run_that_goes_on_is_one_in_one_piece(checked, data, tmp_path, monkeypatch):
    """After step 3 a bad picture is mended and a good one breaks, with and without a restart."""
    mended, breaks = paths(data)[2], paths(data)[9]
    good, before = broken(mended), breaks.read_bytes()

    def happens():
        mended.write_bytes(good)
        breaks.write_bytes(b"broken")

    with monkeypatch.context() as patch:
        at(patch, 3, happens)
        whole = pretrain(recipe(data), run=tmp_path / "whole", console=silent())
    broken(mended), breaks.write_bytes(before)

    def stops():
        happens()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at(patch, 3, stops)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe(data), run=tmp_path / "cut", console=silent())
    console = silent()
    cut = pretrain(recipe(data, f"data.check={checked}"), run=tmp_path / "cut", console=console)
    one, two = state(whole), state(cut)
    assert one["step"] == two["step"] == 6 and one["known_bad"] == two["known_bad"] == [2]
    assert one["bad_files"] == two["bad_files"]
    assert all(torch.equal(x, two["model"][k]) for k, x in one["model"].items())
    said = "1 pictures that could not be read at first stay out of this run"
    assert (said in console.file.getvalue()) == (checked == "true")
    fresh = pretrain(recipe(data), run=tmp_path / "fresh", console=silent())
    assert state(fresh)["known_bad"] == [9]
    assert not all(torch.equal(x, state(fresh)["model"][k]) for k, x in one["model"].items())


def test_the_bar_of_a_terminal(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mokd_fast.train.check._WORTH_A_LINE", 14)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    Trainer(recipe(data), tmp_path / "run", console).lock.release()
    said = console.file.getvalue()
    assert "checking pictures" in said and "14/14" in said and "checked 14 pictures" in said
    Trainer(recipe(data), tmp_path / "run", console).lock.release()
    assert console.file.getvalue().count("checking") == said.count("checking"), "known by now"
