"""linear_distill_cross_entropy on a GPU: prototypes and loss, forward + backward, time and memory.

    python bench/linear_distill_gpu.py [--images 64,16] [--quick] [--json FILE]

From features [V, B, D] and prototypes [K, D] to the loss and the gradients dX and dW, at V = 10,
T = 2, K = 65536 and D = 256. Each row sets a backend of ours against linear layers with the
official loss, or with our fused loss of the same backend (`stored`), in the same rounds. Seconds
are medians over rounds by CUDA events: median_s of the device alone, captured in a CUDA graph,
eager_s called from Python.

extra_bytes: the peak beyond inputs, dX and dW. (Of a form whose peak comes before dW is there, so
much less than it has: our share of it comes out too large, never too small.) autocast: fp32
features and prototypes, products in bf16.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.device import captured, medians
from bench.linear_distill import KINDS, PRODUCTS, D, Form, T, V, official, ours, stored, tensors
from bench.timing import machine, peak_bytes, write_json
from mokd_fast.ops.dispatch import ENVIRONMENT
from mokd_fast.ops.linear_chunks import chunk_size

Step = Callable[[], tuple[Tensor, ...]]  # -> loss, dX, dW


def forced(form: Form, backend: str) -> Form:
    def run(*inputs: Tensor) -> Tensor:
        os.environ[ENVIRONMENT] = backend
        return form(*inputs)

    return run


def step(form: Form, kind: str, inputs: Sequence[Tensor]) -> Step:
    device = inputs[0].device.type

    def run() -> tuple[Tensor, ...]:
        half = kind != "float32"
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            loss = form(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs[:2])

    return run


def agree(name: str, have: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for mine, theirs in zip(have, want, strict=True):
        error = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        assert error <= 3e-2, (name, list(theirs.shape), error)


def compare(
    backend: str, kind: str, images: int, columns: int, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Two rows of a backend: against the official loss, and against our own of stored logits."""
    with torch.device(device):
        inputs = tensors(kind, images, columns)
    forms = {"official": official, "stored": forced(stored, backend), "ours": forced(ours, backend)}
    steps = {name: step(form, kind, inputs) for name, form in forms.items()}
    want, graphs, extra = steps["official"](), {}, {}
    for name, run in steps.items():
        agree(name, run(), want)
        extra[name] = peak_bytes(run) - sum(t.nbytes for t in inputs[:2])
        graphs[name] = captured(run, device)
    taken, eager = medians(graphs, rounds, device, ahead=True), medians(steps, rounds, device)
    common = {
        "op": "linear_distill_cross_entropy",
        "dtype": kind,
        "shape": {"V": V, "T": T, "B": images, "K": columns, "D": D},
        "chunk": chunk_size(inputs[0], (V + T) * images, PRODUCTS[kind]),
        "backend": backend,
        "median_s": taken["ours"],
        "eager_s": eager["ours"],
        "extra_bytes": extra["ours"],
    }
    return [
        {
            **common,
            "baseline": other,
            "baseline_s": taken[other],
            "baseline_eager_s": eager[other],
            "ratio": taken[other] / taken["ours"],
            "eager_ratio": eager[other] / eager["ours"],
            "baseline_extra_bytes": extra[other],
            "extra_share": extra["ours"] / extra[other],
        }
        for other in ("official", "stored")
    ]


def report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['dtype']} B={row['shape']['B']} {row['backend']}, chunks of {row['chunk']}: "
            f"{row['median_s'] * 1e6:.0f} us ({row['eager_s'] * 1e6:.0f} from Python), time "
            f"{1 / row['ratio']:.2f} ({1 / row['eager_ratio']:.2f}) of {row['baseline']}'s, extra "
            f"memory {row['extra_bytes'] / 2**20:.1f} MiB, {row['extra_share']:.1%} of its",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="cuda,triton", type=lambda x: x.split(","))
    parser.add_argument("--images", default=[64, 16], type=lambda x: [int(n) for n in x.split(",")])
    parser.add_argument("--columns", default=65536, type=int)
    parser.add_argument("--rounds", default=11, type=int)
    parser.add_argument("--quick", action="store_true", help="fewest images, few rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = options.images[-1:], 5
    result: dict[str, Any] = {"machine": machine(), "rows": [], "failed": []}
    for images in options.images:
        for kind in KINDS:
            for backend in options.backends:
                try:
                    rows = compare(
                        backend, kind, images, options.columns, options.device, options.rounds
                    )
                except Exception as error:  # the others still get theirs
                    result["failed"].append(f"{backend} {kind} B={images}: {error}")
                    continue
                report(rows)
                result["rows"] += rows
                if options.json:
                    write_json(options.json, result)
    print(*result["failed"], sep="\n")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
