"""`mokd-fast views`: what is drawn is what the loaders make."""

import numpy as np
import pytest
from PIL import Image

from mokd_fast.data import AugmentConfig, decode, draw_views, epoch_order, open_source, render
from mokd_fast.report.views import _numbers, views_picture

AUGMENT = AugmentConfig(global_size=128, local_size=128, locals=1)  # cells are 128 wide


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        noise = rng.integers(0, 256, (6, 7, 3), np.uint8)
        big = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
        big.save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def test_cells_are_the_views(pictures):
    source = open_source(pictures)
    page = np.asarray(views_picture(source, AUGMENT, images=3, loaders=("pillow",), seed=3))
    tops = np.flatnonzero((page[:, 136 + 64] == 0x99).all(-1))[::2]  # the upper edges of view 1
    for top, i in zip(tops, epoch_order(3, 3, 0).tolist(), strict=True):
        image = decode(source.read(i), 3)
        params = draw_views(AUGMENT, 3, 0, i, image.height, image.width)
        for v, view in enumerate(render(image, params, AUGMENT)):
            left = 136 * (v + 1)
            drawn = page[top + 1 : top + 127, left + 1 : left + 127]
            assert np.array_equal(drawn, view[1:-1, 1:-1])  # but for the cell's edge


def test_a_loader_is_no_distance_from_itself(pictures):
    page = views_picture(open_source(pictures), AUGMENT, images=9, loaders=("cpu", "cpu"))
    page = np.asarray(page)
    black = (page[:, 137:263] == 0).all((1, 2))  # rows of view 1's column
    assert black.sum() == 3 * 126  # of as many pictures as there are


def test_odd_names(pictures):
    plain = views_picture(open_source(pictures), AUGMENT, images=3)
    (pictures / "0.png").rename(pictures / ("0 ☃\n" + "long" * 20 + ".png"))
    assert views_picture(open_source(pictures), AUGMENT, images=3).size == plain.size


def test_numbers_are_told(pictures):
    (first, *_) = draw_views(AUGMENT, 0, 0, 1, 70, 90)
    told = " ".join(_numbers(first))
    assert told.startswith(f"{first.height} x {first.width} at {first.top}, {first.left}")
    for op in first.order or ():
        assert f"{'bcsh'[op]} {first.factors[op]:+.2f}" in told
    assert ("blur" in told) == (first.sigma > 0) and ("flip" in told) == first.flip
