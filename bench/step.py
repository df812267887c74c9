"""The training step against the official one and against the best plain PyTorch can do, from the
same weights, crops and schedules; where its time goes, and what each of its means is worth.

    python bench/step.py [--quick] [--full] [--json FILE]

--quick times the demo's pair alone; --full adds ResNet-50 + ViT-S, which needs 20 GB. Each in fp32,
and in bf16 where the processor has products of it. In all of them malloc keeps freed memory, in
huge pages, though only our trainer sees to that by itself.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.baseline.best import BestStep
from bench.baseline.official import OfficialStep
from bench.step_parts import breakdown, flops
from bench.step_ways import ROUNDS, ways
from bench.timing import Medians, calibrate, interleave, machine, peak_bytes, write_json
from bench.twin import official_step
from mokd_fast.ops import onednn
from mokd_fast.train.loop import Trainer
from mokd_fast.train.malloc import freed_memory_kept, huge_pages
from mokd_fast.train.precision import choose_precision
from mokd_fast.train.recipe import load_recipe

SMALL = ["models.0.name=resnet18", "models.1.name=vit_tiny_patch16_224", "t_head.heads=3"]
CASES = {  # name -> recipe, overrides, rounds
    "mokd_cnn_tiny+mokd_vit_tiny": ("fashion-mnist", [], 21),
    "resnet18+vit_tiny": ("resnet50-vit_small", [*SMALL, "train.batch=4"], 7),
    "resnet50+vit_small": ("resnet50-vit_small", ["train.batch=4"], 5),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE, PRODUCTS = 2048, 10  # of the square products that measure the matrix rate, and how many
PEAKS = ("peak_bytes", "best_peak_bytes", "baseline_peak_bytes")  # ours, best plain, official

Run = Callable[[], Any]


class Steps:
    """One case's step: a trainer's, the official one and the best plain one."""

    def __init__(self, name: str, precision: str, folder: Path, pictures: int = 64) -> None:
        base, overrides, self.rounds = CASES[name]
        common = [
            f"data.root={blank_pictures(folder / 'pictures', pictures)}",
            "data.workers=0",
            f"train.precision={precision}",
            "models.1.drop_path=0",
        ]
        self.precision, self.folder = precision, folder
        self.recipe = load_recipe(base, [*overrides, *common])
        self.shape = f"{name}, batch {self.recipe.train.batch}, K={self.recipe.prototypes}"
        self.trainer = self.make_trainer()
        self.k = self.trainer.total // 2
        # Normalised crops for everyone: what the loader takes is data.json's.
        self.views = self.trainer.to_device(next(self.trainer.loader.batches(0)))
        self.device = self.trainer.device
        self.autocast = None if precision == "fp32" else DTYPES[precision]
        self.official = official_step(self.trainer, autocast=self.autocast)
        # bf16 on the CPU takes longer by SDPA, so there the best plain step is timed both ways.
        both = precision == "bf16" and self.device.type == "cpu"
        self.attentions = ["explicit", "sdpa"] if both else ["sdpa"]
        self.best: Any = official_step(self.trainer, BestStep, autocast=self.autocast)

    def make_trainer(self, **train: Any) -> Trainer:
        changed = self.recipe.train.model_copy(update=train)
        recipe = self.recipe.model_copy(update={"train": changed})
        folder = self.folder / ("run " + " ".join(f"{key}={value}" for key, value in train.items()))
        trainer = Trainer(recipe, folder, Console(quiet=True))
        trainer.mokd.train()
        return trainer

    def ours(self, trainer: Trainer | None = None) -> Run:
        used, views = trainer or self.trainer, self.views
        if not used.recipe.train.channels_last:
            views = tuple(x if x is None else x.contiguous() for x in views)  # type: ignore
        used.to_device = lambda _: views  # type: ignore[method-assign, assignment]

        def run() -> None:
            used.step(self.k, iter([None]))  # type: ignore[list-item]
            used.mokd.centers.wait()  # a whole step: the update and the prototypes it holds

        return run

    def plain(self, step: OfficialStep, autocast: torch.dtype | None) -> Run:
        crops = [crop for group in self.views if group is not None for crop in group]

        def run() -> None:
            step.autocast_dtype = autocast
            step.step(crops, self.k, self.k // self.trainer.steps_per_epoch)

        return run


def time_step(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """One row: the median of our step, of the official step, and their ratio."""
    steps = Steps(name, precision, folder)
    runs: dict[str, Run] = {"ours": steps.ours(), "official": steps.plain(steps.official, None)}
    best = steps.plain(steps.best, steps.autocast)
    ways_to_attend = {f"best, {kind}": kind for kind in steps.attentions}
    before = {key: partial(steps.best.attend, kind) for key, kind in ways_to_attend.items()}
    runs |= dict.fromkeys(ways_to_attend, best)
    if steps.autocast is not None:
        runs["official_same"] = steps.plain(steps.official, steps.autocast)
    rates = products(DTYPES[precision], steps.device)
    with freed_memory_kept():
        interleave(runs | rates, 1, 1, before)  # until the heap has its size
        small = interleave({"ours": runs["ours"]} | rates, ROUNDS)
        huge_pages()
        times = interleave(runs | rates, steps.rounds, 1, before)
        fastest = min(ways_to_attend, key=lambda key: times[key])
        before[fastest]()
        runs["best"] = best
        peaks = {key: peak_bytes(run) for key, run in runs.items() if key not in before}
        others = ways(steps)
        same = "official_same" if steps.autocast is not None else "official"
        seen = {
            "ours": breakdown(runs["ours"], steps.trainer),
            "best": breakdown(runs["best"], steps.best),
            "official": breakdown(runs[same], steps.official),
        }
    others["heap in huge pages"] = _in_huge_pages(small, times)
    gemm = {key: PRODUCTS * 2 * SIDE**3 / times[key] / 1e9 for key in rates}
    steps.trainer.mokd.prototype_loss = "fused"  # whose products are seen: none is made twice
    made, theirs = flops(runs["ours"]), flops(runs["official"])
    steps.trainer.mokd.prototype_loss = None
    return {
        "op": "training step",
        "backend": "automatic",
        "dtype": precision,
        "device": steps.device.type,
        "shape": steps.shape,
        "median_s": times["ours"],
        "baseline": "official step in fp32 (bench/baseline)",
        "baseline_s": times["official"],
        "ratio": times["official"] / times["ours"],
        "same_precision_s": times[same],
        "best_plain": f"attention {ways_to_attend[fastest]}, blocks and losses compiled",
        "best_plain_s": times[fastest],
        "best_plain_ratio": times[fastest] / times["ours"],
        "best_plain_sdpa_s": times["best, sdpa"],
        "peak_bytes": peaks["ours"],
        "best_peak_bytes": peaks["best"],
        "baseline_peak_bytes": peaks["official"],
        "same_precision_peak_bytes": peaks[same],
        "flops": made,
        "baseline_flops": theirs,
        "gemm_GFLOP_per_s": gemm,
        "gemm_share": {key: made / times["ours"] / 1e9 / rate for key, rate in gemm.items()},
        "ways": others,
        "parts": seen,
        "rounds": steps.rounds,
        "discarded_rounds": times.discarded,
    }


def _in_huge_pages(small: Medians, huge: Medians) -> dict[str, float]:
    """As `ways`. Pages do not go back and forth between turns, so the two are compared by the
    matrix rate beside each, which huge pages raise a little as well."""
    without_s = small["ours"] * huge["torch.mm"] / small["torch.mm"]
    return {"with_s": huge["ours"], "without_s": without_s, "ratio": without_s / huge["ours"]}


def products(dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """Square products: what torch.mm gives here, and oneDNN, which it leaves out in fp32."""
    a = torch.randn(SIDE, SIDE, dtype=dtype, device=device)
    made: dict[str, Run] = {"torch.mm": lambda: a @ a}
    if dtype == torch.float32 and onednn.usable(device.type, dtype):
        made["oneDNN"] = lambda: onednn.linear(a, a)

    def again(product: Run) -> None:
        for _ in range(PRODUCTS):
            product()

    return {name: partial(again, product) for name, product in made.items()}


def precisions() -> list[str]:
    """fp32, and bf16 where its products are faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["fp32", "bf16"] if choose_precision("auto", device)[0] == "bf16" else ["fp32"]


def blank_pictures(folder: Path, count: int) -> Path:
    """Noise: a step's time does not depend on what the pictures show."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(0))
    for i in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def say(row: dict[str, Any]) -> None:
    shares = ", ".join(f"{share:.0%} of {key}" for key, share in row["gemm_share"].items())
    print(f"{row['shape']}, {row['dtype']}: {row['median_s']:.3f} s; official {row['ratio']:.2f}x, "
          f"best plain {row['best_plain_ratio']:.2f}x; {shares}; peaks "
          + " / ".join(f"{row[key] / 2**30:.2f}" for key in PEAKS) + " GiB")  # fmt: skip
    for key, seconds in row["ways"].items():
        print(f"  {key}: {seconds['ratio']:.2f}x")
    for key, parts in row["parts"].items():
        print(f"  {key}: " + ", ".join(f"{name} {s:.3f}" for name, s in parts.items()), flush=True)


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
        for precision in precisions():
            with tempfile.TemporaryDirectory() as folder:
                row = time_step(name, precision, Path(folder))
            result["rows"].append(row)
            say(row)
            if options.json:
                write_json(options.json, result)


if __name__ == "__main__":
    main()
