"""The demo over several seeds: what the backbones learned, and where the processor time went.

    python bench/demo.py [--seeds 0 1 2] [--json FILE] [--demo RUN] [--profile]
                         [KEY=VALUE ...]

--profile also measures what a checkpoint costs.
--demo takes a run folder that `mokd-fast demo` left as seed 0; --json adds to the file's seeds.

For each seed: the fashion-mnist recipe, then kNN and linear probe of both teachers beside their
random initialisation and raw pixels; images/s, data-wait and the loader's share of processor time.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

import torch
from rich.console import Console

import mokd_fast
from bench.timing import machine, write_json
from mokd_fast.train.checkpoint import last_checkpoint
from mokd_fast.train.loop import Trainer
from mokd_fast.train.recipe import load_recipe
from mokd_fast.train.schedule import in_steps


def run(seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One seed: the evaluation table, seconds and rates."""
    before = cpu_seconds()
    begin = time.perf_counter()
    mokd_fast.pretrain("fashion-mnist", f"train.seed={seed}", *overrides, run=folder)
    seconds = time.perf_counter() - begin
    own, loader = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    begin = time.perf_counter()
    mokd_fast.linear(folder)
    evaluated = time.perf_counter() - begin
    measured = {"train_s": seconds, "evaluate_s": evaluated}
    return read(folder) | measured | {"loader_cpu_share": loader / (own + loader)}


def profile(folder: Path, steps: int = 20) -> dict[str, float]:
    """Shares of a training step's processor time: the ten largest operators, loader included."""
    recipe = load_recipe("fashion-mnist", ["data.workers=0"])
    trainer = Trainer(recipe, folder, Console(quiet=True))
    trainer.mokd.train()
    batches = trainer.loader.batches()
    for k in range(3):  # the first steps allocate
        trainer.step(k, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for k in range(3, 3 + steps):
            trainer.step(k, batches)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return {row.key: row.self_cpu_time_total / total for row in rows[:10]}


def checkpoint(folder: Path, steps: int = 20) -> dict[str, float]:
    """What a checkpoint of the demo costs: seconds of a save (fsync included), of a step, and the
    share of a checkpoint interval that goes into its save."""
    recipe = load_recipe("fashion-mnist", ["data.workers=0"])
    trainer = Trainer(recipe, folder, Console(quiet=True))
    trainer.mokd.train()
    batches = trainer.loader.batches()
    times: dict[str, list[float]] = {"step_s": [], "save_s": []}
    for k in range(steps):  # interleaved, so that the machine's load is that of both
        begin = time.perf_counter()
        trainer.step(k, batches)
        middle = time.perf_counter()
        trainer.done = k + 1
        trainer.save()
        times["step_s"].append(middle - begin)
        times["save_s"].append(time.perf_counter() - middle)
    row = {name: statistics.median(seconds) for name, seconds in times.items()}
    interval = in_steps(recipe.train.checkpoint_every, trainer.steps_per_epoch, trainer.total)
    size = last_checkpoint(folder).stat().st_size
    return row | {"bytes": size, "share": row["save_s"] / (interval * row["step_s"])}


def read(folder: Path) -> dict[str, Any]:
    """What a finished and evaluated run says of itself."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "table": json.loads((folder / "linear.json").read_text()),
        "images_per_s": statistics.median(row["images_per_s"] for row in rows),
        "data_wait": statistics.mean(row["data_wait"] for row in rows),
        "steps": rows[-1]["step"],
        "loss_1": rows[-1]["loss_1"],
        "loss_2": rows[-1]["loss_2"],
    }


def cpu_seconds() -> tuple[float, float]:
    """Processor seconds of this process and of the loader workers that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, workers.ru_utime + workers.ru_stime


def gains(table: dict[str, Any], k: str) -> dict[str, float]:
    """The points each teacher gained over its random initialisation, and over raw pixels."""
    found = {}
    for name, row in table.items():
        if not name.endswith(" teacher"):
            continue
        random = table[name.removesuffix("teacher") + "random"]
        for measure in ("knn", "knn_shifted"):
            found[f"{name} {measure} over random"] = row[measure][k] - random[measure][k]
        found[f"{name} knn_shifted over pixels"] = (
            row["knn_shifted"][k] - table["pixels"]["knn_shifted"][k]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    result: dict[str, Any] = {"seeds": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            result["profile"] = profile(Path(folder) / "profile")
            result["checkpoint"] = checkpoint(Path(folder) / "checkpoint")
        print(json.dumps({k: result[k] for k in ("profile", "checkpoint")}, indent=1))
    for seed in [0] if options.demo else options.seeds:
        if options.demo:
            row = read(options.demo)
        else:
            with tempfile.TemporaryDirectory() as folder:
                row = run(seed, options.overrides, Path(folder) / "run")
        row["machine"] = machine()
        result["seeds"][str(seed)] = row
        rates = {key: value for key, value in row.items() if key != "table"}
        print(f"seed {seed}", json.dumps(rates), sep="\n  ")
        for k in next(iter(row["table"].values()))["knn"]:
            print(
                f"  k={k}", json.dumps({n: round(v, 1) for n, v in gains(row["table"], k).items()})
            )
        if options.json:  # after every seed, so that nothing is lost
            write_json(options.json, result)


if __name__ == "__main__":
    main()
