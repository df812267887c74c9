"""Where a step's time goes on a device: spans between events, operations, and its kernels."""

import json
import re
import tempfile
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import mokd_fast.train.loop as our_module
from bench.step import Run
from bench.step_parts import flop_formulas
from mokd_fast.train.loop import Trainer

OPTIMIZERS, OTHER = "clip, optimizers, EMA", "other"
BORDER = "border "  # and a number: in a profiler's trace
LAUNCHES, LAUNCHED = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = {  # of a kernel, by its name: the first that fits
    "compiled": "^triton_",  # whatever is fused in it
    "ours": "mokd::|^_[a-z_]+$",  # CUDA C++; Triton has the names of functions
    "attention": "sdpa|fmha|flash",
    "batch norm": "batch_?norm|::bn_",
    "optimizers, EMA, clip": "multi_tensor_apply",
    # cuBLAS has xmma kernels too; what else cuDNN has changes layouts for its own.
    "convolution": "implicit_gemm|[dw]grad|fprop|convol|conv_|conv2d|cudnn",
    "products": "nvjet|gemm|gemv|cutlass|cublas|splitK",
    "copies": "Memcpy|Memset|[Cc]opy|FillFunctor",
    "other elementwise and reductions": "",
}
T = TypeVar("T")


def our_parts(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """As `parts_of`, but each network apart."""
    mokd, names = trainer.mokd, [config.name for config in trainer.recipe.models]
    backward = cycle([f"backward of {name}" for name in names])
    found: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "backward", lambda: next(backward)),
        (mokd, "_search", "searches"),
        (mokd, "_losses", "losses, prototype layers"),
        (mokd, "_rows", "losses, prototype layers"),
        (our_module, "grad_norms", OPTIMIZERS),
        *((o, "step", OPTIMIZERS) for o in trainer.optimizers),
        (mokd.centers, "update", "centres"),
        (mokd.centers, "wait", "centres"),
    ]
    for i, name in enumerate(names):
        found += [(mokd.students[i], "forward", f"student {name}")]
        found += [(mokd.teachers[i], "forward", f"teacher {name}")]
    return found


def borders(
    run: Run, parts: Iterable[tuple[Any, str, Any]], read: Callable[[], T]
) -> list[tuple[str, T]]:
    """What `read` says wherever another part begins, with its name; in the end once more."""
    inside, found = [OTHER], [(OTHER, read())]

    def watched(original: Callable[..., Any], label: Any) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            inside.append(label() if callable(label) else label)
            found.append((inside[-1], read()))
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()
                found.append((inside[-1], read()))

        return seen

    with ExitStack() as stack:
        for thing, name, label in parts:
            seen = watched(getattr(thing, name), label)
            stack.enter_context(mock.patch.object(thing, name, seen))
        run()
    return [*found, ("", read())]


def apart(found: list[tuple[str, T]], difference: Callable[[T, T], float]) -> dict[str, float]:
    """Of each part, the sum of what lies between its borders; most first."""
    total: dict[str, float] = defaultdict(float)
    for (name, begin), (_, end) in pairwise(found):
        total[name] += difference(begin, end)
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))


def seconds_of_parts(run: Run, parts: list[tuple[Any, str, Any]], device: str) -> dict[str, float]:
    if device == "cpu":
        found = borders(run, parts, time.perf_counter)
        return apart(found, lambda begin, end: end - begin)

    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    torch.cuda.synchronize()
    marks = borders(run, parts, event)
    torch.cuda.synchronize()
    return apart(marks, lambda begin, end: begin.elapsed_time(end) / 1e3)


def flops_of_parts(run: Run, parts: list[tuple[Any, str, Any]]) -> dict[str, float]:
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with counter:
        found = borders(run, parts, counter.get_total_flops)
    return apart(found, lambda begin, end: float(end - begin))


def kernel_seconds_of_parts(run: Run, parts: list[tuple[Any, str, Any]]) -> dict[str, float]:
    """Of a GPU: a part's kernels are those launched between its borders, by whichever thread; how
    long the device waits for the host does not count."""
    numbers = count()

    def mark() -> str:
        name = f"{BORDER}{next(numbers)}"
        with record_function(name):
            return name

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        found = borders(run, parts, mark)
        torch.cuda.synchronize()
    return kernels_between(found, _trace(profiler))


def _trace(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def kernels_between(found: list[tuple[str, str]], trace: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the kernels of each part, by when they were launched; most first.

    A border is in the trace once more, as a "gpu_user_annotation" by the device's time: the host's
    counts. All times are us of one clock."""
    at = {event["name"]: event["ts"] for event in trace if event.get("cat") == "user_annotation"}
    begins = [at[mark] for _, mark in found[:-1]]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in trace
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    total: dict[str, float] = defaultdict(float)
    last: dict[Any, float] = {}  # of a stream, when its kernel so far was launched
    ran = [event for event in trace if event.get("cat") in LAUNCHED]
    for event in sorted(ran, key=lambda event: event["ts"]):
        # Of the driver's calls the profiler sees cuLaunchKernel and cuLaunchKernelEx alone. What
        # another one has launched (cuMemsetD8Async) came after what runs before it in its stream.
        stream = event["args"].get("device"), event["args"].get("stream")
        before = last.get(stream, begins[0])
        last[stream] = launched.get(event["args"].get("correlation"), before)
        total[found[max(bisect(begins, last[stream]) - 1, 0)][0]] += event["dur"] / 1e6
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def kernels(run: Run, steps: int = 3) -> dict[str, Any]:
    """The share of the time without a kernel, and where the kernels' time goes: by kind, and the
    names that take most."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    spans, by_name, kinds = [], defaultdict(lambda: [0.0, 0]), defaultdict(float)
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        begin, end = event.time_range.start, event.time_range.end  # us
        spans.append((begin, end))
        row = by_name[event.name[:120]]
        row[0] += (end - begin) / steps / 1e6
        row[1] += 1 / steps
        kinds[kind_of(event.name)] += (end - begin) / steps / 1e6
    spans.sort()
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    most = sorted(by_name.items(), key=lambda pair: -pair[1][0])
    return {
        "gaps": 1 - busy / (until - spans[0][0]),
        "busy_s": busy / steps / 1e6,
        "kernels": sum(count for _, count in by_name.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "most": [[name, *row] for name, row in most[:40]],
    }
