"""glibc's malloc, told to keep what a step frees for the next one.

By default it gives every block beyond 32 MiB back to the system, which clears its pages anew at the
next step; step.json has what that costs.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1  # mallopt takes an int
_LARGE = 32 << 20  # where glibc's own thresholds end in a process that frees large blocks


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with this process. Nothing where malloc is not glibc's or the user
    has set it (MALLOC_..., GLIBC_TUNABLES)."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        yield
        return
    try:
        keep()
        yield
    finally:
        give_back()


def keep() -> None:
    _set({_MMAP_THRESHOLD: _MOST, _TRIM_THRESHOLD: _MOST})


def give_back() -> None:
    """malloc as it was, near enough: what is free goes back now, and large blocks from now on. A
    threshold that was set moves no more, so it is set to where it would be."""
    _set({_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 2 * _LARGE})
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for key, value in values.items():
            libc.mallopt(key, value)
