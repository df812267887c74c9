"""The loaders on the CPU: speed, parity, memory, beside DINO's own data path.

    python bench/data.py [--quick] [--photos FOLDER] [--cache FOLDER] [--json FILE]

From JPEG files to finished batches, normalised fp32 of two views of 224 and eight of 96 with
DINO's probabilities, with 2 worker processes (DALI: 2 threads): the official transforms
(torchvision on Pillow, a sample at a time, default collate), torchvision's v2 transforms on uint8
tensors in the same way, the three loaders, and Pillow's crops with `augment_crops` behind them. A
turn starts the workers, makes its batches and ends them. What the workers leave to do is done on
one torch thread: the cores are theirs, and a second OpenMP thread spins where it waits, which the
rows "2 torch threads" show. The pictures are windows of photographs: those of --photos, or of
Debian's wallpapers (apt install ukui-wallpapers lomiri-wallpapers-20.04 lomiri-wallpapers-16.04),
or scikit-learn's two where those are not installed.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench import data_parts, pictures
from bench.baseline.augmentation import MEAN, STD, Official, Tensors
from bench.timing import calibrate, interleave, machine, write_json
from mokd_fast.data import AugmentConfig, ViewLoader, ViewParams, Views, finish, open_source
from mokd_fast.data.batches import Batches, leave_signals_to_the_run, same

BATCH, WORKERS = 32, 2
BASELINE = "official"
Form = Callable[[int, int], Iterator[list[Tensor]]]  # the batches of micro-steps start … stop


class PillowCrops(Batches):
    """Views cropped and resized by Pillow; all else is left to `augment_crops`."""

    def render(self, image: Any, params: list[ViewParams]) -> list[np.ndarray]:
        return data_parts.pillow_crops(image, params, self.augment)


def forms(folder: Path, cfg: AugmentConfig, batch: int, workers: int) -> dict[str, Form]:
    source = open_source(folder)
    options = {"batch": batch, "channels": 3, "seed": 0}

    def peers(transform: Callable[..., Any]) -> Form:
        pictures = ImageFolder(folder, transform)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()

        def batches(start: int, stop: int) -> Iterator[list[Tensor]]:
            part = [order[i % len(order)] for i in range(start * batch, stop * batch)]
            loader = DataLoader(Subset(pictures, part), batch, num_workers=workers)
            return (views for views, _ in loader)

        return batches

    def ours(name: Any) -> Form:
        loader = ViewLoader(source, cfg, workers=workers, loader=name, **options)
        return lambda start, stop: map(_finished, loader.batches(start, stop))

    def with_augment_crops(start: int, stop: int) -> Iterator[list[Tensor]]:
        batches = PillowCrops(source, cfg, kind="cpu", **options)
        loader = DataLoader(
            batches, None, sampler=range(start, stop), num_workers=workers, collate_fn=same,
            worker_init_fn=leave_signals_to_the_run,
        )  # fmt: skip
        return map(_finished, loader)

    found = {BASELINE: peers(Official(cfg)), "torchvision v2": peers(Tensors(cfg))}
    found |= {"pillow": ours("pillow"), "pillow + augment_crops": with_augment_crops}
    for name in data_parts.loaders():
        found[name] = ours(name)
        found[f"{name}, 2 torch threads"] = _on_two_threads(found[name])
    return found


def _on_two_threads(form: Form) -> Form:
    def batches(start: int, stop: int) -> Iterator[list[Tensor]]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            yield from form(start, stop)
        finally:
            torch.set_num_threads(before)

    return batches


def _finished(views: Views) -> list[Tensor]:
    large, small = finish(views, MEAN, STD, device="cpu")
    return [large] if small is None else [large, small]


def speed(forms: Mapping[str, Form], steps: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds a picture, by the clock and of the processor; ratios are medians over the rounds."""
    starts = {name: itertools.count(0, steps) for name in forms}

    def turn(name: str) -> None:
        start = next(starts[name])
        made = sum(1 for _ in forms[name](start, start + steps))
        assert made == steps, f"{name} made {made} of {steps} batches"

    times = interleave({name: lambda n=name: turn(n) for name in forms}, rounds)
    n = steps * batch
    rows = []
    for name in forms:
        wall, cpu = times.turns[name], times.cpu[name]
        row = {"op": "views", "backend": name, "dtype": "float32", "shape": {"B": batch}}
        row |= {"baseline": BASELINE, "discarded_rounds": times.discarded}
        for key, each, base in (
            ("", wall, times.turns[BASELINE]),
            ("cpu_", cpu, times.cpu[BASELINE]),
        ):
            ratios = [b / x for b, x in zip(base, each, strict=True)]
            row |= {
                f"{key}median_s": statistics.median(each) / n,
                f"{key}range_s": [min(each) / n, max(each) / n],
                f"{key}baseline_s": statistics.median(base) / n,
                f"{key}ratio": statistics.median(ratios),
                f"{key}ratio_range": [min(ratios), max(ratios)],
            }
        rows.append(row)
    return rows


def memory(name: str, folder: Path, steps: int, batch: int = BATCH) -> dict[str, int]:
    """Peak resident bytes of this process and of its largest worker, after so many batches.

    What processes share counts in each."""
    workers = 0
    for _ in forms(folder, AugmentConfig(), batch, WORKERS)[name](0, steps):
        workers = max([workers, *(_peak(process.pid) for process in active_children())])
    return {"peak_bytes": _peak("self"), "worker_peak_bytes": workers}


def _peak(pid: Any) -> int:
    """Not getrusage: after fork and exec it begins with the parent's peak."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # ended, or no Linux
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _memory_of(name: str, folder: Path, steps: int) -> dict[str, int]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pictures, few rounds")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs")
    parser.add_argument("--cache", type=Path, help="where the pictures are made, once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        name, folder, steps = options.memory
        print(json.dumps(memory(name, Path(folder), int(steps))))
        return
    count, steps, rounds, views = (256, 4, 2, 4) if options.quick else (2000, 20, 7, 32)
    folder = pictures.make(count, options.photos, options.cache)
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate()}
    result["pictures"] = data_parts.facts(folder)
    print(result["machine"], result["calibration"], result["pictures"], sep="\n", flush=True)
    result["index"] = data_parts.index_pass(folder, WORKERS)
    print("index pass", result["index"], flush=True)
    result["breakdown_ms"] = data_parts.breakdown(folder, steps, BATCH)
    print("cpu loader, ms a picture", result["breakdown_ms"], flush=True)
    result["parity"] = data_parts.parity(folder, views)
    for row in result["parity"]:
        means = {key: f"{x['mean']:.3f}" for key, x in row.items() if isinstance(x, dict)}
        print(
            f"{row['operation']} {row['side']}, mean grey levels from Pillow: {means}", flush=True
        )
    result["rows"] = speed(forms(folder, AugmentConfig(), BATCH, WORKERS), steps, BATCH, rounds)
    for row in result["rows"]:
        row |= _memory_of(row["backend"], folder, 8)
        print(f"{row['backend']}: {1 / row['median_s']:.0f} images/s, {row['ratio']:.2f}x; "
              f"{row['cpu_median_s'] * 1e3:.1f} ms of processor time, {row['cpu_ratio']:.2f}x; "
              f"{row['discarded_rounds']} busy rounds", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
