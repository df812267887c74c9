"""Where pictures come from. Every source has one door, `read(i) -> bytes`.

So order, epochs and resume are exact for all of them, and each loader decodes as it likes. What a
source opens it opens when it is first read from, in each process: it may be forked and pickled.
"""

import glob
import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from .arrays import open_arrays
from .builtin import NAMES, SPLITS, builtin
from .files import EXTENSIONS, FileSource, no_picture, open_list, shown, walk
from .parquet import open_table
from .remote import is_url, open_remote
from .tar import open_tars

__all__ = ["EXTENSIONS", "FileSource", "Source", "open_source"]

_TABLES = (".parquet", ".arrow")
_ARRAYS = (".npz", ".npy")
_MOST = 100_000  # names that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")  # as data sets name their parts


class Source(Protocol):
    """A fixed, ordered list of pictures, named and maybe labelled."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in order; empty when the pictures have no labels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded file of picture i. Raises OSError when it cannot be read."""

    def name(self, i: int) -> str:
        """What to call picture i in a message: its path."""

    def label(self, i: int) -> int:
        """The position of picture i's class in `classes`; -1 when there are no labels."""

    def fingerprint(self) -> str:
        """A hash of the list (names and order, not contents): another list, another hash."""

    def stamps(self) -> np.ndarray:
        """int64 [N, 2]: size and time of change, by which a changed picture is known.

        A size below 0: it is not there. 0 0: nothing is known, and it is taken as unchanged.
        """


def open_source(root: str | Path) -> Source:
    """Opens pictures wherever they lie; README, "What data.root takes", shows each kind.

    root: a folder (ImageFolder, flat or nested, of tar shards, of Parquet files, or of
    `save_to_disk`), a .txt list with one path a line, a .tar, .parquet, .arrow, .npz or .npy file,
    several of those by braces or wildcards (`shards-{000..009}.tar`), a URL, or a built-in data
    set: `fashion-mnist` or `digits`, with `/train` (the default) or `/test` behind it. `#NAME`
    behind a table or an array file names the column or the array. A path that exists goes before
    all else. Raises UserError for what is missing, holds no picture or cannot be read.
    """
    text = str(root)
    if is_url(text):
        return open_remote(text, _expand)
    path = Path(root).expanduser()
    column = ""
    if not os.path.exists(path) and "#" in path.name:
        text, _, column = str(path).rpartition("#")
        path = Path(text)
    if os.path.isdir(path):
        return _open_folder(path, column)
    if os.path.isfile(path):
        return _open_files([str(path)], column)
    name, _, split = str(root).partition("/")
    if name in NAMES and split in ("", *SPLITS):
        return _open_folder(builtin(name) / (split or SPLITS[0]), "")
    if set("{*?[") & set(str(path)):
        return _open_files(_matching(str(path)), column)
    raise UserError(
        f"{root}: no such folder or file list. Give a folder of pictures, a .txt file with one "
        f"path a line, .tar, .parquet, .arrow or .npz files, or a built-in data set: "
        f"{', '.join(NAMES)} (/train or /test)"
    )


def _open_files(paths: list[str], column: str) -> Source:
    kinds = sorted({os.path.splitext(path)[1].lower() for path in paths})
    kind = kinds[0]
    if kinds == [".tar"]:
        return open_tars(paths)
    if len(kinds) == 1 and kind in _TABLES:
        return open_table(paths, column)
    if len(paths) == 1 and kind in _ARRAYS:
        return open_arrays(Path(paths[0]), column)
    if len(paths) == 1 and kind == ".txt":
        return open_list(Path(paths[0]))
    several = f"and {len(paths) - 1} more are files" if paths[1:] else "is a file"
    raise UserError(
        f"{paths[0]}: {several}; expected a folder or a .txt list, one path a line, .tar, .parquet "
        "or .arrow files (several of one kind), or one .npz or .npy"
    )


def _open_folder(root: Path, column: str) -> Source:
    """Pictures below a folder; without one, its tar shards, Arrow or Parquet files.

    When every picture lies in a subfolder, the first-level folders are the classes, as in
    torchvision's ImageFolder.
    """
    if (state := root / "state.json").is_file() and any(root.glob("*.arrow")):
        return open_table(_saved(state), column)
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        raise UserError(f"{root}: holds the splits {', '.join(splits)}: give one, {root}/SPLIT")
    others: Counter[str] = Counter()
    if names := list(walk(str(root), others)):
        return FileSource(root, names, labelled=True)
    for ending in (".tar", *_TABLES):
        if others[ending]:
            found = walk(str(root), Counter(), (ending,))
            paths = sorted(os.path.join(root, name) for name in found)
            _refuse_splits(root, paths)
            return _open_files(paths, column)
    raise no_picture(root, others)


def _saved(state: Path) -> list[str]:
    """The files of `save_to_disk`, in its order."""
    try:
        rows = json.loads(state.read_text())["_data_files"]
        return [str(state.parent / row["filename"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: not as datasets.save_to_disk writes it: {error}") from error


def _refuse_splits(root: Path, paths: list[str]) -> None:
    """Training on the test pictures by mistake would not be seen in any curve."""
    splits: dict[str, str] = {}
    for path in paths:
        words = re.split(r"[^a-z]+", os.path.relpath(path, root).lower())
        for word in [word for word in words if word in _SPLITS][:1]:
            splits.setdefault(word, path)
    if len(splits) > 1:
        first = "train" if "train" in splits else min(splits)
        folder, base = os.path.split(splits[first])
        named = base.lower().startswith(first)
        one = f"{folder}/{base[: len(first)]}*{os.path.splitext(base)[1]}" if named else folder
        raise UserError(f"{root}: holds the splits {', '.join(sorted(splits))}: give one, as {one}")


def _expand(pattern: str) -> list[str]:
    """`a-{00..12}.tar` and `{x,y}.tar` to names, in order; what has no braces is itself."""
    parts = _BRACES.split(pattern)  # every second one stood in braces
    words = [_words(part) if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, words)) > _MOST:
        raise UserError(f"{pattern}: the braces stand for more than {_MOST} names")
    return ["".join(choice) for choice in itertools.product(*words)]


def _words(inner: str) -> list[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        low, high = span.groups()
        last = min(int(high), int(low) + _MOST)  # one more than is allowed, and not a billion
        return [f"{n:0{len(low)}d}" for n in range(int(low), last + 1)]
    return inner.split(",")


def _matching(pattern: str) -> list[str]:
    """The files of a pattern; UserError when one that the braces name is not there."""
    names = _expand(pattern)
    lists = [sorted(glob.glob(name)) if set("*?[") & set(name) else [name] for name in names]
    paths = list(itertools.chain.from_iterable(lists))
    missing = [path for path in paths if not os.path.isfile(path)]
    if not paths:
        raise UserError(f"{pattern}: no file is called so")
    if missing:
        raise UserError(f"{pattern}: {len(missing)} of {len(paths)} are missing: {shown(missing)}")
    return paths
