"""linear_distill_cross_entropy: distill_cross_entropy of x W^T, whose logits are never stored.

    s_v = x_v W^T     z_t = h_t W_t^T     L = distill_cross_entropy(s, z)     (ops/distill.py)

K is walked in chunks that stay in the caches (linear_chunks.py). The last ones are kept, up to
KEEP_BYTES: a small K is stored, of a large one the way back begins with them. Exact: no entry is
left out. With T teacher rows and V views this takes up to 4 + 2 T/V products where stored logits
take 3 + T/V; the memory beyond inputs and gradients does not depend on K, but for what forward
keeps of each tile on a GPU (the largest: 88 bytes a column at B = 64, V = 10, T = 2, twice that as
they are merged; dW has 1024).

Letters: V student views, T teacher rows, B images, K prototypes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distill, reference
from .dispatch import pick, register
from .distill import Pairs, Target, check_list, check_rows, check_target, check_temperature
from .eager import no_second_derivative
from .linear_chunks import Call, backward_pass, chunk_size, first_kept, forward_pass, row_count
from .prototype_linear import prototype_linear


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
        with torch.no_grad():
            logits = prototype_linear(self.features, self.prototypes, dtype)
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
    check_linear(features, weight, targets, temperature, chunk)
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
    first_kept: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward_pass` of a `Call`."""
    return forward_pass(
        Call(features, weight, rows, prototypes, centers, row_weights, scalars, pairs,
             probabilities, dtype, chunk, first_kept, backend)
    )  # fmt: skip


@_forward.register_fake
def _(features, weight, rows, prototypes, centers, row_weights, scalars, pairs, probabilities,
      dtype, chunk, first_kept, backend):  # fmt: skip
    kept = row_count(features, rows, prototypes) * (weight.shape[0] - first_kept)
    accumulated = torch.promote_types(dtype, torch.float32)
    count = features.shape[0] + sum(r.shape[0] for r in rows)
    return (
        features.new_empty((), dtype=accumulated),
        features.new_empty(len(rows), dtype=accumulated),
        features.new_empty(count, features.shape[1], 2, dtype=accumulated),
        features.new_empty(kept, dtype=dtype),
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
    first_kept: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients for features [V, B, D] and weight [K, D]; empty where `needs` says no."""
    call = Call(features, weight, rows, prototypes, centers, row_weights, scalars, pairs,
                probabilities, dtype, chunk, first_kept, backend)  # fmt: skip
    return backward_pass(grad, stats, kept, call, needs)


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
    ctx.set_materialize_grads(False)  # or zeros of the size of what was kept would be made
    ctx.mark_non_differentiable(*output[1:])


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Call]:
    """Stats, the logits that were kept, and the call."""
    stats, kept, features, weight, scalars, *lists = ctx.saved_tensors
    n = ctx.targets
    rows, prototypes, centers, row_weights = (lists[i * n : (i + 1) * n] for i in range(4))
    return (
        stats,
        kept,
        Call(features, weight, rows, prototypes, centers, row_weights, scalars, *ctx.numbers),
    )


def _results(ctx: Any, gradients: tuple[Any, Any], none: Any) -> tuple[Any, ...]:
    found = [g if n else None for g, n in zip(gradients, ctx.needs_input_grad[:2], strict=True)]
    return *found, *[none] * 4, *[None] * 7


def _gradient(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return _results(ctx, (None, None), [None] * ctx.targets)
    stats, kept, call = _saved(ctx)
    needs = list(ctx.needs_input_grad[:2])
    return _results(ctx, _backward(grad, stats, kept, *call, needs), [None] * ctx.targets)


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(no_second_derivative(OP))


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
    rows = [t.rows.detach().resolve_neg() for t in targets]
    prototypes = [t.prototypes.detach() if isinstance(t, LinearTarget) else empty for t in targets]
    count = row_count(features, rows, prototypes)
    chunk = chunk or chunk_size(features, count, dtype)
    loss, terms, *_ = _forward(
        features,
        weight,
        rows,
        prototypes,
        [empty if t.center is None else t.center.detach() for t in targets],
        [empty if t.row_weight is None else t.row_weight.detach() for t in targets],
        reference.scalars(numbers, logits),
        [pair for t in targets for row in t.pairs for pair in row],
        [isinstance(t, Target) and t.probs is not None for t in targets],
        dtype,
        chunk,
        first_kept(features, count, weight.shape[0], chunk, dtype),
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


for _name in ("cuda", "triton", "cpu"):
    register(OP, _name, partial(_run, _name), partial(_why_not, _name))
register(OP, "reference", _reference)


def check_linear(
    features: Tensor,
    weight: Tensor,
    targets: Sequence[LinearTarget | Target],
    temperature: float | Tensor,
    chunk: int | None = None,
) -> None:
    """ValueError for what `linear_distill_cross_entropy` does not take."""
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
            _check_target(name, target, shape)
        else:
            check_rows(name, target, shape)
        check_target(name, target, shape, features.device)


def _check_target(name: str, target: LinearTarget, shape: tuple[int, int, int]) -> None:
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
    if weight.shape[1] == 0:
        raise ValueError(f"{name} has no features: D is 0, a product takes at least one")
    if weight.device != features.device:
        raise ValueError(f"{name} is on {weight.device}, its features on {features.device}")
