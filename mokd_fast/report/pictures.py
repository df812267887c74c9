"""What one run's networks see: augmented views, attention, patch features."""

import numpy as np
import torch
from torch import Tensor

from ..data.loader import normalize
from ..data.params import draw_views, epoch_order
from ..data.pillow import decode, render
from ..errors import UserError
from ..evaluate.attention import class_attention, t_head_attention
from ..evaluate.pictures import resize_and_crop
from ..nn import Features, Model, features
from .run import Run, held_out_pictures, training_pictures
from .strips import Plate, Strip, cell, heat, strip

SHOWN = 6  # pictures in a row: still 50 pixels each on a phone
_ROWS = 4  # pictures whose views are shown
SCALE = (
    "black is 0, brightest the picture's largest weight or twice an even share, whichever is "
    "more, so that even attention is one medium tone."
)
_ATTENTION = (
    f"What the last block of each teacher looks at, heads averaged; {SCALE} Class token: the "
    "backbone's own summary token of a ViT. T-Head: how much attention each token of the "
    "backbone's map gets in the T-Head, also for a CNN. One square is one token."
)
_PATCHES = (
    "The first three principal components of each teacher's patch features as red, green and "
    "blue, fitted over the pictures shown. Equal colours mean alike features; the colours of two "
    "models are not comparable. Each component is stretched over the whole range of its colour, so "
    "that features of a collapsed model look as lively as any: their spread is among the curves."
)


def views_plate(run: Run) -> Plate:
    """Pictures with the views that the first epoch makes of them."""
    title = "Augmented views"
    try:
        source = training_pictures(run)
    except UserError as error:
        return Plate(title, "", why_not=str(error))
    assert run.recipe is not None
    augment, seed = run.recipe.augment, run.recipe.train.seed
    strips: list[Strip] = []
    names = ["picture", "G1", "G2", *(f"L{i + 1}" for i in range(augment.locals))]
    for i in map(int, epoch_order(len(source), seed, 0)):
        if len(strips) == _ROWS:
            break
        try:
            picture = decode(source.read(i), run.recipe.data.channels)
        except Exception:  # unreadable, as the loader would find
            continue
        params = draw_views(augment, seed, 0, i, picture.height, picture.width)
        found = [np.atleast_3d(np.asarray(picture)), *render(picture, params, augment)]
        strips.append(strip("", list(map(cell, found)), names if not strips else ()))
    if not strips:
        return Plate(title, "", why_not="none of the training pictures can be read")
    caption = (
        f"Training pictures and what the recipe's augmentation makes of them in the first epoch: "
        f"global views G1 and G2 ({_size(augment.global_hw)} pixels), and local views L1, L2, … "
        f"({_size(augment.local_hw)}, enlarged here). One row is one picture. The teachers see "
        "the global views, the students all of them."
    )
    return Plate(title, caption, strips)


def _size(hw: tuple[int, int]) -> str:
    return f"{hw[0]} × {hw[1]}"


def held_out(run: Run) -> tuple[list[np.ndarray], Tensor, str]:
    """Some pictures: uint8 [H, W, C] each, and normalised [P, C, H, W]; and what they are."""
    recipe, (source, what) = run.recipe, held_out_pictures(run)
    assert recipe is not None
    size = recipe.augment.global_hw
    shown: list[np.ndarray] = []
    resize = recipe.evaluate.resize or round(min(size) * 256 / 224)
    for i in map(int, epoch_order(len(source), recipe.train.seed, 0)):
        if len(shown) == SHOWN:
            break
        try:
            shown.append(
                resize_and_crop(decode(source.read(i), recipe.data.channels), size, resize)
            )
        except Exception:  # unreadable
            continue
    if not shown:
        raise UserError("none of the pictures can be read")
    x = torch.from_numpy(np.stack(shown))
    return shown, normalize(x, recipe.data.mean, recipe.data.std), f"{what} pictures"


@torch.no_grad()
def attention_plates(run: Run) -> list[Plate]:
    """Attention of every teacher that has some, patch features of all."""
    titles = ("Attention", "Attention heads of the first picture", "Patch features")
    if run.mokd is None:
        return [Plate(title, "", why_not=run.missing["networks"]) for title in titles]
    try:
        shown, x, which = held_out(run)
    except UserError as error:
        return [Plate(title, "", why_not=str(error)) for title in titles]
    assert run.recipe is not None
    shape = run.recipe.augment.global_hw
    first = strip(which, list(map(cell, shown)))
    maps, heads, patches, notes = [first], [], [first], []
    x = x.to(next(run.mokd.parameters()).device)
    pairs = zip(run.recipe.models, run.mokd.teachers, strict=True)
    for i, (config, teacher) in enumerate(pairs, 1):
        assert isinstance(teacher, Model)
        name, found = f"{i} {config.name}", features(teacher.backbone, x)
        attention, reasons = _attention(teacher, x, found)
        notes += [f"{name}: {reason}." for reason in reasons]
        for what, weights in attention.items():  # [P, H, N]
            cells = [cell(heat(w, found.grid), shape=shape) for w in weights.mean(dim=1)]
            maps.append(strip(f"{name}: {what}", cells))
            single = [cell(heat(w, found.grid), shape=shape) for w in weights[0]]
            columns = ["picture", *(f"head {h + 1}" for h in range(len(single)))]
            heads.append(strip(f"{name}: {what}", [cell(shown[0]), *single], columns))
        colours = principal_colours(found.tokens).unflatten(1, found.grid).cpu().numpy()
        patches.append(strip(name, [cell(c, shape=shape) for c in colours]))
    return [
        Plate(titles[0], " ".join([_ATTENTION, *notes]), maps),
        Plate(titles[1], "The same with every attention head by itself.", heads),
        Plate(titles[2], _PATCHES, patches),
    ]


def _attention(teacher: Model, x: Tensor, found: Features) -> tuple[dict[str, Tensor], list[str]]:
    """What -> weights [P, H, N], and why something is not there."""
    maps, reasons = {}, []
    try:
        weights, has_class = class_attention(teacher.backbone, x)
        maps["class token" if has_class else "mean of all tokens"] = weights
    except UserError as error:
        reasons.append(str(error))
    if teacher.t_head is not None:
        maps["T-Head"] = t_head_attention(teacher.t_head, found.tokens, found.grid)
    return maps, reasons


def principal_colours(tokens: Tensor) -> Tensor:
    """First three principal components over all tokens, as colours. [P, N, C] -> uint8 [P, N, 3]

    Each component fills 0 to 255 from its 2nd to its 98th percentile; its sign makes its
    largest weight positive. Fewer than three features leave the last colours grey.
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    axes = vectors[:, -3:].flip(1)  # [C, 3], the largest first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = rows @ axes
    low, high = torch.quantile(values, torch.tensor([0.02, 0.98]).to(values), dim=0)
    share = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    share = torch.nn.functional.pad(share, (0, 3 - share.shape[1]), value=0.5)
    return (share * 255).round().to(torch.uint8).unflatten(0, tokens.shape[:2])
