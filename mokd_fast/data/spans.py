"""Pictures that lie within larger files: a span of bytes each, read alone."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .files import Labels, Names, stamp

_OPEN = 64  # files that a process keeps open; `ulimit -n` is 1024 on most machines


class Spans(NamedTuple):
    """Where N pictures lie. A size of -1: there is none (a null in a table)."""

    file: np.ndarray  # int32 [N], position in the list of files
    start: np.ndarray  # int64 [N]
    size: np.ndarray  # int64 [N]


class Store(Protocol):
    """Where the large files lie."""

    def read(self, path: str, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start` on; fewer at the end of the file."""

    def stamp(self, path: str) -> tuple[int, int]:
        """(size, time of change) of a file; (-1, -1) when there is none."""


class SpanSource:
    """Spans of files, in the order given; see `Source`.

    shown: the files by the names for messages, where they are others (of a copy, the original);
    names: of the pictures within their files, default #0, #1, … in each; head: bytes to set
    before each picture, for pixels that come without a header.
    """

    def __init__(
        self,
        store: Store,
        files: Sequence[str],
        spans: Spans,
        *,
        shown: Sequence[str] | None = None,
        names: Names | None = None,
        head: bytes = b"",
        labels: Labels = ((), None),
    ) -> None:
        self._store, self._files, self._spans, self._head = store, tuple(files), spans, head
        self._shown = tuple(shown or files)
        self._names = names
        self._first = np.searchsorted(spans.file, np.arange(len(files)))  # picture of each file
        self.classes, self._labels = labels

    def __len__(self) -> int:
        return len(self._spans.file)

    def read(self, i: int) -> bytes:
        size = int(self._spans.size[i])
        if size < 0:
            raise OSError("the table holds no bytes for this picture (null)")
        path = self._files[self._spans.file[i]]
        data = self._store.read(path, int(self._spans.start[i]), size)
        if len(data) != size:  # a web server may answer a range with the whole file
            why = "ends within" if len(data) < size else "cannot be read in ranges, so not"
            raise OSError(f"{path} {why} this picture")
        return self._head + data if self._head else data

    def name(self, i: int) -> str:
        file = int(self._spans.file[i])
        inner = f"#{i - self._first[file]}" if self._names is None else f"/{self._names[i]}"
        return self._shown[file] + inner

    def label(self, i: int) -> int:
        return -1 if self._labels is None else int(self._labels[i])

    def fingerprint(self) -> str:
        counts = np.bincount(self._spans.file, minlength=len(self._files)).tolist()
        shards = [f"{os.path.basename(f)} {n}" for f, n in zip(self._shown, counts, strict=True)]
        found = hashlib.sha256("\n".join(shards).encode(errors="surrogateescape"))
        if self._names is not None:
            found.update(b"\n\n" + self._names.blob)
        return found.hexdigest()

    def stamps(self) -> np.ndarray:
        found = np.array([self._store.stamp(path) for path in self._files], np.int64)
        size, time = found.reshape(-1, 2)[self._spans.file].T
        return np.stack([np.where(size < 0, -1, self._spans.size), time], 1)


class LocalFiles:
    """Files of this machine, opened when first read, and a bounded number of them.

    `pread` has no position, so that forked workers and threads may share a descriptor.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Descriptor] = {}

    def read(self, path: str, start: int, size: int) -> bytes:
        file = self._open.get(path)
        if file is None:
            for old in list(self._open)[: max(0, len(self._open) - _OPEN + 1)]:
                self._open.pop(old, None)
            file = self._open[path] = _Descriptor(path)
        return os.pread(file.number, size, start)

    def stamp(self, path: str) -> tuple[int, int]:
        return stamp(path)

    def __reduce__(self) -> tuple:
        return LocalFiles, ()  # descriptors stay in their process


class _Descriptor:
    """Closed when nobody uses it any more, so that a thread may read a file that is dropped."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        if self.number >= 0:
            with contextlib.suppress(OSError):
                close(self.number)
