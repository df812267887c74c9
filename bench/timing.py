"""Interleaved timing: what is compared runs turn by turn in one process, and medians are taken."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

BUSY = 0.1  # share of the machine's processor time


class Medians(dict[str, float]):
    """Seconds of each run, and how many rounds were thrown away because the machine was busy.

    turns, cpu: of each run its seconds in the rounds that count, by the clock and of the processor
    (this process and those that it began and that ended in the turn).
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.discarded = 0
        self.turns: dict[str, list[float]] = {name: [] for name in names}
        self.cpu: dict[str, list[float]] = {name: [] for name in names}


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int = 1,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> Medians:
    """Median seconds of each callable over `rounds` rounds, after one that is not counted.

    A turn is the mean of `calls` calls in a row: one alone starts with what the others left in the
    caches, Python's and torch's own code included, which costs a short operator half a millisecond.

    A round in which other processes took more than BUSY of the machine is repeated, up to twice as
    many rounds in all; with more than that the machine is too busy to wait for.

    `before`: of a run, what prepares its turn and is not timed.
    """
    result, counted, turn = Medians(runs), 0, 0
    while counted < rounds:
        others, times, cpu = 0.0, {}, {}
        for name, run in list(runs.items())[:: 1 if turn % 2 else -1]:  # each after each
            if before and name in before:
                before[name]()
            _synchronize()
            seen, used, begin = _others(), _ours(), time.perf_counter()
            for _ in range(calls):
                run()
            _synchronize()
            times[name] = (time.perf_counter() - begin) / calls
            cpu[name] = (_ours() - used) / calls
            others += _others() - seen
        share = others / (calls * sum(times.values()) * (os.cpu_count() or 1))
        turn += 1
        if turn == 1:
            continue
        if share > BUSY and result.discarded < rounds:
            result.discarded += 1
            continue
        counted += 1
        for name in runs:
            result.turns[name].append(times[name])
            result.cpu[name].append(cpu[name])
    result.update({name: statistics.median(values) for name, values in result.turns.items()})
    return result


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that are there while `run` runs beyond those that are there all the time: what it
    frees of an earlier run's counts too. (On a GPU beyond what was there before.)"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _allocations(run)  # what an unobserved run has left is freed unseen
    now = peak = least = 0
    for event in _allocations(run):
        now += event.alloc_size
        peak, least = max(peak, now), min(least, now)
    return peak - least


def extra_bytes(run: Callable[[], Any]) -> int:
    """The same, but what is still there when `run` is over does not count at any time. CPU only."""
    events = _allocations(run)
    freed_at = {}  # by address, the last time
    for i, event in enumerate(events):
        if event.alloc_size < 0:
            freed_at[event.ptr] = i
    now = peak = 0
    counted = {}
    for i, event in enumerate(events):
        if event.alloc_size > 0 and freed_at.get(event.ptr, -1) > i:
            counted[event.ptr] = event.alloc_size
            now += event.alloc_size
        elif event.alloc_size < 0:
            now -= counted.pop(event.ptr, 0)
        peak = max(peak, now)
    return peak


def _allocations(run: Callable[[], Any]) -> list[Any]:
    """What PyTorch allocates (alloc_size > 0) and frees on the CPU, in order."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    found = []

    def walk(events: Any) -> None:
        for event in events:
            if isinstance(event.extra_fields, torch._C._profiler._ExtraFields_Allocation):
                found.append((event.start_time_ns, event.extra_fields))
            walk(event.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    return [fields for _, fields in sorted(found, key=lambda pair: pair[0])]


def keep_memory() -> None:
    """Starts this program again with a malloc that keeps what is freed, as GPU allocators do.

    Otherwise glibc returns every block beyond 32 MiB to the system and each step's page faults
    (10 ms for 42 MB) hide what the operators take.
    """
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    if platform.system() == "Linux" and not keep.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})


def calibrate() -> dict[str, float]:
    """What this machine gives right now: copy rate, fp32 matrix rate (on a CPU that of oneDNN too,
    which may be the faster library), load average."""
    from mokd_fast.ops import onednn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1 << 25, device=device)  # 128 MiB, beyond any cache
    y = torch.empty_like(x)
    a = torch.randn(2048, 2048, device=device)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: y.copy_(x), "gemm_fp32": lambda: a @ a}
    if onednn.usable(device, a.dtype):
        runs["gemm_fp32_onednn"] = lambda: onednn.linear(a, a)
    times = interleave(runs, rounds=5)
    products = [name for name in runs if name != "copy"]
    return {
        "copy_GB_per_s": 2 * x.numel() * 4 / times["copy"] / 1e9,
        **{f"{name}_GFLOP_per_s": 2 * 2048**3 / times[name] / 1e9 for name in products},
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
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("torchvision", "timm", "numpy", "triton")},
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _others() -> float:
    """Processor seconds that other processes, and other machines on this host, took so far."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - _ours()


def _ours() -> float:
    """Processor seconds of this process, and of those that it began and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # no such name here
        return 0


def _driver() -> str:
    lines = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.split("\n")[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Of the checkout; of a copy of it what COMMIT says (bench/gpu.sh); else the version."""
    if said := os.environ.get("COMMIT"):
        return said
    here = Path(__file__).resolve()
    if _said("git", "-C", str(here.parent), "ls-files", here.name):  # not just beneath a checkout
        return _said("git", "-C", str(here.parent), "describe", "--always", "--dirty")
    from mokd_fast import __version__

    return f"of mokd_fast {__version__}"


def _said(*command: str) -> str:
    """What a command printed; nothing where it failed or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
