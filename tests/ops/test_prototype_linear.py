"""prototype_linear: logits and gradients of its products, against fp64 and PyTorch's own."""

import pytest
import torch
from torch import Tensor

from mokd_fast.ops import (
    LinearTarget,
    WeightNormed,
    cpu,
    cross_view_pairs,
    explain,
    prototype_linear,
    prototype_loss,
)
from mokd_fast.ops.prototype_linear import _backward, _forward, _product, needs_no_matrix

BF16, FP32 = torch.bfloat16, torch.float32
needs_products = pytest.mark.skipif(
    cpu.bf16_why_not() is not None,
    reason="needs the native module and a processor with AVX512-BF16",
)
of_fp32 = pytest.param(
    FP32, marks=pytest.mark.skipif(cpu.fp32_why_not() is not None, reason="needs AVX2")
)
of_both = pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=needs_products), of_fp32])


def inputs(B: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(B + K + D)
    x = torch.nn.functional.normalize(torch.randn(B, D), dim=-1)
    return x, torch.randn(K, D) / 8, torch.rand(K, 1) + 0.5


def results(x: Tensor, v: Tensor, g: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, v, g = (t.detach().requires_grad_() for t in (x, v, g))
    logits = prototype_linear(x, WeightNormed(v, g), dtype)
    logits.backward(grad.to(dtype))
    return [logits.detach(), x.grad, v.grad, g.grad]


# One block of rows, several, an odd one; chunks and slabs that are cut off.
SIZES = [(1, 32, 32), (3, 96, 64), (13, 2144, 96), (40, 640, 192), (41, 4128, 256), (320, 160, 384)]


@needs_products
@pytest.mark.parametrize(("B", "K", "D"), SIZES)
def test_error_is_no_larger_than_that_of_the_library(B, K, D, monkeypatch):
    x, v, g = inputs(B, K, D)
    grad = torch.randn(B, K).bfloat16() / K
    exact = results(x.bfloat16().double(), v.double(), g.double(), grad, torch.float64)
    mine = results(x, v, g, grad, BF16)
    w = WeightNormed(v, g).matrix(BF16)
    assert torch.equal(_product(x, w), mine[0])
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    theirs = results(x, v, g, grad, BF16)
    for want, got, other in zip(exact, mine, theirs, strict=True):
        assert got.dtype == other.dtype and got.shape == other.shape
        error, allowed = (got.double() - want).norm(), (other.double() - want).norm()
        assert error <= allowed * 1.01 + 1e-6 * want.norm()
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
@pytest.mark.parametrize(("B", "K", "D"), [*SIZES, (17, 96, 2048), (1000, 64, 64)])
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_error_in_fp32_at_every_level(level, B, K, D, monkeypatch):
    """The kernels themselves: below AVX2 nobody is sent to them."""
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
    try:
        cpu.native.cpu_level(level)
    except ValueError:
        pytest.skip(f"this processor has no {level}")
    x, v, g = inputs(B, K, D)
    grad = torch.randn(B, K) / K
    exact = results(x.double(), v.double(), g.double(), grad, torch.float64)
    logits, norms = cpu.normed_linear(x, v, g, FP32)
    *found, norm = cpu.normed_linear_backward(grad, x, v, g, norms)
    mine = [logits, *found]
    torch.testing.assert_close(norm, mine[2].double().norm().float(), rtol=1e-6, atol=0)
    w = WeightNormed(v, g).matrix()
    made = cpu.prototype_linear(x, w)
    torch.testing.assert_close(made.double(), x.double() @ w.double().t(), rtol=1e-5, atol=1e-6)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    theirs = results(x, v, g, grad, FP32)
    for want, got, other in zip(exact, mine, theirs, strict=True):
        assert got.dtype == other.dtype == FP32 and got.shape == other.shape
        error, allowed = (got.double() - want).norm(), (other.double() - want).norm()
        assert error <= allowed * 1.2 + 1e-7 * want.norm()
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@needs_products
def test_gradients_of_the_prototypes_are_fp32(monkeypatch):
    """The library rounds the matrix's gradient to 16 bits before it comes to v."""
    x, v, g = inputs(40, 320, 64)
    x = x.bfloat16().float()
    grad = torch.randn(40, 320).bfloat16()
    exact = results(x.double(), v.double(), g.double(), grad, torch.float64)
    mine = results(x, v, g, grad, BF16)
    for want, got in zip(exact[2:], mine[2:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * want.abs().max())


@of_both
def test_nan_and_infinity_stay_in_their_rows(dtype):
    x, v, g = inputs(5, 64, 32)
    x[1, 3], v[7, 2], v[9] = torch.nan, torch.inf, 0
    logits, dx, dv, _ = results(x, v, g, torch.ones(5, 64), dtype)
    bad = torch.zeros(5, 64, dtype=torch.bool)
    bad[1], bad[:, [7, 9]] = True, True
    assert torch.equal(logits.isnan(), bad)
    assert dx.isnan().all()  # of all prototypes
    assert dv.isnan().all()  # of all images
    x[1, 3] = 0
    dv = results(x, v, g, torch.ones(5, 64), dtype)[2]
    assert dv.isnan().any(1).nonzero().flatten().tolist() == [7, 9]


@of_both
def test_bits_do_not_depend_on_threads_strides_or_defaults(dtype):
    x, v, g = inputs(42, 4160, 64)
    grad = torch.randn(4160, 42).to(dtype).t()  # transposed
    before = torch.get_num_threads()
    found = []
    try:
        for threads, matrix in ((1, v), (2, v), (3, v.t().contiguous().t())):
            torch.set_num_threads(threads)
            found.append(results(x, matrix, g, grad, dtype))
        torch.set_default_dtype(torch.float64)
        found.append(results(x[:, None], v, g, grad[:, None], dtype))
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(torch.float32)
    for other in found[1:]:
        assert all(torch.equal(a, b.view_as(a)) for a, b in zip(found[0], other, strict=True))
    one = torch.ones(1, 1).expand(42, 4160)  # stride 0
    for a, b in zip(
        results(x, v, g, one, dtype), results(x, v, g, one.contiguous(), dtype), strict=True
    ):
        assert torch.equal(a, b)


@of_both
def test_it_checks_as_an_operator_and_refuses_a_second_derivative(dtype):
    x, v, g = (t.requires_grad_() for t in inputs(6, 64, 32))
    torch.library.opcheck(_forward, (x, v, g, dtype))
    grad, *plain = (t.detach() for t in (torch.randn(6, 64).to(dtype), x, v, g))
    torch.library.opcheck(_backward, (grad, *plain, torch.rand(64)))
    torch.library.opcheck(_product, (plain[0], plain[1].to(dtype)))
    logits = prototype_linear(x, WeightNormed(v, g), dtype)
    (first,) = torch.autograd.grad(logits.float().square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_it_compiles(dtype):
    x, v, g = (t.requires_grad_() for t in inputs(6, 64, 32))
    normed = WeightNormed(v, g)
    compiled = torch.compile(prototype_linear, fullgraph=True, backend="aot_eager")
    mine = compiled(x, normed, dtype)
    assert torch.equal(mine, prototype_linear(x, normed, dtype))
    grad = torch.randn(6, 64).to(dtype)
    found = torch.autograd.grad(mine, (x, v, g), grad)
    for have, want in zip(found, results(x, v, g, grad, dtype)[1:], strict=True):
        assert torch.equal(have, want)
    w = v.detach().to(dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x, w, dtype), prototype_linear(x, w, dtype))


@of_both
def test_the_norm_of_the_prototypes_gradient_is_left_where_it_was_asked_for(dtype):
    x, v, g = inputs(40, 640, 64)
    v.requires_grad_()
    seen: dict[Tensor, Tensor] = {}
    logits = prototype_linear(x, WeightNormed(v, g, seen), dtype)
    assert not seen
    logits.backward(torch.randn(40, 640).to(dtype))
    assert list(seen) == [v]
    torch.testing.assert_close(seen[v], v.grad.double().norm().float(), rtol=1e-6, atol=0)


@of_both
def test_only_gradients_that_are_needed(dtype):
    x, v, g = inputs(4, 32, 32)
    frozen = WeightNormed(v.requires_grad_(), g)  # g = 1, DINO's
    prototype_linear(x, frozen, dtype).float().sum().backward()
    assert v.grad is not None and x.grad is None and g.grad is None


def test_what_the_library_does(monkeypatch):
    x, v, g = inputs(4, 96, 64)
    normed, w = WeightNormed(v, g), v.bfloat16()
    cases = [
        ((x, normed, torch.float16), "not of torch.float16"),
        ((x[:0], normed, BF16), "takes rows"),
        ((x, WeightNormed(v[:95], g[:95]), BF16), "multiples of 32"),
        ((x[:, :63], WeightNormed(v[:, :63], g), BF16), "multiples of 32"),
        ((x, WeightNormed(v.double(), g.double()), BF16), "fp32 itself, not of torch.float64"),
        ((x.repeat(32, 1), w, BF16), "from 128 rows on"),
        ((x.requires_grad_(), w, BF16), "gradients for a WeightNormed alone"),
    ]
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")  # no reason to fail
    for arguments, reason in cases:
        matrix, dtype = arguments[1], arguments[2]
        matrix = matrix.matrix(dtype) if isinstance(matrix, WeightNormed) else matrix
        logits = prototype_linear(*arguments)
        assert torch.equal(logits, arguments[0].to(dtype) @ matrix.t())
        if cpu.native is not None:
            assert "cpu: can run, but" in explain("prototype_linear", *arguments)
            assert reason in explain("prototype_linear", *arguments)


@needs_products
def test_who_has_bf16_products_takes_them_unless_a_lower_level_is_forced(monkeypatch):
    x, v, g = inputs(4, 96, 64)
    for weight in (WeightNormed(v, g), v):
        for level, said in (("", "chosen"), ("v4", "chosen"), ("v3", "can run, but MOKD_FAST_CPU")):
            monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
            assert f"cpu: {said}" in explain("prototype_linear", x, weight, BF16)


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
def test_fp32_without_avx2_is_the_librarys(monkeypatch):
    x, v, g = inputs(4, 96, 64)
    level = cpu.native.cpu_level()
    for forced in ("baseline", level):
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", forced)
        low = "can run, but without AVX2 its products of fp32 are slower"
        said = low if forced == "baseline" else "chosen"
        for args in ((x, WeightNormed(v, g), FP32), (x.repeat(32, 1), v, FP32)):
            assert f"cpu: {said}" in explain("prototype_linear", *args)


def test_no_matrix_is_needed_where_the_cpu_multiplies(monkeypatch):
    x, v, g = inputs(4, 96, 64)
    normed, far = WeightNormed(v, g), WeightNormed(v.to("meta"), g.to("meta"))
    assert needs_no_matrix(x, normed, FP32) == (cpu.fp32_why_not() is None)
    assert needs_no_matrix(x, normed, BF16) == (cpu.bf16_why_not() is None)
    assert not needs_no_matrix(x, WeightNormed(v[:95], g[:95]), FP32)
    assert not needs_no_matrix(x.to("meta"), far, FP32)
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    assert not needs_no_matrix(x, normed, FP32)


@needs_products
@pytest.mark.parametrize("way", ["fused", "fused-linear", "reference"])
def test_prototype_loss_takes_prototypes_that_are_not_made(way):
    x, v, g = inputs(12, 96, 64)
    x, targets = x.view(4, 3, 64), []
    for rows in (x[:2], x[1:3]):
        targets.append(LinearTarget(cross_view_pairs(2, 4), rows, v.bfloat16(), 0.1))

    def run(made: bool) -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in (x, v, g)]
        normed = WeightNormed(*inputs[1:])
        with torch.autocast("cpu", BF16):
            weight = normed.matrix(BF16) if made else normed
            loss, _ = prototype_loss(inputs[0], weight, targets, temperature=0.1, backend=way)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    for have, want in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(have, want, rtol=2**-7, atol=2**-7 * want.abs().max())


def test_norms_that_do_not_fit_are_refused():
    for g in (torch.ones(3, 1), torch.ones(96), torch.ones(96, 1).double()):
        with pytest.raises(ValueError, match=r"g must be torch.float32 \[96, 1\] on cpu"):
            WeightNormed(torch.randn(96, 64), g)


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), None, r"weight must be floating \[K, D\], got"),
        (torch.ones(2, 3), torch.ones(4, 2), None, r"x must be floating \[.., 2\] on cpu for"),
        (torch.ones(2, 3).int(), torch.ones(4, 3), None, r"got torch.int32 \[2, 3\]"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.int32, "dtype must be floating, got"),
    ],
)
def test_bad_input(x, weight, dtype, message):
    with pytest.raises(ValueError, match=message):
        prototype_linear(x, weight, dtype)
