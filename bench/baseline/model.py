"""One of MOKD's two models: a backbone with its MLP-Head and T-Head, as a student or a teacher."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baseline.heads import MLPHead, THead
from bench.baseline.vit import VisionTransformer


class OfficialModel(nn.Module):
    """`backbone` is our VisionTransformer or a CNN with timm's forward_features -> [B, C, H, W].

    Crops of one call have one size and run as one batch (one BatchNorm batch, too). Build timm
    CNNs with `num_classes=0`: a classifier would stay without a gradient.
    """

    def __init__(self, backbone: nn.Module, mlp_head: MLPHead, t_head: THead) -> None:
        super().__init__()
        self.backbone = backbone
        self.mlp_head = mlp_head
        self.t_head = t_head

    @property
    def is_vit(self) -> bool:
        return isinstance(self.backbone, VisionTransformer)

    def features(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """V crops [B, C, h, w] -> pooled [V*B, width], tokens [V*B, N, width], map size."""
        images = torch.cat(tuple(crops))
        if self.is_vit:
            tokens, size = self.backbone(images)
            return tokens[:, 0], tokens[:, 1:], size  # the T-Head never sees the class token
        fmap = self.backbone.forward_features(images)  # type: ignore[operator]
        pooled = F.adaptive_avg_pool2d(fmap, 1).flatten(1)
        return pooled, fmap.flatten(2).transpose(1, 2), (fmap.shape[-2], fmap.shape[-1])

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Student: MLP-Head logits [V*B, K], T-Head logits [V*B, K], queries [V*B, D].

        The query is the pooled or class feature brought to the T-Head's width. A CNN takes the mean
        of its stem's map, which is the same thing, the stem being affine.
        """
        pooled, tokens, size = self.features(crops)
        t_logits, stem_mean = self.t_head(tokens, size)
        query = pooled
        if self.t_head.stem is not None:
            query = self.t_head.stem(pooled) if self.is_vit else stem_mean
        return self.mlp_head(pooled), t_logits, query

    def teach(self, crops: Sequence[Tensor], queries: Tensor, n_local: int) -> tuple[Tensor, ...]:
        """Teacher on the two global crops: MLP-Head, T-Head [2*B, K] and searched logits.

        With local crops, `queries` are those of the other student's n_local local crops, [L*B, D],
        and all of them search view 1: searched [L*B, K]. Without (ours; the official step cannot
        run so), they are those of its two global crops and search the view they did not come
        from: row block v is the search of view v's query in the map of view 1 - v.
        """
        pooled, tokens, size = self.features(crops)
        t_logits, _ = self.t_head(tokens, size)
        first, second = tokens.chunk(2)  # each [B, N, width]
        # A copy of the map for every query, stem and blocks run anew on each: slow on purpose.
        maps = first.repeat(n_local, 1, 1) if n_local else torch.cat((second, first))
        searched, _ = self.t_head(maps, size, queries)
        return self.mlp_head(pooled), t_logits, searched


def ema_twin(student: OfficialModel) -> OfficialModel:
    """A teacher: same weights and buffers, no gradient, no drop path or dropout, train mode.

    The teacher normalises by its own batch statistics, hence train mode; so everything random has
    to be switched off by hand.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0  # type: ignore[assignment]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return teacher
