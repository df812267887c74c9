"""self_attention: tokens over the tokens of their own image, from the packed result of one layer.

    out[b,n] = sum_m softmax_m(q[b,n] k[b,m]^T scale) v[b,m]

On the CPU PyTorch's attention is slow in bf16, and in products one after the other the scores go
through memory several times, rounded each time. Here a head is one piece of work that keeps them
in the caches, forward and backward (csrc/cpu/attention.cpp; layers.json has both). For other
dtypes and devices it is PyTorch's attention.

Letters: B images, N tokens, H heads, d width of a head; S tokens of images of several sizes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, distill, reference
from .dispatch import pick, register
from .eager import differentiable, no_gradient, with_autograd

OP = "self_attention"


def self_attention(
    qkv: Tensor,
    *,
    groups: Sequence[tuple[int, int]] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each image's tokens over all of them, differentiable in qkv.

    Args:
        qkv: floating [B, N, 3, H, d], N >= 1: queries, keys and values. With `groups` [S, 3, H, d].
        groups: (B, N) of each group of images of one size, as they follow each other.
        scale: of the scores; None for 1 / sqrt d.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does.

    Returns:
        [B, N, H, d], with `groups` [S, H, d]; contiguous on the CPU in bf16.

    Raises:
        ValueError: qkv of another shape or no floating dtype, groups that are not its S tokens.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> self_attention(torch.randn(2, 49, 3, 4, 32)).shape
        torch.Size([2, 49, 4, 32])
    """
    sizes = [] if groups is None else _sizes(groups)
    wanted, dims = ("[B, N, 3, H, d]", 5) if groups is None else ("[S, 3, H, d]", 4)
    fits = qkv.ndim == dims and qkv.shape[-3] == 3 and 0 not in qkv.shape[1:]
    if not (fits and qkv.is_floating_point()):
        raise ValueError(
            f"qkv must be floating {wanted} with N, H and d >= 1, "
            f"got {qkv.dtype} of shape {list(qkv.shape)}"
        )
    if groups is not None and (tokens := sum(_tokens(sizes))) != len(qkv):
        raise ValueError(f"groups have {tokens} tokens, qkv {list(qkv.shape)} has {len(qkv)}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    out: Tensor = pick(OP, qkv, sizes, scale, backend=backend).run(qkv, sizes, scale)
    return out


def _sizes(groups: Sequence[tuple[int, int]]) -> list[int]:
    """B and N of each group in turn."""
    found = list(groups)
    for group in found:
        numbers = list(group) if isinstance(group, tuple | list) else [group]
        whole = all(isinstance(number, int | torch.SymInt) for number in numbers)
        if len(numbers) != 2 or not whole or numbers[0] < 0 or numbers[1] < 1:
            raise ValueError(f"groups must be pairs (B, N) of B >= 0 and N >= 1, got {group!r}")
    if not found:
        raise ValueError("groups is empty: leave it out for qkv [B, N, 3, H, d]")
    return [number for group in found for number in group]


def _tokens(sizes: list[int]) -> list[int]:
    """Of each group, from B and N in turn."""
    return [B * N for B, N in zip(sizes[::2], sizes[1::2], strict=True)]


@torch.library.custom_op("mokd_fast::attention_forward", mutates_args=())
def _forward(qkv: Tensor, sizes: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """The result, and of each row log2 of its sum of exponentials, fp32: [B, H, N] side by side.
    sizes: B and N of each group in turn; none for qkv [B, N, 3, H, d]."""
    return cpu.attention_forward(qkv, sizes, scale)


@_forward.register_fake
def _(qkv, sizes, scale):
    *rows, _, H, d = qkv.shape
    return qkv.new_empty(*rows, H, d), qkv.new_empty(math.prod(rows) * H, dtype=torch.float32)


@torch.library.custom_op("mokd_fast::attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, sizes: list[int], scale: float
) -> Tensor:
    return cpu.attention_backward(grad, qkv, out, stats, sizes, scale)


@_backward.register_fake
def _(grad, qkv, out, stats, sizes, scale):
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.sizes, ctx.scale


def _gradients(ctx: Any, grads: Any, found: Tensor) -> tuple[Tensor, Any, None]:
    return found, no_gradient(ctx.needs_input_grad[1]), None


_KERNELS = cpu.attention_forward, cpu.attention_backward
_eager = with_autograd(OP, (_forward, _backward), _KERNELS, _save, _arguments, _gradients)


def _cpu(qkv: Tensor, sizes: list[int], scale: float) -> Tensor:
    qkv = qkv.resolve_neg().contiguous()
    if not distill.plain((qkv,)):
        return _forward(qkv, sizes, scale)[0]
    if differentiable((qkv,)):
        out: Tensor = _eager(qkv, sizes, scale)[0]
        return out
    return cpu.attention_forward(qkv, sizes, scale)[0]


def _cpu_why_not(qkv: Tensor, groups: Any = None, scale: float | None = None) -> str | None:
    if reason := distill.transformed(qkv) or cpu.why_not(qkv):
        return reason
    if qkv.dtype != torch.bfloat16:
        return f"it takes bf16, this is {qkv.dtype}"
    if qkv.shape[-1] % 16:
        return f"it takes heads of whole vectors (16 numbers), these are {qkv.shape[-1]} wide"
    if scale is not None and not scale >= 0:
        return f"it takes a scale of 0 or more, this is {scale}"
    found: str | None = cpu.bf16_why_not()
    return found


def _sdpa(qkv: Tensor, scale: float) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _sdpa_why_not(qkv: Tensor, groups: Any = None, scale: float | None = None) -> str | None:
    return distill.transformed(qkv)


def _by_group(attend: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """Of qkv [B, N, 3, H, d] and a scale, for groups as well."""

    def run(qkv: Tensor, sizes: list[int], scale: float) -> Tensor:
        if not sizes:
            return attend(qkv, scale)
        parts = zip(qkv.split(_tokens(sizes)), sizes[::2], sizes[1::2], strict=True)
        found = [attend(part.unflatten(0, (B, N)), scale).flatten(0, 1) for part, B, N in parts]
        return torch.cat(found)

    return run


register(OP, "cpu", _cpu, _cpu_why_not)
register(OP, "sdpa", _by_group(_sdpa), _sdpa_why_not)
register(OP, "reference", _by_group(reference.self_attention))
