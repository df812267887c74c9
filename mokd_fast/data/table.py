"""The numbers of drawn views as the table that `ops.augment_crops` takes."""

from collections.abc import Sequence

import numpy as np
import torch

from ..ops.augment import settle_hue_
from .params import ViewParams

_NONE = (-1, -1, -1, -1)


def augment_table(views: Sequence[ViewParams]) -> np.ndarray:
    """float32 [len(views), 12], columns as in `ops.augment_crops`; `torch.from_numpy` takes it."""
    rows = [(p.flip, *(p.order or _NONE), *p.factors, p.grey, p.sigma, p.solarize) for p in views]
    table = np.array(rows, np.float64).reshape(-1, 12)
    settle_hue_(torch.from_numpy(table))
    return table.astype(np.float32)
