"""Everything is compared with torchvision's operators on PIL pictures, exactly."""

import dataclasses
import io
import itertools
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from mokd_fast.data.params import AugmentConfig, ViewParams, draw_views
from mokd_fast.data.pillow import decode, render

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
SIZES = AugmentConfig(global_size=(20, 26), local_size=12, locals=1)


PLAIN = ViewParams(3, 5, 22, 31, False, None, NEUTRAL, False, 0.0, False)


def params(**changes) -> ViewParams:
    """Nothing but a crop of a picture 40 wide and 30 high, and the changes."""
    return dataclasses.replace(PLAIN, **changes)


def jitter(*factors: float) -> ViewParams:
    return params(order=(0, 1, 2, 3), factors=factors)


def expected(image: Image.Image, p: ViewParams, size: tuple[int, int]) -> np.ndarray:
    """DINO's order in torchvision's operators."""
    bicubic = InterpolationMode.BICUBIC
    x = F.resized_crop(image, p.top, p.left, p.height, p.width, list(size), bicubic)
    x = F.hflip(x) if p.flip else x
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for op in p.order or ():
        x = adjust[op](x, p.factors[op]) if p.factors[op] != NEUTRAL[op] else x
    if p.grey:
        x = F.rgb_to_grayscale(x, num_output_channels=len(x.getbands()))
    x = x.filter(ImageFilter.GaussianBlur(p.sigma)) if p.sigma else x
    x = F.solarize(x, 128) if p.solarize else x
    return np.asarray(x).reshape(*size, -1)


def save(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


ALL = {"flip": True, "factors": (1.2, 0.8, 0.7, 0.1), "grey": True, "solarize": True}
CASES = {
    "crop": params(),
    "whole": params(top=0, left=0, height=30, width=40),
    "corner": params(top=29, left=39, height=1, width=1),
    "same size": params(height=20, width=26),
    "flip": params(flip=True),
    "darker": jitter(0.6, 1.0, 1.0, 0.0),
    "brighter": jitter(1.7, 1.0, 1.0, 0.0),
    "less contrast": jitter(1.0, 0.3, 1.0, 0.0),
    "more contrast": jitter(1.0, 1.9, 1.0, 0.0),
    "less saturation": jitter(1.0, 1.0, 0.2, 0.0),
    "more saturation": jitter(1.0, 1.0, 1.9, 0.0),
    "hue": jitter(1.0, 1.0, 1.0, 0.1),
    "hue backwards": jitter(1.0, 1.0, 1.0, -0.37),
    "hue below a step": jitter(1.0, 1.0, 1.0, -0.001),
    "grey": params(grey=True),
    "blur": params(sigma=1.3),
    "slight blur": params(sigma=0.1),
    "solarize": params(solarize=True),
    "all": params(**ALL, order=(2, 3, 1, 0), sigma=0.7),
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("case", CASES)
def test_each_operator(case, mode, make_picture):
    image = make_picture(1, (40, 30), mode)
    p = CASES[case]
    got = render(image, [p, p, p], SIZES)
    assert [x.shape[:2] for x in got] == [(20, 26), (20, 26), (12, 12)]
    for x in got:
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x, expected(image, p, x.shape[:2]))


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("whole", "corner", "same size")])
def test_each_operator_does_something(case, make_picture):
    image = make_picture(1, (40, 30))
    plain, changed = render(image, [params(), CASES[case]], SIZES)
    same = case in ("crop", "hue below a step")  # the latter is a round trip through HSV
    assert (np.abs(plain.astype(int) - changed).mean() < 2) == (same or case == "slight blur")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_order_of_the_jitter(mode, make_picture):
    image = make_picture(2, (40, 30), mode)
    seen = set()
    for order in itertools.permutations(range(4)):
        p = params(order=order, factors=(1.4, 0.6, 1.3, -0.08))
        (got,) = render(image, [p], SIZES)
        np.testing.assert_array_equal(got, expected(image, p, (20, 26)))
        seen.add(got.tobytes())
    assert len(seen) > (12 if mode == "RGB" else 1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_drawn_views(mode, make_picture):
    cfg = AugmentConfig(global_size=24, local_size=(9, 11), locals=3)
    image = make_picture(3, (40, 30), mode)
    for i in range(20):
        drawn = draw_views(cfg, 0, 0, i, image.height, image.width)
        for v, (got, p) in enumerate(zip(render(image, drawn, cfg), drawn, strict=True)):
            size = (24, 24) if v < 2 else (9, 11)
            np.testing.assert_array_equal(got, expected(image, p, size))


def test_the_picture_is_left_alone(make_picture):
    image = make_picture(4, (40, 30))
    before = image.tobytes()
    render(image, [CASES["all"]], SIZES)
    assert image.tobytes() == before


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "kind", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "webp", "bmp", "tiff"]
)
def test_formats(kind, channels, make_picture):
    options = {"CMYK": {"format": "TIFF"}}.get(kind, {})
    if kind in ("webp", "bmp", "tiff"):
        image, options = make_picture(5), {"format": kind.upper()}
    elif kind in ("P", "1", "LA"):
        image = make_picture(5).convert(kind)
    else:
        image = make_picture(5, mode=kind)
    data = save(image, **options)
    mode = {1: "L", 3: "RGB"}[channels]
    want = Image.open(io.BytesIO(data)).convert(mode)
    got = decode(data, channels)
    assert got.mode == mode and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_palette_without_a_warning(channels, make_picture):
    image = make_picture(6).quantize(16)
    data = save(image, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decode(data, channels)
    want = image.convert("RGB") if channels == 3 else image.convert("L")
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(channels):
    wide = np.linspace(0, 65535, 23 * 17).astype(np.uint16).reshape(17, 23)
    got = np.asarray(decode(save(Image.fromarray(wide)), channels)).reshape(17, 23, -1)
    want = np.rint(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(got, np.repeat(want[:, :, None], channels, 2))


def test_exif_orientation_is_left_alone_as_by_imagefolder(make_picture):
    image = make_picture(7, (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    data = save(image, format="JPEG", exif=exif)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (30, 40)
    assert decode(data, 3).size == (40, 30)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_odd_sizes_go_all_the_way(size, mode, channels, make_picture):
    image = decode(save(make_picture(8, size, mode)), channels)
    for i in range(10):
        drawn = draw_views(SIZES, 0, 0, i, image.height, image.width)
        views = render(image, drawn, SIZES)
        large, small = (20, 26, channels), (12, 12, channels)
        assert [v.shape for v in views] == [large, large, small]


def test_unreadable_pictures_say_why(make_picture, monkeypatch):
    jpeg = save(make_picture(9, (200, 200)), format="JPEG")
    with pytest.raises(OSError, match=r"empty file \(0 bytes\)"):
        decode(b"", 3)
    with pytest.raises(OSError, match="not a picture that Pillow can read, begins b'some tex'"):
        decode(b"some text named .jpg", 3)
    with pytest.raises(OSError, match="truncated"):
        decode(jpeg[: len(jpeg) // 2], 3)
    with pytest.raises((OSError, SyntaxError)):
        decode(save(make_picture(9))[:60], 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        decode(jpeg, 3)
