"""Where a network looks: attention weights, recomputed from the modules of its own blocks.

Letters: B images, N tokens of a map, C and D widths, Q queries, H attention heads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from ..errors import UserError
from ..nn import blocks, features
from ..nn.heads import THead
from ..nn.packed import PackedAttention


def block_attention(block: nn.Module, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of a timm `Block` for tokens x. [B, N, C] -> [B, H, N, N]

    Each row sums to 1. Raises UserError for attention that is computed otherwise (windows,
    relative positions): its weights are not these.
    """
    attn: Any = getattr(block, "attn", None)
    if type(attn) not in (Attention, blocks.Attention, PackedAttention):
        raise UserError(
            f"attention maps are known for timm's plain ViT blocks, not for {type(block).__name__} "
            f"with {type(attn).__name__}"
        )
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1))  # type: ignore[operator]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    q, k = attn.q_norm(q), attn.k_norm(k)
    return ((q * attn.scale) @ k.mT).softmax(dim=-1)


def class_attention(backbone: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """What the last block of a ViT looks at. Pictures [B, channels, H, W] -> [B, H, N]

    The second result: True for the class token's row; False for a ViT without one, where it is
    the mean row of all tokens. Class and register tokens are left out, so the weights of a
    picture sum to less than 1. Raises UserError when `backbone` is no plain timm ViT.
    """
    if type(backbone) is not VisionTransformer:
        raise UserError(f"{type(backbone).__name__} is no plain ViT of timm: no class attention")
    last = backbone.blocks[-1]
    inputs: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        features(backbone, x)
    finally:
        handle.remove()
    weights = block_attention(last, inputs[0])[..., backbone.num_prefix_tokens :]
    if backbone.cls_token is None:
        return weights.mean(dim=2), False
    return weights[:, :, 0], True


def t_head_attention(head: THead, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention that each token gets in a T-Head's last block, mean over the tokens that look.

    tokens [B, N, C] of a backbone's map -> [B, H, N]; the weights of a picture sum to 1.
    """
    *_, weights = _each_block(head, head.embed(tokens, grid))
    return weights.mean(dim=2)


def search_attention(head: THead, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
    """The query's attention over the map in every block of `THead.search`.

    tokens [B, N, C], queries [Q, B, D] -> [depth, Q, B, H, N]; each row sums to 1. In a joint
    search the query's weight for itself is left out and the rest scaled. There the row of the last
    block changes nothing of the output, which drops the query's own token; the rows before it do,
    through what the query has become when the next block's tokens look at it.
    """
    if head.mode == "cross":
        return head.looks(tokens, grid, queries)
    x = head.join(tokens, grid, queries)
    rows = torch.stack([weights[:, :, 0, 1:] for weights in _each_block(head, x)])
    rows = rows / rows.sum(dim=-1, keepdim=True)
    return rows.unflatten(1, queries.shape[:2])


def _each_block(head: THead, x: Tensor) -> Iterator[Tensor]:
    for block in head.blocks:
        yield block_attention(block, x)
        x = block(x)
