"""Where the fp32 operators lie between the two rates that the machine was measured to give.

A point is FLOPs and bytes that an operator cannot do without, over its seconds; its roof is the
smaller of the matrix rate and of the copy rate times FLOPs a byte, both of the run that timed it.
An exponential counts as one FLOP, a multiplication and an addition as two. The matrix rate is the
faster library's: where a run did not measure oneDNN's, it is that of `linear_distill.py --parts`.
"""

from typing import Any

from bench.report.results import load_or_nothing, rows_at

FLOAT = 4  # bytes
HEADS_WIDTH = 384  # H d of the operators' heads, the T-Head's C

Counted = tuple[str, float, float, float]  # label, FLOPs, bytes, seconds


def figure(images: int) -> dict[str, Any] | None:
    """{"points": [label, FLOPs a byte, GFLOP/s, share of its roof], and of "copy", "torch" and
    "oneDNN" the lowest and highest rate of the runs}"""
    points, rates = [], []
    for name, counted in (
        ("distill", losses(images)),
        ("linear_distill", prototypes(images)),
        ("search", [*searches(images), *operators(images)]),
    ):
        if not counted:
            continue
        facts = load_or_nothing(name)["calibration"]
        copy, torch = facts["copy_GB_per_s"], facts["gemm_fp32_GFLOP_per_s"]
        onednn = facts.get("gemm_fp32_onednn_GFLOP_per_s") or products_of_parts() or torch
        rates.append((copy, torch, onednn))
        for label, flops, moved, seconds in counted:
            rate = flops / seconds / 1e9
            roof = min(max(torch, onednn), copy * flops / moved)
            points.append([label, *(float(f"{x:.4g}") for x in (flops / moved, rate, rate / roof))])
    if not points:
        return None
    ends = [[round(min(r), 1), round(max(r), 1)] for r in zip(*rates, strict=True)]
    return {"points": points, **dict(zip(("copy", "torch", "oneDNN"), ends, strict=True))}


def products_of_parts() -> float:
    """GFLOP/s of oneDNN's product on 1600 tokens of a T-Head, or 0."""
    seconds = load_or_nothing("linear_parts").get("rows", {}).get("1600 tokens, oneDNN")
    return 2 * 1600 * 384 * 1536 / seconds / 1e9 if seconds else 0.0


def losses(images: int) -> list[Counted]:
    """Of a student's logit: scale, subtract the maximum, exponential and sum, the product with each
    target, its softmax's gradient, and once more in backward; of a teacher's: a softmax, twice.

    Bytes as in bench/distill.py: two passes over all logits, one gradient.
    """
    found = []
    for row in rows_at("distill", B=images).get("float32", [])[:1]:
        v, t, b, k = (row["shape"][axis] for axis in "VTBK")
        flops = b * k * (v * (2 * 4 + 2 * 2 * t + 3) + t * 2 * 6)
        found.append(("loss", flops, (2 * (v + t) + v) * b * k * FLOAT, row["median_s"]))
    return found


def prototypes(images: int) -> list[Counted]:
    """Products of student and teacher, again in backward, then the gradients of features and
    prototypes. Bytes: both prototypes in each pass, one gradient."""
    found = []
    for row in rows_at("linear_distill", B=images).get("float32", [])[:1]:
        v, t, b, k, d = (row["shape"][axis] for axis in "VTBKD")
        flops = 2 * (2 * (v + t) + 2 * v) * b * k * d
        moved = (5 * k * d + (3 * v + 2 * t) * b * d) * FLOAT
        found.append(("prototypes + loss", flops, moved, row["median_s"]))
    return found


def searches(images: int) -> list[Counted]:
    """A T-Head's whole joint search: what it needs by bench/search_gpu.py, and the weights of three
    blocks, the map and the queries in, the queries out."""
    from bench.search_gpu import MAPS, D, Q, work

    found = []
    for kind, (side, width, stem) in MAPS.items():
        for row in rows_at("search", B=images, map=kind).get("float32", [])[:1]:
            weights = 3 * 12 * D * D + (width * D if stem else 0)
            moved = (weights + images * (side * side * width + 2 * Q * D)) * FLOAT
            name = f"search, {'ViT' if kind == 'vit' else 'CNN'}'s map"
            found.append((name, work(kind, images), moved, row["seconds"]["joint"]))
    return found


def operators(images: int) -> list[Counted]:
    """Forward and backward of 8 queries on 196 tokens: two products in forward, five in backward
    (the weights once more). joint_attention: those among the tokens once, and the queries' both
    ways. Bytes as in bench/search_gpu.py."""
    from bench.search_gpu import moved

    found = []
    for row in load_or_nothing("search").get("operators", []):
        n, q, b = (row["shape"][axis] for axis in "NQB")
        if row["dtype"] == "float32" and (b, n, q) == (images, 196, 8):
            pairs = q * n if row["op"] == "feature_search" else n * n + 2 * q * n
            flops = 7 * 2 * pairs * b * HEADS_WIDTH
            seconds = row["seconds"]["cpu backward"]
            found.append((row["op"], flops, moved(row["op"], b, n, q, FLOAT), seconds))
    return found
