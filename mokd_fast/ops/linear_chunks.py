"""The walk of linear_distill_cross_entropy over K: chunks of logits, made, used and dropped.

Forward makes a chunk of the logits, adds it to the running (max, sum, dots) of every row and drops
it; backward goes back, makes it again and from it

    dS = n softmax(s / tau) - Q     dX += dS W_chunk     dW_chunk = dS^T X

Letters: V student views, T teacher rows, B images, K prototypes, D features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distill, onednn, reference
from .dispatch import constant


class Call(NamedTuple):
    """The flat arguments of both passes; one entry a target in every list."""

    features: Tensor  # [V, B, D]
    weight: Tensor  # [K, D]
    rows: list[Tensor]  # features [T, B, D] or, where there are no prototypes, [T, B, K]
    prototypes: list[Tensor]  # [K, D] or empty
    centers: list[Tensor]  # [K] or empty
    row_weights: list[Tensor]  # [B] or empty
    scalars: Tensor  # [1 + 2 targets]: temperatures, the student's first, then weights
    pairs: list[float]  # [sum T, V] flat
    probabilities: list[bool]
    dtype: torch.dtype  # of the products
    chunk: int
    first_kept: int  # column from which on the logits are kept for backward: where a chunk begins
    backend: str


# Measured on two cores with 32 MiB of L3 (`chunks` of bench/linear_distill.py): chunks half as long
# take 3 % longer, chunks twice as long as much time, and twice the memory.
ROW_BYTES, CHUNK_BYTES, KEEP_BYTES = 16 << 10, 16 << 20, 7 << 19


def chunk_size(features: Tensor, rows: int, dtype: torch.dtype) -> int:
    """Columns of a chunk of logits [rows, columns], those of the student and its teachers.

    On the CPU ROW_BYTES a row, fewer where the student's would take more than CHUNK_BYTES. On a GPU
    as many as half of the L2 holds with all that they touch, the student's gradient and the
    prototypes; that is what backward needs beyond inputs and gradients, too.
    """
    views, images, width = features.shape
    if features.device.type == "cuda":  # no other size was ever tried
        numbers = rows + views * images + width  # of a column
        columns = l2_bytes(features.get_device()) // 2 // (numbers * dtype.itemsize)
        return max(512, columns // 256 * 256)
    columns = min(ROW_BYTES, CHUNK_BYTES // max(views * images, 1)) // dtype.itemsize
    return max(256, columns // 256 * 256)


@constant  # Dynamo would have a graph's guards hold the device's properties
def l2_bytes(index: int) -> int:
    """Of the last-level cache of a GPU."""
    size: int = torch.cuda.get_device_properties(index).L2_cache_size
    return size


def first_kept(features: Tensor, rows: int, columns: int, chunk: int, dtype: torch.dtype) -> int:
    """The column from which on logits [rows, columns] are kept: as many chunks of them as
    KEEP_BYTES hold, and one at least. On a GPU one of several saves little and is half as much
    memory again: there nothing is kept, unless one chunk is all."""
    chunks = -(-columns // chunk)
    if features.device.type == "cuda" and chunks > 1:
        return columns
    keep = max(1, KEEP_BYTES // (max(rows, 1) * chunk * dtype.itemsize))
    return max(0, chunks - keep) * chunk


class Chunk(NamedTuple):
    """Some columns of everything that has columns."""

    at: slice
    weight: Tensor  # [chunk, D] in the products' dtype; the next chunk overwrites it
    student: Tensor  # [V, B, chunk]
    rows: list[Tensor]  # [T, B, chunk]
    centers: list[Tensor]  # [chunk] or empty


class _Walk:
    """The chunks of a call. Rows of the same prototypes share a product, the student's with any.

    The logits of a chunk are a block [rows, chunk]. Those of the last chunks stay in `kept`, block
    after block; the others lie in one place, one after the other.
    """

    def __init__(self, call: Call, kept: Tensor | None = None) -> None:
        self.call, self.starts = call, range(0, len(call.weight), call.chunk)
        self._stored = [i for i, p in enumerate(call.prototypes) if not p.numel()]
        groups: dict[tuple[Any, ...], list[int]] = {}  # by their prototypes; -1 is the student
        for i, prototypes in enumerate(call.prototypes):
            if prototypes.numel():
                groups.setdefault(_identity(prototypes), []).append(i)
        last = groups.pop(_identity(call.weight), [])  # its prototypes are needed afterwards
        groups[_identity(call.weight)] = [*last, -1]
        rows, matrices = [*call.rows, call.features], [*call.prototypes, call.weight]
        self._groups = [
            (
                _matrix([rows[i] for i in own], call.dtype),
                matrices[own[-1]],
                [(i, *rows[i].shape[:2]) for i in own],
            )
            for own in groups.values()
        ]
        self.x = _matrix([call.features], call.dtype)
        self._rows = row_count(call.features, call.rows, call.prototypes)
        self._made = kept is not None
        if kept is None:
            kept = self.x.new_empty(self._rows * (len(call.weight) - call.first_kept))
        self.kept = kept
        self._place = self.x.new_empty(self._rows * call.chunk if call.first_kept else 0)
        widths = [m.shape[1] for _, m, _ in self._groups if m.dtype != call.dtype]
        self.cast = self.x.new_empty(call.chunk * max(widths, default=0))

    def chunk(self, start: int) -> Chunk:
        """The columns from `start` on; logits that are not kept are overwritten by the next."""
        call = self.call
        at = slice(start, min(start + call.chunk, len(call.weight)))
        columns, kept, end = at.stop - at.start, start >= call.first_kept, 0
        place, offset = self._place, 0
        if kept:
            place, offset = self.kept, self._rows * (start - call.first_kept)
        block = place[offset : offset + self._rows * columns].view(-1, columns)
        rows = [*call.rows, call.features]
        for inputs, matrix, members in self._groups:
            begin, end = end, end + len(inputs)
            logits = block[begin:end]
            if not (kept and self._made):
                weight = self._cast(matrix[at])
                logits = _product(inputs, weight, logits, kept)
            elif matrix is call.weight:
                weight = self._cast(matrix[at])
            first = 0
            for i, count, images in members:
                last = first + count * images
                rows[i] = logits[first:last].view(count, images, columns)
                first = last
        for i in self._stored:
            rows[i] = rows[i][..., at]
        centers = [c[at] if c.numel() else c for c in call.centers]
        *rows, student = rows
        return Chunk(at, weight, student, rows, centers)

    def _cast(self, weight: Tensor) -> Tensor:
        """Some prototypes in the products' dtype, in one place."""
        if weight.dtype == self.call.dtype:
            return weight
        return self.cast[: weight.numel()].view(weight.shape).copy_(weight)


def row_count(features: Tensor, rows: Sequence[Tensor], prototypes: Sequence[Tensor]) -> int:
    """Rows of logits that are products."""
    teachers = [r for r, p in zip(rows, prototypes, strict=True) if p.numel()]
    return sum(r.shape[0] * r.shape[1] for r in (features, *teachers))


def _identity(matrix: Tensor) -> tuple[Any, ...]:
    return matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride()


def _matrix(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Features [T, B, D] of one or several targets below each other. [sum T * B, D]"""
    return torch.cat([r.flatten(0, 1) for r in rows]).to(dtype)


def _onednn(a: Tensor) -> bool:
    """16-bit products are oneDNN's anyway."""
    return a.numel() > 0 and a.dtype == torch.float32 and onednn.usable(a.device.type, a.dtype)


def _product(a: Tensor, weight: Tensor, place: Tensor, kept: bool) -> Tensor:
    """a @ weight.T, at `place` where it has to be there."""
    if not _onednn(a):
        return torch.mm(a, weight.t(), out=place)
    found = onednn.linear(a, weight)
    return place.copy_(found) if kept else found


def forward_pass(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], terms [targets], stats [V + T, B, 2], and the logits that are kept, flat."""
    kernels = distill._kernels(call.backend).ForwardChunks(len(call.weight))
    rest = call.row_weights, call.scalars, call.pairs, call.probabilities
    with torch.autocast(call.features.device.type, enabled=False):
        walk = _Walk(call)
        for start in walk.starts:
            chunk = walk.chunk(start)
            kernels.add(chunk.student, chunk.rows, chunk.centers, *rest)
        return *kernels.outputs, walk.kept


def backward_pass(
    grad: Tensor, stats: Tensor, kept: Tensor, call: Call, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients [V, B, D] and [K, D], those that are needed; else empty."""
    kernels = distill._kernels(call.backend)
    features, weight = call.features, call.weight
    rest = call.row_weights, call.scalars, call.pairs, call.probabilities
    dw = weight.new_empty(weight.shape if needs[1] else 0)
    with torch.autocast(features.device.type, enabled=False):
        walk = _Walk(call, kept)
        x = walk.x
        total = x.new_zeros(x.shape, dtype=reference.accumulation_dtype(x))
        place = x.new_empty(len(x) * min(call.chunk, len(weight)))
        for start in reversed(walk.starts):
            chunk = walk.chunk(start)
            out = place[: chunk.student.numel()].view(chunk.student.shape)
            args = chunk.student, chunk.rows, chunk.centers, *rest
            ds = kernels.distill_backward(grad, stats, *args, out=out).flatten(0, 1)
            if needs[0]:
                _add_product(total, ds, chunk.weight)
            if needs[1]:
                _put_product(dw[chunk.at], ds.t(), x, walk.cast)
    dx = total.to(features.dtype).view(features.shape) if needs[0] else features.new_empty(0)
    return dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. On the CPU a product of 16-bit matrices is rounded before it is added."""
    if _onednn(a):
        total += onednn.linear(a, b.t())
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def _put_product(out: Tensor, a: Tensor, b: Tensor, place: Tensor) -> None:
    """out = a @ b, in out's dtype; of another one it is made in `place` first."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and a.dtype.itemsize == 2 and out.dtype == torch.float32:
        torch.mm(a, b, out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b, out=place[: out.numel()].view(out.shape)))
