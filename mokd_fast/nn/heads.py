"""The two heads of a MOKD model: MLPHead (DINO's) and THead (transformer, with the search).

Both give features; their logits are head.last_layer(features), which the losses need not make.

Letters: B images, N tokens, C backbone width, D T-Head width, K prototypes, Q queries.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops import cpu, feature_search, joint_attention, onednn, self_attention
from . import packed
from .backbones import resize_positions
from .blocks import add_norm
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
        self.whole = not batch_norm  # rows do not see each other
        self.mlp = nn.Sequential(*steps, nn.Linear(width, bottleneck))
        self.mlp.apply(_init)
        self.last_layer = Prototypes(bottleneck, prototypes, train_norm=train_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1)


# Bytes of all queries' tokens that a search works on at a time, on the CPU and on a GPU: few enough
# for all that a block makes to stay in the caches, enough for products to be as fast as of more
# (linear_parts.json); no GPU has measured the other.
GROUP = {"cpu": 600 << 10, "cuda": 48 << 20}

Memory = list[tuple[Tensor, Tensor]]  # keys and values of each block, [B, H, N, d] of B maps


class Between(nn.Module):
    """What a search does in a block between two attentions, of tensors alone and without parameters
    of its own, so that `compile_blocks` can compile it: sums, LayerNorms, casts and GELU are fused.
    Uncompiled `Layers` does it step by step."""

    def forward(
        self, x: Tensor, found: Tensor | None, norm: list[Tensor], eps: float, *layers: list[Tensor]
    ) -> Tensor:
        """x [..., D]; of norm and of each layer weight and bias, a layer's as its product has them.
        Without `found` what the layer makes of x's norm, with it as `Layers.block`."""

        def normed(x: Tensor) -> Tensor:
            weight, bias = norm
            return F.layer_norm(x, weight.shape, weight, bias, eps).to(layers[0][0].dtype)

        if found is None:
            return F.linear(normed(x), *layers[0])
        proj, fc1, fc2 = layers
        x = x + F.linear(found, *proj)
        return x + F.linear(F.gelu(F.linear(normed(x), *fc1)), *fc2)


class Layers:
    """A transformer block's layers as one search uses them: their weights are cast once, for x's
    dtype or autocast's, and kept until `forget`; without gradients products on the CPU are
    oneDNN's, with GELU inside (ops/onednn.py says why). Elsewhere `between` makes what it can,
    where it has been compiled."""

    def __init__(self, x: Tensor, between: Between) -> None:
        kind = x.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.onednn = plain and onednn.usable(kind, self.dtype)
        compiled = between._compiled_call_impl is not None and not self.onednn
        self.between = between if compiled else None
        self.cast: dict[nn.Module, list[Tensor]] = {}
        width = x.shape[-1] * self.dtype.itemsize
        self.group = max(1, GROUP.get(kind, GROUP["cuda"]) // width)  # tokens

    def __call__(
        self, layer: nn.Linear, x: Tensor, *, gelu: bool = False, only: slice = slice(None)
    ) -> Tensor:
        parameters = self.parameters(layer, only)
        x = x.to(self.dtype)
        if self.onednn and x.numel():
            return onednn.linear(x, *parameters, gelu=gelu)
        y = F.linear(x, *parameters)
        return F.gelu(y) if gelu else y

    def parameters(self, layer: nn.Linear, only: slice = slice(None)) -> list[Tensor]:
        """Its weight and bias, cast."""
        if layer not in self.cast:
            self.cast[layer] = [p.to(self.dtype) for p in (layer.weight, layer.bias)]
        return [p[only] for p in self.cast[layer]]

    def together(self, count: int, tokens: int) -> int:
        """How many of `count`, each of so many tokens, go through a block at a time."""
        most = max(1, self.group // max(1, tokens))
        if self.between is None or not count:
            return most
        # Each size is compiled for itself: as even as can be there are two at most, mostly one.
        return -(-count // -(-count // most))

    def attends(self, qkv: Tensor) -> bool:
        """Whether `self_attention` has a kernel for heads [.., d]."""
        fits = qkv.dtype == torch.bfloat16 and not qkv.shape[-1] % 16
        return self.onednn and fits and cpu.bf16_why_not() is None

    def forget(self) -> None:
        """Before another block: of one block's weights 16-bit copies are alive at a time."""
        self.cast.clear()

    def block(self, block: nn.Module, x: Tensor, found: Tensor) -> Tensor:
        """What a block makes of x [..., D] once its heads have found something."""
        if self.between is not None:
            of = [self.parameters(m) for m in (block.attn.proj, block.mlp.fc1, block.mlp.fc2)]  # type: ignore
            shape, found = x.shape, found.to(self.dtype)
            if x.is_contiguous():  # [Q, B, 1+N, D] of the first block is the size of those after it
                x, found = x.flatten(0, -3), found.flatten(0, -3)
            made: Tensor = self.between(x, found, *_norm(block.norm2), *of)  # type: ignore[arg-type]
            return made.view(shape)
        y = self(block.attn.proj, found)  # type: ignore[union-attr, arg-type]
        x, normed = add_norm(x, y, block.norm2, self.dtype)  # type: ignore[arg-type]
        # No name for what lies between: it is the largest tensor here, and gone before the sum.
        return x + self(block.mlp.fc2, self(block.mlp.fc1, normed, gelu=True))  # type: ignore

    def after_norm(
        self, norm: nn.Module, layer: nn.Linear, x: Tensor, only: slice = slice(None)
    ) -> Tensor:
        """What a layer, or some of its rows, makes of a LayerNorm of x."""
        if self.between is not None:
            made: Tensor = self.between(x, None, *_norm(norm), self.parameters(layer, only))
            return made
        return self(layer, add_norm(x, None, norm, self.dtype)[1], only=only)


def _norm(norm: nn.Module) -> tuple[list[Tensor], float]:
    return [norm.weight, norm.bias], norm.eps  # type: ignore[list-item, return-value]


class THead(nn.Module):
    """Transformer head over a token map; also the place where the other model's queries search.

    [stem C -> D,] + position embedding, pre-norm blocks, LayerNorm, mean over tokens; no L2 norm
    before the prototypes, whose g is trained (official MOKD).

    Args:
        width: C of the tokens.
        dim: D of the blocks. Both models of a pair share it, so that queries fit.
        grid: (h, w) the position embedding is made for; other grids resize it.
        stem: project C -> D first. Needed when C != D; a CNN has one always.
        search: what `search` computes; the parameters are the same.
            "joint", the official search: the query (without position) joins the tokens in every
            block, its own output is dropped and the tokens are averaged.
            "cross": the tokens are those of the plain pass; in every block the queries attend over
            them, and a query's own output is the embedding. Much cheaper, not the official model.
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
        search: Literal["joint", "cross"] = "joint",
    ) -> None:
        super().__init__()
        if search not in ("joint", "cross"):
            raise ValueError(f"search must be 'joint' or 'cross', got {search!r}")
        if dim % heads:
            raise ValueError(f"a T-Head of width {dim} cannot be split into {heads} heads")
        self.grid, self.heads, self.mode = grid, heads, search
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
                for _ in range(depth)
            )
        )
        self.norm = norm(dim)
        self.grad_checkpointing = False  # timm's word, see nn/checkpointing.py
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(_init)
        self.between = Between()
        # The stem and the prototypes keep PyTorch's own init, as the official ones do.
        self.stem: nn.Module = nn.Linear(width, dim) if stem else nn.Identity()
        self.last_layer = Prototypes(dim, prototypes, train_norm=True)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Plain embedding of a token map. [B, N, C] -> [B, D]"""
        x = self.embed(tokens, grid)
        return self._pool(
            checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        )

    def packed(self, maps: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
        """`forward` of each (tokens, grid), all in one pass of the blocks (see `packed`)."""
        found = packed.run(self.blocks, [self.embed(*each) for each in maps])
        return [self._pool(x) for x in found]

    def query(self, pooled: Tensor) -> Tensor:
        """What this model asks the other teacher's map for. [B, C] -> [B, D]

        For a CNN the stem of the pooled feature is the pooled stem of the map, as official.
        No gradient: the stem is trained by the plain path alone.
        """
        return self.stem(pooled.detach()).detach()

    def search(self, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
        """Embedding of a map as seen with each query. [B, N, C], [Q, B, D] -> [Q, B, D]

        Tokens are never repeated: what they say to each other in the first block is computed once
        an image. ValueError for queries of other images or another width, and tokens that are no
        `grid`.
        """
        if self.mode == "cross":
            return self.look(self.remember(tokens, grid, embedding=False)[1], queries)[0]
        x = self._embedded(tokens, grid)
        queries = self._asking(queries, len(x))
        layers = Layers(x, self.between)
        with torch.autocast(x.device.type, enabled=False):
            return self._joint(layers, x, queries)

    def remember(
        self, tokens: Tensor, grid: tuple[int, int], *, embedding: bool = True
    ) -> tuple[Tensor, Memory]:
        """The plain pass, and all that a cross search of these maps needs of it.

        tokens [B, N, C] -> what `forward` gives, [B, D] (without `embedding`, tokens before the
        last block, whose own it skips), and the keys and values of every block.
        """
        x = self._embedded(tokens, grid)
        layers, memory = Layers(x, self.between), []
        with torch.autocast(x.device.type, enabled=False):
            for block in self.blocks:
                layers.forget()
                skip = block is self.blocks[-1] and not embedding
                *q, k, v = self._qkv(layers, block, x, int(skip)).transpose(2, 3)  # [B, H, N, d]
                memory.append((k, v))
                if not skip:
                    found = feature_search(q[0].permute(2, 0, 1, 3), k, v)
                    x = layers.block(block, x, found.transpose(0, 1).flatten(2))
            return self.norm(x).mean(dim=1), memory

    def look(
        self, memory: Memory, queries: Tensor, *, weights: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """A cross search in remembered maps: queries attend over each block's keys and values.

        [Q, B, D] -> their own output [Q, B, D], and with `weights` the attention [Q, B, H, N] of
        each block.
        """
        queries = self._asking(queries, len(memory[0][0]))
        looks, layers = [], Layers(queries, self.between)
        with torch.autocast(queries.device.type, enabled=False):
            for block, (k, v) in zip(self.blocks, memory, strict=True):
                layers.forget()
                asking = self._qkv(layers, block, queries, 0, 1)[0]  # [Q, B, H, d]
                found = feature_search(asking, k, v, weights=weights)
                if weights:
                    looks.append(found[1])
                    found = found[0]
                queries = layers.block(block, queries, found.flatten(2))
            return self.norm(queries), looks

    def looks(self, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
        """A cross search's attention weights in every block. -> [depth, Q, B, H, N]"""
        memory = self.remember(tokens, grid, embedding=False)[1]
        return torch.stack(self.look(memory, queries, weights=True)[1])

    def _embedded(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if tokens.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are no map of {grid[0]} x {grid[1]}")
        return self.embed(tokens, grid)

    def _asking(self, queries: Tensor, images: int) -> Tensor:
        """Queries in the tokens' dtype: under autocast a stem gives 16 bits, which neither the
        residual sums may have nor, on a GPU, a LayerNorm of fp32 weights takes."""
        dim = self.pos_embed.shape[2]
        if queries.ndim != 3 or queries.shape[1:] != (images, dim):
            raise ValueError(
                f"queries must be [Q, B, D] = [Q, {images}, {dim}] for these tokens, "
                f"got {list(queries.shape)}"
            )
        return queries.to(self.pos_embed.dtype)

    def _joint(self, layers: "Layers", x: Tensor, queries: Tensor) -> Tensor:
        """[B, N, D], [Q, B, D] -> [Q, B, D]

        Groups of images and queries go through a block one after another, and all of them before
        the next block: what a block makes stays in the caches, its weights are cast once.
        """
        first, *rest = self.blocks
        images = layers.together(len(x), len(queries) * x.shape[1])
        parts = [
            self._first(layers, first, *part, last=not rest)
            for part in zip(x.split(images), queries.split(images, dim=1), strict=True)
        ]
        for block in rest:
            layers.forget()
            for part in parts:
                for i, y in enumerate(part):
                    part[i] = self._joined(layers, block, y, last=block is rest[-1])
        found = [torch.cat([self.norm(y).mean(dim=2) for y in part]) for part in parts]
        return torch.cat(found, dim=1)

    def _first(
        self, layers: "Layers", block: nn.Module, x: Tensor, queries: Tensor, *, last: bool
    ) -> list[Tensor]:
        """The first block: x [B, N, D] and queries [Q, B, D] to groups of [Q, B, 1+N, D]."""
        own = self._qkv(layers, block, x).transpose(2, 3)  # 3 x [B, H, N, d]
        tokens, query = joint_attention(*own, *self._qkv(layers, block, queries))
        tokens = tokens.transpose(2, 3)  # [Q, B, N, H, d]
        size = layers.together(len(queries), x.shape[0] * x.shape[1])
        parts = []
        for asking, heard, found in zip(
            queries.split(size), query.split(size), tokens.split(size), strict=True
        ):
            y = x.expand(len(asking), *x.shape)
            if not last:  # else nobody asks what becomes of the query
                y = torch.cat([asking.unsqueeze(2), y], dim=2)
                found = torch.cat([heard.unsqueeze(2), found], dim=2)
            parts.append(layers.block(block, y, found.flatten(3)))
        return parts

    def _joined(self, layers: "Layers", block: nn.Module, x: Tensor, *, last: bool) -> Tensor:
        """Another block over [Q, B, 1+N, D]; the last one drops the query."""
        y = x.flatten(0, 1)
        found = self._attend(layers, block, y, int(last))
        return layers.block(block, y[:, int(last) :], found).unflatten(0, x.shape[:2])

    def _attend(self, layers: "Layers", block: nn.Module, x: Tensor, first: int = 0) -> Tensor:
        """What the heads find where each token asks, from number `first` on. -> [.., N, D]"""
        qkv = self._qkv(layers, block, x)  # [3, .., N, H, d]
        if layers.attends(qkv):
            return self_attention(qkv.movedim(0, 2))[:, first:].flatten(2)
        q, k, v = qkv.transpose(2, 3)  # [.., H, N, d]
        found: Tensor = feature_search(q[:, :, first:].permute(2, 0, 1, 3), k, v)
        return found.transpose(0, 1).flatten(2)

    def _qkv(
        self, layers: "Layers", block: nn.Module, x: Tensor, first: int = 0, end: int = 3
    ) -> Tensor:
        """Queries, keys and values of a block's heads, from `first` to `end` of the three.
        [.., .., D] -> [end - first, .., .., H, d]"""
        D = x.shape[-1]
        only = slice(first * D, end * D)
        qkv = layers.after_norm(block.norm1, block.attn.qkv, x, only)  # type: ignore[union-attr, arg-type]
        return qkv.unflatten(2, (end - first, self.heads, -1)).movedim(2, 0)

    def join(self, tokens: Tensor, grid: tuple[int, int], queries: Tensor) -> Tensor:
        """Each query before the tokens of the map: what the blocks see. -> [Q*B, 1+N, D]"""
        x = self.embed(tokens, grid).expand(len(queries), -1, -1, -1)  # [Q, B, N, D]
        return torch.cat([queries.unsqueeze(2).to(x.dtype), x], dim=2).flatten(0, 1)

    def embed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of a map, projected and with their positions. [B, N, C] -> [B, N, D]"""
        return self.stem(tokens) + resize_positions(self.pos_embed, self.grid, grid)

    def _pool(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.norm(x).mean(dim=1)
        return pooled


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
