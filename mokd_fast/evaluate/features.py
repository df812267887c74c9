"""Features of a labelled source, read once for any number of models.

Letters: N pictures, B pictures of a batch, C channels, D features.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.loader import normalize
from ..data.pillow import decode
from ..data.sources import Source
from ..errors import UserError
from .draws import shift_of, subset

log = logging.getLogger(__name__)

Model = Callable[[Tensor], Tensor]  # pictures fp32 [B, C, H, W] -> features [B, D]
Item = tuple[Tensor | None, int, str]  # picture, label, why there is no picture
_PIXELS = 32  # longest side the control keeps: 224 px pictures would be 150528 wide, for no gain
_SHOWN = 10  # bad files named one by one


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
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, label, f"{self.source.name(i)}: {error}"
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


def pixels(x: Tensor) -> Tensor:
    """The control of every evaluation: pictures [B, C, H, W] as features [B, C*h*w].

    Sides above 32 pixels are averaged down to 32.
    """
    h, w = x.shape[2:]
    if max(h, w) > _PIXELS:
        x = F.adaptive_avg_pool2d(x, (min(h, _PIXELS), min(w, _PIXELS)))
    return x.flatten(1)


@torch.no_grad()
def extract(
    models: Mapping[str, Model],
    source: Source,
    *,
    size: int | tuple[int, int],
    resize: int,
    channels: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    shift: int = 0,
    seed: int = 0,
    limit: int | None = None,
    batch: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every picture under every model; the pictures are read and decoded once.

    models: name -> a callable from normalised fp32 pictures [B, C, H, W] on `device` to features
    [B, D]. Those that are an nn.Module run in eval mode and get their modes back afterwards;
    what another callable wraps is the caller's to set. size, resize, shift, seed, limit: see
    `Pictures`. mean, std: one value a channel, of pictures in 0 ... 1. progress: called with
    (pictures done, pictures in all) after each batch.

    Returns (name -> fp32 [N, D] on the CPU, labels int64 [N]), in the order of `source`. Pictures
    that cannot be read are left out, named and counted in the log. Raises UserError when there
    are no labels or no picture could be read, ValueError for features of another shape.
    """
    data = Pictures(
        source, size=size, resize=resize, channels=channels, shift=shift, seed=seed, limit=limit
    )
    # A generator of its own: the loader would draw its base seed from the global one.
    generator = torch.Generator()
    loader = DataLoader(
        data, batch, num_workers=workers, collate_fn=_collate, generator=generator
    )
    features: dict[str, Tensor] = {}
    labels = torch.empty(len(data), dtype=torch.int64)
    done = seen = 0
    bad: list[str] = []
    with _evaluating(models.values()):
        for pictures, batch_labels, reasons in loader:
            end = done + len(batch_labels)
            if pictures is not None:
                x = normalize(pictures.to(device), mean, std)
                labels[done:end] = batch_labels
                for name, model in models.items():
                    y = _checked(model(x), name, len(x))
                    if name not in features:
                        features[name] = torch.empty(len(data), y.shape[1])
                    features[name][done:end] = y
            done, seen = end, seen + len(batch_labels) + len(reasons)
            bad += reasons
            if progress:
                progress(seen, len(data))
    _report(bad, len(data))
    return {name: y[:done] for name, y in features.items()}, labels[:done]


def _collate(items: list[Item]) -> tuple[Tensor | None, Tensor, list[str]]:
    good = [(picture, label) for picture, label, _ in items if picture is not None]
    reasons = [reason for picture, _, reason in items if picture is None]
    pictures = torch.stack([picture for picture, _ in good]) if good else None
    return pictures, torch.tensor([label for _, label in good], dtype=torch.int64), reasons


def _checked(y: Tensor, name: str, rows: int) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != rows:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model {name!r} must give features [{rows}, D], got {got}")
    return y


@contextmanager
def _evaluating(models: "Iterator[Model] | Sequence[Model]") -> Iterator[None]:
    """Eval mode; afterwards each submodule is put back, as some may be frozen in eval."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _report(bad: list[str], total: int) -> None:
    if len(bad) == total:
        raise UserError(f"none of the {total} pictures could be read; the first: {bad[0]}")
    for reason in bad[:_SHOWN]:
        log.warning("skipped %s", reason)
    if bad:
        log.warning("%d of %d pictures could not be read and were skipped", len(bad), total)
