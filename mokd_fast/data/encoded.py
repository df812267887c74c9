"""Files as DALI is given them: as they are where it decodes what Pillow does, else decoded here.

Pillow is the reference. DALI 2.4 equals it to the bit for JPEG, PNG and WebP in colour and grey,
and within a level where it makes grey of colour or 8 bits of 16. What it does otherwise (levels of
256 off): CMYK JPEG without Adobe's marker (88), 16-bit BMP (2), PGM of less than 256 levels (99),
float TIFF (96), LAB TIFF (8); it turns a TIFF by its orientation and its boxes not; it refuses
bilevel and 32-bit TIFF, text PPM, GIF, 15-bit BMP, and a PNG whose last chunk is cut off. A batch
of all of them ended the process (SIGSEGV). The header tells these, and Pillow decodes them.

Damage: both refuse the same cut-off files. Flipped bits are found by PNG's check sums in both; in a
JPEG most are pixels to both, but DALI goes on at some false markers where Pillow stops ("broken
data stream", 3 of 100 damaged files). Only a check with Pillow finds those, as `index.check` does.
"""

from typing import NamedTuple

from PIL import Image

from . import pillow

_PNG_END = b"IEND\xaeB`\x82"


class File(NamedTuple):
    data: bytes
    height: int
    width: int


def as_file(data: bytes, channels: int, *, check: bool = False) -> File:
    """The picture in `data` for DALI, its size from the header: raises as `pillow.decode`, for what
    the header shows, or with `check` for all that Pillow would find."""
    image = pillow.header(data)
    alike = _alike(image, data)
    if check or not alike:
        image = pillow.decode(data, channels)
    return File(data if alike else _pnm(image), image.height, image.width)


def _alike(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data.endswith(_PNG_END)
    return image.format in ("JPEG", "MPO", "WEBP") and image.mode != "CMYK"


def _pnm(image: Image.Image) -> bytes:
    """An L or RGB picture as PGM or PPM: a header and its bytes."""
    kind = 5 if image.mode == "L" else 6
    return b"P%d %d %d 255\n" % (kind, image.width, image.height) + image.tobytes()
