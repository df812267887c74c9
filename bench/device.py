"""Timing on a GPU: events around work that is queued in turns, inputs that no cache still holds.

On the CPU, where the tests run it, the same calls are timed by the clock and nothing is captured.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
# Cycles that a device waits so that the host gets ahead of it: 0.1 ms; and where that is given up.
AHEAD, MOST = 200_000, 200_000_000


def rotations(bytes_a_call: int, device: str) -> int:
    """How many sets of inputs it takes until a set has left the last-level cache again."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // bytes_a_call))


def turn(runs: Sequence[Run]) -> Run:
    """All of `runs` in a row."""

    def run() -> None:
        for one in runs:
            one()

    return run


def captured(run: Run, device: str) -> Run:
    """`run` as a CUDA graph: its kernels without Python and launches between them."""
    if device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph asks for
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def medians(
    runs: Mapping[str, Run], rounds: int, device: str, ahead: bool = False
) -> dict[str, float]:
    """Median seconds of each over `rounds` rounds, turn by turn, after one that is not counted.

    Args:
        ahead: for graphs and single kernels. The device is kept waiting until all is queued: what
            is counted is its work. Without it the time counts, too, in which an idle device waits
            for the host: about 10 us of a first launch, and all that Python takes longer than the
            kernels. That is what a call from Python takes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, device, ahead))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _seconds(run: Run, device: str, ahead: bool) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = AHEAD if ahead else 0
    while True:
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        late = start.query()  # the device had nothing more to wait for
        end.synchronize()
        if not cycles or not late or cycles >= MOST:
            return start.elapsed_time(end) / 1e3
        cycles *= 10


def copy(device: str, numbers: int = 1 << 27) -> tuple[Run, int]:
    """A copy beyond any cache, and the bytes it moves: read and written."""
    x = torch.ones(numbers, device=device)
    y = torch.zeros(numbers, device=device)
    return lambda: y.copy_(x), 2 * 4 * numbers
