"""The plots of figures.py as SVG; the same bytes for the same data and matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#555555"  # Okabe and Ito's
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "mokd_fast",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
}
LINES = {"fp32": (BLUE, "o", "-"), "bf16": (ORANGE, "s", "--"), "ours": (BLUE, "o", "-"),
         "stored": (GREEN, "^", "-."), "official": (ORANGE, "s", "--")}  # fmt: skip


def write(name: str, data: dict[str, Any], said: str, path: Path) -> None:
    """said: what stands in the file's description."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    draw: dict[str, Callable[[Any, Any], None]] = {
        "speed": speed, "memory": memory, "roofline": roofline, "growth": growth,
    }  # fmt: skip
    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw[name](figure, data)
        figure.draw_without_rendering()  # the first layout may change the ticks, the next fits them
        about = {"Date": None, "Creator": "bench/readme.py", "Description": said}
        figure.savefig(path, format="svg", metadata=about, facecolor="white")


def speed(figure: Any, data: dict[str, Any]) -> None:
    rows = data["rows"][::-1]
    figure.set_size_inches(7, 0.9 + 0.36 * len(rows))
    axes = figure.add_subplot()
    for shift, column, color, label in (
        (0.2, 1, BLUE, "over the official form"),
        (-0.2, 2, ORANGE, "over the fastest other form"),
    ):
        known = [(i + shift, row) for i, row in enumerate(rows) if row[column]]
        ends = [row[column] - 1 for _, row in known]
        axes.barh([y for y, _ in known], ends, 0.38, left=1, color=color, label=label)
        for y, row in known:
            name = f" ({row[3]})" if column == 2 and row[3] != "official" else ""
            text = (
                f" {row[column]:.2f}x{name}" if row[column] < 10 else f" {row[column]:.1f}x{name}"
            )
            axes.text(max(row[column], 1), y, text, va="center", fontsize=7)
    _labels(axes, [row[0] for row in rows])
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_xscale("log")
    _plain(axes.xaxis, [1, 2, 4, 8, 16])
    axes.set_xlim(0.7, 1.9 * max(row[1] for row in rows))
    axes.set_xlabel("times faster (1: the same time; below 1 ours is slower)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def memory(figure: Any, data: dict[str, Any]) -> None:
    rows = data["rows"][::-1]
    figure.set_size_inches(7, 0.7 + 0.26 * len(rows))
    axes = figure.add_subplot()
    shares = [ours / theirs for _, ours, theirs in rows]
    axes.barh(range(len(rows)), shares, 0.7, color=BLUE)
    for y, (share, (_, *both)) in enumerate(zip(shares, rows, strict=True)):
        texts = (f"{size / 2**20:.0f}" for size in both)
        axes.text(share, y, f" {share:.2f}  ({' / '.join(texts)} MiB)", va="center", fontsize=7)
    _labels(axes, [row[0] for row in rows])
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_xlim(0, 1.4 * max(1, *shares))
    axes.set_xlabel("our memory as a share of the official form's")


def roofline(figure: Any, data: dict[str, Any]) -> None:
    figure.set_size_inches(7, 3.6)
    axes = figure.add_subplot()
    xs = [point[1] for point in data["points"]]
    low, high = min(xs) / 3, max(xs) * 12
    (slow, fast), top = data["copy"], max(data["oneDNN"])
    for name, style in (("torch", "--"), ("oneDNN", "-")):
        slowest, fastest = data[name]
        axes.axhspan(slowest, max(fastest, slowest * 1.01), color=GREY, alpha=0.15, lw=0)
        axes.axhline(fastest, color=GREY, lw=0.9, ls=style)
        axes.text(low * 1.1, fastest * 1.04, f"matrix rate, {name}: {fastest:.0f} GFLOP/s",
                  fontsize=7, color=GREY)  # fmt: skip
    ends = [low, top / fast]
    axes.fill_between(ends, [slow * x for x in ends], [fast * x for x in ends], color=GREY,
                      alpha=0.15, lw=0)  # fmt: skip
    axes.plot(ends, [fast * x for x in ends], color=GREY, lw=0.9)
    axes.text(low * 1.3, fast * low * 0.75, f"copy rate: {fast:.0f} GB/s", fontsize=7, color=GREY)
    for i, (label, x, y, share) in enumerate(data["points"]):
        axes.plot(x, y, "o", color=BLUE, ms=5)
        place = 5, -9 if i % 2 else -18
        text = f"{label}, {share:.0%}"
        axes.annotate(text, (x, y), place, textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(slow * low / 2, top * 2))
    axes.set_xlabel("FLOPs a byte that must move")
    axes.set_ylabel("GFLOP/s, fp32")
    axes.grid(True)


def growth(figure: Any, data: dict[str, Any]) -> None:
    figure.set_size_inches(7, 4.6)
    panels = figure.subplots(2, 2)
    titles = {"B": "images B", "V": "student views V", "K": "prototypes K"}
    for axes, (axis, title) in zip(panels.flat, titles.items(), strict=False):
        _lines(axes, data["time"][axis], 1)
        axes.set_xlabel(f"{title} (log)")
        axes.set_ylabel("loss, ns a logit")
        axes.set_ylim(0)
    last = panels[1][1]
    _lines(last, data["memory"], 2**20)
    last.set_yscale("log")
    _plain(last.yaxis, [10, 100, 1000])
    last.set_xlabel("prototypes K (log)")
    last.set_ylabel("prototypes + loss, MiB")
    for axes in panels.flat:
        axes.grid(True)
        axes.legend(frameon=False, fontsize=7)


def _lines(axes: Any, lines: dict[str, list[list[float]]], unit: int) -> None:
    for name, points in lines.items():
        color, marker, style = LINES[name]
        xs, ys = [p[0] for p in points], [p[1] / unit for p in points]
        axes.plot(xs, ys, color=color, marker=marker, ls=style, ms=4, lw=1.4, label=name)
    axes.set_xscale("log")
    _plain(axes.xaxis, xs)


def _labels(axes: Any, texts: list[str]) -> None:
    axes.set_yticks(range(len(texts)), texts)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")


def _plain(axis: Any, ticks: list[float]) -> None:
    """These ticks alone, not as powers of ten."""
    axis.set_ticks(ticks, [f"{x:g}" if x < 1e4 else f"{x / 1024:g}k" for x in ticks])
    axis.set_ticks([], minor=True)
