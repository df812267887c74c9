import pickle
import sys

import fsspec
import pytest

from mokd_fast.data.sources import open_source
from mokd_fast.errors import UserError
from tests.data.test_tar import samples, write_tar


@pytest.fixture
def memory():
    """put(name, bytes) on memory://, which is empty again afterwards."""
    fs = fsspec.filesystem("memory")
    yield lambda name, data: fs.pipe_file(f"/m/{name}", data)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_folder(memory):
    for name in ("b/2.jpg", "a/1.PNG", "a/x/3.webp", "a/.4.png", ".c/5.png", "readme.txt"):
        memory(name, name.encode())
    source = open_source("memory://m/")
    assert names(source) == [f"memory://m/{n}" for n in ("a/1.PNG", "a/x/3.webp", "b/2.jpg")]
    assert [source.read(i) for i in range(3)] == [b"a/1.PNG", b"a/x/3.webp", b"b/2.jpg"]
    assert source.classes == ("a", "b") and source.label(2) == 1
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == b"a/x/3.webp" and copy.fingerprint() == source.fingerprint()


def test_stamps_tell_a_changed_file(memory):
    memory("1.png", b"one")
    before = open_source("memory://m").stamps()
    assert (before == open_source("memory://m").stamps()).all()
    memory("1.png", b"two")
    assert (before != open_source("memory://m").stamps()).any()


def test_a_shard_that_cannot_be_asked_for_later(memory, tmp_path, cache, monkeypatch):
    memory("s.tar", write_tar(tmp_path / "a.tar", samples(0, 4)).read_bytes())
    source = open_source("memory://m/s.tar")

    def info(*_, **__):
        raise RuntimeError("credentials have expired")  # as botocore's, no OSError

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", info)
    assert (source.stamps() == -1).all()  # known nothing of, so checked again


def test_list(memory):
    memory("far/1.png", b"1")
    memory("p/2.png", b"2")
    memory("p/list.txt", b"# two\n2.png\nmemory://m/far/1.png\n")
    source = open_source("memory://m/p/list.txt")
    assert names(source) == ["memory://m/p/2.png", "memory://m/far/1.png"]
    assert [source.read(i) for i in range(2)] == [b"2", b"1"]
    assert (source.stamps() == 0).all()
    memory("p/list.txt", b"# nothing")
    with pytest.raises(UserError, match="the list names no file"):
        open_source("memory://m/p/list.txt")


@pytest.mark.parametrize("root", ["memory://m", "memory://m/s-{0..1}.tar"])
def test_tar_shards_are_read_in_ranges(root, memory, tmp_path, cache, monkeypatch):
    for k in range(2):
        memory(f"s-{k}.tar", write_tar(tmp_path / "a.tar", samples(4 * k, 4)).read_bytes())
    source = open_source(root)
    fs = fsspec.filesystem("memory")
    asked, real = [], type(fs).cat_file
    monkeypatch.setattr(type(fs), "cat_file", lambda *a, **k: asked.append(k) or real(*a, **k))
    assert [source.read(i) for i in range(8)] == [b"picture %d" % i for i in range(8)]
    assert all(k["end"] - k["start"] == 9 for k in asked) and len(asked) == 8
    assert source.name(5) == "memory://m/s-1.tar/0005.jpg" and source.classes == ("7", "8", "9")
    monkeypatch.setattr("tarfile.open", None)  # the index is cached
    assert open_source(root).fingerprint() == source.fingerprint()
    assert pickle.loads(pickle.dumps(source)).read(7) == b"picture 7"


def test_a_local_url(tmp_path):
    (tmp_path / "1.png").write_bytes(b"1")
    source = open_source(f"file://{tmp_path}")
    assert source.read(0) == b"1" and source.name(0) == f"file://{tmp_path}/1.png"


def test_a_file_that_goes_away(memory):
    memory("1.png", b"1")
    source = open_source("memory://m")
    fsspec.filesystem("memory").rm("/m/1.png")
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_bad_urls(memory, monkeypatch):
    with pytest.raises(UserError, match=r"nothing://x: Protocol not known.*as s3://bucket/folder"):
        open_source("nothing://x")
    with pytest.raises(UserError, match="memory://nowhere: there is nothing at this URL"):
        open_source("memory://nowhere")
    with pytest.raises(UserError, match=r"memory://m/a.tar: there is no such shard"):
        open_source("memory://m/a.tar")
    memory("a.csv", b"1")
    with pytest.raises(UserError, match=r"no picture in this folder.*1 other files: 1 x \.csv"):
        open_source("memory://m")
    with pytest.raises(UserError, match=r"\.parquet is read from local disks only: copy it"):
        open_source("memory://m/a.parquet")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/x: a package is missing: .*s3fs"):
        open_source("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"memory://m: pip install fsspec"):
        open_source("memory://m")


def test_an_error_of_the_system_is_passed_on(memory, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", refuse)
    with pytest.raises(UserError, match="memory://m: cannot be read: RuntimeError: no credentials"):
        open_source("memory://m")
