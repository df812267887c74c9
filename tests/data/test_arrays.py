import contextlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mokd_fast.data.pillow import decode
from mokd_fast.data.sources import open_source
from mokd_fast.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 6, 9), np.uint8)
COLOUR = RNG.integers(0, 256, (5, 6, 9, 3), np.uint8)
LABELS = np.array([4, 2, 4, 7, 2])


def pixels(source):
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(source.read(i)))) for i in range(len(source))]
    )


@pytest.mark.parametrize("images", [GREY, COLOUR, GREY[..., None]], ids=["NHW", "NHWC", "NHW1"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(images, save, tmp_path):
    save(tmp_path / "a.npz", other=np.zeros(3), images=images, labels=LABELS)
    source = open_source(tmp_path / "a.npz")
    np.testing.assert_array_equal(pixels(source), images.reshape(pixels(source).shape))
    assert source.classes == ("2", "4", "7") and [source.label(i) for i in range(3)] == [1, 0, 1]
    assert source.name(3) == f"{tmp_path}/a.npz/images#3"
    mode = decode(source.read(0), 3).mode, decode(source.read(0), 1).mode
    assert mode == ("RGB", "L")


def test_npy_and_column_major(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    np.save(tmp_path / "f.npy", np.asfortranarray(COLOUR))
    for name in ("a.npy", "f.npy"):
        source = open_source(tmp_path / name)
        np.testing.assert_array_equal(pixels(source), COLOUR)
        assert source.name(1) == f"{tmp_path}/{name}#1" and source.label(0) == -1


def test_which_array(tmp_path):
    """mnist.npz's names; MedMNIST's."""
    arrays = {"x_train": GREY, "y_train": LABELS, "x_test": GREY[:2] + 1, "y_test": LABELS[:2]}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(
        UserError, match=r"could be the pictures; name one of .*#x_train, .*#x_test"
    ):
        open_source(tmp_path / "a.npz")
    source = open_source(f"{tmp_path}/a.npz#x_test")
    np.testing.assert_array_equal(pixels(source), GREY[:2] + 1)
    assert [source.label(i) for i in range(2)] == [1, 0]
    np.savez(tmp_path / "m.npz", val_images=COLOUR, val_labels=LABELS[:, None], more=LABELS)
    assert open_source(tmp_path / "m.npz").classes == ("2", "4", "7")
    np.savez(tmp_path / "two.npz", a=COLOUR, b=LABELS, c=LABELS)
    assert open_source(tmp_path / "two.npz").classes == ()
    with pytest.raises(UserError, match="found no array called nothing"):
        open_source(f"{tmp_path}/a.npz#nothing")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (COLOUR.astype(np.float32), "found images float32"),
        (COLOUR.transpose(0, 3, 1, 2), r"expected uint8 \[N, H, W\] or \[N, H, W, 1 or 3\]"),
        (GREY[0], r"found images uint8 \[6, 9\]"),
        (GREY[:0], "holds no picture"),
        (np.array([{}], object), r"found images object \[1\]"),
    ],
    ids=["float", "NCHW", "HW", "empty", "objects"],
)
def test_no_pictures(array, said, tmp_path):
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(UserError, match=said):
        open_source(tmp_path / "a.npz")


def test_what_cannot_be_read(tmp_path):
    for name in ("a.npz", "a.npy"):
        (tmp_path / name).write_bytes(b"no array")
        with pytest.raises(UserError, match=rf"{name}: cannot read this array file"):
            open_source(tmp_path / name)
    np.save(tmp_path / "a.npy", COLOUR)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    with pytest.raises(OSError, match="ends within this picture"):
        open_source(tmp_path / "a.npy").read(4)


def test_a_damaged_deflated_array(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=COLOUR)
    whole = (tmp_path / "a.npz").read_bytes()
    for k in range(40, len(whole), 37):
        damaged = bytearray(whole)
        damaged[k] ^= 255
        (tmp_path / "a.npz").write_bytes(damaged)
        with contextlib.suppress(UserError):  # some bytes do not matter
            open_source(tmp_path / "a.npz").read(0)


def test_a_worker_gets_no_copy(tmp_path):
    """Stored: read from the file. Deflated: loaded by a process that did not inherit it."""
    large = np.zeros((100, 100, 100), np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images=large)
        source = open_source(tmp_path / "a.npz")
        sent = pickle.dumps(source)
        assert len(sent) < 10_000
        assert pickle.loads(sent).read(99) == source.read(99) == b"P5 100 100 255\n" + bytes(10_000)


def test_fingerprint(tmp_path):
    prints = []
    for images in (GREY, GREY[:4], GREY + 1):
        np.savez(tmp_path / "a.npz", images=images)
        prints.append(open_source(tmp_path / "a.npz").fingerprint())
    assert prints[0] == prints[2] != prints[1]  # of the list, not of the contents
