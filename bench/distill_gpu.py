"""distill_cross_entropy, forward + backward, on a GPU: every backend and type.

    python bench/distill_gpu.py [--images 64,16,4] [--quick] [--json FILE]

Each row sets a backend of ours against one other form, in the same rounds, at V = 10, T = 2 and
K = 65536. Seconds are those of a call, median over rounds, by CUDA events:
    median_s  captured in a CUDA graph: what the kernels take
    eager_s   called from Python one after the other, as by a training step
The floor is what two passes must move, (2 (V + T) + V) B K numbers, at the copy rate of the same
rounds. Inputs rotate, so that no call finds its logits in a cache. 16-bit runs are under autocast.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.baseline.losses import DINOLoss as Official
from bench.device import captured, copy, medians, rotations, turn
from bench.timing import machine, peak_bytes, write_json
from mokd_fast.ops import Target, cross_view_pairs, distill_cross_entropy

V, T = 10, 2
TAU, SHARP = 0.1, 0.04  # temperatures of student and teacher
Form = Callable[[Tensor, Tensor], Tensor]  # student [V, B, K], teacher [T, B, K] -> loss


def ours(backend: str, center: Tensor) -> Form:
    pairs = cross_view_pairs(T, V)

    def form(student: Tensor, teacher: Tensor) -> Tensor:
        target = Target(pairs, teacher, temperature=SHARP, center=center)
        return distill_cross_entropy(student, [target], temperature=TAU, backend=backend)[0]

    return form


def official(center: Tensor) -> Form:
    """The published loop, which moves its centre with every call: each starts from the same one,
    since a graph would go on reading the first."""
    loss = Official(len(center), V, [SHARP], TAU).to(center.device)
    first = loss.center

    def form(student: Tensor, teacher: Tensor) -> Tensor:
        loss.center = first
        return loss(student.flatten(0, 1), teacher.flatten(0, 1), 0)

    return form


def plain(center: Tensor, einsum: bool) -> Form:
    """The same in plain PyTorch: one log-softmax a row, the pairs as a matrix product or as a sum
    that a compiler can fuse."""
    pairs = torch.tensor(cross_view_pairs(T, V), device=center.device)  # [T, V]

    def form(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.autocast(center.device.type, enabled=False):
            q = ((teacher.float() - center) / SHARP).softmax(-1)
            log_p = (student.float() / TAU).log_softmax(-1)
            if einsum:
                mix = torch.einsum("tv,tbk->vbk", pairs, q)
            else:
                mix = (pairs[:, :, None, None] * q[:, None]).sum(0)
            return -(mix * log_p).sum() / student.shape[1]

    return form


def others(center: Tensor, compiled: bool) -> dict[str, Form]:
    forms = {"official": official(center), "einsum": plain(center, einsum=True)}
    if compiled:
        torch._dynamo.reset()
        whole = partial(torch.compile, dynamic=False, fullgraph=True)
        forms["einsum, compiled"] = whole(plain(center, einsum=True))
        forms["sum, compiled"] = whole(plain(center, einsum=False))
    return forms


def call(form: Form, student: Tensor, teacher: Tensor) -> Callable[[], Tensor]:
    device, dtype = student.device.type, student.dtype

    def run() -> Tensor:
        half = dtype if dtype != torch.float32 else torch.bfloat16
        with torch.autocast(device, half, enabled=dtype != torch.float32, cache_enabled=False):
            loss = form(student, teacher)
        return torch.autograd.grad(loss, student)[0]

    return run


def compare(
    backends: Sequence[str], dtype: torch.dtype, images: int, columns: int, device: str,
    rounds: int, compiled: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each of our backends and each other form."""
    moved = (2 * (V + T) + V) * images * columns * dtype.itemsize
    sets = [
        [(torch.randn(n, images, columns, device=device) * 3).to(dtype) for n in (V, T)]
        for _ in range(rotations((2 * V + T) * images * columns * dtype.itemsize, device))
    ]
    center = torch.zeros(columns, device=device)
    forms = {backend: ours(backend, center) for backend in backends}
    forms |= others(center, compiled)
    eager, graphs, peaks = {}, {}, {}
    for name, form in forms.items():
        calls = [call(form, student.requires_grad_(), teacher) for student, teacher in sets]
        eager[name] = turn(calls)
        eager[name]()  # compile before anything is captured or counted
        peaks[name] = peak_bytes(calls[0])
        graphs[name] = captured(eager[name], device)
    copying, copied = copy(device, 1 << 27 if device == "cuda" else 1 << 20)
    counted = medians({"copy": copying, **graphs}, rounds, device, ahead=True)
    from_python = medians(eager, rounds, device)
    found = {
        name: (counted[name] / len(sets), from_python[name] / len(sets), peaks[name])
        for name in forms
    }
    common = {"op": "distill_cross_entropy", "dtype": str(dtype).removeprefix("torch."),
              "shape": {"V": V, "T": T, "B": images, "K": columns}, "sets": len(sets)}  # fmt: skip
    rate, rest = copied / counted["copy"], [name for name in forms if name not in backends]
    return [common | row(mine, other, found, moved, rate) for mine in backends for other in rest]


def row(
    mine: str, other: str, found: dict[str, tuple[float, float, int]], moved: int, rate: float
) -> dict[str, Any]:
    """`found` has seconds as a graph, seconds from Python and peak bytes; `rate` that of a copy."""
    (seconds, eager, peak), (theirs, theirs_eager, theirs_peak) = found[mine], found[other]
    return {
        "backend": mine,
        "median_s": seconds,
        "eager_s": eager,
        "copy_GB_per_s": rate / 1e9,
        "GB_per_s": moved / seconds / 1e9,
        "floor_fraction": moved / rate / seconds,
        "peak_bytes": peak,
        "baseline": other,
        "baseline_s": theirs,
        "baseline_eager_s": theirs_eager,
        "ratio": theirs / seconds,
        "eager_ratio": theirs_eager / eager,
        "baseline_peak_bytes": theirs_peak,
    }


def runnable(backends: Sequence[str], device: str) -> tuple[list[str], list[str]]:
    """The backends that can run here, and a sentence for each other one."""
    student, teacher = (torch.zeros(n, 1, 8, device=device) for n in (V, T))
    able, failed = [], []
    for backend in backends:
        try:
            call(ours(backend, student[0, 0]), student.requires_grad_(), teacher)()
            able.append(backend)
        except RuntimeError as error:
            failed.append(f"{backend}: {error}")
    return able, failed


def report(rows: list[dict[str, Any]]) -> None:
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        row = mine[0]
        print(f"{row['dtype']} B={row['shape']['B']} {backend}: {row['median_s'] * 1e6:.0f} us, "
              f"{row['GB_per_s']:.0f} GB/s, {row['floor_fraction']:.0%} of the copy rate "
              f"{row['copy_GB_per_s']:.0f} GB/s; from Python {row['eager_s'] * 1e6:.0f} us, "
              f"peak {row['peak_bytes'] / 2**20:.0f} MiB")  # fmt: skip
        for other in mine:
            mib = other["baseline_peak_bytes"] / 2**20
            print(f"  {other['ratio']:.1f}x {other['baseline']} ({other['eager_ratio']:.1f}x from "
                  f"Python, peak {mib:.0f} MiB)", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="cuda,triton", type=lambda x: x.split(","))
    parser.add_argument(
        "--images", default=[64, 16, 4], type=lambda x: [int(n) for n in x.split(",")]
    )
    parser.add_argument("--columns", default=65536, type=int)
    parser.add_argument("--rounds", default=21, type=int)
    parser.add_argument("--quick", action="store_true", help="fewest images, few rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = options.images[-1:], 5
    able, failed = runnable(options.backends, options.device)
    result: dict[str, Any] = {"machine": machine(), "rows": [], "failed": failed}
    for images in options.images:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            first = images == options.images[0]  # to compile takes long
            for compiled in (True, False) if first else (False,):
                try:
                    rows = compare(able, dtype, images, options.columns, options.device,
                                   options.rounds, compiled)  # fmt: skip
                    break
                except Exception as error:  # the other types and sizes still get theirs
                    rows = []
                    failed.append(f"{dtype} B={images}, {compiled=}: {error}")
            report(rows)
            result["rows"] += rows
            if options.json:
                write_json(options.json, result)
    print(*failed, sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
