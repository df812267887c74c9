"""Features of a labelled source, read once for any number of models.

Letters: N pictures, B pictures of a batch, C channels, D features.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.batches import leave_signals_to_the_run
from ..data.loader import normalize
from ..data.sources import Source
from ..errors import UserError
from ..nn import features as backbone_features
from .pictures import Item, Pictures

Model = Callable[[Tensor], Tensor]  # pictures fp32 [B, C, H, W] -> features [B, D]
_PIXELS = 32  # longest side the control keeps: 224 px pictures would be 150528 wide, for no gain
_SHOWN = 10  # bad files named one by one
_log = logging.getLogger(__name__)


def pixels(x: Tensor) -> Tensor:
    """The control of every evaluation: pictures [B, C, H, W] as features [B, C * h * w].

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
        data, batch, num_workers=workers, collate_fn=_collate, generator=generator,
        worker_init_fn=leave_signals_to_the_run,
    )  # fmt: skip
    features: dict[str, Tensor] = {}
    labels: list[int] = []
    bad: list[str] = []
    with evaluating(models.values()):
        for pictures, good, reasons in loader:
            if pictures is not None:
                x = normalize(pictures.to(device), tuple(mean), tuple(std))
                for name, model in models.items():
                    y = _checked(model(x), name, len(x))
                    if name not in features:  # to concatenate would need twice the memory
                        features[name] = torch.empty(len(data), y.shape[1])
                    features[name][len(labels) : len(labels) + len(y)] = y
            labels += good
            bad += reasons
            if progress:
                progress(len(labels) + len(bad), len(data))
    _report(bad, len(data))
    return {name: y[: len(labels)] for name, y in features.items()}, torch.tensor(labels)


class Pooled(nn.Module):
    """A backbone as pictures [B, C, H, W] -> pooled feature [B, D]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return backbone_features(self.backbone, x).pooled


def _collate(items: list[Item]) -> tuple[Tensor | None, list[int], list[str]]:
    good = [(picture, label) for picture, label, _ in items if picture is not None]
    reasons = [reason for picture, _, reason in items if picture is None]
    pictures = torch.stack([picture for picture, _ in good]) if good else None
    return pictures, [label for _, label in good], reasons


def _checked(y: Tensor, name: str, rows: int) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != rows:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"model {name!r} must give features [{rows}, D], got {got}")
    return y


@contextmanager
def evaluating(models: Iterable[Model]) -> Iterator[None]:
    """Eval mode; afterwards each submodule is put back, as some may be frozen in eval."""
    networks = [model for model in models if isinstance(model, nn.Module)]
    modules = [module for network in networks for module in network.modules()]
    before = [module.training for module in modules]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _report(bad: list[str], total: int) -> None:
    if len(bad) == total:
        raise UserError(f"none of the {total} pictures can be read; the first: {bad[0]}")
    for reason in bad[:_SHOWN]:
        _log.warning("skipped %s", reason)
    if bad:
        _log.warning("%d of %d pictures cannot be read and were skipped", len(bad), total)
