"""MOKD's two projection heads: MLP-Head (DINO's head) and T-Head (three transformer blocks)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baseline.layers import Block, WeightNormLinear, init_transformer, resize_positions


class MLPHead(nn.Module):
    """Linear-GELU stack to a bottleneck, L2-norm, weight-normed prototypes.

    `norm_last_layer` keeps the prototype norms at 1; officially True for the CNN, False for the
    ViT. Shapes: [B, in_dim] -> [B, out_dim].
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if use_bn else []), nn.GELU()]
        last = nn.Linear(widths[-1], bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        self.mlp.apply(init_transformer)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_g=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class THead(nn.Module):
    """Transformer head over a feature map, alone or together with one query token.

    `grid` is the (H, W) of the map that a full-size crop gives; other sizes resize the position
    embedding. The stem projects `width` to `dim`. A CNN has one even where the two are equal; a
    ViT needs one only where they differ. It is a linear layer on tokens, the same product as a 1x1
    convolution on the map, and keeps PyTorch's default init, as the official convolution does.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        out_dim: int,
        grid: tuple[int, int],
        depth: int = 3,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        stem: bool = False,
    ) -> None:
        super().__init__()
        if not stem and width != dim:
            raise ValueError(f"a T-Head of width {dim} on features of width {width} needs a stem")
        self.grid = (grid[0], grid[1])
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_transformer)
        # after init_transformer, which must touch neither
        self.stem = nn.Linear(width, dim) if stem else None
        self.last_layer = WeightNormLinear(dim, out_dim)

    def forward(
        self, tokens: Tensor, size: tuple[int, int], query: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, N, width] of a map of `size`, query [B, dim] -> logits [B, K], pooled stem.

        The second value is the mean of the stem's output, [B, dim], and None without a stem: it is
        the CNN's query. There is no L2-norm before the last layer.
        """
        pooled = None
        if self.stem is not None:
            tokens = self.stem(tokens)  # [B, N, D]
            pooled = tokens.mean(dim=1)
        x = tokens + resize_positions(self.pos_embed, self.grid, size)
        if query is not None:
            x = torch.cat((query.unsqueeze(1), x), dim=1)  # the query gets no position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if query is not None:
            x = x[:, 1:]  # the query has steered the tokens; its own output is thrown away
        return self.last_layer(x.mean(dim=1)), pooled
