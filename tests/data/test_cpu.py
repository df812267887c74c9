"""The crops of the cpu loader beside Pillow's."""

import numpy as np
import pytest
from PIL import Image

from mokd_fast.data.cpu import crops
from mokd_fast.data.params import AugmentConfig, draw_views
from mokd_fast.data.pillow import render

PLAIN = {"jitter": 0.0, "flip": 0.0, "grey": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(120, 90), (3, 40), (1, 1)])
def test_crops_are_pillows_and_in_order_in_memory(mode, size):
    """A transposed crop would cost as much as the resize when it is copied into its batch."""
    cfg = AugmentConfig(global_size=(30, 36), local_size=12, locals=3, **PLAIN)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [128 + 100 * np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)
    params = draw_views(cfg, 0, 0, 0, image.height, image.width)
    for crop, want in zip(crops(image, params, cfg), render(image, params, cfg), strict=True):
        assert crop.shape == want.shape and crop.flags.c_contiguous
        assert np.abs(crop.astype(int) - want).max() <= 1
