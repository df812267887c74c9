"""Weights & Biases: through a stand-in of its package, and the real one offline where it is."""

import importlib.util
import json
import struct
import sys
import types

import pytest
import torch

import mokd_fast
from mokd_fast.train.loop import pretrain
from mokd_fast.train.wandb_log import WandB
from tests.train.recipes import VIT, broken_off, pictures, silent, small
from tests.train.test_loop import final_state, metrics

REAL = importlib.util.find_spec("wandb")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("wandb") / "data", 14)


class Settings:
    model_fields = ("console", "finish_timeout")

    def __init__(self, **values):
        self.values = values


class Server(types.ModuleType):
    """The package, and what its server remembers: runs by id."""

    def __init__(self):
        super().__init__("wandb")
        self.Settings = Settings
        self.runs: dict[str, Run] = {}
        self.calls: list[dict] = []
        self.fail_at = self.refuse = None

    def init(self, **options):
        if self.refuse:
            raise RuntimeError(f"{self.refuse}\nmore")
        self.calls.append(options)
        run = self.runs.setdefault(options["id"], Run(self))
        return run


class Run:
    def __init__(self, server):
        self.server, self.rows, self.ends = server, [], []

    @property
    def step(self):
        """As W&B's: of the next row."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    def log(self, values, step):
        if step == self.server.fail_at:
            raise ConnectionError("the network is gone\nsecond line")
        assert step >= self.step, "W&B would drop it, with a warning"
        self.rows.append({"step": step, **values})

    def finish(self, exit_code):
        self.ends.append(exit_code)
        if self.server.fail_at == "end":
            raise TimeoutError("not all was sent")


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def recipe_of(data, *more, project="mine"):
    changes = (f"train.wandb={project}", "train.checkpoint_every=3it", "train.log_every=1")
    return small(data, *changes, *more, models=[VIT], t_head=None)


def test_every_row_with_the_recipe(data, tmp_path, server):
    recipe = recipe_of(
        data, f"evaluate.train={data}", f"evaluate.test={data}", "evaluate.every=6it"
    )
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    (options,), (there,) = server.calls, server.runs.values()
    assert there.rows == metrics(run) and len(there.rows) == 12 and "knn_1_k10" in there.rows[5]
    assert there.ends == [0]
    assert options["project"] == "mine" and options["name"] == "run" and options["dir"] == str(run)
    assert options["config"] == recipe.model_dump(mode="json")
    assert options["settings"].values == {"console": "off", "finish_timeout": 300}


def test_a_run_that_goes_on_is_the_same_there(data, tmp_path, server):
    """Killed two steps after a checkpoint: no row is sent twice, none is missing."""
    broken_off(recipe_of(data), tmp_path / "run", 8)
    run = pretrain(recipe_of(data), run=tmp_path / "run", console=silent())
    (there,) = server.runs.values()
    assert [row["step"] for row in there.rows] == list(range(1, 13))
    for mine, theirs in zip(metrics(run), there.rows, strict=True):
        assert mine["loss_1"] == theirs["loss_1"]
    assert there.ends == [1, 0] and len(server.calls) == 2
    assert [options["resume"] for options in server.calls] == ["allow"] * 2
    pretrain(recipe_of(data), run=tmp_path / "other", console=silent())
    assert len(server.runs) == 2
    pretrain(recipe_of(data, project=""), run=run, console=silent())  # the key may change


@pytest.mark.parametrize("fail_at", [5, "end"])
def test_what_fails_on_the_way_is_said_once(data, tmp_path, server, fail_at):
    server.fail_at, console = fail_at, silent()
    run = pretrain(recipe_of(data), run=tmp_path / "run", console=console)
    (there,) = server.runs.values()
    assert len(metrics(run)) == 12 and len(there.rows) == (4 if fail_at == 5 else 12)
    reason = "the network is gone" if fail_at == 5 else "not all was sent"
    line = f"W&B failed and is switched off, the training goes on ({reason})\n"
    assert console.file.getvalue().count("W&B") == 1 and line in console.file.getvalue()


def test_a_start_that_fails(data, tmp_path, server, monkeypatch):
    """A new run says how to mend it; one that goes on (at night, by itself) goes on."""
    server.refuse = "No API key configured"
    message = r"train.wandb=mine: W&B does not start \(No API key configured\). Log in .*offline"
    with pytest.raises(mokd_fast.UserError, match=message):
        pretrain(recipe_of(data), run=tmp_path / "run", console=silent())
    pretrain(recipe_of(data, project=""), run=tmp_path / "run", console=silent())
    last = max((tmp_path / "run/checkpoints").glob("*.pt"))
    last.unlink()
    console = silent()
    run = pretrain(recipe_of(data), run=tmp_path / "run", console=console)
    assert "W&B failed and is switched off" in console.file.getvalue()
    assert metrics(run)[-1]["step"] == 12


def test_a_package_that_is_not_there(data, tmp_path, monkeypatch):
    for missing in (None, types.ModuleType("wandb")):  # the second: a folder of that name
        monkeypatch.setitem(sys.modules, "wandb", missing)
        with pytest.raises(
            mokd_fast.UserError, match=r"mine needs .*pip install 'mokd_fast\[wandb\]'"
        ):
            pretrain(recipe_of(data), run=tmp_path / "run", console=silent())
    assert not (tmp_path / "run").exists(), "nothing is made before the mistake is known"


def test_without_a_project_nothing_is_imported(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = pretrain(recipe_of(data, project=""), run=tmp_path / "run", console=silent())
    assert len(metrics(run)) == 12 and not (run / "wandb_id.txt").exists()


def test_a_dry_run_is_no_run_there(data, server):
    from mokd_fast.train.dry import dry_run

    dry_run(recipe_of(data), silent())
    assert server.calls == []


def test_only_the_first_process_has_it(monkeypatch):
    """The others neither import the package nor send a row."""
    monkeypatch.setitem(sys.modules, "wandb", None)

    class Other:
        def decide(self, act):
            return None

    trainer = types.SimpleNamespace(say=print, world=Other())
    log = WandB("mine", Other())
    log.begin(trainer)
    log.add({"step": 1, "loss_1": 2.0})
    log.finish(failed=False)


def history(file):
    """The rows in a .wandb file: records of LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    raw, at, part, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        part += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(part)
            part = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.skipif(not REAL, reason="wandb is not installed")
def test_the_real_package_offline(data, tmp_path, monkeypatch):
    """Two processes' files of one id hold what each logged; nobody's random numbers are touched."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe, plain = (recipe_of(data, "train.duration=2ep", project=p) for p in ("mine", ""))
    plain = pretrain(plain, run=tmp_path / "plain", console=silent())
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    (run / "checkpoints/00000006.pt").unlink()
    pretrain(recipe, run=run, console=silent())
    one, two = final_state(plain), final_state(run)
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    name = (run / "wandb_id.txt").read_text().strip()
    files = sorted((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    found = [history(file) for file in files]
    assert [[row["_step"] for row in rows] for rows in found] == [[1, 2, 3, 4, 5, 6], [4, 5, 6]]
    for row, theirs in zip(found[0], metrics(plain), strict=True):
        assert theirs.keys() - {"step"} <= row.keys()
        assert row["loss_1"] == pytest.approx(theirs["loss_1"], rel=1e-12)
