"""The random choices of an evaluation, each a pure function of a seed.

No generator is drawn from, so every model sees the same choices and training is not disturbed.
"""

import numpy as np

from ..data.params import philox

# Counter word 2 of `philox`; the augmentation has 0 and 1.
_SHIFT, _SUBSET, _CLASS = 16, 17, 18


def shift_of(seed: int, index: int, most: int) -> tuple[int, int]:
    """(dy, dx) of picture `index` of the full list, each uniform on -most ... most."""
    dy, dx = (int(raw) % (2 * most + 1) - most for raw in philox(seed, 0, index, _SHIFT, 2))
    return dy, dx


def subset(n: int, limit: int | None, seed: int) -> np.ndarray:
    """`limit` of n positions, ascending int64; all of them when limit is None or n or more.

    A random choice, because folders list their pictures class by class.
    """
    if limit is None or limit >= n:
        return np.arange(n)
    raws = philox(seed, 0, 0, _SUBSET, n)
    return np.sort(np.argsort(raws, kind="stable")[:limit])


def rank_in_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order within each class: labels [N] -> the place [N] int64 of each, 0 the first."""
    raws = philox(seed, 0, 0, _CLASS, len(labels))
    order = np.lexsort((raws, labels))
    starts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - starts
    return ranks
