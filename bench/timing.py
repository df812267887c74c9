"""Interleaved timing: what is compared runs turn by turn in one process, and medians are taken."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each callable over `rounds` rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _synchronize()
            begin = time.perf_counter()
            run()
            _synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def calibrate() -> dict[str, float]:
    """What this machine gives right now: copy rate, fp32 matrix rate, load average."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1 << 25, device=device)  # 128 MiB, beyond any cache
    y = torch.empty_like(x)
    a = torch.randn(2048, 2048, device=device)
    times = interleave({"copy": lambda: y.copy_(x), "gemm": lambda: a @ a}, rounds=5)
    return {
        "copy_GB_per_s": 2 * x.numel() * 4 / times["copy"] / 1e9,
        "gemm_fp32_GFLOP_per_s": 2 * 2048**3 / times["gemm"] / 1e9,
        "load_average": os.getloadavg()[0],
    }


def machine() -> dict[str, Any]:
    """Processor, versions, commit and date, to stand beside every figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"
