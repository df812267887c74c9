"""The table of the training step."""

from bench.report.results import load, measured


def step_table() -> str:
    result = load("step")
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
