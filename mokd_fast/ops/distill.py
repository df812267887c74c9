"""distill_cross_entropy: the cross-entropy of many student views with many teacher rows.

Every loss of MOKD, DINO, iBOT, DINOv2/v3, SCFS and HSSL is a weighted sum over targets of

    L = sum_{t,v} pairs[t,v] * mean_b row_weight[b] * CE(q_t[b], softmax(s_v[b] / tau_s))
    q_t = softmax((z_t - center) / tau_t)

Letters: V student views, T teacher rows, B images, K prototypes.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import cpu, cuda, reference
from .column_mean import column_mean
from .dispatch import pick, register
from .eager import kernel, no_gradient, with_autograd

OP = "distill_cross_entropy"
Pairs = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class Target:
    """What a student is compared with: teacher rows and the weight of each (row, view) pair.

    Args:
        logits: teacher logits [T, B, K], floating; or
        probs: teacher probabilities [T, B, K], used as they are (no centre, no temperature).
        pairs: T rows of V host numbers, the weight of teacher row t for student view v;
            see `cross_view_pairs` and `matched_pairs`.
        temperature: teacher temperature, > 0; a 0-d tensor when it changes in a compiled step.
        center: [K], subtracted from the logits before the temperature; None for no centring.
        weight: factor of this target in the total (MOKD's lambda); its logged term is unscaled.
            A 0-d tensor when it changes in a compiled or captured step.
        row_weight: [B], the weight of each image (iBOT's 1/count); None for 1.
    No gradient flows into any of them.
    """

    pairs: Pairs
    logits: Tensor | None = None
    probs: Tensor | None = None
    temperature: float | Tensor = 1.0
    center: Tensor | None = None
    weight: float | Tensor = 1.0
    row_weight: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The logits or the probabilities, whichever there are."""
        found = self.logits if self.logits is not None else self.probs
        assert found is not None
        return found


def cross_view_pairs(T: int, V: int) -> Pairs:
    """Every teacher row with every student view but its own, equally: 1 / (T*V - min(T, V)).

    The pairing of DINO (Caron et al. 2021, algorithm 1): row t and view t are the same crop.
    ValueError when nothing is left to pair (one row and one view).
    """
    count = T * V - min(T, V)
    if T < 1 or V < 1 or count == 0:
        raise ValueError(
            f"cross_view_pairs: {T} teacher row(s) and {V} student view(s) leave nothing to pair; "
            "there must be at least one row and one view, and two of one of them"
        )
    return tuple(tuple(0.0 if t == v else 1 / count for v in range(V)) for t in range(T))


def matched_pairs(V: int, first: int = 0) -> Pairs:
    """Row t is the target of view first + t alone, 1 / (V - first) each: T = V - first rows.

    The pairing of MOKD's search: one searched embedding for each local crop.
    """
    if not 0 <= first < V:
        raise ValueError(f"matched_pairs: first must lie in 0..{V - 1} for {V} views, got {first}")
    rows = V - first
    return tuple(tuple(1 / rows if v == first + t else 0.0 for v in range(V)) for t in range(rows))


def distill_cross_entropy(
    student: Tensor,
    targets: Sequence[Target],
    *,
    temperature: float | Tensor = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy between student views and all their targets, in one call.

    Args:
        student: logits [V, B, K]; fp16, bf16, fp32 or fp64, any strides. The arithmetic is fp32
            (fp64 for fp64), under autocast too.
        targets: at least one `Target` for the same V, B and K.
        temperature: student temperature, > 0; a 0-d tensor as in `Target`.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does.

    Returns:
        loss, 0-d: sum_i weight_i * per_target_i, with a gradient for `student`;
        per_target [len(targets)]: the unscaled terms, detached. No images (B = 0) give zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature <= 0, nothing to pair.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> s, t = torch.randn(4, 8, 32), torch.randn(2, 8, 32)
        >>> dino = Target(logits=t, pairs=cross_view_pairs(2, 4), temperature=0.04)
        >>> loss, terms = distill_cross_entropy(s, [dino])
        >>> loss.shape, terms.shape
        (torch.Size([]), torch.Size([1]))
    """
    _check(student, targets, temperature)
    chosen = pick(OP, student, targets, temperature, backend=backend)
    loss, per_target = chosen.run(student, targets, temperature)
    return loss, per_target


def distill_with_mean(
    student: Tensor, target: Target, *, temperature: float | Tensor = 0.1
) -> tuple[Tensor, Tensor]:
    """The loss with one target of logits, and the mean [K] of these, to which a centre moves.

    On a CPU both are made of one read of them where the threads can share out the work that way.
    The mean is `column_mean`'s, in the student's arithmetic. Errors as above, and ValueError for a
    target of probabilities.
    """
    _check(student, [target], temperature)
    if target.logits is None:
        raise ValueError("target has probs: only logits have a mean to which a centre moves")
    chosen = pick(OP, student, [target], temperature)
    if chosen.name == "cpu":
        loss, _, mean = _call("cpu", student, [target], temperature, with_mean=True)
    else:
        loss, _ = chosen.run(student, [target], temperature)
        mean = column_mean(target.logits).to(reference.accumulation_dtype(student))
    return loss, mean


@torch.library.custom_op("mokd_fast::distill_forward", mutates_args=())
def _forward(
    student: Tensor,
    rows: list[Tensor],
    centers: list[Tensor],
    row_weights: list[Tensor],
    scalars: Tensor,
    pairs: list[float],
    probabilities: list[bool],
    backend: str,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats of each row and, on the CPU and if asked for, the mean [K] of
    all teacher rows (else nothing, [0]); all of the arithmetic's dtype.

    One entry a target in rows [T_i, B, K], centers and row_weights (empty tensors when absent) and
    probabilities; pairs [sum T_i, V] flat; scalars [1 + 2 targets]: temperatures, the student's
    first, then weights. Absent ones are empty tensors: Optional inside a list breaks
    register_autograd.
    """
    arguments = rows, centers, row_weights, scalars, pairs, probabilities
    loss, terms, stats, mean = _run_forward(student, *arguments, backend, with_mean)
    return loss, terms, stats, loss.new_empty(0) if mean is None else mean


@_forward.register_fake
def _(student, rows, centers, row_weights, scalars, pairs, probabilities, backend, with_mean=False):
    dtype = reference.accumulation_dtype(student)
    count = student.shape[0] + sum(r.shape[0] for r in rows)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(len(rows), dtype=dtype),
        student.new_empty(count, student.shape[1], 2, dtype=dtype),
        student.new_empty(student.shape[2] if with_mean else 0, dtype=dtype),
    )


@torch.library.custom_op("mokd_fast::distill_backward", mutates_args=())
def _backward(
    grad: Tensor,
    stats: Tensor,
    student: Tensor,
    rows: list[Tensor],
    centers: list[Tensor],
    row_weights: list[Tensor],
    scalars: Tensor,
    pairs: list[float],
    probabilities: list[bool],
    backend: str,
) -> Tensor:
    """Gradient of the loss for the student's logits [V, B, K], contiguous, of their dtype."""
    return _kernels(backend).distill_backward(
        grad, stats, student, rows, centers, row_weights, scalars, pairs, probabilities
    )


@_backward.register_fake
def _(grad, stats, student, *rest):
    return student.new_empty(student.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, rows, centers, row_weights, scalars, pairs, probabilities, backend, _ = inputs
    ctx.save_for_backward(output[2], student, scalars, *rows, *centers, *row_weights)
    ctx.targets, ctx.numbers = len(rows), (pairs, probabilities, backend)
    ctx.mark_non_differentiable(*(out for out in output[1:] if out is not None))
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    stats, student, scalars, *lists = ctx.saved_tensors
    n = ctx.targets
    rest = (lists[i * n : (i + 1) * n] for i in range(3))
    return grad, stats, student, *rest, scalars, *ctx.numbers


def _gradients(ctx: Any, grads: Any, found: Tensor) -> tuple[Any, ...]:
    return found, *map(no_gradient, ctx.needs_input_grad[1:])


def _kernels(backend: str) -> Any:
    """The module of a backend. Triton is imported at first use: it is slow and may be missing."""
    if backend == "triton":
        from mokd_fast.kernels import distill

        return distill
    return {"cpu": cpu, "cuda": cuda}[backend]


def _run_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`_forward` with its arguments; None for a mean that nobody asked for."""
    student, *call, backend, with_mean = inputs
    kernels = _kernels(backend)
    if not with_mean:
        return (*kernels.distill_forward(student, *call), None)
    mean = student.new_empty(student.shape[2], dtype=reference.accumulation_dtype(student))
    return (*kernels.distill_forward(student, *call, mean=mean), mean)


# _kernels is looked up at each call: tests put others in its place.
_kernel = partial(kernel, lambda backend: _kernels(backend))
_eager = with_autograd(
    OP,
    (_forward, _backward),
    (_run_forward, _kernel("distill_backward")),
    _save,
    _arguments,
    _gradients,
)


def _run(
    backend: str, student: Tensor, targets: Sequence[Target], temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A backend's way to the loss and the terms."""
    loss, terms, _ = _call(backend, student, targets, temperature)
    return loss, terms.detach()


def _call(
    backend: str,
    student: Tensor,
    targets: Sequence[Target],
    temperature: float | Tensor,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and mean of the custom operator, its flat arguments gathered from `targets`."""
    dtype = reference.accumulation_dtype(student)
    empty = student.new_empty(0, dtype=dtype)
    numbers = [temperature, *(t.temperature for t in targets), *(t.weight for t in targets)]
    student = student.resolve_neg()  # kernels read memory, where the sign of such a view is another
    rows = [t.rows.detach().resolve_neg() for t in targets]
    centers = [empty if t.center is None else t.center.detach().resolve_neg() for t in targets]
    row_weights = [
        empty if t.row_weight is None else t.row_weight.detach().resolve_neg() for t in targets
    ]
    tensors = student, *rows, *centers, *row_weights
    eager = plain((*tensors, *(n for n in numbers if isinstance(n, Tensor))))
    loss, terms, _, mean = (_eager if eager else _forward)(
        student,
        rows,
        centers,
        row_weights,
        reference.scalars(numbers, student, on_host=eager and backend == "cuda"),
        [weight for t in targets for row in t.pairs for weight in row],
        [t.probs is not None for t in targets],
        backend,
        with_mean,
    )
    return loss, terms, mean


def plain(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels may take the tensors' addresses here: no subclass (a FakeTensor has none), no
    dispatch mode that must see the operators (FakeTensorMode, make_fx), nothing compiled."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def transformed(*tensors: Tensor) -> str | None:
    """torch.func's transforms and forward mode, of any of these, take the reference alone."""
    if torch.compiler.is_compiling():
        return None
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return "it cannot run under torch.func transforms (grad, vmap)"
    if forward_ad._current_level < 0:  # no tensor has a tangent; to ask each would take 1 us
        return None
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "it has no forward-mode derivative"  # a custom operator would drop the tangent
    return None


def triton_why_not(tensor: Tensor) -> str | None:
    """Why no Triton kernel can take a tensor, or None."""
    # A GPU first, so that triton is not imported for tensors on the CPU, its interpreter aside.
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes tensors on a GPU, this one is on {tensor.device}"
    try:
        found: str | None = _kernels("triton").gpu_why_not(tensor.device)
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return found


def why_not(backend: str, student: Tensor, rows: Sequence[Tensor]) -> str | None:
    """Why the kernels of a backend cannot take student [V, B, ..] and rows [T_i, B, ..], or None.
    The last dimension does not matter."""
    if backend == "triton" and (reason := triton_why_not(student)):
        return reason
    return transformed(student) or _kernels(backend).why_not(student, rows)


def _why_not(
    backend: str, student: Tensor, targets: Sequence[Target], temperature: float | Tensor = 0.1
) -> str | None:
    return why_not(backend, student, [t.rows for t in targets])


for _name in ("cuda", "triton", "cpu"):
    register(OP, _name, partial(_run, _name), partial(_why_not, _name))
register(OP, "reference", reference.distill_cross_entropy)


def _check(student: Tensor, targets: Sequence[Target], temperature: float | Tensor) -> None:
    if student.ndim != 3 or not student.is_floating_point():
        raise ValueError(
            "student must be floating logits [V, B, K], "
            f"got {student.dtype} of shape {list(student.shape)}"
        )
    if student.shape[-1] == 0:
        raise ValueError("student has no prototypes: K is 0, a distribution takes at least one")
    check_temperature("temperature", temperature)
    check_list(targets)
    for i, target in enumerate(targets):
        check_rows(f"targets[{i}]", target, student.shape)
        check_target(f"targets[{i}]", target, student.shape, student.device)


def check_list(targets: Any) -> None:
    if not isinstance(targets, Sequence):
        raise ValueError("targets must be a list of Target, got a single one: pass [target]")
    if not targets:
        raise ValueError("targets is empty: there is nothing to pair the student with")


def check_rows(name: str, target: Target, shape: Sequence[int]) -> None:
    """The logits or probabilities of a target for a student of shape [V, B, K]."""
    if (target.logits is None) == (target.probs is None):
        raise ValueError(f"{name} takes either logits or probs [T, B, K]")
    rows = target.rows
    _, images, prototypes = shape
    if rows.ndim != 3 or rows.shape[1:] != shape[1:] or not rows.is_floating_point():
        raise ValueError(
            f"{name} must hold floating [T, {images}, {prototypes}] like the student's "
            f"[V, B, K] = {list(shape)}, got {rows.dtype} of shape {list(rows.shape)}"
        )
    if target.probs is not None and target.center is not None:
        raise ValueError(f"{name} has probs, which take no center: centre the logits instead")


def check_target(name: str, target: Any, shape: Sequence[int], device: torch.device) -> None:
    """What every kind of target has, for a student of shape [V, B, K] on `device`."""
    views, images, prototypes = shape
    pairs = target.pairs
    if len(pairs) != len(target.rows) or any(len(row) != views for row in pairs):
        found = [len(pairs), *sorted({len(row) for row in pairs})]
        expected = [len(target.rows), views]
        raise ValueError(f"{name}.pairs must be [T, V] = {expected}, got {found}")
    if not any(weight != 0 for row in pairs for weight in row):
        raise ValueError(f"{name}.pairs is zero everywhere: there is nothing to pair")
    for label, tensor, size in (
        ("center", target.center, prototypes),
        ("row_weight", target.row_weight, images),
    ):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name}.{label} must be [{size}], got {list(tensor.shape)}")
    for label in ("logits", "probs", "features", "prototypes", "center", "row_weight"):
        tensor = getattr(target, label, None)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}.{label} is on {tensor.device}, the student on {device}")
    check_temperature(f"{name}.temperature", target.temperature)
    _check_scalar(f"{name}.weight", target.weight)


def check_temperature(name: str, value: float | Tensor) -> None:
    _check_scalar(name, value)
    if not isinstance(value, Tensor) and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0 and finite, got {value}")


def _check_scalar(name: str, value: float | Tensor) -> None:
    # The value of a tensor stays on the device: reading it would synchronise.
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"{name} must be 0-d, one number, got shape {list(value.shape)}")


__all__ = ["Target", "cross_view_pairs", "distill_cross_entropy", "matched_pairs"]
