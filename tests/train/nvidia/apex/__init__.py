"""Stand-in of NVIDIA apex: its signatures and what its optimizers do with them, in own words."""

from . import optimizers

__all__ = ["optimizers"]
