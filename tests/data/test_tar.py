import io
import logging
import os
import pickle
import tarfile

import pytest

from mokd_fast.data import tar
from mokd_fast.data.sources import open_source
from mokd_fast.data.spans import LocalFiles
from mokd_fast.errors import UserError


def write_tar(path, members, end=True):
    """members: (name, bytes). end: False leaves the end mark out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    if not end:
        whole = path.read_bytes()
        path.write_bytes(whole[: sum(512 + -(-len(data) // 512) * 512 for _, data in members)])
    return path


def samples(first, count):
    """WebDataset samples: a picture, its class, and a text that is no picture."""
    for i in range(first, first + count):
        yield f"./{i:04d}.jpg", b"picture %d" % i
        yield f"./{i:04d}.cls", b"%d\n" % (i % 3 + 7)
        yield f"./{i:04d}.txt", b"caption"


@pytest.fixture
def shards(tmp_path, cache):
    for k in range(3):
        write_tar(tmp_path / f"s-{k:03d}.tar", samples(k * 4, 4))
    return tmp_path


@pytest.mark.parametrize("how", ["folder", "braces", "wildcard", "words"])
def test_shards(how, shards):
    root = {
        "folder": shards,
        "braces": shards / "s-{000..002}.tar",
        "wildcard": shards / "s-*.tar",
        "words": shards / "s-00{0,1,2}.tar",
    }[how]
    source = open_source(root)
    assert [source.read(i) for i in range(len(source))] == [b"picture %d" % i for i in range(12)]
    assert source.name(5) == f"{shards}/s-001.tar/0001.jpg".replace("0001", "0005")
    assert source.classes == ("7", "8", "9") and [source.label(i) for i in range(4)] == [0, 1, 2, 0]


def test_linked_and_hidden_folders_of_shards(tmp_path, cache):
    root = tmp_path / "root"
    write_tar(root / ".old" / "0.tar", samples(0, 4))
    write_tar(tmp_path / "far" / "1.tar", samples(4, 3))
    (root / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    assert open_source(root).name(0) == f"{root}/linked/1.tar/0004.jpg"
    assert len(open_source(root)) == 3


def test_one_shard_with_odd_members(tmp_path, cache):
    """Long and odd names, several dots, folders, hidden names, no picture, nothing in it."""
    long = "d" * 150 + "/" + "n" * 120 + ".PNG"
    names = [long, "ä.jpg", "a.seg.png", "a/.x.png", "._b.png", "c.json", "a/b/e.webp"]
    write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with tarfile.open(tmp_path / "a.tar", "a") as out:
        folder = tarfile.TarInfo("f.png")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "c.png"
        for info in (folder, link, tarfile.TarInfo("empty.png")):
            out.addfile(info)
    source = open_source(tmp_path / "a.tar")
    kept = [long, "ä.jpg", "a.seg.png", "a/b/e.webp"]
    assert [source.read(i) for i in range(len(source))] == [*(n.encode() for n in kept), b""]
    assert source.name(0) == f"{tmp_path}/a.tar/{long}" and source.classes == ()


def test_labels_without_cls_are_the_folders(tmp_path, cache):
    write_tar(tmp_path / "a.tar", [("dog/1.jpg", b"1"), ("cat/2.jpg", b"2")])
    source = open_source(tmp_path / "a.tar")
    assert source.classes == ("cat", "dog") and [source.label(i) for i in range(2)] == [1, 0]
    write_tar(tmp_path / "b.tar", [*samples(0, 1), ("x.jpg", b"no class")])
    assert open_source(tmp_path / "b.tar").classes == ()


def test_the_index_is_made_once_and_again_for_a_changed_shard(shards, cache, monkeypatch, capsys):
    monkeypatch.setattr(tar, "_TOLD", 1)
    before = open_source(shards)
    scanned = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: scanned.append(1) or real(*a, **k))
    again = open_source(shards)
    assert not scanned and again.fingerprint() == before.fingerprint()
    assert [again.label(i) for i in range(12)] == [before.label(i) for i in range(12)]
    assert again.name(11) == before.name(11) and again.read(11) == b"picture 11"
    write_tar(shards / "s-001.tar", samples(50, 2))
    scanned.clear()
    assert capsys.readouterr().err == "indexing 3 tar shards, once\n"
    changed = open_source(shards)
    assert capsys.readouterr().err == "indexing 1 tar shards, once\n"
    assert len(scanned) == 1 and changed.read(4) == b"picture 50" and len(changed) == 10
    assert changed.fingerprint() != before.fingerprint()
    for file in cache.rglob("*.npz"):
        file.write_bytes(b"damaged")
    assert open_source(shards).fingerprint() == changed.fingerprint()


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes(
        {
            "within a picture": lambda: data[: 512 * 13 + 3],
            "within a header": lambda: data[: 512 * 12 + 100],
            "no end mark": lambda: data[: 512 * 12],
            "garbage": lambda: data[: 512 * 12] + b"\x07" * 512 + data[512 * 13 :],
            "all garbage": lambda: b"\x07" * len(data),
            "empty": lambda: b"",
        }[kind]()
    )


@pytest.mark.parametrize(
    "kind",
    ["within a picture", "within a header", "no end mark", "garbage", "all garbage", "empty"],
)
def test_a_damaged_shard_is_named_and_the_rest_used(kind, shards, caplog):
    """Two samples of s-001.tar (12 blocks of 512 bytes) lie before the damage."""
    damage(shards / "s-001.tar", kind)
    kept = 0 if kind in ("all garbage", "empty") else 2
    with caplog.at_level(logging.WARNING):
        source = open_source(shards)
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith(f"{shards}/s-001.tar: damaged or cut off (")
    assert f"the {kept} pictures before it stay in use" in said
    read = [source.read(i) for i in range(len(source))]
    want = [*range(4), *range(4, 4 + kept), *range(8, 12)]
    assert read == [b"picture %d" % i for i in want]
    caplog.clear()
    open_source(shards)  # of the cache
    assert [r.getMessage() for r in caplog.records] == [said]


def test_nothing_in_it(tmp_path, cache):
    write_tar(tmp_path / "a.tar", [("readme.txt", b"x")])
    with pytest.raises(
        UserError, match=r"a\.tar: no picture in this tar file\. Looked for .*\.jpg"
    ):
        open_source(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"no picture in this tar file \(.*a\.tar: damaged"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(kind, tmp_path, cache):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{kind}"):
        pass
    with pytest.raises(
        UserError, match=r"a\.tar: cannot read this shard: it is compressed.*unpack"
    ):
        open_source(path)


def test_shards_that_are_missing(shards):
    with pytest.raises(UserError, match=r"1 of 4 are missing: .*s-003\.tar"):
        open_source(shards / "s-{000..003}.tar")
    with pytest.raises(UserError, match="no file is called so"):
        open_source(shards / "t-*.tar")
    with pytest.raises(UserError, match="more than 100000 names"):
        open_source(shards / "s-{0..9999999999}.tar")


def test_splits_are_not_mixed(tmp_path, cache):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-000.tar", samples(0, 2))
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    said = f"{tmp_path}: holds the splits train, val: give one, as {tmp_path}/train*.tar"
    assert str(error.value) == said and len(open_source(f"{tmp_path}/train*.tar")) == 2


def test_descriptors_are_bounded_and_stay_in_their_process(tmp_path, cache):
    for k in range(80):
        write_tar(tmp_path / f"{k:03d}.tar", [("a.jpg", b"%d" % k)])
    source = open_source(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [source.read(i) for i in range(80)] == [b"%d" % k for k in range(80)]
    assert len(os.listdir("/proc/self/fd")) - count == 64
    assert copy.read(79) == b"79" and len(pickle.dumps(copy)) == len(pickle.dumps(source))
    del source, copy
    assert len(os.listdir("/proc/self/fd")) == count


def test_a_descriptor_in_use_is_not_closed(tmp_path):
    files = LocalFiles()
    (tmp_path / "a").write_bytes(b"abc")
    files.read(str(tmp_path / "a"), 0, 1)
    held = files._open[str(tmp_path / "a")]  # as another thread holds it while it reads
    for k in range(70):
        (tmp_path / f"{k}").write_bytes(b"x")
        files.read(str(tmp_path / f"{k}"), 0, 1)
    assert str(tmp_path / "a") not in files._open and os.pread(held.number, 2, 1) == b"bc"
    with pytest.raises(FileNotFoundError):
        files.read(str(tmp_path / "gone"), 0, 1)
