"""Backbones, heads and the method."""

from .backbones import Features, build_backbone, features
from .build import build_mokd
from .checkpointing import checkpoint_activations
from .heads import MLPHead, THead
from .mokd import MOKD, Model, Temperatures
from .prototypes import PrototypeLoss, Prototypes

__all__ = [
    "MOKD",
    "Features",
    "MLPHead",
    "Model",
    "PrototypeLoss",
    "Prototypes",
    "THead",
    "Temperatures",
    "build_backbone",
    "build_mokd",
    "checkpoint_activations",
    "features",
]
