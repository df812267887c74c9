"""Tables of the training step on a GPU."""

from typing import Any

from bench.report.results import load_gpu, measured_gpu

Row = dict[str, Any]
WHOSE = {"ours": "ours", "best": "best plain", "official": "official"}
NAMES = WHOSE | {"eager": "ours without any of them"}
BUSY = (
    "Time of a step in which a kernel runs (the gaps are those of steps that the profiler watches, "
    "which makes the host slower and so gaps longer):"
)
NO_TIME = "no time left"  # of bench/step_gpu.py


def step_table() -> str:
    """Ours, the official step and the best plain one, in the same precision; then the kernels."""
    result = load_gpu("step")
    lines = [
        "| pair | dtype | ours with | ours | official | best plain | of the matrix rate "
        "| peak beyond what lasts: ours / best plain / official | with it | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        beyond = [row[f"{whose}_peak_bytes"] for whose in WHOSE]
        whole = [row[f"{whose}_held_bytes"] + p for whose, p in zip(WHOSE, beyond, strict=True)]
        flops = row["flops"] or _counted(row, result["rows"])
        share = flops / row["median_s"] / row["matrix_TFLOP_per_s"] / 1e12
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {switches(row)} | {_ms(row['median_s'])} "
            f"| {_ms(row['baseline_s'])}, {row['baseline_ratio']:.2f}x "
            f"| {_ms(row['best_plain_s'])}, {row['best_plain_ratio']:.2f}x "
            f"| {share:.0%} of {row['matrix_TFLOP_per_s']:.0f} TFLOP/s "
            f"| {_gib(beyond)} | {_gib(whole)} | {row['commit']} |"
        )
    if busy := [said for row in result["rows"] if (said := _busy(row))]:
        lines += ["", " ".join([BUSY, *busy])]
    return "\n".join([*lines, "", measured_gpu(result)])


def switches(row: Row) -> str:
    """The switches that were on."""
    names = (text.removeprefix("train.").removesuffix("=true") for text in row["set"])
    return ", ".join(names) or "no switch"


def _counted(row: Row, rows: list[Row]) -> float:
    """The operations of the same step where they were counted: of a recording nobody can."""
    same = (r["flops"] for r in rows if (r["shape"], r["dtype"]) == (row["shape"], row["dtype"]))
    return max(same)


def parts_table() -> str:
    """The device's time: each of our parts with its share of the matrix rate, then the others'."""
    rows = [row for row in load_gpu("step")["rows"] if row["flops"]]
    heads = [f"{row['dtype']}, {switches(row)}" for row in rows]
    lines = [f"| ours | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for part in dict.fromkeys(part for row in rows for part in row["parts"]):
        cells = (_part(row["parts"].get(part)) for row in rows)
        lines.append(f"| {part} | {' | '.join(cells)} |")
    columns = [
        (f"{name}, {row['dtype']}", row[f"{whose}_parts"])
        for row in rows
        for whose, name in WHOSE.items()
        if whose != "ours"
    ]
    lines += ["", f"| the others | {' | '.join(head for head, _ in columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    for part in dict.fromkeys(part for _, parts in columns for part in parts):
        cells = (_ms(parts[part]) if part in parts else "" for _, parts in columns)
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means_table() -> str:
    """The step with and without each means; then why one is not there."""
    rows = [row for row in load_gpu("step")["rows"] if row.get("means") or row.get("failed")]
    if not rows:
        return "Not measured yet."
    heads = [row["dtype"] for row in rows]
    lines = [f"| means | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(n for row in rows for n in (*row["means"], *row["failed"])):
        lines.append(f"| {name} | {' | '.join(_means(row, name) for row in rows)} |")
    why = [
        f"{name}, {row['dtype']}: {_first_line(text)}"
        for row in rows
        for name, text in row["failed"].items()
        if text != NO_TIME
    ]
    return "\n".join([*lines, *(["", f"Failed: {'; '.join(why)}."] if why else [])])


def _busy(row: Row) -> str:
    """How much of a step has a kernel. Its whole is the clock's, of steps without the profiler."""
    whole = {"ours": row["median_s"], "best": row["best_plain_s"], "eager": row.get("eager_s")}
    found = {key: (time, whole[key]) for key, time in row.get("device_time", {}).items()}
    for name, means in row.get("means", {}).items():
        if "device_time" in means:
            found[name] = means["device_time"], means["with_s"]
    said = (
        f"{NAMES.get(name, name)} {time['busy_s'] * 1e3:.1f} of {_ms(seconds)} "
        f"({time['kernels']:.0f} kernels, gaps {time['gaps']:.0%})"
        for name, (time, seconds) in found.items()
    )
    return f"{row['dtype']}, {switches(row)}: {'; '.join(said)}." if found else ""


def _part(part: dict[str, float] | None) -> str:
    if part is None:
        return ""
    alone = f", its kernels {_ms(part['kernels_s'])}" if "kernels_s" in part else ""
    share = f", {part['matrix_share']:.0%}" if part["flops"] else ""
    return _ms(part["s"]) + alone + share


def _means(row: Row, name: str) -> str:
    found = row["means"].get(name)
    if found is None:
        return {None: "", NO_TIME: NO_TIME}.get(row["failed"].get(name), "failed")
    return f"{_ms(found['with_s'])}, without {_ms(found['without_s'])}: {found['ratio']:.2f}x"


def _first_line(text: str) -> str:
    return text.split("\n")[0][:160].replace("|", "/")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _gib(sizes: list[int]) -> str:
    return " / ".join(f"{size / 2**30:.2f}" for size in sizes) + " GiB"
