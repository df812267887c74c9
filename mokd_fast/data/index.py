"""Every picture decoded once before training: which cannot be read, and how large the others are.

What was found good is kept in the cache folder and believed while size and modification time stay
as they were. What was bad is tried again each time: it may have been a permission or a mount, of
which the time of change says nothing, and there are few.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import __version__ as _PILLOW
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from . import cache
from .batches import leave_signals_to_the_run, same
from .pillow import decode
from .sources import Source

_CHUNK = 32  # pictures that a worker takes at a time
_FEW = 256  # pictures for which processes take longer to start than to decode: 0.1 s a worker
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # pictures checked, pictures to check
_Found = list[tuple[int, int, int, str]]  # index, height, width, reason


@dataclass
class Index:
    """bad: why each unreadable picture cannot be read, by its position in the source. sizes:
    int32 [N, 2], height and width in pixels, zeros for the bad ones. checked: how many were
    decoded now, and not known from the cache."""

    bad: dict[int, str]
    sizes: np.ndarray
    checked: int


def check(
    source: Source,
    root: str,
    *,
    channels: int = 3,
    workers: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Decodes the pictures of a source that are new or changed since the last check of `root`.

    root: what the source was opened by, the key of the cache; workers: processes. A check that is
    cut off keeps what it has found. Raises UserError of the source, and when a worker dies.
    """
    place = cache.place("index", root if "://" in root else os.path.abspath(root))
    place = place.with_suffix(".npz")
    stamps = source.stamps()
    sizes = _known(cache.load(place), source, stamps)
    todo = np.flatnonzero(sizes[:, 0] == 0)
    bad: dict[int, str] = {}
    done = 0
    try:
        for found in _decoded(source, todo, channels, workers):
            for i, height, width, reason in found:
                sizes[i] = height, width
                if reason:
                    bad[i] = reason
            done += len(found)
            if progress:
                progress(done, len(todo))
    finally:
        if done > len(bad):
            prints = np.array(source.fingerprint())
            arrays = {"pillow": np.array(_PILLOW), "names": _hashes(source)}
            cache.save(place, fingerprint=prints, stamps=stamps, sizes=sizes, **arrays)
    return Index(bad, sizes, len(todo))


def _known(kept: dict[str, np.ndarray], source: Source, stamps: np.ndarray) -> np.ndarray:
    """Sizes of the pictures that did not change since they were found good, else zeros."""
    sizes = np.zeros((len(source), 2), np.int32)
    if str(kept.get("pillow")) != _PILLOW or not len(kept["names"]):
        return sizes
    if str(kept["fingerprint"]) == source.fingerprint():
        at = np.arange(len(source))
    else:  # another list: by the names
        order = np.argsort(kept["names"])
        names = _hashes(source)
        at = order[np.searchsorted(kept["names"], names, sorter=order).clip(max=len(order) - 1)]
        at[kept["names"][at] != names] = -1
    same = (at >= 0) & (kept["stamps"][at] == stamps).all(1) & (stamps[:, 0] >= 0)
    sizes[same] = kept["sizes"][at[same]]
    return sizes


def _hashes(source: Source) -> np.ndarray:
    """A number for each name, uint64 [N]."""
    names = (os.fsencode(source.name(i)) for i in range(len(source)))
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64)


def _decoded(source: Source, todo: np.ndarray, channels: int, workers: int) -> Iterator[_Found]:
    chunks = [todo[k : k + _CHUNK] for k in range(0, len(todo), _CHUNK)]
    loader = DataLoader(
        _Decoder(source, chunks, channels),
        batch_size=None,  # an item is a chunk
        num_workers=workers if len(todo) > _FEW else 0,
        collate_fn=same,
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator(),  # else DataLoader draws a seed from the global one
    )
    try:
        for found in loader:
            if isinstance(found, UserError):
                raise found
            yield found
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"a process that checked the pictures died ({error}). Memory may be short: set a "
            "smaller data.workers, or data.check=false to train without the check"
        ) from error


@dataclass
class _Decoder(Dataset):
    """Item k is what was found in chunk k. It lives in the worker."""

    source: Source
    chunks: list[np.ndarray]
    channels: int

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> _Found | UserError:
        try:
            return [self._decode(int(i)) for i in self.chunks[k]]
        except UserError as error:  # returned: DataLoader would wrap it in a traceback's text
            return error

    def _decode(self, i: int) -> tuple[int, int, int, str]:
        try:
            image = decode(self.source.read(i), self.channels)
        except UserError:
            raise
        except Exception as error:  # Pillow's plugins raise anything for a broken file
            return i, 0, 0, f"{type(error).__name__}: {error}"
        return i, image.height, image.width, ""
