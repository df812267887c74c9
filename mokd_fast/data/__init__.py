"""Pictures in, batches of uint8 views out: sources, stateless augmentation numbers, loaders."""

from mokd_fast.data.builtin import fashion_mnist_or_digits
from mokd_fast.data.loader import ViewLoader, Views, normalize
from mokd_fast.data.params import AugmentConfig, ViewParams, draw_views, epoch_order
from mokd_fast.data.pillow import decode, render
from mokd_fast.data.sources import Source, open_source

__all__ = [
    "AugmentConfig",
    "Source",
    "ViewLoader",
    "ViewParams",
    "Views",
    "decode",
    "draw_views",
    "epoch_order",
    "fashion_mnist_or_digits",
    "normalize",
    "open_source",
    "render",
]
