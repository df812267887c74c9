"""Decode and crop with NVIDIA DALI 2.x: a pure function of files and boxes, on the CPU or the GPU.

Which pictures, in which order, and every number come from `Batches`, as for the other loaders; DALI
decodes each picture once and cuts all its crops (bicubic, antialiased) out of it. It has no state
that a checkpoint would need. What follows a crop is `ops.augment_crops`.

After an error a DALI pipeline is dead and what it had been given is lost. So what is on its way is
kept here, for a new one: the batch that failed goes there once more, after Pillow has looked for
the bad pictures in it; if DALI refuses it again, another loader makes it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from .batches import Batches, Files, Views

_PREFETCH = 2  # batches ahead


@pipeline_def(enable_conditionals=False)
def graph(
    source: Callable[[], list[list[np.ndarray]]],
    sizes: list[tuple[int, int]],
    channels: int,
    gpu: bool,
) -> tuple:
    """Files [bytes] and boxes [V, 4] of a batch to V outputs uint8 [h, w, C] a picture."""
    data, boxes = fn.external_source(
        source=source, num_outputs=2, dtype=[types.UINT8, types.INT32], ndim=[1, 2]
    )
    images = fn.decoders.image(
        data,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB if channels == 3 else types.GRAY,
        adjust_orientation=False,  # as Pillow and ImageFolder
        jpeg_fancy_upsampling=True,  # libjpeg's, on a GPU too
    )
    crops = []
    for v, size in enumerate(sizes):
        # Not resize(roi_start=…): it filters across the edge of the box.
        crop = fn.slice(images, start=boxes[v, 0:2], shape=boxes[v, 2:4], axes=[0, 1])
        crops.append(fn.resize(crop, size=size, interp_type=types.INTERP_CUBIC, antialias=True))
    return tuple(crops)


class Cropper:
    """Batches of files to batches of views."""

    def __init__(self, batches: Batches, threads: int, device: torch.device) -> None:
        cfg = batches.augment
        self._gpu = device.type == "cuda"
        self._device = device
        self._sizes = [cfg.size_of(v) for v in range(2 + cfg.locals)]
        self._options = {
            "batch_size": batches.batch,
            "num_threads": threads,
            "device_id": (device.index or 0) if self._gpu else None,
            "prefetch_queue_depth": _PREFETCH,
        }
        self._channels = batches.channels
        self._sent: deque[Files] = deque()  # in the pipeline, oldest first
        self._lost: deque[Files] = deque()  # of a dead one, to be sent again
        self._end: Exception | None = None  # of the files, raised when all before it are out

    def views(
        self,
        files: Iterator[Files],
        check: Callable[[int], Files],
        refused: Callable[[int, str], Views],
    ) -> Iterator[Views]:
        """In order. `check` makes the files of a micro-step anew, without bad ones; `refused` the
        views of one that DALI will not take for all that."""

        def send() -> list[list[np.ndarray]]:
            try:
                self._sent.append(self._lost.popleft() if self._lost else next(files))
            except Exception as error:
                self._end = self._end or error  # asked again after its error, a generator just ends
                raise StopIteration from None
            return _arrays(self._sent[-1])

        pipe, checked = None, -1
        try:
            while True:
                if pipe is None:
                    pipe = graph(send, self._sizes, self._channels, self._gpu, **self._options)
                    pipe.process = os.getpid()
                    pipe.build()
                try:
                    crops = self._run(pipe)
                except StopIteration:
                    break
                except RuntimeError as error:
                    if not self._sent:
                        raise
                    failed = self._lose()
                    _close(pipe)
                    pipe = None
                    if failed.step == checked:
                        yield refused(failed.step, str(error))
                    else:
                        checked = failed.step
                        self._lost.appendleft(check(checked))
                    continue
                views = self._sent.popleft().views
                small = _stacked(crops[2:]) if len(crops) > 2 else None
                yield views._replace(globals=_stacked(crops[:2]), locals=small)
        finally:
            _close(pipe)
        if not isinstance(self._end, StopIteration):
            raise self._end  # type: ignore[misc]

    def _lose(self) -> Files:
        """The batch that failed; those behind it are to be sent again."""
        failed = self._sent.popleft()
        self._lost.extendleft(reversed(self._sent))
        self._sent.clear()
        return failed

    def _run(self, pipe: object) -> list[Tensor]:
        """V crops [B, h, w, C]; on a GPU in the order of the current stream, without a wait."""
        if self._gpu:
            stream = torch.cuda.current_stream(self._device)
            return [torch.from_dlpack(o.as_tensor()) for o in pipe.run(cuda_stream=stream)]  # type: ignore[attr-defined]
        return [torch.from_dlpack(o.as_tensor()) for o in pipe.run()]  # type: ignore[attr-defined]


def _stacked(crops: list[Tensor]) -> Tensor:
    """[V, B, h, w, C]. On the CPU NumPy copies: torch's OpenMP threads wait for each other in busy
    loops while DALI's have the cores, 2 of 11 ms a picture (2 cores, 2 x 224 and 8 x 96)."""
    if crops[0].is_cuda:
        return torch.stack(crops)
    return torch.from_numpy(np.stack([crop.numpy() for crop in crops]))


def _arrays(files: Files) -> list[list[np.ndarray]]:
    data = files.data.numpy()
    starts = [0, *files.ends.tolist()[:-1]]
    pictures = [data[a:b] for a, b in zip(starts, files.ends.tolist(), strict=True)]
    return [pictures, list(files.boxes.numpy())]


_elsewhere: list[Any] = []


def _close(pipe: Any) -> None:
    """Ends a pipeline's threads now. Left to the garbage collector, that may happen in a forked
    worker, which would wait for ever for threads that it does not have."""
    if pipe is not None and pipe.process != os.getpid():
        _elsewhere.append(pipe)
    elif pipe is not None:
        pipe._shutdown()
