import itertools
import logging
import os
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mokd_fast.data import index
from mokd_fast.data.index import check
from mokd_fast.data.loader import ViewLoader
from mokd_fast.data.params import AugmentConfig, epoch_order
from mokd_fast.data.sources import open_source
from mokd_fast.errors import UserError
from tests.data.test_tar import write_tar

pytestmark = pytest.mark.usefixtures("cache")
AUGMENT = AugmentConfig(global_size=10, local_size=6, locals=1)


def found(root, **options):
    source = open_source(root)
    got = check(source, str(root), **options)
    return {os.path.basename(source.name(i)): why for i, why in got.bad.items()}, got


def take(source, n, **options):
    options = {"batch": 4, "channels": 3, "seed": 7, "workers": 0, **options}
    it = ViewLoader(source, AUGMENT, **options)
    return it, list(itertools.islice(it.batches(), n))


def test_sizes_and_progress(folder, make_picture):
    make_picture(1, (40, 30)).save(folder / "05.png")
    seen = []
    bad, got = found(folder, progress=lambda *at: seen.append(at))
    assert bad == {} and got.checked == 23 and seen == [(23, 23)]
    assert got.sizes[5].tolist() == [30, 40] and got.sizes[6].tolist() == [17, 23]


def test_what_is_bad_and_what_is_not(folder, make_picture):
    """Each fault once; the reason says what it is."""
    good = (folder / "00.png").read_bytes()
    (folder / "01.png").write_bytes(b"")
    (folder / "02.png").write_bytes(b"<html>not found</html>")
    (folder / "03.png").write_bytes(good[: len(good) // 2])
    (folder / "04.png").unlink()
    (folder / "04.png").symlink_to("04.png")
    (folder / "05.png").unlink()
    (folder / "05.png").symlink_to("nowhere.png")
    make_picture(1).save(folder / "06.png", "GIF")  # a picture, whatever its name
    make_picture(1).save(folder / "x.gif")  # no extension of ImageFolder
    (folder / "07.png").unlink()
    (folder / "07.png").mkdir()  # a folder, in which there is a picture
    (folder / "07.png" / "y.png").write_bytes(good)
    bad, _ = found(folder)
    assert {name: why.split(":")[0] for name, why in bad.items()} == dict.fromkeys(
        ("01.png", "02.png", "03.png", "04.png"), "OSError"
    ) | {"05.png": "FileNotFoundError"}
    assert "empty file (0 bytes)" in bad["01.png"] and "begins b'<html>no'" in bad["02.png"]
    assert "symbolic links" in bad["04.png"]


def test_a_folder_in_a_list(folder):
    (folder / "d.png").mkdir()
    (folder / "list.txt").write_text("00.png\nd.png\n")
    bad, _ = found(folder / "list.txt")
    assert list(bad) == ["d.png"] and bad["d.png"].startswith("IsADirectoryError")


def test_a_decompression_bomb(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 23 * 17)
    Image.new("L", (200, 200)).save(folder / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no size of the others is near the limit
        bad, _ = found(folder)
    assert list(bad) == ["bomb.png"] and "DecompressionBombError" in bad["bomb.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(folder):
    (folder / "03.png").chmod(0)
    bad, _ = found(folder)
    assert "Permission denied" in bad["03.png"]
    (folder / "03.png").chmod(0o600)  # changes no modification time
    assert found(folder)[0] == {}


def test_only_what_is_new_or_changed_is_checked_again(folder, make_picture):
    (folder / "03.png").write_bytes(b"broken")
    assert found(folder)[1].checked == 23
    bad, got = found(folder)
    assert got.checked == 1 and list(bad) == ["03.png"], "the bad one is tried again"
    assert got.sizes[4].tolist() == [17, 23] and got.sizes[3].tolist() == [0, 0]
    make_picture(3, (5, 6)).save(folder / "03.png")
    bad, got = found(folder)
    assert bad == {} and got.checked == 1 and got.sizes[3].tolist() == [6, 5]
    make_picture(1, (7, 8)).save(folder / "10.png")
    make_picture(1).save(folder / "00a.png")  # the positions of all others change
    (folder / "20.png").unlink()
    bad, got = found(folder)
    assert bad == {} and got.checked == 2 and got.sizes[11].tolist() == [8, 7]
    assert found(folder)[1].checked == 0


def test_a_file_of_before_1970(folder):
    os.utime(folder / "05.png", (-5, -5))
    assert found(folder)[1].checked == 23 and found(folder)[1].checked == 0


def test_a_changed_shard_is_checked_again(tmp_path, make_picture, folder):
    good = (folder / "00.png").read_bytes()
    for k in range(2):
        write_tar(tmp_path / "t" / f"{k}.tar", [(f"{i}.png", good) for i in range(5)])
    assert found(tmp_path / "t")[1].checked == 10
    write_tar(tmp_path / "t" / "1.tar", [("0.png", good), ("1.png", b"bad")])
    bad, got = found(tmp_path / "t")
    assert got.checked == 2 and list(bad) == ["1.png"]


def test_another_pillow_and_a_damaged_cache(folder, cache, monkeypatch):
    assert found(folder)[1].checked == 23
    monkeypatch.setattr(index, "_PILLOW", "99.0")
    assert found(folder)[1].checked == 23
    (file,) = (cache / "index").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert found(folder)[1].checked == 23 and found(folder)[1].checked == 0
    flipped = bytearray(file.read_bytes())
    flipped[flipped.index(b"PK\1\2") + 10] ^= 64  # a method of compression that there is not
    file.write_bytes(flipped)
    assert found(folder)[1].checked == 23 and found(folder)[1].checked == 0
    np.savez(file, of=np.arange(3))
    assert found(folder)[1].checked == 23 and found(folder)[1].checked == 0


def test_a_cache_that_cannot_be_written(folder, cache, caplog):
    cache.write_text("a file where a folder is needed")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert found(folder)[1].checked == 23
    assert caplog.text.count("cannot be written") == 1


def test_processes_find_the_same(folder, monkeypatch, alarm):
    monkeypatch.setattr(index, "_FEW", 0)
    monkeypatch.setattr(index, "_CHUNK", 3)
    (folder / "03.png").write_bytes(b"broken")
    one, two = (found(folder, workers=w) for w in (0, 2))
    assert one[1].checked == 23 and two[1].checked == 1
    os.utime(folder / "07.png", (1, 1))
    again = found(folder, workers=2)
    assert one[0] == two[0] == again[0] and again[1].checked == 2
    np.testing.assert_array_equal(one[1].sizes, again[1].sizes)


def test_a_check_that_is_cut_off_goes_on(folder, monkeypatch):
    monkeypatch.setattr(index, "_CHUNK", 5)

    def stop(done, total):
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(folder, progress=stop)
    assert found(folder)[1].checked == 13


def test_a_user_error_of_the_source_arrives_as_it_is(folder, monkeypatch, alarm):
    source = open_source(folder)

    def read(i):
        raise UserError("mount the disk first")

    monkeypatch.setattr(source, "read", read)
    monkeypatch.setattr(index, "_FEW", 0)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^mount the disk first$"):
            check(source, str(folder), workers=workers)


def test_a_second_start_takes_milliseconds(tmp_path, folder, make_picture):
    """10,000 files; 100 us each would be 1 s, and decoding takes that of the smallest picture."""
    (tmp_path / "many").mkdir()
    for i in range(10_000):
        os.link(folder / "00.png", tmp_path / "many" / f"{i:05d}.png")
    first = found(tmp_path / "many")[1]
    source = open_source(tmp_path / "many")
    begin = time.process_time()
    again = check(source, str(tmp_path / "many"))
    took = time.process_time() - begin
    assert first.checked == 10_000 and again.checked == 0 and took < 0.5, took
    os.link(folder / "00.png", tmp_path / "many" / "new.png")  # of the size and time of the others
    assert found(tmp_path / "many")[1].checked == 1


def test_known_bad_pictures_are_replaced_unread(folder):
    """The batches are those of a loader that meets them; nothing is read of them."""
    order = epoch_order(23, 7, 0).tolist()
    bad = {order[2], order[3], order[22], 5}
    for i in bad:
        (folder / f"{i:02d}.png").write_bytes(b"broken")
    source = open_source(folder)
    met, want = take(source, 15)
    (known, got), read = (None, None), []

    class Watched:
        def __len__(self):
            return len(source)

        def read(self, i):
            read.append(i)
            return source.read(i)

    known, got = take(Watched(), 15, known_bad=frozenset(check(source, str(folder)).bad))
    for x, y in zip(want, got, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(x[:3], y[:3], strict=True))
    assert not bad & set(read) and known.bad_files == {} and len(met.bad_files) == len(bad)


def test_all_but_one_known_bad(folder):
    source = open_source(folder)
    _, (views,) = take(source, 1, known_bad=frozenset(range(1, 23)))
    assert views.index.tolist() == [0, 0, 0, 0]
    (folder / "00.png").unlink()
    with pytest.raises(
        UserError, match=r"^1 pictures in a row cannot be read, the first: .*00\.png"
    ):
        take(source, 1, known_bad=frozenset(range(1, 23)))
    with pytest.raises(UserError, match="none of the 23 pictures can be read"):
        take(source, 1, known_bad=frozenset(range(23)))
