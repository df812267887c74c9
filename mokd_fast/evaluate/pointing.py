"""Does a crop find itself? The pointing score of the feature search.

A student's crop searches the other teacher's map of the first global view. Both boxes are known
(`data.params`), so the crop's footprint in that map is too:

    score = attention mass inside the footprint / area share of the footprint

1 is chance. The control is the query of another picture's crop on the same map and footprint.
Letters: P crops, one a picture; N tokens, H attention heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loader import normalize
from ..data.params import AugmentConfig, ViewParams, draw_views, epoch_order
from ..data.pillow import decode, render
from ..data.sources import Source
from ..errors import UserError
from ..nn import MOKD, Features, Model, features
from .attention import search_attention
from .features import evaluating

INSIDE = 0.5  # a crop with less of its area inside the global view is left out
_Z = 1.96  # of a 95 % confidence interval


class Crops(NamedTuple):
    """Pictures as one search of the training sees them: the crop that asks and the view asked."""

    pictures: list[int]  # positions in the source
    asking: Tensor  # uint8 [P, h, w, C]: the first local view, or view 1 where there are none
    asked: Tensor  # uint8 [P, H, W, C]: the first global view, or view 2 where view 1 asks
    boxes: list[tuple[ViewParams, ViewParams]]  # of the two
    left_out: int  # crops hardly overlapping the view, and pictures that cannot be read


class Search(NamedTuple):
    """One direction: model i's crops in the other teacher's map."""

    attention: Tensor  # [depth, P, H, N], rows sum to 1
    control: Tensor  # the same with the query of the next crop
    covers: Tensor  # [P, N], share of each token's cell inside the footprint
    grid: tuple[int, int]
    mode: str = "joint"  # of the search (THead); a joint one drops what its last row finds

    def reaches_output(self, block: int) -> bool:
        return self.mode == "cross" or block < len(self.attention) - 1


def sample_crops(
    source: Source, augment: AugmentConfig, *, channels: int, seed: int = 0, limit: int = 256
) -> Crops:
    """The views of up to `limit` pictures in random order, drawn and rendered as for training.

    Raises UserError when fewer than two crops are left: the control is another picture's crop.
    """
    asking, asked = (2, 0) if augment.locals else (0, 1)
    pictures: list[int] = []
    crops, views, boxes, left_out = [], [], [], 0
    for i in map(int, epoch_order(len(source), seed, 0)):
        if len(pictures) == limit:
            break
        try:
            picture = decode(source.read(i), channels)
        except Exception:  # Pillow's plugins raise anything for a broken file
            left_out += 1
            continue
        params = draw_views(augment, seed, 0, i, picture.height, picture.width)
        box, view = params[asking], params[asked]
        if overlap(box, view) < INSIDE * box.height * box.width:
            left_out += 1
            continue
        rendered = render(picture, params, augment)
        pictures.append(i)
        crops.append(rendered[asking])
        views.append(rendered[asked])
        boxes.append((box, view))
    if len(pictures) < 2:
        raise UserError(
            f"{len(pictures)} of {len(pictures) + left_out} pictures gives a crop that lies in its "
            "global view; two are needed for the search pictures"
        )
    stack = [torch.from_numpy(np.stack(x)) for x in (crops, views)]
    return Crops(pictures, stack[0], stack[1], boxes, left_out)


def overlap(a: ViewParams, b: ViewParams) -> int:
    """Pixels of the picture that two boxes share."""
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    return max(height, 0) * max(width, 0)


def box_in_view(box: ViewParams, view: ViewParams) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of `box` within `view`, 0 to 1, flip included."""
    top, left = (box.top - view.top) / view.height, (box.left - view.left) / view.width
    bottom, right = top + box.height / view.height, left + box.width / view.width
    if view.flip:
        left, right = 1 - right, 1 - left
    return max(top, 0.0), max(left, 0.0), min(bottom, 1.0), min(right, 1.0)


def footprint(box: ViewParams, view: ViewParams, grid: tuple[int, int]) -> Tensor:
    """Share of each token's cell in `view` that `box` covers. [N], 0 to 1"""
    top, left, bottom, right = box_in_view(box, view)

    def covered(low: float, high: float, cells: int) -> Tensor:
        edges = torch.arange(cells + 1, dtype=torch.float64) / cells
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * cells

    rows, columns = covered(top, bottom, grid[0]), covered(left, right, grid[1])
    return torch.outer(rows, columns).flatten().float()


def pointing_scores(attention: Tensor, covers: Tensor) -> Tensor:
    """Attention mass inside a footprint over its area share. [..., N], [N] broadcast -> [...]"""
    return (attention * covers).sum(dim=-1) / covers.mean(dim=-1)


@torch.no_grad()
def search_crops(
    mokd: MOKD,
    student: int,
    crops: Crops,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int = 32,
) -> Search:
    """Model `student` (0 or 1) searches the other teacher's maps with each crop, in eval mode."""
    model, teacher = mokd.students[student], mokd.teachers[1 - student]
    assert isinstance(model, Model) and isinstance(teacher, Model)
    assert model.t_head is not None and teacher.t_head is not None
    device = next(mokd.parameters()).device

    def see(backbone: nn.Module, pictures: Tensor) -> Features:
        return features(backbone, normalize(pictures.to(device), tuple(mean), tuple(std)))

    with evaluating([model, teacher]):
        parts = crops.asking.split(batch)
        queries = torch.cat([model.t_head.query(see(model.backbone, x).pooled) for x in parts])
        asking = torch.stack([queries, queries.roll(-1, 0)])  # [2, P, D]
        found = []
        for part, pair in zip(crops.asked.split(batch), asking.split(batch, 1), strict=True):
            _, tokens, grid = see(teacher.backbone, part)
            found.append(search_attention(teacher.t_head, tokens, grid, pair))
    attention = torch.cat(found, dim=2).cpu()  # [depth, 2, P, H, N]
    covers = torch.stack([footprint(box, view, grid) for box, view in crops.boxes])
    return Search(attention[:, 0], attention[:, 1], covers, grid, teacher.t_head.mode)


def summarise(searches: Sequence[Search], crops: Crops) -> dict[str, Any]:
    """The scores of both directions, heads averaged; a plain dict that survives JSON.

    {"crops", "left_out", "directions": {"1->2": {"best": mean of the highest score that a crop
    can have, "area": mean area share, "blocks": [{"own", "random", "difference"} with each
    {"mean", "ci95"} over the crops, and "reaches_output"}, ...]}}}. The difference is paired.
    """
    directions = {}
    for i, search in enumerate(searches):
        own, random = (
            pointing_scores(x.mean(dim=2), search.covers)
            for x in (search.attention, search.control)
        )
        directions[f"{i + 1}->{2 - i}"] = {
            "best": float((search.covers.amax(dim=1) / search.covers.mean(dim=1)).mean()),
            "area": float(search.covers.mean()),
            "blocks": [
                {
                    "own": _mean(own[b]),
                    "random": _mean(random[b]),
                    "difference": _mean(own[b] - random[b]),
                    "reaches_output": search.reaches_output(b),
                }
                for b in range(len(own))
            ],
        }
    return {"crops": len(crops.pictures), "left_out": crops.left_out, "directions": directions}


def _mean(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {"mean": float(values.mean()), "ci95": float(_Z * values.std() / len(values) ** 0.5)}


def pointing(
    mokd: MOKD,
    source: Source,
    augment: AugmentConfig,
    *,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    limit: int = 256,
) -> dict[str, Any]:
    """The pointing scores of a pair on up to `limit` pictures of `source`; see `summarise`.

    Raises UserError for one model alone, and when no crop lies in its global view.
    """
    if len(mokd.students) != 2:
        raise UserError("one model alone searches nothing: there is no pointing score")
    crops = sample_crops(source, augment, channels=channels, seed=seed, limit=limit)
    found = [search_crops(mokd, i, crops, mean=mean, std=std) for i in (0, 1)]
    return summarise(found, crops)
