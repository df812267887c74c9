"""Damaged files of all kinds through the three loaders: the same are replaced by the same."""

import itertools
import logging
import os

import pytest
from PIL import Image

from mokd_fast.data.index import check
from mokd_fast.data.loader import ViewLoader
from mokd_fast.data.sources import FileSource, open_source
from tests.data.test_formats import AUGMENT, rgb, save

# Broken files, and what Pillow says of them. A cut and damage within show when it is decoded.
JPEG, PNG = save(rgb(4, (160, 120)), "JPEG"), save(rgb(4, (160, 120)))
DAMAGED = {
    **{f"JPEG cut at {f}": (JPEG[: int(len(JPEG) * f)], "truncated") for f in (0.4, 0.7, 0.95)},
    "JPEG cut by one byte": (JPEG[:-1], "truncated"),
    **{f"PNG cut at {f}": (PNG[: int(len(PNG) * f)], "truncated") for f in (0.05, 0.4, 0.95)},
    "PNG with a flipped bit": (PNG[:900] + bytes([PNG[900] ^ 4]) + PNG[901:], "broken"),
    "PNG with a hole": (PNG[:900] + bytes(50) + PNG[950:], "broken"),
    "WebP cut": (save(rgb(4), "WEBP")[:-20], "decoder"),
    "BMP cut": (save(rgb(4), "BMP")[:-1], "truncated"),
    "header of a JPEG": (JPEG[:100], "Truncated"),
    "zeros": (bytes(5000), "not a picture"),
    "text": (b"<html>404</html>", "not a picture"),
    "empty": (b"", "empty file"),
    "bomb": (save(Image.new("L", (2000, 1500))), "DecompressionBombError"),
}


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A folder list of good pictures, DAMAGED, and what the disk has against being read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    names = [f"good {i}.png" for i in range(16)]
    for name in names:
        rgb(int(name[5:-4])).save(tmp_path / name)
    for name, (data, _) in DAMAGED.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        names.append(f"{name}.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "disk.jpg").symlink_to("/proc/self/mem")  # an input/output error
    (tmp_path / "denied.jpg").write_bytes(PNG)
    names += ["folder.jpg", "loop.jpg", "disk.jpg", "denied.jpg", "gone.jpg"]
    source = FileSource(tmp_path, names)
    read = source.read

    def refuse(i: int) -> bytes:
        if "denied" in source.name(i):  # root may read all
            raise PermissionError(13, "Permission denied", source.name(i))
        return read(i)

    source.read = refuse
    return source


@pytest.mark.parametrize("channels", [1, 3])
def test_all_loaders_replace_the_same_pictures(channels, damaged, caplog, alarm):
    runs = {}
    for kind in ("pillow", "cpu", "dali"):
        caplog.clear()
        it = ViewLoader(
            damaged, AUGMENT, batch=4, channels=channels, seed=0, workers=0, loader=kind
        )
        with caplog.at_level(logging.WARNING, "mokd_fast"):
            batches = it.batches()
            views = list(itertools.islice(batches, 2 * it.steps_per_epoch))
            batches.close()
        said = [r.getMessage() for r in caplog.records]
        assert said == [f"skipped {name}: {why}" for name, why in it.bad_files.items()]
        runs[kind] = [(v.index.tolist(), v.bad) for v in views], it.bad_files
    assert runs["pillow"] == runs["cpu"] == runs["dali"]
    steps, bad = runs["dali"]
    assert {i for index, _ in steps for i in index} == set(range(16))  # the good ones
    assert len(bad) == len(DAMAGED) + 5
    said = {os.path.basename(name)[:-4]: why for name, why in bad.items()}
    system = {
        "folder": "IsADirectory", "loop": "symbolic links", "disk": "Input/output",
        "denied": "Permission denied", "gone": "No such file",
    }  # fmt: skip
    for name, why in {**{n: w for n, (_, w) in DAMAGED.items()}, **system}.items():
        assert why in said[name], (name, said[name])


def test_what_the_header_tells_never_reaches_dali(damaged):
    """A bomb above all: DALI has no limit. So nothing fails there, and nothing is made again."""
    late = [name for name in DAMAGED if " cut" in name or " with " in name]
    known = (i for i in range(len(damaged)) if os.path.basename(damaged.name(i))[:-4] in late)
    it = ViewLoader(
        damaged, AUGMENT, batch=8, channels=3, seed=0, workers=0, loader="dali",
        known_bad=frozenset(known), drop_last=False,
    )  # fmt: skip
    it._checked = None
    batches = it.batches()
    list(itertools.islice(batches, it.steps_per_epoch))
    batches.close()
    assert len(it.bad_files) == len(DAMAGED) - len(late) + 5
    assert any("DecompressionBombError" in why for why in it.bad_files.values())


def test_a_false_marker_in_a_jpeg_is_found_by_the_check(tmp_path, cache):
    """The one damage on which DALI and Pillow differ: it must not end a run, and the check before
    a run finds it for every loader."""
    at = len(JPEG) * 2 // 3
    (tmp_path / "0.jpg").write_bytes(JPEG[:at] + b"\xff\xd8" + JPEG[at + 2 :])
    (tmp_path / "1.jpg").write_bytes(JPEG)
    source = open_source(tmp_path)
    index = check(source, str(tmp_path))
    assert list(index.bad) == [0] and "broken data stream" in index.bad[0]
    found = {}
    for known in ((), index.bad):
        it = ViewLoader(
            source, AUGMENT, batch=2, channels=3, seed=0, workers=0, loader="dali",
            known_bad=frozenset(known),
        )  # fmt: skip
        batches = it.batches()
        found[len(known)] = sorted(next(batches).index.tolist())
        batches.close()
    assert found == {0: [0, 1], 1: [1, 1]}
