"""The step's GPU benchmark on a tiny case and the CPU, and the tables made of what it writes."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from bench import device_parts, step, step_gpu
from bench.report import gpu_step, results

MEANS = ["crops of a ViT packed", "our operators, not the reference", "logits stored"]
FAILING = ["NVIDIA apex's optimizers"]  # needs a GPU


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a run, and its exit status."""
    path = tmp_path_factory.mktemp("step") / "h200" / "step.json"
    compile_ = torch.compile  # Inductor takes a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_gpu, "CASE", "tiny")
        patch.setitem(step.CASES, "tiny", ("fashion-mnist", [], 1))
        patch.setattr(step_gpu, "FEW", 1)
        patch.setattr(torch, "compile", lambda f, **k: compile_(f, backend="eager", **k))
        patch.setenv("MOKD_FAST_BACKEND", "")
        argv = ["step_gpu.py", "--batch", "4", "--precisions", "bf16", "--rounds", "1"]
        argv += ["--set", "train.pack_crops=true"]
        argv += ["--size", "64", "--means", ";".join(MEANS + FAILING), "--json", str(path)]
        patch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            step_gpu.main()
    return path, ended.value.code


def test_row_compares_the_three_steps(measured):
    path, code = measured
    (row,) = json.loads(path.read_text())["rows"]
    assert row["dtype"] == "bf16" and "batch 4" in row["shape"]
    for name in ("baseline", "best_plain"):
        assert row[f"{name}_ratio"] == pytest.approx(row[f"{name}_s"] / row["median_s"])
    assert {"ours", "eager", "official", "best", "product"} == row["turns"].keys()
    assert row["set"] == ["train.pack_crops=true"] and row["ratio"] == row["baseline_ratio"]
    for whose in ("ours", "official", "best"):
        assert row[f"{whose}_peak_bytes"] > 2**20 and row[f"{whose}_held_bytes"] > 2**20
    networks = {"student mokd_cnn_tiny", "teacher mokd_vit_tiny", "backward of mokd_vit_tiny"}
    assert networks | {"searches", "losses, prototype layers"} <= row["parts"].keys()
    assert sum(part["flops"] for part in row["parts"].values()) == row["flops"] > 1e8
    assert all(row["parts"][name]["matrix_share"] > 0 for name in networks)
    for parts in (row["best_parts"], row["official_parts"]):
        assert {"students", "teachers", "backward of networks", "losses"} <= parts.keys()
    assert list(row["means"]) == MEANS and list(row["failed"]) == FAILING and code == 0
    for found in row["means"].values():
        assert found["ratio"] == pytest.approx(found["without_s"] / found["with_s"])
    assert "apex" in row["failed"][FAILING[0]]


def test_the_reference_is_chosen_for_the_steps_without_our_operators_alone(monkeypatch):
    """The trainers' own are recorded, or not: neither may see the other's choice."""
    seen = {"ours": set(), "other": set()}

    class Steps:
        trainer = SimpleNamespace(mokd=None)

        def make_trainer(self, **train):
            return SimpleNamespace(graph=None)

        def ours(self, trainer=None):
            key = "other" if trainer else "ours"
            return lambda: seen[key].add(os.environ["MOKD_FAST_BACKEND"])

    monkeypatch.setenv("MOKD_FAST_BACKEND", "")
    step_gpu.means(Steps(), None)["our operators, not the reference"]()
    assert seen == {"ours": {""}, "other": {"reference"}}
    assert os.environ["MOKD_FAST_BACKEND"] == ""


def test_parts_lie_between_borders():
    """A part within a part is taken from it, and a label may be another each time."""
    now = iter([0, 1, 3, 6, 10, 15, 21, 28])

    class Thing:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    thing, names = Thing(), iter(["a", "b"])
    parts = [(thing, "outer", "outer"), (thing, "inner", lambda: next(names))]

    def run():
        thing.outer()
        thing.inner()

    found = device_parts.apart(
        device_parts.borders(run, parts, lambda: next(now)), lambda a, b: b - a
    )
    assert found == {"other": 1 + 5 + 7, "outer": 2 + 4, "a": 3, "b": 6}
    assert thing.outer.__func__ is Thing.outer


def test_kernels_belong_to_the_part_that_launched_them():
    """By whichever thread, however late they run; the marks are those of a real trace."""

    class Thing:
        def part(self):
            with torch.profiler.record_function("within"):
                pass

    thing, numbers = Thing(), iter(range(9))

    def mark():
        with torch.profiler.record_function(name := f"border {next(numbers)}"):
            return name

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = device_parts.borders(lambda: thing.part(), [(thing, "part", "part")], mark)
    trace = device_parts._trace(profiler)
    (within,) = (event["ts"] for event in trace if event.get("name") == "within")
    last = max(event["ts"] for event in trace if event.get("cat") == "user_annotation")
    assert [name for name, _ in found] == ["other", "part", "other", ""]
    for correlation, cat, ts in ((7, "cuda_driver", within), (8, "cuda_runtime", 0.0)):
        trace.append({"cat": cat, "ts": ts, "dur": 1, "args": {"correlation": correlation}})
        args = {"correlation": correlation}
        trace.append({"cat": "kernel", "ts": last + 9, "dur": 3e6 + correlation, "args": args})
    seconds = device_parts.kernels_between(found, trace)
    assert seconds == {"other": pytest.approx(3.000008), "part": pytest.approx(3.000007)}


def test_tables_show_what_was_measured(measured, monkeypatch):
    path, _ = measured
    monkeypatch.setattr(results, "RESULTS", path.parent.parent / "other")
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    table = gpu_step.step_table()
    assert "| bf16 | pack_crops | " in table
    assert f"{row['baseline_s'] * 1e3:.1f} ms, {row['baseline_ratio']:.2f}x" in table
    assert f"commit {result['machine']['commit']}" in table and "kernel runs" not in table
    part = row["parts"]["searches"]
    ms = f"{part['s'] * 1e3:.1f} ms, its kernels {part['kernels_s'] * 1e3:.1f} ms"
    expected = f"| searches | {ms}, {part['matrix_share']:.0%} |"
    assert expected in gpu_step.parts_table()
    means = gpu_step.means_table()
    assert all(f"| {name} | " in means for name in MEANS)
    assert f"{row['means'][MEANS[0]]['ratio']:.2f}x |" in means
    assert f"| {FAILING[0]} | failed |" in means and f"Failed: {FAILING[0]}, bf16: Module" in means

    recorded = row | {"set": [], "flops": 0, "median_s": 1.0, "matrix_TFLOP_per_s": 1e-12}
    recorded["parts"] = {"other": {"s": 1.0, "flops": 0.0, "matrix_share": 0.0}}
    result["rows"].append(recorded)
    path.write_text(json.dumps(result))
    line = gpu_step.step_table().splitlines()[3]  # its operations are those counted beside it
    assert "| the recipe's own | 1000.0 ms | " in line and f"| {row['flops']:.0%} of " in line
    assert gpu_step.parts_table().splitlines()[0] == "| ours | bf16 |"
    del result["rows"][1]

    row["device_time"] = {"ours": {"gaps": 0.25, "busy_s": 0.5, "kernels": 7.2, "most": []}}
    row["median_s"] = 0.75
    graph = {"gaps": 0.1, "busy_s": 0.5, "kernels": 7, "most": []}
    row["means"]["a graph"] = {"with_s": 0.6, "without_s": 0.75, "ratio": 1.25}
    row["means"]["a graph"]["device_time"] = graph
    row["failed"] = {"apex": "no time left"}
    path.write_text(json.dumps(result))
    assert (
        "bf16, pack_crops: ours 500.0 of 750.0 ms (7 kernels, gaps 25%); "
        "a graph 500.0 of 600.0 ms (7 kernels, gaps 10%)."
    ) in gpu_step.step_table()
    assert "| apex | no time left |" in gpu_step.means_table()
    assert "Failed" not in gpu_step.means_table()
    del row["means"], row["failed"]
    path.write_text(json.dumps(result))
    assert gpu_step.means_table() == "Not measured yet."
