"""Pictures that are files of their own: folders and file lists."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError

# torchvision.datasets.folder.IMG_EXTENSIONS, so that a folder means the same pictures there.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SHOWN = 3  # how many names an error message lists
_GONE = (-1, -1)

Labels = tuple[tuple[str, ...], np.ndarray | None]  # class names, int32 [N]; nothing: ((), None)


class Names:
    """N names in one bytes object: millions of Python strings would take gigabytes, and their
    reference counts would copy the pages into every forked worker."""

    def __init__(self, names: Iterable[bytes]) -> None:
        encoded = list(names)
        self.blob = b"\n".join(encoded)
        self.ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64) - 1

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = int(self.ends[i - 1]) + 1 if i else 0
        return os.fsdecode(self.blob[start : int(self.ends[i])])


class FileSource:
    """Files below `root`, in the order given; built by `open_folder` and `open_list`."""

    def __init__(self, root: str | Path, names: Iterable[str], labelled: bool = False) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = str(root)
        self.names = Names(encoded)
        self.classes, self._labels = folder_labels(encoded) if labelled else ((), None)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0, opener=_regular) as file:
            return file.read()

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def label(self, i: int) -> int:
        return -1 if self._labels is None else int(self._labels[i])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.names.blob).hexdigest()

    def stamps(self) -> np.ndarray:
        return np.array([stamp(self.name(i)) for i in range(len(self))], np.int64).reshape(-1, 2)


def _regular(path: str, flags: int) -> int:
    """An opener that refuses pipes and devices, from which a read might never come back."""
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder open() says so itself
        return number
    os.close(number)
    raise OSError("not a regular file but a pipe or a device")


def stamp(path: str) -> tuple[int, int]:
    """(size, modification time in ns) of a file, by which a changed one is known; or (-1, -1)."""
    try:
        found = os.stat(path)
    except OSError:
        return _GONE
    return found.st_size, found.st_mtime_ns


def folder_labels(names: list[bytes], separator: bytes = os.fsencode(os.sep)) -> Labels:
    """First-level folders as classes, unless a picture lies outside one."""
    first = [head for head, slash, _ in (name.partition(separator) for name in names) if slash]
    if len(first) < len(names):
        return (), None
    classes = tuple(sorted({os.fsdecode(head) for head in set(first)}))
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    return classes, np.array([number[head] for head in first], np.int32)


def walk(
    folder: str,
    others: Counter[str],
    endings: tuple[str, ...] = EXTENSIONS,
    prefix: str = "",
    crossed: tuple[str, ...] = (),
) -> Iterator[str]:
    """Relative paths of the files with these endings below a folder, sorted; hidden names are left
    out, and links to a folder that the way there came through.

    others: counts the endings of the other files; crossed: where the links on the way lay.
    """
    try:
        with os.scandir(folder) as scan:  # it knows a folder without a stat for each file
            entries = sorted((e for e in scan if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot list this folder: {error.strerror}") from error
    for entry in entries:
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():
            way = (*crossed, os.path.realpath(folder)) if link else crossed
            if not (link and _loops(entry.path, way)):
                yield from walk(entry.path, others, endings, f"{prefix}{entry.name}{os.sep}", way)
        elif entry.name.lower().endswith(endings):
            yield prefix + entry.name
        else:
            others[os.path.splitext(entry.name)[1].lower() or "no extension"] += 1


def _loops(link: str, crossed: tuple[str, ...]) -> bool:
    """Whether a linked folder holds one of these folders, the link's own or that of one before."""
    target = os.path.realpath(link)
    return any(f == target or f.startswith(os.path.join(target, "")) for f in crossed)


def no_picture(root: str | Path, others: Counter[str]) -> UserError:
    """What to say of a folder that holds none."""
    if not others:
        return UserError(f"{root}: the folder is empty; expected pictures in it or below it")
    found = ", ".join(f"{count} x {kind}" for kind, count in others.most_common(SHOWN))
    return UserError(
        f"{root}: no picture in this folder or below it. Looked for {' '.join(EXTENSIONS)} "
        f"(upper or lower case); found {others.total()} other files: {found}"
    )


def listed(text: str) -> list[str]:
    """The paths of a file list: blank lines and lines that start with # are skipped."""
    lines = (line.strip() for line in text.removeprefix("\ufeff").split("\n"))
    return [line for line in lines if line and line[0] != "#"]


def open_list(path: Path) -> FileSource:
    """The pictures that a text file names, one path a line, in its order; unlabelled.

    Paths are absolute or relative to the list's folder. Raises UserError for a list that cannot
    be read, that names nothing, or files that do not exist.
    """
    try:
        names = listed(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"{path}: cannot read this list: {error.strerror}") from error
    if not names:
        raise UserError(f"{path}: the list names no file; expected one path a line")
    root = path.parent
    missing = [name for name in names if not os.path.exists(os.path.join(root, name))]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} files do not exist: {shown(missing)}. "
            f"Relative paths start at {root}"
        )
    return FileSource(root, names)


def shown(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
