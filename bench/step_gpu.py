"""The training step on a GPU: against the official one and the best plain one, where its time goes
on the device, and what each of its means is worth there.

    python bench/step_gpu.py [--batch 64] [--precisions fp16,bf16] [--seconds 240] [--json FILE]

ResNet-50 + ViT-S, K = 65536, 2 x 224 + 8 x 96. All steps of a row run in turns, in one precision;
seconds are of the clock, device and host together. `parts` are spans of the device's time, between
events; their share of the matrix rate is that of a large product in the same run. The gaps are what
no kernel fills of the time from the first kernel of some steps to the last.

A means comes in the order of `means`; what there is no time left for is left out, and named.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

import mokd_fast.train.loop as our_module
from bench.baseline.official import OfficialStep
from bench.step import CASES, DTYPES, Run, Steps
from bench.step_parts import flop_formulas, parts_of
from bench.step_ways import compiled, recorded, turns
from bench.timing import calibrate, interleave, machine, peak_bytes, write_json
from mokd_fast.train.loop import Trainer
from mokd_fast.train.optim import ScheduledOptimizer

CASE, ROUNDS, FEW = "resnet50+vit_small", 9, 4
OTHER = "other"
T = TypeVar("T")


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int) -> tuple[Run, float]:
    """A large product, and its operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def our_parts(trainer: Trainer) -> list[tuple[Any, str, Any]]:
    """As `parts_of`, but each network apart."""
    mokd, names = trainer.mokd, [config.name for config in trainer.recipe.models]
    backward = cycle([f"backward of {name}" for name in names])
    found: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "backward", lambda: next(backward)),
        (mokd, "_search", "searches"),
        (mokd, "_losses", "losses, prototype layers"),
        (mokd, "_rows", "losses, prototype layers"),
        (our_module, "grad_norms", "clip, optimizers, EMA"),
        *((o, "step", "clip, optimizers, EMA") for o in trainer.optimizers),
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


def kernels(run: Run, steps: int = 3) -> dict[str, Any]:
    """The share of the time without a kernel, and where the kernels' time goes."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    spans, by_name = [], defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        begin, end = event.time_range.start, event.time_range.end  # us
        spans.append((begin, end))
        row = by_name[event.name[:120]]
        row[0] += (end - begin) / steps / 1e6
        row[1] += 1 / steps
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
        "most": [[name, *row] for name, row in most[:40]],
    }


def held_bytes(step: Trainer | OfficialStep) -> int:
    """Weights, statistics, centres and optimizer state: what is there between steps."""
    if isinstance(step, OfficialStep):
        modules = [*step.students, *step.teachers, step.centered]
        optimizers = step.optimizers
    else:
        modules, optimizers = [step.mokd], [o.torch for o in step.optimizers]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [
        t for o in optimizers for state in o.state.values() for t in state.values()
        if isinstance(t, torch.Tensor)
    ]  # fmt: skip
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def compare(steps: Steps, rounds: int, size: int) -> dict[str, Any]:
    """The row: ours, the official step and the best plain one, in the same precision."""
    ours = steps.ours()
    product, operations = matrix_rate(DTYPES[steps.precision], steps.device, size)
    runs = {
        "ours": ours,
        "official": steps.plain(steps.official, steps.autocast),
        "best": steps.plain(steps.best, steps.autocast),
    }
    whose = {"ours": steps.trainer, "official": steps.official, "best": steps.best}
    peaks = {}
    for key, run in runs.items():
        begin = time.perf_counter()
        run()
        run()
        print(f"  {key}: first two steps {time.perf_counter() - begin:.1f} s", flush=True)
        peaks[key] = peak_bytes(run)
    times = interleave(runs | {"product": product}, rounds)
    rate = operations / times["product"]
    kind, parts = steps.device.type, our_parts(steps.trainer)
    made = flops_of_parts(ours, parts)
    row: dict[str, Any] = {
        "op": "training step", "backend": "automatic", "dtype": steps.precision, "device": kind,
        "shape": steps.shape, "median_s": times["ours"], "rounds": rounds,
        "turns": times.turns, "matrix_TFLOP_per_s": rate / 1e12, "flops": sum(made.values()),
        "matrix_share": sum(made.values()) / times["ours"] / rate,
    }  # fmt: skip
    for key, name in (("official", "baseline"), ("best", "best_plain")):
        row |= {f"{name}_s": times[key], f"{name}_ratio": times[key] / times["ours"]}
    for key, step in whose.items():
        row |= {f"{key}_peak_bytes": peaks[key], f"{key}_held_bytes": held_bytes(step)}
    seconds = seconds_of_parts(ours, parts, kind)
    row["parts"] = {
        name: {"s": s, "flops": made.get(name, 0.0), "matrix_share": made.get(name, 0) / s / rate}
        for name, s in seconds.items()
    }
    row["best_parts"] = seconds_of_parts(runs["best"], parts_of(steps.best), kind)
    row["official_parts"] = seconds_of_parts(runs["official"], parts_of(steps.official), kind)
    if kind == "cuda":
        row["device_time"] = {key: kernels(runs[key]) for key in ("ours", "best")}
    return row


def means(steps: Steps) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> the step with it and without it, in turns."""
    trainer, mokd, run = steps.trainer, steps.trainer.mokd, steps.ours()

    def stored(way: str | None) -> Run:
        return lambda: setattr(mokd, "prototype_loss", way)

    def backend(name: str) -> Run:
        return lambda: os.environ.update(MOKD_FAST_BACKEND=name)

    def packed(on: bool) -> None:
        if on:
            mokd.pack()
        for student in mokd.students:
            student.packed = on  # type: ignore[assignment]

    torch_optimizers, apex = trainer.optimizers, []

    def optimizers(of_apex: bool) -> None:
        if of_apex and not apex:
            apex.extend(apex_optimizers(trainer))
        trainer.optimizers = apex if of_apex else torch_optimizers

    def turned(on: Run, off: Run) -> dict[str, float]:
        times = turns(run, on, off, off, FEW)
        return _row(times["with"], times["without"])

    def prototypes() -> dict[str, float]:
        times = turns(run, stored("fused-linear"), stored("fused"), stored(None), FEW)
        return _row(times["with"], times["without"])

    def operators() -> dict[str, float]:
        times = turns(run, backend(""), backend("reference"), backend(""), FEW)
        return _row(times["with"], times["without"])

    def graph() -> dict[str, Any]:
        torch.cuda.empty_cache()  # its memory is its own
        graphed = recorded(steps)
        times = interleave({"with": graphed, "without": run}, FEW)
        return _row(times["with"], times["without"]) | {"device_time": kernels(graphed)}

    return {
        "the step as a CUDA graph": graph,
        "our operators, not the reference": operators,
        "crops of a ViT packed": lambda: turned(partial(packed, True), partial(packed, False)),
        "NVIDIA apex's optimizers": lambda: turned(
            partial(optimizers, True), partial(optimizers, False)
        ),
        "logits not stored": prototypes,
        "transformer blocks compiled": lambda: compiled(run, mokd, FEW),
    }


def apex_optimizers(trainer: Trainer) -> list[ScheduledOptimizer]:
    """NVIDIA's in the place of torch's, for the same networks."""
    made = []
    for config, student in zip(trainer.recipe.models, trainer.mokd.students, strict=True):
        name = f"apex-{config.optimizer.name}"
        other = config.optimizer.model_copy(update={"name": name})
        config = config.model_copy(update={"optimizer": other})
        made.append(
            ScheduledOptimizer(config, student, total=trainer.total, warmup=1, lr_scale=1.0)
        )
    return made


def _row(with_s: float, without_s: float) -> dict[str, Any]:
    return {"with_s": with_s, "without_s": without_s, "ratio": without_s / with_s}


def measure(precision: str, options: argparse.Namespace, until: float) -> Iterable[dict[str, Any]]:
    """The row, again after each means."""
    base, _, _ = CASES[CASE]
    case = (base, [f"train.batch={options.batch}", *options.set], ROUNDS)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(CASES, {CASE: case}):
        steps = Steps(CASE, precision, Path(folder), pictures=2 * options.batch)
        row = compare(steps, options.rounds, options.size)
        say(row)
        yield row
        row |= {"means": {}, "failed": {}}
        del steps.official, steps.best
        for name, run in means(steps).items():
            if name not in options.means and options.means != ["all"]:
                continue
            if time.perf_counter() > until:
                row["failed"][name] = "no time left"
                continue
            begin = time.perf_counter()
            try:
                row["means"][name] = run()
                text = "{with_s:.4f} s with, {without_s:.4f} s without".format(**row["means"][name])
            except Exception as error:  # the others still get their turns
                row["failed"][name] = text = f"{type(error).__name__}: {error}"[:500]
            print(f"  {name}: {text} ({time.perf_counter() - begin:.0f} s)", flush=True)
            yield row


def say(row: dict[str, Any]) -> None:
    print(f"{row['shape']}, {row['dtype']}: {row['median_s'] * 1e3:.1f} ms; official "
          f"{row['baseline_s'] * 1e3:.1f} ms, {row['baseline_ratio']:.2f}x; best plain "
          f"{row['best_plain_s'] * 1e3:.1f} ms, {row['best_plain_ratio']:.2f}x; "
          f"{row['matrix_share']:.1%} of {row['matrix_TFLOP_per_s']:.0f} TFLOP/s")  # fmt: skip
    for key in ("ours", "official", "best"):
        peak, held = row[f"{key}_peak_bytes"], row[f"{key}_held_bytes"]
        print(f"  {key}: peak {peak / 2**30:.2f} GiB beyond {held / 2**30:.2f} GiB that last")
    for name, part in row["parts"].items():
        print(f"  {name}: {part['s'] * 1e3:.1f} ms, {part['matrix_share']:.0%}")
    for whose in ("best", "official"):
        print(f"  {whose}: " + ", ".join(
            f"{name} {s * 1e3:.1f}" for name, s in row[f"{whose}_parts"].items()))  # fmt: skip
    for key, found in row.get("device_time", {}).items():
        print(f"  {key}: gaps {found['gaps']:.1%}, {found['kernels']:.0f} kernels a step, busy "
              f"{found['busy_s'] * 1e3:.1f} ms", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precisions", default="fp16,bf16", type=lambda x: x.split(","))
    parser.add_argument("--means", default=["all"], type=lambda x: x.split(";"), help="by ;")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", type=int, default=8192, help="of the product for the rate")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    until = time.perf_counter() + options.seconds
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate(), "rows": []}
    print(result["machine"], result["calibration"], sep="\n")
    failed: dict[str, str] = {}
    for precision in options.precisions:
        if time.perf_counter() > until:
            failed[precision] = "no time left"
            continue
        rows = result["rows"]
        result["rows"] = [*rows, None]
        for row in measure(precision, options, until):
            result["rows"][-1] = row
            if options.json:
                write_json(options.json, result)
        failed |= result["rows"][-1].get("failed", {})
        torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
