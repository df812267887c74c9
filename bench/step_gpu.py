"""The training step on a GPU: against the official one and the best plain one, where its time goes
on the device, and what each of its means is worth there.

    python bench/step_gpu.py [--quick] [--batch 64] [--precisions fp16,bf16] [--seconds 240]
        [--set train.compile=true ...] [--json FILE]

ResNet-50 + ViT-S, K = 65536, 2 x 224 + 8 x 96. Ours runs with all that a GPU gains by (FAST, or
what --set says). All steps of a row run in turns, in one precision; seconds are of the clock,
device and host together. `parts` are those of our step with the same switches but a recording,
which nobody can split (so BatchNorm is PyTorch's in them): spans of the device's time, between
events, which wait for the host, and the time of their kernels alone, by which their share of the
matrix rate is (that of a large product in the same run). Operations are counted in our step with no
switch, which makes the same products: compiled blocks run under no counter. The gaps are what no
kernel fills of the time from the first kernel of some steps to the last.

A means comes in the order of `means`; what there is no time left for is left out, and named.
--quick takes few rounds and no means; --full, with which `mokd-fast bench` may call it, changes
nothing.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.baseline.official import OfficialStep
from bench.device_parts import (
    OPTIMIZERS,
    flops_of_parts,
    kernel_seconds_of_parts,
    kernels,
    our_parts,
    seconds_of_parts,
)
from bench.step import CASES, DTYPES, Run, Steps
from bench.step_parts import parts_of
from bench.step_ways import turns
from bench.timing import calibrate, interleave, machine, peak_bytes, write_json
from mokd_fast.ops.dispatch import ENVIRONMENT
from mokd_fast.train.graph import WARMUP
from mokd_fast.train.loop import Trainer
from mokd_fast.train.optim import ScheduledOptimizer

CASE, ROUNDS, FEW = "resnet50+vit_small", 9, 4
FAST = ["train.compile=true", "train.cuda_graph=true", "train.pack_crops=true"]


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int) -> tuple[Run, float]:
    """A large product, and its operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


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


def unrecorded(steps: Steps) -> Trainer:
    """Ours, with kernels that are launched one by one."""
    return steps.make_trainer(cuda_graph=False) if steps.trainer.graph else steps.trainer


def compare(steps: Steps, eager: Trainer, rounds: int, size: int) -> dict[str, Any]:
    """The row: ours, ours with no switch, the official step and the best plain one, in the
    same precision."""
    product, operations = matrix_rate(DTYPES[steps.precision], steps.device, size)
    runs = {
        "ours": steps.ours(),
        "eager": steps.ours(eager),
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
        peaks[key] = peak_bytes(run)  # before anything is recorded
    times = interleave(runs | {"product": product}, rounds)
    rate = operations / times["product"]
    kind, made = steps.device.type, flops_of_parts(runs["eager"], our_parts(eager))
    row: dict[str, Any] = {
        "op": "training step", "backend": "automatic", "dtype": steps.precision, "device": kind,
        "shape": steps.shape, "median_s": times["ours"], "eager_s": times["eager"],
        "rounds": rounds, "turns": times.turns, "matrix_TFLOP_per_s": rate / 1e12,
        "flops": sum(made.values()), "matrix_share": sum(made.values()) / times["ours"] / rate,
        "baseline": "official", "ratio": times["official"] / times["ours"],
    }  # fmt: skip
    for key, name in (("official", "baseline"), ("best", "best_plain")):
        row |= {f"{name}_s": times[key], f"{name}_ratio": times[key] / times["ours"]}
    row["eager_peak_bytes"] = peaks["eager"]
    for key, step in whose.items():
        row |= {f"{key}_peak_bytes": peaks[key], f"{key}_held_bytes": held_bytes(step)}
    trainer = unrecorded(steps)
    split, parts = steps.ours(trainer), our_parts(trainer)
    split()  # a new one has optimizer state to make
    split()
    seconds = seconds_of_parts(split, parts, kind)
    busy = kernel_seconds_of_parts(split, parts) if kind == "cuda" else seconds
    row["parts"] = {
        name: {
            "s": s,
            "kernels_s": busy.get(name, 0.0),
            "flops": made.get(name, 0.0),
            "matrix_share": made.get(name, 0.0) / (busy.get(name) or s) / rate,
        }
        for name, s in seconds.items()
    }
    row["best_parts"] = seconds_of_parts(runs["best"], parts_of(steps.best), kind)
    row["official_parts"] = seconds_of_parts(runs["official"], parts_of(steps.official), kind)
    if kind == "cuda":
        row["device_time"] = {key: kernels(runs[key]) for key in ("ours", "eager", "best")}
    return row


def means(steps: Steps, eager: Trainer) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> our step with it and without it, in turns."""

    def without(backend: str = "", **train: Any) -> Callable[[], dict[str, Any]]:
        def choose(name: str) -> Run:
            return lambda: os.environ.update({ENVIRONMENT: name})

        def measured() -> dict[str, Any]:
            torch.cuda.empty_cache()  # a recording has memory of its own
            with mock.patch.dict(os.environ, {ENVIRONMENT: backend}):
                other = steps.make_trainer(**train)
                runs = {"with": steps.ours(), "without": steps.ours(other)}
                for _ in range(WARMUP + 2 if other.graph else 2):
                    runs["without"]()
                before = {"with": choose(""), "without": choose(backend)}
                return _row(interleave(runs, FEW, before=before))

        return measured

    def stored() -> dict[str, Any]:
        run, mokd = steps.ours(eager), eager.mokd

        def choose(way: str | None) -> Run:
            return lambda: setattr(mokd, "prototype_loss", way)

        return _row(turns(run, choose("fused"), choose("fused-linear"), choose(None), FEW))

    def apex() -> dict[str, Any]:
        """Of the part that they are, since a graph cannot have them."""
        run, ours, seconds = steps.ours(eager), eager.optimizers, defaultdict(list)
        theirs = apex_optimizers(eager)
        try:
            for _ in range(FEW + 1):  # the first makes their state
                for key, chosen in (("with", theirs), ("without", ours)):
                    eager.optimizers = chosen
                    found = seconds_of_parts(run, our_parts(eager), steps.device.type)
                    seconds[key].append(found[OPTIMIZERS])
        finally:
            eager.optimizers = ours
        return _row({key: statistics.median(found[1:]) for key, found in seconds.items()})

    return {
        "the step as a CUDA graph": without(cuda_graph=False),
        "transformer blocks compiled": without(compile=False),
        "crops of a ViT packed": without(pack_crops=False),
        # log_every: it needs something that makes it another run.
        "our operators, not the reference": without("reference", log_every=1000),
        "logits stored": stored,
        "NVIDIA apex's optimizers": apex,
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


def _row(times: Mapping[str, float]) -> dict[str, Any]:
    with_s, without_s = times["with"], times["without"]
    return {"with_s": with_s, "without_s": without_s, "ratio": without_s / with_s}


def measure(precision: str, options: argparse.Namespace, until: float) -> Iterable[dict[str, Any]]:
    """The row, again after each means."""
    base, _, _ = CASES[CASE]
    case = (base, [f"train.batch={options.batch}", *options.set], ROUNDS)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(CASES, {CASE: case}):
        steps = Steps(CASE, precision, Path(folder), pictures=2 * options.batch)
        eager = steps.make_trainer(compile=False, cuda_graph=False, pack_crops="auto")
        row = {"commit": machine()["commit"], "set": options.set}
        row |= compare(steps, eager, options.rounds, options.size)
        say(row)
        yield row
        row |= {"means": {}, "failed": {}}
        del steps.official, steps.best
        for name, run in means(steps, eager).items():
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
        yield row


def say(row: dict[str, Any]) -> None:
    print(f"{row['shape']}, {row['dtype']}: {row['median_s'] * 1e3:.1f} ms, unrecorded, uncompiled "
          f"{row['eager_s'] * 1e3:.1f} ms; official "
          f"{row['baseline_s'] * 1e3:.1f} ms, {row['baseline_ratio']:.2f}x; best plain "
          f"{row['best_plain_s'] * 1e3:.1f} ms, {row['best_plain_ratio']:.2f}x; "
          f"{row['matrix_share']:.1%} of {row['matrix_TFLOP_per_s']:.0f} TFLOP/s")  # fmt: skip
    for key in ("ours", "official", "best"):
        peak, held = row[f"{key}_peak_bytes"], row[f"{key}_held_bytes"]
        print(f"  {key}: peak {peak / 2**30:.2f} GiB beyond {held / 2**30:.2f} GiB that last")
    for name, part in row["parts"].items():
        print(f"  {name}: {part['s'] * 1e3:.1f} ms, its kernels {part['kernels_s'] * 1e3:.1f} ms, "
              f"{part['matrix_share']:.0%}")  # fmt: skip
    for whose in ("best", "official"):
        print(f"  {whose}: " + ", ".join(
            f"{name} {s * 1e3:.1f}" for name, s in row[f"{whose}_parts"].items()))  # fmt: skip
    for key, found in row.get("device_time", {}).items():
        print(f"  {key}: gaps {found['gaps']:.1%}, {found['kernels']:.0f} kernels a step, busy "
              f"{found['busy_s'] * 1e3:.1f} ms: " + ", ".join(
                  f"{kind} {s * 1e3:.1f}" for kind, s in found["kinds"].items()
              ), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precisions", default="fp16,bf16", type=lambda x: x.split(","))
    parser.add_argument("--means", default=["all"], type=lambda x: x.split(";"), help="by ;")
    parser.add_argument("--set", nargs="*", default=FAST, help="overrides of the recipe")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", type=int, default=8192, help="of the product for the rate")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.means = FEW, []
    until = time.perf_counter() + options.seconds
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {
        "machine": machine(), "calibration": calibrate(), "rows": [], "failed": {}
    }  # fmt: skip
    print(result["machine"], result["calibration"], sep="\n")
    for precision in options.precisions:
        if time.perf_counter() > until:
            result["failed"][precision] = "no time left"
            continue
        rows = list(result["rows"])
        try:
            for row in measure(precision, options, until):
                result["rows"] = [*rows, row]
                if options.json:
                    write_json(options.json, result)
        except Exception as error:  # the other precisions still get theirs
            result["failed"][precision] = f"{type(error).__name__}: {error}"[:500]
            print(traceback.format_exc(), flush=True)
        torch.cuda.empty_cache()
    if options.json:
        write_json(options.json, result)
    print(*(f"{key}: {text}" for key, text in result["failed"].items()), sep="\n")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
