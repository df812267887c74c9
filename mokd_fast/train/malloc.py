"""glibc's malloc, told to keep what a step frees for the next one, and its heap in huge pages.

By default it gives every block beyond 32 MiB back to the system, which clears its pages anew at the
next step; and of pages of 4 KiB, a step's memory has more than a processor can keep the addresses
of. step.json has what both cost.
"""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # asm-generic/mman-common.h
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = 2 << 20
_MOST = 2**31 - 1  # mallopt takes an int
_LARGE = 32 << 20  # where glibc's own thresholds end in a process that frees large blocks


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with this process. Nothing where malloc is not glibc's or the user
    has set it (MALLOC_..., GLIBC_TUNABLES)."""
    if not _ours():
        yield
        return
    try:
        keep()
        yield
    finally:
        give_back()


def huge_pages() -> int:
    """Puts the heap into pages of 2 MiB; to be called when it has grown. The bytes it asked for.

    Linux does it at once from 6.1 on, before that little by little; a page that is not free or a
    kernel without them (transparent_hugepage/enabled is "never") changes nothing. Tensors are not
    moved to where such pages begin, as PyTorch's THP_MEM_ALLOC_ENABLE does: all of them would share
    the same few lines of the caches.
    """
    asked = 0
    with contextlib.suppress(OSError, AttributeError):
        if not _ours() or "[never]" in _TRANSPARENT.read_text():
            return 0
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for line in Path("/proc/self/maps").read_text().splitlines():
            if not (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.*\[heap\]$", line)):
                continue
            first, end = (int(address, 16) for address in found.groups())
            first, end = -(-first // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if end > first:
                asked += end - first
                for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                    madvise(first, end - first, advice)
    return asked


def _ours() -> bool:
    """Whether malloc is glibc's, and the user has not set it."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    return not chosen and "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc"


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
