"""What is DALI's alone: its threads, its prefetching, its failures, its graph for a GPU."""

import gc
import itertools
import logging
import os
import signal

import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from mokd_fast.data import dali
from mokd_fast.data.loader import ViewLoader
from mokd_fast.data.params import epoch_order
from mokd_fast.data.sources import open_source
from mokd_fast.errors import UserError
from tests.data.test_loader import AUGMENT, Wrapped, assert_same, complain, loader

ORDER = epoch_order(23, 7, 0).tolist()
BAD = (ORDER[2], ORDER[9])  # in the first and the third batch of 4


def make(source, **changes) -> ViewLoader:
    return loader(source, **{"loader": "dali", "workers": 1, **changes})


def take(it: ViewLoader, n: int, start: int = 0) -> list:
    batches = it.batches(start)
    got = list(itertools.islice(batches, n))
    batches.close()
    return got


def cut(path, picture) -> None:
    """Writes a JPEG that is cut off."""
    picture.save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def source(folder, make_picture):
    """Pictures of several formats; two are cut off, which only DALI finds, and late."""
    for i, (kind, mode) in enumerate([("JPEG", "RGB"), ("JPEG", "CMYK"), ("TIFF", "L")] * 5):
        make_picture(i, (40 + i, 33), mode).save(folder / f"{i:02d}.png", kind)
    for i in BAD:
        cut(folder / f"{i:02d}.png", make_picture(i, (50, 40)))
    return open_source(folder)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_and_prefetching_change_no_bit(source, monkeypatch, alarm):
    want = take(make(source), 12)
    assert [len(v.bad) for v in want[:5]] == [1, 0, 1, 0, 0]
    for threads in (2, 4):
        assert_same(take(make(source, workers=threads), 12), want)
    for depth in (1, 3, 4):
        monkeypatch.setattr(dali, "_PREFETCH", depth)
        assert_same(take(make(source, workers=2), 12), want)


def test_the_world_changes_no_bit(source, alarm):
    """4 x 2, 2 x 4 and 1 x 8 pictures: the same in the same order."""
    runs = []
    for world in (1, 2, 4):
        ranks = [take(make(source, batch=8 // world, rank=r, world=world), 4) for r in range(world)]
        runs.append([
            [torch.cat([getattr(p, f) for p in parts], dim)
             for f, dim in (("globals", 1), ("locals", 1), ("index", 0), ("global_params", 1))]
            for parts in zip(*ranks, strict=True)
        ])  # fmt: skip
    for steps in runs[1:]:
        for got, want in zip(steps, runs[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_resume_beside_bad_files(source, alarm):
    whole = take(make(source), 9)
    for start in range(7):
        assert_same(take(make(source), 2, start), whole[start : start + 2])


@pytest.mark.parametrize("refused", [(0,), (2,), (1, 2, 3)])
def test_a_picture_that_only_dali_refuses(refused, folder, monkeypatch, caplog, alarm):
    """Its batch comes from the cpu loader; no other batch is lost or changed."""
    source = open_source(folder)
    want, cpu = take(make(source), 8), take(make(source, loader="cpu"), 4)
    for step in refused:
        want[step] = cpu[step]
    arrays = dali._arrays

    def refuse(files):
        pictures, boxes = arrays(files)
        if files.step in refused:
            pictures[1] = pictures[1][:20]
        return [pictures, boxes]

    monkeypatch.setattr(dali, "_arrays", refuse)
    for depth in (1, 2, 4):
        monkeypatch.setattr(dali, "_PREFETCH", depth)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mokd_fast"):
            assert_same(take(make(source), 8), want)
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == len(refused)
        assert all("the cpu loader took them" in s and "decoders.image" in s for s in said)
        for step, text in zip(refused, said, strict=True):
            assert all(source.name(i) in text for i in want[step].index.tolist())


@pytest.mark.parametrize("bad", [None, 2, 6, 10])
def test_an_error_comes_after_the_batches_before_it(bad, folder, make_picture, monkeypatch, alarm):
    """Also when the pipeline had to be made anew after it was met."""
    good = take(make(open_source(folder)), 3)
    if bad is not None:
        cut(folder / f"{ORDER[bad]:02d}.png", make_picture(bad, (50, 40)))

    class Late(Wrapped):
        def read(self, i):
            if i == ORDER[13]:  # in batch 3, asked for while batch 0 or 1 is on its way
                self.act()
            return self.inner.read(i)

    for depth in (1, 2, 4):
        monkeypatch.setattr(dali, "_PREFETCH", depth)
        batches = make(Late(open_source(folder), complain)).batches()
        for step in range(3):
            views = next(batches)
            if bad is None or bad // 4 != step:
                assert_same([views], good[step : step + 1])
        with pytest.raises(UserError, match=r"^mount the disk first$"):
            next(batches)


def test_files_of_worker_processes_are_the_same(source, alarm):
    """They read for a GPU only, whose pipeline cannot run here, but the files can be compared."""
    made = []
    for device, workers in (("cpu", 2), ("cuda", 1), ("cuda", 2)):
        it = make(source, workers=workers, device=device)
        made.append(list(it._made(0, 6)))
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            assert a.step == b.step and torch.equal(a.data, b.data)
            assert torch.equal(a.ends, b.ends) and torch.equal(a.boxes, b.boxes)
            assert torch.equal(a.views.global_params, b.views.global_params)


def test_a_loader_that_is_left_early_leaves_no_thread(source, alarm):
    before = tasks()
    batches = make(source, workers=4).batches()
    next(batches)
    assert tasks() > before + 4
    batches.close()
    assert tasks() == before
    batches = make(source).batches()
    next(batches)
    del batches  # as a function that returns in the middle
    assert tasks() == before
    with pytest.raises(UserError):
        list(make(Wrapped(source, complain)).batches())
    gc.collect()
    assert tasks() == before


def test_a_fork_does_not_wait_for_threads_that_it_does_not_have(source, alarm):
    want = take(make(source, workers=2), 6)
    batches = make(source, workers=2).batches()
    got = list(itertools.islice(batches, 3))
    if (child := os.fork()) == 0:  # as a DataLoader's worker, in which the loader is garbage
        signal.alarm(10)  # which kills it
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        del batches
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "it hung"
    got += itertools.islice(batches, 3)
    batches.close()
    assert_same(got, want)


GPU = {"batch_size": 4, "num_threads": 1, "device_id": 0, "prefetch_queue_depth": 2}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_for_a_gpu_is_built(channels):
    """No GPU is needed for what DALI says of devices: decoded with both, cropped on the GPU."""
    sizes = [AUGMENT.size_of(v) for v in range(5)]
    pipe = dali.graph(lambda: [], sizes, channels, True, **GPU)
    pipe._build_graph()
    devices = {}
    for op in pipe._ops:
        kind = op.name.strip("_").rsplit("_", 1)[0]
        devices.setdefault(kind, []).append(op.outputs[0].device)
    assert devices == {
        "ExternalSource": ["cpu"] * 2,
        "TensorSubscript": ["cpu"] * 10,  # an argument must be there
        "Image": ["gpu"],
        "Slice": ["gpu"] * 5,
        "Resize": ["gpu"] * 5,
    }


def test_the_check_of_the_graph_sees_a_wrong_device():
    @pipeline_def(enable_conditionals=False)
    def wrong():
        data, boxes = fn.external_source(source=lambda: [], num_outputs=2, dtype=[types.UINT8] * 2)
        images = fn.decoders.image(data, device="mixed")
        return fn.slice(images, start=boxes.gpu(), shape=boxes, axes=[0, 1])

    with pytest.raises(Exception, match="gpu"):
        wrong(**GPU)._build_graph()
