"""One start of the processes after the other in one store, which keeps all that was written."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mokd_fast.train.rendezvous import of_this_start

SHORT = timedelta(seconds=0.2)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store):
    return dist.TCPStore("127.0.0.1", store.port, is_master=False)


def start(store, size):
    """Every process's part of the store."""
    with ThreadPoolExecutor(size) as pool:
        ranks = reversed(range(size))  # the first one comes last
        found = [
            pool.submit(of_this_start, client(store), rank, size, timedelta(seconds=20))
            for rank in ranks
        ]
        return [one.result() for one in found]


def test_each_start_has_its_own_part(store):
    first, second = start(store, 4), start(store, 4)
    for starts in (first, second):
        starts[0].set("address", "here")
        assert all(one.get("address") == b"here" for one in starts)
        starts[0].delete_key("address")
    first[0].set("address", "of the dead")
    assert not second[3].check(["address"])


@pytest.mark.parametrize("size", [2, 3])
def test_a_start_that_nobody_ended(store, size):
    """Some had asked, and process 0 had answered; none of it counts for the next start."""
    with pytest.raises(TimeoutError, match="process 0 did not start"):
        of_this_start(client(store), 1, size, SHORT)  # left its question
    if size == 3:
        with pytest.raises(TimeoutError, match=r"processes \[1, 2\] did not start within"):
            of_this_start(client(store), 0, size, SHORT)  # answered the dead
    starts = start(store, size)
    starts[0].set("address", "here")
    assert all(one.get("address") == b"here" for one in starts)
