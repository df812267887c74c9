"""What watching over a run costs: steps of the demo with the flag for what is not finite and the
collapse diagnostics, against steps without.

    python bench/watch.py [--quick] [--json FILE]

One trainer goes on learning, for ten steps (a logging interval, so that the diagnostics come as
often as in a run) with, for twenty without and for ten with. The ratio of such four blocks is one
sample; the interval is a bootstrap over the samples. The pictures are loaded beforehand, since the
demo loads them in a process of its own.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

from bench.timing import calibrate, machine, write_json
from mokd_fast.data.loader import Views
from mokd_fast.nn import Temperatures
from mokd_fast.ops import clip_grad_per_tensor_
from mokd_fast.train.loop import Trainer
from mokd_fast.train.meter import Meter
from mokd_fast.train.recipe import load_recipe

ROUNDS = 60  # of four blocks
BATCHES = 16  # loaded beforehand, and given again and again


def watched(trainer: Trainer, k: int, batches: Iterator[Views]) -> None:
    """The logging interval from step k on, as `train.fit` has it, without the files."""
    meter = Meter(batches)
    for done in range(k + 1, k + 1 + trainer.recipe.train.log_every):
        meter.add(done, trainer.step(done - 1, meter))
    trainer.alarms.see({"step": done, **meter.read(trainer.recipe.train.max_skipped)})


def bare(trainer: Trainer, k: int, batches: Iterator[Views]) -> None:
    """The same with neither flag nor diagnostics: the losses are summed and read."""
    values = [bare_step(trainer, n, batches) for n in range(k, k + trainer.recipe.train.log_every)]
    torch.stack(values).sum(dim=0).tolist()


def bare_step(trainer: Trainer, k: int, batches: Iterator[Views]) -> Tensor:
    """`Trainer.step` of a recipe like the demo's (fp32, one micro-batch, no layer frozen), where
    nothing looks at whether the numbers are finite. Returns the losses."""
    taus = [Temperatures(*(float(t[k]) for t in rows)) for rows in trainer.temperatures]
    out = trainer.mokd(*trainer.to_device(next(batches)), taus)
    torch.stack(out.totals).sum().backward()
    values = torch.stack([*out.terms.values(), *(total.detach() for total in out.totals)])
    means = out.center_means
    del out
    for config, student in zip(trainer.recipe.models, trainer.mokd.students, strict=True):
        clip_grad_per_tensor_(student.parameters(), config.clip or math.inf)
    for optimizer in trainer.optimizers:
        optimizer.torch.found_inf = None  # type: ignore[attr-defined]
        optimizer.schedule(k)
        optimizer.torch.step()
        optimizer.torch.zero_grad(set_to_none=True)
    trainer.mokd.update_teachers(float(trainer.momentum[k]))
    trainer.mokd.centers.update(means)
    return values


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a step with and without, and the ratio with its 95 % interval."""
    every = 10
    overrides = [f"train.log_every={every}", f"train.duration={4 * every * (rounds + 1)}it"]
    overrides += ["data.workers=0", "train.checkpoint_every=100%"]
    trainer = Trainer(load_recipe("fashion-mnist", overrides), folder, Console(quiet=True))
    trainer.mokd.train()
    loader = trainer.loader.batches()
    batches = itertools.cycle([next(loader) for _ in range(BATCHES)])
    seconds = []  # [rounds, 4]
    starts = iter(range(0, trainer.total, every))
    for _ in range(rounds + 1):
        times = []
        for block in (watched, bare, bare, watched):
            begin = time.perf_counter()
            block(trainer, next(starts), batches)
            times.append(time.perf_counter() - begin)
        seconds.append(times)
    turns = np.array(seconds[1:]) / every  # the first round allocates
    ratios = (turns[:, 0] + turns[:, 3]) / (turns[:, 1] + turns[:, 2])
    low, high = interval(ratios)
    return {
        "rounds": rounds,
        "steps_per_block": every,
        "watched_s": float(np.median(turns[:, [0, 3]])),
        "bare_s": float(np.median(turns[:, [1, 2]])),
        "ratio": float(np.median(ratios)),
        "ratio_95": [low, high],
        "ratios": ratios.tolist(),
    }


def interval(samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of their median, by bootstrap."""
    rng = np.random.Generator(np.random.Philox(0))
    drawn = rng.choice(np.asarray(samples), size=(10000, len(samples)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "calibration": calibrate()}
    with tempfile.TemporaryDirectory() as folder:
        result |= measure(Path(folder), 5 if options.quick else ROUNDS)
    low, high = result["ratio_95"]
    print(
        f"{result['watched_s'] * 1e3:.1f} ms a step, {result['bare_s'] * 1e3:.1f} ms without flag "
        f"and diagnostics: {result['ratio'] - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})"
    )
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
