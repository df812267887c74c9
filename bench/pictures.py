"""JPEGs of ImageNet's usual size for bench/data.py, cut out of real photographs."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from mokd_fast.data.builtin import cache_folder

BACKGROUNDS = Path("/usr/share/backgrounds")
DEBIAN = "apt install ukui-wallpapers lomiri-wallpapers-20.04 lomiri-wallpapers-16.04"
WIDTH, HEIGHT, QUALITY = 500, 375, 90


def make(count: int, photos: Path | None = None, cache: Path | None = None) -> Path:
    """The folder of `count` JPEGs, made if it is not there: the same files each time.

    Each is a window of a photograph, of 500 x 375 pixels up to all of it, scaled down to that.
    photos: a folder of JPEG photographs, default those of Debian's wallpapers, or scikit-learn's
    two where those are not installed; cache: where the folder is made, default the package's cache
    folder.
    """
    places = [photos] if photos else [BACKGROUNDS, *_of_scikit_learn()]
    for photos in places:
        files = sorted(f for f in photos.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
        if files:
            break
    else:
        said = ", ".join(map(str, places))
        sys.exit(f"{said}: no .jpg there. Name a folder with --photos, or on Debian: {DEBIAN}")
    name = f"{count}-of-{len(files)}-in-{photos.resolve().name}"
    folder = (cache or cache_folder() / "bench-data") / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent)
        try:
            write(files, count, Path(temporary) / "photos")  # a class, for ImageFolder
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _of_scikit_learn() -> list[Path]:
    try:
        from sklearn import datasets
    except ImportError:
        return []
    return [Path(datasets.__file__).parent / "images"]


def write(files: list[Path], count: int, folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k, file in enumerate(files):
        photo = Image.open(file).convert("RGB")
        widest = min(photo.width / WIDTH, photo.height / HEIGHT)
        if widest < 1:
            sys.exit(f"{file}: {photo.width} x {photo.height}, must be {WIDTH} x {HEIGHT} or more")
        for i in range(k, count, len(files)):  # neighbours in the list are of other photographs
            scale = rng.uniform(1, widest)
            width, height = int(WIDTH * scale), int(HEIGHT * scale)
            left = int(rng.integers(photo.width - width + 1))
            top = int(rng.integers(photo.height - height + 1))
            box = left, top, left + width, top + height
            small = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box)
            small.save(folder / f"{i:05}.jpg", quality=QUALITY)
