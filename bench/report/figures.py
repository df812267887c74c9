"""What each plot shows, as plain lists: read off the results, or counted by the models here.

A plot leaves out what is not measured yet; one without anything to show is None.
"""

from collections.abc import Callable
from typing import Any

from bench.report import roofline
from bench.report.results import load_or_nothing, rows_at

B = 16  # of the operators' rows
NAMES = {"float32": "fp32", "bfloat16": "bf16", "autocast": "autocast"}
Figure = dict[str, Any]


def speed() -> Figure | None:
    """[label, over the official form, over the fastest other form, which that is]; the last two are
    0 and nothing where only the official form was timed."""
    rows = []
    for label, ours, others in [*_losses(), *_searches(), *_crops(), *_loaders(), *_steps()]:
        first, *more = others.values()
        fastest = min(others, key=lambda name: others[name]) if more else ""
        rows.append([label, _round(first / ours), _round(others.get(fastest, 0) / ours), fastest])
    return {"rows": rows} if rows else None


Timed = list[tuple[str, float, dict[str, float]]]  # label, our seconds, theirs: the official first


def _losses() -> Timed:
    """Ours with a centre as all of them; of the prototype layer those that are not ours."""
    found: Timed = []
    for name, label, own in (
        ("distill", "loss", "drop_in_s"),
        ("linear_distill", "prototypes + loss", "median_s"),
    ):
        for dtype, rows in rows_at(name, B=B).items():
            others = {r["baseline"]: r["baseline_s"] for r in rows if r["baseline"] != "stored"}
            others = {"official": others["official"], **others}
            found.append((f"{label}, {NAMES[dtype]}", rows[0][own], others))
    return found


def _searches() -> Timed:
    found: Timed = []
    for dtype, rows in rows_at("search", B=B, map="vit").items():
        seconds = rows[0]["seconds"]
        others = {"official": seconds["official"], "official with SDPA": seconds["sdpa"]}
        found.append((f"search of a ViT's map, {NAMES[dtype]}", seconds["joint"], others))
    return found


def _crops() -> Timed:
    rows = [r for rs in rows_at("augment", view="global").values() for r in rs]
    return [
        ("augmentation of crops", r["seconds"]["cpu"],
         {name: r["seconds"][name] for name in ("pillow", "torchvision v2", "reference")})
        for r in rows if r["threads"] == 2
    ]  # fmt: skip


def _loaders() -> Timed:
    seconds = {r["backend"]: r["median_s"] for r in load_or_nothing("data").get("rows", [])}
    if "cpu" not in seconds:
        return []
    others = [n for n in ("official", "torchvision v2") if n in seconds]  # dali's is ours too
    return [("loader, files to batches", seconds["cpu"], {n: seconds[n] for n in others})]


def _steps() -> Timed:
    return [
        (_pair(row), row["median_s"],
         {"official": row["baseline_s"], "best plain": row["best_plain_s"]})
        for row in load_or_nothing("step").get("rows", [])
    ]  # fmt: skip


def _pair(row: dict[str, Any]) -> str:
    return f"step, {str(row['shape']).split(',')[0].replace('mokd_', '')}, {row['dtype']}"


def memory() -> Figure | None:
    """[label, our bytes, the official form's]"""
    rows: list[list[Any]] = []
    for name, label, key in (
        ("distill", "loss", "alive_bytes"),
        ("linear_distill", "prototypes + loss", "extra_bytes"),
    ):
        for dtype, found in rows_at(name, B=B).items():
            row = next(r for r in found if r["baseline"] == "official")
            rows.append([f"{label}, {NAMES[dtype]}", row[key], row[f"baseline_{key}"]])
    for dtype, found in rows_at("search", B=B, map="vit").items():
        peaks = found[0]["peak_bytes"]
        rows.append([f"search of a ViT's map, {NAMES[dtype]}", peaks["joint"], peaks["official"]])
    both = {
        r["backend"]: r["peak_bytes"] + r["worker_peak_bytes"]
        for r in load_or_nothing("data").get("rows", [])
    }
    if "cpu" in both:
        rows.append(["loader, files to batches", both["cpu"], both["official"]])
    for row in load_or_nothing("step").get("rows", []):
        rows.append([_pair(row), row["peak_bytes"], row["baseline_peak_bytes"]])
    return {"rows": rows} if rows else None


def growth() -> Figure | None:
    """Of each axis and dtype the points [size, ns a logit]; of each form [K, bytes]."""
    base, panels = {"V": 10, "B": B, "K": 65536}, {}
    for row in load_or_nothing("distill").get("scaling", []):
        for axis in base:
            rest = {k: n for k, n in row["shape"].items() if k not in (axis, "T")}
            even = row["shape"]["K"] % 1024 == 0  # the odd ones lie beside 65536, in the table
            if even and all(base[k] == n for k, n in rest.items()):
                points = panels.setdefault(axis, {}).setdefault(NAMES[row["dtype"]], [])
                points.append([row["shape"][axis], _round(row["ns_per_logit"])])
    forms: dict[str, list[list[float]]] = {"ours": []}
    for row in load_or_nothing("linear_distill").get("growth", []):
        size = row["shape"]["K"]
        if row["baseline"] == "official":
            forms["ours"].append([size, row["extra_bytes"]])
        forms.setdefault(row["baseline"], []).append([size, row["baseline_extra_bytes"]])
    if not panels or not forms["ours"]:
        return None
    for points in (p for lines in (*panels.values(), forms) for p in lines.values()):
        points.sort()
    return {"time": panels, "memory": forms}


def roof() -> Figure | None:
    return roofline.figure(B)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


FIGURES: dict[str, Callable[[], Figure | None]] = {
    "speed": speed,
    "memory": memory,
    "roofline": roof,
    "growth": growth,
}
