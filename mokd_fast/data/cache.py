"""Small arrays kept between runs below the cache folder; a hint, never the only copy."""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .builtin import cache_folder

_log = logging.getLogger(__name__)
_told: set[Path] = set()  # folders that cannot be written


def place(kind: str, *key: object) -> Path:
    """<cache>/<kind>/<hash of the key>, without an ending."""
    text = "\0".join(map(str, key)).encode(errors="surrogateescape")
    return cache_folder() / kind / hashlib.blake2b(text, digest_size=12).hexdigest()


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of `path`; empty where there are none, or what is there is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        return {}
    except Exception as error:  # zipfile and NumPy raise anything for damaged bytes
        _log.warning("%s is made anew: %s", path, error)
        return {}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Held by one process at a time: of several that start at once, one makes what takes long.

    An flock on `path`. Where it cannot be had, each makes its own.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
        yield


def save(path: Path, **arrays: Any) -> None:
    """Writes the arrays, whole or not at all. A cache that cannot be written costs time alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(number, "wb") as file:
                np.savez(file, **arrays)
            os.chmod(temporary, 0o644)  # mkstemp's 600 would shut others out of a shared cache
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        if path.parent not in _told:  # once, and not for each of a thousand shards
            _told.add(path.parent)
            text = "%s cannot be written (%s): it is made again next time"
            _log.warning(text, path, error.strerror)
