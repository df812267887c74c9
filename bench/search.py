"""The feature search on the CPU: a T-Head's search without gradient, and the operators alone.

    python bench/search.py [--quick] [--threads N] [--json FILE]

A whole three-block T-Head (C = 384, 6 heads) on a ViT's map of 14 x 14 and on a CNN's of 7 x 7 with
its stem, Q = 8 queries: ours, joint (exact) and cross, against the official form, which repeats the
map, concatenates and stores its softmax, in the same dtype (bf16: autocast) and, for bf16, in fp32;
and against that form with PyTorch's attention for its softmax (sdpa). Cross is timed alone, and as
a step has it (look), where its tokens are those of the teacher's own pass, which L_st needs.
`products` is the share of the joint search that its linear layers take. The operators are set
against SDPA (packed queries; for joint_attention the repeated tokens) and einsum, forward and with
backward.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.baseline.official import THead as Official
from bench.timing import calibrate, interleave, keep_memory, machine, peak_bytes, write_json
from mokd_fast.nn.heads import Layers, THead
from mokd_fast.ops import feature_search, joint_attention
from mokd_fast.ops.dispatch import pick

D, HEADS, Q = 384, 6, 8
MAPS = {"vit": (14, 384, False), "cnn": (7, 2048, True)}  # side, width, stem


def searches(name: str, images: int) -> dict[str, Callable[[], Tensor]]:
    """The search of one map's T-Head in each form, same weights."""
    side, width, stem = MAPS[name]
    grid = (side, side)
    joint, cross = (
        THead(width, 8, dim=D, grid=grid, stem=stem, heads=HEADS, search=search)  # type: ignore
        for search in ("joint", "cross")
    )
    official = Official(width, D, 8, grid, num_heads=HEADS, stem=stem)
    for head in (cross, official):
        head.load_state_dict(joint.state_dict())
    official.last_layer = torch.nn.Identity()  # type: ignore[assignment]
    sdpa = copy.deepcopy(official)
    for block in sdpa.blocks:
        block.attn.forward = partial(attend, block.attn)
    tokens, queries = torch.randn(images, side * side, width), torch.randn(Q, images, D)
    for head in (joint, cross, official, sdpa):
        head.requires_grad_(False)
    memory = cross.remember(tokens, grid)[1]
    halves = [(k.bfloat16(), v.bfloat16()) for k, v in memory]

    def look() -> Tensor:
        found = halves if torch.is_autocast_enabled("cpu") else memory
        return cross.look(found, queries)[0]

    return {
        "joint": lambda: joint.search(tokens, grid, queries),
        "cross": lambda: cross.search(tokens, grid, queries),
        "look": look,
        "official": lambda: official(tokens.repeat(Q, 1, 1), grid, queries.flatten(0, 1))[0],
        "sdpa": lambda: sdpa(tokens.repeat(Q, 1, 1), grid, queries.flatten(0, 1))[0],
    }


def attend(self: Any, x: Tensor) -> Tensor:
    """The official Attention's forward with PyTorch's attention in it."""
    qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def cast(run: Callable[[], Any], dtype: torch.dtype) -> Callable[[], Any]:
    def under_autocast() -> Any:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return run()

    return under_autocast


def whole(name: str, images: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    forms = searches(name, images)
    runs = {key: cast(run, dtype) for key, run in forms.items()}
    if dtype != torch.float32:
        runs["official_fp32"] = cast(forms["official"], torch.float32)
    times = interleave(runs, rounds)
    peaks = {key: peak_bytes(run) for key, run in runs.items()}
    found, expected = (cast(forms[key], torch.float32)() for key in ("joint", "official"))
    return {
        "op": "THead.search",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"map": name, "N": MAPS[name][0] ** 2, "B": images, "Q": Q, "C": D},
        "seconds": dict(times),
        "ratio": times["official"] / times["joint"],
        "ratio_to_fp32": times.get("official_fp32", times["official"]) / times["joint"],
        "ratio_of_sdpa": times["official"] / times["sdpa"],
        "ratio_of_sdpa_to_fp32": times.get("official_fp32", times["official"]) / times["sdpa"],
        "cross_share": times["cross"] / times["joint"],
        "look_share": times["look"] / times["joint"],
        "products": products(runs["joint"]) / times["joint"],
        "peak_bytes": peaks,
        "error_fp32": float((found.flatten(0, 1) - expected).abs().max()),
        "discarded_rounds": times.discarded,
    }


def products(run: Callable[[], Any]) -> float:
    """Seconds of `run` in linear layers."""
    runs: list[Callable[[], Any]] = []
    call = Layers.__call__

    def keep(self: Layers, layer: Any, x: Tensor, **options: Any) -> Tensor:
        runs.append(lambda: call(self, layer, x, **options))
        return call(self, layer, x, **options)

    with mock.patch.object(Layers, "__call__", keep):
        run()

    def again() -> None:
        with torch.no_grad():
            for one in runs:
                one()

    return interleave({"products": again}, 3)["products"]


def operators(images: int, tokens: int, queries: int, dtype: torch.dtype, rounds: int) -> list[Any]:
    """feature_search and joint_attention on heads as they leave a linear layer."""
    qkv = torch.randn(images, tokens, 3, HEADS, D // HEADS).to(dtype).permute(2, 0, 3, 1, 4)
    own = [t.requires_grad_() for t in qkv]
    asking = [torch.randn(queries, images, HEADS, D // HEADS).to(dtype) for _ in range(3)]
    asking = [t.requires_grad_() for t in asking]
    search, joint = (asking[0], *own[1:]), (*own, *asking)
    forms: dict[str, Callable[[], Any]] = {
        name: lambda name=name: feature_search(*search, backend=name)
        for name in ("cpu", "sdpa", "reference")
    }
    rows = []
    for op, tensors, runs in (
        ("feature_search", search, {"ours": lambda: feature_search(*search), **forms}),
        (
            "joint_attention",
            joint,
            {
                name: lambda name=name: joint_attention(*joint, backend=name)
                for name in ("cpu", "sdpa", "reference")
            },
        ),
    ):
        grads = {f"{name} backward": backward(run, tensors) for name, run in runs.items()}
        plain = {name: cast(run, torch.float32) for name, run in runs.items()}
        times = interleave({**plain, **grads}, rounds, 3)
        chosen = pick(op, *tensors, *([False] if op == "feature_search" else [])).name
        rows.append(
            {
                "op": op,
                "backend": chosen,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": {"Q": queries, "B": images, "H": HEADS, "N": tokens, "d": D // HEADS},
                "seconds": dict(times),
                "discarded_rounds": times.discarded,
            }
        )
    return rows


def backward(run: Callable[[], Any], tensors: Any) -> Callable[[], Any]:
    def step() -> None:
        found = run()
        found = found if isinstance(found, tuple) else (found,)
        torch.autograd.grad(found, tensors, [torch.ones_like(f) for f in found])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four images, few rounds")
    parser.add_argument("--threads", type=int, help="of torch; its own choice without")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else 7
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate()}
    result |= {"rows": [], "operators": []}
    print(result["machine"], result["calibration"], sep="\n")
    for dtype in (torch.float32, torch.bfloat16):
        for name in MAPS:
            for images in (4,) if options.quick else (4, 16):
                row = whole(name, images, dtype, rounds)
                result["rows"].append(row)
                mib = {key: f"{peak / 2**20:.0f}" for key, peak in row["peak_bytes"].items()}
                print(f"{row['dtype']} {name} B={images}: {row['seconds']['joint'] * 1e3:.0f} ms, "
                      f"{row['ratio']:.2f}x official, {row['ratio_to_fp32']:.2f}x in fp32 (sdpa "
                      f"{row['ratio_of_sdpa']:.2f}x, {row['ratio_of_sdpa_to_fp32']:.2f}x), cross "
                      f"{row['cross_share']:.2f} and {row['look_share']:.3f} of it, "
                      f"products {row['products']:.0%}, peak MiB {mib}", flush=True)  # fmt: skip
        for images, tokens in ((4, 196),) if options.quick else ((4, 196), (16, 196), (16, 49)):
            for queries in (8,) if options.quick else (1, 2, 4, 8):
                for row in operators(images, tokens, queries, dtype, 3 * rounds):
                    result["operators"].append(row)
                    times = {k: f"{s * 1e3:.2f}" for k, s in row["seconds"].items()}
                    print(row["op"], row["dtype"], row["shape"], row["backend"], times, flush=True)
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
