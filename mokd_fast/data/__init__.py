"""Pictures in, batches of uint8 views out: sources, stateless augmentation numbers, loaders."""

from .batches import Views
from .builtin import fashion_mnist_or_digits
from .loader import ViewLoader, choose_loader, finish, normalize
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
    "choose_loader",
    "decode",
    "draw_views",
    "epoch_order",
    "fashion_mnist_or_digits",
    "finish",
    "normalize",
    "open_source",
    "render",
]
