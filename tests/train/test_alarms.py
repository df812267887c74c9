"""When an alarm starts and is over, and that a run that goes on forgets and repeats nothing."""

import json
import math

import pytest

from bench import alarms as bench
from mokd_fast.train.alarms import RULES, WINDOW, Alarms, replay
from mokd_fast.train.loop import pretrain
from tests.train.recipes import VIT, broken_off, pictures, silent, small

K, ROWS, WARMUP = 512, 64, 20
HEALTHY = {
    "teacher_entropy_": 0.6 * math.log(K), "student_entropy_": 0.95 * math.log(K),
    "prototypes_used_": 0.2, "self_": 4.0, "feature_std_": 0.05,
}  # fmt: skip
SICK = {
    "loss at ln K": {"teacher_entropy_": 0.995 * math.log(K), "self_": math.log(K)},
    "uniform student": {"student_entropy_": 0.9999 * math.log(K), "self_": math.log(K)},
    "few prototypes": {"prototypes_used_": 1 / ROWS},
    "loss at 0": {"self_": 0.01},
    "constant features": {"feature_std_": 0.001},
}


def row(step, **values):
    """A row of metrics; `values` are of the first head or model alone."""
    found = {"step": step, "loss_1": 5.0}
    for prefix, value in HEALTHY.items():
        for place in ("1", "2") if prefix == "feature_std_" else ("mlp_1", "t_1", "mlp_2", "t_2"):
            found[prefix + place] = values.get(prefix, value) if place[-1] == "1" else value
    return found


def seen(given, **limits):
    alarms = Alarms(**{"prototypes": K, "rows": ROWS, "warmup": WARMUP, **limits})
    return [event for each in given for event in alarms.see(each)]


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_starts_once_and_is_over_once(name):
    sick = [row(step, **SICK[name]) for step in range(10, 300, 10)]
    well = [row(step) for step in range(300, 600, 10)]
    start, over = seen(sick + well)
    assert (start.alarm, start.over, over.alarm, over.over) == (name, False, name, True)
    assert start.step == 30 + WINDOW, "the rows of the warm-up do not count"
    assert 300 < over.step <= 300 + WINDOW
    assert "mlp_1" in start.text or "of 1 (" in start.text
    assert "_2" not in start.text, "only what is sick is named"


def test_healthy_rows_raise_nothing():
    """Also at the start of every run, near ln K, and where one row in three jumps."""
    start = [row(step, **SICK["loss at ln K"]) for step in range(10, WARMUP + 50, 10)]
    jumpy = [
        row(step, **(SICK["few prototypes"] if step % 30 == 0 else {}))
        for step in range(WARMUP + 50, 900, 10)
    ]
    assert seen(start + jumpy) == []


@pytest.mark.parametrize("every", [1, 10, 77, 500])
def test_the_window_is_steps_whatever_the_interval(every):
    (event,) = seen([row(step, **SICK["loss at 0"]) for step in range(every, 5000, every)])
    rows = max(5, math.ceil(WINDOW / every) + 1)  # a window needs five rows
    first = (WARMUP // every + 1) * every
    assert event.step == first + (rows - 1) * every


def test_few_rows_are_no_alarm():
    """Two pictures can well share a prototype; skipped rows have nothing to say."""
    few = [row(step, **{"prototypes_used_": 2 / 8}) for step in range(10, 400, 10)]
    assert seen(few, rows=8) == []
    skipped = [{"step": step, "skipped": 10} for step in range(10, 400, 10)]
    assert seen(skipped) == []


def test_a_run_that_goes_on_goes_on_in_its_alarms(tmp_path):
    rows = [row(step, **SICK["few prototypes"]) for step in range(10, 300, 10)]
    rows += [row(step) for step in range(300, 600, 10)]
    whole = seen(rows)
    path = tmp_path / "metrics.jsonl"
    for cut in range(0, len(rows), 3):
        path.write_text("".join(json.dumps(each) + "\n" for each in rows[:cut]))
        alarms = Alarms(K, ROWS, WARMUP)
        replay(alarms, path)
        rest = [event for each in rows[cut:] for event in alarms.see(each)]
        before = rows[cut - 1]["step"] if cut else 0
        assert rest == [event for event in whole if event.step > before]


def test_in_a_run_and_its_resume(tmp_path, monkeypatch):
    """Console and alarms.jsonl; rows after the checkpoint are written again, not twice."""
    monkeypatch.setattr("mokd_fast.train.alarms.WINDOW", 3)
    recipe = small(
        pictures(tmp_path / "data", 20), "train.batch=10", "train.log_every=1", "prototypes=20",
        "train.duration=14it", "train.checkpoint_every=7it", "loss.teacher_temperature=10",
        "loss.warmup_teacher_temperature=10", "train.warmup=1it", models=[VIT], t_head=None,
    )  # fmt: skip
    run, console = tmp_path / "run", silent()
    broken_off(recipe, run, 10, console)
    assert "step 6: loss at ln K: teacher_entropy_* of mlp_1 (" in console.file.getvalue()
    first = (run / "alarms.jsonl").read_text()
    event = json.loads(first.splitlines()[0])
    assert event["alarm"] == "loss at ln K" and event["step"] == 6 and not event["over"]
    with open(run / "alarms.jsonl", "a") as file:
        file.write('{"step": 9, "alarm": "after the checkpoint"}\n{"step": 3, "al')
    console = silent()
    pretrain(recipe, run=run, console=console)
    assert (run / "alarms.jsonl").read_text() == first
    assert "loss at ln K" not in console.file.getvalue(), "it is still on: not said again"


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.RUNS)
def test_collapsed_runs_raise_the_alarm_and_healthy_ones_none(name, tmp_path):
    expected = {
        "no centre": {"few prototypes", "loss at 0"},
        "hot teacher": {"loss at ln K", "uniform student"},
        "own teacher": {"few prototypes"},
        "hot student": {"uniform student", "few prototypes"},
        "wild rate": {"constant features", "few prototypes"},
    }
    found = bench.run(name, 200, tmp_path / "run")
    assert {event["alarm"] for event in found["alarms"]} == expected.get(name, set())
    path = tmp_path / "run" / "alarms.jsonl"
    said = path.read_text().splitlines() if path.exists() else []
    assert [json.loads(line) for line in said] == found["alarms"]


def test_margins_have_every_rule():
    healthy = {key: [value, value + 1] for key, value in row(1).items()}
    sick = healthy | {"self_t_2": [0.0, 0.5]}
    found = bench.margins({"healthy 0": {"medians": healthy}, "no centre": {"medians": sick}})
    assert found.keys() == {rule.name for rule in RULES}
    assert found["loss at 0"] == {"healthy": [4.0, 5.0], "no centre": [0.0, 5.0]}
