"""Values of the Triton weight_norm: run by test_triton.py, interpreted or on a GPU."""

import pytest
import torch

from mokd_fast.ops import explain, weight_norm
from mokd_fast.ops.weight_norm import _backward, _forward
from tests.ops.test_weight_norm import HALVES, SHAPES, check, inputs, results

from .interpreter import _bfloat16_rounds_to_nearest, _quick  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "triton")


def there(*tensors):
    return [t.to(DEVICE) for t in tensors]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("K", "D"), [*SHAPES, (5, 0), (3000, 1), (2, 8192)])
def test_error_is_no_larger_than_that_of_the_library(K, D, dtype, monkeypatch):
    v, g = inputs(K, D)
    check(*there(v, g, torch.randn(K, D).to(dtype)), dtype, monkeypatch)


def test_rows_of_zeros_of_nan_and_of_large_and_small_numbers():
    v, g = there(*inputs(6, 40))
    v[0], v[1, 3], v[2], v[3], v[4] = 0, torch.nan, v[2] * 1e15, v[3] * 1e-15, v[4] * 1e-20
    grad = torch.ones(6, 40, dtype=BF16, device=DEVICE)
    exact, found = results(v.double(), g.double(), grad, None), results(v, g, grad, BF16)
    for part in (*exact, *found):
        assert part[:2].isnan().all()
    torch.testing.assert_close(found[0][2:].double(), exact[0][2:], rtol=2**-7, atol=0)
    for mine, want in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine[[2, 3, 5]].double(), want[[2, 3, 5]], rtol=1e-4, atol=0)


def test_bits_do_not_depend_on_strides_or_signs_in_memory():
    v, g = there(*inputs(100, 72))
    grad = torch.randn(72, 100, dtype=BF16).to(DEVICE).t()
    first = results(v, g, grad, BF16)
    assert same(first, results(v, g, grad, BF16))
    assert same(first, results(v.t().contiguous().t(), g, grad.contiguous(), BF16))
    wide = torch.cat([v, v], 1)[:, 3:75]  # its rows lie apart, and not on 16 bytes
    assert same(results(wide, g, grad, BF16), results(wide.contiguous(), g, grad, BF16))
    row = torch.ones(1, 1, dtype=BF16, device=DEVICE).expand(100, 72)  # stride 0
    assert same(results(v, g, row, BF16), results(v, g, row.contiguous(), BF16))
    opposite = torch._neg_view(-v), torch._neg_view(-g), torch._neg_view(-grad)
    assert torch.equal(weight_norm(*opposite[:2], BF16), first[0])
    leaves = [t.clone().requires_grad_() for t in (v, g)]
    found = torch.autograd.grad(weight_norm(*leaves, BF16), leaves, opposite[2])
    assert same(found, first[1:])


def test_it_checks_as_an_operator_compiles_and_refuses_a_second_derivative():
    v, g = (t.requires_grad_() for t in there(*inputs(6, 20)))
    torch.library.opcheck(_forward, (v, g, BF16, "triton"))
    grad, norms = there(torch.randn(6, 20).bfloat16(), torch.rand(6))
    call = grad, v.detach(), g.detach(), norms, "triton"
    torch.library.opcheck(_backward, call)
    loss = weight_norm(v, g, BF16).float().square().sum()
    (first,) = torch.autograd.grad(loss, v, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        first.sum().backward()
    compiled = torch.compile(weight_norm, fullgraph=True, backend="aot_eager")
    whole, eager = (f(v, g, BF16) for f in (compiled, weight_norm))
    grads = [torch.autograd.grad(w, (v, g), grad) for w in (whole, eager)]
    assert torch.equal(whole, eager) and same(*grads)


def test_what_it_takes(monkeypatch):
    v, g = there(*inputs(4, 8))
    assert torch.equal(weight_norm(v, g), torch._weight_norm(v, g, 0))  # no reason to fail
    assert weight_norm(v.double(), g.double(), BF16).dtype == BF16
    plain = weight_norm(v, g, torch.float16)
    with torch.autocast(DEVICE, BF16):
        assert torch.equal(weight_norm(v, g, torch.float16), plain)
    frozen = weight_norm(v.requires_grad_(), g, BF16)  # g = 1, DINO's
    frozen.float().sum().backward()
    assert v.grad is not None and g.grad is None
    long = torch.ones(2, 8193, device=DEVICE)
    with pytest.raises(RuntimeError, match="it takes rows of 8192 numbers at most"):
        weight_norm(long, long[:, :1], BF16)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda v, g: weight_norm(v, g, BF16))(v[None], g[None])
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    assert explain("weight_norm", v, g, BF16).startswith("triton: chosen")
    assert "reference: chosen" in explain("weight_norm", v, g)
    assert weight_norm(long, long[:, :1], BF16).dtype == BF16
    torch.func.vmap(lambda v, g: weight_norm(v, g, BF16))(v[None], g[None])
