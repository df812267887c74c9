"""Do the alarms tell a collapse? Five collapsed runs and five healthy ones of the demo's recipe.

    python bench/alarms.py [--steps N] [--json FILE] [--runs FOLDER] [NAME ...]

The collapsed ones differ from the demo in one thing each: no centre (its momentum is 1, so it stays
0), a teacher temperature that is too high, a student that is its own teacher (EMA momentum 0), a
student temperature that is too high beside a teacher so sharp that its entropy is 0, and a learning
rate of the ViT that is 1000 times too high.
--runs keeps the run folders; those that are there are judged again, by the rules of now.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from rich.console import Console

import mokd_fast
from bench.timing import machine, write_json
from mokd_fast.train.alarms import RULES, WINDOW, Alarms
from mokd_fast.train.recipe import load_recipe
from mokd_fast.train.schedule import in_steps

COMMON = ("data.workers=0", "train.batch=32", "train.checkpoint_every=100%")
HEALTHY = {f"healthy {seed}": [f"train.seed={seed}"] for seed in range(5)}
COLLAPSED = {
    "no centre": ["loss.center_momentum=1.0"],
    "hot teacher": ["loss.teacher_temperature=0.3", "loss.warmup_teacher_temperature=0.3"],
    "own teacher": ["teacher.momentum=0.0", "teacher.final_momentum=0.0"],
    "hot student": [
        "loss.student_temperature=1000",
        "loss.teacher_temperature=1e-4",
        "loss.warmup_teacher_temperature=1e-4",
    ],
    "wild rate": ["models.1.optimizer.lr=0.5"],
}
RUNS = COLLAPSED | HEALTHY


def run(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """One run: the alarms it raises, and medians of the diagnostics over its last window."""
    overrides = [*COMMON, f"train.duration={steps}it", *RUNS[name]]
    recipe = load_recipe("fashion-mnist", overrides)
    mokd_fast.pretrain(recipe, run=folder, console=Console(quiet=True))
    rows = _read(folder / "metrics.jsonl")
    warmup = in_steps(recipe.train.warmup, 0, steps)
    alarms = Alarms(recipe.prototypes, 2 * recipe.train.batch, warmup)
    events, seen = [], []
    for row in rows:
        events += [event._asdict() for event in alarms.see(row)]
        seen += [alarms.medians] if alarms.medians else []
    span = {key: [f(medians[key] for medians in seen) for f in (min, max)] for key in seen[-1]}
    last = [row for row in rows if row["step"] > steps - WINDOW]
    prefixes = ("kl_", "center_norm_", *(rule.quantity for rule in RULES))
    keys = [key for key in rows[-1] if key.startswith(prefixes)]
    end = {key: statistics.median(row[key] for row in last) for key in keys}
    return {"overrides": RUNS[name], "alarms": events, "end": end, "medians": span}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def margins(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each rule the lowest and highest median that it saw in any head, at any step: of all
    healthy runs, and of each collapsed one."""
    groups = {"healthy": [runs[name]["medians"] for name in HEALTHY if name in runs]}
    groups |= {name: [runs[name]["medians"]] for name in COLLAPSED if name in runs}
    found: dict[str, dict[str, list[float]]] = {}
    for rule in RULES:
        for group, spans in groups.items():
            ranges = [x for span in spans for k, x in span.items() if k.startswith(rule.quantity)]
            values = [x for pair in ranges for x in pair]
            if values:
                found.setdefault(rule.name, {})[group] = [min(values), max(values)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "steps": options.steps, "runs": {}}
    for name in options.names or RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.runs / name if options.runs else Path(temporary) / "run"
            result["runs"][name] = row = run(name, options.steps, folder)
        events = [(e["step"], e["alarm"], "over" if e["over"] else "on") for e in row["alarms"]]
        print(f"{name}: {events or 'no alarm'}", flush=True)
        result["margins"] = margins(result["runs"])
        if options.json:  # after every run, so that nothing is lost
            write_json(options.json, result)
    print(json.dumps(result["margins"], indent=1))


if __name__ == "__main__":
    main()
