"""What the feature search is worth: the demo's recipe with a joint search, a cross one and none.

    python bench/ablation.py [--steps N] [--seeds 0 1 2] [--json FILE] [KEY=VALUE ...]

"none" leaves the search losses out; self- and cross-distillation stay. The runs of one seed start
from the same weights and see the same crops. Measured are the teachers: kNN (k = 20) on clean and
on shifted test pictures, and the pointing score of the search, both ways, of every run: so "none"
says how far a crop finds itself where nothing was trained to search. In the first block the two
ways are one and the same attention.
300 steps are a third of the demo's, and the bank of the kNN is half of its, so that nine runs take
half an hour on two cores that do other work too.
--json adds to the runs that the file has, if they are of as many steps: two processes can share
the seeds, one thread each, which is faster than one process on two threads.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from rich.console import Console

import mokd_fast
from bench.timing import machine, write_json
from mokd_fast.api import load_run
from mokd_fast.data.sources import open_source
from mokd_fast.evaluate.pointing import pointing
from mokd_fast.nn import MOKD
from mokd_fast.train.recipe import Recipe, load_recipe

MODES = ("joint", "cross", "none")
WAYS = ("joint", "cross")  # of searching in a trained T-Head
COMMON = ["data.workers=0", "train.checkpoint_every=100%"]
COMMON += ["evaluate.k=[20]", "evaluate.train_limit=10000"]


def run(mode: str, seed: int, steps: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run: {"knn": {model: {"clean", "shifted"}}, "pointing": {way: see `summarise`}}."""
    overrides = [*COMMON, f"train.duration={steps}it", f"train.seed={seed}", *overrides]
    recipe = load_recipe("fashion-mnist", [*overrides, f"t_head.search={mode}"])
    begin = time.perf_counter()
    mokd_fast.pretrain(recipe, run=folder, console=Console(quiet=True))
    seconds = time.perf_counter() - begin
    scores = {
        name: {"clean": row["knn"]["20"], "shifted": row["knn_shifted"]["20"]}
        for name, row in mokd_fast.knn(folder).items()
    }
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    losses = {key: value for key, value in last.items() if key.startswith(("self_", "cross_"))}
    return {
        "knn": scores,
        "pointing": points(*load_run(folder)),
        "losses": losses | {key: last[key] for key in last if key.startswith("search_")},
        "train_s": seconds,
    }


def points(recipe: Recipe, mokd: MOKD, limit: int = 1024) -> dict[str, Any]:
    """Pointing scores on test pictures, by each way of searching."""
    assert recipe.evaluate.test is not None
    source, data, found = open_source(recipe.evaluate.test), recipe.data, {}
    for way in WAYS:
        for teacher in mokd.teachers:
            teacher.t_head.mode = way  # type: ignore[union-attr, assignment]
        found[way] = pointing(
            mokd, source, recipe.augment, channels=data.channels, mean=data.mean, std=data.std,
            limit=limit,
        )  # fmt: skip
    return found


def say(name: str, row: dict[str, Any]) -> None:
    knn = ", ".join(f"{n} {s['clean']:.1f} / {s['shifted']:.1f}" for n, s in row["knn"].items())
    print(f"{name}: {row['train_s']:.0f} s, kNN clean / shifted: {knn}", flush=True)
    for way, found in row["pointing"].items():
        for direction, scores in found["directions"].items():
            blocks = [
                f"{b['own']['mean']:.2f} ({b['random']['mean']:.2f})" for b in scores["blocks"]
            ]
            print(f"  {way} {direction} pointing (control): {', '.join(blocks)}", flush=True)


def earlier(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The runs that a file has by now, also of a process beside this one."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    same = all(found[key] == result[key] for key in ("steps", "overrides"))
    runs: dict[str, Any] = found["runs"] if same else {}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    result: dict[str, Any] = {"steps": options.steps, "overrides": options.overrides}
    result |= {"machine": machine(), "runs": {}}
    for seed in options.seeds:
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                row = run(mode, seed, options.steps, options.overrides, Path(folder) / "run")
            say(f"{mode} {seed}", row)
            if options.json:  # after every run, so that nothing is lost
                result["runs"] = earlier(options.json, result)
                result["runs"].setdefault(mode, {})[str(seed)] = row
                write_json(options.json, result)


if __name__ == "__main__":
    main()
