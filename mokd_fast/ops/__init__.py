"""The fused operators. Imports torch only."""

from .augment import augment_crops, augment_params
from .batch_norm import batch_norm
from .center import Center, sinkhorn_center
from .column_mean import column_mean
from .dispatch import explain
from .distill import Target, cross_view_pairs, distill_cross_entropy, matched_pairs
from .foreach import clip_grad_per_tensor_, ema_update_, grad_norms
from .linear_distill import LinearTarget, linear_distill_cross_entropy
from .prototype_linear import prototype_linear
from .prototype_loss import prototype_loss
from .search import feature_search, joint_attention
from .self_attention import self_attention
from .update import Clip, Ema, update_
from .weight_norm import WeightNormed, weight_norm

__all__ = [
    "Center",
    "Clip",
    "Ema",
    "LinearTarget",
    "Target",
    "WeightNormed",
    "augment_crops",
    "augment_params",
    "batch_norm",
    "clip_grad_per_tensor_",
    "column_mean",
    "cross_view_pairs",
    "distill_cross_entropy",
    "ema_update_",
    "explain",
    "feature_search",
    "grad_norms",
    "joint_attention",
    "linear_distill_cross_entropy",
    "matched_pairs",
    "prototype_linear",
    "prototype_loss",
    "self_attention",
    "sinkhorn_center",
    "update_",
    "weight_norm",
]
