"""The fused operators. Imports torch only."""

from .center import Center, sinkhorn_center
from .dispatch import explain
from .distill import Target, cross_view_pairs, distill_cross_entropy, matched_pairs
from .foreach import clip_grad_per_tensor_, ema_update_
from .reference import column_mean

__all__ = [
    "Center",
    "Target",
    "clip_grad_per_tensor_",
    "column_mean",
    "cross_view_pairs",
    "distill_cross_entropy",
    "ema_update_",
    "explain",
    "matched_pairs",
    "sinkhorn_center",
]
