"""Values of the Triton batch_norm: run by test_triton.py, interpreted or on a GPU."""

import pytest
import torch
from mokd_fast.kernels import batch_norm as kernels

from mokd_fast.ops import batch_norm, explain
from tests.ops.test_batch_norm import (
    THEN,
    assert_as_exact,
    assert_is_an_operator,
    case,
    doubled,
    results,
)

from .interpreter import _bfloat16_rounds_to_nearest, _quick  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (2, 64, 5, 5),
    (3, 48, 7, 5),
    (2, 7, 9, 9),  # rows that no vector begins
    (2, 3, 1, 1),
    (1, 1, 1, 2),
    (2, 130, 3, 3),  # tiles of columns
    (2, 20, 33, 35),  # several parts, the last tile not full
    (1, 144, 12, 11),
]


def there(tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_no_larger_than_that_of_pytorch(shape, dtype):
    tensors = there(case(shape, dtype))
    for add, relu in THEN:
        assert_as_exact(tensors, add, relu, "triton")


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_parts_of_rows(parts, monkeypatch):
    """However the rows are cut: tiles of 32 rows, 37 of them and one that is not full."""
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "PROGRAMS", parts)
    tensors = there(case((3, 9, 18, 22), torch.float32))
    for add, relu in THEN:
        assert_as_exact(tensors, add, relu, "triton")


def test_statistics_far_from_zero_and_outliers():
    """Where sums of squares would have no digit left."""
    for offset, scale in ((1e4, 1.0), (-300.0, 1e-3)):
        tensors = case((4, 32, 20, 20), torch.float32, scale, offset)
        tensors[0][0, :, 0, 0] = offset + 100 * scale  # the first value is an outlier
        tensors = there(tensors)
        exact = results(doubled(tensors), False, False, "reference")
        theirs = results(tensors, False, False, "reference")
        mine = results(tensors, False, False, "triton")
        torch.testing.assert_close(mine["mean"].double(), exact["mean"], rtol=1e-6, atol=0)
        for name in ("y", "x", "var"):
            limit = (theirs[name].double() - exact[name]).abs().max()
            floor = 1e-6 * exact[name].abs().max().clamp(min=1)
            assert (mine[name].double() - exact[name]).abs().max() <= limit * 1.01 + floor, name


@pytest.mark.parametrize("add", [False, True])
def test_nan_and_infinity_come_through(add):
    for value in (torch.nan, torch.inf):
        tensors = case((2, 40, 6, 6), torch.float32)
        tensors[0][1, 3, 2, 2] = value
        tensors[4][0, 5, 1, 1] = value
        tensors = there(tensors)
        mine, theirs = (results(tensors, add, True, name) for name in ("triton", "reference"))
        for name, want in theirs.items():
            assert torch.equal(mine[name].isfinite(), want.isfinite()), name
        assert mine["y"][:, 3].isnan().all() and not mine["y"][:, 4].isnan().any()


def test_frozen_weights_and_statistics_that_do_not_move():
    x, added, weight, bias, grad = there(case((2, 16, 6, 6), torch.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOKD_FAST_BACKEND", "triton")
        y = batch_norm(x, None, None, weight, bias, True, added=added.requires_grad_(), relu=True)
        y.backward(grad)
        with torch.no_grad():
            again = batch_norm(x, None, None, weight, bias, True, added=added, relu=True)
    assert torch.equal(y, again) and not again.requires_grad
    assert torch.equal(added.grad, grad.masked_fill(y <= 0, 0)) and weight.grad is None


def test_statistics_that_lie_apart_move_alone():
    x, _, weight, bias, _ = there(case((2, 16, 6, 6), torch.float32))
    found = []
    for backend in ("triton", "reference"):
        table = torch.ones(2, 32, device=DEVICE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOKD_FAST_BACKEND", backend)
            batch_norm(x, *table[:, ::2].unbind(), weight, bias, True)
        found.append(table)
    torch.testing.assert_close(*found)


def test_it_checks_as_an_operator_compiles_and_refuses_a_second_derivative():
    # Compiled, PyTorch moves the statistics: another rounding.
    close = {"rtol": 1e-6, "atol": 1e-7}
    assert_is_an_operator(there(case((2, 5, 3, 3), torch.float32)), "triton", close)


@pytest.mark.parametrize("add", [False, True])
def test_gradients_and_inputs_of_other_strides(add):
    """Expanded and sliced gradients, a map that begins between 16 bytes."""
    memory, added, weight, bias, _ = there(case((5, 16, 6, 6), torch.float16))
    flat = memory.permute(0, 2, 3, 1).flatten()
    x = flat[1 : 1 + 4 * 6 * 6 * 16].view(4, 6, 6, 16).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 and x.is_contiguous(memory_format=torch.channels_last)
    tensors = [x, added[1:], weight, bias]
    for grad in (weight.half()[:, None, None].expand(4, 16, 6, 6), memory[:4].contiguous()):
        assert_as_exact([*tensors, grad], add, True, "triton")


def test_what_is_chosen():
    x, _, weight, bias, _ = there(case((2, 16, 6, 6), torch.float16))
    assert explain("batch_norm", x, None, None, weight, bias, True).startswith("triton: chosen")
    said = explain("batch_norm", x, None, None, weight, bias)
    assert said.startswith("triton: can run, but its kernels are of training")
