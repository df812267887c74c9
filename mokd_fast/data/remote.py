"""Pictures on remote storage through fsspec: `s3://…`, `gs://…`, `https://…`, `memory://…`.

A folder, a .txt list, or tar shards, of which each picture is one range request. Credentials and
endpoints are where the file system's own package looks for them.
"""

import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ..errors import UserError
from .files import EXTENSIONS, FileSource, listed, no_picture
from .spans import SpanSource
from .tar import open_tars

T = TypeVar("T")


def is_url(root: str) -> bool:
    """Whether it is a URL, as `scheme://…`."""
    return "://" in root


def open_remote(url: str, expand: Callable[[str], list[str]]) -> FileSource | SpanSource:
    """The pictures at a URL: of tar shards (with braces too), of a .txt list, or of a folder.

    expand: braces to names. Raises UserError for an unknown scheme, a missing package, what cannot
    be reached, and what holds no picture.
    """
    files = RemoteFiles(url)
    ending = posixpath.splitext(url)[1].lower()
    if ending == ".tar":
        return _asked(url, lambda: _tars(files, expand(url)))
    if ending in (".parquet", ".arrow", ".npz", ".npy"):
        raise UserError(
            f"{url}: {ending} is read from local disks only: copy it to one, or give a folder, a "
            ".txt list or .tar shards"
        )
    if ending == ".txt":
        root = url.rpartition("/")[0]
        names = listed(_asked(url, lambda: files.whole(url)).decode(errors="surrogateescape"))
        if not names:
            raise UserError(f"{url}: the list names no file; expected one path a line")
        return RemoteFolder(files, root, names, np.zeros((len(names), 2), np.int64), False)
    return _asked(url, lambda: _folder(files, url.rstrip("/")))


def _asked(url: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url}: there is nothing at this URL") from error
    except Exception as error:  # each file system raises its own
        raise UserError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error


def _folder(files: "RemoteFiles", url: str) -> "FileSource | SpanSource":
    found = files.find(url)
    rows = {tuple(name.split("/")): info for name, info in found.items()}
    seen = sorted(parts for parts in rows if not any(part.startswith(".") for part in parts))
    kept = [parts for parts in seen if parts[-1].lower().endswith(EXTENSIONS)]
    if not kept and (shards := [parts for parts in seen if parts[-1].lower().endswith(".tar")]):
        return _tars(files, [f"{url}/{'/'.join(parts)}" for parts in shards])
    if not kept and not found:
        raise FileNotFoundError(url)
    if not kept:
        endings = (posixpath.splitext(name)[1].lower() or "no extension" for name in found)
        raise no_picture(url, Counter(endings))
    stamps = np.array([_stamp(rows[parts]) for parts in kept], np.int64)
    return RemoteFolder(files, url, ["/".join(parts) for parts in kept], stamps, True)


def _tars(files: "RemoteFiles", urls: list[str]) -> SpanSource:
    return open_tars(urls, files, files.open)


def _stamp(info: dict[str, Any]) -> tuple[int, int]:
    """(size, a number of what the system says of the file's state; 0 when it says nothing)"""
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    known = "".join(str(info.get(key) or "") for key in keys)
    return int(info.get("size") or 0), zlib.crc32(known.encode()) if known else 0


class RemoteFiles:
    """A `Store` of URLs of one file system, which each process opens for itself."""

    def __init__(self, url: str) -> None:
        self._url, self._pid = url, -1
        _asked(url, self._system)

    def _system(self) -> Any:
        if self._pid != os.getpid():  # its connections and threads do not outlive a fork
            try:
                from fsspec.core import url_to_fs
            except ImportError as error:
                raise UserError(f"{self._url}: pip install fsspec, which reads URLs") from error
            try:
                self._fs = url_to_fs(self._url)[0]
            except ImportError as error:
                raise UserError(f"{self._url}: a package is missing: {error}") from error
            except ValueError as error:
                raise UserError(f"{self._url}: {error}; expected as s3://bucket/folder") from error
            self._pid = os.getpid()
        return self._fs

    def read(self, path: str, start: int, size: int) -> bytes:
        return self._system().cat_file(path, start=start, end=start + size)

    def whole(self, url: str) -> bytes:
        """All bytes of a file."""
        return self._system().cat_file(url)

    def stamp(self, path: str) -> tuple[int, int]:
        try:
            return _stamp(self._system().info(path))
        except Exception:  # each file system raises its own
            return -1, -1

    def open(self, url: str, mode: str) -> Any:
        """A file that can seek."""
        return self._system().open(url, mode)

    def find(self, url: str) -> dict[str, dict[str, Any]]:
        """What the system knows of every file below a folder, by its path from there."""
        fs = self._system()
        root = fs._strip_protocol(url).rstrip("/") + "/"
        found = fs.find(url, detail=True).items()
        return {path.removeprefix(root): info for path, info in found if path.startswith(root)}

    def __reduce__(self) -> tuple:
        return RemoteFiles, (self._url,)


class RemoteFolder(FileSource):
    """A folder or list of URLs; stamps are those of its listing."""

    def __init__(
        self, files: RemoteFiles, url: str, names: list[str], stamps: np.ndarray, labelled: bool
    ) -> None:
        super().__init__(url, names, labelled)
        self._files, self._stamps = files, stamps

    def read(self, i: int) -> bytes:
        return self._files.whole(self.name(i))

    def name(self, i: int) -> str:
        name = self.names[i]
        return name if is_url(name) else f"{self.root}/{name}"

    def stamps(self) -> np.ndarray:
        return self._stamps
