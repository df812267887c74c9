"""bench/ablation.py: a run of each kind on few pictures, and the table that is made of them."""

import json

import pytest

from bench import ablation
from bench.report import results, training
from tests.train.recipes import pictures


@pytest.fixture
def result(tmp_path, monkeypatch):
    """As main() writes it: two seeds of a joint search and of none."""
    root = pictures(tmp_path / "pictures", 24)
    path = tmp_path / "ablation.json"
    monkeypatch.setattr(ablation, "MODES", ("joint", "none"))
    arguments = f"--steps 2 --seeds 0 1 --json {path} data.root={root} evaluate.train={root}"
    arguments += f" evaluate.test={root} train.batch=4 evaluate.train_limit=null"
    monkeypatch.setattr("sys.argv", ["ablation.py", *arguments.split()])
    ablation.main()
    return path


def test_runs_and_their_table(result, monkeypatch):
    runs = json.loads(result.read_text())["runs"]
    assert {search: list(rows) for search, rows in runs.items()} == {
        "joint": ["0", "1"], "none": ["0", "1"]
    }  # fmt: skip
    for rows in zip(runs["joint"].values(), runs["none"].values(), strict=True):
        joint, none = rows
        assert any("search" in key for key in joint["losses"])
        assert not any("search" in key for key in none["losses"])
        random = [row["knn"]["1 mokd_cnn_tiny random"] for row in rows]
        assert random[0] == random[1], "both start from the same weights"
        for row in rows:  # nothing but the query's own attention differs in the first block
            ways = [
                row["pointing"][way]["directions"]["1->2"]["blocks"][0] for way in ablation.WAYS
            ]
            assert ways[0]["own"]["mean"] == pytest.approx(ways[1]["own"]["mean"], rel=1e-5)
    monkeypatch.setattr(results, "RESULTS", result.parent)
    lines = training.ablation_table().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert [line.split(" |")[0] for line in lines[2:5]] == ["| joint", "| none", "| not trained"]


def test_a_file_of_other_steps_is_not_added_to(tmp_path):
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps({"steps": 2, "overrides": [], "runs": {"joint": {"0": 1}}}))
    assert ablation.earlier(path, {"steps": 2, "overrides": []}) == {"joint": {"0": 1}}
    assert ablation.earlier(path, {"steps": 3, "overrides": []}) == {}


def test_what_is_beyond_the_seeds():
    columns = {
        "clean": {"joint": [70.0, 71.0], "cross": [72.0, 73.0]},
        "shifted": {"joint": [40.0, 44.0], "cross": [41.0, 44.0]},
    }
    large, alike = training.beyond_the_seeds(columns).split(" Of one sign ")
    assert "seeds: joint against cross -2.0 (clean) of 2 differences" in large
    assert "seed: joint against cross -2.0 (clean); by chance it would be 1." in alike
    del columns["clean"]
    assert training.beyond_the_seeds(columns).count("none") == 2
