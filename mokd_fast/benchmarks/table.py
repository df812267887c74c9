"""The ratios of some files of results as one table."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HEAD = ("", "", "", "over", "times faster", "of its memory", "cases")
# What benchmarks call the memory that they compare: kept for backward, beyond inputs, all of it.
BYTES = ("alive_bytes", "extra_bytes", "peak_bytes")


def ratios(files: Iterable[Path]) -> str:
    """A line for each operator, backend and dtype against each other form, as a range over shapes;
    nothing where no row has a ratio."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in files:
        for row in json.loads(file.read_text()).get("rows", []):
            if isinstance(row, dict) and "ratio" in row:
                groups.setdefault(_key(row), []).append(row)
    lines = []
    for key, rows in groups.items():
        if key[1] == key[3]:  # the baseline against itself
            continue
        memory = [share for row in rows if (share := _share(row))]
        faster = _range([row["ratio"] for row in rows], "{:.2f}x")
        lines.append((*key, faster, _range(memory, "{:.2f}"), str(len(rows))))
    return _aligned([HEAD, *lines]) if lines else ""


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Shapes in words are cases of their own: pairs of models, which are not to be mixed."""
    shape = row.get("shape")
    op = f"{row['op']}, {shape}" if isinstance(shape, str) else row["op"]
    return op, row.get("backend", ""), row.get("dtype", ""), row.get("baseline", "official")


def _share(row: dict[str, Any]) -> float | None:
    for key in BYTES:
        own, other = row.get(key), row.get(f"baseline_{key}")
        if isinstance(own, int | float) and other:
            return own / other
    return None


def _range(values: Sequence[float], form: str) -> str:
    ends = [form.format(end) for end in (min(values), max(values))] if values else ["-"]
    return "-".join(dict.fromkeys(ends))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
