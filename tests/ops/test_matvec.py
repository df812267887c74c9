"""matvec, of any dtype of the matrix, against fp64."""

import pytest
import torch

from mokd_fast.ops import cpu
from mokd_fast.ops.matvec import matvec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "D"), [(0, 4), (1, 1), (65, 7), (130, 100), (4097, 256)])
def test_values(K, D, dtype, monkeypatch):
    torch.manual_seed(0)
    matrix, vector = torch.randn(K, D, dtype=dtype), torch.randn(D)
    want = matrix.double() @ vector.double()
    most = matrix.double().abs() @ vector.double().abs()
    for level in cpu.LEVELS:
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
        try:
            found = matvec(matrix, vector)
        except ValueError:
            continue  # a level that this processor cannot run
        assert found.dtype == torch.float32
        assert ((found.double() - want).abs() <= 1e-6 * most).all()
    monkeypatch.delenv("MOKD_FAST_CPU_LEVEL")
    found = matvec(matrix.t().contiguous().t(), vector)
    assert ((found.double() - want).abs() <= 1e-6 * most).all()


def test_autocast_threads_and_compile():
    matrix, vector = torch.randn(300, 64).bfloat16(), torch.randn(64)
    want, before = matvec(matrix, vector), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(matvec(matrix, vector), want)
    finally:
        torch.set_num_threads(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matvec(matrix, vector), want)
    compiled = torch.compile(matvec, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(matrix, vector), want)
    wide = matvec(matrix, vector.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), want)


@pytest.mark.parametrize(("matrix", "vector"), [((4, 9), (5,)), ((4, 5), (5, 2)), ((4,), (4,))])
def test_bad_shapes(matrix, vector):
    with pytest.raises(ValueError, match=r"takes a matrix \[K, D\] and a vector \[D\], got"):
        matvec(torch.ones(matrix), torch.ones(vector))
