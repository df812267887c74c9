"""The same pictures through every source, what happens to them in the middle of a run, and what a
long run leaves open."""

import contextlib
import itertools
import logging
import multiprocessing
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from mokd_fast.data.loader import ViewLoader
from mokd_fast.data.params import AugmentConfig
from mokd_fast.data.sources import open_source
from tests.data.test_tar import write_tar

pytestmark = pytest.mark.usefixtures("cache")
AUGMENT = AugmentConfig(global_size=(10, 12), local_size=6, locals=2)
KINDS = ["folder", "list", "tar", "parquet", "arrow", "npz", "npz deflated", "memory", "memory tar"]


def made(kind, folder):
    """The pictures of `folder` as another kind of source: its root."""
    files = sorted(folder.glob("*.png"))
    data = [file.read_bytes() for file in files]
    out = folder.parent / "out"
    out.mkdir()
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    members = [(file.name, x) for file, x in zip(files, data, strict=True)]
    if kind == "list":
        (out / "list.txt").write_text("\n".join(map(str, files)))
        return out / "list.txt"
    if "tar" in kind:
        for k in range(2):
            path = write_tar(out / f"{k}.tar", members[12 * k : 12 * (k + 1)])
            if kind != "tar":
                fsspec.filesystem("memory").pipe_file(f"/e/{k}.tar", path.read_bytes())
    if kind in ("parquet", "arrow"):
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"image": [{"bytes": x, "path": None} for x in data]})
        import pyarrow.parquet as pq

        if kind == "parquet":
            pq.write_table(table, out / "a.parquet", row_group_size=5)
        else:
            with pa.ipc.new_stream(str(out / "a.arrow"), table.schema) as stream:
                stream.write_table(table, max_chunksize=4)
    if "npz" in kind:
        (np.savez if kind == "npz" else np.savez_compressed)(out / "a.npz", images=pixels)
        return out / "a.npz"
    if kind == "memory":
        for name, x in members:
            fsspec.filesystem("memory").pipe_file(f"/e/{name}", x)
    return folder if kind == "folder" else "memory://e" if "memory" in kind else out


@pytest.fixture
def root(request, folder):
    fs = fsspec.filesystem("memory")
    yield made(request.param, folder)
    fs.store.clear()


def batches(source, **options):
    options = {"batch": 4, "channels": 3, "seed": 7, "workers": 0, **options}
    return ViewLoader(source, AUGMENT, **options).batches()


@pytest.mark.parametrize("root", KINDS, indirect=True)
def test_the_same_views_from_everywhere(root, folder, alarm):
    """workers: what is opened before a fork, and what a worker opens itself, reads the same."""
    want = list(itertools.islice(batches(open_source(folder)), 6))
    source = open_source(root)
    source.read(3)
    for workers in (0, 2):
        for x, y in zip(want, batches(source, workers=workers), strict=False):
            assert all(torch.equal(s, t) for s, t in zip(x[:3], y[:3], strict=True))
            assert y.bad == []


@pytest.mark.parametrize("root", ["folder", "tar", "arrow", "npz", "memory"], indirect=True)
def test_pictures_that_go_away_in_the_middle_of_a_run(root, caplog):
    """The second half of them: each is named once and replaced, and the run goes on."""
    source = open_source(root)
    run = batches(source)
    next(run)
    gone = range(12, 23)
    if os.path.isdir(root) and (tar := root / "1.tar").exists():
        tar.write_bytes(b"\x07" * tar.stat().st_size)
    elif "memory" in str(root):
        for i in gone:
            fsspec.filesystem("memory").rm(source.name(i))
    elif (path := root / "a.arrow").exists() or (path := root).is_file():
        os.truncate(path, int(source._spans.start[12]) + 3)
    else:
        for i in gone:
            os.unlink(source.name(i))
    with caplog.at_level(logging.WARNING):
        later = list(itertools.islice(run, 25))
    assert {i for views in later[1:] for i in views.index.tolist()} == set(range(12))
    said = sorted(r.getMessage().split(": ")[0] for r in caplog.records)
    assert said == sorted(f"skipped {source.name(i)}" for i in gone)


def state(pid="self"):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("root", KINDS, indirect=True)
def test_memory_and_descriptors_are_flat_over_20_epochs(root):
    run = batches(open_source(root))
    for _ in range(3 * 5):  # 5 batches an epoch
        next(run)
    grown = []
    for _ in range(3):  # a leak grows every time, what malloc keeps of other tests' memory once
        descriptors, memory = state()
        for _ in range(20 * 5):
            next(run)
        after = state()
        assert after[0] <= descriptors
        grown.append(after[1] - memory)
        if grown[-1] < 2**20:
            break
    assert min(grown) < 2**20, grown


@pytest.mark.parametrize("root", ["tar"], indirect=True)
def test_a_worker_is_flat_too(root, alarm):
    """Of its descriptors those of data: batches on their way are descriptors as well."""
    others = {child.pid for child in multiprocessing.active_children()}  # of a test that broke off
    run = batches(open_source(root), workers=1)
    for _ in range(3 * 5):
        next(run)
    (worker,) = (one for one in multiprocessing.active_children() if one.pid not in others)
    _, memory = state(worker.pid)
    for _ in range(20 * 5):
        next(run)
    opened = []
    for link in Path(f"/proc/{worker.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a batch that arrived meanwhile
            opened.append(os.readlink(link))
    _, after = state(worker.pid)
    run.close()
    assert sorted(f for f in opened if f.startswith(str(root))) == [
        f"{root}/{k}.tar" for k in (0, 1)
    ]
    assert after - memory < 2**20
