"""timm's transformer blocks as they are fastest on the CPU: attention, the MLP, and what stands
between the products (ops/block.py, ops/self_attention.py). Modules, parameters and keys stay
timm's: `quicken` changes classes, and what a class here cannot do as one it does as timm.
"""

from typing import Any

import timm.layers
import timm.models.vision_transformer as vit
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every

from ..ops import block, cpu, onednn, self_attention


class Linear(nn.Linear):
    """nn.Linear whose products are oneDNN's (ops/onednn.py says when and why)."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn.trained_linear(x, self.weight, self.bias)


class Attention(vit.Attention):
    """timm's, by `ops.self_attention` where `fused_attn`, which means PyTorch's, is off."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(a is not None and a is not False for a in (*args, *kwargs.values()))
        if masked or not self.plain():
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        heard = self.attend(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
        return self.proj_drop(self.proj(self.norm(heard.flatten(2))))

    def plain(self) -> bool:
        """Whether queries, keys and values are used as the layer gives them and nothing else, and
        there is a kernel for them."""
        gated = getattr(self, "gate", None) is not None  # not every timm has it
        if self.fused_attn or gated or (self.training and self.attn_drop.p):
            return False
        if self.head_dim % 16 or cpu.bf16_why_not() is not None:
            return False
        norms = type(self.q_norm) is type(self.k_norm) is nn.Identity
        return norms and unhooked(self.q_norm, self.k_norm, self.attn_drop)

    def attend(self, qkv: Tensor, groups: list[tuple[int, int]] | None = None) -> Tensor:
        """As `ops.self_attention`."""
        return self_attention(qkv, groups=groups, scale=self.scale)


class Mlp(timm.layers.Mlp):
    """timm's, as one operator where a plain GELU stands between its layers (ops/block.py)."""

    def forward(self, x: Tensor) -> Tensor:
        if not half_precision(x) or not self._plain():
            found: Tensor = super().forward(x)
            return found
        fc1, fc2 = self.fc1, self.fc2
        y = block.mlp(x.bfloat16(), (fc1.weight, fc1.bias), (fc2.weight, fc2.bias))
        dropped: Tensor = self.drop2(y)
        return dropped

    def _plain(self) -> bool:
        return (
            type(self.fc1) is type(self.fc2) is Linear
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and type(self.norm) is nn.Identity
            and not (self.training and self.drop1.p)
            and unhooked(self.fc1, self.act, self.drop1, self.norm, self.fc2)
        )


class Block(vit.Block):
    """timm's; a residual sum and the LayerNorm after it, with its cast, are one operator."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not half_precision(x) or not self._plain(x):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        x, normed = add_norm(x, None, self.norm1, torch.bfloat16)
        y = self.drop_path1(self.ls1(self.attn(normed, *args, **kwargs)))
        x, normed = add_norm(x, y, self.norm2, torch.bfloat16)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))

    def _plain(self, x: Tensor) -> bool:
        """Whether what follows the norms takes bf16 as well as what they give."""
        known = isinstance(self.attn, vit.Attention) and isinstance(self.mlp, timm.layers.Mlp)
        return known and plain_norm(self.norm1, x) and plain_norm(self.norm2, x)


def half_precision(x: Tensor) -> bool:
    """Whether layers of x work in bf16 by autocast, on a CPU that has products of it."""
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()  # Inductor fuses by itself
        and onednn.usable("cpu", torch.bfloat16)
    )


def plain_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether `add_norm` takes it for x."""
    if type(norm) not in (nn.LayerNorm, timm.layers.LayerNorm) or norm.bias is None:
        return False
    plain = norm.normalized_shape == x.shape[-1:] and not getattr(norm, "_fast_norm", False)
    return plain and unhooked(norm)


def watched() -> bool:
    """Whether somebody looks at all modules."""
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)


def unhooked(*modules: nn.Module) -> bool:
    """Whether nobody asked to be told when these run."""
    return not watched() and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def add_norm(
    x: Tensor, y: Tensor | None, norm: nn.Module, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + y, and its LayerNorm in `dtype` (ops/block.py)."""
    return block.add_norm(x, y, norm.weight, norm.bias, norm.eps, dtype)  # type: ignore[arg-type]


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    vit.Attention: Attention,
    timm.layers.Mlp: Mlp,
    vit.Block: Block,
}
