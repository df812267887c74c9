"""The vision transformer of the official step, under timm's parameter names."""

import torch
from torch import Tensor, nn

from bench.baseline.layers import Block, init_transformer, resize_positions


class PatchEmbed(nn.Module):
    """One convolution, kernel = stride = patch: [B, C, H, W] -> [B, D, H/patch, W/patch]."""

    def __init__(self, patch: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VisionTransformer(nn.Module):
    """ViT with a class token; `grid` is the (h, w) of the position embedding.

    `patch_embed` replaces the patch convolution by any module [B, C, H, W] -> [B, D, h, w]. Drop
    path grows linearly from 0 in the first block to `drop_path` in the last.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (14, 14),
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch: int = 16,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        patch_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.patch_embed = patch_embed or PatchEmbed(patch, in_chans, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_transformer)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """images [B, C, H, W] -> tokens after the last norm [B, 1+N, D], map size (h, w)."""
        fmap = self.patch_embed(images)  # [B, D, h, w]
        size = (fmap.shape[-2], fmap.shape[-1])
        x = fmap.flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        patches = resize_positions(self.pos_embed[:, 1:], self.grid, size)
        x = x + torch.cat((self.pos_embed[:, :1], patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), size
