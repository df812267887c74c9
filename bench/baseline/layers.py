"""Transformer layers as the official MOKD step runs them: plain PyTorch, nothing fused.

That is on purpose: attention stores its [B, heads, N, N] probabilities, position embeddings are
resized on every forward and weight-normed prototypes rebuilt on every call, because the published
training step pays for all three and a faster one is measured against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose weight is g * v / |v|, row by row (arXiv 1602.07868).

    Same arithmetic and parameter names as `torch.nn.utils.weight_norm`, which is deprecated. As
    there, the weight is rebuilt on every forward. v starts as PyTorch's default linear weight, g
    as 1; `train_g=False` keeps g at 1 ("norm_last_layer" of DINO).
    """

    def __init__(self, in_dim: int, out_dim: int, train_g: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_g)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., K]
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DropPath(nn.Module):
    """Drops the residual branch of whole samples and rescales the kept ones by 1 / keep."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        one_a_sample = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = (keep + torch.rand(one_a_sample, dtype=x.dtype, device=x.device)).floor()
        return x.div(keep) * mask


class Attention(nn.Module):
    """Multi-head self-attention with an explicit softmax, scale head_dim ** -0.5."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} cannot be split into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        scores = (q @ k.transpose(-2, -1)) * (D // self.heads) ** -0.5  # [B, heads, N, N], stored
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class FeedForward(nn.Module):
    """fc1 - GELU - fc2, named as timm names them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; LayerNorm eps is 1e-6, not PyTorch's 1e-5."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_positions(pos: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize a [1, H0*W0, D] position embedding from `grid` to `size`: [1, h*w, D].

    Bicubic without antialiasing. PyTorch samples with the given factor (h + 0.1) / H0, not with
    h / H0, so the 0.1 changes the values as well as guarding the floor of the output size.
    """
    if tuple(size) == tuple(grid):
        return pos
    (H0, W0), (h, w), D = grid, size, pos.shape[-1]
    plane = pos.reshape(1, H0, W0, D).permute(0, 3, 1, 2)
    factors = ((h + 0.1) / H0, (w + 0.1) / W0)
    plane = F.interpolate(plane, scale_factor=factors, mode="bicubic")
    if plane.shape[-2:] != (h, w):
        raise RuntimeError(f"positions came out as {tuple(plane.shape[-2:])}, not {(h, w)}")
    return plane.permute(0, 2, 3, 1).reshape(1, h * w, D)


def init_transformer(module: nn.Module) -> None:
    """For `Module.apply`: linear layers trunc-normal 0.02 with bias 0, LayerNorms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
