"""What networks are worth, beside controls: kNN, few-shot, linear probe; the pointing score."""

from .features import Pictures, Pooled, extract, pixels
from .knn import few_shot_indices, knn
from .linear import LinearResult, linear_probe
from .pointing import pointing
from .suite import evaluate, format_table, same_classes

__all__ = [
    "LinearResult",
    "Pictures",
    "Pooled",
    "evaluate",
    "extract",
    "few_shot_indices",
    "format_table",
    "knn",
    "linear_probe",
    "pixels",
    "pointing",
    "same_classes",
]
