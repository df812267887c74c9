"""train.checkpoint_activations: what it saves of a training step's memory, and what that costs.

    python bench/activations.py [--quick] [--json FILE]

One trainer, both ways in turn. The peak is what a step holds at one time beyond what was there
before: weights, teachers and optimizer state do not count. --quick takes the demo's pair.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.step import CASES, blank_pictures
from bench.timing import calibrate, interleave, keep_memory, machine, peak_bytes, write_json
from mokd_fast.nn import checkpoint_activations
from mokd_fast.train.loop import Trainer
from mokd_fast.train.recipe import load_recipe


def measure(name: str, precision: str, batch: int, folder: Path, rounds: int) -> dict[str, Any]:
    """One row: a step that makes activations again, beside one that keeps them."""
    base, overrides, _ = CASES[name]
    root = blank_pictures(folder / "pictures", 64)
    recipe = load_recipe(base, [
        *overrides, f"data.root={root}", "data.workers=0", f"train.batch={batch}",
        f"train.precision={precision}",
    ])  # fmt: skip
    trainer = Trainer(recipe, folder / "run", Console(quiet=True))
    trainer.mokd.train()
    views = next(trainer.loader.batches(0))
    k = trainer.total // 2

    def step(again: bool) -> None:
        for student in trainer.mokd.students:
            checkpoint_activations(student, again)  # type: ignore[arg-type]
        trainer.step(k, iter([views]))

    runs = {"again": lambda: step(True), "kept": lambda: step(False)}
    times = interleave(runs, rounds)
    peaks = {way: peak_bytes(run) for way, run in runs.items()}
    trainer.lock.release()
    return {
        "op": "activation checkpointing",
        "backend": "automatic",
        "dtype": precision,
        "device": trainer.device.type,
        "shape": f"{name}, batch {batch}, K={recipe.prototypes}",
        "median_s": times["again"],
        "baseline": "the same step with its activations kept",
        "baseline_s": times["kept"],
        "ratio": times["kept"] / times["again"],
        "peak_bytes": peaks["again"],
        "baseline_peak_bytes": peaks["kept"],
        "rounds": rounds,
        "discarded_rounds": times.discarded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_memory()
    quick = ("mokd_cnn_tiny+mokd_vit_tiny", 64, 5)
    name, batch, rounds = quick if options.quick else ("resnet18+vit_tiny", 8, 5)
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    print(result["machine"], result["calibration"], sep="\n")
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, precision, batch, Path(folder), rounds)
        result["rows"].append(row)
        print(f"{row['shape']}, {precision}: peak {row['peak_bytes'] / 2**30:.2f} instead of "
              f"{row['baseline_peak_bytes'] / 2**30:.2f} GiB, {1 / row['ratio']:.2f}x the time "
              f"({row['median_s']:.2f} s)")  # fmt: skip
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
