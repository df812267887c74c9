"""The whole evaluation of some models, with raw pixels beside them as the control.

Clean kNN, kNN on shifted test pictures (which pixels cannot do), few-shot, and a linear probe.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import Tensor

from ..data.sources import Source
from ..errors import UserError
from .features import Model, extract, pixels
from .knn import few_shot_indices, knn
from .linear import linear_probe

Labelled = tuple[Tensor, Tensor]  # features [N, D], labels [N]
Progress = Callable[[str, int, int], None]  # what is done, so many, of so many
_CONTROL = "pixels"
_DRAWS = 5  # of the few labels: one draw of 10 a class is 1.8 points (s.d.) off on Fashion-MNIST


def evaluate(
    models: Mapping[str, Model],
    train_source: Source,
    test_source: Source,
    *,
    size: int | tuple[int, int],
    resize: int,
    channels: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    ks: Sequence[int] = (10, 20),
    shift: int = 4,
    per_class: int = 10,
    linear: bool = True,
    train_limit: int | None = None,
    test_limit: int | None = None,
    batch: int = 256,
    workers: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores each of `models`, and raw pixels, on the pictures of two labelled sources.

    models, size, resize, channels, mean, std, batch, workers: see `extract`. The pictures of
    train (the bank), of test and of shifted test are each read once for all models. train_limit,
    test_limit: use a random choice of so many pictures. progress: called with (what, done, all).

    Returns {model: scores}, last the control "pixels"; it survives JSON unchanged, so each k is
    a string. Scores are top-1 in percent:
      "bank", "test", "width": numbers of train pictures, of test pictures, of features
      "knn": {k: top1}, weighted kNN; k is the number of neighbours really used
      "knn_shifted": the same, test pictures moved by up to `shift` pixels; absent for shift 0
      "knn_few": {k: top1}, bank of `per_class` labels a class, k = per_class; mean of 5 draws
      "linear", "linear_lr": the probe and its learning rate; "linear_few": a probe on the few
      labels, mean of 5 draws; all three are absent for linear=False
    Raises UserError for unlabelled sources, differing classes and non-finite features.
    """
    if _CONTROL in models:
        raise ValueError(f"{_CONTROL!r} is the control's name; call the model something else")
    same_classes(train_source, test_source)
    everything: dict[str, Model] = {**models, _CONTROL: pixels}

    def features(what: str, source: Source, **options: Any) -> dict[str, Labelled]:
        found, labels = extract(
            everything, source, size=size, resize=resize, channels=channels, mean=mean, std=std,
            seed=seed, batch=batch, workers=workers, device=device,
            progress=progress and partial(progress, what), **options,
        )  # fmt: skip
        return {name: (x, labels) for name, x in found.items()}

    train = features("train pictures", train_source, limit=train_limit)
    sets = {"knn": features("test pictures", test_source, limit=test_limit)}
    if shift:
        what = "shifted test pictures"
        sets["knn_shifted"] = features(what, test_source, limit=test_limit, shift=shift)

    result: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(everything, 1):
        bank = _to(device, train[name])
        queries = {key: _to(device, found[name]) for key, found in sets.items()}
        result[name] = _scores(bank, queries, ks, per_class, linear, seed)
        if progress:
            progress("scores", done, len(everything))
    return result


def _to(device: str | torch.device, labelled: Labelled) -> Labelled:
    return labelled[0].to(device), labelled[1].to(device)


def _scores(
    bank: Labelled,
    queries: Mapping[str, Labelled],
    ks: Sequence[int],
    per_class: int,
    linear: bool,
    seed: int,
) -> dict[str, Any]:
    clean = queries["knn"]
    scores: dict[str, Any] = {
        "bank": len(bank[0]),
        "test": len(clean[0]),
        "width": bank[0].shape[1],
    }
    for key, query in queries.items():
        scores[key] = {str(k): top1 for k, top1 in knn(*bank, *query, ks=ks).items()}
    scores |= _few(bank, clean, per_class, linear, seed)
    if linear:
        probe = linear_probe(*bank, *clean, seed=seed)
        scores |= {"linear": probe.top1, "linear_lr": probe.lr}
    return scores


def _few(
    bank: Labelled, query: Labelled, per_class: int, linear: bool, seed: int
) -> dict[str, Any]:
    """k = per_class: as many neighbours as the right class can give."""
    x, y = bank
    near, probes = [], []
    for draw in range(_DRAWS):
        few = few_shot_indices(y, per_class, seed + draw)
        near.append(knn(x[few], y[few], *query, ks=(per_class,)))
        if linear:
            probes.append(linear_probe(x[few], y[few], *query, seed=seed).top1)
    scores: dict[str, Any] = {"knn_few": {str(k): fmean(one[k] for one in near) for k in near[0]}}
    return scores | ({"linear_few": fmean(probes)} if linear else {})


def same_classes(train_source: Source, test_source: Source) -> None:
    """Raises UserError when two labelled sources do not have the same classes."""
    train, test = train_source.classes, test_source.classes
    if tuple(train) == tuple(test):
        return
    only = [
        f"only in {name}: {', '.join(sorted(extra)[:5])}"
        for name, extra in (("train", set(train) - set(test)), ("test", set(test) - set(train)))
        if extra
    ]
    raise UserError(
        f"train has {len(train)} classes and test {len(test)}, and they differ "
        f"({'; '.join(only)}). Both folders need the same class folders"
    )


_COLUMNS = {
    "knn": "kNN k={}",
    "knn_shifted": "shift k={}",
    "knn_few": "few k={}",
    "linear_few": "few linear",
    "linear": "linear",
}


def format_table(result: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """The result of `evaluate` as a table, a row for each model; percents with one decimal."""
    # Narrow enough for 80 columns with a name of 24 letters and the two usual k.
    name = Column("model", no_wrap=True)
    table = Table(name, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    rows: list[list[str]] = [[name] for name in result]
    first = next(iter(result.values()))
    for key, heading in _COLUMNS.items():
        if key not in first:
            continue
        inner = list(first[key]) if isinstance(first[key], Mapping) else [None]
        for k in inner:
            table.add_column(heading.format(k), justify="right")
            for row, scores in zip(rows, result.values(), strict=True):
                row.append(f"{scores[key] if k is None else scores[key][k]:.1f}")
    for row in rows:
        table.add_row(*row)
    return table
