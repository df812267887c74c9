import io
import random

import numpy as np
import pytest
import torch
from PIL import Image


class ArraySource:
    """Pictures from arrays, as PNG bytes; counts what is read. None stands for a broken file."""

    def __init__(self, pictures, labels, classes=None):
        self.pictures, self.labels = list(pictures), list(labels)
        found = tuple(f"class{i}" for i in range(max(self.labels, default=-1) + 1))
        self.classes = found if classes is None else classes
        self.reads = []

    def __len__(self):
        return len(self.pictures)

    def read(self, i):
        self.reads.append(i)
        if self.pictures[i] is None:
            return b"no picture"
        file = io.BytesIO()
        Image.fromarray(self.pictures[i]).save(file, "PNG")
        return file.getvalue()

    def name(self, i):
        return f"root/picture{i}.png"

    def label(self, i):
        return self.labels[i]

    def fingerprint(self):
        return "array"


@pytest.fixture
def array_source():
    return ArraySource


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small only wait for each other on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def squares():
    """n pictures of 2 classes, a bright square left or right, labels alternating: a source."""

    def make(n, side=12, seed=0, noise=60, bright=255):
        rng = np.random.default_rng(seed)
        pictures = rng.integers(0, noise, (n, side, side), dtype=np.uint8)
        for i, picture in enumerate(pictures):
            left = 1 if i % 2 == 0 else side - 5
            picture[4:8, left : left + 4] = bright
        return ArraySource(pictures, [i % 2 for i in range(n)])

    return make


@pytest.fixture
def generators_untouched():
    """Fails the test when it draws from a global generator."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    position = np.random.get_state()[2]
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and np.random.get_state()[2] == position
    assert random.getstate() == before[2]
