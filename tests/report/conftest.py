"""A finished run of a tiny CNN + ViT, and a folder that every test may spoil."""

import json
import shutil
from pathlib import Path

import pytest

import mokd_fast
from mokd_fast.report import curves
from mokd_fast.train.loop import pretrain
from tests.train.recipes import pictures, silent, small


@pytest.fixture(autouse=True, scope="session")
def _drawn_once():
    """Most pages show the curves of the same run: what the tests are about stands beside them."""
    draw, drawn = curves._draw, {}

    def once(runs, family, keys):
        shown = [(r.name, r.metrics, r.alarms, r.recipe and r.recipe.prototypes) for r in runs]
        what = repr((shown, family, keys))
        if what not in drawn:
            drawn[what] = draw(runs, family, keys)
        return drawn[what]

    curves._draw = once
    yield
    curves._draw = draw


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run with scores, and with the diagnostics and alarms that a run may log."""
    folder = tmp_path_factory.mktemp("report")
    data = pictures(folder / "data", 24, (28, 40))
    roots = [
        f"evaluate.train={data}",
        f"evaluate.test={data}",
        "evaluate.resize=28",
        "evaluate.every=1ep",
    ]
    run = pretrain(small(data, *roots, "train.duration=3ep"), run=folder / "run", console=silent())
    mokd_fast.linear(run)
    path = run / "metrics.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    for n, row in enumerate(rows):
        for head in ("mlp_1", "t_1", "mlp_2", "t_2"):
            row |= {f"teacher_entropy_{head}": 3.0 - 0.1 * n, f"kl_{head}": 0.5}
            row |= {f"center_norm_{head}": 0.1 * n, f"prototypes_used_{head}": 0.7}
        row |= {"feature_std_1": 0.8, "feature_std_2": 0.9, "skipped": 0, "something_new_1": n}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    alarm = {"step": 4, "alarm": "loss at ln K", "text": "self_t_1 <stays> at ln K."}
    over = {"step": 8, "alarm": "loss at ln K", "text": "loss at ln K: over.", "over": True}
    (run / "alarms.jsonl").write_text(json.dumps(alarm) + "\n" + json.dumps(over) + "\n")
    return run


@pytest.fixture(scope="session")
def page(finished: Path, tmp_path_factory) -> Path:
    """Its report, and pointing.json in its folder."""
    return mokd_fast.report(finished, out=tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def run(finished: Path, page: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
