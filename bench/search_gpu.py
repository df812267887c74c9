"""The feature search on a GPU: a T-Head's whole search, and the operators forward + backward.

    python bench/search_gpu.py [--images 64,16] [--quick] [--json FILE]

The searches are those of bench/search.py (three blocks, C = 384, 6 heads, Q = 8, a ViT's map and a
CNN's with its stem), without gradient under fp16 autocast: joint by each backend and cross, against
the official form and that with PyTorch's attention in it (sdpa). The operators are set against
packed SDPA (feature_search) and against SDPA over the concatenation (joint_attention), in the same
rounds. Seconds are medians over rounds by CUDA events: median_s of the device alone, captured in a
CUDA graph, eager_s called from Python.

The achieved rate stands beside its ceiling, both of the same rounds: of a search the products that
it needs beside a large fp16 product, of an operator the numbers that it must move beside a copy.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.device import captured, copy, medians
from bench.linear_distill_gpu import agree, forced
from bench.search import HEADS, MAPS, D, Q, searches
from bench.timing import machine, peak_bytes, write_json
from mokd_fast.ops import feature_search, joint_attention

Run = Callable[[], Any]
WIDTH = D // HEADS


def autocast(run: Run, device: str, dtype: torch.dtype) -> Run:
    def under() -> Any:
        with torch.no_grad(), torch.autocast(device, dtype, cache_enabled=False):
            return run()

    return under


def work(name: str, images: int) -> float:
    """Multiplications and additions of a joint search, each product as often as it is needed: the
    first block's once an image where no query changes it, the last one's without the query."""
    side, width, stem = MAPS[name]
    N, asked = side * side, Q * images
    tokens = asked * (N + 1)
    linear = (images * N + asked) * 3 + tokens * 9 + tokens * 12 + tokens * 3 + asked * N * 9
    scores = images * (N + Q) * N + tokens * (N + 1) + asked * N * (N + 1)
    return 2.0 * (linear * D * D + 2 * scores * D + (images * N * width * D if stem else 0))


def gemm(device: str) -> tuple[Run, float]:
    size = 8192 if device == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def timed(
    runs: Mapping[str, Run], ceiling: Run, device: str, rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Seconds as graphs, with the ceiling's; from Python; and peak bytes."""
    for run in runs.values():
        run()  # compile before anything is captured or counted
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    graphs = {name: captured(run, device) for name, run in runs.items()}
    counted = medians({"ceiling": ceiling, **graphs}, rounds, device, ahead=True)
    return counted, medians(runs, rounds, device), peaks


def row(mine: str, other: str, found: tuple[dict, dict, dict]) -> dict[str, Any]:
    seconds, eager, peaks = found
    return {
        "backend": mine,
        "median_s": seconds[mine],
        "eager_s": eager[mine],
        "peak_bytes": peaks[mine],
        "baseline": other,
        "baseline_s": seconds[other],
        "baseline_eager_s": eager[other],
        "ratio": seconds[other] / seconds[mine],
        "eager_ratio": eager[other] / eager[mine],
        "baseline_peak_bytes": peaks[other],
    }


def whole(
    name: str, images: int, backends: Sequence[str], device: str, rounds: int
) -> list[dict[str, Any]]:
    """Joint by the automatic choice and by each backend, and cross, against both official forms."""
    with torch.device(device):
        forms = searches(name, images)
    chosen = {"joint": forced(forms["joint"], ""), "cross": forced(forms["cross"], "")}
    chosen |= {f"joint {b}": forced(forms["joint"], b) for b in backends}
    chosen |= {name: forms[name] for name in ("official", "sdpa")}
    runs = {name: autocast(form, device, torch.float16) for name, form in chosen.items()}
    expected = runs["official"]()
    for key in runs:
        if key != "cross":
            agree(key, [runs[key]().reshape(expected.shape)], [expected])
    ceiling, product = gemm(device)
    found, needed = timed(runs, ceiling, device, rounds), work(name, images)
    rate = product / found[0]["ceiling"]
    common = {
        "op": "THead.search",
        "dtype": "float16 autocast",
        "shape": {"map": name, "N": MAPS[name][0] ** 2, "B": images, "Q": Q, "C": D},
        "gemm_TFLOP_per_s": rate / 1e12,
    }
    mine = [key for key in runs if key not in ("official", "sdpa")]
    rows = [common | row(key, other, found) for other in ("official", "sdpa") for key in mine]
    for each in rows:
        if each["backend"] != "cross":
            each["TFLOP_per_s"] = needed / each["median_s"] / 1e12
            each["ceiling_fraction"] = needed / rate / each["median_s"]
    return rows


def step(form: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        found = form(*tensors)
        found = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(found, tensors, [torch.ones_like(f) for f in found])
        return *(f.detach() for f in found), *grads

    return run


def moved(op: str, images: int, tokens: int, queries: int, item: int) -> int:
    """Bytes that forward and backward must move: inputs read twice, what comes out written and its
    gradient read, the inputs' gradients written."""
    joint = op == "joint_attention"
    inputs = 3 * (tokens + queries) if joint else 2 * tokens + queries
    outputs = queries * (tokens + 1) if joint else queries
    return (3 * inputs + 2 * outputs) * images * D * item


def operators(
    images: int, tokens: int, queries: int, dtype: torch.dtype, backends: Sequence[str],
    device: str, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Forward and backward of both operators, on heads as they leave a linear layer; where many
    tokens ask, as in a T-Head's later blocks, of feature_search alone."""
    random = {"device": device, "dtype": dtype}
    own = [*torch.randn(images, tokens, 3, HEADS, WIDTH, **random).permute(2, 0, 3, 1, 4)]
    asking = [*torch.randn(queries, images, 3, HEADS, WIDTH, **random).movedim(2, 0)]
    rows = []
    other = "sdpa"  # of packed queries, or over the repeated tokens (ops/attention.py)
    for operator, tensors in (
        (feature_search, [asking[0], *own[1:]]),
        (joint_attention, [*own, *asking]),
    )[: 2 if queries <= 2 * Q else 1]:
        op, leaves = operator.__name__, [t.detach().requires_grad_() for t in tensors]
        forms = {b: lambda *t, b=b, op=operator: op(*t, backend=b) for b in (*backends, other)}
        runs: dict[str, Run] = {n: step(f, leaves) for n, f in forms.items()}
        for backend in backends:
            agree(f"{op} {backend}", runs[backend](), runs[other]())
        copying, copied = copy(device, 1 << 27 if device == "cuda" else 1 << 20)
        found = timed(runs, copying, device, rounds)
        needed = moved(op, images, tokens, queries, dtype.itemsize)
        rate = copied / found[0]["ceiling"]
        for backend in backends:
            mine = row(backend, other, found)
            rows.append(
                {
                    "op": op,
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": {"Q": queries, "B": images, "H": HEADS, "N": tokens, "d": WIDTH},
                    "copy_GB_per_s": rate / 1e9,
                    **mine,
                    "GB_per_s": needed / mine["median_s"] / 1e9,
                    "ceiling_fraction": needed / rate / mine["median_s"],
                }
            )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        share = f"{r['ceiling_fraction']:.0%} of its ceiling, " if "ceiling_fraction" in r else ""
        print(
            f"{r['op']} {r['dtype']} {r['shape']} {r['backend']}: {r['median_s'] * 1e6:.0f} us "
            f"({r['eager_s'] * 1e6:.0f} from Python), {share}{r['ratio']:.2f}x {r['baseline']} "
            f"({r['eager_ratio']:.2f}x from Python), peak {r['peak_bytes'] / 2**20:.0f} / "
            f"{r['baseline_peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="triton,cuda", type=lambda x: x.split(","))
    parser.add_argument("--images", default=[64, 16], type=lambda x: [int(n) for n in x.split(",")])
    parser.add_argument("--rounds", default=11, type=int)
    parser.add_argument("--quick", action="store_true", help="fewest images, few rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = options.images[-1:], 5
    at = options.backends, options.device, options.rounds
    result: dict[str, Any] = {"machine": machine(), "rows": [], "failed": []}
    wanted: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for images in options.images:
        for name in MAPS:
            wanted.append((f"{name} B={images}", lambda n=name, b=images: whole(n, b, *at)))
        for dtype in (torch.float16, torch.float32):
            for tokens, queries in ((196, 8), (49, 8), (196, 196)):
                wanted.append((
                    f"{dtype} B={images} N={tokens} Q={queries}",
                    lambda b=images, n=tokens, q=queries, t=dtype: operators(b, n, q, t, *at),
                ))  # fmt: skip
    for name, measure in wanted:
        try:
            rows = measure()
        except Exception as error:  # the others still get theirs
            result["failed"].append(f"{name}: {error}")
            continue
        report(rows)
        result["rows"] += rows
        if options.json:
            write_json(options.json, result)
    print(*result["failed"], sep="\n")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
