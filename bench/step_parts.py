"""Where a training step's time goes, by part, and how many multiplications it makes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import bench.baseline.step as official_module
import mokd_fast.train.loop as our_module
from bench.baseline.layers import WeightNormLinear
from bench.baseline.step import OfficialStep
from mokd_fast.train.loop import Trainer

HEADS = "prototypes and losses"  # our operator makes both at once
NETWORKS = ("teachers", "students", "backward of networks")
PREFIX = "part: "


def parts_of(step: Trainer | OfficialStep) -> list[tuple[Any, str, str]]:
    """(object, attribute, part) of what is to be seen apart."""
    if isinstance(step, OfficialStep):
        return [
            *((model, "forward", "students") for model in step.students),
            *((model, "teach", "teachers") for model in step.teachers),
            *(
                (module, name, HEADS)
                for model in (*step.students, *step.teachers)
                for module in model.modules()
                if isinstance(module, WeightNormLinear)
                for name in ("forward", "logits")
                if hasattr(module, name)
            ),
            (step, "_model_losses", HEADS),
            (official_module, "clip_per_tensor_", "clip"),
            *((optimizer, "step", "optimizers") for optimizer in step.optimizers),
            (official_module, "ema_", "EMA"),
        ]
    mokd = step.mokd
    return [
        *((model, "forward", "students") for model in mokd.students),
        (mokd, "_teach", "teachers"),
        (mokd, "_search", "teachers"),
        (mokd, "_rows", HEADS),
        (mokd, "_losses", HEADS),
        (our_module, "clip_grad_per_tensor_", "clip"),
        *((optimizer, "step", "optimizers") for optimizer in step.optimizers),
        (mokd, "update_teachers", "EMA"),
        (mokd.centers, "update", "centres"),
        (mokd.centers, "wait", "centres"),
    ]


def breakdown(run: Callable[[], Any], step: Trainer | OfficialStep) -> dict[str, float]:
    """Seconds of each part of one step, most first. A backward pass is counted with what it is of,
    by the sequence numbers of autograd; "other" is what no part has."""
    with ExitStack() as stack:
        for thing, name, part in parts_of(step):
            stack.enter_context(_seen(thing, name, part))
        with profile(activities=[ProfilerActivity.CPU]) as found, record_function(f"{PREFIX}other"):
            run()
    seconds = _by_part(found.events() or [])
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


@contextmanager
def _seen(thing: Any, name: str, part: str) -> Iterator[None]:
    original = getattr(thing, name)

    @functools.wraps(original)
    def seen(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return original(*args, **kwargs)

    with mock.patch.object(thing, name, seen):
        yield


def _by_part(events: Iterable[Any]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    part_of: dict[int, str] = {}  # of a sequence number in forward
    backward = []
    for event in events:
        is_part = event.name.startswith(PREFIX)
        if event.name.startswith("autograd::engine::evaluate_function"):
            backward.append(event)
        elif event.sequence_nr >= 0 and not is_part:
            part_of.setdefault(event.sequence_nr, _part(event))
        if is_part:
            mine = event.cpu_time_total / 1e6
            seconds[event.name.removeprefix(PREFIX)] += mine
            if event.cpu_parent is not None:
                seconds[_part(event.cpu_parent)] -= mine
    for event in backward:
        of = part_of.get(event.sequence_nr, "students")  # a parameter's own node has no number
        took = event.cpu_time_total / 1e6
        seconds["backward of networks" if of != HEADS else HEADS] += took
        seconds[_part(event)] -= took
    return dict(seconds)


def _part(event: Any) -> str:
    """The innermost part that an event lies in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return "other"


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention in one step."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        run()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * torch.Size(x).numel() * int(weight[0])

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    def joint(q: Any, k: Any, v: Any, *queries: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # the queries' share is 1 / N of it each

    def search(q: Any, k: Any, *_: Any, **__: Any) -> int:
        return 4 * torch.Size(q).numel() * int(k[2])

    return {
        torch.ops.mkldnn._linear_pointwise: linear,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.mokd_fast.joint_forward: joint,
        torch.ops.mokd_fast.search_forward: search,
    }
