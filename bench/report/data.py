"""Tables of the augmentation and of the loaders."""

import statistics
from typing import Any

from bench.report.results import load, measured


def augment_table() -> str:
    """Time a crop, one line a view and thread count; then grey levels from Pillow an operation."""
    result = load("augment")
    others = ["pillow", "torchvision v2", "reference"]
    lines = [f"| crops | threads | ours | ours in bf16 | {' | '.join(others)} | of the copy rate |"]
    lines.append("|---|---|---|---|" + "---|" * len(others) + "---|")
    for row in result["rows"]:
        shape, seconds = row["shape"], row["seconds"]
        each = {name: s / shape["B"] * 1e6 for name, s in seconds.items()}
        cells = (f"{each[n]:.0f} us, {seconds[n] / seconds['cpu']:.1f}x" for n in others)
        lines.append(
            f"| {shape['B']} {shape['view']}, {shape['side']} | {row['threads']} "
            f"| {each['cpu']:.0f} us | {each['cpu bfloat16']:.0f} us | {' | '.join(cells)} "
            f"| {row['floor_fraction']:.0%} |"
        )
    lines += ["", "| grey levels from Pillow | ours: mean | worst crop | largest | v2: mean "
              "| worst crop | largest |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in result["parity"]:
        sides.setdefault(row["operation"], []).append(row)
    for name, rows in sides.items():
        cells = []
        for form in ("cpu", "torchvision v2"):
            mean = statistics.mean(row[form]["mean"] for row in rows)
            cells += [f"{mean:.2f}" if mean else "0"]
            cells += [f"{max(row[form]['worst_crop'] for row in rows):.2f}" if mean else "0"]
            cells += [f"{max(row[form]['max'] for row in rows):.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured(result)])


def data_table() -> str:
    """Speed and memory, one line a loader; then grey levels from Pillow; then the parts."""
    result = load("data")
    lines = ["| | images/s | over the official | processor time an image | over the official "
             "| peak memory, largest worker |", "|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        fast, slow = (1 / s for s in row["range_s"])
        low, high = row["ratio_range"]
        peaks = (row[key] for key in ("peak_bytes", "worker_peak_bytes"))
        memory = (f"{peak / 2**20:.0f}" for peak in peaks if peak)
        lines.append(
            f"| {row['backend']} | {1 / row['median_s']:.0f} ({slow:.0f}-{fast:.0f}) "
            f"| {row['ratio']:.2f}x ({low:.2f}-{high:.2f}) | {row['cpu_median_s'] * 1e3:.1f} ms "
            f"| {row['cpu_ratio']:.2f}x | {', '.join(memory)} MiB |"
        )
    kinds = {"same crops": "`augment_crops`", "cpu": "`cpu`", "dali": "`dali`"}
    lines += [
        "",
        f"| grey levels from Pillow | {' | '.join(kinds.values())} |",
        "|---|---|---|---|",
    ]
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in result["parity"]:
        sides.setdefault(row["operation"], []).append(row)
    for name, rows in sides.items():
        lines.append(f"| {name} | {' | '.join(_levels(rows, kind) for kind in kinds)} |")
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in result["breakdown_ms"].items())
    index, files = result["index"], result["pictures"]
    lines += ["", f"What `cpu` does to a picture, ms on one thread: {parts}. The first check of "
              f"{index['pictures']} pictures takes {index['first_s']:.1f} s, the next "
              f"{index['again_s'] * 1e3:.0f} ms. Files of {files['mean_bytes'] / 1e3:.0f} kB in "
              f"the mean. {measured(result)}"]  # fmt: skip
    return "\n".join(lines)


def _levels(rows: list[dict[str, Any]], kind: str) -> str:
    """Mean, 99th percentile, worst crop's mean; over both sizes of crops."""
    if kind not in rows[0]:
        return ""
    found = [row[kind] for row in rows]
    if not max(each["max"] for each in found):
        return "0"
    mean = statistics.mean(each["mean"] for each in found)
    p99, worst = (max(each[key] for each in found) for key in ("p99", "worst_crop"))
    return f"{mean:.3f}, {p99:.0f}, {worst:.2f}"
