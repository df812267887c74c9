"""Every format through the three loaders, with the same boxes: decoded alike to the bit where
nothing is rounded, cropped alike up to the rounding of the resize. Pillow is the reference."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mokd_fast.data.loader import ViewLoader
from mokd_fast.data.params import AugmentConfig, ViewParams
from tests.data.conftest import picture

SIZE = (40, 30)
# Global views are as large as most of the pictures: a whole view is then the decoded picture.
AUGMENT = AugmentConfig(global_size=SIZE[::-1], local_size=12, locals=2)
WIDE = np.asarray(picture(3, SIZE, "RGBA")).astype(np.uint16) * 200 + 77


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(seed: int = 1, size: tuple[int, int] = SIZE) -> Image.Image:
    return picture(seed, size)


def png_16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, which Pillow writes in grey only. pixels: uint16 [H, W, C]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def cmyk_jpeg(adobe: bool) -> bytes:
    """Without Adobe's marker Pillow takes it for inverted all the same, DALI does not."""
    data = save(picture(1, SIZE, "CMYK"), "JPEG")
    at = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    return data if adobe else data[:at] + data[at + 2 + length :]


def bmp_16() -> bytes:
    pixels = (np.arange(SIZE[0] * SIZE[1]) * 511 % 2**16).astype("<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    return b"BM" + struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66) + head + masks + pixels


def turned(kind: str) -> bytes:
    exif = rgb().getexif()
    exif[0x0112] = 6  # a quarter turn: with the boxes of the other side, if it were obeyed
    return save(rgb(), kind, exif=exif)


GREY, TALL = picture(1, SIZE, "L"), (3, 2000)
FORMATS = {
    "colour JPEG": save(rgb(), "JPEG"),
    "JPEG 4:4:4": save(rgb(), "JPEG", subsampling=0),
    "progressive JPEG": save(rgb(), "JPEG", progressive=True),
    "grey JPEG": save(GREY, "JPEG"),
    "CMYK JPEG": cmyk_jpeg(adobe=True),
    "CMYK JPEG, no Adobe marker": cmyk_jpeg(adobe=False),
    "turned JPEG": turned("JPEG"),
    "JPEG and junk": save(rgb(), "JPEG") + b"junk" * 50,
    "two pictures (MPO)": save(rgb(), "MPO", save_all=True, append_images=[rgb(2)]),
    "colour PNG": save(rgb()),
    "turned PNG": turned("PNG"),
    "PNG without an end": save(rgb())[:-12],
    "PNG and junk": save(rgb()) + b"junk",
    "grey PNG": save(GREY),
    "palette": save(rgb().quantize(16)),
    "transparent palette": save(rgb().quantize(16), transparency=bytes(range(16))),
    "RGBA": save(picture(1, SIZE, "RGBA")),
    "LA": save(Image.merge("LA", rgb().split()[:2])),
    "1-bit PNG": save(rgb().convert("1")),
    "16-bit grey PNG": png_16(WIDE[:, :, :1]),
    "16-bit LA PNG": png_16(WIDE[:, :, :2]),
    "16-bit RGB PNG": png_16(WIDE[:, :, :3]),
    "16-bit RGBA PNG": png_16(WIDE),
    "moving PNG": save(rgb(), save_all=True, append_images=[rgb(2)]),
    "WebP": save(rgb(), "WEBP"),
    "lossless RGBA WebP": save(picture(1, SIZE, "RGBA"), "WEBP", lossless=True),
    "moving WebP": save(rgb(), "WEBP", save_all=True, append_images=[rgb(2)]),
    "BMP": save(rgb(), "BMP"),
    "palette BMP": save(rgb().quantize(16), "BMP"),
    "16-bit BMP": bmp_16(),
    "colour TIFF": save(rgb(), "TIFF"),
    "packed TIFF": save(rgb(), "TIFF", compression="tiff_lzw"),
    "1-bit TIFF": save(rgb().convert("1"), "TIFF"),
    "CMYK TIFF": save(picture(1, SIZE, "CMYK"), "TIFF"),
    "turned TIFF": turned("TIFF"),
    "16-bit TIFF": save(Image.fromarray(WIDE[:, :, 0]), "TIFF"),
    "32-bit TIFF": save(Image.fromarray(WIDE[:, :, 0].astype(np.int32)), "TIFF"),
    "float TIFF": save(Image.fromarray(WIDE[:, :, 0].astype(np.float32) / 257), "TIFF"),
    "PPM": save(rgb(), "PPM"),
    "PGM of 100 levels": b"P5\n4 3\n100\n" + bytes(range(60, 72)),
    "PPM in words": b"P3\n2 2\n255\n" + b" ".join(b"%d" % (20 * i) for i in range(12)),
    "GIF": save(rgb(), "GIF"),
    "1x1": save(rgb(1, (1, 1)), "JPEG"),
    "wide": save(rgb(1, TALL[::-1]), "JPEG"),
    "tall": save(rgb(1, TALL)),
    "huge": save(rgb(1, (6000, 4500)), "JPEG", quality=30),
}
SIZES = {name: Image.open(io.BytesIO(data)).size for name, data in FORMATS.items()}


class Files:
    """A source of FORMATS. The names have one ending, which should not matter."""

    def __len__(self) -> int:
        return len(FORMATS)

    def read(self, i: int) -> bytes:
        return list(FORMATS.values())[i]

    def name(self, i: int) -> str:
        return f"{list(FORMATS)[i]}.jpg"


def boxes(cfg, seed, epoch, index, height, width) -> list[ViewParams]:
    """A crop and the whole as global views, the same as local ones; nothing else is done."""
    rest = (False, None, (1.0, 1.0, 1.0, 0.0), False, 0.0, False)
    part = (height // 5, width // 4, max(1, height // 2), max(1, width // 2))
    return [ViewParams(*box, *rest) for box in (part, (0, 0, height, width)) * 2]


@pytest.fixture(scope="module")
def crops():
    """(loader, channels) -> name -> the four views, int [h, w, C]."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mokd_fast.data.batches.draw_views", boxes)
        for kind in ("pillow", "cpu", "dali"):
            for channels in (1, 3):
                it = ViewLoader(
                    Files(), AUGMENT, batch=len(FORMATS), channels=channels, seed=0, workers=0,
                    loader=kind,
                )  # fmt: skip
                it._refused = None  # no picture may need that
                views = next(batches := it.batches())
                batches.close()
                assert views.bad == [] and it.bad_files == {}
                found[kind, channels] = {
                    list(FORMATS)[i]: [
                        x[v, b].numpy().astype(int)
                        for x in (views.globals, views.locals)
                        for v in range(2)
                    ]
                    for b, i in enumerate(views.index.tolist())
                }
    return found


# Levels between the decoded picture and Pillow's, mean and largest, where DALI does not decode the
# same to the bit: it rounds 16 bits where libpng cuts them for Pillow, rounds grey of colour where
# Pillow cuts, and takes a JPEG's own luma for it, which differs where a colour was clipped.
_SIXTEEN = dict.fromkeys(["16-bit RGB PNG", "16-bit RGBA PNG", "16-bit LA PNG"], (0.6, 1))
_JPEG = ["colour JPEG", "JPEG 4:4:4", "progressive JPEG", "turned JPEG", "JPEG and junk"]
_COLOUR = ["colour PNG", "turned PNG", "palette", "transparent palette", "RGBA", "moving PNG"]
ROUNDED = {
    1: {
        **_SIXTEEN,
        **dict.fromkeys([*_JPEG, "two pictures (MPO)"], (0.1, 8)),
        **dict.fromkeys(_COLOUR, (0.51, 1)),
        "lossless RGBA WebP": (0.01, 1),
    },
    3: _SIXTEEN,
}

# Pillow and PyTorch round and clip to 8 bits between the two passes of a resize, DALI does not. In
# pictures of dots, or resized fifty times along one side, that is more than the usual 0.25 levels.
HARD = {
    **dict.fromkeys(["1-bit PNG", "1-bit TIFF"], (3, 25)),
    **dict.fromkeys(["16-bit BMP", "wide", "tall"], (1.2, 20)),
    "PPM in words": (1.9, 10),
}


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size == SIZE])
def test_the_decoded_picture(name, crops):
    for channels in (1, 3):
        want = crops["pillow", channels][name][1]
        np.testing.assert_array_equal(crops["cpu", channels][name][1], want)
        off = np.abs(crops["dali", channels][name][1] - want)
        mean, most = ROUNDED[channels].get(name, (0, 0))
        assert off.mean() <= mean and off.max() <= most, (channels, off.mean(), off.max())
        assert want.std() > 30, "a picture"


@pytest.mark.parametrize("name", FORMATS)
def test_its_crops(name, crops):
    for channels, v in itertools.product((1, 3), range(4)):
        want = crops["pillow", channels][name][v]
        off = np.abs(crops["cpu", channels][name][v] - want)
        assert off.mean() <= 0.25 and off.max() <= 2, ("cpu", channels, v, off.mean(), off.max())
        off = np.abs(crops["dali", channels][name][v] - want)
        mean, most = HARD.get(name, (0.4, 3))
        more = ROUNDED[channels].get(name, (0, 0))
        assert off.mean() <= mean + more[0] and off.max() <= most + more[1], (
            f"dali, {channels} channels, view {v}: {off.mean():.2f}, {off.max()}"
        )


def test_only_a_tiff_is_turned(crops):
    """By Pillow itself as it loads it, so by ImageFolder too; its header has the size after."""
    plain, turned = (crops["pillow", 3][f"{k} JPEG"][3] for k in ("colour", "turned"))
    np.testing.assert_array_equal(plain, turned)
    plain, turned = (crops["pillow", 3][f"{k} TIFF"][3] for k in ("colour", "turned"))
    off = np.abs(np.rot90(plain, -1) - turned)
    assert SIZES["turned TIFF"] == SIZE[::-1] and off.mean() < 1 < np.abs(plain - turned).mean()
