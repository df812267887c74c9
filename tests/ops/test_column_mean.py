"""column_mean: the CPU kernel against float64, and its contract."""

import importlib

import pytest
import torch

from mokd_fast.ops import column_mean, explain
from tests.ops.conftest import levels

column_mean_file = importlib.import_module("mokd_fast.ops.column_mean")


@pytest.fixture(autouse=True, params=["reference", "baseline", "v3", "v4"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
        return request.param
    if request.param not in levels():
        pytest.skip(f"no native module here with kernels of level {request.param}")
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 7, 1000, 1024, 4097])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_mean(rows, k, dtype):
    g = torch.Generator().manual_seed(k)
    logits = (torch.randn(2, rows, k, generator=g, dtype=torch.float64) * 5 + 100).to(dtype)
    mean = column_mean(logits)
    assert mean.shape == (k,) and mean.dtype == torch.promote_types(dtype, torch.float32)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    exact = logits.double().flatten(0, 1).mean(0)
    torch.testing.assert_close(mean.double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_many_equal_rows(value):
    """One chain of fp32 additions would be off by 1e-4."""
    logits = torch.full((12544, 70), value)
    torch.testing.assert_close(column_mean(logits), logits[0], rtol=5e-7, atol=0)


def test_the_sign_of_a_negative_view_counts():
    view = torch.randn(5, 40, dtype=torch.cfloat).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(column_mean(view), view.clone().mean(0))


def test_any_strides_and_no_gradient():
    logits = torch.randn(6, 5, 40, requires_grad=True)
    expected = logits.detach().flatten(0, 1).mean(0)
    for same in (logits, logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        mean = column_mean(same)
        torch.testing.assert_close(mean, expected)
        assert not mean.requires_grad
    part = logits.detach()[::2, 1:, 3:].flip(-1)
    torch.testing.assert_close(column_mean(part), part.flatten(0, 1).mean(0))
    torch.testing.assert_close(column_mean(logits[:1, :1].expand(6, 5, 40)), logits[0, 0].detach())


def test_without_rows_it_is_zero_and_nan_stays():
    assert torch.equal(column_mean(torch.zeros(2, 0, 9)), torch.zeros(9))
    logits = torch.zeros(3, 70)
    logits[1, 66] = torch.nan
    assert column_mean(logits).isnan().nonzero().tolist() == [[66]]


def test_compiled_and_threads():
    logits = torch.randn(4, 3000)
    compiled = torch.compile(column_mean, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits), column_mean(logits))
    one = column_mean(logits)
    torch.set_num_threads(3)
    several = column_mean(logits)
    torch.set_num_threads(1)
    assert torch.equal(one, several)
    assert "reference" in explain("column_mean", logits=logits)


def test_opcheck():
    torch.library.opcheck(column_mean_file._operator, (torch.randn(4, 3, 33),))


@pytest.mark.parametrize(
    "logits", [torch.tensor(1.0), torch.zeros(3, 0), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_bad_input(logits):
    with pytest.raises(ValueError, match=r"logits must be floating .* K >= 1, got torch"):
        column_mean(logits)
