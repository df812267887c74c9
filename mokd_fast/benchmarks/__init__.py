"""`mokd-fast bench`: the benchmarks one after another, each in a process of its own.

They are the scripts of the checkout's top-level `bench/`, and run from there. A wheel carries the
same folder as `scripts/bench` of this package (setup.py), so that its users can measure as well.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .table import ratios

if TYPE_CHECKING:
    from rich.console import Console  # bench/gpu.sh asks for the machine's name where there is none

NAMES = ("distill", "linear_distill", "search", "augment", "data", "step")
HERE = Path(__file__).resolve().parent


def run(
    names: Sequence[str],
    console: "Console",
    *,
    quick: bool = False,
    full: bool = False,
    out: Path | None = None,
) -> list[str]:
    """Run the named benchmarks, all without names, and print their ratios; return what failed.

    NAME.json of each goes to `out`/MACHINE, by default to bench/results of the checkout, or to
    bench-results beneath the working directory where there is no checkout. What --quick measures
    goes to MACHINE-quick, beside published figures and not over them. full: the published pair's
    step too, as in bench/README.md. One that fails leaves what it had written as NAME.partial.json,
    and the others run all the same.
    """
    names = _known(names)
    if quick and full:
        raise UserError("--quick and --full exclude each other: give one of them.")
    scripts, machine = folder(), _machine_of_a_benchmark()
    out = out or (scripts / "results" if _in_checkout(scripts) else Path("bench-results"))
    out /= machine + "-quick" * quick
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}. Name another --out.") from None
    written, failed = [], []
    for name in names:
        words = ["--quick"] * quick + ["--full"] * (full and name == "step")
        path = _run_one(_script(scripts, name, machine), out / f"{name}.json", words, console)
        written += [path] if path else []
        failed += [] if path else [name]
    _say(console, ratios(written))
    if failed:
        _say(console, f"failed: {', '.join(failed)} (their messages stand above)")
    return failed


def folder() -> Path:
    """Where the scripts are: in this package if a wheel was installed, else in the checkout."""
    installed, checkout = HERE / "scripts" / "bench", HERE.parents[1] / "bench"
    for found in (installed, checkout):
        if (found / "timing.py").exists():
            return found
    raise UserError(
        f"the benchmarks are missing: they are neither in {installed} nor in {checkout}. "
        "Install mokd_fast again (pip install .)."
    )


def machine_name() -> str:
    """Of the folder of results: the GPU that would be measured, or the number of cores."""
    import torch

    if not torch.cuda.is_available():
        return f"cpu-{os.cpu_count()}core"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    return name.strip("-").removeprefix("nvidia-")


def _machine_of_a_benchmark() -> str:
    """Asked in a process that ends: torch would stay in this one, and a context on the GPU. Not in
    the user's folder: that of a clone would come before what is installed."""
    code = f"from {__name__} import machine_name; print(machine_name())"
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    if asked.returncode:
        raise UserError("torch, which the benchmarks need, does not work: its message stands above")
    return asked.stdout.split()[-1]


def _known(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(f"no benchmark {name!r}. {hint}There are {', '.join(NAMES)}.")
    return list(dict.fromkeys(names)) or list(NAMES)


def _in_checkout(scripts: Path) -> bool:
    return HERE not in scripts.parents


def _script(scripts: Path, name: str, machine: str) -> Path:
    """On a GPU the operators have benchmarks of their own."""
    gpu = scripts / f"{name}_gpu.py"
    return gpu if not machine.startswith("cpu-") and gpu.exists() else scripts / f"{name}.py"


def _run_one(script: Path, path: Path, words: list[str], console: "Console") -> Path | None:
    """The file of results, or None if the benchmark failed."""
    partial = path.with_suffix(".partial.json")
    partial.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--json", str(partial), *words]
    _say(console, f"== {path.stem}: {' '.join(command)}")
    begin = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    seconds = f"after {time.monotonic() - begin:.0f} s"
    if code == 0 and partial.exists():
        partial.replace(path)
        _say(console, f"== {path.stem}: written to {path} {seconds}\n")
        return path
    kept = f"; what it had measured is in {partial}" if partial.exists() else ""
    _say(console, f"== {path.stem}: failed with exit status {code} {seconds}{kept}\n")
    return None


def _say(console: "Console", text: str) -> None:
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
