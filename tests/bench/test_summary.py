"""The README's own tables say what the results say."""

import json

import pytest

from bench.report import results, summary


def cells(table: str, label: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_line_is_over_the_official_form_and_the_fastest_other():
    table = summary.table()
    rows = results.rows_at("distill", B=16)["float32"]
    ratios = {row["baseline"]: row["baseline_s"] / row["drop_in_s"] for row in rows}
    closest = min(ratios, key=ratios.get)
    over, other, memory = cells(table, "loss, fp32")
    assert over == f"{ratios['official']:.1f}x"
    assert other.endswith(f"x ({closest})")
    assert float(other.split("x")[0]) == pytest.approx(ratios[closest], abs=0.006)
    kept = (rows[0][key] / 2**20 for key in ("alive_bytes", "baseline_alive_bytes"))
    assert rows[0]["baseline"] == "official" and memory == "{:.0f} MiB / {:.0f} MiB".format(*kept)
    assert cells(table, "loader, files to batches")[2]  # of the same name in both figures
    assert results.load("step")["machine"]["commit"] in table


def test_on_a_gpu_the_fastest_backend_at_the_largest_shape_is_shown(tmp_path, monkeypatch):
    def row(backend, baseline, seconds, theirs, images=64, **more):
        return {
            "backend": backend, "baseline": baseline, "median_s": seconds, "baseline_s": theirs,
            "ratio": theirs / seconds, "shape": {"B": images}, "peak_bytes": 2**20,
            "baseline_peak_bytes": 3 * 2**30, **more,
        }  # fmt: skip

    folder = tmp_path / results.GPU
    folder.mkdir()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "cpu-2core")
    machine = json.loads((results.ROOT / "bench/results/h200/step.json").read_text())["machine"]
    loss = [
        row("slow", "official", 2.0, 8.0, dtype="float16"),
        row("fast", "official", 1.0, 8.0, dtype="float16"),
        row("fast", "sum, compiled", 1.0, 6.0, dtype="float16"),
        row("fast", "einsum", 1.0, 5.0, dtype="float16"),
        row("fast", "official", 0.1, 8.0, images=4, dtype="float16"),
        row("fast", "official", 0.1, 8.0, dtype="float32"),
    ]
    extra = {"dtype": "autocast", "extra_bytes": 2**21, "baseline_extra_bytes": 2**22}
    layer = [row("cuda", name, 1.0, s, **extra) for name, s in (("official", 2), ("stored", 0.5))]
    search = [row("joint", name, 1.0, 2.0) for name in ("official", "sdpa")]
    step = {
        "shape": "a+b, batch 64, K=9", "dtype": "fp16", "baseline_s": 2.5, "best_plain_s": 1.5,
        "median_s": 1.0, "set": ["train.compile=true"], "ours_peak_bytes": 2**30,
        "official_peak_bytes": 2**31,
    }  # fmt: skip
    others = [step | {"dtype": "bf16", "median_s": 1.1}, step | {"set": [], "median_s": 2.0}]
    for name, rows in (
        ("distill", loss), ("linear_distill", layer), ("search", search),
        ("step", [others[0], step, others[1] | {"commit": "abc"}]),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    table = summary.gpu_table()
    assert cells(table, "loss, fp16, 64 pictures") == [
        "8.0x", "5.00x (one einsum)", "1 MiB / 3.0 GiB"
    ]  # fmt: skip
    assert cells(table, "prototypes + loss, autocast, 64 pictures") == [
        "2.0x", "", "2 MiB / 4 MiB"
    ]  # fmt: skip
    searched = cells(table, "search of a ViT's map, fp16, 64 pictures")
    assert searched == ["2.0x", "2.00x (official with SDPA)", "1 MiB / 3.0 GiB"]
    fast = ["2.5x", "1.50x (best plain)", "1.0 GiB / 2.0 GiB"]
    slow = ["1.2x", "0.75x (best plain)", "1.0 GiB / 2.0 GiB"]
    name = "step, a+b, batch 64, fp16"
    assert cells(table, f"{name}, compile") == fast
    assert cells(table, f"{name}, no switch (commit abc)") == slow
    # As bench/step_gpu.py writes it: a row a precision, with the step without a switch in it.
    row = step | {"eager_s": 2.0, "eager_peak_bytes": 2**30}
    for rows, lines in ((row, 2), (step, 1), (None, 0)):
        result = {"machine": machine, "rows": [r for r in (rows,) if r]}
        (folder / "step.json").write_text(json.dumps(result))
        table = summary.gpu_table()
        assert table.count("| step, ") == lines
        assert lines < 2 or cells(table, f"{name}, no switch") == slow
