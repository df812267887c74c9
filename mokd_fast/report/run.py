"""What a run folder holds, read as far as it is there; what is missing says why."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..api import networks
from ..data.sources import Source, open_source
from ..errors import UserError
from ..nn import MOKD
from ..train.checkpoint import find_checkpoint
from ..train.recipe import Recipe, load_recipe

_SIGNS = ("recipe.yaml", "metrics.jsonl", "checkpoints", "knn.json", "linear.json")


@dataclass
class Run:
    """One run. `missing` says in a sentence why a part is not there: networks, metrics, ..."""

    folder: Path
    name: str
    recipe: Recipe | None = None
    mokd: MOKD | None = None
    versions: dict[str, str] = field(default_factory=dict)  # that it was trained with
    metrics: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] | None = None  # of evaluate()
    pointing: dict[str, Any] | None = None  # of pointing.summarise()
    missing: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)  # opened; a large one takes long


def read_run(folder: Path, name: str) -> Run:
    """Reads a run folder. Raises UserError when it is none; any part of it may be absent."""
    if not folder.exists():
        raise UserError(f"{folder}: no such run folder")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; the report takes the run folder it lies in")
    if not any((folder / sign).exists() for sign in _SIGNS):
        raise UserError(f"{folder} is no run folder: it holds none of {', '.join(_SIGNS)}")
    run = Run(folder, name)
    _networks(run)
    run.metrics = [
        {key: value for key, value in row.items() if isinstance(value, int | float)}
        for row in _rows(run, "metrics.jsonl", "metrics", "step")
    ]
    if not run.metrics:
        run.missing.setdefault("metrics", f"{folder}/metrics.jsonl holds no row yet")
    if (folder / "alarms.jsonl").exists():  # the first alarm makes it
        run.alarms = _rows(run, "alarms.jsonl", "alarms", "step", "alarm", "text")
    run.alarms = [{"over": False} | row for row in run.alarms]  # a row may say that it is over
    for file in ("linear.json", "knn.json"):  # the first holds what the second does, and more
        run.scores = run.scores or _json(run, file, "scores", None, "knn")
    run.pointing = _json(run, "pointing.json", "pointing", "directions", "blocks")
    return run


def _networks(run: Run) -> None:
    """Recipe and networks of the newest checkpoint, else the recipe of recipe.yaml."""
    try:
        path, state = find_checkpoint(run.folder)
        if isinstance(found := state.get("versions"), dict):  # older checkpoints have none
            run.versions = {str(name): str(value) for name, value in found.items()}
        run.recipe, mokd = networks(path, state)
        run.mokd = mokd.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    except (UserError, RuntimeError) as error:  # RuntimeError: keys or shapes of another version
        run.missing["networks"] = str(error)
        try:
            run.recipe = load_recipe(run.folder / "recipe.yaml")
        except UserError as error:
            run.missing["recipe"] = str(error)


def _rows(run: Run, file: str, part: str, *keys: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that have the keys. A cut last one, left by a crash, is normal."""
    try:
        lines = (run.folder / file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        run.missing[part] = f"{run.folder / file}: {error.strerror or error}"
        return []
    rows, bad = [], 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys} | row | {"step": int(row["step"] + 0)})
        except (ValueError, KeyError, TypeError, OverflowError):
            bad += number < len(lines)
    if bad:
        run.missing[f"{part} rows"] = f"{run.folder / file}: {bad} unreadable rows are left out"
    return rows


def _json(run: Run, file: str, part: str, inner: str | None, key: str) -> dict[str, Any] | None:
    """A file's mapping; None, and why, where its rows (those of `inner`) do not have the key."""
    path = run.folder / file
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found.get(inner) if inner is not None and isinstance(found, dict) else found
        if not (isinstance(rows, dict) and rows and all(_has(x, key) for x in rows.values())):
            raise ValueError("not what mokd-fast writes there")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        run.missing[part] = f"{path} cannot be read: {error}"
        return None
    return found


def _has(row: Any, key: str) -> bool:
    return isinstance(row, dict) and key in row


def training_pictures(run: Run) -> Source:
    """Raises UserError when they are not there any more."""
    return _open(run, "train")[0]


def held_out_pictures(run: Run) -> tuple[Source, str]:
    """The pictures of evaluate.test, or the training ones, and which of the two ("held-out").

    Raises UserError when neither are there any more.
    """
    return _open(run, "test", "train")


def _open(run: Run, *splits: str) -> tuple[Source, str]:
    if run.recipe is None:
        raise UserError(run.missing["recipe"])
    roots = {"train": run.recipe.data.root, "test": run.recipe.evaluate.test}
    problem = "the recipe names no pictures"
    for split in splits:
        if (root := roots[split]) is not None:
            try:
                if root not in run.sources:
                    run.sources[root] = open_source(root)
                return run.sources[root], "held-out" if split == "test" else "training"
            except UserError as error:
                problem = str(error)
    raise UserError(problem)
