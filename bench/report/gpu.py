"""Tables of what was measured on a GPU: the checks and the operators."""

from collections.abc import Iterable
from typing import Any

from bench.report.results import gpu_path, load_gpu, measured_gpu

Row = dict[str, Any]
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def checks_sentence() -> str:
    """How many checks of each backend passed, and which did not or were not over in time."""
    result, said = load_gpu("check"), []
    by_backend: dict[str, list[Row]] = {}
    for row in result["rows"]:
        by_backend.setdefault(row["backend"], []).append(row)
    for backend, rows in sorted(by_backend.items()):
        text = f"{backend} {sum(row['passed'] is True for row in rows)} of {len(rows)}"
        for what, passed in (("failed", False), ("not over in time", None)):
            names = [
                " ".join(filter(None, (row["check"], row["dtype"])))
                for row in rows
                if row["passed"] is passed
            ]
            text += f" ({what}: {', '.join(names)})" if names else ""
        said.append(text)
    return f"Checks that passed: {'; '.join(said)}. {measured_gpu(result)}"


def printed() -> str:
    """What calls printed that left no results file."""
    return f"```text\n{gpu_path('printed.txt').read_text()}```"


def distill_table() -> str:
    """One line a dtype, size and backend: as a graph, then from Python."""
    result = load_gpu("distill")
    lines = [
        "| logits | backend | as a graph | of the copy rate | over official | over the best other "
        "| from Python | over official | over the best other "
        "| peak: ours / least other / official |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (dtype, images, backend), rows in _grouped(result["rows"]).items():
        row, others = rows["official"], [rows[name] for name in rows if name != "official"]
        graph = min(others, key=lambda r: r["ratio"])
        eager = min(others, key=lambda r: r["eager_ratio"])
        least = min(r["baseline_peak_bytes"] for r in others)
        peaks = _mib(row["peak_bytes"], least, row["baseline_peak_bytes"])
        lines.append(
            f"| {SHORT[dtype]}, B = {images} | {backend} | {_us(row['median_s'])} "
            f"| {row['floor_fraction']:.0%} | {row['ratio']:.1f}x "
            f"| {graph['ratio']:.1f}x ({graph['baseline']}) | {_us(row['eager_s'])} "
            f"| {row['eager_ratio']:.1f}x | {eager['eager_ratio']:.1f}x ({eager['baseline']}) "
            f"| {peaks} |"
        )
    return _ended(lines, result)


def linear_table() -> str:
    """Prototype layer and loss, over linear layers with the official loss and with ours."""
    result = load_gpu("linear_distill")
    lines = [
        "| features, B | backend | as a graph | over official, stored | from Python "
        "| over official, stored | memory: ours / stored / official |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dtype, images, backend), rows in _grouped(result["rows"]).items():
        row, both = rows["official"], [rows["official"], rows["stored"]]
        extra = [rows[name]["baseline_extra_bytes"] for name in ("stored", "official")]
        lines.append(
            f"| {SHORT.get(dtype, dtype)}, {images} | {backend} | {_us(row['median_s'])} "
            f"| {_ratios(both, 'ratio')} | {_us(row['eager_s'])} "
            f"| {_ratios(both, 'eager_ratio')} | {_mib(row['extra_bytes'], *extra)} |"
        )
    return _ended(lines, result)


def search_table() -> str:
    """A T-Head's whole search, one line a map; then the operators at the most images."""
    result = load_gpu("search")
    lines = [
        "| map, B | joint | of the matrix rate | over official, with SDPA | from Python "
        "| joint by each backend, over official | cross | peak: joint / cross / official |",
        "|---|---|---|---|---|---|---|---|",
    ]
    maps: dict[tuple[str, int, int], dict[tuple[str, str], Row]] = {}
    operators: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        shape = row["shape"]
        if row["op"] == "THead.search":
            key = shape["map"], shape["N"], shape["B"]
            maps.setdefault(key, {})[row["backend"], row["baseline"]] = row
        else:
            of = row["op"], row["dtype"], shape["B"], shape["N"], shape["Q"]
            operators.setdefault(of, {})[row["backend"]] = row
    for (name, tokens, images), rows in maps.items():
        joint, cross = rows["joint", "official"], rows["cross", "official"]
        both = [joint, rows["joint", "sdpa"]]
        each = (
            f"{backend.removeprefix('joint ')} {row['ratio']:.2f}x"
            for (backend, other), row in rows.items()
            if backend.startswith("joint ") and other == "official"
        )
        peaks = (joint["peak_bytes"], cross["peak_bytes"], joint["baseline_peak_bytes"])
        lines.append(
            f"| {name} {tokens}, {images} | {_us(joint['median_s'])} "
            f"| {joint['ceiling_fraction']:.0%} | {_ratios(both, 'ratio')} "
            f"| {_ratios(both, 'eager_ratio')} | {', '.join(each)} | {_us(cross['median_s'])} "
            f"| {_mib(*peaks)} |"
        )
    most = max((of[2] for of in operators), default=0)
    names = list(dict.fromkeys(name for rows in operators.values() for name in rows))
    lines += ["", f"| operator | dtype | B, N, Q | {' | '.join(names)} | SDPA |"]
    lines.append("|---|---|---|---|" + "---|" * len(names))
    for (op, dtype, images, tokens, queries), by_name in operators.items():
        if images != most:
            continue  # the others are in the file
        cells = [
            f"{_us(by_name[n]['median_s'])}, {by_name[n]['ratio']:.2f}x, "
            f"{by_name[n]['ceiling_fraction']:.0%}" if n in by_name else ""
            for n in names
        ]  # fmt: skip
        theirs = next(iter(by_name.values()))["baseline_s"]
        lines.append(
            f"| `{op}` | {SHORT[dtype]} | {images}, {tokens}, {queries} | {' | '.join(cells)} "
            f"| {_us(theirs)} |"
        )
    return _ended(lines, result)


def augment_table() -> str:
    result = load_gpu("augment")
    lines = [
        "| crops | dtype | time | of the copy rate: crops and result | all that is moved |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = row["shape"]
        lines.append(
            f"| {shape['B']} {shape['view']}, {shape['side']} | {SHORT[row['dtype']]} "
            f"| {_us(row['median_s'])} | {row['floor_fraction']:.0%} "
            f"| {row['moved_fraction']:.0%} |"
        )
    return _ended(lines, result)


def norms_table() -> str:
    """All BatchNorm of a ResNet-50 with its sums and ReLUs, a line a crop and dtype."""
    result = load_gpu("batch_norm")
    lines = ["| 64 pictures' crops | dtype | ours | PyTorch's passes | of the copy rate |"]
    lines.append("|---|---|---|---|---|")
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["view"], row["dtype"]), []).append(row)
    for (view, dtype), rows in groups.items():
        ours, theirs, floor = (
            sum(seconds(row) * row["layers"] for row in rows)
            for seconds in (
                lambda row: row["median_s"],
                lambda row: row["baseline_s"],
                lambda row: row["median_s"] * row["floor_fraction"],
            )
        )
        lines.append(
            f"| {view} | {SHORT[dtype]} | {ours * 1e3:.2f} ms "
            f"| {theirs * 1e3:.2f} ms, {theirs / ours:.2f}x | {floor / ours:.0%} |"
        )
    return _ended(lines, result)


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, int, str], dict[str, Row]]:
    """(dtype, B, backend) -> the rows by what they are compared with."""
    found: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        key = row["dtype"], row["shape"]["B"], row["backend"]
        found.setdefault(key, {})[row["baseline"]] = row
    return found


def _ended(lines: list[str], result: dict[str, Any]) -> str:
    """With what could not run and on what the rest did."""
    failed = [str(text).split(":")[0] for text in result.get("failed", [])]
    lines = [*lines, *(["", f"Could not run: {'; '.join(failed)}."] if failed else [])]
    return "\n".join([*lines, "", measured_gpu(result)])


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def _mib(*sizes: int) -> str:
    return " / ".join(f"{size / 2**20:.0f}" for size in sizes) + " MiB"


def _ratios(rows: Iterable[Row], key: str) -> str:
    return ", ".join(f"{row[key]:.2f}x" for row in rows)
