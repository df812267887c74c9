"""The report: runs in, one HTML page out that needs nothing but itself."""

import contextlib
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from .. import __version__
from ..errors import UserError
from . import tables
from .curves import curves
from .pictures import attention_plates, views_plate
from .run import Run, read_run
from .search import search_plates
from .strips import Plate

_log = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of one or several runs side by side; returns its path.

    The pointing scores land in RUN/pointing.json as well. Raises UserError when a folder is no
    run, when the page cannot be written and when matplotlib is missing; whatever else is not
    there is said in the page.
    """
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the report needs {name}: pip install mokd_fast[report]")
    runs = [read_run(folder, name) for folder, name in _named(folders)]
    out = out or folders[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file, as {out}/report.html")
    unfinished = out.with_name(f"{out.name}.tmp")
    try:
        with _saying(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            unfinished.touch()  # finds out before the work, not after it
        page = _page(runs)
        with _saying(out):
            unfinished.write_text(page, encoding="utf-8")
            os.replace(unfinished, out)
    finally:
        with contextlib.suppress(OSError):  # there is no such folder
            unfinished.unlink(missing_ok=True)
    return out


@contextlib.contextmanager
def _saying(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give another file with --out"
        ) from error


def _page(runs: Sequence[Run]) -> str:
    plates: dict[str, list[tuple[Run, Plate]]] = {"views": [], "networks": [], "search": []}
    for run in runs:
        plates["views"].append((run, views_plate(run)))
        plates["networks"] += [(run, plate) for plate in attention_plates(run)]
        found, pointing = search_plates(run)
        plates["search"] += [(run, plate) for plate in found]
        if pointing is not None:
            run.pointing = pointing
            _keep(run.folder / "pointing.json", json.dumps(pointing, indent=1) + "\n")
    return _html(runs, plates)


def _named(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each run with a name that no other one has."""
    if not folders:
        raise UserError("give one run folder or more, as mokd-fast report runs/mine")
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UserError(f"{folder} is given twice")
    names = [folder.name for folder in resolved]
    return [
        (folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _keep(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:  # the page is worth more than this file
        _log.warning("%s cannot be written: %s", path, error.strerror)


def _html(runs: Sequence[Run], plates: dict[str, list[tuple[Run, Plate]]]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html").read_text("utf-8"))
    made = f"mokd_fast {__version__}, "
    made += ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "matplotlib"))
    names = [run.name for run in runs]
    return template.render(
        runs=runs,
        several=len(runs) > 1,
        title=" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])),
        facts=tables.facts(runs),
        glance=[(run, tables.glance(run), tables.no_alarm(run)) for run in runs],
        curves=curves(runs),
        alarms=any(run.alarms for run in runs),
        scores=tables.scores(runs),
        pointing=tables.pointing(runs),
        plates=plates,
        made=f"{datetime.now():%Y-%m-%d %H:%M} by {made}, Python {platform.python_version()}",
    )
