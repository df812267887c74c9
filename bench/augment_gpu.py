"""augment_crops on a GPU: its check, and its share of the copy rate.

    python bench/augment_gpu.py [--device cuda] [--quick] [--json FILE]

DINO's views of 64 pictures; median_s of the device alone, captured in a CUDA graph, eager_s called
from Python. `floor_fraction` counts the bytes of the crops and of the result alone at the rate of a
copy of the same rounds, `moved_fraction` all that the kernels move by their model
(kernels/augment.py): contrast reads a crop once more, blur moves it twice.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.device import captured, copy, medians, rotations, turn
from bench.timing import machine, write_json
from mokd_fast.data import AugmentConfig, augment_table, draw_views
from mokd_fast.ops import augment_crops

if TYPE_CHECKING:
    from bench.gpu_check import Where

NUMBERS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.3,), (0.35,))}
SIDES = {"global": (224, slice(2)), "local": (96, slice(2, 10))}


def table(pictures: int, part: slice, cfg: AugmentConfig) -> Tensor:
    views = [p for i in range(pictures) for p in draw_views(cfg, 0, 0, i, 375, 500)[part]]
    return torch.from_numpy(augment_table(views))


def augmented(at: "Where") -> None:
    """Against the reference on the CPU: the same bits, but for a rounding of the blur."""
    cfg = AugmentConfig(jitter=1.0, hue=0.5, grey=0.1, solarize=(0.3,) * 3)
    params = table(1 if at.small else 16, slice(10), cfg)
    for c, (mean, std) in NUMBERS.items():
        for h, w in ((9, 17), (3, 2)) if at.small else ((96, 96), (37, 131), (224, 224)):
            crops = torch.randint(256, (len(params), h, w, c), dtype=torch.uint8)
            for dtype in at.dtypes:
                if dtype == torch.float64:
                    continue
                options: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype}
                exact = augment_crops(crops, params, backend="reference", **options).float()
                there = crops.to(at.device), params.to(at.device)
                found = augment_crops(*there, backend=at.backend, **options).cpu().float()
                off, blurred = (found - exact).abs(), params[:, 10] > 0
                assert not off[~blurred].any(), f"{dtype} {list(crops.shape)}: {off.max()}"
                share = (off > 0.01).float().mean()
                # One level, which the result's type rounds on both sides.
                most = 1.02 / (255 * min(std)) + torch.finfo(dtype).eps * exact.abs().max()
                assert off.max() <= most and share < 0.01, (
                    f"{dtype} {list(crops.shape)}, blurred: {off.max():.3g} off, {share:.2%} of "
                    "the numbers by more than 0.01"
                )


def measure(kind: str, pictures: int, dtype: torch.dtype, device: str, rounds: int = 9) -> dict:
    """One row; turns go through copies of the crops until the cache holds none of them."""
    side, part = SIDES[kind]
    params = table(pictures, part, AugmentConfig())
    shape = len(params), side, side, 3
    pixels = shape[0] * side**2
    floor = pixels * 3 * (1 + dtype.itemsize)
    contrast = (params[:, 1] >= 0).float().mean().item()
    blur = (params[:, 10] > 0).float().mean().item()
    moved = floor + pixels * (3 * contrast + 30 * blur)
    sets = [torch.randint(256, shape, dtype=torch.uint8, device=device)
            for _ in range(rotations(floor, device))]  # fmt: skip
    there = params.to(device)
    mean, std = NUMBERS[3]
    backend = "triton" if device == "cuda" else "cpu"

    def one(crops: Tensor) -> Any:
        return lambda: augment_crops(crops, there, mean=mean, std=std, dtype=dtype, backend=backend)

    run = turn([one(crops) for crops in sets])
    copying, copied = copy(device, 1 << 27 if device == "cuda" else 1 << 20)
    runs = {"copy": copying, "ours": captured(run, device)}
    counted = medians(runs, rounds, device, ahead=True)
    rate, seconds = copied / counted["copy"], counted["ours"] / len(sets)
    return {
        "op": "augment_crops",
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"view": kind, "B": shape[0], "side": side},
        "median_s": seconds,
        "eager_s": medians({"ours": run}, rounds, device)["ours"] / len(sets),
        "copy_GB_per_s": rate / 1e9,
        "floor_bytes": floor,
        "moved_bytes": moved,
        "floor_fraction": floor / seconds / rate,
        "moved_fraction": moved / seconds / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="four pictures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    pictures = 4 if options.quick else options.pictures
    for kind in SIDES:
        for dtype in (torch.bfloat16, torch.float32):
            row = measure(kind, pictures, dtype, options.device)
            result["rows"].append(row)
            print(f"{row['shape']} {row['dtype']}: {row['median_s'] * 1e6:.0f} us "
                  f"({row['eager_s'] * 1e6:.0f} from Python), "
                  f"{row['floor_fraction']:.0%} of the copy rate for crops and result, "
                  f"{row['moved_fraction']:.0%} for all that is moved", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
