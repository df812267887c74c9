"""The results that are published, and how the machine that made them is named."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu-2core"
GPU = "h200"  # the folder beside it, of bench/gpu.sh


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def load_gpu(name: str) -> dict[str, Any]:
    return json.loads(gpu_path(f"{name}.json").read_text())  # type: ignore[no-any-return]


def gpu_path(name: str) -> Path:
    return RESULTS.parent / GPU / name


def load_or_nothing(name: str) -> dict[str, Any]:
    """For what leaves out that which is not measured yet."""
    return load(name) if (RESULTS / f"{name}.json").exists() else {}


def rows_at(name: str, **shape: Any) -> dict[str, list[dict[str, Any]]]:
    """By dtype, the rows of a benchmark whose shape has these sizes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in load_or_nothing(name).get("rows", []):
        if shape.items() <= row["shape"].items():
            found.setdefault(row["dtype"], []).append(row)
    return found


def text(name: str) -> str:
    return (RESULTS / f"{name}.txt").read_text()


def measured(result: dict[str, Any]) -> str:
    facts = result["calibration"]
    return (
        f"{machine(result)} Copy rate {facts['copy_GB_per_s']:.0f} GB/s, load average at the start "
        f"{facts['load_average']:.1f}."
    )


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{statistics.mean(values):.1f}"
    return mean if high - low < 0.05 else f"{mean} ({low:.1f}-{high:.1f})"


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return (
        f"Measured on {facts['cores']} cores of {facts['cpu']} ({facts['torch_threads']} threads), "
        f"torch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}, "
        f"{facts['date']}."
    )


def measured_gpu(result: dict[str, Any]) -> str:
    facts = result["machine"]
    versions = [f"CUDA {facts['cuda']}", f"torch {facts['torch']}", f"Triton {facts['triton']}"]
    return (
        f"Measured on an {facts['gpu']}, driver {facts['driver']}, {', '.join(versions)}, "
        f"Python {facts['python']}, commit {facts['commit']}, {facts['date']}."
    )
