"""Loaders: batches of views of any source, made in worker processes, without end.

Three over the same numbers: "pillow", the reference, does all of it with Pillow; "cpu" decodes with
Pillow, resizes with PyTorch, and leaves the rest to `ops.augment_crops`; so does "dali", which
decodes and resizes with NVIDIA DALI, on the CPU or the GPU.
"""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..errors import UserError
from ..ops import augment_crops
from ..ops import cpu as native
from ..ops.reference import affine
from .batches import Bad, Batches, Views, leave_signals_to_the_run, same
from .params import AugmentConfig
from .sources import Source

_log = logging.getLogger(__name__)

Loader = Literal["cpu", "dali", "pillow"]


class _From(Sampler):
    """Micro-steps from `start` up to and without `stop`, by default without end."""

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        if self.stop is None:
            return itertools.count(self.start)
        return iter(range(self.start, self.stop))


class ViewLoader:
    """Batches of views of a source, without end, from any micro-step on.

    batch: pictures in a micro-step of this process; channels: 1 or 3; workers: processes that
    prepare batches, 0 for none; accumulate: micro-steps of an optimizer step; rank, world: which
    of how many training processes this is; loader: who decodes and crops; device: of the
    training, where DALI works too. An epoch is a permutation of the source, cut to whole optimizer
    steps of batch x accumulate x world pictures, or without drop_last filled up to them with its
    first pictures. An unreadable picture is logged once, kept in `bad_files` (name -> reason), and
    replaced by the next readable one of the epoch's order. known_bad: positions of pictures that
    are replaced in the same way without being read. Raises UserError when the source is smaller
    than an optimizer step or all of it is known bad, and for a loader that is not there.

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
        drop_last: bool = True,
        loader: Loader = "pillow",
        device: torch.device | str = "cpu",
    ) -> None:
        if reason := loader_why_not(loader):
            raise UserError(f"data.loader={loader}: {reason}")
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
        make = functools.partial(
            Batches, source, augment, batch, channels, seed, accumulate, rank, world, drop_last,
            known_bad,
        )  # fmt: skip
        self._batches = make(kind="files" if loader == "dali" else loader)
        self._checked, self._cpu = make(kind="checked files"), make(kind="cpu")  # where DALI fails
        self.loader, self.device = loader, torch.device(device)
        self._workers = workers
        self.steps_per_epoch = self._batches.steps
        self.bad_files: dict[str, str] = {}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Views]:
        """The batches of micro-steps start, start + 1, … up to and without stop, by default without
        end; raises UserError if none can be read."""
        batches = self._made(start, stop)
        if self.loader == "dali":
            from .dali import Cropper

            threads = max(1, self._workers)
            cropper = Cropper(self._batches, threads, self.device)
            batches = cropper.views(batches, lambda step: _good(self._checked[step]), self._refused)
        for views in batches:
            self._note(views.bad)
            yield views

    def _made(self, start: int, stop: int | None) -> Iterator[Any]:
        """What the workers make, in order."""
        dali, gpu = self.loader == "dali", self.device.type == "cuda"
        loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a batch
            sampler=_From(start, stop),
            # DALI decodes in threads of its own; where it waits for a disk, few processes read.
            num_workers=min(self._workers, 2 if gpu else 0) if dali else self._workers,
            collate_fn=same,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator(),  # else DataLoader draws a seed from the global one
            pin_memory=gpu and not dali,  # else the copy to the GPU waits
        )
        try:
            for made in loader:
                yield _good(made)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"a loader worker died ({error}). Memory, or shared memory in a container, may be "
                "short: set a smaller data.workers or train.batch, or docker run --shm-size=8g"
            ) from error

    def _refused(self, step: int, reason: str) -> Views:
        """A batch with a picture that DALI cannot decode but Pillow can."""
        views: Views = _good(self._cpu[step])
        names = ", ".join(self._cpu.source.name(i) for i in views.index.tolist())
        _log.warning(
            "DALI refuses a picture of %s that Pillow can read, so the cpu loader took them: %s",
            names, reason.strip().replace("\n", " "),
        )  # fmt: skip
        return views

    def _note(self, bad: list[Bad]) -> None:
        for _, name, reason in bad:
            if name not in self.bad_files:
                self.bad_files[name] = reason
                _log.warning("skipped %s: %s", name, reason)


def _good(made: Any) -> Any:
    """What `Batches` made, or its error raised."""
    if isinstance(made, UserError):
        raise made
    return made


def loader_why_not(loader: str) -> str | None:
    """Why a loader is not to be had here, or None."""
    if loader != "dali":
        return None
    try:
        found = find_spec("nvidia.dali")
    except ModuleNotFoundError:  # nor anything else of NVIDIA's: PyTorch without CUDA
        found = None
    return None if found else "NVIDIA DALI is not installed: pip install 'mokd_fast[dali]' (Linux)"


def choose_loader(wish: str, device: torch.device | str = "cpu") -> tuple[Loader, str]:
    """The loader that `data.loader` means for a training on `device`, and a line on all three."""
    dali = loader_why_not("dali") or "can run too, but no GPU has measured it beside cpu"
    lines = {"cpu": "can run too", "dali": dali, "pillow": "can run too, the reference"}
    best: Loader = "cpu"
    if torch.device(device).type == "cpu" and native.native is None:
        # PyTorch's steps take longer than Pillow's, in the process that trains (bench/augment.py).
        lines["cpu"] = "can run too, but augment_crops is slow without the native module"
        best = "pillow"
    chosen: Loader = best if wish == "auto" else wish  # type: ignore[assignment]
    if wish == "auto" or loader_why_not(wish) is None:
        lines[chosen] = "chosen"
    return chosen, "\n".join(f"{name}: {line}" for name, line in lines.items())


def finish(
    views: Views,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A batch as networks take it: normalised [views, B, C, H, W] of `dtype` on the device.

    What the loader left to do is done there. mean, std: one number a channel. channels_last keeps
    the memory as it is (NHWC for the last three axes); else the result is contiguous.
    """

    def one(crops: Tensor, params: Tensor | None) -> Tensor:
        crops = crops.to(device, non_blocking=True)
        if params is None:
            return normalize(crops, mean, std, dtype=dtype, channels_last=channels_last)
        rows = params.flatten(0, 1).to(device, non_blocking=True)
        x = augment_crops(crops.flatten(0, 1), rows, mean=mean, std=std, dtype=dtype)
        x = x.unflatten(0, crops.shape[:2])
        return x if channels_last else x.contiguous()

    small = None if views.locals is None else one(views.locals, views.local_params)
    return one(views.globals, views.global_params), small


@functools.lru_cache(maxsize=16)  # a tensor made from numbers on a GPU is a host sync: once
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(t).view(-1, 1, 1).to(device) for t in affine(mean, std))


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
