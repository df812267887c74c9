"""Rows of pictures and maps as inline PNGs: what the picture plates of the report are made of."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

Box = tuple[float, float, float, float]  # top, left, bottom, right; 0 to 1 of a picture
_SIDE, _GAP = 128, 8  # pixels of a cell and between two
_EDGE = "#999999"  # of a picture: a white one would run into the gaps
_WIDEST = 900  # the page is no wider, and photographs are what makes it heavy


class Strip(NamedTuple):
    """A row of pictures; `columns` are short texts, one above each."""

    label: str
    uri: str
    cells: int
    columns: Sequence[str] = ()


class Plate(NamedTuple):
    """Rows of pictures with one caption, or none and the sentence why."""

    title: str
    caption: str
    strips: Sequence[Strip] = ()
    why_not: str = ""


def strip(label: str, cells: Sequence[Image.Image], columns: Sequence[str] = ()) -> Strip:
    """Pictures side by side as one PNG; `columns` are written above them, one each."""
    row = Image.new("RGB", (len(cells) * (_SIDE + _GAP) - _GAP, _SIDE), "white")
    for i, one in enumerate(cells):
        row.paste(one, (i * (_SIDE + _GAP), 0))
    if row.width > _WIDEST:
        row = row.resize((_WIDEST, row.height * _WIDEST // row.width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    row.save(file, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return Strip(label, uri, len(cells), columns)


def cell(
    pixels: np.ndarray, boxes: Sequence[Box] = (), shape: tuple[int, int] | None = None
) -> Image.Image:
    """uint8 [h, w, 1 or 3] with a thin edge, fitted into a square cell, two `boxes` outlined, the
    second dashed.

    shape: height and width that give the aspect ratio, where the pixels' own do not (a map).
    Small pictures keep their pixels visible.
    """
    h, w = shape or pixels.shape[:2]
    scale = _SIDE / max(h, w)
    size = max(round(w * scale), 1), max(round(h * scale), 1)
    way = Image.Resampling.NEAREST if pixels.shape[0] <= size[1] else Image.Resampling.LANCZOS
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2))
    picture = picture.resize(size, way)
    ImageDraw.Draw(picture).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_EDGE)
    for box, dashed in zip(boxes, (False, True), strict=False):
        _outline(ImageDraw.Draw(picture), box, size, dashed)
    whole = Image.new("RGB", (_SIDE, _SIDE), "white")
    whole.paste(picture, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return whole


def _outline(draw: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], dashed: bool) -> None:
    """White with a black edge, which is seen on any picture, and wide enough for a phone."""
    top, left, bottom, right = box
    x0, x1 = round(left * size[0]) + 1, round(right * size[0]) - 2
    y0, y1 = round(top * size[1]) + 1, round(bottom * size[1]) - 2
    for colour, width in (("black", 4), ("white", 2)):
        for xa, ya, xb, yb in (
            (x0, y0, x1, y0),
            (x1, y0, x1, y1),
            (x1, y1, x0, y1),
            (x0, y1, x0, y0),
        ):
            length = max(abs(xb - xa), abs(yb - ya), 1)
            dash = 6 if dashed else length
            for start in range(0, length, 2 * dash):
                a, b = start / length, min((start + dash) / length, 1)
                ends = [
                    xa + a * (xb - xa),
                    ya + a * (yb - ya),
                    xa + b * (xb - xa),
                    ya + b * (yb - ya),
                ]
                draw.line(ends, fill=colour, width=width)


def heat(weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Weights [N] as uint8 [h, w, 3], from black at 0 by brightness, so it is readable in grey.

    The brightest is the largest weight, but at least twice the mean: noise on even attention
    must not look like attention.
    """
    from matplotlib import colormaps

    top = torch.maximum(weights.max(), 2 * weights.mean()).clamp(min=1e-12)
    share = (weights / top).float().cpu().numpy().reshape(grid)
    return (colormaps["magma"](share)[:, :, :3] * 255).round().astype(np.uint8)
