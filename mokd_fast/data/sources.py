"""Where pictures come from. Every source has one door, `read(i) -> bytes`.

So order, epochs and resume are exact for all of them, and each loader decodes as it likes.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from .builtin import NAMES, SPLITS, builtin

# torchvision.datasets.folder.IMG_EXTENSIONS, so that a folder means the same pictures there.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SHOWN = 3  # how many names an error message lists


class Source(Protocol):
    """A fixed, ordered list of pictures, named and maybe labelled."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted; empty when the pictures have no labels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded file of picture i. Raises OSError when it cannot be read."""

    def name(self, i: int) -> str:
        """What to call picture i in a message: its path."""

    def label(self, i: int) -> int:
        """The position of picture i's class in `classes`; -1 when there are no labels."""

    def fingerprint(self) -> str:
        """A hash of the list (names and order, not contents): another list, another hash."""


class FileSource:
    """Files below `root`, in the order given; built by `open_folder` and `open_list`.

    The names lie in one bytes object: millions of Python strings would take gigabytes, and
    their reference counts would copy the pages into every forked worker.
    """

    def __init__(self, root: Path, names: Iterable[str], labelled: bool = False) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = str(root)
        self._blob = b"\n".join(encoded)
        self._ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64) - 1
        self.classes, self._labels = _labels(encoded) if labelled else ((), None)

    def __len__(self) -> int:
        return len(self._ends)

    def _relative(self, i: int) -> str:
        start = int(self._ends[i - 1]) + 1 if i else 0
        return os.fsdecode(self._blob[start : int(self._ends[i])])

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0) as file:
            return file.read()

    def name(self, i: int) -> str:
        return os.path.join(self.root, self._relative(i))

    def label(self, i: int) -> int:
        return -1 if self._labels is None else int(self._labels[i])

    def fingerprint(self) -> str:
        return hashlib.sha256(self._blob).hexdigest()


def _labels(names: list[bytes]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """First-level folders as classes, unless a picture lies outside one."""
    separator = os.fsencode(os.sep)
    first = [head for head, slash, _ in (name.partition(separator) for name in names) if slash]
    if len(first) < len(names):
        return (), None
    classes = tuple(sorted({os.fsdecode(head) for head in set(first)}))
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    return classes, np.array([number[head] for head in first], np.int32)


def open_source(root: str | Path) -> Source:
    """Opens a folder, a `.txt` file list, or a built-in data set by its name.

    root: a folder of pictures (ImageFolder, flat or nested), a text file with one path a line,
    or `fashion-mnist` or `digits`, with `/train` (the default) or `/test` behind it. A path that
    exists goes before a built-in name. Raises UserError for what is missing or holds no picture.
    """
    path = Path(root).expanduser()
    if os.path.isdir(path):
        return open_folder(path)
    if os.path.isfile(path):
        return open_list(path)
    name, _, split = str(root).partition("/")
    if name in NAMES and split in ("", *SPLITS):
        return open_folder(builtin(name) / (split or SPLITS[0]))
    raise UserError(
        f"{root}: no such folder or file list. Give a folder of pictures, a .txt file with one "
        f"path a line, or a built-in data set: {', '.join(NAMES)} (/train or /test)"
    )


def open_folder(root: Path) -> FileSource:
    """All pictures below `root`, subfolders included, sorted; hidden names are left out.

    When every picture lies in a subfolder, the first-level folders are the classes, as in
    torchvision's ImageFolder. Raises UserError when there is no picture.
    """
    others: Counter[str] = Counter()
    names = list(_walk(str(root), "", others))
    if names:
        return FileSource(root, names, labelled=True)
    if not others:
        raise UserError(f"{root}: the folder is empty; expected pictures in it or below it")
    found = ", ".join(f"{count} x {kind}" for kind, count in others.most_common(_SHOWN))
    raise UserError(
        f"{root}: no picture in this folder or below it. Looked for {' '.join(EXTENSIONS)} "
        f"(upper or lower case); found {others.total()} other files: {found}"
    )


def _walk(folder: str, prefix: str, others: Counter[str]) -> Iterator[str]:
    """Relative paths of the pictures; scandir knows a folder without a stat for each file."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted((e for e in scan if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot list this folder: {error.strerror}") from error
    for entry in entries:
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():
            if not (link and _loops(entry.path)):
                yield from _walk(entry.path, f"{prefix}{entry.name}{os.sep}", others)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield prefix + entry.name
        else:
            others[os.path.splitext(entry.name)[1] or "no extension"] += 1


def _loops(link: str) -> bool:
    """Whether a linked folder holds the link itself."""
    target = os.path.realpath(link)
    parent = os.path.realpath(os.path.dirname(link))
    return parent == target or parent.startswith(os.path.join(target, ""))


def open_list(path: Path) -> FileSource:
    """The pictures that a text file names, one path a line, in its order; unlabelled.

    Paths are absolute or relative to the list's folder; blank lines and lines that start with #
    are skipped. Raises UserError for another kind of file, no path, or files that do not exist.
    """
    if path.suffix.lower() != ".txt":
        raise UserError(f"{path}: is a file; expected a folder or a .txt list, one path a line")
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot read this list: {error.strerror}") from error
    lines = (line.strip() for line in text.split("\n"))
    names = [line for line in lines if line and line[0] != "#"]
    if not names:
        raise UserError(f"{path}: the list names no file; expected one path a line")
    root = path.parent
    missing = [name for name in names if not os.path.exists(os.path.join(root, name))]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} files do not exist: {shown}. "
            f"Relative paths start at {root}"
        )
    return FileSource(root, names)
