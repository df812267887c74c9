"""The processes of one start find each other in a store that outlives it.

torchrun keeps its store over its restarts, and with it the addresses of processes that are dead.
Its restart count tells the starts of one machine apart, and of several it does not: the machine
that lost a process counts, the others see that one came back, and do not.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of the store that the `size` processes of this start have to themselves.

    Process 0 gives it a name. The others ask under a word that nobody used before, so whoever gets
    an answer has it from a process 0 that is alive and not from one before it. Raises TimeoutError.
    """
    name = _answered(store, rank, timeout) if rank else _answer(store, size, timeout)
    return dist.PrefixStore(name, store)


def _answered(store: dist.Store, rank: int, timeout: timedelta) -> str:
    word = uuid.uuid4().hex
    store.set(f"question {rank}", word)
    try:
        store.wait([f"answer {word}"], timeout)
    except dist.DistStoreError as error:
        raise TimeoutError(f"process 0 did not start within {timeout}") from error
    name = store.get(f"answer {word}").decode()
    store.set(f"{name} {rank}", "heard")
    return name


def _answer(store: dist.Store, size: int, timeout: timedelta) -> str:
    """Until all have heard it: a question may be of a process that is dead, and asked again."""
    name, waiting = uuid.uuid4().hex, set(range(1, size))
    end = time.monotonic() + timeout.total_seconds()
    while waiting := {rank for rank in waiting if not store.check([f"{name} {rank}"])}:
        if time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(waiting)} did not start within {timeout}")
        for rank in waiting:
            if store.check([f"question {rank}"]):
                store.set(f"answer {store.get(f'question {rank}').decode()}", name)
        time.sleep(0.02)
    return name
