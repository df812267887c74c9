"""The CPU kernels of the native module: it takes addresses and strides and knows no tensor.

MOKD_FAST_CPU_LEVEL forces an x86-64 level (baseline, v3, v4); without it the best one runs. A name
that is none of them, or a level this processor cannot run, is a ValueError.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import constant
from .reference import accumulation_dtype, affine

NOT_BUILT = "the native module was not built (`pip install -v .` shows why)"


def _load() -> tuple[Any, str]:
    """mokd_fast._C, or None and why. torch comes first: one OpenMP runtime."""
    if importlib.util.find_spec("mokd_fast._C") is None:
        return None, NOT_BUILT
    try:
        from mokd_fast import _C
    except ImportError as error:
        return None, f"the native module is built but cannot be loaded: {error}"
    return _C, NOT_BUILT


native, missing = _load()
LEVEL, LEVELS = "MOKD_FAST_CPU_LEVEL", ("baseline", "v3", "v4")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def why_not(student: Tensor, rows: Sequence[Tensor] = ()) -> str | None:
    """Why the CPU kernels cannot take these tensors, or None."""
    for tensor in (student, *rows):
        if tensor.device.type != "cpu":
            return f"it takes tensors on the CPU, one is on {tensor.device}"
        if tensor.dtype not in TYPES:
            return f"it takes fp32, fp64, bf16 and fp16, one tensor is {tensor.dtype}"
    if native is None:
        return missing
    return None


def distill_forward(
    student: Tensor, rows: Sequence[Tensor], *rest: Any, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2]; arguments as `distill._forward`.

    mean: contiguous [K] of the arithmetic's dtype, for the mean of all teacher rows.
    """
    loss, terms, stats = results(student, rows)
    call, _alive = native_call(student, rows, *rest)
    to = stats.data_ptr(), terms.data_ptr(), loss.data_ptr(), _level()
    call.forward(*to, mean=0 if mean is None else mean.data_ptr())
    return loss, terms, stats


class ForwardChunks:
    """`distill_forward` for K columns that come in chunks, from left to right."""

    def __init__(self, columns: int) -> None:
        self._columns, self._done = columns, 0

    def add(self, student: Tensor, rows: Sequence[Tensor], *rest: Any) -> None:
        """Some columns of all arguments of `distill_forward`, centers too."""
        call, _alive = native_call(student, rows, *rest)
        first, size = not self._done, (student.shape[1], call.state_size())
        if first:
            self.outputs = results(student, rows)
            self._running = torch.empty(size, dtype=torch.float64)
        self._done += student.shape[2]
        loss, terms, stats = (t.data_ptr() for t in self.outputs)
        last = self._done == self._columns
        call.forward(stats, terms, loss, _level(), self._running.data_ptr(), first, last)


def distill_backward(
    grad: Tensor, stats: Tensor, student: Tensor, *rest: Any, out: Tensor | None = None
) -> Tensor:
    """Gradient [V, B, K] of the student's dtype; arguments after `student` as in the forward.

    It needs no more of other columns than the stats say. With `out`, contiguous, what is written
    there stays in the caches: it is a chunk of columns for the next product.
    """
    reused = out is not None
    if out is None:
        out = torch.empty(student.shape, dtype=student.dtype)
    grad = grad.to(accumulation_dtype(student)).contiguous()  # expanded gradients have stride 0
    call, _alive = native_call(student, *rest)
    call.backward(stats.data_ptr(), grad.data_ptr(), out.data_ptr(), _level(), reused)
    return out


def column_mean(logits: Tensor) -> Tensor:
    """Mean [K] of logits [..., K] over all rows, of the arithmetic's dtype."""
    rows = logits.resolve_neg().reshape(-1, logits.shape[-1])
    mean = torch.empty(rows.shape[1], dtype=accumulation_dtype(logits))
    row = rows.data_ptr(), TYPES[rows.dtype], *rows.stride()
    threads = torch.get_num_threads()
    native.column_mean(row, *rows.shape, mean.data_ptr(), threads, _level())
    return mean


def weight_norm(v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments and results as `weight_norm._forward`."""
    found, norms = v.new_empty(v.shape, dtype=dtype), v.new_empty(len(v))
    call, _alive = _weight_norm_call(v, g, norms, dtype)
    call.forward(found.data_ptr(), _level())
    return found, norms


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `weight_norm._backward`."""
    for_v, for_g = v.new_empty(v.shape), g.new_empty(g.shape)
    grad = grad.contiguous()  # expanded gradients have stride 0
    call, _alive = _weight_norm_call(v, g, norms, grad.dtype)
    call.backward(grad.data_ptr(), for_v.data_ptr(), for_g.data_ptr(), _level())
    return for_v, for_g


def _weight_norm_call(
    v: Tensor, g: Tensor, norms: Tensor, dtype: torch.dtype
) -> tuple[Any, list[Tensor]]:
    """The native call and the tensors that must live as long as it."""
    alive = [v.contiguous(), g.contiguous(), norms]
    at = [t.data_ptr() for t in alive]
    return native.WeightNorm(at, v.shape, TYPES[dtype], torch.get_num_threads()), alive


@constant
def bf16_why_not() -> str | None:
    """Why the kernels that multiply bf16 cannot run here, or None."""
    if native is None:
        return missing
    if _level() not in ("", LEVELS[-1]):
        return f"{LEVEL}={_level()} asks for less than bf16 products"
    if not native.has_bf16():
        return "this processor, or the compiler, has no bf16 products (AVX512-BF16)"
    return None


@constant
def fp32_why_not() -> str | None:
    """Why the products of fp32 with prototypes are left to PyTorch here, or None."""
    if native is None:
        return missing
    if native.cpu_level(_level()) == LEVELS[0]:
        return "without AVX2 its products of fp32 are slower than the library's"
    return None


def prototype_linear(x: Tensor, w: Tensor) -> Tensor:
    """Arguments and result as `prototype_linear._product`."""
    out = w.new_empty(*x.shape[:-1], len(w))
    call, _alive = _prototype_linear_call(w.dtype, x, w, None, None, None)
    call.forward(out.data_ptr(), _level())
    return out


def normed_linear(x: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments and results as `prototype_linear._forward`."""
    out, norms = v.new_empty(*x.shape[:-1], len(v), dtype=dtype), v.new_empty(len(v))
    call, _alive = _prototype_linear_call(dtype, x, None, v, g, norms)
    call.forward(out.data_ptr(), _level())
    return out, norms


def normed_linear_backward(
    grad: Tensor, x: Tensor, v: Tensor, g: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as `prototype_linear._backward`."""
    found = for_x, for_v, for_g, norm = (
        *(v.new_empty(t.shape) for t in (x, v, g)),
        v.new_empty(()),
    )
    grad = grad.contiguous()  # expanded gradients have stride 0
    call, _alive = _prototype_linear_call(grad.dtype, x, None, v, g, norms)
    call.backward(grad.data_ptr(), [t.data_ptr() for t in found], _level())
    return for_x.to(x.dtype), for_v, for_g, norm


def _prototype_linear_call(
    dtype: torch.dtype, x: Tensor, *matrix: Tensor | None
) -> tuple[Any, list[Tensor | None]]:
    """The native call for x, w, v, g, norms, and the tensors that must live as long as it."""
    kind = native.PrototypeLinearFp32 if dtype == torch.float32 else native.PrototypeLinearBf16
    alive = [x.to(dtype).contiguous(), *(None if t is None else t.contiguous() for t in matrix)]
    at = [0 if t is None else t.data_ptr() for t in alive]
    prototypes = next(len(t) for t in matrix if t is not None)
    sizes = x.numel() // x.shape[-1], prototypes, x.shape[-1]
    return kind(at, sizes, torch.get_num_threads()), alive


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    eps: float,
    relu: bool,
    moving: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `batch_norm._forward`; `moving` statistics move in place."""
    x = _channels_last(x)
    y, stats = torch.empty_like(x), weight.new_empty(3, len(weight))
    call, _alive = _batch_norm_call(x, weight, bias, stats, relu)
    if added is not None:
        added = _channels_last(added)
    call.forward(eps, 0 if added is None else added.data_ptr(), y.data_ptr(), _level())
    move_statistics(stats, moving)
    return y, stats


def move_statistics(stats: Tensor, moving: tuple[Tensor, Tensor, float] | None) -> None:
    """Running mean and variance towards those of `batch_norm._forward`."""
    if moving is not None:
        mean, _, var = stats.unbind()
        moving[0].lerp_(mean, moving[2])
        moving[1].lerp_(var, moving[2])


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    y: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as `batch_norm._backward`."""
    x, grad = _channels_last(x), _channels_last(grad)  # expanded gradients have stride 0
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    found = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    call, _alive = _batch_norm_call(x, weight, bias, stats, relu)
    first = 0 if y is None else y.data_ptr(), added.data_ptr()
    call.backward(grad.data_ptr(), (*first, *(t.data_ptr() for t in found)), _level())
    return *found, added


def _batch_norm_call(
    x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, relu: bool
) -> tuple[Any, list[Tensor]]:
    """The native call and the tensors that must live as long as it."""
    alive = [x, weight.contiguous(), bias.contiguous(), stats]
    at, sizes = [t.data_ptr() for t in alive], (x.numel() // len(weight), len(weight))
    return native.BatchNorm(at, sizes, TYPES[x.dtype], relu, torch.get_num_threads()), alive


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Arguments and result as `matvec.matvec`."""
    matrix, vector = matrix.contiguous(), vector.contiguous()
    found, threads = vector.new_empty(len(matrix)), torch.get_num_threads()
    given = matrix.data_ptr(), TYPES[matrix.dtype], matrix.shape, vector.data_ptr()
    native.matvec(*given, found.data_ptr(), threads, _level())
    return found


def gelu(u: Tensor) -> Tensor:
    """GELU of bf16 [.., D]."""
    u = u.contiguous()
    found, sizes = torch.empty_like(u), (u.numel() // u.shape[-1], u.shape[-1])
    native.gelu(u.data_ptr(), found.data_ptr(), sizes, torch.get_num_threads(), _level())
    return found


def gelu_backward(u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of bf16 rows [R, D]: the gradient for u, GELU once more, and the gradient's sum [D] over the
    rows in fp32."""
    u, grad = u.contiguous(), grad.contiguous()
    found = torch.empty_like(u), torch.empty_like(u), u.new_empty(u.shape[1], dtype=torch.float32)
    at = [t.data_ptr() for t in (u, grad, *found)]
    native.gelu_backward(at, u.shape, torch.get_num_threads(), _level())
    return found


def sum_rows(x: Tensor) -> Tensor:
    """The sum [D] over bf16 rows [R, D], in fp32."""
    x = x.contiguous()
    found = x.new_empty(x.shape[1], dtype=torch.float32)
    native.sum_rows(x.data_ptr(), found.data_ptr(), x.shape, torch.get_num_threads(), _level())
    return found


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + y in fp32 (x where y is None), its LayerNorm in bf16, and of each row mean and scale."""
    D, period = x.shape[-1], x.numel() // x.shape[-1]
    if y is not None and x.ndim > 2 and x.stride(0) == 0 and x[0].is_contiguous():
        period //= len(x)  # expanded: its rows are read again and again
    else:
        x = x.contiguous()
    y = y if y is None else y.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    sums = x if y is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=torch.bfloat16)
    stats = x.new_empty(*x.shape[:-1], 2)
    at = [0 if t is None else t.data_ptr() for t in (x, y, weight, bias, sums, normed, stats)]
    kind, sizes = TYPES[torch.float32 if y is None else y.dtype], (stats.numel() // 2, D, period)
    native.add_norm(at, kind, eps, sizes, torch.get_num_threads(), _level())
    return sums, normed, stats


def add_norm_backward(
    dsum: Tensor | None, dnormed: Tensor, sums: Tensor, weight: Tensor, stats: Tensor, half: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients for x, the same in bf16 if `half`, for the weight and for the bias."""
    dsum = dsum if dsum is None else dsum.contiguous()
    given = sums, weight.contiguous(), stats, dsum, dnormed.contiguous()
    dx, dweight, dbias = (torch.empty_like(t) for t in (sums, weight, weight))
    dy = torch.empty_like(sums, dtype=torch.bfloat16) if half else None
    at = [0 if t is None else t.data_ptr() for t in (*given, dx, dy, dweight, dbias)]
    sizes = stats.numel() // 2, sums.shape[-1]
    native.add_norm_backward(at, sizes, torch.get_num_threads(), _level())
    return dx, dy, dweight, dbias


def clip(
    grads: Sequence[Tensor], max_norm: float, norms: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Arguments and result as `foreach._clip`."""
    known = norms is not None
    found = grads[0].new_empty(len(grads)) if norms is None else torch.stack(list(norms))
    at, sizes = [g.data_ptr() for g in grads], [g.numel() for g in grads]
    native.clip(at, sizes, max_norm, found.data_ptr(), known, torch.get_num_threads(), _level())
    if not math.isinf(max_norm):
        torch.autograd.graph.increment_version(grads)
    return list(found.unbind())


def update(
    rows: Sequence[tuple[int, ...]],
    groups: Sequence[tuple[float, ...]],
    max_norm: float,
    skip: Tensor | None,
    momentum: Tensor | None,
) -> None:
    """The pass of `update.py`; what a row and a group are, csrc/cpu/update.h says."""
    flag, follow = (0 if x is None else x.data_ptr() for x in (skip, momentum))
    native.update(rows, groups, max_norm, flag, follow, torch.get_num_threads(), _level())


def attention_forward(qkv: Tensor, sizes: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as `self_attention._forward`."""
    *rows, _, H, d = qkv.shape
    out = qkv.new_empty(*rows, H, d)
    stats = qkv.new_empty(math.prod(rows) * H, dtype=torch.float32)
    for call, shift in _attention_calls(qkv, stats, sizes, scale):
        native.attention(*call, out.data_ptr() + shift)
    return out, stats


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, sizes: list[int], scale: float
) -> Tensor:
    """Arguments and result as `self_attention._backward`."""
    grad, found = grad.contiguous(), torch.empty_like(qkv)
    for call, shift in _attention_calls(qkv, stats, sizes, scale):
        to = out.data_ptr() + shift, grad.data_ptr() + shift, found.data_ptr() + 3 * shift
        native.attention_backward(*call, *to)
    return found


def _attention_calls(
    qkv: Tensor, stats: Tensor, sizes: list[int], scale: float
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Of each group the native call, and how many bytes of a result lie before its own."""
    *rows, _, H, d = qkv.shape
    sizes, first = sizes or rows, 0
    for B, N in zip(sizes[::2], sizes[1::2], strict=True):
        shift = first * H * d * qkv.itemsize
        at = qkv.data_ptr() + 3 * shift, stats.data_ptr() + first * H * stats.itemsize
        yield (at, (B, N, H, d), scale, torch.get_num_threads()), shift
        first += B * N


def results(student: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2] to be filled, of the arithmetic's dtype."""
    dtype = accumulation_dtype(student)
    count = len(student) + sum(len(r) for r in rows)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(len(rows), dtype=dtype),
        student.new_empty(count, student.shape[1], 2, dtype=dtype),
    )


def native_call(
    student: Tensor,
    rows: Sequence[Tensor],
    centers: Sequence[Tensor],
    row_weights: Sequence[Tensor],
    scalars: Tensor,
    pairs: Sequence[float],
    probabilities: Sequence[bool],
) -> tuple[Any, list[Tensor]]:
    """The native call and the tensors that must live as long as it."""
    dtype = accumulation_dtype(student)
    if scalars.shape != (1 + 2 * len(rows),):
        raise ValueError(f"scalars must be [{1 + 2 * len(rows)}], got {list(scalars.shape)}")
    if not len(rows) == len(centers) == len(row_weights) == len(probabilities):
        raise ValueError("rows, centers, row_weights and probabilities must have an entry a target")
    alive = [t.to(dtype).contiguous() for t in (*centers, *row_weights, scalars)]
    at = [t.data_ptr() if t.numel() else 0 for t in alive]
    targets = zip(map(_stack, rows), at, at[len(rows) :], probabilities, strict=False)
    sizes = *student.shape[1:], torch.get_num_threads()
    return native.Distill(_stack(student), list(targets), pairs, at[-1], *sizes), alive


def _stack(rows: Tensor) -> tuple[int, ...]:
    """Address, type, count and strides of logits [rows, B, K]."""
    return rows.data_ptr(), TYPES[rows.dtype], rows.shape[0], *rows.stride()


def _search_pass(call: Any, to: Sequence[int]) -> None:
    call.forward(to, _level())


def _search_pass_back(call: Any, stats: Tensor, width: int, arguments: Sequence[Any]) -> None:
    call.backward(*arguments, _level())


def search_forward(
    x: Tensor, k: Tensor, v: Tensor, weights: bool, run: Callable[..., None] = _search_pass
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search`; `run` launches it, on another device in `cuda`."""
    (Q, B, H, d), wide = x.shape, accumulation_dtype(x)
    call, _alive = _search_call(None, k, v, x, None, None)
    rows, stats = (x.new_empty(B, Q, H, size, dtype=wide) for size in (d, 2))
    shares = x.new_empty((Q, B, H, k.shape[2]) if weights else 0, dtype=wide)
    run(call, (rows.data_ptr(), stats.data_ptr(), shares.data_ptr() if weights else 0, 0, 0))
    return rows, stats, shares


def search_backward(
    grad: Tensor,
    stats: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    run: Callable[..., None] = _search_pass_back,
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._search_backward`."""
    call, _alive = _search_call(None, k, v, x, None, None)
    dk, dv = (t.new_empty(t.transpose(1, 2).shape) for t in (k, v))
    found = x.new_empty(x.shape), dk, dv
    grad = _dense(grad).transpose(0, 1)
    to = 0, dk.data_ptr(), dv.data_ptr(), found[0].data_ptr(), 0, 0
    run(call, stats, x.shape[-1], (0, stats.data_ptr(), _map(grad), _map(None), to))
    return found


def joint_forward(
    q: Tensor, k: Tensor, v: Tensor, *queries: Tensor, run: Callable[..., None] = _search_pass
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._joint`."""
    (Q, B, H, d), N, wide = queries[0].shape, q.shape[2], accumulation_dtype(q)
    call, _alive = _search_call(q, k, v, *queries)
    tokens, query = q.new_empty(Q, B, N, H, d), q.new_empty(Q, B, H, d)
    rows, stats = (q.new_empty(B, N + Q, H, size, dtype=wide) for size in (d, 2))
    run(call, (rows.data_ptr(), stats.data_ptr(), 0, tokens.data_ptr(), query.data_ptr()))
    return tokens, query, rows, stats


def joint_backward(
    grad_tokens: Tensor,
    grad_query: Tensor,
    rows: Tensor,
    stats: Tensor,
    *tensors: Tensor,
    run: Callable[..., None] = _search_pass_back,
) -> tuple[Tensor, ...]:
    """Arguments and results as `search._joint_backward`."""
    call, _alive = _search_call(*tensors)
    found = (
        *(t.new_empty(t.transpose(1, 2).shape) for t in tensors[:3]),
        *(t.new_empty(t.shape) for t in tensors[3:]),
    )
    grad_tokens, grad_query = grad_tokens.contiguous(), _dense(grad_query)
    grads = _map(grad_query), _map(grad_tokens[:, :, :, 0])
    to = [t.data_ptr() for t in found]
    run(call, stats, rows.shape[-1], (rows.data_ptr(), stats.data_ptr(), *grads, to))
    return found


def _search_call(*tensors: Tensor | None) -> tuple[Any, list[Tensor | None]]:
    """The native call for q, k, v, q_x, k_x, v_x, and the tensors that must live as long as it."""
    alive = [t if t is None else _dense(t) for t in tensors]
    x, k = alive[3], alive[1]
    assert x is not None and k is not None
    sizes = *x.shape[:3], *k.shape[2:]
    maps = [_map(t) for t in alive]
    return native.Search(maps, sizes, TYPES[x.dtype], torch.get_num_threads()), alive


def _dense(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _map(tensor: Tensor | None) -> tuple[int, int, int, int, int]:
    """Address, type and the strides of all dimensions but the last."""
    if tensor is None:
        return 0, 0, 0, 0, 0
    return tensor.data_ptr(), TYPES[tensor.dtype], *tensor.stride()[:-1]  # type: ignore[return-value]


def augment_why_not(crops: Tensor) -> str | None:
    """Why the kernel cannot take these crops, or None."""
    if crops.device.type != "cpu":
        return f"it takes tensors on the CPU, these are on {crops.device}"
    return missing if native is None else None


def augment_crops(
    crops: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Arguments and result as `augment.augment_crops`."""
    B, H, W, C = crops.shape
    out = torch.empty(crops.shape, dtype=dtype)
    native.augment_crops(
        *((crops.data_ptr(), *crops.stride()[:2]), (B, H, W, C), params.data_ptr()),
        *(*affine(mean, std), out.data_ptr(), TYPES[dtype], torch.get_num_threads(), _level()),
    )
    return out.permute(0, 3, 1, 2)


def _level() -> str:
    """What MOKD_FAST_CPU_LEVEL asks for; ValueError if it is no level. The native module refuses a
    level that this processor cannot run."""
    level = os.environ.get(LEVEL, "")
    if level and level not in LEVELS:
        raise ValueError(f"{LEVEL} must be {', '.join(LEVELS)} or empty, got {level!r}")
    return level
