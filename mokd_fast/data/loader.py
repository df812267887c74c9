"""The reference loader: batches of uint8 views from any source, by Pillow, in worker processes.

A worker makes a whole batch, writing each crop into its place, so that nothing is collated. The
batch of micro-step s is a function of (source, augmentation, seed, batch x world, s) alone: any
number of workers gives the same bits, and so does a start in the middle.
"""

import functools
import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .params import AugmentConfig, draw_views, epoch_order
from .pillow import decode, render
from .sources import Source

_TRIED = 100  # unreadable pictures in a row after which the data set itself is at fault
_log = logging.getLogger(__name__)

Bad = tuple[int, str, str]  # index, name, reason


class Views(NamedTuple):
    """One batch. H, W: the size of a global view, h, w: of a local one."""

    globals: torch.Tensor  # uint8 [2, B, H, W, C]
    locals: torch.Tensor | None  # uint8 [L, B, h, w, C], None without local views
    index: torch.Tensor  # type: ignore[assignment]  # int64 [B], positions in the full list
    bad: list[Bad]  # the unreadable pictures that were met and replaced


@dataclass
class _Batches(Dataset):
    """Item s is the finished batch of micro-step s. It lives in the worker."""

    source: Source
    augment: AugmentConfig
    batch: int
    channels: int
    seed: int
    accumulate: int
    rank: int
    world: int
    known_bad: frozenset[int]

    def __post_init__(self) -> None:
        self.steps = len(self.source) // (self.batch * self.world * self.accumulate)
        self.steps *= self.accumulate  # an optimizer step never crosses the end of an epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, step: int) -> Views | UserError:
        try:
            return self._assemble(*divmod(step, self.steps))
        except UserError as error:  # returned: DataLoader would wrap it in a traceback's text
            return error

    def _assemble(self, epoch: int, step: int) -> Views:
        cfg, B, C = self.augment, self.batch, self.channels
        views = np.empty((2, B, *cfg.global_hw, C), np.uint8)
        small = np.empty((cfg.locals, B, *cfg.local_hw, C), np.uint8)
        index = np.empty(B, np.int64)
        bad: list[Bad] = []
        first = (step * self.world + self.rank) * B
        for b in range(B):
            i, image = self._next_good(epoch, first + b, bad)
            params = draw_views(cfg, self.seed, epoch, i, image.height, image.width)
            for v, crop in enumerate(render(image, params, cfg)):
                (views if v < 2 else small)[v if v < 2 else v - 2, b] = crop
            index[b] = i
        return Views(
            torch.from_numpy(views),
            torch.from_numpy(small) if cfg.locals else None,
            torch.from_numpy(index),
            bad,
        )

    def _next_good(self, epoch: int, position: int, bad: list[Bad]) -> tuple[int, Image.Image]:
        """(index, picture) at this position of the epoch's order, or at the next readable one."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.source), self.seed, epoch))
        order = self._order[1]
        tries = min(_TRIED, len(order) - len(self.known_bad))
        following = (int(order[k % len(order)]) for k in range(position, position + len(order)))
        for i in itertools.islice((i for i in following if i not in self.known_bad), tries):
            try:
                return i, decode(self.source.read(i), self.channels)
            except UserError:
                raise
            except Exception as error:  # Pillow's plugins raise anything for a broken file
                bad.append((i, self.source.name(i), f"{type(error).__name__}: {error}"))
        _, name, reason = bad[-tries]
        raise UserError(
            f"{tries} pictures in a row cannot be read, the first: {name}: {reason}. "
            f"There are {len(order)} pictures in all; check the folder and its permissions"
        )


class _From(Sampler):
    """Micro-steps from `start`, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


class ViewLoader:
    """Batches of views of a source, without end, from any micro-step on.

    batch: pictures in a micro-step of this process; channels: 1 or 3; workers: processes that
    prepare batches, 0 for none; accumulate: micro-steps of an optimizer step; rank, world: which
    of how many training processes this is. An epoch is a permutation of the source, cut to whole
    optimizer steps of batch x accumulate x world pictures. An unreadable picture is logged once,
    kept in `bad_files` (name -> reason), and replaced by the next readable one of the epoch's
    order. known_bad: positions of pictures that are replaced in the same way without being read.
    Raises UserError when the source is smaller than an optimizer step or all of it is known bad.

    steps_per_epoch: micro-steps of an epoch, a multiple of accumulate.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        *,
        batch: int,
        channels: int,
        seed: int,
        workers: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        known_bad: frozenset[int] = frozenset(),
    ) -> None:
        if channels not in (1, 3):
            raise UserError(f"channels must be 1 or 3, got {channels}")
        if batch < 1 or batch * accumulate * world > len(source):
            each = f" on each of {world} processes" if world > 1 else ""
            raise UserError(
                f"a batch of {batch * accumulate}{each} does not fit a data set of {len(source)} "
                f"pictures: set train.batch to {len(source) // world} or less, or add pictures"
            )
        if len(known_bad) >= len(source):
            raise UserError(f"none of the {len(source)} pictures can be read")
        self._batches = _Batches(
            source, augment, batch, channels, seed, accumulate, rank, world, known_bad
        )
        self._workers = workers
        self.steps_per_epoch = self._batches.steps
        self.bad_files: dict[str, str] = {}

    def batches(self, start: int = 0) -> Iterator[Views]:
        """The batches of micro-steps start, start + 1, …; raises UserError if none can be read."""
        loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a batch
            sampler=_From(start),
            num_workers=self._workers,
            collate_fn=_same,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else DataLoader draws a seed from the global one
        )
        try:
            for views in loader:
                if isinstance(views, UserError):
                    raise views
                self._note(views.bad)
                yield views
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"a loader worker died ({error}). Memory, or shared memory in a container, may be "
                "short: set a smaller data.workers or train.batch, or docker run --shm-size=8g"
            ) from error

    def _note(self, bad: list[Bad]) -> None:
        for _, name, reason in bad:
            if name not in self.bad_files:
                self.bad_files[name] = reason
                _log.warning("skipped %s: %s", name, reason)


def _same(item: Any) -> Any:
    return item


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches the whole process group: a worker that died of it would take the step along
    that the run is about to finish. Workers end with the run, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.lru_cache(maxsize=16)  # a tensor made from numbers on a GPU is a host sync: once
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, ...]:
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return tuple(t.float().view(-1, 1, 1).to(device) for t in (1 / (255 * s), -m / s))


def normalize(
    views: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """(x / 255 - mean) / std: uint8 [..., H, W, C] to float [..., C, H, W] on the same device.

    Computed in fp32, rounded once to `dtype`. mean, std: one number a channel. channels_last
    keeps the memory as it is (NHWC for the last three axes); else the result is contiguous.
    Raises UserError when the numbers do not fit the channels.
    """
    if not len(mean) == len(std) == views.shape[-1]:
        raise UserError(
            f"mean has {len(mean)} and std {len(std)} numbers, the views {views.shape[-1]} channels"
        )
    scale, shift = _affine(tuple(mean), tuple(std), views.device)
    x = views.movedim(-1, -3)
    x = x if channels_last else x.contiguous()  # moved as bytes: a quarter of the traffic
    return x.to(torch.float32).mul(scale).add_(shift).to(dtype)
