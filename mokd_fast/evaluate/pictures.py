"""Labelled pictures as an evaluation sees them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.pillow import decode
from ..data.sources import Source
from ..errors import UserError
from .draws import shift_of, subset

Item = tuple[Tensor | None, int, str]  # picture, label, why there is no picture


class Pictures(Dataset[Item]):
    """Labelled pictures as an evaluation sees them: resized, centre crop, perhaps shifted.

    size: (height, width) of the crop, or one int for both. resize: length of the shorter side
    before the crop (bicubic, antialiased; more where the crop would not fit). shift: translate
    each picture by up to so many pixels in y and in x, zero fill; the amounts depend on (seed,
    position in `source`) only. limit: a random choice of so many pictures, in `source` order.
    Items are (uint8 [H, W, C], label, ""), or (None, label, reason) for an unreadable picture.
    Raises UserError when `source` has no labels or no pictures.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int | tuple[int, int],
        resize: int,
        channels: int = 3,
        shift: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.source, self.resize, self.channels = source, resize, channels
        self.size = (size, size) if isinstance(size, int) else size
        self.shift, self.seed = shift, seed
        if not 0 <= shift < min(self.size):
            raise ValueError(f"shift must be 0 to {min(self.size) - 1} pixels, got {shift}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be 1 or more pictures, got {limit}")
        if not len(source):
            raise UserError("there is no picture to evaluate on")
        if not source.classes:
            raise UserError(
                f"{source.name(0)}: this picture has no label, and kNN and the linear probe need "
                "them. Put the pictures of each class in a folder of its own: root/CLASS/NAME.png"
            )
        self.index = subset(len(source), limit, seed)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Item:
        i = int(self.index[position])
        label = self.source.label(i)
        try:
            picture = decode(self.source.read(i), self.channels)
        except Exception as error:  # Pillow's plugins raise anything for a broken file
            return None, label, f"{self.source.name(i)}: {type(error).__name__}: {error}"
        pixels = resize_and_crop(picture, self.size, self.resize)
        if self.shift:
            pixels = translate(pixels, *shift_of(self.seed, i, self.shift))
        return torch.from_numpy(pixels), label, ""


def resize_and_crop(picture: Image.Image, size: tuple[int, int], resize: int) -> np.ndarray:
    """The centre of a picture, uint8 [H, W, C]; torchvision's Resize and CenterCrop.

    One thing differs: a picture that `resize` leaves smaller than the crop is enlarged to fit,
    where torchvision would pad it.
    """
    (height, width), (w, h) = size, picture.size
    scale = max(resize / min(w, h), height / h, width / w)
    # torchvision cuts to whole pixels: 98 * (32 / 49) is 63.99… in floats and must be 64.
    wide, high = max(int(w * scale + 1e-9), width), max(int(h * scale + 1e-9), height)
    if (wide, high) != (w, h):
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    top, left = round((high - height) / 2), round((wide - width) / 2)
    pixels = np.array(picture.crop((left, top, left + width, top + height)))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def translate(pixels: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """pixels [H, W, C] moved down by dy and right by dx; what comes in is zero."""
    h, w = pixels.shape[:2]
    out = np.zeros_like(pixels)
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = pixels[
        max(-dy, 0) : h - max(dy, 0), max(-dx, 0) : w - max(dx, 0)
    ]
    return out
