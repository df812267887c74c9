"""WebDataset tar shards: an index of member offsets, made once, and no extraction.

A shard's index is kept in the cache folder until its size or modification time changes.
"""

import logging
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from . import cache
from .files import EXTENSIONS, Labels, Names, folder_labels, shown
from .spans import LocalFiles, Spans, SpanSource, Store

Opener = Callable[[str, str], Any]  # (path, "rb") -> a file that can seek

_BLOCK = 512
_NO_CLASS = -1
_TOLD = 2**32  # bytes of new shards from which it is said; 26 us a member, so about a second
_CLASS_BYTES = 32  # a .cls member is a number; what is longer is something else
_PACKED = (b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_log = logging.getLogger(__name__)


@dataclass
class _Shard:
    """The pictures of one shard, and what is wrong with it."""

    names: list[bytes] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    damage: str = ""


def open_tars(
    paths: Sequence[str], store: Store | None = None, opener: Opener = open
) -> SpanSource:
    """The pictures of uncompressed tar shards, in the order of the shards and of their members.

    Labels come from members `KEY.cls` beside `KEY.jpg` (a number), else from the first-level
    folders when each picture lies in one. A damaged shard is named in a warning, and the members
    before the damage stay in use. store, opener: where the shards lie, default this machine.
    Raises UserError for shards that are missing, compressed or without a picture.
    """
    store = store or LocalFiles()
    stamps = {path: store.stamp(path) for path in paths}
    kept = {path: _kept(path, stamps[path]) for path in paths}
    new = [path for path in paths if kept[path] is None]
    if sum(stamps[path][0] for path in new) >= _TOLD:
        print(f"indexing {len(new)} tar shards, once", file=sys.stderr, flush=True)
    shards = [kept[path] or _indexed(path, stamps[path], opener) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.damage:
            count = len(shard.names)
            _log.warning("%s: %s; the %d pictures before it stay in use", path, shard.damage, count)
    names = [name for shard in shards for name in shard.names]
    if not names:
        raise UserError(_nothing(paths, shards))
    spans = Spans(
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.names) for shard in shards]),
        np.array([x for shard in shards for x in shard.start], np.int64),
        np.array([x for shard in shards for x in shard.size], np.int64),
    )
    labels = _labels([x for shard in shards for x in shard.label], names)
    return SpanSource(store, paths, spans, names=Names(names), labels=labels)


def _nothing(paths: Sequence[str], shards: list[_Shard]) -> str:
    damaged = [f"{p}: {s.damage}" for p, s in zip(paths, shards, strict=True) if s.damage]
    why = f" ({shown(damaged)})" if damaged else ""
    return (
        f"{shown(list(paths))}: no picture in this tar file{'s' * (len(paths) > 1)}{why}. "
        f"Looked for members that end in {' '.join(EXTENSIONS)}"
    )


def _labels(numbers: list[int], names: list[bytes]) -> Labels:
    if _NO_CLASS in numbers:
        return folder_labels(names, b"/") if set(numbers) == {_NO_CLASS} else ((), None)
    present, position = np.unique(np.array(numbers), return_inverse=True)
    return tuple(str(n) for n in present.tolist()), position.astype(np.int32)


def _place(path: str) -> Path:
    return cache.place("tar", path if "://" in path else os.path.abspath(path)).with_suffix(".npz")


def _kept(path: str, stamp: tuple[int, int]) -> _Shard | None:
    """The cached index of a shard, while the file is the same."""
    kept = cache.load(_place(path))
    if stamp[0] < 0 or "stamp" not in kept or tuple(kept["stamp"].tolist()) != stamp:
        return None
    names = kept["names"].tobytes().split(b"\0")[:-1]
    start, size, label = (kept[key].tolist() for key in ("start", "size", "label"))
    return _Shard(names, start, size, label, str(kept["damage"]))


def _indexed(path: str, stamp: tuple[int, int], opener: Opener) -> _Shard:
    try:
        with opener(path, "rb") as file:
            shard = _scan(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such shard") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read this shard: {error.strerror or error}") from error
    blob = b"".join(name + b"\0" for name in shard.names)  # no name in a tar holds a zero
    arrays = {key: np.array(getattr(shard, key), np.int64) for key in ("start", "size", "label")}
    arrays |= {"names": np.frombuffer(blob, np.uint8), "stamp": np.array(stamp)}
    cache.save(_place(path), damage=np.array(shard.damage), **arrays)
    return shard


def _scan(file: IO[bytes]) -> _Shard:
    """Walks the headers of a shard up to its end, or to the damage."""
    shard, keys, classes = _Shard(), [], {}
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(6).startswith(_PACKED):
        raise OSError(
            "it is compressed, and no picture can be read alone: unpack it to a plain .tar"
        )
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                name = member.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                if not member.isreg() or member.issparse() or base[:1] in ("", "."):
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                key, _, ending = base.partition(".")
                if ending == "cls" and member.size <= _CLASS_BYTES:
                    file.seek(member.offset_data)
                    classes[folder, key] = _number(file.read(member.size))
                elif name.lower().endswith(EXTENSIONS):
                    shard.names.append(os.fsencode(name))
                    shard.start.append(member.offset_data)
                    shard.size.append(member.size)
                    keys.append((folder, key))
            end = tar.offset
        file.seek(end)
        if any(rest := file.read(_BLOCK)) or not rest:  # tarfile ends at a broken header, silently
            raise tarfile.ReadError("no header where one belongs" if rest else "no end mark")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        shard.damage = f"damaged or cut off ({error})"
    shard.label = [classes.get(key, _NO_CLASS) for key in keys]
    return shard


def _number(text: bytes) -> int:
    try:
        return max(int(text), _NO_CLASS)
    except ValueError:
        return _NO_CLASS
