"""feature_search and joint_attention: queries that look features up in an image's map of tokens.

feature_search is cross attention, all queries of an image over that image's tokens:

    out[q,b] = softmax(x[q,b] k[b]^T / sqrt d) v[b]

joint_attention is what the official MOKD search does in a block: each query joins the tokens, and
both attend over the tokens and this query. What tokens say to tokens is the same for every query,
so it is made once an image, o with (max, sum), and each query is merged in, exactly:

    token = o + share * (v_x - o)    share = w / (w + sum)    w = exp((q k_x - max) / sqrt d)

Letters: Q queries, B images, H heads, N tokens, d width of a head; M rows that attend over the
tokens (the queries, and in joint_attention the N tokens before them).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import attention, cpu, cuda, reference  # noqa: F401  (attention registers its backends)
from .dispatch import pick, register
from .distill import plain, transformed, triton_why_not
from .eager import differentiable, kernel, with_autograd

WIDTHS = (16, 128)  # of a head, that the kernels take


def feature_search(
    query: Tensor, key: Tensor, value: Tensor, *, weights: bool = False, backend: str | None = None
) -> Any:
    """Attention of Q queries an image over that image's N shared tokens.

    Args:
        query: [Q, B, H, d]; fp16, bf16, fp32 or fp64, any strides. The arithmetic is fp32 (fp64
            for fp64), under autocast too.
        key, value: [B, H, N, d] of the same dtype, N >= 1.
        weights: also return the attention weights, [Q, B, H, N], detached, of the arithmetic's
            dtype: for pictures, made in the same pass.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does.

    Returns:
        [Q, B, H, d] with gradients for all three; with `weights` a pair.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> maps = torch.randn(2, 5, 4, 49, 32)  # keys and values of five images
        >>> feature_search(torch.randn(8, 5, 4, 32), *maps).shape
        torch.Size([8, 5, 4, 32])
    """
    _check({"key": key, "value": value}, {"query": query})
    found = pick("feature_search", query, key, value, weights, backend=backend)
    out, shares = found.run(query, key, value, weights)
    return (out, shares.detach()) if weights else out


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_x: Tensor,
    k_x: Tensor,
    v_x: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention of [query; tokens] for Q queries an image, tokens never repeated.

    Args:
        q, k, v: [B, H, N, d] of the tokens, N >= 1; dtypes and strides as in `feature_search`.
        q_x, k_x, v_x: [Q, B, H, d] of the queries.
        backend: forces a backend.

    Returns:
        tokens [Q, B, H, N, d] as they are with each query, and query [Q, B, H, d], with gradients
        for all six. In memory the tokens are [Q, B, N, H, d]: the heads join without a copy.

    Raises: as `feature_search`.
    """
    _check({"q": q, "k": k, "v": v}, {"q_x": q_x, "k_x": k_x, "v_x": v_x})
    chosen = pick("joint_attention", q, k, v, q_x, k_x, v_x, backend=backend)
    tokens, query = chosen.run(q, k, v, q_x, k_x, v_x)
    return tokens, query


@torch.library.custom_op("mokd_fast::search_forward", mutates_args=())
def _search(
    x: Tensor, k: Tensor, v: Tensor, weights: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, Q, H, d], stats [B, Q, H, 2] (csrc/core/search.h), weights [Q, B, H, N] or empty; of
    the arithmetic's dtype."""
    return _kernels(backend).search_forward(x, k, v, weights)


@_search.register_fake
def _(x, k, v, weights, backend):
    (Q, B, H, d), wide = x.shape, reference.accumulation_dtype(x)
    shares = (Q, B, H, k.shape[2]) if weights else (0,)
    return tuple(x.new_empty(shape, dtype=wide) for shape in ((B, Q, H, d), (B, Q, H, 2), shares))


@torch.library.custom_op("mokd_fast::search_backward", mutates_args=())
def _search_backward(
    grad: Tensor, stats: Tensor, x: Tensor, k: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [Q, B, H, d] and twice [B, N, H, d], from that of the rows."""
    return _kernels(backend).search_backward(grad, stats, x, k, v)


@_search_backward.register_fake
def _(grad, stats, x, k, v, backend):
    return x.new_empty(x.shape), *(t.new_empty(t.transpose(1, 2).shape) for t in (k, v))


@torch.library.custom_op("mokd_fast::joint_forward", mutates_args=())
def _joint(
    q: Tensor, k: Tensor, v: Tensor, q_x: Tensor, k_x: Tensor, v_x: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [Q, B, N, H, d], query [Q, B, H, d], then rows and stats of all N + Q rows."""
    return _kernels(backend).joint_forward(q, k, v, q_x, k_x, v_x)


@_joint.register_fake
def _(q, k, v, q_x, k_x, v_x, backend):
    (Q, B, H, d), N, wide = q_x.shape, q.shape[2], reference.accumulation_dtype(q)
    rows = (q.new_empty(B, N + Q, H, size, dtype=wide) for size in (d, 2))
    return q.new_empty(Q, B, N, H, d), q.new_empty(Q, B, H, d), *rows


@torch.library.custom_op("mokd_fast::joint_backward", mutates_args=())
def _joint_backward(
    grad_tokens: Tensor,
    grad_query: Tensor,
    rows: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_x: Tensor,
    k_x: Tensor,
    v_x: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients [B, N, H, d] of q, k and v, [Q, B, H, d] of q_x, k_x and v_x."""
    grads = grad_tokens, grad_query, rows, stats
    return _kernels(backend).joint_backward(*grads, q, k, v, q_x, k_x, v_x)


@_joint_backward.register_fake
def _(grad_tokens, grad_query, rows, stats, q, k, v, q_x, k_x, v_x, backend):
    own = (t.new_empty(t.transpose(1, 2).shape) for t in (q, k, v))
    return *own, *(t.new_empty(t.shape) for t in (q_x, k_x, v_x))


def _save_search(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _search_arguments(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.backend


def _search_gradients(ctx: Any, grads: Any, found: tuple[Tensor, ...]) -> tuple[Any, ...]:
    dx, dk, dv = found
    return dx, dk.transpose(1, 2), dv.transpose(1, 2), None, None


def _save_joint(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[2:])  # materialize_grads stays: one of two may be missing


def _joint_arguments(ctx: Any, tokens: Tensor, query: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    return tokens, query, *ctx.saved_tensors, ctx.backend


def _joint_gradients(ctx: Any, grads: Any, found: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return *(t.transpose(1, 2) for t in found[:3]), *found[3:], None


def _kernels(backend: str) -> Any:
    """The module of a backend. Triton is imported at first use, as in `distill._kernels`."""
    if backend == "triton":
        from mokd_fast.kernels import search

        return search
    return {"cpu": cpu, "cuda": cuda}[backend]


_kernel = partial(kernel, lambda backend: _kernels(backend))  # as in ops/distill.py
_eager_search = with_autograd(
    "feature_search",
    (_search, _search_backward),
    (_kernel("search_forward"), _kernel("search_backward")),
    _save_search,
    _search_arguments,
    _search_gradients,
)
_eager_joint = with_autograd(
    "joint_attention",
    (_joint, _joint_backward),
    (_kernel("joint_forward"), _kernel("joint_backward")),
    _save_joint,
    _joint_arguments,
    _joint_gradients,
)


def _run_search(
    backend: str, query: Tensor, key: Tensor, value: Tensor, weights: bool
) -> tuple[Tensor, Tensor]:
    tensors = tuple(t.resolve_neg() for t in (query, key, value))
    if not plain(tensors):
        rows, _, shares = _search(*tensors, weights, backend)
    elif differentiable(tensors):
        rows, _, shares = _eager_search(*tensors, weights, backend)
    else:
        rows, _, shares = _kernels(backend).search_forward(*tensors, weights)
    return rows.transpose(0, 1).to(query.dtype), shares


def _run_joint(backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    tensors = tuple(t.resolve_neg() for t in tensors)
    if not plain(tensors):
        tokens, query, *_ = _joint(*tensors, backend)
    elif differentiable(tensors):
        tokens, query, *_ = _eager_joint(*tensors, backend)
    else:
        tokens, query, *_ = _kernels(backend).joint_forward(*tensors)
    return tokens.transpose(2, 3), query


def why_not(backend: str, first: Tensor, *rest: Any, weights: bool = False) -> str | None:
    """Why the kernels of a backend cannot take these tensors, or None."""
    tensors = [t for t in rest if isinstance(t, Tensor)]
    if reason := transformed(first, *tensors):
        return reason
    if backend == "triton" and (reason := triton_why_not(first)):
        return reason
    low, high = WIDTHS
    if not low <= first.shape[-1] <= high:
        return f"it takes heads {low} to {high} wide, these are {first.shape[-1]}"
    kernels = _kernels(backend)
    ask = kernels.search_why_not if backend == "cuda" else kernels.why_not
    found: str | None = ask(first, tensors)
    return found


def _simple(*tensors: Any, weights: bool = False) -> str | None:
    return "but it is the simple form: 1.9 to 180 times sdpa's time (bench/search_gpu.py)"


def _slower(query: Tensor, key: Tensor, value: Tensor, weights: bool = False) -> str | None:
    """On a GPU, forward and backward; sdpa gives no weights."""
    return None if weights else "but sdpa takes 0.2 to 0.8 of its time (bench/search_gpu.py)"


def _avoid(query: Tensor, key: Tensor, value: Tensor, weights: bool = False) -> str | None:
    """Where PyTorch's attention is faster on the CPU: fp32 with few queries and a backward pass
    (bench/search.py)."""
    if weights or query.dtype != torch.float32 or not 1 <= len(query) <= 4:
        return None
    if not differentiable((query, key, value)):
        return None
    return "but for so few fp32 queries an image, with backward, sdpa takes 0.7 to 0.95 of its time"


for _op, _run in (("feature_search", _run_search), ("joint_attention", _run_joint)):
    register(_op, "cuda", partial(_run, "cuda"), partial(why_not, "cuda"), _simple)
register(
    "feature_search",
    "triton",
    partial(_run_search, "triton"),
    partial(why_not, "triton"),
    _slower,
)
register("feature_search", "cpu", partial(_run_search, "cpu"), partial(why_not, "cpu"), _avoid)
register("feature_search", "reference", reference.feature_search)
register("joint_attention", "triton", partial(_run_joint, "triton"), partial(why_not, "triton"))
register("joint_attention", "cpu", partial(_run_joint, "cpu"), partial(why_not, "cpu"))
register("joint_attention", "reference", reference.joint_attention)


def _check(maps: dict[str, Tensor], queries: dict[str, Tensor]) -> None:
    """Maps [B, H, N, d] of one shape, queries [Q, B, H, d] of one shape that fit."""
    name, first = next(iter(maps.items()))
    if first.ndim != 4 or first.dtype not in cpu.TYPES or 0 in first.shape[1:]:
        raise ValueError(
            f"{name} must be fp16, bf16, fp32 or fp64 [B, H, N, d] with H, N and d >= 1, "
            f"got {first.dtype} of shape {list(first.shape)}"
        )
    B, H, _, d = first.shape
    asked, x = next(iter(queries.items()))
    if x.ndim != 4 or x.shape[1:] != (B, H, d):
        raise ValueError(
            f"{asked} must be [Q, B, H, d] = [Q, {B}, {H}, {d}] for {name} of shape "
            f"{list(first.shape)}, got {list(x.shape)}"
        )
    for label, tensor in (*maps.items(), *queries.items()):
        like = first if label in maps else x
        if tensor.shape != like.shape:
            raise ValueError(
                f"{label} must be {list(like.shape)} like {name if like is first else asked}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{label} must be {first.dtype} on {first.device} like {name}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
