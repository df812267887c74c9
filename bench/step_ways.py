"""What each means of the training step is worth: the step with it against the step without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import Attention

from bench.timing import Medians, interleave
from mokd_fast.nn import MOKD, blocks
from mokd_fast.nn.fast import KINDS, compile_blocks, quicken
from mokd_fast.train import malloc
from mokd_fast.train.graph import WARMUP

if TYPE_CHECKING:
    from bench.step import Steps

Run = Callable[[], Any]
ROUNDS = 2


def ways(steps: Steps) -> dict[str, dict[str, float]]:
    """A means -> seconds of the step with and without it, and their ratio (> 1: it is worth it).

    Each is switched between turns, everything else is as the trainer has it.
    """
    mokd, run = steps.trainer.mokd, steps.ours()
    found = {
        "our operators, not the reference": _row(turns(run, *_operators())),
        "logits not stored": _row(turns(run, *_stored(mokd))),
        "layers as they are fastest": _row(turns(run, *_libraries(steps))),
        "transformer blocks compiled": _compiled(run, mokd),
        "crops of a ViT packed": _row(turns(run, *_packed(mokd))),
    }
    plain = steps.ours(steps.make_trainer(channels_last=False))
    found["channels_last"] = _row(interleave({"with": run, "without": plain}, ROUNDS))
    found["freed memory kept"] = _row(turns(run, *_malloc(run)))
    if steps.device.type == "cuda":
        times = interleave({"with": _recorded(steps), "without": run}, ROUNDS)
        found["the step as a CUDA graph"] = _row(times)
    return found


def _recorded(steps: Steps) -> Run:
    """Our step as a CUDA graph, recorded by now."""
    graphed = steps.ours(steps.make_trainer(cuda_graph=True))
    for _ in range(WARMUP + 1):  # the last of them records it
        graphed()
    return graphed


def turns(run: Run, on: Run, off: Run, usual: Run, rounds: int | None = None) -> Medians:
    """`run` after `on` and after `off`, in turns; what they take does not count. `usual` of the two
    is how the trainer has it."""
    before = {"with": on, "without": off}
    times = interleave({"with": run, "without": run}, rounds or ROUNDS, before=before)
    usual()
    return times


def _row(times: Medians) -> dict[str, float]:
    with_s, without_s = times["with"], times["without"]
    return {"with_s": with_s, "without_s": without_s, "ratio": without_s / with_s}


def _operators() -> tuple[Run, Run, Run]:
    def choose(backend: str) -> Run:
        return lambda: os.environ.update(MOKD_FAST_BACKEND=backend)

    return choose(""), choose("reference"), choose("")


def _stored(mokd: MOKD) -> tuple[Run, Run, Run]:
    def choose(way: str | None) -> Run:
        return lambda: setattr(mokd, "prototype_loss", way)

    return choose("fused-linear"), choose("fused"), choose(None)


def _libraries(steps: Steps) -> tuple[Run, Run, Run]:
    mokd = steps.trainer.mokd
    libraries = {ours: theirs for theirs, ours in (KINDS | blocks.KINDS).items()}

    def on() -> None:
        quicken(mokd, steps.device, steps.precision)

    def off() -> None:
        for module in mokd.modules():
            if plain := libraries.get(type(module)):
                module.__class__ = plain
            if isinstance(module, Attention):
                module.fused_attn = True  # type: ignore[misc]

    return on, off, on


def _compiled(run: Run, mokd: MOKD) -> dict[str, float]:
    compile_blocks(mokd)
    found = [module for module in mokd.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in found]

    def choose(impls: list[Any]) -> None:
        for module, impl in zip(found, impls, strict=True):
            module._compiled_call_impl = impl

    on, off = partial(choose, calls), partial(choose, [None] * len(found))
    on()
    run()
    graphs = _graphs()
    times = turns(run, on, off, off)
    return _row(times) | {"recompiled": _graphs() - graphs}


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _packed(mokd: MOKD) -> tuple[Run, Run, Run]:
    def off() -> None:
        for student in mokd.students:
            student.packed = False  # type: ignore[assignment]

    packed = any(student.packed for student in mokd.students)
    return mokd.pack, off, mokd.pack if packed else off


def _malloc(run: Run) -> tuple[Run, Run, Run]:
    def on() -> None:
        malloc.keep()
        run()  # or this turn would pay for what the one before gave back

    return on, malloc.give_back, malloc.keep
