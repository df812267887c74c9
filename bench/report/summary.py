"""The README's own tables: a line of each operator and step, here and on a GPU."""

from typing import Any

from bench.report import figures
from bench.report.gpu_step import switches
from bench.report.results import load, load_gpu, measured, measured_gpu

Row = dict[str, Any]
NAMES = {
    "einsum": "one einsum", "einsum, compiled": "one einsum, compiled",
    "sum, compiled": "a sum over pairs, compiled", "sdpa": "official with SDPA",
}  # fmt: skip
HEAD = ["| | over the official form | over the fastest other | memory, ours / official |"]
HEAD.append("|---|---|---|---|")


def table() -> str:
    """What the plots of speed-up and memory show. The machine is that of the step."""
    result = load("step")
    speed, memory = figures.speed(), figures.memory()
    assert speed and memory  # there is a step
    sizes = {label: sizes for label, *sizes in memory["rows"]}
    lines = [
        _line(label, official, other, which, sizes.get(label, ()))
        for label, official, other, which in speed["rows"]
    ]
    return "\n".join(
        [
            *HEAD,
            *lines,
            "",
            f"Each is of a run of its own; this is the step's. {measured(result)}",
        ]
    )


def gpu_table() -> str:
    """The largest of each kind by the backend that is fastest there, as a graph; the fastest step,
    and the same with no switch."""
    step = load_gpu("step")
    lines = [
        _operator("loss, fp16", load_gpu("distill"), dtype="float16"),
        _operator("prototypes + loss, autocast", load_gpu("linear_distill"), dtype="autocast"),
        _operator("search of a ViT's map, fp16", load_gpu("search"), backend="joint"),
        *_steps(step),
    ]
    return "\n".join([*HEAD, *lines, "", measured_gpu(step)])


def _operator(label: str, result: dict[str, Any], **chosen: str) -> str:
    """Of the first shape in the file, which is the largest, against what is not ours."""
    rows: list[Row] = [r for r in result["rows"] if chosen.items() <= r.items()]
    rows = [r for r in rows if r["baseline"] != "stored"]
    rows = [r for r in rows if r["shape"] == rows[0]["shape"]]
    fastest = min(rows, key=lambda row: row["median_s"])["backend"]
    by_name = {row["baseline"]: row for row in rows if row["backend"] == fastest}
    official = by_name.pop("official")
    other = min(by_name.values(), key=lambda row: row["baseline_s"], default=None)
    key = "extra_bytes" if "extra_bytes" in official else "peak_bytes"
    sizes = official[key], official[f"baseline_{key}"]
    label = f"{label}, {official['shape']['B']} pictures"
    more = (other["ratio"], NAMES[other["baseline"]]) if other else (0.0, "")
    return _line(label, official["ratio"], *more, sizes)


def _steps(result: dict[str, Any]) -> list[str]:
    rows: list[Row] = result["rows"]
    if not rows:
        return []
    fastest = min(rows, key=lambda row: row["median_s"])
    plain = [row for row in rows if row["dtype"] == fastest["dtype"] and not row["set"]]
    if "eager_s" in fastest and not plain:
        ours = {"median_s": fastest["eager_s"], "ours_peak_bytes": fastest["eager_peak_bytes"]}
        plain = [fastest | ours | {"set": []}]
    commit = result["machine"]["commit"]
    return [_step(row, commit) for row in (fastest, *plain[:1])]


def _step(row: Row, commit: str) -> str:
    ours = row["median_s"]
    label = f"step, {row['shape'].split(', K')[0]}, {row['dtype']}, {switches(row)}"
    label += "" if row.get("commit", commit) == commit else f" (commit {row['commit']})"
    over = row["baseline_s"] / ours, row["best_plain_s"] / ours
    sizes = row["ours_peak_bytes"], row["official_peak_bytes"]
    return _line(label, *over, "best plain", sizes)


def _line(label: str, official: float, other: float, which: str, sizes: Any) -> str:
    over = f"{other:.2f}x ({which})" if which else ""
    memory = " / ".join(_size(size) for size in sizes)
    return f"| {label} | {official:.1f}x | {over} | {memory} |"


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
