"""What watching over a run costs: steps of the demo with the flag for what is not finite and the
collapse diagnostics, against steps without.

    python bench/watch.py [--quick] [--json FILE]

One trainer takes every step twice, with and without, in turns of changing order, so that a change
of the machine's speed meets both. A step in which the system interrupted this process does not
count, nor does its twin. What a step takes more is a median, of the plain steps and of the one in
ten that is logged, weighted as they come; its 95 % interval is a bootstrap over the logging
intervals. The pictures are loaded beforehand, as the demo loads them in a process of its own.
"""

import argparse
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.timing import calibrate, machine, write_json
from mokd_fast.data.batches import Views
from mokd_fast.nn import Temperatures
from mokd_fast.ops import Clip, grad_norms, update_
from mokd_fast.train.loop import Trainer
from mokd_fast.train.meter import Meter
from mokd_fast.train.recipe import load_recipe

EVERY = 10  # steps of an interval, as in the demo
INTERVALS = 100
BATCHES = 16  # loaded beforehand, and given again and again


def watched(trainer: Trainer, batches: Iterator[Views]) -> Iterator[None]:
    """The steps as `train.fit` has them, without the files."""
    meter = Meter(batches)
    for done in range(1, trainer.total + 1):
        meter.add(done, trainer.step(done - 1, meter))
        if trainer.is_logged(done):
            trainer.alarms.see({"step": done, **meter.read(trainer.recipe.train.max_skipped)})
        yield


def bare(trainer: Trainer, batches: Iterator[Views]) -> Iterator[None]:
    """The same with neither flag nor diagnostics: the losses are summed and read."""
    values = []
    for done in range(1, trainer.total + 1):
        values.append(bare_step(trainer, done - 1, batches))
        if trainer.is_logged(done):
            torch.stack(values).sum(dim=0).tolist()
            values.clear()
        yield


def bare_step(trainer: Trainer, k: int, batches: Iterator[Views]) -> Tensor:
    """`Trainer.step` of a recipe like the demo's (fp32, one micro-batch, no layer frozen), where
    nothing looks at whether the numbers are finite. Returns the losses."""
    taus = [Temperatures(*(float(t[k]) for t in rows)) for rows in trainer.temperatures]
    out = trainer.mokd(*trainer.to_device(next(batches)), taus)
    torch.stack(out.totals).sum().backward()
    values = torch.stack([*out.terms.values(), *(total.detach() for total in out.totals)])
    means = out.center_means
    del out
    models = zip(trainer.recipe.models, trainer.optimizers, trainer.emas, strict=True)
    for config, optimizer, ema in models:
        clip = Clip(grad_norms(ema.student), config.clip) if config.clip else None
        optimizer.schedule(k)
        update_(optimizer.torch, clip, ema._replace(momentum=float(trainer.momentum[k])))
        optimizer.torch.zero_grad(set_to_none=True)
    trainer.mokd.centers.update(means)
    return values


def measure(folder: Path, intervals: int) -> dict[str, Any]:
    """Seconds of a step with and without, and the share that watching adds to it."""
    overrides = [f"train.duration={EVERY * (intervals + 1)}it", f"train.log_every={EVERY}"]
    overrides += ["data.workers=0", "train.checkpoint_every=100%"]
    trainer = Trainer(load_recipe("fashion-mnist", overrides), folder, Console(quiet=True))
    trainer.mokd.train()
    loader = trainer.loader.batches()
    batches = itertools.cycle([next(loader) for _ in range(BATCHES)])
    runs = [watched(trainer, batches), bare(trainer, batches)]
    seconds = np.empty((trainer.total, 2))
    for n in range(trainer.total):
        before = interruptions()
        for i in (0, 1) if n % 2 else (1, 0):
            begin = time.perf_counter()
            next(runs[i])
            seconds[n, i] = time.perf_counter() - begin
        if interruptions() > before:
            seconds[n] = np.nan
    found = seconds.reshape(intervals + 1, EVERY, 2)[1:]  # the first interval allocates
    rng = np.random.Generator(np.random.Philox(0))
    drawn = [share(found[rng.integers(intervals, size=intervals)]) for _ in range(2000)]
    return {
        "intervals": intervals,
        "steps_per_interval": EVERY,
        "counted": float(np.isfinite(found[..., 0]).mean()),
        "watched_s": float(np.nanmedian(found[..., 0])),
        "bare_s": float(np.nanmedian(found[..., 1])),
        "plain_more_s": more(found[:, :-1]),
        "logged_more_s": more(found[:, -1:]),
        "share": share(found),
        "share_95": np.quantile(drawn, [0.025, 0.975]).tolist(),
    }


def interruptions() -> int:
    """How often the system took the processor from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def more(seconds: np.ndarray) -> float:
    """[intervals, steps, 2], watched and bare; NaN does not count."""
    return float(np.nanmedian(seconds[..., 0] - seconds[..., 1]))


def share(seconds: np.ndarray) -> float:
    """What the watched steps take more, of a bare step; the last step of an interval is logged."""
    steps = seconds.shape[1]
    extra = (steps - 1) * more(seconds[:, :-1]) + more(seconds[:, -1:])
    return float(extra / steps / np.nanmedian(seconds[..., 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate()}
    with tempfile.TemporaryDirectory() as folder:
        result |= measure(Path(folder), 20 if options.quick else INTERVALS)
    low, high = result["share_95"]
    print(
        f"{result['watched_s'] * 1e3:.1f} ms a step, {result['bare_s'] * 1e3:.1f} ms without flag "
        f"and diagnostics: {result['share']:+.2%} ({low:+.2%} to {high:+.2%})"
    )
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
