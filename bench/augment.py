"""augment_crops on the CPU: speed and parity, on crops of photographs with DINO's probabilities.

    python bench/augment.py [--quick] [--photos FOLDER] [--json FILE]

Everything after crop and resize, to a normalised batch: Pillow (as the loader runs it, its crops
being Pillow's already, in as many threads as torch has), torchvision's v2 operators on uint8
tensors, the reference in plain PyTorch, and the C++ kernel; global views of 224 and local ones of
96, same numbers. Then how far each is from Pillow, in grey levels, an operation at a time. Without
--photos the photographs are scikit-learn's two.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.timing import calibrate, interleave, keep_memory, machine, write_json
from mokd_fast.data import AugmentConfig, ViewParams, augment_table, draw_views, normalize
from mokd_fast.data.pillow import augment
from mokd_fast.ops import augment_crops

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # the result is the byte itself
SIDES = {"global": 224, "local": 96}
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def photographs(folder: Path | None) -> list[Image.Image]:
    if folder:
        kinds = ".jpg", ".jpeg", ".png"
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)
        return [Image.open(file).convert("RGB") for file in files]
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


class Crops:
    """Crops of one side with the numbers of their views, in the form that each competitor takes.

    index: the pictures' positions in their list, by default 0, 1, …; the numbers depend on them.
    """

    def __init__(
        self,
        photos: list[Image.Image],
        kind: str,
        count: int,
        side: int,
        index: Sequence[int] | None = None,
    ) -> None:
        self.side, self.views = side, list[ViewParams]()
        self.images: list[Image.Image] = []
        part = slice(2) if kind == "global" else slice(2, 10)
        for i in range(count):
            photo = photos[i % len(photos)]
            number = index[i] if index else i
            for p in draw_views(AugmentConfig(), 0, 0, number, photo.height, photo.width)[part]:
                box = p.left, p.top, p.left + p.width, p.top + p.height
                size = side, side
                self.images.append(photo.crop(box).resize(size, Image.Resampling.BICUBIC))
                self.views.append(p)
        self.bytes = torch.from_numpy(np.stack([np.asarray(image) for image in self.images]))
        self.planar = [crop.permute(2, 0, 1).contiguous() for crop in self.bytes]

    def pillow(self, views: list[ViewParams], threads: int = 1) -> Tensor:
        """uint8 [B, H, W, 3]"""

        def one(image: Image.Image, p: ViewParams) -> np.ndarray:
            return np.frombuffer(augment(image, p).tobytes(), np.uint8)

        if threads == 1:
            found = list(map(one, self.images, views))
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(one, self.images, views))
        return torch.from_numpy(np.stack(found)).view(-1, self.side, self.side, 3)

    def v2(self, views: list[ViewParams]) -> list[Tensor]:
        """uint8 [3, H, W] each"""
        return [v2_view(x, p) for x, p in zip(self.planar, views, strict=True)]


def v2_view(x: Tensor, p: ViewParams) -> Tensor:
    steps: tuple[Callable[..., Tensor], ...] = (
        v2.adjust_brightness,
        v2.adjust_contrast,
        v2.adjust_saturation,
        v2.adjust_hue,
    )
    x = v2.horizontal_flip(x) if p.flip else x
    for op in p.order or ():
        x = steps[op](x, p.factors[op]) if p.factors[op] != NEUTRAL[op] else x
    x = v2.rgb_to_grayscale(x, num_output_channels=3) if p.grey else x
    x = v2.gaussian_blur(x, 2 * math.ceil(3 * p.sigma) + 1, p.sigma) if p.sigma else x
    return v2.solarize(x, 128) if p.solarize else x


def forms(crops: Crops, threads: int) -> dict[str, Callable[[], Any]]:
    """Each from its own form of the crops to a normalised batch."""
    views, numbers = crops.views, {"mean": MEAN, "std": STD}

    def ours(backend: str, dtype: torch.dtype) -> Tensor:
        table = torch.from_numpy(augment_table(views))
        return augment_crops(crops.bytes, table, dtype=dtype, backend=backend, **numbers)

    def tensors() -> Tensor:
        batch = torch.stack(crops.v2(views))
        return v2.normalize(v2.to_dtype(batch, torch.float32, scale=True), list(MEAN), list(STD))

    return {
        "cpu": lambda: ours("cpu", torch.float32),
        "cpu bfloat16": lambda: ours("cpu", torch.bfloat16),
        "pillow": lambda: normalize(crops.pillow(views, threads), MEAN, STD, channels_last=True),
        "torchvision v2": tensors,
        "reference": lambda: ours("reference", torch.float32),
    }


def speed(crops: Crops, kind: str, threads: int, rounds: int, copy_rate: float) -> dict[str, Any]:
    """The bytes model is what no form can do without: bytes read and numbers written."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = interleave(forms(crops, threads), rounds)
    torch.set_num_threads(before)
    floor = crops.bytes.numel() * (1 + 4) / copy_rate
    return {
        "op": "augment_crops",
        "backend": "cpu",
        "dtype": "float32",
        "shape": {"view": kind, "B": len(crops.views), "side": crops.side},
        "threads": threads,
        "seconds": dict(times),
        "median_s": times["cpu"],
        "baseline": "pillow",
        "baseline_s": times["pillow"],
        "ratio": times["pillow"] / times["cpu"],
        "floor_fraction": floor / times["cpu"],
        "discarded_rounds": times.discarded,
    }


def operations(views: list[ViewParams]) -> dict[str, list[ViewParams]]:
    """Each operation alone in every view, with its drawn numbers, then the views as they are."""
    plain = [replace(p, flip=False, grey=False, sigma=0.0, solarize=False) for p in views]
    off = [replace(p, order=None) for p in plain]
    found = {}
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        alone = [tuple(x if i == k else NEUTRAL[i] for i, x in enumerate(p.factors)) for p in plain]
        pairs = zip(plain, alone, strict=True)
        found[name] = [replace(p, order=(0, 1, 2, 3), factors=f) for p, f in pairs]
    found["jitter"] = [replace(p, order=p.order or (0, 1, 2, 3)) for p in plain]
    found["grey"] = [replace(p, grey=True) for p in off]
    sigmas = np.linspace(0.1, 2.0, len(views)).tolist()
    found["blur"] = [replace(p, sigma=s) for p, s in zip(off, sigmas, strict=True)]
    found["solarize"] = [replace(p, solarize=True) for p in off]
    return {**found, "whole view": views}


def parity(crops: Crops) -> list[dict[str, Any]]:
    """How far each form is from Pillow, an operation at a time."""
    rows = []
    for name, views in operations(crops.views).items():
        expected = crops.pillow(views).float()
        table = torch.from_numpy(augment_table(views))
        found = {
            backend: augment_crops(crops.bytes, table, backend=backend, **BYTES)
            for backend in ("cpu", "reference")
        }
        found["torchvision v2"] = torch.stack(crops.v2(views))
        row: dict[str, Any] = {"operation": name, "side": crops.side, "crops": len(views)}
        for backend, x in found.items():
            row[backend] = differences(x.permute(0, 2, 3, 1), expected)
        rows.append(row)
    return rows


def differences(found: Tensor, expected: Tensor) -> dict[str, float]:
    """In grey levels, of crops [B, H, W, 3]: mean, 99th percentile, worst crop's mean, largest."""
    off = (found.float() - expected.float()).abs()
    return {
        "mean": float(off.mean()),
        "p99": float(np.quantile(off.numpy(), 0.99)),
        "worst_crop": float(off.mean((1, 2, 3)).max()),
        "max": float(off.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few pictures, few rounds")
    parser.add_argument("--photos", type=Path, help="a folder of photographs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_memory()
    pictures, rounds = (4, 3) if options.quick else (16, 11)
    photos = photographs(options.photos)
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate()}
    result |= {"photographs": len(photos), "rows": [], "parity": []}
    print(result["machine"], result["calibration"], sep="\n")
    print("bytes model: a pixel is 3 bytes read and 3 numbers written")
    for kind, side in SIDES.items():
        crops = Crops(photos, kind, pictures, side)
        for threads in (1, 2):
            rate = result["calibration"]["copy_GB_per_s"] * 1e9
            row = speed(crops, kind, threads, rounds, rate)
            result["rows"].append(row)
            each = {k: f"{s / len(crops.views) * 1e6:.0f}" for k, s in row["seconds"].items()}
            print(f"{kind} {side}, {threads} thread(s), us a crop: {each}; {row['ratio']:.1f}x "
                  f"Pillow, {row['floor_fraction']:.0%} of the copy rate", flush=True)  # fmt: skip
        result["parity"] += parity(crops)
        for row in result["parity"][-9:]:
            means = {n: f"{row[n]['mean']:.3f}" for n in ("cpu", "reference", "torchvision v2")}
            print(f"{row['operation']} {side}, mean grey levels from Pillow: {means}, largest "
                  f"{row['cpu']['max']:.0f}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
