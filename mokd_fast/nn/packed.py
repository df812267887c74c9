"""Crops of several sizes through a transformer in one pass: their tokens stand in one row, and each
crop attends to its own alone. Fewer and larger products, and no padding.

timm's blocks do it unchanged but for what looks at single crops, attention and drop-path. Letters:
B crops of N tokens a group, S tokens of all groups, C width, H heads.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ..ops.attention import xformers_missing
from .blocks import Attention

Groups = list[tuple[int, int]]  # B and N of each


@cache  # for good: a CUDA graph reads it where it was
def _mask(groups: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """xformers' for packs of these crops. The host makes it and copies it to the device, so blocks
    find it made: neither a compiled one nor a recording could."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([N for B, N in groups for _ in range(B)]).to(device)


class PackedAttention(Attention):
    """timm's, over [1, S, C] where `groups` is set and as ever where it is not."""

    groups: Groups | None = None
    mask: Any = None  # of the groups, for xformers

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.groups is None:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        qkv = self.qkv(x[0]).unflatten(1, (3, self.num_heads, -1))  # [S, 3, H, d]
        if self.mask is not None:
            heard = self._xformers(qkv)
        elif self.plain():
            heard = self.attend(qkv, self.groups)
        else:
            sizes = [B * N for B, N in self.groups]
            parts = zip(qkv.split(sizes), self.groups, strict=True)
            heard = torch.cat([self._group(part, *group) for part, group in parts])
        return self.proj_drop(self.proj(self.norm(heard.flatten(1)))).unsqueeze(0)

    def _group(self, qkv: Tensor, B: int, N: int) -> Tensor:  # [B*N, 3, H, d] -> [B*N, H, d]
        q, k, v = qkv.unflatten(0, (B, N)).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * self.scale) @ k.transpose(2, 3)).softmax(dim=-1) @ v
        return out.transpose(1, 2).flatten(0, 1)

    def _xformers(self, qkv: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        q, k, v = qkv.unsqueeze(0).unbind(2)  # [1, S, H, d]
        q, k = self.q_norm(q), self.k_norm(k)
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=self.mask)
        return out[0]


class PackedDropPath(DropPath):
    """Drops whole crops of a pack."""

    groups: Groups | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None or not self.drop_prob or not self.training:
            found: Tensor = super().forward(x)
            return found
        kept = super().forward(x.new_ones(sum(B for B, _ in self.groups), 1))  # 0 or 1 / keep
        parts = zip(kept.split([B for B, _ in self.groups]), self.groups, strict=True)
        return x * torch.cat([part.expand(shape).flatten() for part, shape in parts]).unsqueeze(1)


def packs(model: nn.Module) -> bool:
    """Whether `run` takes its blocks: a plain ViT with timm's own attention and nothing dropped
    within it."""
    if type(model) is not vit.VisionTransformer:
        return False
    attentions: list[Any] = [getattr(block, "attn", None) for block in model.blocks]
    return all(
        type(attn) in (vit.Attention, Attention, PackedAttention)
        and getattr(attn, "gate", None) is None
        and not attn.attn_drop.p
        for attn in attentions
    )


def prepare(model: nn.Module) -> None:
    """Lets the attention and drop-path of `model` take packs, in place."""
    swaps = {vit.Attention: PackedAttention, Attention: PackedAttention, DropPath: PackedDropPath}
    for module in model.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]


@contextmanager
def _packing(blocks: nn.Module, groups: Groups, device: torch.device) -> Any:
    members = [m for m in blocks.modules() if isinstance(m, PackedAttention | PackedDropPath)]
    mask = (
        _mask(tuple(groups), device) if device.type == "cuda" and not xformers_missing() else None
    )
    for member in members:
        member.groups = groups
        if isinstance(member, PackedAttention):
            member.mask = mask
    try:
        yield
    finally:
        for member in members:
            member.groups = None
            if isinstance(member, PackedAttention):
                member.mask = None


def run(blocks: nn.Module, groups: Sequence[Tensor]) -> list[Tensor]:
    """What prepared blocks make of each group [B, N, C], all in one pass."""
    shapes = [(x.shape[0], x.shape[1]) for x in groups]
    rows = torch.cat([x.flatten(0, 1) for x in groups]).unsqueeze(0)  # [1, S, C]
    with _packing(blocks, shapes, rows.device):
        rows = blocks(rows)[0]
    parts = rows.split([B * N for B, N in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
