"""The CUDA C++ kernels of the native module; the same calls as `cpu`, on the current stream.

Importing this, or asking about tensors on the CPU, does not initialise CUDA.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.configs import Config, choose
from . import cpu
from .dispatch import constant
from .reference import accumulation_dtype


def why_not(student: Tensor, rows: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels cannot take student [V, B, K] and rows [T_i, B, K], or None."""
    for tensor in (student, *rows):
        if tensor.device.type != "cuda":
            return f"it takes tensors on a CUDA device, one is on {tensor.device}"
        if tensor.dtype not in cpu.TYPES:
            return f"it takes fp32, fp64, bf16 and fp16, one tensor is {tensor.dtype}"
    return _native_why_not(len(student), sum(len(r) for r in rows), student.get_device())


def search_why_not(first: Tensor, rest: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels of the feature search cannot take these tensors, or None."""
    return why_not(first[:1], ()) if first.device.type == "cuda" else why_not(first, rest)


def search_forward(x: Tensor, k: Tensor, v: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """As `cpu.search_forward`, and so the other three."""
    return cpu.search_forward(x, k, v, weights, run=_search_pass(x))


def search_backward(
    grad: Tensor, stats: Tensor, x: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    return cpu.search_backward(grad, stats, x, k, v, run=_search_pass_back)


def joint_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return cpu.joint_forward(*arguments, run=_search_pass(arguments[0]))


def joint_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return cpu.joint_backward(*arguments, run=_search_pass_back)


def _search_pass(like: Tensor) -> Callable[..., None]:
    return lambda call, to: call.cuda_forward(to, *_place(like))


def _search_pass_back(call: Any, stats: Tensor, width: int, arguments: Sequence[Any]) -> None:
    out, delta = stats.new_empty(*stats.shape[:3], width), stats.new_empty(stats.shape[:3])
    call.cuda_backward(*arguments, out.data_ptr(), delta.data_ptr(), *_place(stats))


@constant  # Dynamo cannot trace the native module
def _native_why_not(views: int, teachers: int, device: int) -> str | None:
    """Whether the module, the driver and the GPU take so many rows."""
    if cpu.native is None:
        return cpu.missing
    if not hasattr(cpu.native, "cuda_versions"):
        return "the native module was built without CUDA (no nvcc; MOKD_FAST_BUILD=cuda says why)"
    # The rows and pairs of a call are a kernel parameter of fixed size (csrc/cuda/distill.h).
    for count, most, name in zip(
        (views, teachers, views * teachers),
        cpu.native.CUDA_CAPACITY,
        ("student views", "teacher rows", "pairs of a teacher row and a view"),
        strict=True,
    ):
        if count > most:
            return f"it takes up to {most} {name}, these are {count}"
    driver, built = cpu.native.cuda_versions()
    if driver // 1000 < built // 1000:  # within a major version every driver runs every build
        return f"the driver takes CUDA {_version(driver)}, the kernels need {_version(built)}"
    major, minor = torch.cuda.get_device_capability(device)
    archs = cpu.native.build_info()["cuda_archs"]
    if not any(_runs(arch, major, minor) for arch in archs):
        return (
            f"the kernels were built for {', '.join(archs)}, this GPU is sm_{major}{minor} "
            f"(MOKD_FAST_CUDA_ARCHS={major}{minor} builds for it)"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _runs(arch: str, major: int, minor: int) -> bool:
    """Machine code runs on its own and later minor versions, that of 90a and the like on 9.0 alone,
    PTX on everything later."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    assert match is not None, arch
    built = int(match[2]), int(match[3])
    if match[1] == "compute":
        return built <= (major, minor)
    return built == (major, minor) or (not match[4] and built[0] == major and built[1] <= minor)


def distill_forward(
    student: Tensor, rows: Sequence[Tensor], *rest: Any, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2]; arguments as `distill._forward`.

    The maxima in stats are those of the logits, before the temperature (csrc/cuda/distill.cu).
    """
    chunks = ForwardChunks(student.shape[2])
    chunks.add(student, rows, *rest, config=config)
    return chunks.outputs


class ForwardChunks:
    """`distill_forward` for K columns that come in chunks, from left to right.

    All that is kept of a chunk are the states of its tiles, which are merged once, in the end:
    2 (V + T) + V T numbers a tile and image.
    """

    def __init__(self, columns: int) -> None:
        self._left = columns
        self._states: list[Tensor] = []  # [B, state_size, tiles] of each chunk
        self._shares: Tensor | None = None  # of each image in each target, and a counter

    def add(
        self, student: Tensor, rows: Sequence[Tensor], *rest: Any, config: Config | None = None
    ) -> None:
        """Some columns of all arguments of `distill_forward`, centers too."""
        tile = _tile(student, rows, config, partial(_both_passes, student, rows, *rest))
        call, _alive = _native_call(student, rows, *rest)
        size = student.shape[1], call.state_size(), call.cuda_plan(tile)[1]
        states = student.new_empty(size, dtype=accumulation_dtype(student))
        if self._shares is None:
            count = len(rows) * student.shape[1] + 1
            self._shares = student.new_empty(count, dtype=torch.float64)
        shares = self._shares.data_ptr()
        counter = shares + 8 * (len(self._shares) - 1)
        call.cuda_forward(states.data_ptr(), counter, tile, *_place(student))
        self._states.append(states)
        self._left -= student.shape[2]
        if self._left:
            return
        states = self._states[0] if len(self._states) == 1 else torch.cat(self._states, 2)
        self.outputs = loss, terms, stats = cpu.results(student, rows)
        results = (t.data_ptr() for t in (stats, terms, loss, states))
        call.cuda_finish(*results, states.shape[2], shares, counter, *_place(student))


def distill_backward(
    grad: Tensor,
    stats: Tensor,
    student: Tensor,
    rows: Sequence[Tensor],
    *rest: Any,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Gradient [V, B, K] of the student's dtype, in `out`, contiguous, if there is one; arguments
    after `student` as in the forward. It needs no more of other columns than the stats say."""
    if out is None:
        out = student.new_empty(student.shape)
    grad = grad.to(accumulation_dtype(student)).contiguous()  # expanded gradients have stride 0
    tile = _tile(student, rows, config)
    call, _alive = _native_call(student, rows, *rest)
    call.cuda_backward(stats.data_ptr(), grad.data_ptr(), out.data_ptr(), tile, *_place(student))
    return out


def _native_call(student: Tensor, rows: Sequence[Tensor], *rest: Any) -> tuple[Any, list[Tensor]]:
    """As `cpu.native_call`. Scalars on the host, `rest[2]`, go along as arguments of a kernel."""
    call, alive = cpu.native_call(student, rows, *rest)
    call.scalars_on_host = rest[2].device != student.device
    return call, alive


def _tile(
    student: Tensor,
    rows: Sequence[Tensor],
    config: Config | None,
    run: Callable[[Config], Any] | None = None,
) -> int:
    """Columns of a tile, for the columns that one launch covers: a chunk is a case of its own."""
    return (config or choose("cuda", student, sum(len(r) for r in rows), run)).columns


def _both_passes(*arguments: Any) -> None:
    """The arguments of `distill_forward`, its configuration last: what is timed to choose one."""
    *call, config = arguments
    stats = distill_forward(*call, config=config)[2]
    distill_backward(torch.ones_like(stats[0, 0, 0]), stats, *call, config=config)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Index and current stream of the tensor's device."""
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream
