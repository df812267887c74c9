"""weight_norm: the prototypes in the type of their products, against fp64 and PyTorch's own."""

import pytest
import torch
from torch import Tensor

from mokd_fast.ops import cpu, explain, weight_norm
from mokd_fast.ops.weight_norm import _backward, _forward

needs_native = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (65, 16), (130, 100), (64, 256), (200, 385), (2, 3000), (0, 8)]  # K, D


def inputs(K: int, D: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(K + D)
    return scale * torch.randn(K, D), torch.rand(K, 1) + 0.5


def results(v: Tensor, g: Tensor, grad: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    v, g = v.clone().requires_grad_(), g.clone().requires_grad_()
    w = weight_norm(v, g, dtype)
    w.backward(grad.to(w.dtype))
    return [w.detach(), v.grad, g.grad]


def check(
    v: Tensor, g: Tensor, grad: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64, no error of result and gradients is larger than PyTorch's, up to rounding: 1e-6
    of the numbers that cancel in a gradient. (In a row of one number, of v's gradient all do: what
    is left is the last digit of g dw / |v|, PyTorch's too, whichever of 3000 rows has the least v.)
    """
    exact = results(v.double(), g.double(), grad.double(), None)
    mine = results(v, g, grad, dtype)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    theirs = results(v, g, grad, dtype)
    along = grad.double().abs().sum(1, keepdim=True)
    masses = 0 * along, along * g.double() / v.double().norm(dim=1, keepdim=True), along
    for want, got, other, mass in zip(exact, mine, theirs, masses, strict=True):
        assert got.dtype == other.dtype and got.shape == other.shape
        error, allowed = (got.double() - want).abs(), (other.double() - want).abs()
        tolerance = 2e-6 * want.abs() + 1e-6 * mass
        assert not got.numel() or (error <= allowed.amax() + tolerance).all()


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
@pytest.mark.parametrize(("K", "D"), [*SHAPES, (5, 0), (3000, 1)])
def test_error_is_no_larger_than_that_of_the_library(K, D, level, dtype, monkeypatch):
    if cpu.native is not None and not _runs(level):
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
    check(*inputs(K, D), torch.randn(K, D).to(dtype), dtype, monkeypatch)


def _runs(level: str) -> bool:
    try:
        return bool(cpu.native.cpu_level(level))
    except ValueError:
        return False


@needs_native
def test_rows_of_zeros_nan_and_large_numbers_are_as_the_library_has_them(monkeypatch):
    v, g = inputs(5, 40)
    v[0], v[1, 3], v[2], v[3] = 0, torch.nan, v[2] * 1e15, v[3] * 1e-15
    found = weight_norm(v, g, torch.bfloat16)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    want = weight_norm(v, g, torch.bfloat16)
    assert found[:2].isnan().all() and want[:2].isnan().all()
    torch.testing.assert_close(found[2:], want[2:], rtol=2**-7, atol=0)


@needs_native
def test_a_default_dtype_or_device_changes_nothing():
    v, g = inputs(40, 16)
    grad = torch.randn(40, 16).bfloat16()
    want = results(v, g, grad, torch.bfloat16)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            found = results(v, g, grad, torch.bfloat16)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with torch.device("meta"):
        found = results(v, g, grad, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", HALVES)
def test_bits_do_not_depend_on_threads_or_strides(dtype):
    v, g = inputs(1000, 72)
    grad = torch.randn(72, 1000, dtype=dtype).t()  # transposed
    before = torch.get_num_threads()
    try:
        found = []
        for threads, matrix in ((1, v), (2, v), (1, v.t().contiguous().t())):
            torch.set_num_threads(threads)
            found.append(results(matrix, g, grad, dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    row = torch.ones(1, 1, dtype=dtype).expand(1000, 72)  # stride 0
    for a, b in zip(results(v, g, row, dtype), results(v, g, row.contiguous(), dtype), strict=True):
        assert torch.equal(a, b)


def test_it_checks_as_an_operator_compiles_and_refuses_a_second_derivative():
    v, g = (t.requires_grad_() for t in inputs(6, 20))
    if cpu.native is not None:
        torch.library.opcheck(_forward, (v, g, torch.bfloat16, "cpu"))
        grad = torch.randn(6, 20).bfloat16()
        torch.library.opcheck(_backward, (grad, v.detach(), g.detach(), torch.rand(6), "cpu"))
        (first,) = torch.autograd.grad(
            weight_norm(v, g, torch.bfloat16).float().square().sum(), v, create_graph=True
        )
        with pytest.raises(RuntimeError, match="second"):
            first.sum().backward()
    compiled = torch.compile(weight_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v, g, torch.bfloat16), weight_norm(v, g, torch.bfloat16))


@needs_native
def test_other_dtypes_take_the_library(monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")  # no reason to fail
    v, g = inputs(4, 8)
    assert torch.equal(weight_norm(v, g), torch._weight_norm(v, g, 0))
    assert weight_norm(v.double(), g.double()).dtype == torch.float64
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    assert "cpu: chosen" in explain("weight_norm", v, g, torch.bfloat16)
    assert "triton: it takes tensors on a GPU" in explain("weight_norm", v, g, torch.bfloat16)
    passed = "cpu: can run, but its kernels make bf16 and fp16 of fp32, not torch.float32 of"
    assert passed in explain("weight_norm", v, g)
    frozen = weight_norm(v.requires_grad_(), g, torch.bfloat16)  # g = 1, DINO's
    frozen.float().sum().backward()
    assert v.grad is not None and g.grad is None


@pytest.mark.parametrize(
    ("v", "g", "message"),
    [
        (torch.ones(3), torch.ones(3, 1), r"v must be floating \[K, D\], got torch.float32 of"),
        (torch.ones(3, 2).int(), torch.ones(3, 1), "got torch.int32 of shape"),
        (torch.ones(3, 2), torch.ones(3), r"g must be torch.float32 \[3, 1\] on cpu as v is"),
        (torch.ones(3, 2), torch.ones(3, 1).half(), "got torch.float16"),
    ],
)
def test_bad_input(v, g, message):
    with pytest.raises(ValueError, match=message):
        weight_norm(v, g)


def test_bad_dtype():
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch\.int32"):
        weight_norm(*inputs(3, 2), torch.int32)
