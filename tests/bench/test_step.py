"""The step benchmark on a tiny case, and the timer under it."""

import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import step, step_parts, step_ways, timing
from mokd_fast.ops import WeightNormed, prototype_linear, self_attention


def test_interleave_takes_turns_and_leaves_the_first_round_out(monkeypatch):
    calls, now = [], [0.0]
    lasts = {"a": iter([100, 1, 3, 2]), "b": iter([100, 5, 7, 6])}  # seconds, round by round

    def run(name: str) -> None:
        calls.append(name)
        now[0] += next(lasts[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    runs = {name: lambda name=name: run(name) for name in lasts}
    assert timing.interleave(runs, rounds=3) == {"a": 2.0, "b": 6.0}
    assert calls == ["b", "a", "a", "b"] * 2


def test_rounds_of_a_busy_machine_are_repeated(monkeypatch):
    others = iter([0, 0, 0, 5, 5, 5, 5, 5])  # read before and after a round; the second is busy
    monkeypatch.setattr(timing, "_others", lambda: float(next(others)))
    times = timing.interleave({"a": lambda: time.sleep(0.01)}, rounds=2)
    assert times.discarded == 1 and times["a"] >= 0.01


def test_peak_bytes():
    def run():
        x = torch.zeros(1 << 20)  # 4 MiB
        del x
        return torch.zeros(1 << 19) + 1  # two of 2 MiB

    assert 4 << 20 <= timing.peak_bytes(run) < 5 << 20


def test_peak_bytes_of_what_the_run_before_left():
    kept = []

    def run():
        kept.clear()
        kept.append(torch.zeros(1 << 20))

    run()
    assert 4 << 20 <= timing.peak_bytes(run) < 5 << 20


def test_machine_names_versions_and_no_host():
    facts = timing.machine()
    assert {"cpu", "cores", "torch", "python", "commit", "date"} <= facts.keys()
    assert socket.gethostname() not in json.dumps(facts).split('"')


def test_json_file_is_written_with_its_folder(tmp_path: Path):
    path = tmp_path / "new" / "result.json"
    timing.write_json(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_row_compares_the_three_steps(tmp_path: Path, monkeypatch, precision):
    monkeypatch.setitem(step.CASES, "tiny", ("fashion-mnist", ["train.batch=4"], 1))
    monkeypatch.setattr(step_ways, "ROUNDS", 1)
    monkeypatch.setattr(step_parts, "SEEN", 1)
    monkeypatch.setattr(step, "SIDE", 256)
    compile_ = torch.compile  # Inductor takes a minute
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, backend="eager", **k))
    row = step.time_step("tiny", precision, tmp_path)
    assert (row["op"], row["dtype"], row["backend"]) == ("training step", precision, "automatic")
    assert row["ratio"] == pytest.approx(row["baseline_s"] / row["median_s"])
    assert row["best_plain_ratio"] == pytest.approx(row["best_plain_s"] / row["median_s"])
    assert row["best_plain_s"] <= row["best_plain_sdpa_s"]
    assert min(row[key] for key in step.PEAKS) > 2**20 and "batch 4" in row["shape"]
    assert row["baseline_flops"] > 1e8 and 0.7 < row["flops"] / row["baseline_flops"] < 1.1
    for name, parts in row["parts"].items():
        assert {*step_parts.NETWORKS, step_parts.PROTOTYPES, step_parts.LOSSES} <= parts.keys()
        assert min(parts.values()) > -1e-4, name  # what is nested was taken from what it lies in
        assert sum(parts[key] for key in step_parts.NETWORKS) > 0.3 * sum(parts.values())
    assert len(row["ways"]) == 8 and all(way["ratio"] > 0 for way in row["ways"].values())
    assert row["ways"]["transformer blocks compiled"]["recompiled"] == 0
    step.say(row)


def test_parts_add_up_and_a_backward_counts_with_its_forward():
    """A part within a part is taken from it; backward goes by the numbers of autograd."""

    def event(name, us, parent=None, number=-1):
        return SimpleNamespace(
            name=name, cpu_time_total=us * 1e6, cpu_parent=parent, sequence_nr=number
        )

    node = "autograd::engine::evaluate_function: Backward0"
    whole = event("part: other", 100)
    students = event("part: students", 20, whole)
    losses = event(f"part: {step_parts.LOSSES}", 30, whole)
    searched = event("part: teachers", 12, losses)
    product = event("aten::linear", 6, losses)
    back = event(node, 9, whole, 2)
    found = step_parts._by_part([
        whole, students, losses, searched,
        event("aten::mm", 5, students, 1), product, event("aten::mm", 5, product, 2),
        event("aten::mm", 4, searched), event(node, 15, whole, 1), back,
        event("aten::mm", 3, back), event(node, 2, whole, -1),
    ])  # fmt: skip
    assert found == {
        "other": 100 - 20 - 30 - 15 - 9 - 2, "students": 20, "teachers": 12,
        step_parts.LOSSES: 30 - 12 + 9 - 6 - 3, step_parts.PROTOTYPES: 6 + 3,
        "backward of networks": 15 + 2,
    }  # fmt: skip


def test_our_kernels_count_as_the_products_they_are(monkeypatch):
    """Of a step: what the reference's products count."""
    qkv = torch.randn(2, 40, 3, 2, 32).bfloat16().requires_grad_()
    x, v, g = torch.randn(12, 64), torch.randn(96, 64), torch.ones(96, 1)
    inputs = [t.requires_grad_() for t in (x, v, g)]

    def run():
        self_attention(qkv).float().sum().backward()
        packed = self_attention(qkv.flatten(0, 1), groups=[(2, 9), (1, 40), (2, 11)])
        packed.float().sum().backward()
        prototype_linear(x, WeightNormed(v, g), torch.bfloat16).float().sum().backward()
        with torch.no_grad():
            prototype_linear(x, v.bfloat16(), torch.bfloat16)

    mine = step_parts.flops(run)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    assert mine == step_parts.flops(run) > 0
    assert all(t.grad is not None for t in inputs)
