"""batch_norm with a sum and a ReLU: against fp64 and PyTorch's own passes, and its contract."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokd_fast.ops import batch_norm, cpu, explain

from .conftest import levels

module = importlib.import_module("mokd_fast.ops.batch_norm")
pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (2, 64, 5, 5),
    (8, 128, 14, 14),  # several pieces
    (3, 48, 7, 5),  # lines of two rows, and one row that is in none
    (2, 7, 9, 9),
    (1, 3, 40, 70),
    (2, 3, 1, 1),
    (1, 1, 1, 2),
    (2, 1030, 3, 3),  # pieces of columns
    (3, 64, 97, 97),  # written around the caches, many lines at a time
    (5, 600, 23, 25),  # and few, with pieces of columns and rows that are in no line
]
THEN = [(False, False), (False, True), (True, False), (True, True)]  # added, ReLU


def case(shape, dtype, scale=2.0, offset=3.0) -> list[Tensor]:
    """x, added, weight, bias, gradient."""
    torch.manual_seed(sum(shape))
    x, added, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    C = shape[1]
    tensors = [(x * scale + offset).to(dtype), added, torch.randn(C), torch.randn(C), grad]
    return [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]


def results(tensors, add: bool, relu: bool, backend: str | None = None) -> dict[str, Tensor]:
    x, added, weight, bias, grad = (t.detach().clone() for t in tensors)
    inputs = [t.requires_grad_() for t in ((x, weight, bias, added) if add else (x, weight, bias))]
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    with pytest.MonkeyPatch.context() as patch:
        if backend:
            patch.setenv("MOKD_FAST_BACKEND", backend)
        more = {"added": added if add else None, "relu": relu}
        y = batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-5, **more)
        grads = torch.autograd.grad(y, inputs, grad)
    names = ("x", "weight", "bias", "added")
    found = dict(zip(names, grads, strict=False))
    return {"y": y.detach(), **found, "mean": mean.detach(), "var": var.detach()}


def doubled(tensors) -> list[Tensor]:
    return [t.double() for t in tensors]


def assert_as_exact(tensors, add: bool, relu: bool, backend: str) -> None:
    exact = results(doubled(tensors), add, relu, "reference")
    theirs = results(tensors, add, relu, "reference")
    mine = results(tensors, add, relu, backend)
    assert mine.keys() == theirs.keys()
    for name, want in exact.items():
        got, other = mine[name], theirs[name]
        assert got.dtype == other.dtype and got.shape == other.shape
        if got.ndim == 4:
            assert got.is_contiguous(memory_format=torch.channels_last)
        # Next to 0 a ReLU lets this through and not that: a gradient is all wrong or right.
        switched = (theirs["y"] > 0) != (mine["y"] > 0) if got.ndim == 4 else False
        switched = torch.as_tensor(switched, device=got.device)
        error = (got.double() - want).abs().masked_fill(switched, 0).max()
        slack = 1e-6 if tensors[0].shape != (1, 1, 1, 2) else 3e-5  # of two values nothing is left
        allowed = (other.double() - want).abs().max() + slack * want.abs().max().clamp(min=1)
        assert error <= allowed, (name, add, relu)


def assert_is_an_operator(tensors, backend: str, close: dict[str, float]) -> None:
    """opcheck; compiled whole it does the same; no second derivative."""
    x, added, weight, bias, grad = tensors
    leaves = [t.requires_grad_() for t in (x, weight, bias, added)]
    for more in (None, added):
        arguments = (x, weight, bias, more, 1e-5, True, backend)
        torch.library.opcheck(module._forward, arguments)
        y, stats = (t.detach() for t in module._forward(*arguments))
        saved = [t.detach() for t in (x, weight, bias)], None if more is None else y
        torch.library.opcheck(module._backward, (grad, *saved[0], stats, saved[1], True, backend))

    def run(x, weight, bias, added, mean, var):
        y = batch_norm(x, mean, var, weight, bias, True, added=added, relu=True)
        return y, batch_norm(y, None, None, weight, bias, True, relu=True)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKD_FAST_BACKEND", backend)
        for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            mean, var = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
            out = call(*leaves, mean, var)
            grads = torch.autograd.grad(sum(y.square().sum() for y in out), leaves)
            found.append([*out, *grads, mean, var])
        y = batch_norm(x, None, None, weight, bias, True, relu=True)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="batch_norm has no second derivative"):
            first.sum().backward()
    torch.testing.assert_close(*found, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_no_larger_than_that_of_pytorch(shape, level, dtype, monkeypatch):
    if level not in levels():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
    tensors = case(shape, dtype)
    for add, relu in THEN:
        assert_as_exact(tensors, add, relu, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_far_from_zero_and_outliers_are_exact(dtype):
    """Where sums of squares would have no digit left."""
    for offset, scale in ((1e4, 1.0), (-300.0, 1e-3)):
        tensors = case((4, 32, 20, 20), torch.float32, scale, offset)
        tensors[0][0, :, 0, 0] = offset + 100 * scale  # the first value is an outlier
        tensors[0], tensors[4] = tensors[0].to(dtype), tensors[4].to(dtype)
        exact = results(doubled(tensors), False, False, "reference")
        mine = results(tensors, False, False, "cpu")
        torch.testing.assert_close(mine["mean"].double(), exact["mean"], rtol=1e-6, atol=0)
        theirs = results(tensors, False, False, "reference")
        for name in ("y", "x", "var"):
            limit = (theirs[name].double() - exact[name]).abs().max()
            assert (mine[name].double() - exact[name]).abs().max() <= limit * 1.01 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    before = torch.get_num_threads()
    for shape in ((4, 96, 30, 30), (1, 24, 50, 61), (5, 600, 23, 25)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(results(case(shape, dtype), True, True, "cpu"))
            finally:
                torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(v, other[name]) for name, v in found[0].items())


@pytest.mark.parametrize("add", [False, True])
def test_nan_and_infinity_come_through(add):
    for value in (torch.nan, torch.inf):
        tensors = case((2, 40, 6, 6), torch.float32)
        tensors[0][1, 3, 2, 2] = value
        tensors[4][0, 5, 1, 1] = value
        mine, theirs = (results(tensors, add, True, name) for name in ("cpu", "reference"))
        for name, want in theirs.items():
            assert torch.equal(mine[name].isfinite(), want.isfinite()), name
        assert mine["y"][:, 3].isnan().all() and not mine["y"][:, 4].isnan().any()


def test_gradients_of_other_strides_and_what_needs_none():
    x, added, weight, bias, _ = case((2, 16, 6, 6), torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    want, found = (
        batch_norm(t, None, None, weight, bias, True, added=added, relu=True).mean((2, 3))
        for t in (x.contiguous(), x)  # the first by PyTorch
    )
    for leaf in (x, weight):
        a, b = (torch.autograd.grad(y[:, :5].sum(), leaf, retain_graph=True) for y in (want, found))
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not batch_norm(x, None, None, weight, bias, True).requires_grad
    frozen = x.detach(), None, None, weight.detach(), bias, True
    y = batch_norm(*frozen, added=added.requires_grad_(), relu=True)
    y.sum().backward()
    assert torch.equal(added.grad, (y > 0).float()) and weight.grad is None


def test_what_changes_in_place_afterwards_is_noticed():
    x, added, weight, bias, _ = (t.requires_grad_() for t in case((2, 16, 6, 6), torch.float32))
    batch_norm(x, None, None, weight, bias, True, relu=True).add_(1).sum().backward()
    y = batch_norm(x, None, None, weight, bias, True, added=added, relu=True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = batch_norm(x, None, None, weight, bias, True, added=added)
    y.mul_(2).sum().backward()
    torch.testing.assert_close(added.grad, torch.full_like(added, 2))


def test_running_statistics_move_as_pytorchs():
    x, _, weight, bias, _ = case((4, 8, 5, 5), torch.float32)
    for momentum in (0.0, 0.1, 0.7, 1.0):
        mine = torch.rand(8), torch.ones(8)
        theirs = [t.clone() for t in mine]
        batch_norm(x, *mine, weight, bias, True, momentum)
        F.batch_norm(x, *theirs, weight, bias, True, momentum)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-7)


def test_passes_by_either_way_before_a_backward():
    """PyTorch keeps running statistics for backward and moves them unseen; so must the kernels."""
    x, _, weight, bias, _ = case((4, 8, 5, 5), torch.float32)
    x.requires_grad_()
    mean, var = torch.zeros(8), torch.ones(8)
    ways = [x.contiguous(), x, x.contiguous()]
    found = [batch_norm(t, mean, var, weight, bias, True, relu=True) for t in ways]
    total = sum(y.square().sum() for y in found)
    (gradient,) = torch.autograd.grad(total, x)
    again = batch_norm(x, mean, var, weight, bias, True, relu=True)
    (want,) = torch.autograd.grad(again.square().sum() * 3, x)
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_what_is_pytorchs(monkeypatch):
    """Evaluation, other layouts and dtypes: its bits, also where the CPU backend is asked for."""
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "batch_norm", None)  # no reason to fail
    x, added, weight, bias, _ = case((2, 16, 6, 6), torch.float32)
    mean, var = torch.rand(16), torch.rand(16) + 0.5
    for y, want in (
        (batch_norm(x, mean, var, weight, bias), F.batch_norm(x, mean, var, weight, bias)),
        (
            batch_norm(x, mean, var, added=added, relu=True),
            F.relu(F.batch_norm(x, mean, var) + added),
        ),
        *(
            (batch_norm(t, None, None, w, b, True), F.batch_norm(t, None, None, w, b, True))
            for t, w, b in (
                (x.contiguous(), weight, bias),
                (x.double(), weight.double(), bias.double()),
                (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
                (x, None, None),
                (x[0, 0], None, None),
                (x[:, ::2], weight[::2], bias[::2]),
                (x[..., :3], weight, bias),
            )
        ),
    ):
        assert torch.equal(y, want) and y.dtype == want.dtype
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm(x[:1, :, :1, :1], None, None, weight, bias, True)


def test_it_checks_as_an_operator_compiles_and_refuses_a_second_derivative():
    assert_is_an_operator(case((2, 5, 3, 3), torch.float32), "cpu", {"rtol": 0, "atol": 0})


def test_reference_is_twice_differentiable_and_chosen_for_transforms():
    small = case((2, 3, 2, 2), torch.float32)
    x, added, weight, bias, _ = (t.double().requires_grad_() for t in small)
    run = lambda *t: batch_norm(t[0], None, None, *t[1:3], True, added=t[3], relu=True)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias, added))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias, added))
    x, added, weight, bias, _ = small
    grad = torch.func.grad(lambda x: run(x, weight, bias, added).square().sum())
    x.requires_grad_()
    (want,) = torch.autograd.grad(run(x, weight, bias, added).square().sum(), x)
    torch.testing.assert_close(grad(x.detach()), want)
    said = explain("batch_norm", x, None, None, weight, bias, training=True, added=added)
    assert said.endswith("\ncpu: chosen\nreference: can run too")


def test_bad_input():
    x, _, weight, bias, _ = case((2, 3, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"added must be \[2, 3, 2, 2\] on cpu .* got \[2, 3\]"):
        batch_norm(x, None, None, weight, bias, True, added=x[:, :, 0, 0])
    with pytest.raises(ValueError, match="batch_norm: fp32 or bf16, two rows and a channel"):
        module._forward(x.half(), weight, bias, None, 1e-5, False, "cpu")
