"""linear_distill_cross_entropy: distill_cross_entropy of x W^T, whose logits are never stored.

    s_v = x_v W^T     z_t = h_t W_t^T     L = distill_cross_entropy(s, z)     (ops/distill.py)

K is walked in chunks that stay in the caches. Forward makes a chunk of the logits, adds it to the
running (max, sum, dots) of every row and drops it; backward goes back, makes it again and from it

    dS = n softmax(s / tau) - Q     dX += dS W_chunk     dW_chunk = dS^T X

The last chunk is kept, so that the turn is free; for K up to a chunk nothing is made twice. Exact:
no entry is left out. With T teacher rows and V views this takes up to 4 + 2 T/V products where
stored logits take 3 + T/V; the memory beyond inputs and gradients does not depend on K.

Letters: V student views, T teacher rows, B images, K prototypes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distill, reference
from .dispatch import pick, register
from .distill import Pairs, Target, check_list, check_rows, check_target, check_temperature


@dataclass(frozen=True, eq=False)
class LinearTarget:
    """Teacher rows whose logits are features @ prototypes.T; the rest is as in `Target`.

    Args:
        features: [T, B, D], floating. D may differ from the student's.
        prototypes: [K, D]. Targets with the same tensor share its products.
        pairs, temperature, center [K], weight, row_weight [B]: see `Target`.
    No gradient flows into any of them.
    """

    pairs: Pairs
    features: Tensor
    prototypes: Tensor
    temperature: float | Tensor = 1.0
    center: Tensor | None = None
    weight: float | Tensor = 1.0
    row_weight: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return self.features

    def stored(self, dtype: torch.dtype) -> Target:
        """The same with its logits, from a product in `dtype`."""
        with torch.no_grad(), torch.autocast(self.features.device.type, enabled=False):
            logits = F.linear(self.features.to(dtype), self.prototypes.to(dtype))
        return Target(
            self.pairs, logits, None, self.temperature, self.center, self.weight, self.row_weight
        )


def linear_distill_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    *,
    temperature: float | Tensor = 0.1,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the student logits features @ weight.T with all their targets.

    Args:
        features: [V, B, D], floating.
        weight: the prototypes [K, D], floating, of any dtype: it is cast chunk by chunk. For a
            weight-normed layer pass g * v / |v|.
        targets: at least one `LinearTarget` or `Target`, mixed as they come.
        temperature: student temperature, > 0; a 0-d tensor when it changes in a compiled step.
        chunk: columns of a chunk; None for a size that stays in the caches.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does. `reference`
            stores all logits.

    The products are in autocast's dtype where it is on, else in the features'; softmax and loss in
    fp32 (fp64 for fp64), as are the sums over chunks.

    Returns:
        loss, 0-d, with gradients for `features` and `weight`; per_target [len(targets)], detached.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature <= 0, nothing to pair.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> from mokd_fast.ops import cross_view_pairs
        >>> x, h, w = torch.randn(4, 8, 16), torch.randn(2, 8, 16), torch.randn(32, 16)
        >>> dino = LinearTarget(cross_view_pairs(2, 4), h, w, temperature=0.04)
        >>> loss, terms = linear_distill_cross_entropy(x, w, [dino])
        >>> loss.shape, terms.shape
        (torch.Size([]), torch.Size([1]))
    """
    _check(features, weight, targets, temperature, chunk)
    chosen = pick(OP, features, weight, targets, temperature, chunk, backend=backend)
    loss, per_target = chosen.run(features, weight, targets, temperature, chunk)
    return loss, per_target


OP = "linear_distill_cross_entropy"


def product_dtype(features: Tensor) -> torch.dtype:
    """Of the logits: autocast's where it is on (it leaves fp64 alone), else the features'."""
    kind = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return features.dtype


def _reference(
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = product_dtype(features)
    with torch.autocast(features.device.type, enabled=False):
        logits = F.linear(features.to(dtype), weight.to(dtype))
    stored = [t.stored(dtype) if isinstance(t, LinearTarget) else t for t in targets]
    return reference.distill_cross_entropy(logits, stored, temperature)


class Call(NamedTuple):
    """The flat arguments of both passes; one entry a target in every list."""

    features: Tensor  # [V, B, D]
    weight: Tensor  # [K, D]
    rows: list[Tensor]  # features [T, B, D] or, where there are no prototypes, [T, B, K]
    prototypes: list[Tensor]  # [K, D] or empty
    centers: list[Tensor]  # [K] or empty
    row_weights: list[Tensor]  # [B] or empty
    scalars: Tensor  # [1 + 2 targets]: temperatures, the student's first, then weights
    pairs: list[float]  # [sum T, V] flat
    probabilities: list[bool]
    dtype: torch.dtype  # of the products
    chunk: int
    backend: str


# A chunk of the student's logits: of two cores with 1 MiB of L2 each, 32 MiB of L3 and B = 4 to 32
# all do well with it (bench/linear_distill.py).
CHUNK_BYTES = 5 << 19


def chunk_size(rows: int, dtype: torch.dtype) -> int:
    """Columns of a chunk for so many student rows V * B: a power of two, from 512 on."""
    columns = CHUNK_BYTES // (max(rows, 1) * dtype.itemsize)
    return 1 << max(9, min(columns.bit_length() - 1, 16))


class Chunk(NamedTuple):
    """Some columns of everything that has columns."""

    at: slice
    weight: Tensor  # [chunk, D] in the products' dtype
    student: Tensor  # [V, B, chunk]
    rows: list[Tensor]  # [T, B, chunk]
    centers: list[Tensor]  # [chunk] or empty


class _Walk:
    """The chunks of a call. The student and all targets of the same prototypes are one product."""

    def __init__(self, call: Call) -> None:
        self.call, self.starts = call, range(0, len(call.weight), call.chunk)
        groups: dict[tuple[Any, ...], list[int]] = {}  # targets by their prototypes
        for i, prototypes in enumerate(call.prototypes):
            if prototypes.numel():
                groups.setdefault(_identity(prototypes), []).append(i)
        self.x = _matrix([call.features], call.dtype)
        self._targets = list(groups.values())
        self._student = _Product(self.x, call.chunk)
        self._teachers = [
            _Product(_matrix([call.rows[i] for i in own], call.dtype), call.chunk)
            for own in self._targets
        ]
        self._made: list[Tensor] = []  # the products of the last chunk

    def chunk(self, start: int, kept: Tensor | None = None) -> Chunk:
        """The columns from `start` on; the logits of those before are overwritten."""
        call = self.call
        at = slice(start, start + call.chunk)
        weight = call.weight[at].to(call.dtype)
        if kept is None:
            self._made = [self._student(weight)]
            for own, product in zip(self._targets, self._teachers, strict=True):
                matrix = call.prototypes[own[0]]
                same = _identity(matrix) == _identity(call.weight)
                self._made.append(product(weight if same else matrix[at].to(call.dtype)))
        else:
            sizes = [len(p.rows) for p in (self._student, *self._teachers)]
            self._made = list(kept.view(-1, len(weight)).split(sizes))
        student, *teachers = self._made
        rows = [r[..., at] for r in call.rows]
        for own, logits in zip(self._targets, teachers, strict=True):
            parts = logits.split([call.rows[i].shape[0] * call.rows[i].shape[1] for i in own])
            for i, part in zip(own, parts, strict=True):
                rows[i] = part.unflatten(0, call.rows[i].shape[:2])
        centers = [c[at] if c.numel() else c for c in call.centers]
        return Chunk(at, weight, student.unflatten(0, call.features.shape[:2]), rows, centers)

    def keep(self) -> Tensor:
        """The logits of the last chunk, for `chunk` in the backward pass."""
        return torch.cat([logits.flatten() for logits in self._made])


def _kept_size(call: Call) -> int:
    columns = len(call.weight) - range(0, len(call.weight), call.chunk)[-1]
    teachers = (r for r, p in zip(call.rows, call.prototypes, strict=True) if p.numel())
    return sum(r.shape[0] * r.shape[1] for r in (call.features, *teachers)) * columns


def _identity(matrix: Tensor) -> tuple[Any, ...]:
    return matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride()


def _matrix(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Features [T, B, D] of one or several targets below each other. [sum T * B, D]"""
    return torch.cat([r.flatten(0, 1) for r in rows]).to(dtype)


def _linear(a: Tensor, weight: Tensor) -> Tensor | None:
    """a @ weight.T by oneDNN, or None where it cannot. For fp32 it takes 0.7 of the time of `mm`
    (bench/linear_distill.py), which leaves this to another library."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or not a.numel():
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    return found


class _Product:
    """rows @ weight.T for one chunk of a weight after the other, in one place."""

    def __init__(self, rows: Tensor, chunk: int) -> None:
        self.rows = rows
        self._place: Tensor | None = None
        self._size = len(rows) * chunk

    def __call__(self, weight: Tensor) -> Tensor:
        found = _linear(self.rows, weight.contiguous())
        if found is not None:
            return found
        if self._place is None:
            self._place = self.rows.new_empty(self._size)
        out = self._place[: len(self.rows) * len(weight)].view(-1, len(weight))
        return torch.mm(self.rows, weight.t(), out=out)


def _forward_pass(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2], and the logits of the last chunk, flat."""
    kernels = distill._kernels(call.backend).ForwardChunks(len(call.weight))
    rest = call.row_weights, call.scalars, call.pairs, call.probabilities
    with torch.autocast(call.features.device.type, enabled=False):
        walk = _Walk(call)
        for start in walk.starts:
            chunk = walk.chunk(start)
            kernels.add(chunk.student, chunk.rows, chunk.centers, *rest)
        return *kernels.outputs, walk.keep()


def _backward_pass(
    grad: Tensor, stats: Tensor, kept: Tensor, call: Call, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients [V, B, D] and [K, D], those that are needed; else empty."""
    kernels = distill._kernels(call.backend)
    features, weight = call.features, call.weight
    rest = call.row_weights, call.scalars, call.pairs, call.probabilities
    dw = weight.new_empty(weight.shape if needs[1] else 0)
    with torch.autocast(features.device.type, enabled=False):
        walk = _Walk(call)
        x = walk.x
        total = x.new_zeros(x.shape, dtype=reference.accumulation_dtype(x))
        place = x.new_empty(len(x) * min(call.chunk, len(weight)))
        for start in reversed(walk.starts):
            chunk = walk.chunk(start, kept if start == walk.starts[-1] else None)
            out = place[: chunk.student.numel()].view(chunk.student.shape)
            args = chunk.student, chunk.rows, chunk.centers, *rest
            ds = kernels.distill_backward(grad, stats, *args, out=out).flatten(0, 1)
            if needs[0]:
                _add_product(total, ds, chunk.weight)
            if needs[1]:
                _put_product(dw[chunk.at], ds.t(), x)
    dx = total.to(features.dtype).view(features.shape) if needs[0] else features.new_empty(0)
    return dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. On the CPU a product of 16-bit matrices is rounded before it is added."""
    if (found := _linear(a, b.t())) is not None:
        total += found
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def _put_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and out.dtype == torch.float32:
        torch.mm(a, b, torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


@torch.library.custom_op("mokd_fast::linear_distill_forward", mutates_args=())
def _forward(
    features: Tensor,
    weight: Tensor,
    rows: list[Tensor],
    prototypes: list[Tensor],
    centers: list[Tensor],
    row_weights: list[Tensor],
    scalars: Tensor,
    pairs: list[float],
    probabilities: list[bool],
    dtype: torch.dtype,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_forward_pass` of a `Call`."""
    return _forward_pass(
        Call(features, weight, rows, prototypes, centers, row_weights, scalars, pairs,
             probabilities, dtype, chunk, backend)
    )  # fmt: skip


@_forward.register_fake
def _(features, weight, rows, prototypes, centers, row_weights, scalars, pairs, probabilities,
      dtype, chunk, backend):  # fmt: skip
    call = Call(features, weight, rows, prototypes, centers, row_weights, scalars, pairs,
                probabilities, dtype, chunk, backend)  # fmt: skip
    accumulated = torch.promote_types(dtype, torch.float32)
    count = features.shape[0] + sum(r.shape[0] for r in rows)
    return (
        features.new_empty((), dtype=accumulated),
        features.new_empty(len(rows), dtype=accumulated),
        features.new_empty(count, features.shape[1], 2, dtype=accumulated),
        features.new_empty(_kept_size(call), dtype=dtype),
    )


@torch.library.custom_op("mokd_fast::linear_distill_backward", mutates_args=())
def _backward(
    grad: Tensor,
    stats: Tensor,
    kept: Tensor,
    features: Tensor,
    weight: Tensor,
    rows: list[Tensor],
    prototypes: list[Tensor],
    centers: list[Tensor],
    row_weights: list[Tensor],
    scalars: Tensor,
    pairs: list[float],
    probabilities: list[bool],
    dtype: torch.dtype,
    chunk: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients for features [V, B, D] and weight [K, D]; empty where `needs` says no."""
    call = Call(features, weight, rows, prototypes, centers, row_weights, scalars, pairs,
                probabilities, dtype, chunk, backend)  # fmt: skip
    return _backward_pass(grad, stats, kept, call, needs)


@_backward.register_fake
def _(grad, stats, kept, features, weight, *rest):
    needs = rest[-1]
    return (
        features.new_empty(features.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, rows, prototypes, centers, row_weights, scalars, *ctx.numbers = inputs
    ctx.save_for_backward(
        *output[2:], features, weight, scalars, *rows, *prototypes, *centers, *row_weights
    )
    ctx.targets = len(rows)
    ctx.mark_non_differentiable(*output[1:])


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Call]:
    """Stats, the last chunk's logits, and the call."""
    stats, kept, features, weight, scalars, *lists = ctx.saved_tensors
    n = ctx.targets
    rows, prototypes, centers, row_weights = (lists[i * n : (i + 1) * n] for i in range(4))
    return (
        stats,
        kept,
        Call(features, weight, rows, prototypes, centers, row_weights, scalars, *ctx.numbers),
    )


def _results(ctx: Any, gradients: tuple[Tensor, Tensor], none: Any) -> tuple[Any, ...]:
    found = [g if n else None for g, n in zip(gradients, ctx.needs_input_grad[:2], strict=True)]
    return *found, *[none] * 4, *[None] * 6


def _gradient(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    stats, kept, call = _saved(ctx)
    needs = list(ctx.needs_input_grad[:2])
    return _results(ctx, _backward(grad, stats, kept, *call, needs), [None] * ctx.targets)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(f"{OP} has no second derivative on this backend; backend='reference' has")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_no_second_derivative)


def _run(
    backend: str,
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The custom operator with its flat arguments, gathered from `targets`."""
    dtype = product_dtype(features)
    logits = features.new_empty(0, dtype=dtype)  # of the student, for their dtype and device
    empty = logits.new_empty(0, dtype=reference.accumulation_dtype(logits))
    numbers = [temperature, *(t.temperature for t in targets), *(t.weight for t in targets)]
    loss, terms, *_ = _forward(
        features,
        weight,
        [t.rows.detach().resolve_neg() for t in targets],
        [t.prototypes.detach() if isinstance(t, LinearTarget) else empty for t in targets],
        [empty if t.center is None else t.center.detach() for t in targets],
        [empty if t.row_weight is None else t.row_weight.detach() for t in targets],
        torch.stack([reference.scalar(number, logits) for number in numbers]),
        [pair for t in targets for row in t.pairs for pair in row],
        [isinstance(t, Target) and t.probs is not None for t in targets],
        dtype,
        chunk or chunk_size(features.shape[0] * features.shape[1], dtype),
        backend,
    )
    return loss, terms.detach()


def _why_not(
    backend: str,
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor = 0.1,
    chunk: int | None = None,
) -> str | None:
    """Whether the kernels of `distill_cross_entropy` take the chunks."""
    rows = [t.rows for t in targets]
    return distill.transformed(weight) or distill.why_not(backend, features, rows)


register(OP, "cpu", partial(_run, "cpu"), partial(_why_not, "cpu"))
register(OP, "reference", _reference)


def _check(
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor,
    chunk: int | None,
) -> None:
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(
            "features must be floating [V, B, D], "
            f"got {features.dtype} of shape {list(features.shape)}"
        )
    _check_prototypes("weight", weight, features)
    if len(weight) == 0:
        raise ValueError("weight has no prototypes: K is 0, a distribution takes at least one")
    check_temperature("temperature", temperature)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least one column, got {chunk}")
    check_list(targets)
    shape = (*features.shape[:2], len(weight))
    for i, target in enumerate(targets):
        name = f"targets[{i}]"
        if isinstance(target, LinearTarget):
            _check_linear(name, target, shape)
        else:
            check_rows(name, target, shape)
        check_target(name, target, shape, features.device)


def _check_linear(name: str, target: LinearTarget, shape: tuple[int, int, int]) -> None:
    rows = target.features
    if rows.ndim != 3 or rows.shape[1] != shape[1] or not rows.is_floating_point():
        raise ValueError(
            f"{name}.features must be floating [T, {shape[1]}, D], "
            f"got {rows.dtype} of shape {list(rows.shape)}"
        )
    _check_prototypes(f"{name}.prototypes", target.prototypes, rows)
    if len(target.prototypes) != shape[2]:
        raise ValueError(
            f"{name}.prototypes must be as many as the student's, {shape[2]}, "
            f"got {len(target.prototypes)}"
        )


def _check_prototypes(name: str, weight: Tensor, features: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != features.shape[2]:
        raise ValueError(
            f"{name} must be floating prototypes [K, {features.shape[2]}] for features "
            f"{list(features.shape)}, got {weight.dtype} of shape {list(weight.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(f"{name} is on {weight.device}, its features on {features.device}")
