"""Where a training step's time goes, by part, and how many multiplications it makes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import bench.baseline.step as official_module
import mokd_fast.ops.update as update_module
import mokd_fast.train.loop as our_module
from bench.baseline.layers import WeightNormLinear
from bench.baseline.step import OfficialStep
from mokd_fast.nn import Prototypes
from mokd_fast.ops import cpu
from mokd_fast.train.loop import Trainer

PROTOTYPES, LOSSES, BACKWARD = "prototype layers", "losses", "backward of networks"
NETWORKS = ("teachers", "students", BACKWARD)
# Products and weight norms, wherever they are in a loss, are its prototype layer's.
PRODUCTS = {
    *(f"aten::{name}" for name in ("linear", "mm", "addmm", "matmul", "_weight_norm")),
    "aten::_weight_norm_interface_backward",
    "mkldnn::_linear_pointwise",
    *("weight_norm", "weight_normBackward", "prototype_linearBackward"),
}
PREFIX, WHOLE = "part: ", "part: other"
NODE = "autograd::engine::evaluate_function"
WARM = 3  # steps seen before: what the profiler keeps takes up memory that a step had
SEEN = 3  # whose mean counts


def parts_of(step: Trainer | OfficialStep) -> list[tuple[Any, str, str]]:
    """(object, attribute, part) of what is to be seen apart."""
    # What autograd does between its nodes too, most of which are the networks'.
    backward = (torch.Tensor, "backward", BACKWARD)
    if isinstance(step, OfficialStep):
        return [
            backward,
            *((model, "forward", "students") for model in step.students),
            *((model, "teach", "teachers") for model in step.teachers),
            *(
                (module, name, PROTOTYPES)
                for model in (*step.students, *step.teachers)
                for module in model.modules()
                if isinstance(module, WeightNormLinear)
                for name in ("forward", "logits")
                if hasattr(module, name)
            ),
            (step, "_model_losses", LOSSES),
            (official_module, "clip_per_tensor_", "clip"),
            *((optimizer, "step", "optimizers") for optimizer in step.optimizers),
            (official_module, "ema_", "EMA"),
        ]
    mokd = step.mokd
    return [
        backward,
        *((model, "forward", "students") for model in mokd.students),
        (mokd, "_teach", "teachers"),
        (mokd, "_search", "teachers"),
        *((m, "matrix", PROTOTYPES) for m in mokd.modules() if isinstance(m, Prototypes)),
        (mokd, "_rows", PROTOTYPES),
        # Forward; without a gradient they are no events of a profile.
        *((cpu, name, PROTOTYPES) for name in ("prototype_linear", "normed_linear")),
        (mokd, "_losses", LOSSES),
        (our_module, "grad_norms", "clip"),
        (update_module.Clip, "apply", "clip"),
        *((optimizer, "step", "optimizers") for optimizer in step.optimizers),
        (update_module.Ema, "apply", "EMA"),
        (mokd.centers, "update", "centres"),
        (mokd.centers, "wait", "centres"),
    ]


def breakdown(run: Callable[[], Any], step: Trainer | OfficialStep) -> dict[str, float]:
    """Seconds of each part of a step, most first. A backward pass is counted with what it is of,
    by the sequence numbers of autograd; "other" is what no part has."""
    with ExitStack() as stack:
        for thing, name, part in parts_of(step):
            stack.enter_context(_seen(thing, name, part))
        events: list[Any] = []
        profiler = profile(
            activities=[ProfilerActivity.CPU],
            schedule=schedule(wait=0, warmup=WARM, active=SEEN, repeat=1),
            on_trace_ready=lambda ready: events.extend(ready.events()),
        )
        stack.enter_context(profiler)
        for _ in range(WARM + SEEN):
            with record_function(WHOLE):
                run()
            profiler.step()
    seconds = _by_part(event for event in events if not event.name.startswith("ProfilerStep"))
    mean = {part: total / SEEN for part, total in seconds.items()}
    return dict(sorted(mean.items(), key=lambda pair: -pair[1]))


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
    backward, products = [], []
    for event in events:
        is_part = event.name.startswith(PREFIX)
        if event.name.startswith(NODE):
            backward.append(event)
        elif event.sequence_nr >= 0 and not is_part:
            part_of.setdefault(event.sequence_nr, _owner(event))
        if event.name in PRODUCTS:
            products.append(event)
        if is_part:
            mine = _seconds(event)
            seconds[event.name.removeprefix(PREFIX)] += mine
            if event.name != WHOLE:
                seconds[_owner(event.cpu_parent)] -= mine
    for event in backward:
        # A parameter's own node has no number.
        of = part_of.get(event.sequence_nr, "students")
        seconds[of if of in (PROTOTYPES, LOSSES) else BACKWARD] += _seconds(event)
        seconds[_owner(event.cpu_parent)] -= _seconds(event)
    for event in products:  # the outermost of those in a loss
        above = _above(event)
        if any(one.name in PRODUCTS for one in above[:-1]) or not above:
            continue
        last = above[-1]
        of = part_of.get(last.sequence_nr) if last.name.startswith(NODE) else _owner(last)
        if of == LOSSES:
            seconds[PROTOTYPES] += _seconds(event)
            seconds[LOSSES] -= _seconds(event)
    return dict(seconds)


def _seconds(event: Any) -> float:
    return float(event.cpu_time_total / 1e6)


def _above(event: Any) -> list[Any]:
    """What an event lies in, up to a part or a node of autograd."""
    found = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        found.append(event)
        if event.name.startswith((PREFIX, NODE)):
            break
    return found


def _owner(event: Any) -> str:
    """The innermost part that an event lies in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return "other"


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention in one step."""
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with counter:
        run()
    return int(counter.get_total_flops())


def flop_formulas() -> dict[Any, Callable[..., int]]:
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

    def own_attention(qkv: Any, sizes: Any, *_: Any, **__: Any) -> int:
        *rows, _three, H, d = qkv
        sizes = sizes or rows
        return sum(4 * B * H * N * N * d for B, N in zip(sizes[::2], sizes[1::2], strict=True))

    def own_attention_backward(grad: Any, qkv: Any, out: Any, stats: Any, sizes: Any, *_: Any,
                               **__: Any) -> int:  # fmt: skip
        return 2 * own_attention(qkv, sizes)  # four products; the scores, made again, do not count

    def normed_backward(grad: Any, x: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * linear(x, v)

    return {
        torch.ops.mokd_fast.attention_forward: own_attention,
        torch.ops.mokd_fast.attention_backward: own_attention_backward,
        torch.ops.mokd_fast.prototype_linear: linear,
        torch.ops.mokd_fast.normed_linear: linear,
        torch.ops.mokd_fast.normed_linear_backward: normed_backward,
        torch.ops.mkldnn._linear_pointwise: linear,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.mokd_fast.joint_forward: joint,
        torch.ops.mokd_fast.search_forward: search,
    }
