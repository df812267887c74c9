from .fused_adam import FusedAdam
from .fused_mixed_precision_lamb import FusedMixedPrecisionLamb
from .fused_sgd import FusedSGD

__all__ = ["FusedAdam", "FusedMixedPrecisionLamb", "FusedSGD"]
