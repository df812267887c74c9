"""What augmentation makes of a few pictures: every view with its numbers, loader beside loader."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.batches import Views
from ..data.loader import Loader, ViewLoader, finish
from ..data.params import AugmentConfig, ViewParams, draw_views
from ..data.pillow import decode
from ..data.sources import Source
from .strips import cell

_SIDE, _GAP, _LINE, _SIZE = 128, 8, 12, 10  # pixels; _SIDE is that of `cell`
_GAIN = 16  # of differences
_JITTER = "bcsh"  # brightness, contrast, saturation, hue


def views_picture(
    source: Source,
    augment: AugmentConfig,
    *,
    images: int = 4,
    loaders: Sequence[Loader] = ("pillow", "cpu"),
    channels: int = 3,
    seed: int = 0,
) -> Image.Image:
    """The views of the first pictures of a run's first epoch, as one picture.

    For each of `images` pictures: the picture with its crops (global ones with a solid edge) and
    all views with their numbers, a row a loader, then how far each other loader is from the first
    one, times 16, with the mean in grey levels. Raises UserError as `ViewLoader`.
    """
    images = min(images, len(source))
    batches = [_levels(source, augment, images, channels, seed, loader) for loader in loaders]
    rows: list[Image.Image] = []
    for b, i in enumerate(batches[0][0].index.tolist()):
        image = decode(source.read(i), channels)
        params = draw_views(augment, seed, 0, i, image.height, image.width)
        original = np.asarray(image).reshape(image.height, image.width, -1)
        first: list[np.ndarray] = []
        for (_, levels), loader in zip(batches, loaders, strict=True):
            crops = [view[b] for view in levels]
            if not first:
                boxes = [_box(p, image) for p in params]
                pictures = [cell(original, boxes[:2]), *map(cell, crops)]
                name = source.name(i).rpartition("/")[2].replace("\n", " ")
                texts = [[name, loader], *map(_numbers, params)]
                first = crops
            else:
                rows.append(_row([_label(loader), *map(cell, crops)], [[]] * (1 + len(crops))))
                away = [np.abs(x.astype(int) - y) for x, y in zip(crops, first, strict=True)]
                label = _label(f"|{loader} - {loaders[0]}| x {_GAIN}")
                pictures = [label, *(cell((d * _GAIN).clip(0, 255).astype("u1")) for d in away)]
                texts = [[], *([f"{d.mean():.2f}"] for d in away)]
            rows.append(_row(pictures, texts))
    page = Image.new("RGB", (rows[0].width, sum(r.height + _GAP for r in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height + _GAP
    return page


def _levels(
    source: Source, augment: AugmentConfig, images: int, channels: int, seed: int, loader: Loader
) -> tuple[Views, list[np.ndarray]]:
    """A loader's first batch, and its finished views in grey levels: uint8 [B, h, w, C] each."""
    batches = ViewLoader(
        source, augment, batch=images, channels=channels, seed=seed, workers=0, loader=loader
    ).batches()
    views = next(batches)
    batches.close()  # type: ignore[attr-defined]
    found = finish(views, (0.0,) * channels, (1 / 255,) * channels, device=torch.device("cpu"))
    return views, [
        view.movedim(1, -1).round().to(torch.uint8).numpy()
        for size in found
        if size is not None
        for view in size
    ]


def _box(p: ViewParams, image: Image.Image) -> tuple[float, float, float, float]:
    h, w = image.height, image.width
    return p.top / h, p.left / w, (p.top + p.height) / h, (p.left + p.width) / w


def _numbers(p: ViewParams) -> list[str]:
    """Lines on what is done to a view, in its order."""
    lines = [f"{p.height} x {p.width} at {p.top}, {p.left}" + (", flip" if p.flip else "")]
    if p.order:
        named = [f"{_JITTER[op]} {p.factors[op]:+.2f}" for op in p.order]
        lines += [" ".join(named[:2]), " ".join(named[2:])]
    rest = ["grey"] * p.grey + [f"blur {p.sigma:.1f}"] * (p.sigma > 0) + ["solarize"] * p.solarize
    return [*lines, ", ".join(rest)]


def _label(text: str) -> Image.Image:
    label = Image.new("RGB", (_SIDE, _SIDE), "white")
    at, font = (_SIDE - 4, _SIDE // 2), ImageFont.load_default(_SIZE)
    ImageDraw.Draw(label).text(at, text, "black", font, anchor="rm")
    return label


def _row(pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures side by side with lines of text below each."""
    lines = max(len([line for line in text if line]) for text in texts)
    width = len(pictures) * (_SIDE + _GAP) - _GAP
    row = Image.new("RGB", (width, _SIDE + lines * _LINE + 2), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(_SIZE)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = i * (_SIDE + _GAP)
        row.paste(picture, (left, 0))
        for j, line in enumerate(t for t in text if t):
            while draw.textlength(line, font) > _SIDE:  # a long file name: its end tells most
                line = "…" + line[2:]
            draw.text((left, _SIDE + 2 + j * _LINE), line, "black", font)
    return row
