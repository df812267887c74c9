"""What the reference loader does to one picture, with Pillow: decode, then render its views.

Equal bit for bit to torchvision's PIL operators for the same numbers, in DINO's order: crop and
bicubic resize, flip, colour jitter in the drawn order, grey, blur, solarize.
"""

import io

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from .params import AugmentConfig, ViewParams

_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int) -> Image.Image:
    """The picture in `data`, whole, as mode L (channels 1) or RGB (channels 3).

    Transparency is dropped and EXIF orientation left alone (but of a TIFF, which Pillow turns as
    it loads it), as by ImageFolder; 16-bit grey is scaled to 8 bits (Pillow's own conversion would
    clip it). Raises OSError or what Pillow's plugin raises for a broken file,
    Image.DecompressionBombError for a giant one.
    """
    image = header(data)
    image.load()
    image.info.pop("transparency", None)  # Pillow would warn about it and drop it all the same
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def header(data: bytes) -> Image.Image:
    """The picture in `data`, not yet decoded: its size, mode and format; raises as `decode`."""
    if not data:
        raise OSError("empty file (0 bytes)")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its text is the address of the BytesIO
        raise OSError(f"not a picture that Pillow can read, begins {data[:8]!r}") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded; I is how Pillow holds some 16-bit files."""
    wide = np.asarray(image).astype(np.int64)
    return Image.fromarray(((wide.clip(0, 65535) + 128) // 257).astype(np.uint8))


def render(image: Image.Image, params: list[ViewParams], cfg: AugmentConfig) -> list[np.ndarray]:
    """The views of one decoded picture: uint8 [h, w, C] each, two global ones, then local ones."""
    return [_view(image, p, cfg.size_of(v)) for v, p in enumerate(params)]


def _view(image: Image.Image, p: ViewParams, size: tuple[int, int]) -> np.ndarray:
    # Cropped first: resize(box=…) filters across the edge of the box, torchvision does not.
    image = image.crop((p.left, p.top, p.left + p.width, p.top + p.height))
    image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    image = augment(image, p)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(*size, -1)


def augment(image: Image.Image, p: ViewParams) -> Image.Image:
    """What follows crop and resize: flip, jitter, grey, blur, solarize."""
    if p.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in p.order or ():
        if p.factors[op] != (0.0 if op == 3 else 1.0):  # HSV and back is not neutral at hue 0
            image = _JITTER[op](image, p.factors[op])
    if p.grey and image.mode != "L":
        image = image.convert("L").convert(image.mode)
    if p.sigma:
        image = image.filter(ImageFilter.GaussianBlur(p.sigma))
    if p.solarize:
        image = ImageOps.solarize(image, 128)
    return image


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new(image.mode, image.size), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    """ImageEnhance.Contrast: about the mean luma; its ImageStat takes three times as long."""
    luma = image if image.mode == "L" else image.convert("L")
    pixels = np.frombuffer(luma.tobytes(), np.uint8)
    mean = int(int(pixels.sum()) / pixels.size + 0.5)
    flat = Image.new(image.mode, image.size, mean if image.mode == "L" else (mean,) * 3)
    return Image.blend(flat, image, factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    if image.mode == "L":
        return image
    return Image.blend(image.convert("L").convert(image.mode), image, factor)


def _hue(image: Image.Image, factor: float) -> Image.Image:
    """torchvision's adjust_hue: hue is a byte that wraps; the shift is cut towards zero."""
    if image.mode == "L":
        return image
    h, s, v = image.convert("HSV").split()
    shift = int(factor * 255)
    h = h.point([(x + shift) % 256 for x in range(256)])
    return Image.merge("HSV", (h, s, v)).convert(image.mode)


_JITTER = (_brightness, _contrast, _saturation, _hue)
