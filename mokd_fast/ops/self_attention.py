"""self_attention: tokens over the tokens of their own image, from the packed result of one layer.

    out[b,n] = sum_m softmax_m(q[b,n] k[b,m]^T scale) v[b,m]

On the CPU PyTorch's attention is slow in bf16, and in products one after the other the scores go
through memory several times, rounded each time. Here a head is one piece of work that keeps them
in the caches, forward and backward (csrc/cpu/attention.cpp; layers.json has both). For other
dtypes and devices it is PyTorch's attention.

Letters: B images, N tokens, H heads, d width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, distill, reference
from .dispatch import pick, register
from .eager import differentiable, with_autograd

OP = "self_attention"


def self_attention(
    qkv: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention of each image's tokens over all of them, differentiable in qkv. [B, N, H, d]

    Args:
        qkv: floating [B, N, 3, H, d], N >= 1: queries, keys and values.
        scale: of the scores; None for 1 / sqrt d.
        backend: forces a backend, as the environment variable MOKD_FAST_BACKEND does.

    Raises:
        ValueError: qkv of another shape or no floating dtype.
        RuntimeError: the forced backend cannot run on these arguments.

    Example:
        >>> import torch
        >>> self_attention(torch.randn(2, 49, 3, 4, 32)).shape
        torch.Size([2, 49, 4, 32])
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point() or 0 in qkv.shape[1:]:
        raise ValueError(
            "qkv must be floating [B, N, 3, H, d] with N, H and d >= 1, "
            f"got {qkv.dtype} of shape {list(qkv.shape)}"
        )
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    out: Tensor = pick(OP, qkv, scale, backend=backend).run(qkv, scale)
    return out


@torch.library.custom_op("mokd_fast::attention_forward", mutates_args=())
def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result [B, N, H, d], and of each row log2 of its sum of exponentials [B, H, N], fp32."""
    return cpu.attention_forward(qkv, scale)


@_forward.register_fake
def _(qkv, scale):
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d), qkv.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("mokd_fast::attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, scale: float) -> Tensor:
    return cpu.attention_backward(grad, qkv, out, stats, scale)


@_backward.register_fake
def _(grad, qkv, out, stats, scale):
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _arguments(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.scale


def _gradients(ctx: Any, grads: Any, found: Tensor) -> tuple[Tensor, None]:
    return found, None


_KERNELS = cpu.attention_forward, cpu.attention_backward
_eager = with_autograd(OP, (_forward, _backward), _KERNELS, _save, _arguments, _gradients)


def _cpu(qkv: Tensor, scale: float) -> Tensor:
    qkv = qkv.resolve_neg().contiguous()
    if not distill.plain((qkv,)):
        return _forward(qkv, scale)[0]
    if differentiable((qkv,)):
        out: Tensor = _eager(qkv, scale)[0]
        return out
    return cpu.attention_forward(qkv, scale)[0]


def _cpu_why_not(qkv: Tensor, scale: float | None = None) -> str | None:
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


def _sdpa_why_not(qkv: Tensor, scale: float | None = None) -> str | None:
    return distill.transformed(qkv)


register(OP, "cpu", _cpu, _cpu_why_not)
register(OP, "sdpa", _sdpa, _sdpa_why_not)
register(OP, "reference", reference.self_attention)
