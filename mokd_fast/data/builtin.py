"""Data sets to try things on: Fashion-MNIST, and scikit-learn's digits where it is out of reach.

Each is written once as PNG files below the cache folder, so that pictures take the same way
through decoder and loader as the user's own: `<cache>/<name>/{train,test}/<class>/<index>.png`.
"""

import contextlib
import gzip
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError

NAMES = ("fashion-mnist", "digits")
SPLITS = ("train", "test")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_FILES = {"train": "train", "test": "t10k"}
_CLASSES = (
    *("T-shirt-top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"),
)
_SIDE = 28
_PATIENCE = 15  # seconds without a byte until a download is given up
_STALE = 3600  # seconds after which an unfinished conversion belongs to nobody

Split = tuple[np.ndarray, np.ndarray]  # uint8 [n, 28, 28], labels [n]
Progress = Callable[[int, int], None]  # pictures written, pictures in all


def cache_folder() -> Path:
    """$MOKD_FAST_CACHE, or mokd_fast below $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MOKD_FAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mokd_fast"


def builtin(name: str, progress: Progress | None = None) -> Path:
    """The folder of a built-in data set, with `train` and `test` in it; made on the first call.

    name: one of NAMES. progress: called with (pictures written, pictures in all); left out, a
    line on stderr tells. Raises UserError when the data cannot be had or the cache not written.
    """
    if name not in NAMES:
        raise UserError(f"no built-in data set {name!r}; there are {', '.join(NAMES)}")
    target = cache_folder() / name
    if not target.is_dir():
        splits, classes = _fashion_mnist() if name == "fashion-mnist" else _digits()
        try:
            _write(target, splits, classes, progress or _show(name))
        except OSError as error:
            raise UserError(
                f"{target}: cannot write the {name} pictures there: {error.strerror or error}. "
                "Set MOKD_FAST_CACHE to a folder with room that you may write to"
            ) from error
    return target


def fashion_mnist_or_digits(progress: Progress | None = None) -> tuple[str, Path]:
    """(name, folder) of Fashion-MNIST, or of digits where it cannot be had; say which to users."""
    try:
        return "fashion-mnist", builtin("fashion-mnist", progress)
    except _OutOfReach:
        return "digits", builtin("digits", progress)


class _OutOfReach(UserError):
    pass


def _fashion_mnist() -> tuple[dict[str, Split], tuple[str, ...]]:
    folder = DEBIAN if DEBIAN.is_dir() else _download()
    try:
        splits = {
            split: (
                _idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
                _idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
            )
            for split, prefix in _FILES.items()
        }
        for split, (pictures, labels) in splits.items():
            if pictures.shape != (len(labels), _SIDE, _SIDE) or labels.max() >= len(_CLASSES):
                raise ValueError(f"pictures {pictures.shape} and labels of {split} do not fit")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise _OutOfReach(f"{folder}: not the files of Fashion-MNIST: {error}") from error
    return splits, _CLASSES


def _idx(path: Path) -> np.ndarray:
    """One IDX file: zero, zero, 8 (uint8), the number of axes, their lengths, the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no IDX file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _download() -> Path:
    """torchvision's download; it checks the MD5 sums. A dead network must not hang a demo."""
    root, before = cache_folder() / "download", socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise _OutOfReach(
            f"Fashion-MNIST: not in {DEBIAN} and torchvision could not download it ({error}). "
            "apt-get install dataset-fashion-mnist, or use the data set digits"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return root / "FashionMNIST" / "raw"


def _digits() -> tuple[dict[str, Split], tuple[str, ...]]:
    """scikit-learn's 1797 digits, enlarged from 8x8 to 28x28; every fifth is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits: pip install scikit-learn, which holds them") from error
    small, labels = load_digits(return_X_y=True)
    grey = np.rint(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    bicubic = Image.Resampling.BICUBIC
    enlarged = [Image.fromarray(x).resize((_SIDE, _SIDE), bicubic) for x in grey]
    large = np.stack([np.asarray(x) for x in enlarged])
    test = np.arange(len(large)) % 5 == 0
    splits = {"train": (large[~test], labels[~test]), "test": (large[test], labels[test])}
    return splits, tuple("0123456789")


def _write(
    target: Path, splits: dict[str, Split], classes: tuple[str, ...], progress: Progress
) -> None:
    """Writes all into a temporary folder and renames it, so that `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}-*"):
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        total = sum(len(labels) for _, labels in splits.values())
        progress(0, total)
        for done, (path, picture) in enumerate(_files(unfinished, splits, classes), 1):
            path.write_bytes(picture)
            if done % 1000 == 0 or done == total:
                progress(done, total)
        unfinished.chmod(0o755)  # mkdtemp's 700 would shut others out of a shared cache
        with contextlib.suppress(OSError):  # another process may have been faster
            unfinished.rename(target)
        if not target.is_dir():
            raise OSError(f"cannot rename {unfinished}")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _files(
    root: Path, splits: dict[str, Split], classes: tuple[str, ...]
) -> Iterator[tuple[Path, bytes]]:
    for split, (pictures, labels) in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            yield root / split / classes[label] / f"{i:05d}.png", _png(picture)


def _png(picture: np.ndarray) -> bytes:
    """uint8 [h, w] as a grey PNG. Pillow's writer takes 100 us for 28x28, this one 10."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    h, w = picture.shape
    rows = np.zeros((h, 1 + w), np.uint8)  # each row starts with its filter, 0: none
    rows[:, 1:] = picture
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows.tobytes(), 1))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def _show(name: str) -> Progress:
    def progress(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        if sys.stderr.isatty() or end:
            text = f"\r{name}: {done}/{total} pictures written to {cache_folder()}"
            print(text, end=end, file=sys.stderr, flush=True)

    return progress
