import json
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from mokd_fast.data import parquet  # noqa: E402
from mokd_fast.data.sources import open_source  # noqa: E402
from mokd_fast.errors import UserError  # noqa: E402

DATA = [b"picture %d" % i * (1 + i % 4) for i in range(300)]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
}


def hub(rows, first=0, **more):
    """A table as Hugging Face writes it: struct<bytes, path>, a ClassLabel, their description."""
    images = [{"bytes": DATA[i], "path": f"{i}.png"} for i in range(first, first + rows)]
    labels = [i % 2 for i in range(first, first + rows)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels), **more})
    described = json.dumps({"info": {"features": FEATURES}})
    return table.replace_schema_metadata({"huggingface": described})


def stream(table, path, **options):
    """An Arrow file as `save_to_disk` writes it, in batches of 7 rows."""
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, **options) as out,
    ):
        for batch in table.to_batches(7):
            out.write_batch(batch)


def contents(source):
    return [source.read(i) for i in range(len(source))]


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet(compression, tmp_path, cache):
    """Row groups, several files, dictionary pages (repeated pictures) and plain ones."""
    for k in range(3):
        path = tmp_path / "data" / f"train-{k:05d}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(hub(100, 100 * k), path, row_group_size=33, compression=compression)
    (tmp_path / "README.md").write_text("of the hub")
    source = open_source(tmp_path)
    assert contents(source) == DATA
    assert source.classes == ("cat", "dog") and [source.label(i) for i in (0, 1, 299)] == [0, 1, 1]
    assert source.name(201) == f"{tmp_path}/data/train-00002-of-00003.parquet#1"
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == DATA and copy.fingerprint() == source.fingerprint()


def test_the_copy_is_made_once_and_again_for_a_changed_file(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(hub(20), path)
    calls, real = [], parquet._copy
    monkeypatch.setattr(parquet, "_copy", lambda *a: calls.append(1) or real(*a))
    for _ in range(2):
        source = open_source(path)
        assert contents(source) == DATA[:20] and source.label(1) == 1
    assert len(calls) == 1
    next(cache.rglob("*.bin")).write_bytes(b"cut")
    assert contents(open_source(path)) == DATA[:20] and len(calls) == 2
    pq.write_table(hub(20, 5), path)
    assert contents(open_source(path)) == DATA[5:25] and len(calls) == 3
    assert [p.name[0] for p in cache.rglob("*.*")].count(".") == 0, "nothing temporary is left"


def test_processes_that_start_at_once_make_one_copy(tmp_path, cache, monkeypatch):
    path, calls, real = tmp_path / "a.parquet", [], parquet._copy
    pq.write_table(hub(20), path)

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(parquet, "_copy", slow)
    with ThreadPoolExecutor(3) as pool:  # an flock keeps descriptors apart, of one process too
        sources = list(pool.map(open_source, [path] * 3))
    assert len(calls) == 1 and all(contents(source) == DATA[:20] for source in sources)


@pytest.mark.parametrize("write", ["stream", "file", "large"])
def test_arrow_files_are_read_where_they_lie(write, tmp_path, cache):
    for k in range(3):
        table = hub(100, 100 * k)
        path = tmp_path / f"data-{k:05d}-of-00003.arrow"
        if write == "file":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table, max_chunksize=9)
        else:
            if write == "large":
                kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
                table = table.set_column(0, "image", table["image"].cast(kind))
            stream(table, path)
    files = [{"filename": f"data-{k:05d}-of-00003.arrow"} for k in (1, 0, 2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    source = open_source(tmp_path)
    assert contents(source) == DATA[100:200] + DATA[:100] + DATA[200:]
    assert source.classes == ("cat", "dog") and source.label(3) == 1
    assert source.name(0) == f"{tmp_path}/data-00001-of-00003.arrow#0"
    assert not cache.exists(), "no copy"


def test_nulls_are_bad_pictures(tmp_path, cache):
    rows = [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": "a.png"}]
    table = pa.table(
        {"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    stream(table, tmp_path / "a.arrow")
    for name in ("a.parquet", "a.arrow"):
        source = open_source(tmp_path / name)
        assert source.read(0) == b"x"
        for i in (1, 2):
            with pytest.raises(OSError, match="no bytes for this picture"):
                source.read(i)


def test_a_plain_binary_column_and_integer_labels(tmp_path, cache):
    table = pa.table({"jpg": DATA[:6], "id": range(6), "label": [9, 7, 9, 7, 8, 7]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert contents(source) == DATA[:6] and source.classes == ("7", "8", "9")
    assert [source.label(i) for i in range(6)] == [2, 0, 2, 0, 1, 0]
    table = pa.table({"jpg": DATA[:6], "label": [-1] * 6})  # as test sets without labels have it
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").classes == ()


@pytest.mark.parametrize("said", ["{broken", "[]", '{"info": null}', '{"info": {"features": [1]}}'])
def test_a_description_that_says_nothing(said, tmp_path, cache):
    pq.write_table(hub(3).replace_schema_metadata({"huggingface": said}), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert source.classes == ("0", "1") and contents(source) == DATA[:3]


def test_which_column(tmp_path, cache):
    table = hub(5, thumb=[b"t%d" % i for i in range(5)])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"several columns could be .*append one of #image, #thumb"):
        open_source(tmp_path / "a.parquet")
    assert open_source(f"{tmp_path}/a.parquet#thumb").read(3) == b"t3"
    assert open_source(f"{tmp_path}#image").read(3) == DATA[3]
    with pytest.raises(UserError, match=r"no picture column 'label'; its columns: image \(struct<"):
        open_source(f"{tmp_path}/a.parquet#label")
    pq.write_table(table.select(["label"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no picture column: expected .* found label \(int64\)"):
        open_source(tmp_path / "a.parquet")


def test_splits_are_not_mixed(tmp_path, cache):
    for split in ("test", "train"):
        folder = tmp_path / "hub" / "default" / split
        folder.mkdir(parents=True)
        pq.write_table(hub(5), folder / "0000.parquet")
        (tmp_path / "saved" / split).mkdir(parents=True)
        (tmp_path / "saved" / split / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=r"splits test, train: give one, as .*hub/default/train$"):
        open_source(tmp_path / "hub")
    assert len(open_source(tmp_path / "hub/default/train")) == 5
    with pytest.raises(UserError, match=r"holds the splits test, train: give one, .*saved/SPLIT"):
        open_source(tmp_path / "saved")


def test_what_cannot_be_read(tmp_path, cache):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet: cannot read this table: .*[Pp]arquet"):
        open_source(path)
    pq.write_table(hub(20), path)
    whole = bytearray(path.read_bytes())
    whole[4:400] = b"\xff" * 396  # the pages, not the footer
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.parquet: cannot read this table"):
        open_source(path)
    pq.write_table(hub(0), path)
    with pytest.raises(UserError, match="the table has no row"):
        open_source(path)
    stream(hub(20), tmp_path / "a.arrow", options=pa.ipc.IpcWriteOptions(compression="lz4"))
    with pytest.raises(UserError, match=r"a\.arrow: its buffers are compressed"):
        open_source(tmp_path / "a.arrow")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:900])
    with pytest.raises(UserError, match=r"b\.arrow: cannot read this table"):
        open_source(tmp_path / "b.arrow")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json: not as datasets\.save_to_disk writes it"):
        open_source(tmp_path)


def test_no_room_for_the_copy(tmp_path, cache, monkeypatch):
    pq.write_table(hub(20), tmp_path / "a.parquet")
    cache.write_text("a file where a folder is needed")
    with pytest.raises(UserError, match=r"cannot copy its pictures to .*Set MOKD_FAST_CACHE to"):
        open_source(tmp_path / "a.parquet")
    cache.unlink()
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"it needs 0\.0 GB and 0\.0 GB are free"):
        open_source(tmp_path / "a.parquet")


def test_without_pyarrow(tmp_path, cache, monkeypatch):
    pq.write_table(hub(5), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'mokd_fast\[parquet\]'"):
        open_source(tmp_path / "a.parquet")


def test_large_pictures(tmp_path, cache):
    """Over the size of a page and of a dictionary, incompressible as JPEGs are."""
    rng = np.random.default_rng(0)
    data = [rng.bytes(n) for n in (100_000, 3_000_000, 0, 1, 1_500_000)]
    pq.write_table(pa.table({"jpg": data}), tmp_path / "a.parquet")
    assert contents(open_source(tmp_path / "a.parquet")) == data
