"""The tables of the training step."""

from typing import Any

from bench.report.results import load, machine, measured

NETWORKS = ("students", "teachers", "backward of networks", "prototype layers")
WHOSE = ("ours", "best", "official")


def step_table() -> str:
    """Every pair and precision against the official step and the best plain one."""
    result = load("step")
    lines = [
        "| pair | dtype | ours | official, fp32 | the same dtype | best plain | by SDPA "
        "| of the matrix rate | peak: ours / best plain / official, fp32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours = row["median_s"]
        peaks = ("peak_bytes", "best_peak_bytes", "baseline_peak_bytes")
        shares = ", ".join(f"{share:.0%} ({key})" for key, share in row["gemm_share"].items())
        same = f"{row['same_precision_s'] / ours:.2f}x" if row["dtype"] != "fp32" else ""
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {ours:.2f} s | {row['baseline_s']:.2f} s, "
            f"{row['ratio']:.2f}x | {same} | {row['best_plain_s']:.2f} s, "
            f"{row['best_plain_ratio']:.2f}x | {row['best_plain_sdpa_s'] / ours:.2f}x | {shares} | "
            f"{' / '.join(f'{row[key] / 2**30:.2f}' for key in peaks)} GiB |"
        )
    return "\n".join([*lines, "", measured(result)])


def ways_table() -> str:
    """What the step takes without each means, over what it takes with it."""
    rows = load("step")["rows"]
    heads = [f"{_pair(row)}, {row['dtype']}" for row in rows]
    lines = [f"| means | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in rows[0]["ways"]:
        lines.append(f"| {name} | " + " | ".join(_ratio(row["ways"].get(name)) for row in rows))
        lines[-1] += " |"
    compiled = [row["ways"]["transformer blocks compiled"] for row in rows]
    again = sum(way["recompiled"] for way in compiled)
    said = f"Graphs compiled after the first step: {again}."
    return "\n".join([*lines, "", said])


def layers_table() -> str:
    """What the trainer runs another way than PyTorch."""
    result = load("layers")
    lines = ["| forward and backward | dtype | ours | PyTorch |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['op']} | {row['dtype']} | {row['median_s'] * 1e3:.2f} ms | "
            f"{row['baseline_s'] * 1e3:.2f} ms, {row['ratio']:.2f}x |"
        )
    return "\n".join([*lines, "", measured(result)])


def parts_table() -> str:
    """Seconds of each part, of the largest pair."""
    largest = load("step")["rows"][-1]["shape"]
    rows = [row for row in load("step")["rows"] if row["shape"] == largest]
    heads = [f"{whose}, {row['dtype']}" for row in rows for whose in WHOSE]
    lines = [f"| {largest} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    columns = [row["parts"][whose] for row in rows for whose in WHOSE]
    for part in dict.fromkeys(part for column in columns for part in column):
        cells = (f"{column[part]:.3f} s" if part in column else "" for column in columns)
        lines.append(f"| {part} | {' | '.join(cells)} |")
    for name, networks in (("", NETWORKS), (", prototype layers among it", NETWORKS[:-1])):
        rest = (1 - sum(c[part] for part in networks) / sum(c.values()) for c in columns)
        cells = " | ".join(f"{share:.1%}" for share in rest)
        lines.append(f"| all but the networks{name} | {cells} |")
    return "\n".join(lines)


def _pair(row: dict[str, Any]) -> str:
    return str(row["shape"]).split(",")[0].replace("mokd_", "")


def _ratio(way: dict[str, float] | None) -> str:
    return "" if way is None else f"{way['ratio']:.2f}x"


def activations_sentence() -> str:
    result = load("activations")
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
