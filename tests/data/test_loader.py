import dataclasses
import itertools
import logging
import os
import random
import signal
import sys
import traceback

import numpy as np
import pytest
import torch

from mokd_fast.data.batches import Views
from mokd_fast.data.loader import ViewLoader, choose_loader, normalize
from mokd_fast.data.params import AugmentConfig, draw_views, epoch_order
from mokd_fast.data.pillow import decode, render
from mokd_fast.data.sources import FileSource, open_source
from mokd_fast.errors import UserError

KINDS = pytest.mark.parametrize("kind", ["pillow", "cpu", "dali"])
AUGMENT = AugmentConfig(global_size=(10, 12), local_size=6, locals=3)


def loader(source, **changes) -> ViewLoader:
    options = {"batch": 4, "channels": 3, "seed": 7, "workers": 0, **changes}
    return ViewLoader(source, options.pop("augment", AUGMENT), **options)


def take(loader: ViewLoader, n: int, start: int = 0) -> list[Views]:
    batches = loader.batches(start)
    return list(itertools.islice(batches, n))


def assert_same(a: list[Views], b: list[Views]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.bad == y.bad
        for field, s in x._asdict().items():
            t = getattr(y, field)
            assert s is t or field == "bad" or torch.equal(s, t), field


def test_shapes_and_contents(folder):
    """A batch is what the parts give: order, numbers, decoder and renderer."""
    source = open_source(folder)
    (views,) = take(loader(source, channels=1), 1, start=6)
    order = epoch_order(23, 7, 1)[4:8]
    assert views.globals.shape == (2, 4, 10, 12, 1) and views.locals.shape == (3, 4, 6, 6, 1)
    assert views.globals.dtype == views.locals.dtype == torch.uint8
    assert views.index.dtype == torch.int64 and views.index.tolist() == order.tolist()
    assert views.bad == []
    for b, i in enumerate(order.tolist()):
        image = decode(source.read(i), 1)
        want = render(image, draw_views(AUGMENT, 7, 1, i, image.height, image.width), AUGMENT)
        for v in range(5):
            got = views.globals[v, b] if v < 2 else views.locals[v - 2, b]
            np.testing.assert_array_equal(got.numpy(), want[v])


def test_no_local_views(folder):
    source = open_source(folder)
    for workers in (0, 1):
        (views,) = take(loader(source, augment=AugmentConfig(locals=0), workers=workers), 1)
        assert views.locals is None and views.globals.shape == (2, 4, 224, 224, 3)


@KINDS
def test_each_epoch_is_a_permutation_cut_to_whole_steps(folder, kind):
    it = loader(open_source(folder), loader=kind)
    assert it.steps_per_epoch == 5  # 23 // 4
    epochs = torch.cat([v.index for v in take(it, 15)]).reshape(3, 20)
    for e, indices in enumerate(epochs.tolist()):
        assert indices == epoch_order(23, 7, e)[:20].tolist()
        assert len(set(indices)) == 20
    assert len({tuple(e) for e in epochs.tolist()}) == 3


@KINDS
def test_an_optimizer_step_does_not_cross_epochs(folder, kind):
    it = loader(open_source(folder), loader=kind, accumulate=2)
    assert it.steps_per_epoch == 4  # 23 // 8 * 2
    assert take(it, 5)[4].index.tolist() == epoch_order(23, 7, 1)[:4].tolist()


@KINDS
def test_batch_size_changes_no_picture(folder, kind):
    source = open_source(folder)
    small = take(loader(source, loader=kind, batch=2), 4)
    (large,) = take(loader(source, loader=kind, batch=8), 1)
    assert torch.equal(torch.cat([v.globals for v in small], 1), large.globals)
    assert torch.equal(torch.cat([v.index for v in small]), large.index)


@KINDS
def test_two_processes_see_what_one_would(folder, kind):
    source = open_source(folder)
    one = take(loader(source, loader=kind, batch=8), 5)
    ranks = [loader(source, loader=kind, batch=4, rank=r, world=2) for r in range(2)]
    assert ranks[0].steps_per_epoch == loader(source, loader=kind, batch=8).steps_per_epoch == 2
    for whole, *parts in zip(one, *(take(r, 5) for r in ranks), strict=True):
        for field in ("globals", "locals"):
            assert torch.equal(
                torch.cat([getattr(p, field) for p in parts], 1), getattr(whole, field)
            )
        assert torch.equal(torch.cat([p.index for p in parts]), whole.index)


@KINDS
def test_workers_change_no_bit(folder, alarm, kind):
    (folder / "05.png").write_bytes(b"broken")
    source = open_source(folder)
    runs = [take(loader(source, loader=kind, workers=w), 11) for w in (0, 1, 2)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@KINDS
def test_resume_from_any_step(folder, kind):
    it = loader(open_source(folder), loader=kind)
    whole = take(it, 13)
    for start in range(12):
        assert_same(take(it, 2, start), whole[start : start + 2])


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_span_of_steps_ends(workers, kind, folder, alarm):
    source = open_source(folder)
    it = loader(source, workers=workers, loader=kind)
    assert_same(list(it.batches(3, 6)), take(loader(source, loader=kind), 3, start=3))
    assert list(it.batches(3, 3)) == []


def test_the_seed_changes_order_and_views(folder):
    source = open_source(folder)
    a, b = (take(loader(source, seed=s, batch=23), 1)[0] for s in (0, 1))
    assert a.index.tolist() != b.index.tolist()
    assert not torch.equal(a.globals[:, a.index.argsort()], b.globals[:, b.index.argsort()])


@KINDS
def test_the_global_generators_are_left_alone(folder, alarm, kind):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for workers in (0, 2):
        take(loader(open_source(folder), loader=kind, workers=workers), 7)
    assert states() == before


@KINDS
def test_workers_may_be_forked_after_torch_has_run_threads(folder, alarm, kind):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(300, 300, requires_grad=True)
        (x @ x).exp().sum().backward()
        first, second = (
            loader(open_source(folder), loader=kind, workers=2),
            loader(open_source(folder), loader=kind),
        )
        batches = first.batches()
        got = []
        for _ in range(6):  # training goes on between the batches
            got.append(next(batches))
            normalize(got[-1].globals, (0.5,) * 3, (0.2,) * 3) @ torch.randn(12, 12)
        assert_same(got, take(second, 6))
    finally:
        torch.set_num_threads(threads)


BAD = {
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"this is no picture",
    "empty": lambda data: b"",
    "gone": None,
}


@KINDS
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", BAD)
def test_a_bad_file_is_named_and_replaced_by_the_next(damage, workers, kind, folder, caplog, alarm):
    source = open_source(folder)
    order = epoch_order(23, 7, 0).tolist()
    good = take(loader(source, loader=kind), 5)
    bad = order[2]
    path = folder / f"{bad:02d}.png"
    if BAD[damage]:
        path.write_bytes(BAD[damage](path.read_bytes()))
    else:
        path.unlink()
    it = loader(source, loader=kind, workers=workers)
    with caplog.at_level(logging.WARNING, "mokd_fast"):
        got = take(it, 15)
    assert got[0].index.tolist() == [order[0], order[1], order[3], order[3]]
    assert torch.equal(got[0].globals[:, 2], got[0].globals[:, 3])  # by its own numbers
    assert torch.equal(got[0].globals[:, :2], good[0].globals[:, :2])
    assert_same(got[1:5], good[1:5])
    ((index, name, reason),) = got[0].bad
    assert (index, name) == (bad, str(path))
    expected = {"truncated": "", "text": "not a picture", "empty": "empty file", "gone": "No such"}
    assert expected[damage] in reason
    assert it.bad_files == {str(path): reason}
    assert [r.getMessage() for r in caplog.records] == [f"skipped {path}: {reason}"]  # once


@KINDS
def test_the_last_of_an_epoch_is_replaced_by_its_first(folder, kind):
    source = open_source(folder)
    order = epoch_order(23, 7, 0).tolist()
    (folder / f"{order[22]:02d}.png").write_bytes(b"")
    (views,) = take(loader(source, loader=kind, batch=23), 1)
    assert views.index.tolist() == [*order[:22], order[0]]


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable(workers, kind, folder, alarm):
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        take(loader(open_source(folder), loader=kind, workers=workers), 1)
    first = folder / f"{epoch_order(23, 7, 0)[0]:02d}.png"
    assert str(error.value) == (
        f"23 pictures in a row cannot be read, the first: {first}: OSError: not a picture that "
        "Pillow can read, begins b'no pictu'. There are 23 pictures in all; check the folder and "
        "its permissions"
    )


def test_a_hundred_bad_ones_in_a_row_are_enough(tmp_path):
    source = FileSource(tmp_path, [f"{i}.png" for i in range(1000)])
    with pytest.raises(UserError, match=r"^100 pictures in a row .* There are 1000 pictures"):
        take(loader(source), 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(folder):
    (folder / "03.png").chmod(0)
    it = loader(open_source(folder), batch=23)
    take(it, 1)
    assert "Permission denied" in it.bad_files[str(folder / "03.png")]


@dataclasses.dataclass
class Wrapped:
    """A source that does something on reading picture 3."""

    inner: FileSource
    act: object

    def __len__(self):
        return len(self.inner)

    def read(self, i):
        if i == 3:
            self.act()
        return self.inner.read(i)

    def name(self, i):
        return self.inner.name(i)


def complain():
    raise UserError("mount the disk first")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@KINDS
@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_the_source_arrives_as_it_is(workers, kind, folder, alarm):
    it = loader(Wrapped(open_source(folder), complain), loader=kind, workers=workers, batch=23)
    with pytest.raises(UserError, match=r"^mount the disk first$"):
        take(it, 1)


def test_a_dead_worker(folder, alarm):
    it = loader(Wrapped(open_source(folder), die), workers=1, batch=23)
    with pytest.raises(UserError, match=r"a loader worker died .* smaller data\.workers"):
        take(it, 1)


def test_a_bug_keeps_its_traceback(folder, alarm, monkeypatch):
    def bug(*_):
        raise RuntimeError("a bug in drawing")

    monkeypatch.setattr("mokd_fast.data.batches.draw_views", bug)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug in drawing") as error:
            take(loader(open_source(folder), workers=workers), 1)
        assert not isinstance(error.value, UserError)
        traceback.clear_frames(error.tb)  # else the worker lives on until the garbage collector


def test_too_few_pictures(folder):
    source = open_source(folder)
    with pytest.raises(UserError) as error:
        loader(source, batch=24)
    assert str(error.value) == (
        "a batch of 24 does not fit a data set of 23 pictures: "
        "set train.batch to 23 or less, or add pictures"
    )
    message = "a batch of 12 on each of 2 processes does not .* set train.batch to 11 or less"
    with pytest.raises(UserError, match=message):
        loader(source, batch=6, accumulate=2, world=2)
    assert loader(source, batch=23).steps_per_epoch == 1


def test_channels(folder):
    with pytest.raises(UserError, match="channels must be 1 or 3, got 4"):
        loader(open_source(folder), channels=4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize(channels, channels_last):
    x = torch.arange(2 * 3 * 4 * 6 * channels, dtype=torch.uint8).reshape(2, 3, 4, 6, channels)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    m, s = (torch.tensor(t, dtype=torch.float64) for t in (mean, std))
    want = ((x.double() / 255 - m) / s).movedim(-1, -3)
    before = x.clone()
    got = normalize(x, mean, list(std), channels_last=channels_last)
    assert got.shape == (2, 3, channels, 4, 6) and got.dtype == torch.float32
    assert (got.double() - want).abs().max() < 1e-6 and torch.equal(x, before)
    floats = x.float()  # in place would be wrong here
    assert torch.equal(normalize(floats, mean, std), got) and torch.equal(floats, x.float())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert got.flatten(0, 1).is_contiguous(memory_format=layout)
    half = normalize(x, mean, std, dtype=torch.bfloat16)
    assert torch.equal(half, got.to(torch.bfloat16))


def test_normalize_needs_a_number_for_each_channel():
    message = "mean has 3 and std 1 numbers, the views 1 channels"
    with pytest.raises(UserError, match=message):
        normalize(torch.zeros(2, 2, 1, dtype=torch.uint8), (0.5,) * 3, (0.2,))


def test_where_nothing_of_nvidia_is_installed(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    chosen, lines = choose_loader("auto")
    assert chosen == "cpu" and "dali: NVIDIA DALI is not installed" in lines
    with pytest.raises(UserError, match=r"data\.loader=dali: NVIDIA DALI is not installed: pip"):
        loader(open_source(folder), loader="dali")


def test_without_the_native_module_pillow_is_faster(monkeypatch):
    monkeypatch.setattr("mokd_fast.ops.cpu.native", None)
    chosen, lines = choose_loader("auto")
    assert chosen == "pillow" and "cpu: can run too, but augment_crops is slow without" in lines
    assert choose_loader("auto", "cuda")[0] == "cpu" == choose_loader("cpu")[0]
