"""Parquet files and Hugging Face datasets on disk, through pyarrow.

A Parquet file holds its pictures in compressed pages of row groups, and one picture costs a whole
group (100 to 1000 pictures). So the picture column is copied once into the cache folder, as
Hugging Face's own library does, and read from there. Arrow files need no copy.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import cache
from .arrow import (
    Column,
    bytes_at,
    bytes_of,
    class_labels,
    in_place,
    joined,
    label_column,
    load_pyarrow,
    numbers_of,
    picture_column,
    read_schema,
)
from .files import shown, stamp
from .spans import LocalFiles, Spans, SpanSource

_ROWS = 64  # of a Parquet file, in memory at a time
_TOLD = 2**28  # bytes from which a copy is announced


def open_table(paths: Sequence[str], column: str = "") -> SpanSource:
    """The pictures of .parquet or .arrow files, in the order of files and rows.

    The picture column holds encoded files: a binary column, or Hugging Face's struct with `bytes`.
    column: its name, where there are several (`data.root=FOLDER#NAME`). Labels come from a
    ClassLabel, else from an integer column called label, labels, class, target or fine_label.
    Raises UserError without pyarrow, for files that cannot be read, and when there is no picture
    column or more than one.
    """
    pa = load_pyarrow()
    files: list[Column] = []
    try:
        schema = read_schema(paths[0])
        column = picture_column(paths[0], schema, column)
        label, classes = label_column(schema)
        for path in paths:
            read = _copied if path.lower().endswith(".parquet") else in_place
            files.append(read(path, column, label))
    except UserError:
        raise
    except (OSError, pa.ArrowException, KeyError) as error:
        path = paths[min(len(files), len(paths) - 1)]
        raise UserError(f"{path}: cannot read this table: {error}") from error
    count = [len(file.start) for file in files]
    if not sum(count):
        raise UserError(f"{shown(list(paths))}: the table has no row")
    spans = Spans(
        np.repeat(np.arange(len(files), dtype=np.int32), count),
        np.concatenate([file.start for file in files]),
        np.concatenate([file.size for file in files]),
    )
    labels = class_labels(joined([file.labels for file in files]), classes)
    return SpanSource(LocalFiles(), [f.file for f in files], spans, shown=paths, labels=labels)


def _copied(path: str, column: str, label: str) -> Column:
    """The copy of a Parquet file's picture column in the cache, made if it is not there."""
    place = cache.place("parquet", os.path.abspath(path), column, label)
    index, copy = place.with_suffix(".npz"), place.with_suffix(".bin")
    if not (kept := _kept(path, index, copy)):
        with cache.alone(place.with_suffix(".lock")):  # the processes of a run come here at once
            if not (kept := _kept(path, index, copy)):
                now = stamp(path)
                kept = _copy(path, column, label, copy)
                cache.save(index, stamp=np.array(now), **kept)
    return Column(str(copy), kept["start"], kept["size"], kept["labels"])


def _kept(path: str, index: Path, copy: Path) -> dict[str, np.ndarray]:
    """The index of a copy that is whole and of the file as it is; empty without one."""
    kept = cache.load(index)
    fresh = "stamp" in kept and tuple(kept["stamp"].tolist()) == stamp(path)
    return kept if fresh and stamp(str(copy))[0] == int(kept["bytes"]) else {}


def _copy(path: str, column: str, label: str, copy: Path) -> dict[str, np.ndarray]:
    """Writes the pictures one after another to `copy`, whole or not at all; returns the index."""
    file = load_pyarrow().parquet.ParquetFile(path)
    struct = bytes_of(file.schema_arrow.field(column).type) is not None
    columns = [f"{column}.bytes" if struct else column] + [label] * bool(label)
    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    parts = [group.column(c) for group in groups for c in range(group.num_columns)]
    size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema == columns[0])
    starts, sizes, numbers, end = [], [], [], 0
    with _written(path, copy, size) as out:
        for batch in file.iter_batches(_ROWS, columns=columns):
            data, offsets, empty = bytes_at(batch.column(column))
            starts.append(end + offsets[:-1] - offsets[0])
            sizes.append(np.where(empty, -1, np.diff(offsets)))
            numbers.append(numbers_of(batch, label))
            end += int(offsets[-1] - offsets[0])
            if data is not None:
                out.write(memoryview(data)[offsets[0] : offsets[-1]])
    index = {"start": joined(starts), "size": joined(sizes), "labels": joined(numbers)}
    return index | {"bytes": np.array(end)}


@contextlib.contextmanager
def _written(path: str, copy: Path, size: int):  # type: ignore[no-untyped-def]
    """A file to write that becomes `copy` at the end; UserError where there is no room for it."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(copy.parent).free) < size:
            raise OSError(f"it needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        if size >= _TOLD:
            text = f"{path}: copying its pictures ({size / 1e9:.1f} GB) to {copy.parent}, once"
            print(text, file=sys.stderr, flush=True)
        number, temporary = tempfile.mkstemp(prefix=f".{copy.name}-", dir=copy.parent)
    except OSError as error:
        raise _no_copy(path, copy, error) from error
    try:
        with open(number, "wb") as out:
            yield _Writer(path, copy, out)
        os.chmod(temporary, 0o644)  # mkstemp's 600 would shut others out of a shared cache
        os.replace(temporary, copy)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


class _Writer:
    """Tells a full disk from a Parquet file that cannot be read."""

    def __init__(self, path: str, copy: Path, out) -> None:  # type: ignore[no-untyped-def]
        self._path, self._copy, self._out = path, copy, out

    def write(self, data: memoryview) -> None:
        try:
            self._out.write(data)
        except OSError as error:
            raise _no_copy(self._path, self._copy, error) from error


def _no_copy(path: str, copy: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot copy its pictures to {copy.parent}: {error.strerror or error}. "
        "Set MOKD_FAST_CACHE to a folder with room that you may write to"
    )
