"""The two heads of a MOKD model: MLPHead (DINO's) and THead (transformer, with the search).

Both give features; their logits are head.last_layer(features), which the losses need not make.

Letters: B images, N tokens, C backbone width, D T-Head width, K prototypes, Q queries.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .backbones import resize_positions
from .prototypes import Prototypes


class MLPHead(nn.Module):
    """Linear-GELU, ..., Linear to a bottleneck of D, L2 norm. [B, C] -> [B, D]"""

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        train_norm: bool = False,
    ) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for _ in range(layers - 1):
            steps.append(nn.Linear(width, hidden))
            if batch_norm:
                steps.append(nn.BatchNorm1d(hidden))
            steps.append(nn.GELU())
            width = hidden
        self.mlp = nn.Sequential(*steps, nn.Linear(width, bottleneck))
        self.mlp.apply(_init)
        self.last_layer = Prototypes(bottleneck, prototypes, train_norm=train_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1)


class THead(nn.Module):
    """Transformer head over a token map; also the place where the other model's queries search.

    [stem C -> D,] + position embedding, pre-norm blocks, LayerNorm, mean over tokens; no L2 norm
    before the prototypes, whose g is trained (official MOKD).

    Args:
        width: C of the tokens.
        dim: D of the blocks. Both models of a pair share it, so that queries fit.
        grid: (h, w) the position embedding is made for; other grids resize it.
        stem: project C -> D first. Needed when C != D; a CNN has one always.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        dim: int,
        grid: tuple[int, int],
        stem: bool,
        depth: int = 3,
        heads: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
                for _ in range(depth)
            )
        )
        self.norm = norm(dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(_init)
        # The stem and the prototypes keep PyTorch's own init, as the official ones do.
        self.stem: nn.Module = nn.Linear(width, dim) if stem else nn.Identity()
        self.last_layer = Prototypes(dim, prototypes, train_norm=True)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Plain embedding of a token map. [B, N, C] -> [B, D]"""
        return self._pool(self.embed(tokens, grid))

    def query(self, pooled: Tensor) -> Tensor:
        """What this model asks the other teacher's map for. [B, C] -> [B, D]

        For a CNN the stem of the pooled feature is the pooled stem of the map, as official.
        No gradient: the stem is trained by the plain path alone.
        """
        return self.stem(pooled.detach()).detach()

    def search(self, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
        """Embedding of a map as seen with each query. [B, N, C], [Q, B, D] -> [Q, B, D]

        The official search is joint self-attention: the query (without position) joins the tokens
        in every block, its own output is dropped and the tokens are averaged.
        """
        x = self.join(tokens, grid, queries)
        return self._pool(x, skip=1).unflatten(0, queries.shape[:2])

    def join(self, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
        """Each query before the tokens of the map: what the blocks see. -> [Q*B, 1+N, D]"""
        x = self.embed(tokens, grid).expand(len(queries), -1, -1, -1)  # [Q, B, N, D]
        return torch.cat([queries.unsqueeze(2).to(x.dtype), x], dim=2).flatten(0, 1)

    def embed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of a map, projected and with their positions. [B, N, C] -> [B, N, D]"""
        return self.stem(tokens) + resize_positions(self.pos_embed, self.grid, grid)

    def _pool(self, x: Tensor, skip: int = 0) -> Tensor:
        x = self.norm(self.blocks(x))[:, skip:]
        return x.mean(dim=1)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
