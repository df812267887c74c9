import gzip
import os
import socket
import struct
import time

import numpy as np
import pytest
import torchvision
from PIL import Image

from mokd_fast.data import builtin
from mokd_fast.data.sources import open_source
from mokd_fast.errors import UserError


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def write_fashion_mnist(folder, train=30, test=10):
    """Files like those of Fashion-MNIST with a few random pictures; returns the splits."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    splits = {}
    for split, prefix, n in (("train", "train", train), ("test", "t10k", test)):
        pictures = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = (np.arange(n) * 7 % 10).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        splits[split] = (pictures, labels)
    return splits


@pytest.fixture
def fake(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(builtin, "DEBIAN", tmp_path / "debian")
    return write_fashion_mnist(tmp_path / "debian")


@pytest.fixture
def offline(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(builtin, "DEBIAN", tmp_path / "nowhere")

    def refuse(root, download):
        assert download and socket.getdefaulttimeout() == 15
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)


def check_complete(folder, splits):
    for split, (pictures, labels) in splits.items():
        assert len(list((folder / split).rglob("*.png"))) == len(labels)
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            image = Image.open(folder / split / builtin._CLASSES[label] / f"{i:05d}.png")
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), picture)


def test_conversion(fake, cache):
    seen = []
    folder = builtin.builtin("fashion-mnist", lambda *n: seen.append(n))
    assert folder == cache / "fashion-mnist"
    assert seen == [(0, 40), (40, 40)]
    check_complete(folder, fake)
    assert [p.name for p in cache.iterdir()] == ["fashion-mnist"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_second_call_converts_nothing(fake, tmp_path):
    folder = builtin.builtin("fashion-mnist")
    for path in (tmp_path / "debian").iterdir():
        path.unlink()
    assert builtin.builtin("fashion-mnist", lambda *_: pytest.fail("converts again")) == folder


def test_open_source_by_name(fake):
    train, test = open_source("fashion-mnist"), open_source("fashion-mnist/test")
    assert (len(train), len(test)) == (30, 10)
    assert train.classes == test.classes == tuple(sorted(builtin._CLASSES))
    assert open_source("fashion-mnist/train").fingerprint() == train.fingerprint()
    i = next(i for i in range(30) if train.name(i).endswith("00003.png"))
    assert train.classes[train.label(i)] == builtin._CLASSES[fake["train"][1][3]]


def test_an_exception_leaves_nothing_behind(fake, cache):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin.builtin("fashion-mnist", interrupt)
    assert list(cache.iterdir()) == []
    check_complete(builtin.builtin("fashion-mnist"), fake)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_conversion_is_not_taken_for_a_finished_one(fake, cache):
    child = os.fork()
    if child == 0:
        builtin.builtin("fashion-mnist", lambda done, total: done and os._exit(7))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    (left,) = cache.iterdir()
    assert left.name.startswith(".fashion-mnist-")
    check_complete(builtin.builtin("fashion-mnist"), fake)
    assert left.exists()  # it may be another process at work
    (cache / "fashion-mnist").rename(cache / "moved")
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    builtin.builtin("fashion-mnist")
    assert not left.exists()


def test_another_process_was_faster(fake, cache):
    def faster(done, total):
        if done:
            (cache / "fashion-mnist" / "train").mkdir(parents=True)

    assert builtin.builtin("fashion-mnist", faster) == cache / "fashion-mnist"
    assert [p.name for p in cache.iterdir()] == ["fashion-mnist"]


def test_progress_on_stderr(fake, capsys):
    builtin.builtin("fashion-mnist")
    assert "fashion-mnist: 40/40 pictures written to" in capsys.readouterr().err


def test_download(offline, tmp_path, cache, monkeypatch):
    splits = {}

    def download(root, download):
        splits.update(write_fashion_mnist(cache / "download" / "FashionMNIST" / "raw"))

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    name, folder = builtin.fashion_mnist_or_digits()
    assert name == "fashion-mnist"
    check_complete(folder, splits)


def test_no_download(offline):
    with pytest.raises(UserError, match=r"torchvision could not download it \(Error down.*digits"):
        builtin.builtin("fashion-mnist")
    assert socket.getdefaulttimeout() is None


def test_digits_stand_in(offline, cache):
    name, folder = builtin.fashion_mnist_or_digits()
    assert (name, folder) == ("digits", cache / "digits")
    train, test = open_source("digits"), open_source("digits/test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    image = np.asarray(Image.open(train.name(0)))
    assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "not idx", "labels", "absent"])
def test_damaged_files(damage, fake, tmp_path):
    path = tmp_path / "debian" / "train-labels-idx1-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-12])
    elif damage == "not gzip":
        path.write_bytes(b"<html>")
    elif damage == "not idx":
        path.write_bytes(gzip.compress(b"<html>"))
    elif damage == "labels":
        write_idx(path, np.zeros(5, np.uint8))
    else:
        path.unlink()
    with pytest.raises(UserError, match="debian: not the files of Fashion-MNIST"):
        builtin.builtin("fashion-mnist")


def test_a_cache_that_cannot_be_written(fake, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOKD_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/fashion-mnist: cannot write .* Set MOKD_FAST_CACHE"):
        builtin.builtin("fashion-mnist")


def test_unknown_name(cache):
    with pytest.raises(UserError, match="no built-in data set 'mnist'; there are fashion-mnist"):
        builtin.builtin("mnist")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("MOKD_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    assert builtin.cache_folder() == tmp_path / ".cache" / "mokd_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert builtin.cache_folder() == tmp_path / "x" / "mokd_fast"
    monkeypatch.setenv("MOKD_FAST_CACHE", str(tmp_path / "m"))
    assert builtin.cache_folder() == tmp_path / "m"
