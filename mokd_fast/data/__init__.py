"""Pictures in, batches of uint8 views out: sources, stateless augmentation numbers, loaders."""

from .builtin import fashion_mnist_or_digits
from .loader import ViewLoader, Views, normalize
from .params import AugmentConfig, ViewParams, draw_views, epoch_order
from .pillow import decode, render
from .sources import Source, open_source
from .table import augment_table

__all__ = [
    "AugmentConfig",
    "Source",
    "ViewLoader",
    "ViewParams",
    "Views",
    "augment_table",
    "decode",
    "draw_views",
    "epoch_order",
    "fashion_mnist_or_digits",
    "normalize",
    "open_source",
    "render",
]
