"""The words and numbers of the page: what a run is, its result, its scores."""

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from ..evaluate import format_table
from ..train.alarms import MIN_ROWS, WINDOW
from ..train.recipe import total_steps
from ..train.schedule import in_steps
from .run import Run


class Table(NamedTuple):
    """The first column names the rows. `quiet` are rows that are controls."""

    head: list[str]
    rows: list[list[str]]
    quiet: frozenset[str] = frozenset()


def facts(runs: Sequence[Run]) -> Table:
    """What each run is; a column a run."""
    found = [_facts(run) for run in runs]
    labels = list(dict.fromkeys(label for one in found for label in one))
    rows = [[label, *(one.get(label, "–") for one in found)] for label in labels]
    return Table(["", *(run.name for run in runs)], rows)


def _facts(run: Run) -> dict[str, str]:
    facts = {"folder": str(run.folder)}
    if (recipe := run.recipe) is not None:
        augment, train = recipe.augment, recipe.train
        sizes = [f"2 × {'×'.join(map(str, augment.global_hw))} px"]
        if augment.locals:
            sizes.append(f"{augment.locals} × {'×'.join(map(str, augment.local_hw))} px")
        facts |= {
            "recipe": recipe.name,
            "models": " + ".join(model.name for model in recipe.models),
            "pictures": str(recipe.data.root),
            "views of a picture": ", ".join(sizes),
            "batch": f"{train.batch} pictures, {train.precision}, seed {train.seed}",
            "prototypes": str(recipe.prototypes),
        }
    if rows := run.metrics:
        facts["steps"] = _steps(run)
        for label, key, text in (
            ("speed", "images_per_s", "{:.3g} pictures/s (median)"),
            ("waiting for data", "data_wait", "{:.1%} of the time (median)"),
        ):
            if values := [row[key] for row in rows if key in row]:
                facts[label] = text.format(statistics.median(values))
    if run.versions:
        facts["trained with"] = _versions(run.versions)
    return facts


def _versions(found: dict[str, str]) -> str:
    """What `train.state.versions` kept in the newest checkpoint, in words that do not break."""
    threads = "1 thread" if found.get("threads") == "1" else "{} threads"
    texts = {"threads": threads, "device": "{}"}
    words = [texts.get(name, name + " {}").format(value) for name, value in found.items()]
    return ", ".join(word.replace(" ", "\u00a0") for word in words)


def _steps(run: Run) -> str:
    last = run.metrics[-1]
    text = f"{last['step']}"
    if length := _length(run):
        text += f" of {length[1]}"
    return text + (f", {last['epoch']:.2f} epochs" if "epoch" in last else "")


def _length(run: Run) -> tuple[int, int] | None:
    """Steps of an epoch and of the whole run."""
    last = run.metrics[-1]
    ratio = last["step"] / (last.get("epoch") or math.nan)
    if run.recipe is not None and math.isfinite(ratio):
        with contextlib.suppress(UserError):  # a recipe that would not start today
            return round(ratio), total_steps(run.recipe, round(ratio))
    return None


def no_alarm(run: Run) -> str:
    """For a run without alarms: that there is none, or that nothing could have raised one."""
    name = run.name
    rows = [row for row in run.metrics if {"loss_1", "feature_std_1"} <= row.keys()]
    if not rows:
        return f"No collapse alarm could watch {name}: its metrics hold no diagnostics."
    length = _length(run)
    warmup = in_steps(run.recipe.train.warmup, *length) if run.recipe and length else 0
    steps = [row["step"] for row in rows if row["step"] > warmup]
    if len(steps) < MIN_ROWS or steps[-1] - steps[0] < WINDOW:
        return (
            f"{name} is too short for a collapse alarm: these judge {WINDOW} steps "
            f"and {MIN_ROWS} rows of metrics after the warm-up."
        )
    return f"{name} has no collapse alarm."


def glance(run: Run) -> list[str]:
    """The result in some sentences."""
    sentences = []
    for i, model in enumerate(run.recipe.models if run.recipe else (), 1):
        trained, random = (_row(run, i, end) for end in ("teacher", "random"))
        if trained and random and run.scores is not None:
            k = next(iter(trained["knn"]))
            text = (
                f"{i} {model.name}: kNN (k = {k}) {random['knn'][k]:.1f} % randomly initialised, "
                f"{trained['knn'][k]:.1f} % trained"
            )
            if pixels := run.scores.get("pixels"):
                text += f"; raw pixels {pixels['knn'][k]:.1f} %"
            sentences.append(text + ".")
    for direction, found in ((run.pointing or {}).get("directions") or {}).items():
        block = found["blocks"][0]
        gain, ci = block["difference"]["mean"], block["difference"]["ci95"]
        word = "better than" if gain > ci else "worse than" if gain < -ci else "no better than"
        i, j = direction.split("->")
        sentences.append(
            f"Crops of model {i} find themselves in the map of model {j} {word} another picture's "
            f"crop would (block 1): pointing score {_number(block['own'])}, control "
            f"{_number(block['random'])}, chance 1."
        )
    return sentences


def _row(run: Run, i: int, end: str) -> dict[str, Any] | None:
    rows = (run.scores or {}).items()
    return next((r for name, r in rows if name.startswith(f"{i} ") and name.endswith(end)), None)


def scores(runs: Sequence[Run]) -> Table | None:
    """kNN and linear probe. One run: a column a measure; several: a column a run."""
    cells: dict[tuple[str, str], dict[str, str]] = {}  # (model, measure) -> run -> percent
    quiet = set()
    for run in runs:
        if run.scores is None:
            continue
        names, *measures = format_table(run.scores).columns
        for measure in measures:
            for model, percent in zip(names.cells, measure.cells, strict=True):
                cells.setdefault((str(model), str(measure.header)), {})[run.name] = str(percent)
                if str(model).endswith((" random", "pixels")):
                    quiet.add(str(model))
    if not cells:
        return None
    models = list(dict.fromkeys(model for model, _ in cells))
    if len(runs) == 1:
        head = list(dict.fromkeys(measure for _, measure in cells))
        rows = [[m, *("".join(cells.get((m, h), {}).values()) for h in head)] for m in models]
        return Table(["model", *head], rows, frozenset(quiet))
    rows = [
        [model, measure, *(found.get(run.name, "–") for run in runs)]
        for (model, measure), found in sorted(cells.items(), key=lambda x: models.index(x[0][0]))
    ]
    return Table(["model", "measure", *(run.name for run in runs)], rows, frozenset(quiet))


def pointing(runs: Sequence[Run]) -> Table | None:
    """Pointing scores with 95 % confidence intervals; a row a run, direction and block."""
    rows = []
    for run in runs:
        for direction, found in ((run.pointing or {}).get("directions") or {}).items():
            for b, block in enumerate(found["blocks"], 1):
                rows.append([
                    *([run.name] if len(runs) > 1 else []),
                    direction.replace("->", " asks "),
                    f"{b}" if block["reaches_output"] else f"{b} (no influence)",
                    *(_number(block[key]) for key in ("own", "random", "difference")),
                    f"{found['best']:.2f}",
                ])  # fmt: skip
    if not rows:
        return None
    head = ["models", "block", "own crop", "control", "difference", "highest possible"]
    return Table([*(["run"] if len(runs) > 1 else []), *head], rows)


def _number(value: dict[str, float]) -> str:
    mean, ci = value["mean"], value["ci95"]
    digits = 3 if ci >= 5e-4 or ci == 0 else min(math.ceil(-math.log10(ci)), 6)
    mean = round(mean, digits) + 0.0  # no -0
    return f"{mean:.{digits}f} ± {ci:.{digits}f}"
