"""add_norm and mlp: what stands between a block's products, against fp64 and PyTorch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokd_fast.ops import block, cpu, explain, onednn

BF16 = torch.bfloat16
needs_native = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
needs_bf16 = pytest.mark.skipif(
    not onednn.usable("cpu", BF16), reason="oneDNN has no products of bf16 for this processor"
)
LEVELS = ["baseline", "v3", "v4"]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    try:
        cpu.native.cpu_level(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return request.param


def normed(tensors: list[Tensor | None], grads: list[Tensor | None], dtype: torch.dtype):
    """Sum and LayerNorm, and the gradients for x, y, weight and bias."""
    given = [t if t is None else t.clone().requires_grad_() for t in tensors]
    found = block.add_norm(*given, 1e-6, dtype)
    used = [(out, g.to(out.dtype)) for out, g in zip(found, grads, strict=True) if g is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return [*found, *(t.grad for t in given if t is not None)]


def no_worse(mine, theirs, exact, slack: float = 1e-6) -> None:
    for got, other, want in zip(mine, theirs, exact, strict=True):
        if want is None:
            assert got is None or not got.any()
            continue
        assert got.dtype == other.dtype and got.shape == other.shape
        allowed = (other.double() - want).abs().amax() + slack * want.abs().amax()
        assert (got.double() - want).abs().amax() <= allowed


@needs_native
@pytest.mark.parametrize("summand", [None, torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 33, 40), (5, 13, 192), (70, 385)])
def test_error_of_add_norm(shape, summand, level, monkeypatch):
    torch.manual_seed(0)
    x = 3 * torch.randn(shape) + 5
    y = None if summand is None else torch.randn(shape).to(summand)
    parameters = [torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])]
    for grads in (torch.randn(shape), torch.randn(shape).to(BF16)), (None, x.to(BF16)), (x, None):
        mine = normed([x, y, *parameters], grads, BF16)
        with monkeypatch.context() as patch:
            patch.setenv("MOKD_FAST_BACKEND", "reference")
            theirs = normed([x, y, *parameters], grads, BF16)
            wide = [t if t is None else t.double() for t in (x, y, *parameters)]
            wide_grads = [g if g is None else g.double() for g in grads]
            exact = normed(wide, wide_grads, torch.float64)
        no_worse(mine, theirs, exact, slack=3e-6)


@needs_native
def test_rows_that_are_expanded_or_not_contiguous():
    torch.manual_seed(0)
    one, weight, bias = torch.randn(2, 5, 24), torch.ones(24), torch.zeros(24)
    x, y = one.expand(3, 2, 5, 24), torch.randn(3, 2, 5, 24).to(BF16)
    for given, added in ((x, y), (x, None), (one.transpose(0, 1), None)):
        got = block.add_norm(given, added, weight, bias, 1e-6, BF16)
        for a, b in zip(
            got, block._norm_reference(given, added, weight, bias, 1e-6, BF16), strict=True
        ):
            torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 100), (65, 768), (2, 1025)])
def test_error_of_gelu(shape, level):
    torch.manual_seed(0)
    u, grad = (3 * torch.randn(shape)).to(BF16), torch.randn(shape).to(BF16)
    exact = u.double().requires_grad_()
    F.gelu(exact).backward(grad.double())
    du, again, sums = cpu.gelu_backward(u, grad)
    assert torch.equal(again, cpu.gelu(u))
    slope = torch.ops.aten.gelu_backward(grad, u)
    pairs = (again, F.gelu(u), F.gelu(exact)), (du, slope, exact.grad)
    for got, other, want in pairs:  # bf16 has 2^-9 of a number
        assert ((got.double() - want).abs() <= 0.0041 * want.abs() + 2e-5).all()
        assert (got.double() - want).norm() <= 1.02 * (other.double() - want).norm() + 1e-5
    assert (sums - exact.grad.sum(0)).abs().max() <= 2e-4 * exact.grad.abs().sum(0).max()
    torch.testing.assert_close(
        cpu.sum_rows(grad).double(), grad.double().sum(0), rtol=1e-6, atol=1e-5
    )


@needs_native
def test_gelu_of_extreme_numbers(level):
    u = torch.tensor([0.0, -0.0, torch.inf, 1e30, -1e30, -40, -13, 14, torch.nan]).to(BF16)
    found = cpu.gelu(u)
    assert not found[2].isfinite()  # csrc/cpu/vector.h: of bf16 infinity may become NaN
    found[2] = torch.inf
    torch.testing.assert_close(found, u.clamp(min=0), equal_nan=True, rtol=0, atol=1e-30)
    du, *_ = cpu.gelu_backward(u[None], torch.ones_like(u)[None])
    want = torch.tensor([[0.5, 0.5, 1, 1, 0, 0, 0, 1, torch.nan]]).to(BF16)
    torch.testing.assert_close(du, want, equal_nan=True, rtol=0, atol=1e-30)


@needs_native
def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    u, grad = torch.randn(2, 333, 70).to(BF16)
    x, parameters = torch.randn(333, 70), [torch.ones(70), torch.zeros(70)]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([*cpu.gelu_backward(u, grad), cpu.sum_rows(u)])
            found[-1] += normed([x, u, *parameters], [x, grad], BF16)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))  # noqa: B905


def through(x: Tensor, layers: list[Tensor], grad: Tensor) -> list[Tensor]:
    x, layers = x.clone().requires_grad_(), [p.clone().requires_grad_() for p in layers]
    y = block.mlp(x, tuple(layers[:2]), tuple(layers[2:]))
    y.backward(grad.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layers)]


@needs_native
@needs_bf16
def test_error_of_mlp(monkeypatch):
    torch.manual_seed(0)
    x, grad = torch.randn(3, 50, 72).to(BF16), torch.randn(3, 50, 40).to(BF16)
    sizes = [(200, 72), (200,), (40, 200), (40,)]
    layers = [torch.randn(size) / size[-1] ** 0.5 for size in sizes]
    for enough in (1, 1 << 40):
        monkeypatch.setattr(onednn, "ENOUGH", enough)
        mine = through(x, layers, grad)
        with torch.no_grad():
            teacher = block.mlp(x, tuple(layers[:2]), tuple(layers[2:]))
        with monkeypatch.context() as patch:
            patch.setenv("MOKD_FAST_BACKEND", "reference")
            theirs = through(x, layers, grad)
            exact = through(x.double(), [p.double() for p in layers], grad.double())
        for got, other, want in zip(mine, theirs, exact, strict=True):
            assert got.dtype == other.dtype
            assert (got.double() - want).norm() <= 1.1 * (other.double() - want).norm()
        assert (teacher.double() - exact[0]).norm() <= 1.1 * (theirs[0].double() - exact[0]).norm()


@needs_native
@needs_bf16
def test_second_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(onednn, "ENOUGH", 1)
    x = torch.randn(4, 8, requires_grad=True)
    norm = block.add_norm(x, None, torch.ones(8), torch.zeros(8), 1e-6, BF16)[1]
    w = torch.randn(8, 8)
    for y in norm, block.mlp(x.bfloat16(), (w, None), (w, None)):
        (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@needs_native
def test_transforms_and_other_dtypes_take_the_reference():
    x, w, b = torch.randn(4, 8), torch.ones(8), torch.zeros(8)
    assert "cpu: chosen" in explain(block.NORM, x, None, w, b, 1e-6, BF16)

    def loss(x: Tensor) -> Tensor:
        return block.add_norm(x, None, w, b, 1e-6, BF16)[1].float().square().sum()

    y = copy.deepcopy(x).requires_grad_()
    loss(y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), y.grad, rtol=2e-2, atol=2e-2)
    for dtype in (torch.float32, torch.float64):
        got = block.add_norm(*(t.to(dtype) for t in (x, x, w, b)), 1e-6, dtype)
        assert torch.equal(got[0], (x + x).to(dtype)) and got[1].dtype == dtype


def test_weights_of_another_width_are_refused():
    x = torch.randn(4, 64)
    for sizes in ((8, 8), (1, 64), (64, 128)):
        weight, bias = (torch.ones(size) for size in sizes)
        with pytest.raises(ValueError, match=r"weight and bias must be \[64\] for x of shape"):
            block.add_norm(x, None, weight, bias, 1e-6, BF16)
