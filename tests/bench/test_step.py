"""The step benchmark on a tiny case, and the timer under it."""

import json
import socket
from pathlib import Path

import pytest

from bench import step, timing


def test_interleave_takes_turns_and_leaves_the_first_round_out(monkeypatch):
    calls, now = [], [0.0]
    lasts = {"a": iter([100, 1, 3, 2]), "b": iter([100, 5, 7, 6])}  # seconds, round by round

    def run(name: str) -> None:
        calls.append(name)
        now[0] += next(lasts[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    runs = {name: lambda name=name: run(name) for name in lasts}
    assert timing.interleave(runs, rounds=3) == {"a": 2.0, "b": 6.0}
    assert calls == ["a", "b"] * 4


def test_machine_names_versions_and_no_host():
    facts = timing.machine()
    assert {"cpu", "cores", "torch", "python", "commit", "date"} <= facts.keys()
    assert socket.gethostname() not in json.dumps(facts).split('"')


def test_json_file_is_written_with_its_folder(tmp_path: Path):
    path = tmp_path / "new" / "result.json"
    timing.write_json(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}


def test_row_compares_both_steps(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(step.CASES, "tiny", ("fashion-mnist", ["train.batch=4"], 1))
    row = step.time_step("tiny", tmp_path)
    assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
    assert row["median_s"] > 0
    assert (row["op"], row["dtype"], row["backend"]) == ("training step", "fp32", "reference")
    assert "batch 4" in row["shape"]
