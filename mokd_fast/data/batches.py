"""Batch after batch of a source, each a pure function of its number; what a worker process runs.

A worker makes a whole batch, writing each crop into its place, so that nothing is collated. The
batch of micro-step s is a function of (source, augmentation, seed, batch x world, s) alone: any
number of workers gives the same bits, and so does a start in the middle.
"""

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from . import cpu, pillow
from .encoded import as_file
from .params import AugmentConfig, ViewParams, draw_views, epoch_order
from .sources import Source
from .table import augment_table

_TRIED = 100  # unreadable pictures in a row after which the data set itself is at fault

Bad = tuple[int, str, str]  # index, name, reason
Kind = Literal["pillow", "cpu", "files", "checked files"]


class Views(NamedTuple):
    """One batch. H, W: the size of a global view, h, w: of a local one.

    With parameters, views are only cropped: `ops.augment_crops` does the rest. Without, they are
    finished but for the normalisation.
    """

    globals: Tensor  # uint8 [2, B, H, W, C]
    locals: Tensor | None  # uint8 [L, B, h, w, C], None without local views
    index: Tensor  # type: ignore[assignment]  # int64 [B], positions in the full list
    bad: list[Bad]  # the unreadable pictures that were met and replaced
    global_params: Tensor | None = None  # float32 [2, B, 12]
    local_params: Tensor | None = None  # float32 [L, B, 12]


class Files(NamedTuple):
    """A batch whose pictures are still to be decoded, in few tensors: each takes a descriptor on
    its way out of a worker."""

    step: int
    data: Tensor  # uint8, the files one behind the other
    ends: Tensor  # int64 [B]
    boxes: Tensor  # int32 [B, V, 4]: top, left, height, width of each crop
    views: Views  # all but the crops, which are empty


@dataclass
class Batches(Dataset):
    """Item s is the batch of micro-step s: `Views`, or `Files` of the kinds "files", most of them
    known by their headers alone, and "checked files", which Pillow could decode.

    An error that is the user's to mend is returned, not raised: DataLoader would wrap it in a
    traceback's text.
    """

    source: Source
    augment: AugmentConfig
    batch: int
    channels: int
    seed: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    drop_last: bool = True
    known_bad: frozenset[int] = frozenset()
    kind: Kind = "pillow"

    def __post_init__(self) -> None:
        pictures = self.batch * self.world * self.accumulate
        self.steps = len(self.source) // pictures
        if not self.drop_last and len(self.source) % pictures:
            self.steps += 1  # filled up with the first pictures of the epoch's order
        self.steps *= self.accumulate  # an optimizer step never crosses the end of an epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, step: int) -> Views | Files | UserError:
        try:
            return self._files(step) if "files" in self.kind else self._views(step)
        except UserError as error:
            return error

    def _views(self, step: int) -> Views:
        cfg, B, C = self.augment, self.batch, self.channels
        views = np.empty((2, B, *cfg.global_hw, C), np.uint8)
        small = np.empty((cfg.locals, B, *cfg.local_hw, C), np.uint8)
        met = _Met([], [], [])
        for b, image in enumerate(self._pictures(step, met)):
            for v, crop in enumerate(self.render(image, met.params[b])):
                (views if v < 2 else small)[v if v < 2 else v - 2, b] = crop
        return met.views(views, small, finished=self.kind == "pillow")

    def render(self, image: Any, params: list[ViewParams]) -> list[np.ndarray]:
        """The views of one decoded picture, finished for the kind "pillow", else only cropped."""
        return (pillow.render if self.kind == "pillow" else cpu.crops)(image, params, self.augment)

    def _files(self, step: int) -> Files:
        met = _Met([], [], [])
        files = [file.data for file in self._pictures(step, met)]
        boxes = [[(p.top, p.left, p.height, p.width) for p in views] for views in met.params]
        return Files(
            step,
            torch.frombuffer(bytearray().join(files), dtype=torch.uint8),
            torch.tensor([len(data) for data in files]).cumsum(0),
            torch.tensor(boxes, dtype=torch.int32),
            met.views(np.empty(0, np.uint8), np.empty(self.augment.locals, np.uint8)),
        )

    def _pictures(self, step: int, met: "_Met") -> Iterator[Any]:
        """The pictures of a batch one by one, after `met` has their numbers."""
        epoch, step = divmod(step, self.steps)
        first = (step * self.world + self.rank) * self.batch
        for b in range(self.batch):
            i, picture = self._next_good(epoch, first + b, met.bad)
            met.index.append(i)
            size = picture.height, picture.width
            met.params.append(draw_views(self.augment, self.seed, epoch, i, *size))
            yield picture

    def _next_good(self, epoch: int, position: int, bad: list[Bad]) -> tuple[int, Any]:
        """(index, picture) at this position of the epoch's order, or at the next readable one."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.source), self.seed, epoch))
        order = self._order[1]
        tries = min(_TRIED, len(order) - len(self.known_bad))
        following = (int(order[k % len(order)]) for k in range(position, position + len(order)))
        for i in itertools.islice((i for i in following if i not in self.known_bad), tries):
            try:
                return i, self._open(self.source.read(i))
            except UserError:
                raise
            except Exception as error:  # Pillow's plugins raise anything for a broken file
                bad.append((i, self.source.name(i), f"{type(error).__name__}: {error}"))
        _, name, reason = bad[-tries]
        raise UserError(
            f"{tries} pictures in a row cannot be read, the first: {name}: {reason}. "
            f"There are {len(order)} pictures in all; check the folder and its permissions"
        )

    def _open(self, data: bytes) -> Any:
        """The decoded picture, or the file with its size."""
        if "files" in self.kind:
            return as_file(data, self.channels, check=self.kind == "checked files")
        return pillow.decode(data, self.channels)


class _Met(NamedTuple):
    """What a batch is made of."""

    index: list[int]  # type: ignore[assignment]
    params: list[list[ViewParams]]
    bad: list[Bad]

    def views(self, views: np.ndarray, small: np.ndarray, *, finished: bool = False) -> Views:
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if not finished:
            rows = augment_table([p for views in self.params for p in views])
            table = torch.from_numpy(rows.reshape(len(self.params), -1, rows.shape[1]))
            table = table.transpose(0, 1).contiguous()  # [V, B, 12]
            tables = table[:2], table[2:]
        return Views(
            torch.from_numpy(views),
            torch.from_numpy(small) if len(small) else None,
            torch.tensor(self.index),
            self.bad,
            tables[0],
            tables[1] if len(small) else None,
        )


def same(item: Any) -> Any:
    return item


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches the whole process group: a worker that died of it would take the step along
    that the run is about to finish. Workers end with the run, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
