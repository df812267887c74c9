"""What the cpu loader does to one picture: every crop from one decode, with PyTorch's resize.

PyTorch's antialiased bicubic resize of uint8 takes a third of Pillow's time. Of photographs it ends
0.01 grey levels beside it on average, 10 at most: Pillow 13 starts with the height where that
shrinks more, PyTorch with the width, and what overshoots is clipped between (of black and white
noise, where all of it does, 4 on average). What follows a crop, flip to solarize, is left to
`ops.augment_crops`, a batch at a time, with the numbers of `augment_table`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .params import AugmentConfig, ViewParams


def crops(image: Image.Image, params: Sequence[ViewParams], cfg: AugmentConfig) -> list[np.ndarray]:
    """The views of one decoded picture, cropped and resized: uint8 [h, w, C] each."""
    pixels = np.array(image)  # [H, W] or [H, W, C]
    # [1, C, H, W] that PyTorch knows as channels_last by the strides, so that crops come out as
    # [h, w, C] in memory: 0.7 ms a picture where the transposition took 1.3 (2x224 + 8x96).
    x = torch.from_numpy(pixels.reshape(1, *pixels.shape[:2], -1)).permute(0, 3, 1, 2)
    return [
        F.interpolate(
            x[..., p.top : p.top + p.height, p.left : p.left + p.width],
            cfg.size_of(v),
            mode="bicubic",
            antialias=True,
        )[0]
        .movedim(0, -1)
        .numpy()
        for v, p in enumerate(params)
    ]
