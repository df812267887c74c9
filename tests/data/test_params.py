import math
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from mokd_fast.data.params import AugmentConfig, draw_views, epoch_order, philox

MASK = 2**64 - 1
DRAWS = 3000
GOLDEN_BOXES = [(71, 90, 254, 328), (66, 15, 302, 367), (45, 186, 228, 182)]
GOLDEN_FLAGS = [
    (False, (0, 3, 1, 2), False, False),
    (True, (1, 0, 3, 2), False, False),
    (False, (0, 3, 1, 2), False, False),
]
GOLDEN_NUMBERS = [
    [1.134656645394, 1.255249218399, 0.800628026556, 0.013497685621, 0.522396063795],
    [1.161058484112, 1.155894119711, 1.125256864080, 0.032091412530, 1.948048908488],
    [1.171764069839, 0.665981916760, 1.080805506382, -0.050821846150, 1.852644542251],
]
GOLDEN_ORDER = [828, 916, 742, 351]


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. (SC 2011), in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_philox_is_the_published_one():
    known = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert philox4x64([0] * 4, [0] * 2) == [int(x, 16) for x in known.split()]  # Random123's KAT
    for seed, epoch, index, purpose in [(0, 0, 0, 0), (7, 3, 12345, 1), (MASK, 99, 2**40, 0)]:
        blocks = [philox4x64([b, index, purpose, 0], [seed, epoch]) for b in (1, 2, 3)]
        assert philox(seed, epoch, index, purpose, 12).tolist() == [x for b in blocks for x in b]


def test_a_negative_seed_is_a_seed():
    assert philox(-1, 0, 0, 0, 2).tolist() == philox(MASK, 0, 0, 0, 2).tolist()


def test_golden_views():
    cfg = AugmentConfig(locals=1, blur=(1.0, 1.0, 1.0))
    got = draw_views(cfg, 3, 2, 41, 375, 500)
    boxes = [(p.top, p.left, p.height, p.width) for p in got]
    assert boxes == GOLDEN_BOXES
    assert [(p.flip, p.order, p.grey, p.solarize) for p in got] == GOLDEN_FLAGS
    numbers = [[*p.factors, p.sigma] for p in got]
    np.testing.assert_allclose(numbers, GOLDEN_NUMBERS, atol=1e-11)


def test_numbers_do_not_depend_on_the_number_of_views():
    few = draw_views(AugmentConfig(locals=0), 1, 2, 3, 300, 200)
    many = draw_views(AugmentConfig(locals=10), 1, 2, 3, 300, 200)
    assert few == many[:2] and len(many) == 12
    assert len({(p.top, p.left, p.factors) for p in many}) == 12


def test_each_probability_leaves_the_other_numbers_alone():
    a = draw_views(AugmentConfig(), 0, 0, 5, 300, 200)
    none = (0.0, 0.0, 0.0)
    b = draw_views(AugmentConfig(jitter=0, flip=0, blur=none, solarize=none), 0, 0, 5, 300, 200)
    assert [(p.top, p.left, p.factors, p.grey) for p in a] == [
        (p.top, p.left, p.factors, p.grey) for p in b
    ]


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_epoch_and_index_each_change_the_numbers(other):
    cfg = AugmentConfig()
    assert draw_views(cfg, *other, 300, 200) != draw_views(cfg, 0, 0, 0, 300, 200)


SIZES = [(300, 200), (50, 400), (28, 28), (9, 7)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("view", [0, 2])
def test_the_crops_follow_torchvisions_law(height, width, view):
    cfg = AugmentConfig(locals=1)
    scale = cfg.local_scale if view == 2 else cfg.global_scale
    ours = [draw_views(cfg, 0, 0, i, height, width)[view] for i in range(DRAWS)]
    mine = np.array([(p.top, p.left, p.height, p.width) for p in ours], float)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, scale, cfg.ratio) for _ in range(DRAWS)], float
        )
    for law in (
        lambda x: x[:, 2] * x[:, 3],
        lambda x: x[:, 3] / x[:, 2],
        lambda x: (x[:, 0] + 0.5) / (height - x[:, 2] + 1),
        lambda x: (x[:, 1] + 0.5) / (width - x[:, 3] + 1),
    ):
        assert ks_2samp(law(mine), law(theirs)).pvalue > 1e-3
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all() and (mine[:, 1] + mine[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(2000, 3), (3, 2000), (1, 1), (1, 9), (40, 30)])
def test_the_fallback_is_torchvisions(height, width):
    """A scale of 4 fits in no try, so that the fallback is all there is."""
    cfg = AugmentConfig(locals=0).model_copy(update={"global_scale": (4.0, 4.0)})
    want = RandomResizedCrop.get_params(torch.empty(1, height, width), [4.0, 4.0], cfg.ratio)
    for p in draw_views(cfg, 0, 0, 0, height, width):
        assert (p.top, p.left, p.height, p.width) == tuple(want)


def test_flags_and_factors_follow_their_laws():
    cfg = AugmentConfig(locals=1, saturation=1.5)
    draws = [draw_views(cfg, 1, 0, i, 100, 100) for i in range(DRAWS)]
    for v, kind in ((0, 0), (1, 1), (2, 2)):
        views = [d[v] for d in draws]
        for share, p in [
            (np.mean([x.flip for x in views]), cfg.flip),
            (np.mean([x.order is not None for x in views]), cfg.jitter),
            (np.mean([x.grey for x in views]), cfg.grey),
            (np.mean([x.sigma > 0 for x in views]), cfg.blur[kind]),
            (np.mean([x.solarize for x in views]), cfg.solarize[kind]),
        ]:
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS)
        ranges = [(0.6, 1.4), (0.6, 1.4), (0.0, 2.5), (-0.1, 0.1)]
        for k, (low, high) in enumerate(ranges):
            assert kstest([(x.factors[k] - low) / (high - low) for x in views], "uniform")[1] > 1e-3
        sigmas = [(x.sigma - 0.1) / 1.9 for x in views if x.sigma]
        assert kstest(sigmas, "uniform").pvalue > 1e-3
        orders = Counter(x.order for x in views if x.order)
        assert len(orders) == 24 and chisquare(list(orders.values())).pvalue > 1e-3


def test_epoch_order():
    order = epoch_order(1000, 5, 2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order[:4].tolist() == GOLDEN_ORDER
    assert (order != epoch_order(1000, 5, 3)).any() and (order != epoch_order(1000, 6, 2)).any()


def test_yaml_lists_and_whole_numbers_are_taken():
    cfg = AugmentConfig.model_validate(
        {"global_size": [32, 48], "global_scale": [1, 1], "blur": [0, 1, 0], "hue": 0}
    )
    assert cfg.global_hw == (32, 48) and cfg.local_hw == (96, 96)
    assert cfg.global_scale == (1.0, 1.0) and cfg.blur == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_size", 0),
        ("global_size", [28, 0]),
        ("local_size", -1),
        ("locals", -1),
        ("global_scale", [0.5, 0.2]),
        ("global_scale", [0.0, 1.0]),
        ("local_scale", [0.1, 1.1]),
        ("ratio", [2.0, 1.0]),
        ("flip", 1.1),
        ("jitter", -0.1),
        ("brightness", -1.0),
        ("saturation", -0.5),
        ("hue", 0.6),
        ("blur", [0.1, 0.2, 1.2]),
        ("solarize", [0.0, -1.0, 0.0]),
        ("blur_sigma", [0.0, 1.0]),
        ("blur_sigma", [0.1, 101.0]),
    ],
)
def test_out_of_range_names_the_key(key, value):
    with pytest.raises(ValidationError, match=f"Value error, {key} must be .*, got"):
        AugmentConfig.model_validate({key: value})


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("ratio", [1.0, math.inf], "ratio.1"),
        ("grey", math.nan, "grey"),
        ("contrast", math.inf, "contrast"),
    ],
)
def test_numbers_are_finite(key, value, place):
    with pytest.raises(ValidationError, match=f"{place}\n.*finite number"):
        AugmentConfig.model_validate({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_size", "28"),
        ("global_size", True),
        ("global_size", [28, 28, 3]),
        ("locals", 2.0),
        ("flip", "0.5"),
        ("blur", [0.5, 0.5]),
        ("no_such_key", 1),
    ],
)
def test_wrong_types_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        AugmentConfig.model_validate({key: value})
