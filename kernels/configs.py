"""Which tile the GPU kernels of distill_cross_entropy work on: from a table, or timed on request.

    MOKD_FAST_AUTOTUNE=1          times a few tiles at the first call of a shape, keeps the fastest
    MOKD_FAST_AUTOTUNE=FILE.json  and keeps it in this file for the next process

Never while a CUDA graph is captured or torch.compile traces: there, what is known already is used.
Another tile adds in another order: with a tuned one the last bits may differ from run to run (not
with the file) and from rank to rank. Imports torch alone: the CUDA C++ side runs without Triton.
"""

import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

AUTOTUNE = "MOKD_FAST_AUTOTUNE"


class Config(NamedTuple):
    columns: int  # of a tile: that of a block in Triton, of each warp in CUDA
    warps: int = 0  # of a block; CUDA's follow from the tile
    stages: int = 0  # Triton: views whose loads are under way, and the one worked on


class Case(NamedTuple):
    """What a choice depends on: the GPU, the shape and the bytes of a student's logit."""

    capability: int  # 90 for 9.0
    processors: int
    views: int
    images: int
    columns: int
    rows: int  # of the teachers; in Triton those of each target count as a power of two
    bytes: int


class Line(NamedTuple):
    """A line of the table: for what it is, its choice, and why."""

    backend: str
    capability: int  # from this one on
    columns: int  # K up to
    rows: int  # up to
    bytes: int  # up to
    config: Config
    in_flight: int  # KiB that a multiprocessor waits for, at least: most rows, smallest logits
    measured: str = ""  # GPU, date and seconds; empty where no GPU has measured the line


ANY = 1 << 62  # columns
AHEAD = 5_000_000  # cycles that a device waits for the launches of a call that is timed: 3 ms
# The first line that covers a case is taken. A GPU measured some (bench/results/h200/distill.json);
# like them, the others are what the compiler shows and the tests see again (tests/ops/test_cuda.py,
# tests/kernels/test_distill.py): no spill (but 48 bytes a thread on an H100 of 24 fp32 rows with
# Triton 3.6, none with 3.8); 16-byte loads (8-byte ones of 16-bit logits above 16 rows); and
# `in_flight`. To hide a latency of 0.7 us at the memory rate on the data sheet takes 13 KiB on a
# multiprocessor of an A100, 18 on an H100's, 38 on a B200's. Above 4 rows registers leave Triton 2
# blocks; more stages make up for it, up to 6: with 10 views a longer queue is hardly ever full. Up
# to K = 1024, tiles of 2048 would be half empty.
TABLE = (
    Line("triton", 80, 1024, 4, 4, Config(1024, 4, 3), 20),
    Line("triton", 80, ANY, 4, 4, Config(2048, 4, 3), 32),
    Line("triton", 80, ANY, 16, 2, Config(1024, 4, 5), 16),
    Line("triton", 80, ANY, 16, 4, Config(1024, 4, 3), 16),
    Line("triton", 80, ANY, 24, 2, Config(512, 4, 6), 10),
    Line("triton", 80, ANY, 24, 4, Config(512, 4, 5), 16),
    Line("triton", 90, 1024, 4, 4, Config(1024, 4, 3), 20),
    Line("triton", 90, ANY, 4, 4, Config(2048, 4, 4), 48, "H200, 2026-11-27: 133 us (2 rows)"),
    Line("triton", 90, ANY, 16, 2, Config(1024, 4, 6), 20),
    Line("triton", 90, ANY, 16, 4, Config(1024, 4, 4), 24),
    Line("triton", 90, ANY, 24, 4, Config(512, 4, 6), 10),
    Line("triton", 100, 1024, 4, 4, Config(1024, 4, 5), 40),
    Line("triton", 100, ANY, 4, 4, Config(2048, 4, 4), 48),
    Line("triton", 100, ANY, 16, 4, Config(1024, 4, 6), 20),
    Line("triton", 100, ANY, 24, 4, Config(512, 4, 6), 10),
    # A warp keeps rows x columns numbers in shared memory: above 20 KiB too few warps fit.
    Line("cuda", 80, 256, 24, 8, Config(256), 3),
    Line("cuda", 80, 512, 10, 4, Config(512), 8),
    Line("cuda", 80, ANY, 5, 4, Config(1024), 16, "H200, 2026-11-27: 97 us (2 rows)"),
    Line("cuda", 80, ANY, 10, 4, Config(512), 8),
    Line("cuda", 80, ANY, 24, 4, Config(256), 3),
    Line("cuda", 80, ANY, 5, 8, Config(512), 32),
    Line("cuda", 80, ANY, 24, 8, Config(256), 6),
)
TILES = {"triton": 4, "cuda": 8}  # a multiprocessor has at least, or they get smaller


def choose(
    backend: str, student: Tensor, rows: int, run: Callable[[Config], Any] | None = None
) -> Config:
    """The configuration for student [V, B, K] and so many teacher rows.

    run(config) launches a forward and a backward pass, where they may be timed.
    """
    capability, processors = gpu(student.get_device())
    case = Case(capability, processors, *student.shape, rows, student.element_size())
    where = os.environ.get(AUTOTUNE) or "0"
    if where == "0":
        return from_table(backend, case)
    return _tuned(backend, case, where, run if _may_time(student) else None)


@functools.lru_cache(maxsize=16)
def gpu(index: int) -> tuple[int, int]:
    """Capability and multiprocessors of a device; for the CPU (Triton's interpreter) the least."""
    if index < 0:
        return 80, 1
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count


@functools.lru_cache(maxsize=1024)
def from_table(backend: str, case: Case) -> Config:
    """What the table holds for a case, in smaller tiles where few would leave the GPU idle."""
    config = lookup(backend, case).config
    tile, warps = config.columns, config.warps
    while (warps > 1 if warps else tile > 256) and (
        case.images * case.columns < TILES[backend] * case.processors * tile
    ):
        tile, warps = tile // 2, warps // 2
    return Config(tile, warps, config.stages)


def lookup(backend: str, case: Case) -> Line:
    """The table's line for a case. A capability that has none takes those of the nearest one below,
    or, below all, of the lowest."""
    known = [line.capability for line in TABLE if line.backend == backend]
    capability = max((c for c in known if c <= case.capability), default=min(known))
    for line in TABLE:
        if (line.backend, line.capability) == (backend, capability) and all(
            have <= most for have, most in zip(case[-3:], line[2:5], strict=True)
        ):
            return line
    raise ValueError(f"no {backend} kernel takes {case}")


def candidates(backend: str, case: Case) -> list[Config]:
    """What is worth timing for a case, the table's own choice first."""
    tile, warps, stages = first = from_table(backend, case)
    if backend == "cuda":  # warps keep at most 48 KiB, registers 1024 columns, 512 in fp64
        size = max(case.bytes, 4)
        tiles = [
            t for t in (1024, 512, 256) if t * size <= 4096 and t * size * case.rows <= 48 << 10
        ]
        return [first, *(Config(t) for t in tiles if t != tile)]
    found = [(tile // 2, warps, stages), (tile * 2, warps * 2, stages), (tile * 2, warps, stages)]
    found += [(tile, warps, s) for s in (2, 3, 5) if s != stages]
    if warps > 1:
        found.append((tile // 2, warps // 2, stages))
    return [first, *(Config(*c) for c in found if c[0] >= 32 * c[1])]


_found: dict[str, Config] = {}  # what was timed, or read from the file


def _tuned(backend: str, case: Case, where: str, run: Callable[[Config], Any] | None) -> Config:
    name = f"{backend} {' '.join(f'{k}={v}' for k, v in case._asdict().items())}"
    if name in _found:
        return _found[name]
    choices = candidates(backend, case)
    file = None if where == "1" else Path(where)
    kept = tuple(_read(file).get(name, ())) if file else ()
    if kept in choices:  # else it is from other kernels
        return _found.setdefault(name, Config(*kept))
    if run is None:
        return choices[0]
    _found[name] = fastest(choices, run)
    if file:
        _write(file, _read(file) | {name: _found[name]})
    return _found[name]


def fastest(choices: list[Config], run: Callable[[Config], Any]) -> Config:
    """The first choice must run; another that cannot (too much shared memory, say) is none."""
    times = {choices[0]: seconds(lambda: run(choices[0]))}
    for config in choices[1:]:
        try:
            times[config] = seconds(lambda c=config: run(c))
        except Exception:
            continue
    return min(times, key=lambda config: times[config])


def seconds(call: Callable[[], Any]) -> float:
    """Of a call on the current stream: the median of 7, after 2 that compile and warm up. The
    device waits for the host, whose launches may take longer than the kernels."""
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def _may_time(student: Tensor) -> bool:
    if not student.is_cuda or not student.numel() or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _read(file: Path) -> dict[str, list[int]]:
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return {str(name): [int(x) for x in config] for name, config in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{AUTOTUNE}={file}: it must be 0, 1 or a JSON file that an earlier run wrote; "
            f"this file cannot be read ({error}): delete it or name another"
        ) from error


def _write(file: Path, found: dict[str, Any]) -> None:
    """In one step: ranks write side by side."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(found, indent=1, sort_keys=True))
    new.replace(file)
