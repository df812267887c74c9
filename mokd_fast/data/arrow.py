"""Tables of pictures: which column holds them, which the labels, where the bytes lie.

An Arrow file (`save_to_disk`) holds its pictures as they are: they are read from where they lie.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .files import Labels

_LABELS = ("label", "labels", "class", "target", "fine_label")  # integers that are taken for labels


class Column(NamedTuple):
    """Spans of one file: start, size int64 [n]; labels int64 [n], or [0] without them."""

    file: str
    start: np.ndarray
    size: np.ndarray
    labels: np.ndarray


def load_pyarrow() -> Any:
    """The package, or a UserError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"Parquet and Arrow files are read with pyarrow ({error}): "
            "pip install 'mokd_fast[parquet]'"
        ) from error
    return pyarrow


def read_schema(path: str) -> Any:
    """Names and types of the columns of a .parquet or .arrow file."""
    pa = load_pyarrow()
    if path.lower().endswith(".parquet"):
        return pa.parquet.read_schema(path)
    with pa.memory_map(path) as file:
        return _batches(file).schema


def _batches(file: Any) -> Any:
    """A reader of an Arrow file: the stream that `datasets` writes, or the file format."""
    pa = load_pyarrow()
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def picture_column(path: str, schema: Any, column: str) -> str:
    """The column of pictures, `column` where it is given; UserError when that is not clear."""
    fit = [f.name for f in schema if _is_binary(f.type) or bytes_of(f.type) is not None]
    if column in fit or (not column and len(fit) == 1):
        return column or fit[0]
    there = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
    if column:
        raise UserError(f"{path}: no picture column {column!r}; its columns: {there}")
    if fit:
        names = ", ".join(f"#{name}" for name in fit)
        raise UserError(f"{path}: several columns could be the pictures; append one of {names}")
    raise UserError(
        f"{path}: no picture column: expected one of encoded files (binary, or a struct with "
        f"bytes), found {there}"
    )


def _is_binary(kind: Any) -> bool:
    return load_pyarrow().types.is_binary(kind) or load_pyarrow().types.is_large_binary(kind)


def bytes_of(kind: Any) -> int | None:
    """The position of `bytes` in Hugging Face's struct of an image."""
    if not load_pyarrow().types.is_struct(kind):
        return None
    i = kind.get_field_index("bytes")
    return i if i >= 0 and _is_binary(kind.field(i).type) else None


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else text[:39] + "…"


def label_column(schema: Any) -> tuple[str, list[str] | None]:
    """(name, class names) of the label column; an empty name when there is none."""
    try:
        features = dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    except (ValueError, KeyError, TypeError):  # not described, or not as Hugging Face does
        features = {}
    named = [k for k, v in features.items() if isinstance(v, dict) and "names" in v]
    numbers = [f.name for f in schema if load_pyarrow().types.is_integer(f.type)]
    if len(named) == 1 and named[0] in numbers:
        return named[0], features[named[0]]["names"]
    for name in _LABELS:
        if name in numbers:
            return name, features[name]["names"] if name in named else None
    return "", None


def class_labels(numbers: np.ndarray, classes: list[str] | None) -> Labels:
    """Labels [N] (or [0]: none) with their class names, where the table has such."""
    if (
        not len(numbers) or numbers.min() < 0
    ):  # -1 is Hugging Face's word for an unlabelled test set
        return (), None
    if classes is not None and numbers.max() < len(classes):
        return tuple(classes), numbers.astype(np.int32)
    present, position = np.unique(numbers, return_inverse=True)
    return tuple(str(n) for n in present.tolist()), position.astype(np.int32)


def in_place(path: str, column: str, label: str) -> Column:
    """The spans of an Arrow file's pictures: addresses within its memory map."""
    starts, sizes, numbers = [], [], []
    with load_pyarrow().memory_map(path) as file:
        whole = file.read_buffer()
        file.seek(0)
        reader = _batches(file)
        count = getattr(reader, "num_record_batches", None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            data, offsets, empty = bytes_at(batch.column(column))
            start = data.address - whole.address if data is not None else 0
            if not 0 <= start <= whole.size:
                raise UserError(
                    f"{path}: its buffers are compressed: write it without compression, or as "
                    ".parquet"
                )
            starts.append(start + offsets[:-1])
            sizes.append(np.where(empty, -1, np.diff(offsets)))
            numbers.append(numbers_of(batch, label))
    return Column(path, *map(joined, (starts, sizes, numbers)))


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """One array int64 of any number of them."""
    return np.concatenate([np.empty(0, np.int64), *parts])


def bytes_at(array: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """(buffer of the data or None, offsets int64 [n + 1], whether null [n]) of a picture column."""
    empty = array.is_null().to_numpy(zero_copy_only=False)
    if (i := bytes_of(array.type)) is not None:
        array = array.field(i)
        empty = empty | array.is_null().to_numpy(zero_copy_only=False)
    _, offsets, data = array.buffers()
    wide = load_pyarrow().types.is_large_binary(array.type)
    if not len(array):  # Arrow may leave the offsets of nothing out
        return None, np.zeros(1, np.int64), empty
    found = np.frombuffer(offsets, np.int64 if wide else np.int32)
    found = found[array.offset : array.offset + len(array) + 1].astype(np.int64)
    return data, found, empty


def numbers_of(batch: Any, label: str) -> np.ndarray:
    """The labels of some rows, -1 where there is none; [0] without a label column."""
    if not label:
        return np.empty(0, np.int64)
    column = batch.column(label)
    return column.cast("int64").fill_null(-1).to_numpy(zero_copy_only=False)
