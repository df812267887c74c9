"""Search pictures: where a student's crop finds itself in the other teacher's map."""

from typing import Any

import numpy as np
from torch import Tensor

from ..data.params import ViewParams
from ..data.pillow import decode
from ..errors import UserError
from ..evaluate.pointing import (
    Crops,
    Search,
    box_in_view,
    pointing_scores,
    sample_crops,
    search_crops,
    summarise,
)
from ..train.recipe import Recipe
from .pictures import SCALE, SHOWN
from .run import Run, held_out_pictures
from .strips import Box, Plate, Strip, cell, heat, strip


def search_plates(run: Run, limit: int = 256) -> tuple[list[Plate], dict[str, Any] | None]:
    """Both directions of the search on held-out pictures, and their pointing scores."""
    title = "Search pictures"
    recipe = run.recipe
    if run.mokd is None or recipe is None:
        return [Plate(title, "", why_not=run.missing["networks"])], None
    if len(recipe.models) != 2:
        return [Plate(title, "", why_not="one model alone searches nothing")], None
    if not run.mokd.search:
        return [Plate(title, "", why_not="t_head.search=none: nothing was to search")], None
    try:
        source, which = held_out_pictures(run)
        data, seed = recipe.data, recipe.train.seed
        crops = sample_crops(source, recipe.augment, channels=data.channels, seed=seed, limit=limit)
        found = [search_crops(run.mokd, i, crops, mean=data.mean, std=data.std) for i in (0, 1)]
    except UserError as error:
        return [Plate(title, "", why_not=str(error))], None
    originals = [decode(source.read(i), data.channels) for i in crops.pictures[:SHOWN]]
    pictures = [np.atleast_3d(np.asarray(picture)) for picture in originals]
    plates = [_search_plate(i, recipe, crops, search, pictures) for i, search in enumerate(found)]
    return plates, {"pictures": which, **summarise(found, crops)}


def _search_plate(
    i: int, recipe: Recipe, crops: Crops, search: Search, pictures: list[np.ndarray]
) -> Plate:
    asks, asked = (f"{n + 1} {recipe.models[n].name}" for n in (i, 1 - i))
    shape = recipe.augment.global_hw
    view_name = "first global view" if recipe.augment.locals else "second global view"
    boxes = crops.boxes[: len(pictures)]
    feet = [box_in_view(box, view) for box, view in boxes]
    n = len(pictures)
    drawn = [
        cell(picture, [_box(box, picture), _box(view, picture)])
        for picture, (box, view) in zip(pictures, boxes, strict=True)
    ]
    views = [cell(v.numpy(), [f]) for v, f in zip(crops.asked[:n], feet, strict=True)]
    strips = [
        strip(f"picture: the crop (solid) and the {view_name} (dashed)", drawn),
        strip(f"the crop as student {asks} sees it", [cell(c.numpy()) for c in crops.asking[:n]]),
        strip(f"the {view_name} as teacher {asked} sees it, the crop's footprint in it", views),
    ]
    depth = len(search.attention)
    rows = [(search.attention, b, "its attention") for b in range(depth)]
    rows.append((search.control, 0, "control, another picture's crop asks"))
    for attention, b, what in rows:
        influence = "" if search.reaches_output(b) else ", without influence on the output"
        strips.append(_attention_strip(attention[b], search, feet, shape,
                                       f"{what}, block {b + 1} of {depth}{influence}"))  # fmt: skip
    caption = (
        f"A crop seen by student {asks} searches the map that teacher {asked} has of the "
        f"{view_name}, by {search.mode} attention in that teacher's T-Head, heads averaged; "
        f"{SCALE} A query that finds itself is bright inside the outline. The numbers are pointing "
        "scores: attention inside the outline over its share of the area, 1 is chance."
    )
    if not search.reaches_output(depth - 1):
        caption += (
            " The query's row in the last block changes nothing of the output, the rows before "
            "it do."
        )
    return Plate(f"Search: {asks} asks {asked}", caption, strips)


def _attention_strip(
    attention: Tensor, search: Search, feet: list[Box], shape: tuple[int, int], label: str
) -> Strip:
    """attention [P, H, N] of one block; a score above each cell."""
    weights = attention[: len(feet)].mean(dim=1)
    scores = pointing_scores(weights, search.covers[: len(feet)])
    cells = [
        cell(heat(w, search.grid), [foot], shape) for w, foot in zip(weights, feet, strict=True)
    ]
    return strip(label, cells, [f"{score:.2f}" for score in scores])


def _box(view: ViewParams, picture: np.ndarray) -> Box:
    h, w = picture.shape[:2]
    bottom, right = view.top + view.height, view.left + view.width
    return view.top / h, view.left / w, bottom / h, right / w
