"""The official MOKD training step (CVPR 2023), written anew in plain PyTorch.

It is two things at once: the slow side of every speed figure and the oracle of the parity tests.
So it does what the published step does, in its order and at its cost: one softmax chain for each of
the 18 pairs of a loss, materialised attention, a copy of the teacher's map for every local query,
two backward passes, host syncs for every clipped tensor, an EMA loop in Python. Nothing here may be
made faster, and nothing here knows `mokd_fast`.

Beyond the official step: any two models, non-square images, and training without local crops.
"""

from bench.baseline.heads import MLPHead, THead
from bench.baseline.layers import WeightNormLinear, resize_positions
from bench.baseline.losses import DINOLoss, SearchLoss, cosine_schedule, temperature_schedule
from bench.baseline.model import OfficialModel, ema_twin
from bench.baseline.optim import (
    ModelSettings,
    clip_per_tensor_,
    ema_,
    official_settings,
    parameter_groups,
)
from bench.baseline.step import OfficialStep
from bench.baseline.vit import VisionTransformer

__all__ = [
    "DINOLoss",
    "MLPHead",
    "ModelSettings",
    "OfficialModel",
    "OfficialStep",
    "SearchLoss",
    "THead",
    "VisionTransformer",
    "WeightNormLinear",
    "clip_per_tensor_",
    "cosine_schedule",
    "ema_",
    "ema_twin",
    "official_settings",
    "parameter_groups",
    "resize_positions",
    "temperature_schedule",
]
