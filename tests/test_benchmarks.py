"""`mokd-fast bench`: each benchmark a process, what fails stops no other, and where figures go."""

import json
import os

import pytest
import torch

from bench import timing
from mokd_fast import UserError, benchmarks
from mokd_fast.benchmarks.table import ratios

GOOD = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--json") + 1])
row = {"op": "o", "backend": "cpu", "dtype": "float32", "baseline": "official", "ratio": 2.0}
out.write_text(json.dumps({"rows": [row], "words": sys.argv[3:], "script": Path(__file__).name}))
print("row made")
"""
BAD = GOOD + "sys.exit('no photographs')\n"
CPU = f"cpu-{os.cpu_count()}core"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A checkout whose benchmarks end at once; `search` fails when half is written."""
    folder = tmp_path / "checkout" / "bench"
    folder.mkdir(parents=True)
    for name in (*benchmarks.NAMES, "distill_gpu"):
        (folder / f"{name}.py").write_text(BAD if name == "search" else GOOD)
    monkeypatch.setattr(benchmarks, "folder", lambda: folder)
    monkeypatch.setattr(benchmarks, "_machine_of_a_benchmark", lambda: CPU)
    return folder


def test_all_of_them_run_and_the_failed_one_is_named(run, scripts):
    code, said, error = run("bench")
    out = scripts / "results" / CPU
    assert code == 1 and said.rstrip().endswith("failed: search (their messages stand above)")
    assert said.count("row made") == 6 and "no photographs" in error
    assert {path.stem for path in out.glob("*.json")} == {
        *benchmarks.NAMES, "search.partial"
    } - {"search"}  # fmt: skip
    assert json.loads((out / "step.json").read_text())["words"] == []
    assert f"written to {out / 'step.json'}" in said and "2.00x" in said


def test_a_failure_leaves_the_published_figures_alone(run, scripts):
    old = scripts / "results" / CPU / "search.json"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    assert run("bench", "search")[0] == 1 and old.read_text() == "old"


def test_the_named_ones_run_once_and_quick_figures_lie_apart(run, scripts, tmp_path):
    out = tmp_path / "mine"
    code, said, _ = run("bench", "step", "distill", "step", "--quick", "--out", out)
    assert code == 0 and said.count("row made") == 2
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*.json")}
    assert sorted(files) == [f"{CPU}-quick/distill.json", f"{CPU}-quick/step.json"]
    for path in files.values():
        assert json.loads(path.read_text())["words"] == ["--quick"]


def test_the_step_alone_is_told_to_be_full(run, scripts, tmp_path):
    """As the published figures are: they would be lost where the pair is left out."""
    assert run("bench", "step", "data", "--full")[0] == 0
    words = {
        path.stem: json.loads(path.read_text())["words"]
        for path in (scripts / "results" / CPU).glob("*.json")
    }
    assert words == {"step": ["--full"], "data": []}
    assert '"--full"' in (benchmarks.HERE.parents[1] / "bench" / "step.py").read_text()
    code, _, error = run("bench", "step", "--full", "--quick")
    assert code == 2 and "exclude each other" in error


def test_on_a_gpu_the_operators_have_their_own(run, scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, folder in (("NVIDIA H200", "h200"), ("NVIDIA RTX 6000 Ada", "rtx-6000-ada")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        monkeypatch.setattr(benchmarks, "_machine_of_a_benchmark", benchmarks.machine_name)
        assert run("bench", "distill", "data")[0] == 0
        results = {
            name: scripts / "results" / folder / f"{name}.json" for name in ("distill", "data")
        }
        ran = {name: json.loads(path.read_text())["script"] for name, path in results.items()}
        assert ran == {"distill": "distill_gpu.py", "data": "data.py"}


def test_mistakes(run, scripts, tmp_path, monkeypatch):
    for word, hint in (("distil", "Did you mean distill?"), ("steps", "Did you mean step?")):
        code, _, error = run("bench", "data", word)
        assert code == 2 and f"no benchmark '{word}'. {hint} There are distill, " in error
    assert not (scripts / "results").exists(), "nothing runs before the mistake is known"
    (tmp_path / "file").write_text("")
    code, _, error = run("bench", "step", "--out", tmp_path / "file")
    assert code == 2 and "cannot be made: " in error and "--out" in error
    monkeypatch.undo()
    monkeypatch.setattr(benchmarks, "HERE", tmp_path / "a" / "b")
    code, _, error = run("bench")
    assert code == 2 and "the benchmarks are missing" in error and "pip install" in error


def test_the_machine_is_asked_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "mokd_fast.py").write_text("1 / 0")  # as a clone's, which is not what is installed
    monkeypatch.chdir(tmp_path)
    assert benchmarks._machine_of_a_benchmark() == CPU
    monkeypatch.setattr(benchmarks.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="torch, which the benchmarks need, does not work"):
        benchmarks._machine_of_a_benchmark()


def test_ctrl_c_ends_it(run, scripts, monkeypatch):
    def interrupted(*command, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.subprocess, "run", interrupted)
    code, said, _ = run("bench", "distill", "data")
    assert code == 130 and "== data" not in said


def test_without_a_checkout_figures_go_to_the_working_directory(
    run, scripts, tmp_path, monkeypatch
):
    monkeypatch.setattr(benchmarks, "HERE", scripts.parent)
    monkeypatch.chdir(tmp_path)
    assert run("bench", "step")[0] == 0
    assert (tmp_path / "bench-results" / CPU / "step.json").exists()


def test_every_benchmark_is_there_with_the_options_that_are_passed():
    for name in (*benchmarks.NAMES, *(f"{name}_gpu" for name in benchmarks.NAMES[:4])):
        text = (benchmarks.folder() / f"{name}.py").read_text()
        assert '"--json"' in text and '"--quick"' in text, name


def test_ratios_are_ranges_over_shapes(tmp_path):
    row = {"op": "loss", "backend": "cpu", "dtype": "bf16", "shape": {"B": 4}, "baseline": "theirs",
           "ratio": 3.0, "extra_bytes": 1, "baseline_extra_bytes": 4}  # fmt: skip
    pair = {"op": "step", "shape": "a+b", "ratio": 1.5}
    rows = [row, row | {"ratio": 2.0}, row | {"backend": "theirs"}, pair, pair | {"shape": "c+d"}]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "b.json").write_text(json.dumps({"rows": [{"op": "no ratio"}]}))
    lines = [line.split() for line in ratios(tmp_path.glob("*.json")).splitlines()[1:]]
    assert lines == [
        ["loss", "cpu", "bf16", "theirs", "2.00x-3.00x", "0.25", "2"],
        ["step,", "a+b", "official", "1.50x", "-", "1"],
        ["step,", "c+d", "official", "1.50x", "-", "1"],
    ]
    assert ratios([tmp_path / "b.json"]) == ratios([]) == ""


def test_the_commit_is_that_of_the_checkout_only(tmp_path, monkeypatch):
    """A wheel in somebody's repository is not of its commit; a copy is of the one it is told."""
    monkeypatch.delenv("COMMIT", raising=False)
    asked = []
    monkeypatch.setattr(timing, "_said", lambda *command: asked.append(command) or "")
    assert timing._commit() == "of mokd_fast 0.1.0" and "ls-files" in asked[0]
    monkeypatch.setattr(timing, "_said", lambda *command: "abc-dirty")
    assert timing._commit() == "abc-dirty"
    monkeypatch.setenv("COMMIT", "told")
    assert timing._commit() == "told"
    monkeypatch.undo()
    assert timing._said("no-such-command") == timing._said("false") == ""
