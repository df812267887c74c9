"""Which run may go on from a checkpoint, and which networks its weights fit."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..nn import MOKD
from .checkpoint import newest
from .recipe import load_recipe

# What may differ between a checkpoint and the recipe that resumes it: nothing of the result, but
# for the rounding that loss.prototypes changes (which is said). Of the data the list of pictures
# counts, not the path; it has a fingerprint of its own. Which of them are skipped unread is in the
# checkpoint (check.py), so how they were checked does not matter. Of data.loader counts what auto
# came to.
FREE_KEYS = (
    *("data.root", "data.workers", "data.loader", "data.check", "data.max_bad"),
    *("evaluate.", "train.device"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.max_skipped", "train.wandb", "loss.prototypes"),
    *("train.checkpoint_activations", "train.compile", "train.cuda_graph"),
    "train.pack_crops",
)
_SHOWN = 3  # how many names an error message lists


def resumable(
    run: Path, recipe: dict[str, Any], data: str, loader: str, world: int = 1
) -> dict[str, Any] | None:
    """The newest state in a run folder if this recipe and data may go on from it; None without.

    Raises UserError naming the keys that differ, or when the list of pictures, the loader or the
    number of processes is another one.
    """
    found = newest(run)
    if found is None:
        return None
    path, state = found
    before = load_recipe(state["recipe"]).model_dump(mode="json")  # keys that are new: defaults
    mine, theirs = _flat(recipe), _flat(before)
    keys = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    keys = [key for key in keys if not key.startswith(FREE_KEYS)]
    remedy = "Give another run folder (--run), or the same recipe to go on."
    if keys:
        rows = "".join(f"\n  {k}: {theirs.get(k)} there, {mine.get(k)} now" for k in keys)
        raise UserError(f"{path} is of another recipe, these keys differ:{rows}\n{remedy}")
    if state["data"] != data:
        raise UserError(f"{path} was trained on another list of pictures. {remedy}")
    if (made := state.get("loader", "pillow")) != loader:  # the only one there was
        raise UserError(
            f"{path} was trained on views of the {made} loader, now it is {loader}. Set "
            f"data.loader={made} to go on, or give another run folder (--run)"
        )
    if (processes := state.get("world", 1)) != world:
        raise UserError(f"{path} is of {processes} processes, now there are {world}. {remedy}")
    return state


def load_weights(mokd: MOKD, state: dict[str, Any], path: str | Path) -> None:
    """Students, teachers and centres of a checkpoint; UserError naming what does not fit."""
    theirs, mine = state["model"], mokd.state_dict()
    faults = [f"{k} is not in it" for k in mine if k not in theirs]
    faults += [f"{k} of it is unknown here" for k in theirs if k not in mine]
    faults += [
        f"{k} is {list(theirs[k].shape)} there, {list(mine[k].shape)} here"
        for k in mine
        if k in theirs and theirs[k].shape != mine[k].shape
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UserError(
            f"the weights in {path} are of other networks, or of another version of mokd_fast: "
            f"{'; '.join(faults[:_SHOWN])}{more}. Give the recipe it was trained with"
        )
    mokd.load_state_dict(theirs)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'train.batch': 64, 'models.0.name': ...} of a nested recipe."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, dict | list):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
