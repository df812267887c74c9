"""Arrays of pixels: .npz and .npy files with images uint8 [N, H, W] or [N, H, W, C].

An array that lies in its file as it is (np.savez, np.save) is read picture by picture; a deflated
one (np.savez_compressed) is loaded once and shared with forked workers. Pictures come out as PNM
files, a header and the pixels, which every decoder takes without a loss.
"""

import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..errors import UserError
from .files import Labels, stamp
from .spans import LocalFiles, Spans, SpanSource, Store

_LOCAL_HEADER = 30  # bytes of a zip's local header, before name and extra field


class _Array(NamedTuple):
    """One array of a file, by its header."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int | None  # where its first byte lies in the file; None: deflated or column-major

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


def open_arrays(path: Path, name: str = "") -> SpanSource:
    """The pictures of an array file, and their labels where an integer array [N] goes with them.

    name: which array, where several could be meant (`data.root=FILE.npz#NAME`). Raises UserError
    for a file that cannot be read, no array or several of the right shape, and other dtypes.
    """
    try:
        arrays = _headers(path)
        images = _images(path, arrays, name)
        labels = _labels(path, arrays, images)
        store: Store = LocalFiles()
        if images.start is None:
            store = _Loaded(images.name, _load(path, images.name))
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise anything for damaged bytes
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this array file: {reason}") from error
    count, height, width = images.shape[:3]
    size = int(np.prod(images.shape[1:], dtype=np.int64))
    kind = 6 if images.shape[3:] == (3,) else 5
    spans = Spans(
        np.zeros(count, np.int32),
        (images.start or 0) + size * np.arange(count, dtype=np.int64),
        np.full(count, size, np.int64),
    )
    head = f"P{kind} {width} {height} 255\n".encode()
    title = f"{path}/{images.name}" if path.suffix.lower() == ".npz" else str(path)
    return SpanSource(store, [str(path)], spans, shown=[title], head=head, labels=labels)


def _headers(path: Path) -> list[_Array]:
    """Shapes and places, without reading an array."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            return [_header(file, path.stem, 0)]
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            start = None
            if info.compress_type == zipfile.ZIP_STORED:
                raw.seek(info.header_offset)
                name, extra = struct.unpack("<26xHH", raw.read(_LOCAL_HEADER))
                start = info.header_offset + _LOCAL_HEADER + name + extra
            with archive.open(info) as file:
                found.append(_header(file, info.filename.removesuffix(".npy"), start))
    return found


def _header(file: IO[bytes], name: str, start: int | None) -> _Array:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, columns, dtype = read(file)
    flat = start is None or (columns and len(shape) > 1)
    return _Array(name, shape, dtype, None if flat else (start or 0) + file.tell())


def _images(path: Path, arrays: list[_Array], name: str) -> _Array:
    if name:
        arrays = [array for array in arrays if array.name == name]
    fit = [a for a in arrays if _is_images(a)]
    if len(fit) == 1:
        if not fit[0].shape[0]:
            raise UserError(f"{path}: {fit[0]} holds no picture")
        return fit[0]
    there = ", ".join(map(str, arrays)) or f"no array{f' called {name}' * bool(name)}"
    if fit:
        names = ", ".join(f"{path}#{array.name}" for array in fit)
        raise UserError(f"{path}: several arrays could be the pictures; name one of {names}")
    raise UserError(
        f"{path}: no array of pictures: expected uint8 [N, H, W] or [N, H, W, 1 or 3], "
        f"found {there}"
    )


def _is_images(array: _Array) -> bool:
    shape = array.shape
    if array.dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
        return False
    return len(shape) == 3 or shape[3] in (1, 3)


def _labels(path: Path, arrays: list[_Array], images: _Array) -> Labels:
    """Of the integer array that goes with the pictures: by name, else the only one of N."""
    n = images.shape[0]
    fit = [a for a in arrays if a.dtype.kind in "iu" and a.shape in ((n,), (n, 1))]
    twins = {images.name.replace("images", "labels"), images.name.replace("x", "y", 1)}
    named = [a for a in fit if a.name in twins]
    if len(named or fit) != 1:
        return (), None
    values = _load(path, (named or fit)[0].name).reshape(-1)
    if values.min() < 0:
        return (), None
    present, position = np.unique(values, return_inverse=True)
    return tuple(str(k) for k in present.tolist()), position.astype(np.int32)


def _load(path: Path, name: str) -> np.ndarray:
    found: Any = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        return found[name]


class _Loaded:
    """A `Store` of one array in memory; another process that is not forked loads its own."""

    def __init__(self, name: str, array: np.ndarray | None = None) -> None:
        self._name, self._bytes = name, None if array is None else _flat(array)

    def read(self, path: str, start: int, size: int) -> bytes:
        if self._bytes is None:
            self._bytes = _flat(_load(Path(path), self._name))
        return self._bytes[start : start + size].tobytes()

    def stamp(self, path: str) -> tuple[int, int]:
        return stamp(path)

    def __reduce__(self) -> tuple:
        return _Loaded, (self._name,)


def _flat(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
