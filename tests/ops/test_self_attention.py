"""self_attention: the bf16 kernel against fp64 and against PyTorch's own ways."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from mokd_fast.ops import cpu, explain, self_attention
from mokd_fast.ops.self_attention import _backward, _forward

needs_kernel = pytest.mark.skipif(cpu.bf16_why_not() is not None, reason=str(cpu.bf16_why_not()))
SHAPES = [  # B, N, H, d
    (2, 197, 3, 64),
    (5, 37, 2, 64),
    (1, 1, 1, 16),
    (3, 2, 1, 32),
    (2, 25, 2, 48),
    (1, 130, 1, 128),
    (2, 64, 2, 16),
    (1, 300, 2, 80),
]


def given(B: int, N: int, H: int, d: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(B + N + H + d)
    return spread * torch.randn(B, N, 3, H, d).bfloat16(), torch.randn(B, N, H, d).bfloat16()


def products(qkv: Tensor) -> Tensor:
    """As timm writes it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v).transpose(1, 2)


def results(attend, qkv: Tensor, grad: Tensor) -> list[Tensor]:
    qkv = qkv.clone().requires_grad_()
    out = attend(qkv)
    out.backward(grad.to(out.dtype))
    return [out.detach(), qkv.grad]


def kernel(qkv: Tensor) -> Tensor:
    return self_attention(qkv, backend="cpu")


@needs_kernel
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_no_larger_than_that_of_products(shape, spread):
    qkv, grad = given(*shape, spread)
    exact = results(products, qkv.double(), grad.double())
    mine, theirs = results(kernel, qkv, grad), results(products, qkv, grad)
    for want, got, other in zip(exact, mine, theirs, strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == other.shape and got.is_contiguous()
        error, allowed = (got.double() - want).norm(), (other.double() - want).norm()
        # A bf16 result alone is 0.0017 off; the products' gradient of one token is exactly 0.
        assert error <= max(allowed, 3e-3 * want.norm(), 1e-3)
    rows = mine[1].double().sum(1)  # what is added to all keys changes nothing: sum_n dk = 0
    assert rows[:, 1].abs().max() <= 0.02 * mine[1][:, :, 1].abs().sum(1).max() + 1e-3


@needs_kernel
def test_every_backend_and_a_scale_of_ones_own():
    qkv, _ = given(2, 33, 2, 32)
    for scale in (None, 0.5):
        want = self_attention(qkv.double(), scale=scale, backend="reference")
        for backend in ("cpu", "sdpa", "reference", None):
            found = self_attention(qkv, scale=scale, backend=backend)
            torch.testing.assert_close(found.double(), want, rtol=0.02, atol=0.02)
    same = self_attention(qkv.double(), backend="sdpa")
    torch.testing.assert_close(same, self_attention(qkv.double(), backend="reference"))


@needs_kernel
def test_bits_do_not_depend_on_the_thread_count():
    qkv, grad = given(3, 50, 3, 32)
    want = results(kernel, qkv, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(kernel, qkv, grad), want))
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_strides_expanded_gradients_and_no_images():
    qkv, grad = given(4, 20, 2, 32)
    want = results(kernel, qkv, grad)
    apart = torch.stack([qkv, qkv], -1)[..., 0]
    assert not apart.is_contiguous() and torch.equal(kernel(apart), want[0])
    wide = torch.randn(4, 20, 3 * 64 + 1).bfloat16()
    shifted = wide[..., 1:].unflatten(-1, (3, 2, 32))  # addresses of odd numbers
    assert torch.equal(kernel(shifted), kernel(shifted.contiguous()))
    flat = torch.ones(1, 1, 1, 1).bfloat16().expand(4, 20, 2, 32)
    expanded, full = results(kernel, qkv, flat), results(kernel, qkv, flat.contiguous())
    assert torch.equal(expanded[1], full[1])
    none = torch.empty(0, 20, 3, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    kernel(none).sum().backward()
    assert none.grad.shape == none.shape


@needs_kernel
def test_nan_and_infinity_come_through():
    qkv, grad = given(3, 40, 2, 16)
    qkv[0, 7, 0, 1, 3] = torch.nan  # a query: its own row alone
    qkv[1, 8, 1, 0, 2] = torch.nan  # a key: all rows of its head
    qkv[2, 9, 2, 1, 5] = torch.inf  # a value: one column
    mine, want = kernel(qkv), products(qkv.double())
    assert torch.equal(mine.isnan(), want.isnan())
    assert torch.equal(mine.isinf(), want.isinf())
    assert results(kernel, qkv, grad)[1][0, 7, 0, 1].isnan().all()
    large = torch.full((1, 17, 3, 1, 16), 1e4).bfloat16()  # scores of 4e8
    assert torch.equal(kernel(large), large[:, :, 2])
    # Backward too: shares of rows whose scores are known to a few units in 2^28 stay below 1.
    grad = torch.randn(1, 17, 1, 16).bfloat16()
    for qkv in (large, 1e4 * torch.randn(large.shape).bfloat16()):
        _, found = results(kernel, qkv, grad)
        assert found[:, :, 2].abs().sum() <= 17 * 1.01 * grad.float().abs().sum()


GROUPS = [(2, 9), (5, 3), (1, 40)]


@needs_kernel
def test_groups_are_each_by_itself():
    qkv = torch.randn(73, 3, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(73, 2, 32).bfloat16()

    def alone(qkv: Tensor, **options) -> Tensor:
        parts = zip(qkv.split([18, 15, 40]), GROUPS, strict=True)
        found = [self_attention(part.unflatten(0, size), **options) for part, size in parts]
        return torch.cat([part.flatten(0, 1) for part in found])

    for backend in ("cpu", "sdpa", "reference"):
        want = results(lambda x: alone(x, scale=0.3, backend=backend), qkv, grad)  # noqa: B023
        got = results(
            lambda x: self_attention(x, groups=GROUPS, scale=0.3, backend=backend),  # noqa: B023
            qkv, grad,
        )  # fmt: skip
        assert all(map(torch.equal, got, want)), backend
    assert got[0].shape == (73, 2, 32)
    whole = torch.compile(self_attention, fullgraph=True, backend="aot_eager")
    found = results(lambda x: whole(x, groups=GROUPS), qkv, grad)
    assert all(map(torch.equal, found, results(alone, qkv, grad)))


@needs_kernel
def test_a_group_without_images():
    qkv = torch.randn(18, 3, 2, 32).bfloat16()
    for backend in ("cpu", "sdpa", "reference"):
        found = self_attention(qkv, groups=[(0, 4), (2, 9), (0, 7)], backend=backend)
        assert torch.equal(found, self_attention(qkv, groups=[(2, 9)], backend=backend))
    assert self_attention(qkv[:0], groups=[(0, 4)]).shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups is empty"),
        ([(2, 9), (5, 3)], r"groups have 33 tokens, qkv \[73, 3, 2, 32\] has 73"),
        ([(2, 9), (5, 0)], r"pairs \(B, N\) of B >= 0 and N >= 1, got \(5, 0\)"),
        ([(2, 9), (-5, 11)], r"pairs .*got \(-5, 11\)"),
        ([(2, 9, 5, 11)], r"pairs .*got \(2, 9, 5, 11\)"),
        ([73, 1], "pairs .*got 73"),
        ([(7.3, 10)], r"pairs .*got \(7.3, 10\)"),
        (torch.tensor([[1, 73]]), r"pairs .*got tensor"),
    ],
)
def test_groups_that_are_not_the_tokens(groups, message):
    with pytest.raises(ValueError, match=message):
        self_attention(torch.zeros(73, 3, 2, 32), groups=groups)
    with pytest.raises(ValueError, match=r"\[S, 3, H, d\].*got"):
        self_attention(torch.zeros(2, 9, 3, 2, 32), groups=[(2, 9)])


@needs_kernel
def test_autograd_twice_autocast_and_default_dtype():
    qkv, grad = given(2, 21, 2, 32)
    want = results(kernel, qkv, grad)
    x = qkv.clone().requires_grad_()
    out = kernel(x)
    out.backward(grad, retain_graph=True)
    out.backward(grad)
    torch.testing.assert_close(x.grad, 2 * want[1])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, results(kernel, qkv, grad), want))
    finally:
        torch.set_default_dtype(torch.float32)
    (first,) = torch.autograd.grad(kernel(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="self_attention has no second derivative"):
        first.sum().backward()


@needs_kernel
def test_operators_are_sound_and_compile_whole():
    qkv, grad = given(2, 9, 2, 16)
    for sizes, x in ([], qkv), ([1, 9, 3, 3], qkv.flatten(0, 1)):
        torch.library.opcheck(_forward, (x.clone().requires_grad_(), sizes, 0.25))
        out, stats = _forward(x, sizes, 0.25)
        torch.library.opcheck(_backward, (grad.view_as(out), x, out, stats, sizes, 0.25))
    whole = torch.compile(self_attention, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(whole, qkv, grad), results(kernel, qkv, grad)))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_of_the_plain_ways(backend):
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: self_attention(x, backend=backend), qkv)


def test_what_the_kernel_does_not_take(monkeypatch):
    qkv, _ = given(1, 5, 2, 16)
    if cpu.bf16_why_not() is None:
        assert explain("self_attention", qkv).startswith("cpu: chosen")
    assert "takes bf16" in explain("self_attention", qkv.float())
    assert "takes bf16" in explain("self_attention", qkv[0].float(), groups=[(1, 5)])
    assert "whole vectors" in explain("self_attention", qkv[..., :12])
    assert "scale of 0 or more" in explain("self_attention", qkv, scale=-1.0)
    below = self_attention(qkv.double(), scale=-0.5, backend="reference")
    torch.testing.assert_close(
        self_attention(qkv, scale=-0.5).double(), below, rtol=0.05, atol=0.02
    )
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", "v3")
    if cpu.native is not None:
        assert "MOKD_FAST_CPU_LEVEL=v3" in explain("self_attention", qkv)
    with pytest.raises(RuntimeError, match="backend=cpu was asked for but"):
        self_attention(qkv, backend="cpu")
    self_attention(qkv)  # by another backend


@pytest.mark.parametrize(
    "qkv",
    [
        torch.zeros(2, 5, 3, 16),
        torch.zeros(2, 5, 2, 1, 16),
        torch.zeros(2, 0, 3, 1, 16),
        torch.zeros(2, 5, 3, 1, 16, dtype=torch.int32),
    ],
)
def test_bad_input_is_named(qkv):
    with pytest.raises(ValueError, match=r"qkv must be floating \[B, N, 3, H, d\].*got"):
        self_attention(qkv)


def _child(qkv: Tensor, queue) -> None:
    torch.set_num_threads(1)
    queue.put(kernel(qkv).float().numpy())


@needs_kernel
def test_in_a_forked_child():
    qkv, _ = given(2, 30, 2, 32)
    want = kernel(qkv)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(qkv, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    assert torch.equal(torch.from_numpy(found), want.float())
