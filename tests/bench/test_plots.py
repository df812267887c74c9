"""The plots: what they show is what the results say, and a stale one is noticed."""

import json
import shutil
import sys
from xml.etree import ElementTree

import pytest

from bench import readme
from bench.report import draw, figures, plots, results, roofline
from bench.report.figures import FIGURES

PUBLISHED = results.RESULTS


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The published results in a folder of their own."""
    shutil.copytree(PUBLISHED, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def change(folder, name, edit):
    path = folder / f"{name}.json"
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))


def test_what_shows_other_figures_is_stale_and_drawn_anew(copy):
    assert plots.stale() == {}
    change(copy, "augment", lambda r: [row.update(threads=1) for row in r["rows"]])
    assert list(plots.stale()) == ["speed"]
    (copy / "plots" / "memory.svg").unlink()
    assert list(plots.stale()) == ["speed", "memory"]
    pytest.importorskip("matplotlib")
    assert [path.name for path in plots.draw_stale()] == ["speed.svg", "memory.svg"]
    assert plots.stale() == {}
    assert "augmentation of crops" not in (copy / "plots" / "speed.svg").read_text()


def test_other_drawing_makes_all_stale_and_another_matplotlib_none(copy, tmp_path, monkeypatch):
    assert plots.stale() == {}
    (tmp_path / "draw.py").write_text("other")
    monkeypatch.setattr(draw, "__file__", str(tmp_path / "draw.py"))
    assert list(plots.stale()) == list(FIGURES)


def test_without_matplotlib_it_says_what_is_stale(copy, tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir(exist_ok=True)
    for page in readme.PAGES:
        (tmp_path / page).write_text("")
    (copy / "plots" / "memory.svg").unlink()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="stale: memory; drawing needs matplotlib: pip install"):
        readme.main()


def test_the_same_bytes_each_time_and_valid_svg(tmp_path):
    pytest.importorskip("matplotlib")
    for name, figure in FIGURES.items():
        for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
            draw.write(name, figure(), "digest", path)
        text = (tmp_path / "a.svg").read_text()
        assert text == (tmp_path / "b.svg").read_text()
        assert "dc:date" not in text and len(text) < 80_000
        ElementTree.fromstring(text)


def test_bars_are_ratios_of_the_results():
    rows = {row[0]: row[1:] for row in figures.speed()["rows"]}
    found = json.loads((PUBLISHED / "distill.json").read_text())["rows"]
    found = [r for r in found if r["dtype"] == "bfloat16" and r["shape"]["B"] == 16]
    official = next(r for r in found if r["baseline"] == "official")
    closest = min(found, key=lambda r: r["ratio"])
    assert rows["loss, bf16"][:2] == [
        pytest.approx(official["ratio"], rel=1e-3), pytest.approx(closest["ratio"], rel=1e-3)
    ]  # fmt: skip
    assert rows["loss, bf16"][2] == closest["baseline"]
    shares = {row[0]: row[1] / row[2] for row in figures.memory()["rows"]}
    assert shares["loss, bf16"] == official["alive_bytes"] / official["baseline_alive_bytes"]
    assert {name for name in shares if name.startswith("step")} <= rows.keys()


def test_only_the_official_form_is_no_other_form(copy):
    both = ("cpu", "official")
    change(copy, "data", lambda r: r.update(rows=[x for x in r["rows"] if x["backend"] in both]))
    (loader,) = (row for row in figures.speed()["rows"] if row[0].startswith("loader"))
    assert loader[1] > 0 and loader[2:] == [0.0, ""]


def test_the_step_stands_beside_the_best_plain_one():
    row = json.loads((PUBLISHED / "step.json").read_text())["rows"][-1]
    *_, step = figures.speed()["rows"]
    assert step[0] == "step, resnet50+vit_small, bf16"
    assert step[1:] == [
        pytest.approx(row["ratio"], rel=1e-3), pytest.approx(row["best_plain_ratio"], rel=1e-3),
        "best plain",
    ]  # fmt: skip


def test_growth_follows_one_axis_at_a_time():
    found = figures.growth()
    assert list(found["memory"]) == ["ours", "stored", "official"]
    for axis, base in (("V", 10), ("B", 16), ("K", 65536)):
        sizes = [size for size, _ in found["time"][axis]["fp32"]]
        assert base in sizes and sizes == sorted(set(sizes)) and len(sizes) >= 4
    points = {axis: dict(lines["fp32"]) for axis, lines in found["time"].items()}
    assert points["V"][10] == points["B"][16] == points["K"][65536]


def test_a_point_is_its_work_over_its_time():
    found = roofline.figure(16)
    row = next(
        r for r in json.loads((PUBLISHED / "linear_distill.json").read_text())["rows"]
        if r["dtype"] == "float32" and r["shape"]["B"] == 16
    )  # fmt: skip
    products = 4.4  # of 10 student rows, features and prototypes: README
    flops = products * 2 * 10 * 16 * 65536 * 256
    (point,) = (p for p in found["points"] if p[0] == "prototypes + loss")
    assert point[2] == pytest.approx(flops / row["median_s"] / 1e9, rel=1e-3)
    for _, intensity, rate, share in found["points"]:
        roof = min(max(found["oneDNN"]), max(found["copy"]) * intensity)
        assert 0 < share < 1.02 and rate <= 1.02 * roof, "no operator is faster than its machine"


def test_a_point_uses_the_matrix_rate_of_its_own_run(copy):
    def measured(result):
        result["calibration"]["gemm_fp32_onednn_GFLOP_per_s"] = 1e6

    before = {p[0]: p[3] for p in roofline.figure(16)["points"]}
    change(copy, "linear_distill", measured)
    (copy / "linear_parts.json").unlink()
    after = {p[0]: p[3] for p in roofline.figure(16)["points"]}
    assert after["prototypes + loss"] < before["prototypes + loss"]  # now bound by the copies
    assert after["search, ViT's map"] > 1 > before["search, ViT's map"]  # torch's rate alone


def test_what_is_not_measured_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert plots.stale() == {} and plots.draw_stale() == []
    shutil.copy(PUBLISHED / "step.json", tmp_path)
    assert list(plots.stale()) == ["speed", "memory"]
