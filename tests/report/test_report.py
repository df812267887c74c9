"""The page of a run: what is there, what is missing and says so, bad input."""

import base64
import errno
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

import mokd_fast
from mokd_fast import UserError, cli
from mokd_fast.report import tables
from mokd_fast.report.curves import FAMILIES, curves, series
from mokd_fast.report.run import read_run
from mokd_fast.train.checkpoint import find_checkpoint, save_checkpoint
from mokd_fast.train.loop import pretrain
from tests.train.recipes import CNN, pictures, silent, small


def page_of(*runs, **options) -> str:
    return mokd_fast.report(*runs, **options).read_text(encoding="utf-8")


def images(page: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(r'<img src="data:[^,]*;base64,([^"]*)"', page)]


def test_every_part_is_there(page, finished):
    assert page.stat().st_size < 3e6
    page = page.read_text(encoding="utf-8")
    assert "Not shown" not in page and 'class="missing"' not in page
    for part in (
        "recipe", "small", "mokd_cnn_tiny + mokd_vit_tiny", "of 18", "1 mokd_cnn_tiny random",
        "pixels", "kNN k=10", "1 asks 2", "2 asks 1", "Search: 2 mokd_vit_tiny asks 1",
        "Augmented views", "L2", "2 mokd_vit_tiny: class token", "1 mokd_cnn_tiny: T-Head",
        "head 4", "Patch features", "1 collapse alarm:",
        "Step 4, <b>loss at ln K</b>: self_t_1 &lt;stays&gt; at ln K.",
        "Step 8, <b>loss at ln K</b>: over.",
    ):  # fmt: skip
        assert part in page, part
    keys = {key for row in (finished / "metrics.jsonl").read_text().splitlines()[:-1]
            for key in json.loads(row)} - {"step"}  # fmt: skip
    missing = [key for key in keys if not re.search(rf'alt="[^"]*\b{key} ', page)]
    assert not missing, "every key of metrics.jsonl has a curve"
    known = [family.title for family in FAMILIES if family.title not in ("Gradient scale",)]
    assert [title for title in known if f"<h3>{title}</h3>" not in page] == []
    assert "<h3>something_new</h3>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page


def test_images_are_whole_and_described(page):
    page = page.read_text(encoding="utf-8")
    found = images(page)
    assert len(found) == page.count("<img ") >= 30
    for image in found:
        assert image.startswith(b"\x89PNG") or b"<svg" in image[:600]
    assert len(re.findall(r'<img [^>]*alt="[^"]{10,}"', page)) == len(found)


def test_pointing_lands_in_the_run_folder(run):
    found = json.loads((run / "pointing.json").read_text())
    assert 2 <= found["crops"] <= 24 and found["crops"] + found["left_out"] == 24
    blocks = found["directions"]["1->2"]["blocks"]
    assert len(blocks) == 2 and set(blocks[0]["own"]) == {"mean", "ci95"}


def test_several_runs_side_by_side(run, finished, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "linear.json").unlink()
    (other / "alarms.jsonl").unlink()
    page = page_of(run, other, out=tmp_path / "pages" / "both.html")
    assert not (run / "report.html").exists()
    assert "Runs run and other" in page and "other has no scores yet" in page
    assert "other is too short for a collapse alarm" in page
    assert '<th scope="col">run</th><th scope="col">other</th>' in page
    assert "run · loss_1" in page and "other · loss_1" in page
    assert page.count("Search: 1 mokd_cnn_tiny asks 2 mokd_vit_tiny ·") == 2
    same = page_of(run, finished, other)  # two folders are called run
    assert f"Runs {run}, {finished} and other" in same


def test_what_is_missing_says_why(run):
    for file in ("metrics.jsonl", "linear.json", "alarms.jsonl"):
        (run / file).unlink()
    shutil.rmtree(run / "checkpoints")
    page = page_of(run)
    for reason in (
        "metrics.jsonl: No such file", "holds no checkpoint", "<code>mokd-fast linear",
        "No collapse alarm could watch run", "mokd_cnn_tiny + mokd_vit_tiny",
    ):  # fmt: skip
        assert reason in page, reason
    assert "Augmented views" in page and "L2" in page, "the pictures are still there"
    (run / "recipe.yaml").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss_1": 2.0}\n')
    page = page_of(run)
    assert "recipe.yaml cannot be read" in page and "loss_1 2" in page


def test_pictures_that_are_gone(run, tmp_path):
    text = (run / "recipe.yaml").read_text()
    root = re.search(r"root: (.*)", text)[1]
    hidden = shutil.move(root, tmp_path / "hidden")
    try:
        page = page_of(run)
    finally:
        shutil.move(hidden, root)
    assert page.count("no such folder or file list") == 5
    assert "1 asks 2" in page, "the scores of pointing.json, made while the pictures were there"


def test_the_head_says_what_the_run_was_trained_with(run):
    """The versions of the newest checkpoint, not those that make the page."""
    path, state = find_checkpoint(run)
    theirs = dict(state["versions"])
    state["versions"] |= {"torch": "1.2.3", "threads": "7", "device": "NVIDIA <X>"}
    path.unlink()
    save_checkpoint(path.parent, state["step"], state)
    head = page_of(run).partition("<h2>")[0].replace("\u00a0", " ")
    for text in (
        "trained with",
        "torch 1.2.3, ",
        f"timm {theirs['timm']}, ",
        "7 threads, NVIDIA &lt;X&gt;, precision fp32, prototype loss fused<",
    ):
        assert text in head, text
    del state["versions"]  # of an older mokd_fast
    save_checkpoint(path.parent, state["step"], state)
    path.write_bytes(path.read_bytes()[:-81])  # it had no checksum either
    page = page_of(run)
    assert "trained with" not in page and "Search: 1 mokd_cnn_tiny" in page


def test_no_alarm_says_whether_any_could_watch(run):
    (run / "alarms.jsonl").unlink()
    row = {"loss_1": 2.0, "feature_std_1": 0.5}

    def said(steps, left_out=""):
        rows = [{"step": step, "epoch": step / 6} | row for step in steps]
        for one in rows:
            one.pop(left_out, None)
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tables.no_alarm(read_run(run, "mine"))

    assert said(range(10, 111, 10)) == "mine has no collapse alarm."
    assert "too short for a collapse alarm" in said(range(10, 110, 10))
    assert "too short for a collapse alarm" in said((50, 100, 150))
    assert "hold no diagnostics" in said(range(10, 111, 10), left_out="feature_std_1")
    (run / "alarms.jsonl").mkdir()
    page = page_of(run)
    assert "alarms.jsonl: Is a directory" in page and "no collapse alarm" not in page


def test_alarms_of_several_runs_are_told_apart(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    runs = [read_run(run, "run"), read_run(other, "other")]
    for both in (runs, runs[:1]):
        svg = base64.b64decode(curves(both)[0].uri.partition(",")[2]).decode()
        marks = re.findall(
            r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="[^"]*#555555', svg
        )
        assert len({y for _, y in marks}) == len(both), "a row of triangles a run"
        assert len({x for x, _ in marks}) == 2, "its begin and its end"


def test_a_damaged_checkpoint_and_damaged_files(run):
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"PK damaged")
    (run / "linear.json").write_text("{")
    (run / "knn.json").write_text('{"x": 1}')
    (run / "pointing.json").write_text('{"crops": 1}')
    (run / "alarms.jsonl").write_text('{"step": "x", "alarm": "a", "text": "t"}\n\n')
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([rows[0], "\x00\x00", '{"no": 1}', *rows[1:]]))
    page = page_of(run)
    assert "not a readable checkpoint" in page
    assert "knn.json cannot be read: not what mokd-fast writes" in page
    assert "pointing.json cannot be read" in page
    assert "alarms.jsonl: 1 unreadable rows are left out" in page
    assert "metrics.jsonl: 2 unreadable rows are left out" in page


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "x", 1e-320, 0])
def test_metrics_that_are_no_numbers(run, value):
    """A diverged run's, or a damaged file's."""
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    rows = [{key: row["step"] if key == "step" else value for key in row} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_run(run, "run")
    assert dict(tables.facts([found]).rows)["steps"].startswith(f"{rows[-1]['step']}")
    tables.no_alarm(found)
    titles = [figure.title for figure in curves([found])]
    assert ("Loss of each model" in titles) == isinstance(value, int | float)
    step = rows[-1] | {"step": math.inf}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(rows[0]) + "\n")
    assert "1 unreadable rows" in read_run(run, "run").missing["metrics rows"]


def test_one_model_alone(tmp_path):
    recipe = small(pictures(tmp_path / "data", 8), "train.duration=4it", models=[CNN])
    run = pretrain(recipe, run=tmp_path / "run", console=silent())
    page = page_of(run)
    assert "one model alone searches nothing" in page and "Patch features" in page
    assert "evaluate.train=DIR" in page


def test_bad_input(run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for runs, options, message in (
        ([tmp_path / "nothing"], {}, "nothing: no such run folder"),
        ([tmp_path / "empty"], {}, "is no run folder: it holds none of recipe.yaml"),
        ([run / "recipe.yaml"], {}, "is a file; the report takes the run folder"),
        ([run, run], {}, "is given twice"),
        ([], {}, "give one run folder or more"),
        ([run], {"out": run / "recipe.yaml" / "x.html"}, "x.html cannot be written"),
        ([run], {"out": run}, "is a folder: give a file"),
    ):
        with pytest.raises(UserError, match=message):
            mokd_fast.report(*runs, **options)
    before = set(run.iterdir())
    monkeypatch.setattr("mokd_fast.report.page.os.replace", _full)
    with pytest.raises(UserError, match=r"report.html cannot be written \(No space left"):
        mokd_fast.report(run)
    assert set(run.iterdir()) == before, "no half page is left"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install mokd_fast\[report\]"):
        mokd_fast.report(run)


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_package_and_the_function_have_one_name(page):
    """In a fresh process, where nothing has loaded the package yet; and after it is loaded."""
    code = (
        "import mokd_fast\n"
        "for _ in range(2):\n"
        "    try: mokd_fast.report('no/such/run')\n"
        "    except mokd_fast.UserError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "no/such/run: no such run folder\n" * 2


def test_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["mokd-fast", "report", str(run), "--out", str(run / "x.html")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and (run / "x.html").exists()
    assert f"{run / 'x.html'} (" in capsys.readouterr().out


def test_long_curves_are_thinned():
    rows = [{"step": i, "x": float(i)} for i in range(1, 10_001)] + [{"step": 10_001}]
    steps, values = series(rows, "x")
    assert len(steps) <= 300 and steps[-1] == 10_000
    assert values[0] == pytest.approx(17.5)  # the mean of the first 34


@pytest.mark.parametrize(("noise", "flat"), [(1e-4, True), (0.1, False)])
def test_a_constant_is_a_flat_curve(run, noise, flat):
    """Rounding is not blown up to the height of the plot."""
    found = read_run(run, "run")
    found.metrics = [{"step": n, "loss_1": 6.238 + noise * (n % 2)} for n in range(50)]
    svg = base64.b64decode(curves([found])[0].uri.partition(",")[2]).decode()
    path = re.search(r'<path d="(M [^"]*)"[^>]*stroke: #0072b2', svg)[1]
    heights = [float(y) for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    assert len(heights) == 50
    assert (max(heights) - min(heights) < 3) if flat else (max(heights) - min(heights) > 100)
