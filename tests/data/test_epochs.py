"""Epoch after epoch: complete, in order, and without growing."""

import contextlib
import ctypes
import gc
import itertools
import os

import pytest
import torch

from mokd_fast.data.params import epoch_order
from mokd_fast.data.sources import open_source
from tests.data.test_loader import loader

KINDS = pytest.mark.parametrize("kind", ["pillow", "cpu", "dali"])


@KINDS
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("batch", "accumulate", "world"), [(4, 1, 1), (2, 2, 1), (2, 2, 2)])
def test_three_epochs_are_complete(batch, accumulate, world, drop_last, kind, folder):
    """Every picture once, but for the last ones that fill no optimizer step; without drop_last
    every picture, and the first ones again to fill the last step."""
    step = batch * accumulate * world
    micro = (23 // step if drop_last else -(-23 // step)) * accumulate
    runs = []
    for rank in range(world):
        it = loader(
            open_source(folder), loader=kind, batch=batch, accumulate=accumulate, rank=rank,
            world=world, drop_last=drop_last,
        )  # fmt: skip
        assert it.steps_per_epoch == micro
        batches = it.batches()
        runs.append([v.index for v in itertools.islice(batches, 3 * micro)])
        batches.close()
    seen = torch.stack([torch.stack(run) for run in runs], 1).reshape(3, -1)
    for epoch, got in enumerate(seen.tolist()):
        order = epoch_order(23, 7, epoch).tolist()
        assert got == (order + order)[: micro * batch * world]
        assert drop_last or set(got) == set(range(23))


def resources() -> tuple[float, int, int]:
    """MiB of memory that is in use (what malloc only keeps goes back), open files, threads."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    counts = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, *counts


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts what Linux shows")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", ["cpu", "dali"])
def test_twenty_epochs_do_not_grow(kind, workers, folder, make_picture, alarm):
    """Pictures of 0.2 MiB: one kept of each batch would be 22 MiB, one descriptor 100."""
    for i in range(23):
        make_picture(i, (320, 240)).save(folder / f"{i:02d}.png", "JPEG")
    it = loader(open_source(folder), loader=kind, workers=workers)
    batches = it.batches()
    seen = []
    for _ in range(24):
        for views in itertools.islice(batches, it.steps_per_epoch):
            assert views.bad == []
        seen.append(resources())
    batches.close()
    # The first four make all as large as it gets. A batch on its way from the workers, 4 MiB and
    # its descriptors, is in some of four readings; what is kept is in all.
    early, late = (list(zip(*readings, strict=True)) for readings in (seen[4:8], seen[-4:]))
    memory, files, _ = (min(b) - max(a) for a, b in zip(early, late, strict=True))
    assert memory < 5 and files <= 0 and set(early[2]) == set(late[2]), seen


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts what Linux shows")
def test_twenty_loaders_do_not_grow(folder, make_picture):
    """Each ends its pipeline, and one more that a bad picture has ended."""
    make_picture(3, (50, 40)).save(folder / "03.png", "JPEG")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:-100])
    counts = []
    for _ in range(24):
        batches = loader(open_source(folder), loader="dali", batch=23, workers=2).batches()
        assert len(next(batches).bad) == 1
        batches.close()
        counts.append(resources())
    assert counts[-1][0] - counts[3][0] < 5 and counts[-1][1:] == counts[0][1:], counts
