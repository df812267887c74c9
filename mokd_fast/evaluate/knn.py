"""Weighted k-nearest-neighbour classification on frozen features, as in DINO's eval_knn.py.

    votes_c = sum over the k nearest i of class c of exp(cos(x, x_i) / temperature)

Letters: N pictures of the bank, M queries, D features, C classes, m queries of a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .draws import rank_in_class

# Similarities held at once: 64 MB. Chunks of 64 rows took 1.5 times as long, larger ones gained
# nothing (bank 60000 x 128, 2 cores).
_CHUNK = 2**24


@torch.no_grad()
def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k: the weighted kNN of DINO (Wu et al., 2018).

    train_x [N, D], test_x [M, D]: features of any floating dtype, compared in fp32 on the device
    of train_x. train_y [N], test_y [M]: int64 classes, 0 or more. Any N, M, k and number of
    classes from 1 on: a k above N becomes N, and **the key returned is the k that was used**.
    Ties go to the earlier picture of the bank and to the lower class, so a result is
    reproducible. Extra memory: a normalised copy of the bank and 0.2 GB; 0.5 GB for features
    that are all equal.
    Raises ValueError for shapes that do not fit, UserError for empty or non-finite features.
    """
    check_features(train_x, train_y, test_x, test_y)
    if not ks or min(ks) < 1 or temperature <= 0:
        raise ValueError(f"ks must be 1 or more and temperature > 0, got {ks}, {temperature}")
    device, n = train_x.device, len(train_x)
    bank, train_y = F.normalize(train_x.float(), dim=1), train_y.to(device)
    classes, used = int(train_y.max()) + 1, sorted({min(k, n) for k in ks})
    hits = torch.zeros(used[-1] + 1, dtype=torch.int64, device=device)
    rows = max(1, _CHUNK // n)
    for x, y in zip(test_x.split(rows), test_y.split(rows), strict=True):
        near = F.normalize(x.to(device).float(), dim=1) @ bank.T  # [m, N]
        cosine, index = _nearest(near, used[-1])  # [m, k], nearest first
        # Relative to the nearest: the same winner, and exp cannot overflow at any temperature.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        label, row = train_y[index], torch.arange(len(x), device=device)
        votes = torch.zeros(len(x), classes, device=device)
        for k in range(1, used[-1] + 1):  # one neighbour at a time: a fixed order of summation
            votes[row, label[:, k - 1]] += weight[:, k - 1]
            if k in used:
                hits[k] += (votes.argmax(dim=1) == y.to(device)).sum()
    return {k: 100 * int(hits[k]) / len(test_y) for k in used}


def _nearest(near: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of near [m, N], descending: values, positions [m, k]."""
    n = near.shape[1]
    values, index = near.topk(min(k + 1, n), dim=1)
    if k < n:
        tied = values[:, k - 1] == values[:, k]  # topk takes any of the equals
        if tied.any():
            index[tied, :k] = _first_k(near[tied], values[tied, k - 1 : k], k)
    index = index[:, :k].sort(dim=1).values
    values, order = near.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def _first_k(near: Tensor, least: Tensor, k: int) -> Tensor:
    """Positions [m, k] of all above `least` [m, 1] and of the first that equal it."""
    above, equal = near > least, near == least
    room = k - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return taken.nonzero()[:, 1].view(-1, k)


def few_shot_indices(labels: Tensor, per_class: int = 10, seed: int = 0) -> Tensor:
    """Positions, ascending int64, of `per_class` pictures of each class; all of a smaller class.

    labels: int64 [N]. A pure function of its arguments; no generator is drawn from.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be 1 or more, got {per_class}")
    ranks = torch.from_numpy(rank_in_class(labels.cpu().numpy(), seed))
    return (ranks < per_class).nonzero()[:, 0].to(labels.device)


def check_features(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raises ValueError for shapes that do not fit, UserError for empty or non-finite features."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(
                f"expected {name} features [N, D] and labels [N], "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not len(x):
            raise UserError(f"there are no {name} features to evaluate on")
        if not x.isfinite().all():
            raise UserError(f"the {name} features hold NaN or infinity: the model has diverged")
        if y.min() < 0:
            raise ValueError(f"{name} labels must be 0 or more, got {int(y.min())}")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"widths differ: train {train_x.shape[1]}, test {test_x.shape[1]}")
