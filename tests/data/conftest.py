import signal

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (23, 17), mode: str = "RGB") -> Image.Image:
    """A smooth random picture with full contrast. size: (width, height)."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, channels), np.uint8)
    bands = [
        Image.fromarray(noise[:, :, c]).resize(size, Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return Image.merge(mode, bands) if channels > 1 else bands[0]


@pytest.fixture(scope="session")
def make_picture():
    return picture


@pytest.fixture
def folder(tmp_path):
    """23 pictures 00.png … 22.png, flat."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(23):
        picture(i).save(root / f"{i:02d}.png")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def alarm():
    """Turns a hang into a failure."""

    def ring(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
