"""What the command line does after pre-training, from Python: knn, linear, export, views,
report."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .data.loader import Loader
from .data.sources import open_source
from .errors import UserError
from .evaluate import Pooled, evaluate
from .interop.export import export_backbone
from .nn import MOKD
from .train.checkpoint import find_checkpoint
from .train.networks import build
from .train.online import evaluation_sources, picture_options
from .train.recipe import Recipe, load_recipe
from .train.resume import load_weights

Which = Literal["teacher", "student"]
_log = logging.getLogger(__name__)


def load_run(run: str | Path) -> tuple[Recipe, MOKD]:
    """Recipe and trained networks of a run folder (its newest good checkpoint) or of a file."""
    return networks(*find_checkpoint(run))


def networks(path: Path, state: dict[str, Any]) -> tuple[Recipe, MOKD]:
    """Recipe and networks of the state of the checkpoint at `path`."""
    recipe = load_recipe(state["recipe"])
    mokd = build(recipe)
    load_weights(mokd, state, path)
    return recipe, mokd


def knn(run: str | Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Weighted kNN of a run's backbones: clean, shifted and with 10 labels a class.

    Beside each trained backbone stand two controls: the same network randomly initialised, and
    raw pixels. overrides: `evaluate.train=DIR`, `evaluate.k=[1,20]` ...; options: `which`
    ("teacher" or "student"), `progress`. Returns {backbone: {measure: percent}}.
    """
    return _evaluate(run, overrides, linear=False, **options)


def linear(run: str | Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Like `knn`, with a linear probe on the frozen features as well."""
    return _evaluate(run, overrides, linear=True, **options)


def export(
    run: str | Path, *, model: int = 1, which: Which = "teacher", path: str | Path | None = None
) -> Path:
    """Writes backbone number `model` (from 1) of a run as safetensors with timm's key names.

    The default path is RUN/exported/<name>_<teacher or student>.safetensors. See
    `interop.export.export_backbone` for how to load it.
    """
    recipe, mokd = load_run(run)
    if not 1 <= model <= len(recipe.models):
        raise UserError(f"model={model}: the run has {len(recipe.models)} model(s), counted from 1")
    network = recipe.models[model - 1]
    if path is None:
        folder = Path(run) if Path(run).is_dir() else Path(run).parent
        if folder.name == "checkpoints":
            folder = folder.parent  # RUN/checkpoints/00000123.pt
        path = folder / "exported" / f"{model}_{network.name}_{which}.safetensors"
    networks = mokd.teachers if which == "teacher" else mokd.students
    return export_backbone(
        networks[model - 1].backbone,  # type: ignore[arg-type]
        network,
        Path(path),
        channels=recipe.data.channels,
        size=recipe.augment.global_hw,
        mean=recipe.data.mean,
        std=recipe.data.std,
        trained_by=f"mokd_fast, recipe {recipe.name}, {which} of model {model}",
    )


def views(
    root: str | Path,
    *overrides: str,
    recipe: str = "resnet50-vit_small",
    images: int = 4,
    loaders: Sequence[str] = ("pillow", "cpu"),
    out: str | Path = "views.png",
) -> Path:
    """Draws what a recipe's augmentation makes of a few pictures; see `report.views`.

    root: whatever data.root takes; overrides: `augment.blur=[1,0,0]`, `train.seed=1` ...
    """
    from .report.views import views_picture

    path = Path(out)
    for loader in loaders:
        if loader not in get_args(Loader):
            raise UserError(f"no loader {loader!r}; there are {', '.join(get_args(Loader))}")
    found = load_recipe(recipe, [*overrides, f"data.root={json.dumps(str(root))}"])
    picture = views_picture(
        open_source(root),
        found.augment,
        images=images,
        loaders=loaders,  # type: ignore[arg-type]
        channels=found.data.channels,
        seed=found.train.seed,
    )
    try:
        picture.save(path, "PNG", optimize=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Writes one self-contained HTML page of a run, or of several side by side; returns its path.

    The page has the losses and schedules, the scores of `knn` and `linear`, augmented views,
    attention, patch features, and search pictures with their pointing score, which also lands in
    RUN/pointing.json. The default file is report.html in the first run. Needs the extra `report`.
    Raises UserError for a folder that is no run; what a run lacks is said in the page.
    """
    from .report.page import write_report

    return write_report([Path(run) for run in runs], None if out is None else Path(out))


def _evaluate(
    run: str | Path,
    overrides: tuple[str, ...],
    *,
    linear: bool,
    which: Which = "teacher",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    recipe, mokd = load_run(run)
    for override in overrides:
        if not override.startswith("evaluate."):
            raise UserError(
                f"{override}: the networks are those of the run; only evaluate.* can be changed"
            )
    recipe = load_recipe(recipe.model_dump(mode="json"), list(overrides))
    train, test = evaluation_sources(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.train.seed)
    random = build(recipe)  # what the run started from, but for files (models.N.weights)
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, networks in ((which, getattr(mokd, f"{which}s")), ("random", random.students)):
        for i, (config, network) in enumerate(zip(recipe.models, networks, strict=True), start=1):
            models[f"{i} {config.name} {name}"] = Pooled(network.backbone).to(device)
    settings = recipe.evaluate
    result = evaluate(
        models,
        train,
        test,
        ks=settings.k,
        train_limit=settings.train_limit,
        test_limit=settings.test_limit,
        linear=linear,
        device=device,
        progress=progress,
        **picture_options(recipe),
    )
    if Path(run).is_dir():
        name = "linear.json" if linear else "knn.json"
        try:
            (Path(run) / name).write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:  # the result of a long evaluation is worth more than its file
            _log.warning("%s cannot be written: %s", Path(run) / name, error.strerror)
    return result
