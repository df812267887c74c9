"""Fills the generated parts of README.md from bench/results/.

python bench/readme.py [--check]     --check: exit 1 when the README is stale
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-2core"
K = "20"  # neighbours in the table


def output() -> str:
    """What the two commands printed, as it was kept."""
    texts = [(RESULTS / f"{name}.txt").read_text().strip() for name in ("demo", "test")]
    return "```\n$ make demo\n{}\n\n$ make test\n...\n{}\n```".format(*texts)


def demo_table() -> str:
    """Mean over the seeds, with the range."""
    result = json.loads((RESULTS / "demo.json").read_text())
    tables = [seed["table"] for seed in result["seeds"].values()]
    lines = ["| | clean | shifted | 10 labels | linear |", "|---|---|---|---|---|"]
    for name in tables[0]:
        rows = [table[name] for table in tables]
        few = [next(iter(row["knn_few"].values())) for row in rows]
        columns = [
            [row["knn"][K] for row in rows],
            [row["knn_shifted"][K] for row in rows],
            few,
            [row["linear"] for row in rows],
        ]
        lines.append(f"| {name} | " + " | ".join(spread(values) for values in columns) + " |")
    seeds = list(result["seeds"].values())
    facts = {key: statistics.median(s[key] for s in seeds if key in s) for key in FACTS}
    lines += ["", "; ".join(FACTS[key].format(value) for key, value in facts.items()) + ". "]
    lines[-1] += f"Seeds {', '.join(sorted(result['seeds']))}. {machine(seeds[-1])}"
    if "profile" in result:
        top = ", ".join(f"`{name}` {share:.0%}" for name, share in result["profile"].items())
        lines += ["", f"Where the processor time of a step goes: {top}."]
    return "\n".join(lines)


FACTS = {
    "data_wait": "Data wait {:.1%} of the time",
    "loader_cpu_share": "the loader {:.1%} of the processor time",
}


def ablation_table() -> str:
    """Mean over the seeds with the range, one line a search; then what is beyond the seeds."""
    result = json.loads((RESULTS / "ablation.json").read_text())
    runs: dict[str, list[dict[str, Any]]] = {m: list(r.values()) for m, r in result["runs"].items()}
    first = next(iter(runs.values()))
    columns = {
        f"{name.removesuffix(' teacher')}, {what}": {
            search: [row["knn"][name][what] for row in rows] for search, rows in runs.items()
        }
        for name in first[0]["knn"]
        if name.endswith(" teacher")
        for what in ("clean", "shifted")
    }
    ways = list(first[0]["pointing"]["joint"]["directions"])
    heads = [*columns, *(f"pointing {way} (control)" for way in ways)]
    lines = [f"| search | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for search, rows in runs.items():
        cells = [spread(values[search]) for values in columns.values()]
        for way in ways:
            blocks = [row["pointing"]["joint"]["directions"][way]["blocks"][0] for row in rows]
            own, control = (
                statistics.mean(b[k]["mean"] for b in blocks) for k in ("own", "random")
            )
            cells.append(f"{own:.2f} ({control:.2f})")
        lines.append(f"| {search} | {' | '.join(cells)} |")
    random = [name.replace(" teacher", " random") for name in first[0]["knn"] if "teacher" in name]
    cells = [
        spread([row["knn"][n][what] for row in first])
        for n in random
        for what in ("clean", "shifted")
    ]
    lines.append(f"| not trained | {' | '.join([*cells, *['-'] * len(ways)])} |")
    seeds = sorted(next(iter(result["runs"].values())))
    text = f"{result['steps']} steps, seeds {', '.join(seeds)}, kNN k = {K}, pointing in block 1."
    return "\n".join([*lines, "", f"{text} {beyond_the_seeds(columns)} {machine(result)}"])


def beyond_the_seeds(columns: dict[str, dict[str, list[float]]]) -> str:
    """Which differences of means are larger than the range of either search over its seeds, and
    which have one sign in every seed (whose runs start from the same weights)."""
    large, alike, count = [], [], 0
    for pair in combinations(next(iter(columns.values())), 2):
        for name, values in columns.items():
            a, b = (values[search] for search in pair)
            each = [x - y for x, y in zip(a, b, strict=True)]
            mean, count = statistics.mean(each), count + 1
            said = f"{pair[0]} against {pair[1]} {mean:+.1f} ({name})"
            large += [said] if abs(mean) > max(max(x) - min(x) for x in (a, b)) else []
            alike += [said] if min(each) > 0 or max(each) < 0 else []
    return (
        f"Larger than the range of either search over its seeds: {'; '.join(large) or 'none'} of "
        f"{count} differences of two searches. Of one sign in every seed: "
        f"{'; '.join(alike) or 'none'}; by chance it would be {count * 2 ** (1 - len(each)):.0f}."
    )


def step_table() -> str:
    result = json.loads((RESULTS / "step.json").read_text())
    lines = [
        "| pair | dtype | ours | official | ratio | with reference operators | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peaks = (f"{row[key] / 2**30:.2f}" for key in ("peak_bytes", "baseline_peak_bytes"))
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['median_s']:.2f} s "
            f"| {row['baseline_s']:.2f} s | {row['ratio']:.2f}x | {row['reference_s']:.2f} s "
            f"| {' / '.join(peaks)} GiB |"
        )
    return "\n".join([*lines, "", measured(result)])


def distill_table() -> str:
    """One line a shape: the operator, what it is compared with, and what the machine allows."""
    result = json.loads((RESULTS / "distill.json").read_text())
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


def linear_table() -> str:
    """Our time and memory as shares of each other form's, one line a shape."""
    result = json.loads((RESULTS / "linear_distill.json").read_text())
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
    result = json.loads((RESULTS / "search.json").read_text())
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


def augment_table() -> str:
    """Time a crop, one line a view and thread count; then grey levels from Pillow an operation."""
    result = json.loads((RESULTS / "augment.json").read_text())
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
    result = json.loads((RESULTS / "data.json").read_text())
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


def alarms_table() -> str:
    """Lowest and highest end value over heads, and over the healthy seeds; the alarms raised."""
    result = json.loads((RESULTS / "alarms.json").read_text())
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in result["runs"].items():
        groups.setdefault("healthy" if name.startswith("healthy") else name, []).append(row)
    names = sorted(groups, key=lambda name: name != "healthy")
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for prefix in DIAGNOSTICS:
        cells = []
        for name in names:
            ends = [end for row in groups[name] for end in row["end"].items()]
            values = [value for key, value in ends if key.startswith(prefix)]
            cells.append(f"{min(values):.2g} to {max(values):.2g}")
        lines.append(f"| `{prefix}*` | {' | '.join(cells)} |")
    raised = [{e["alarm"]: 0 for row in groups[name] for e in row["alarms"]} for name in names]
    lines.append("| alarms | " + " | ".join(", ".join(each) or "none" for each in raised) + " |")
    seeds = len(groups["healthy"])
    text = f"Medians over the last 100 of {result['steps']} steps, {seeds} healthy seeds."
    return "\n".join([*lines, "", f"{text} {machine(result)}"])


DIAGNOSTICS = ["self_", "teacher_entropy_", "student_entropy_", "kl_"]
DIAGNOSTICS += ["prototypes_used_", "center_norm_", "feature_std_"]


def watch_sentence() -> str:
    result = json.loads((RESULTS / "watch.json").read_text())
    low, high = result["share_95"]
    return (
        f"That flag and the diagnostics take {result['share']:.1%} of the demo's step "
        f"(95 % interval {low:.1%} to {high:.1%}, `python bench/watch.py`): "
        f"{result['plain_more_s'] * 1e3:.1f} ms of {result['watched_s'] * 1e3:.0f}, and "
        f"{result['logged_more_s'] * 1e3:.1f} ms in the one of {result['steps_per_interval']} that "
        f"is logged; steps that the system interrupted do not count. {measured(result)}"
    )


HEADS = ["official", "lightly", "the better one compiled", "kept for backward an image"]


def scaling_table() -> str:
    result = json.loads((RESULTS / "distill.json").read_text())
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


def activations_sentence() -> str:
    result = json.loads((RESULTS / "activations.json").read_text())
    rows = [
        f"{row['baseline_peak_bytes'] / 2**30:.2f} to {row['peak_bytes'] / 2**30:.2f} GiB in "
        f"{row['dtype']}, for {row['median_s'] / row['baseline_s']:.2f} times the time"
        for row in result["rows"]
    ]
    shape = result["rows"][0]["shape"]
    return (
        f"The peak of a step beyond what lasts ({shape}) goes from {'; from '.join(rows)} "
        f"(`python bench/activations.py`). {machine(result)}"
    )


def measured(result: dict[str, Any]) -> str:
    facts = result["calibration"]
    return (
        f"{machine(result)} Copy rate {facts['copy_GB_per_s']:.0f} GB/s, load average at the start "
        f"{facts['load_average']:.1f}."
    )


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{statistics.mean(values):.1f}"
    return mean if high - low < 0.05 else f"{mean} ({low:.1f}-{high:.1f})"


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return (
        f"Measured on {facts['cores']} cores of {facts['cpu']} ({facts['torch_threads']} threads), "
        f"torch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}, "
        f"{facts['date']}."
    )


PARTS = {
    "output": output,
    "demo-table": demo_table,
    "ablation-table": ablation_table,
    "alarms-table": alarms_table,
    "watch": watch_sentence,
    "distill-table": distill_table,
    "scaling-table": scaling_table,
    "linear-table": linear_table,
    "search-table": search_table,
    "augment-table": augment_table,
    "data-table": data_table,
    "step-table": step_table,
    "activations": activations_sentence,
}


def filled(name: str, part: Callable[[], str]) -> str:
    try:
        return part()
    except FileNotFoundError as error:
        print(f"{name}: not measured yet, no {Path(error.filename).name}")
        return "Not measured yet."


def render(text: str) -> str:
    for name, part in PARTS.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        body = filled(name, part) + "\n"
        text = re.sub(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old)
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md is stale: run python bench/readme.py")
    path.write_text(new)


if __name__ == "__main__":
    main()
