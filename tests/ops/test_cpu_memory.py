"""Where the CPU kernels read and write: gradients of any alignment, nothing outside of the rows."""

import ctypes
import mmap

import pytest
import torch

from mokd_fast.ops import cpu, cross_view_pairs, matched_pairs

from .conftest import levels

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
V, B = 4, 2
PAIRS = [w for row in cross_view_pairs(2, V) + matched_pairs(V, 2) for w in row]
WIDTHS = [1, 31, 33, 63, 2047, 2049, 2079, 8193, 8223, 9001]  # blocks of 2048, tiles of 8192
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=levels(), autouse=True)
def level(request, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return request.param


def gradient(student, common, matched, into):
    """DINO and search, forward and backward; the gradient goes to `into`, as large as `student`."""
    none = torch.empty(0)
    scalars = torch.tensor([0.1, 0.05, 0.07, 1.0, 0.5])  # temperatures and weights
    rest = [common, matched], [none] * 2, [none] * 2, scalars, PAIRS, [False] * 2
    call, _alive = cpu.native_call(student, *rest)
    loss, terms, stats = cpu.results(student, [common, matched])
    call.forward(stats.data_ptr(), terms.data_ptr(), loss.data_ptr(), cpu._level())
    one = torch.ones((), dtype=stats.dtype)
    call.backward(stats.data_ptr(), one.data_ptr(), into.data_ptr(), cpu._level())
    assert into.isfinite().all()
    return into


def rows(k, dtype):
    torch.manual_seed(k)
    return [(torch.randn(n, B, k) * 3).to(dtype) for n in (V, 2, V - 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_bits_do_not_depend_on_addresses_and_nothing_else_is_written(k, dtype):
    student, common, matched = rows(k, dtype)
    expected = gradient(student, common, matched, torch.empty_like(student))
    for offset in (1, 5, 16, 31):
        space = torch.full((student.numel() + 64,), 7.0, dtype=dtype)
        into = space[offset : offset + student.numel()].view_as(student)
        shifted = torch.empty(student.numel() + offset, dtype=dtype)[offset:].view_as(student)
        found = gradient(shifted.copy_(student), common, matched, into)
        assert torch.equal(found, expected)
        assert (space[:offset] == 7).all() and (space[offset + student.numel() :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_what_lies_between_rows_is_not_used(k, dtype):
    tensors = rows(k, dtype)
    expected = gradient(*tensors, torch.empty_like(tensors[0]))
    apart = [
        torch.full((len(x), B, k + 40), torch.nan, dtype=dtype)[..., 7 : 7 + k] for x in tensors
    ]
    for x, y in zip(apart, tensors, strict=True):
        x.copy_(y)
    assert torch.equal(gradient(*apart, torch.empty_like(tensors[0])), expected)


def guarded(x, at_end):
    """A copy of x with a page before and a page after it that cannot be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + inside):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    begin = page + (inside - size if at_end else 0)
    return (
        torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=begin).view_as(x).copy_(x)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_nothing_outside_of_the_tensors_is_touched(k, dtype):
    """A violation ends the process."""
    tensors = rows(k, dtype)
    expected = gradient(*tensors, torch.empty_like(tensors[0]))
    for at_end in (False, True):
        student, *teachers = (guarded(x, at_end) for x in tensors)
        into = guarded(torch.zeros_like(student), at_end)
        assert torch.equal(gradient(student, *teachers, into), expected)
