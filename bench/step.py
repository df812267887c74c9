"""The training step against the official one, from the same weights, views and schedules, and
against ours with the reference operators: what the fused ones are worth in the whole.

    python bench/step.py [--quick] [--full] [--json FILE]

--quick times the demo's pair alone; --full adds ResNet-50 + ViT-S, which needs 12 GB.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.timing import calibrate, interleave, machine, peak_bytes, write_json
from bench.twin import official_step
from mokd_fast.data.batches import Views
from mokd_fast.train.loop import Trainer
from mokd_fast.train.recipe import load_recipe

SMALL = ["models.0.name=resnet18", "models.1.name=vit_tiny_patch16_224", "t_head.heads=3"]
CASES = {  # name -> recipe, overrides, rounds
    "mokd_cnn_tiny+mokd_vit_tiny": ("fashion-mnist", [], 21),
    "resnet18+vit_tiny": ("resnet50-vit_small", [*SMALL, "train.batch=4"], 9),
    "resnet50+vit_small": ("resnet50-vit_small", ["train.batch=4"], 3),
}

PEAKS = ("peak_bytes", "baseline_peak_bytes", "reference_peak_bytes")  # ours, official, reference


def time_step(name: str, folder: Path) -> dict[str, Any]:
    """One row: the median of our step, of the official step, and their ratio."""
    base, overrides, rounds = CASES[name]
    root = blank_pictures(folder / "pictures", 64)
    common = [f"data.root={root}", "data.workers=0", "train.precision=fp32"]
    recipe = load_recipe(base, [*overrides, *common, "models.1.drop_path=0"])
    # A duration in epochs for the official temperature table; the run itself is never fitted.
    trainer = Trainer(recipe, folder / name, Console(quiet=True))
    trainer.mokd.train()
    official = official_step(trainer)
    views = next(trainer.loader.batches(0))
    globals_, locals_ = trainer.to_device(views)
    crops = [*globals_, *([] if locals_ is None else locals_)]
    k = trainer.total // 2

    def ours(backend: str = "") -> None:
        os.environ["MOKD_FAST_BACKEND"] = backend
        trainer.step(k, iter([copy_of(views)]))

    runs = {
        "ours": ours,
        "reference": lambda: ours("reference"),
        "official": lambda: official.step(crops, k, k // trainer.steps_per_epoch),
    }
    times = interleave(runs, rounds)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    os.environ.pop("MOKD_FAST_BACKEND")
    return {
        "op": "training step",
        "backend": "automatic",
        "dtype": "fp32",
        "device": trainer.device.type,
        "shape": f"{name}, batch {recipe.train.batch}, K={recipe.prototypes}",
        "median_s": times["ours"],
        "reference_s": times["reference"],
        "baseline": "official step in plain PyTorch (bench/baseline)",
        "baseline_s": times["official"],
        "ratio": times["official"] / times["ours"],
        "peak_bytes": peaks["ours"],
        "reference_peak_bytes": peaks["reference"],
        "baseline_peak_bytes": peaks["official"],
        "rounds": rounds,
        "discarded_rounds": times.discarded,
    }


def copy_of(views: Views) -> Views:
    return Views(views.globals, views.locals, views.index, [])


def blank_pictures(folder: Path, count: int) -> Path:
    """Noise: a step's time does not depend on what the pictures show."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(0))
    for i in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    names = list(CASES)[: 1 if options.quick else 3 if options.full else 2]
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    print(result["machine"], result["calibration"], sep="\n")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            row = time_step(name, Path(folder))
        result["rows"].append(row)
        print(f"{row['shape']}: ours {row['median_s']:.3f} s, official {row['baseline_s']:.3f} s, "
              f"{row['ratio']:.2f}x; with reference operators {row['reference_s']:.3f} s; peak "
              + " / ".join(f"{row[k] / 2**30:.2f}" for k in PEAKS) + " GiB")  # fmt: skip
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
