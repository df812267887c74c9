"""Which plots are stale, and drawing them.

A plot's description holds a digest of the data that it shows and of the code that draws it. So
another matplotlib, which draws other bytes, makes no plot stale, and the check needs none.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from bench.report import draw, results
from bench.report.figures import FIGURES


def folder() -> Path:
    return results.RESULTS / "plots"


def stale() -> dict[str, dict[str, Any]]:
    """Data by name of the plots that do not show what the results say."""
    found = {name: figure() for name, figure in FIGURES.items()}
    return {n: data for n, data in found.items() if data and _drawn(n) != digest(data)}


def draw_stale() -> list[Path]:
    """The files that were drawn anew."""
    drawn = []
    for name, data in stale().items():
        path = folder() / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        draw.write(name, data, digest(data), path)
        drawn.append(path)
    return drawn


def digest(data: dict[str, Any]) -> str:
    code = Path(draw.__file__).read_text()
    return hashlib.sha256((json.dumps(data) + code).encode()).hexdigest()[:16]


def _drawn(name: str) -> str:
    path = folder() / f"{name}.svg"
    said = path.exists() and re.search(r"<dc:description>(\w+)</dc:description>", path.read_text())
    return said[1] if said else ""
