"""Tiles, warps and stages of distill_cross_entropy on this GPU: what the table should hold.

    python bench/distill_sweep.py [--seconds 45] [--json FILE]

Configurations of kernels/configs.py, forward and backward apart, captured, inputs rotating; the
first row of each backend, "now", is what the table chooses today. "lines" of the JSON are what its
lines for this GPU, V = 10, T = 2 and K would be, but for the bytes in flight, which no clock tells.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from mokd_fast.kernels.configs import Config, gpu

from bench.device import captured, medians, rotations, turn
from bench.timing import machine, write_json
from mokd_fast.ops import cross_view_pairs
from mokd_fast.ops.distill import _kernels

V, T = 10, 2
# Triton: columns a thread, warps, stages.
TRITON = [
    Config(32 * columns * warps, warps, stages)
    for columns, warps, stages in product((16, 8, 32, 4), (4, 8, 2), (3, 2, 1, 4, 6))
]
CUDA = [Config(1024), Config(512), Config(256)]
CONFIGS: dict[str, list[Config]] = {"triton": TRITON, "cuda": CUDA}


class Case:
    """Sets of logits [V, B, K] and [T, B, K] that rotate, and the flat arguments around them."""

    def __init__(self, images: int, columns: int, dtype: torch.dtype, device: str) -> None:
        self.images, self.columns, self.device = images, columns, device
        size = (2 * V + T) * images * columns * dtype.itemsize
        self.sets = [
            [(torch.randn(n, images, columns, device=device) * 3).to(dtype) for n in (V, T)]
            for _ in range(rotations(size, device))
        ]
        empty = torch.empty(0, device=device)
        scalars = torch.tensor([0.1, 0.04, 1.0], device=device)
        pairs = [weight for row in cross_view_pairs(T, V) for weight in row]
        center = torch.zeros(columns, device=device)
        self.rest = [center], [empty], scalars, pairs, [False]
        self.grad = torch.ones((), device=device)

    def seconds(self, kernels: Any, config: Config | None, rounds: int) -> dict[str, float]:
        """Of a forward and of a backward pass; without a configuration, of the table's."""
        calls = [(s, [t], *self.rest) for s, t in self.sets]
        forward_pass = partial(kernels.distill_forward, config=config)
        stats = [forward_pass(*call)[2] for call in calls]
        forward = turn([partial(forward_pass, *call) for call in calls])
        backward = turn([
            partial(kernels.distill_backward, self.grad, x, *call, config=config)
            for call, x in zip(calls, stats, strict=True)
        ])  # fmt: skip
        runs = {"forward_s": forward, "backward_s": backward}
        graphs = {name: captured(run, self.device) for name, run in runs.items()}
        found = medians(graphs, rounds, self.device, ahead=True)
        return {name: value / len(calls) for name, value in found.items()}


def sweep(
    backends: Sequence[str], dtypes: Sequence[torch.dtype], images: Sequence[int], columns: int,
    device: str, rounds: int = 11,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row a configuration, type and number of images; those of a configuration together, since
    they share its compiled kernels."""
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        cases = [Case(n, columns, dtype, device) for n in images]
        for backend in backends:
            for config in (None, *CONFIGS[backend]):
                for case in cases:
                    row: dict[str, Any] = {"backend": backend, "dtype": name, "B": case.images,
                                           "K": columns, "bytes": dtype.itemsize,
                                           "config": config or "now"}  # fmt: skip
                    try:
                        row |= case.seconds(_kernels(backend), config, rounds)
                    except Exception as error:  # too much shared memory, say: not a choice, then
                        row["error"] = str(error).split("\n")[0]
                    yield row


def best(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each backend, type, B and pass: the fastest configuration beside today's."""
    lines = []
    for key in dict.fromkeys((r["backend"], r["dtype"], r["B"]) for r in rows):
        mine = [r for r in rows if (r["backend"], r["dtype"], r["B"]) == key and "error" not in r]
        for part in ("forward_s", "backward_s"):
            now = [r[part] for r in mine if r["config"] == "now"]
            first = min(mine, key=lambda r: r[part], default=None)
            if first and now:
                lines.append(f"{' '.join(map(str, key))} {part}: {first[part] * 1e6:.1f} us with "
                             f"{first['config']}, now {now[0] * 1e6:.1f} us")  # fmt: skip
    return lines


def lines(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each backend and type the fastest configuration at the most images, as the table's line;
    smaller tiles for fewer images are a rule beside the table."""
    found, about = [], machine()
    for backend, size in dict.fromkeys((r["backend"], r["bytes"]) for r in rows):
        mine = [r for r in rows if (r["backend"], r["bytes"]) == (backend, size)]
        mine = [r for r in mine if r["B"] == max(r["B"] for r in mine)]
        mine = [r for r in mine if "error" not in r and r["config"] != "now"]
        if not mine:
            continue
        first = min(mine, key=lambda r: r["forward_s"] + r["backward_s"])
        micros = (first["forward_s"] + first["backward_s"]) * 1e6
        found.append({
            "backend": backend,
            "capability": gpu(0 if device == "cuda" else -1)[0],
            "columns": first["K"],
            "rows": T,
            "bytes": size,
            "config": first["config"],
            "measured": f"{about['gpu']}, {about['date']}: {micros:.0f} us, B = {first['B']}",
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="cuda,triton", type=lambda x: x.split(","))
    parser.add_argument(
        "--images", default=[64, 16, 4], type=lambda x: [int(n) for n in x.split(",")]
    )
    parser.add_argument("--columns", default=65536, type=int)
    parser.add_argument("--seconds", default=45.0, type=float, help="start no row after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin, rows = time.perf_counter(), []
    dtypes = [torch.bfloat16, torch.float32]  # fp16 moves the same bytes as bf16
    found = sweep(options.backends, dtypes, options.images, options.columns, options.device)
    complete = True
    for row in found:
        rows.append(row)
        if options.json and len(rows) % 10 == 0:
            write_json(options.json, {"machine": machine(), "rows": rows})
        if time.perf_counter() - begin > options.seconds:
            complete = False
            break
    if options.json:
        result = {"machine": machine(), "complete": complete, "rows": rows}
        write_json(options.json, result | {"lines": lines(rows, options.device)})
    print(*best(rows), sep="\n")
    errors = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(errors)} could not run{'' if complete else '; time ran out'}")
    for row in errors:
        print(" ", row["backend"], row["dtype"], row["B"], row["config"], row["error"])
    sys.exit(0 if len(errors) < len(rows) else 1)


if __name__ == "__main__":
    main()
