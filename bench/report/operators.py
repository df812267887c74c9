"""Tables of the fused operators."""

from typing import Any

from bench.report.results import load, measured


def distill_table() -> str:
    """One line a shape: the operator, what it is compared with, and what the machine allows."""
    result = load("distill")
    names = ["official", "lightly", "compiled"]
    lines = [
        "| logits | operator | over the official loop | of the memory floor | as DINOLoss | "
        + " | ".join(HEADS)
        + " |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shapes: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        rows = shapes.setdefault((row["dtype"], row["shape"]["B"]), {})
        name = "compiled" if "compiled" in row["baseline"] else row["baseline"]
        if name not in rows or row["ratio"] < rows[name]["ratio"]:  # the faster compiled one
            rows[name] = row
    for (dtype, images), rows in shapes.items():
        row = rows["official"]
        mib = 2**20 * images
        alive = (f"{row[key] / mib:.2f}" for key in ("alive_bytes", "baseline_alive_bytes"))
        lines.append(
            f"| {dtype}, B = {images} | {row['median_s'] * 1e3:.2f} ms "
            f"| {row['loop_ratio']:.1f}x | {row['floor_fraction']:.0%} "
            f"| {row['drop_in_s'] * 1e3:.2f} ms | "
            + " | ".join(f"{rows[n]['ratio']:.1f}x" if n in rows else "-" for n in names)
            + f" | {' / '.join(alive)} MiB |"
        )
    lines.append("")
    for row in result["combined"]:
        ratios = row["ratio_to_dino"]
        lines.append(
            f"MOKD's calls against DINO's at B = 16, {row['dtype']}: self + cross "
            f"{ratios['self+cross']:.2f}x, self + search {ratios['self+search']:.2f}x, "
            f"together {ratios['a step']:.2f}x of two DINO calls; all three targets in one call "
            f"{ratios['self+cross+search']:.2f}x."
        )
    return "\n".join([*lines, "", measured(result)])


HEADS = ["official", "lightly", "the better one compiled", "kept for backward an image"]


def scaling_table() -> str:
    result = load("distill")
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in result["scaling"]:
        shape = row["shape"]
        key = shape["V"], shape["B"], shape["K"]
        cells.setdefault(key, {})[row["dtype"]] = row["ns_per_logit"]
    kinds = sorted({dtype for cell in cells.values() for dtype in cell}, reverse=True)
    lines = [f"| V | B | K | {' | '.join(f'{kind}, ns a logit' for kind in kinds)} |"]
    lines.append("|---|---|---|" + "---|" * len(kinds))
    for (v, b, k), cell in cells.items():
        lines.append(f"| {v} | {b} | {k} | {' | '.join(f'{cell[kind]:.2f}' for kind in kinds)} |")
    for row in result.get("odd_columns", ()):  # of a run since they are compared
        ratios = ", ".join(f"{k}: {ratio:.2f}x" for k, ratio in row["ratio_to_65536"].items())
        lines.append(
            f"\n{row['dtype']}, a logit at odd K against K = 65536, same rounds: {ratios}."
        )
    return "\n".join(lines)


def linear_table() -> str:
    """Our time and memory as shares of each other form's, one line a shape."""
    result = load("linear_distill")
    shapes: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        shapes.setdefault((row["dtype"], row["shape"]["B"]), {})[row["baseline"]] = row
    names = list(next(iter(shapes.values())))
    lines = [f"| | ours | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for (dtype, images), rows in shapes.items():
        cells = []
        for row in (rows[name] for name in names):
            smaller = row["baseline_extra_bytes"] / row["extra_bytes"]
            cells.append(f"{row['median_s'] / row['baseline_s']:.2f}, 1/{smaller:.1f}")
        own = f"{row['median_s'] * 1e3:.0f} ms, {row['extra_bytes'] / 2**20:.1f} MiB"
        lines.append(f"| {dtype}, B = {images} | {own} | {' | '.join(cells)} |")
    growth = [row for row in result["growth"] if row["baseline"] == "official"]
    grown = (
        f"{r['shape']['K']}: {r['extra_bytes'] / 2**20:.0f} / "
        f"{r['baseline_extra_bytes'] / 2**20:.0f} MiB, {r['median_s'] / r['baseline_s']:.2f}"
        for r in growth
    )
    far = result["beyond"]
    fate = (f"{r['form']} {r['seconds']:.0f} s" if r["seconds"] else f"{r['form']} out of memory"
            for r in far)  # fmt: skip
    lines += [
        "",
        f"As K grows (fp32, B = 16; ours / official, then time): {'; '.join(grown)}. With B = "
        f"{far[0]['shape']['B']}, K = {far[0]['shape']['K']} in {far[0]['limit_bytes'] >> 30} GiB: "
        f"{', '.join(fate)}.",
        "",
        measured(result),
    ]
    return "\n".join(lines)


def search_table() -> str:
    """A T-Head's whole search, one line a map and dtype; then where a plain form wins."""
    result = load("search")
    lines = [
        "| map, B | dtype | joint | over official, same dtype | over official in fp32 "
        "| official with SDPA: the same two | products | cross alone, in a step "
        "| peak memory, official / joint / cross |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peaks = (f"{row['peak_bytes'][n] / 2**20:.0f}" for n in ("official", "joint", "cross"))
        lines.append(
            f"| {row['shape']['map']} {row['shape']['N']}, {row['shape']['B']} | {row['dtype']} "
            f"| {row['seconds']['joint'] * 1e3:.0f} ms | {row['ratio']:.2f}x "
            f"| {row['ratio_to_fp32']:.2f}x "
            f"| {row['ratio_of_sdpa']:.2f}x, {row['ratio_of_sdpa_to_fp32']:.2f}x "
            f"| {row['products']:.0%} | 1/{1 / row['cross_share']:.1f}, "
            f"1/{1 / row['look_share']:.0f} | {' / '.join(peaks)} MiB |"
        )
    lines += ["", "| operator | dtype | B, N, Q | forward | with backward |"]
    lines.append("|---|---|---|---|---|")
    for row in result["operators"]:
        shape, seconds = row["shape"], row["seconds"]
        if (shape["B"], shape["N"]) != (16, 196) or shape["Q"] not in (1, 8):
            continue  # the others are in the file
        cells = []
        for end in ("", " backward"):
            others = [n for n in ("cpu", "sdpa", "reference") if f"{n}{end}" in seconds]
            times = (f"{n} {seconds[n + end] * 1e3:.2f}" for n in others)
            cells.append(", ".join(times) + " ms")
        lines.append(
            f"| `{row['op']}` | {row['dtype']} | {shape['B']}, {shape['N']}, {shape['Q']} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", measured(result)])
