"""Every number of metrics.jsonl as a curve, grouped by what it measures; SVG by matplotlib."""

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .run import Run

# Told apart by colour (Okabe and Ito's), by line style or marker, and by the legend.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FROM_ZERO = ("share", "images/s", "steps", "pictures", "epochs")  # units
_SPAN = 0.01  # least height of a plot, of its values: a constant's rounding is no curve
_POINTS = 300  # a curve's longest; a page of 100,000 rows would weigh tens of MB
_FONT: Any = {"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "mokd_fast"}


class Family(NamedTuple):
    title: str
    keys: str  # a regular expression for whole keys
    caption: str
    unit: str = ""
    scale: str = "linear"
    bound: bool = False  # ln K is an upper bound worth a line


FAMILIES = (
    Family("Loss of each model", r"loss_\d", "All terms of a model, weighted, summed.", "nats"),
    Family(
        "Self-distillation", r"self_\w+", "A student against its own teacher, MLP-Head and "
        "T-Head. A loss that sits at ln K has learned nothing.", "nats", bound=True,
    ),
    Family(
        "Cross-distillation", r"cross_\w+", "A student's MLP-Head against the other model's "
        "teacher.", "nats", bound=True,
    ),
    Family(
        "Search", r"search_\w+", "A student's T-Head against the other teacher's map as its own "
        "feature finds it. The targets have no centre.", "nats", bound=True,
    ),
    Family(
        "Teacher entropy", r"teacher_entropy_\w+", "How undecided the teachers are about a view. "
        "At ln K every prototype is alike: collapse. At 0 each view has one; where few "
        "prototypes are used as well it is the same one for all: collapse too.",
        "nats", bound=True,
    ),
    Family(
        "Student entropy", r"student_entropy_\w+", "How undecided the students are about the "
        "global views. At ln K they say nothing, and the loss sits at ln K.", "nats", bound=True,
    ),
    Family(
        "KL(teacher, student)", r"kl_\w+", "What of the self-distillation loss a student can "
        "still lose: the loss minus the teacher's entropy. 0 for long: nothing is learned.",
        "nats",
    ),
    Family(
        "kNN of the teachers", r"knn_\w+", "Weighted kNN while they train (evaluate.every): pooled "
        "features of each model's teacher, evaluate.test against evaluate.train.", "%",
    ),
    Family("Norm of the centre", r"center_norm_\w+", "Growth without end is a warning.", ""),
    Family(
        "Prototypes used", r"prototypes_used_\w+", "Share of the prototypes that win at least one "
        "row of a batch, as far as its rows allow. Near 0: one prototype takes all.", "share",
    ),
    Family(
        "Spread of the features", r"feature_std_\w+", "Standard deviation of the normalised "
        "features: 1 is spread over the sphere, 0 is constant.", "",
    ),
    Family("Learning rate", r"lr_\d", "Of each model's main parameter group.", ""),
    Family(
        "Teacher temperature", r"temperature_\w+", "Lower makes the targets sharper.", "",
    ),
    Family(
        "EMA momentum", r"ema_momentum", "Share of a teacher that a step keeps; 1: it stands "
        "still.", "",
    ),
    Family("Throughput", r"images_per_s", "Pictures a second, all their views.", "images/s"),
    Family(
        "Waiting for data", r"data_wait", "Share of the time in which training waited for the "
        "loader.", "share",
    ),
    Family("Skipped steps", r"skipped", "Steps with a non-finite loss or gradient, since the "
           "row before.", "steps"),
    Family("Gradient scale", r"grad_scale_\w+", "Of the fp16 scaler.", "", scale="log"),
    Family("Unreadable pictures", r"bad_files", "Met and replaced so far.", "pictures"),
    Family("Epoch", r"epoch", "Passes over the pictures.", "epochs"),
)  # fmt: skip


class Figure(NamedTuple):
    title: str
    caption: str
    alt: str
    uri: str


def curves(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each family of keys that any run has; what no family knows comes last."""
    keys = list(dict.fromkeys(k for run in runs for row in run.metrics for k in row))
    keys = [key for key in keys if key != "step" and _numbers(runs, key)]
    figures = []
    for family in FAMILIES:
        mine = sorted(key for key in keys if re.fullmatch(family.keys, key))
        keys = [key for key in keys if key not in mine]
        figures += [_figure(runs, family, mine)] if mine else []
    others: dict[str, list[str]] = {}
    for key in keys:
        others.setdefault(re.sub(r"(_(mlp|t))?_\d+$", "", key), []).append(key)
    for stem, mine in others.items():
        figures.append(_figure(runs, Family(stem, "", "As logged."), mine))
    return figures


def _numbers(runs: Sequence[Run], key: str) -> bool:
    return any(isinstance(row.get(key), int | float) for run in runs for row in run.metrics)


def _figure(runs: Sequence[Run], family: Family, keys: list[str]) -> Figure:
    from matplotlib import rc_context

    with rc_context(_FONT):
        uri, ends = _draw(runs, family, keys)
    alt = f"{family.title} over steps. Last values: {ends}"
    return Figure(family.title, family.caption, alt, uri)


def _draw(runs: Sequence[Run], family: Family, keys: list[str]) -> tuple[str, str]:
    """(data URI of the SVG, the curves' last values in words)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.4, 2.9), layout="constrained")
    axes = canvas.add_subplot()
    ends, top = [], -math.inf
    for r, run in enumerate(runs):
        for k, key in enumerate(keys):
            x, y = series(run.metrics, key)
            if any(map(math.isfinite, y)):  # matplotlib cannot mark a curve without a point
                style = _style(r, k, len(runs), len(keys))
                axes.plot(x, y, markevery=(k * 0.03, 0.2), **style)
                top = max([top, *filter(math.isfinite, y)])
            if x:
                name = f"{run.name} · {key}" if len(runs) > 1 else key
                ends.append(f"{name} {y[-1]:.4g}")
    alarmed = [run for run in runs if run.alarms]
    for run in alarmed:
        dashes = _DASHES[runs.index(run) % 6] if len(runs) > 1 else (0, (1, 2))
        height = 1 + 0.06 * (len(alarmed) - 1 - alarmed.index(run))
        for alarm in run.alarms:
            axes.axvline(alarm["step"], color="#555555", lw=0.8, ls=dashes)
            axes.plot(alarm["step"], height, "v", color="#555555", ms=5, clip_on=False,
                      mfc="white" if alarm["over"] else "#555555",
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_yscale(family.scale)
    if family.unit in _FROM_ZERO:
        axes.set_ylim(0, None if top > 0 else 1)
    axes.set_xlabel("step")
    axes.set_ylabel(family.unit)
    axes.grid(color="#dddddd", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    handles = _handles(runs, keys) + (_bound(axes, runs, top) if family.bound else [])
    low, high = axes.get_ylim()
    lack = _SPAN * max(abs(low), abs(high)) - (high - low)
    if family.scale == "linear" and lack > 0:
        axes.set_ylim(low - lack / 2, high + lack / 2)
    canvas.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False,
                  ncols=1 if any(len(h.get_label()) > 26 for h in handles) else 2,
                  handlelength=3.2)  # fmt: skip
    file = io.BytesIO()
    canvas.draw_without_rendering()  # the first layout may change the ticks, the next fits these
    canvas.savefig(file, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/svg+xml;base64,{encoded}", ", ".join(ends)


def _style(r: int, k: int, runs: int, keys: int) -> dict[str, Any]:
    """Of key k of run r: keys differ in marker and colour, runs in the line's dashes.

    Where there is one run the keys have the dashes too; where one key, the runs the colours.
    """
    return {
        "color": _COLOURS[(k if keys > 1 else r) % 7], "ls": _DASHES[(r if runs > 1 else k) % 6],
        "marker": _MARKERS[k % 7], "lw": 1.4, "ms": 4, "mfc": "white",
    }  # fmt: skip


def _handles(runs: Sequence[Run], keys: list[str]) -> list[Any]:
    """What the legend explains: the keys, then the runs where there are several."""
    from matplotlib.lines import Line2D

    R, K = len(runs), len(keys)
    handles = []
    if K > 1 or R == 1:
        for k, key in enumerate(keys):
            style = _style(0, k, R, K) | ({"ls": "none"} if R > 1 else {})
            handles.append(Line2D([], [], label=key, **style))
    if R > 1:
        for r, run in enumerate(runs):
            style = _style(r, 0, R, K) | {"marker": ""}
            style |= {"color": "#000000"} if K > 1 else {}
            name = run.name if len(run.name) <= 40 else f"…{run.name[-39:]}"
            handles.append(Line2D([], [], label=name, **style))
    return handles


def _bound(axes: Any, runs: Sequence[Run], top: float) -> list[Any]:
    """Lines at ln K where the curves come near it."""
    sizes = sorted({run.recipe.prototypes for run in runs if run.recipe})
    return [
        axes.axhline(math.log(K), color="#000000", lw=0.8, label=f"ln K, K = {K}")
        for K in sizes
        if math.log(K) < 1.5 * top
    ]


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a key; long ones as means of neighbours, at most 300 points."""
    points = [(r["step"], float(r[key])) for r in rows if isinstance(r.get(key), int | float)]
    size = math.ceil(len(points) / _POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]
