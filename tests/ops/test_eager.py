"""What `with_autograd` gives: kernels without torch.library's way, the gradients as that gives."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mokd_fast.ops import (
    Target,
    batch_norm,
    cpu,
    cross_view_pairs,
    distill_cross_entropy,
    feature_search,
    joint_attention,
    prototype_linear,
    self_attention,
    weight_norm,
)
from mokd_fast.ops.block import add_norm, mlp
from mokd_fast.ops.weight_norm import WeightNormed

BF16 = torch.bfloat16
needs_native = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {}


def operator(*inputs: Tensor) -> Callable[..., Callable[..., Tensor]]:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OPERATORS[function.__name__] = function, list(inputs)
        return function

    return add


torch.manual_seed(0)


@operator(torch.randn(64, 32), torch.rand(64, 1) + 0.5)
def weight_norm_(v: Tensor, g: Tensor) -> Tensor:
    return weight_norm(v, g, BF16)


@operator(torch.randn(2, 3, 64), torch.randn(64, 64), torch.rand(64, 1) + 0.5)
def prototype_linear_(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return prototype_linear(x, WeightNormed(v, g))


@operator(torch.randn(2, 3, 64), torch.randn(64, 64), torch.rand(64, 1) + 0.5)
def prototype_linear_bf16(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return prototype_linear(x, WeightNormed(v, g), BF16)


@operator(torch.randn(4, 2, 40))
def distill_cross_entropy_(student: Tensor) -> Tensor:
    teacher = torch.linspace(-1, 1, 160).view(2, 2, 40)
    loss, _ = distill_cross_entropy(student, [Target(cross_view_pairs(2, 4), teacher)])
    return loss


@operator(torch.randn(2, 9, 3, 2, 32).to(BF16))
def self_attention_(qkv: Tensor) -> Tensor:
    return self_attention(qkv)


@operator(torch.randn(2, 3, 2, 32), torch.randn(3, 2, 9, 32), torch.randn(3, 2, 9, 32))
def feature_search_(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return feature_search(query, key, value, backend="cpu")  # type: ignore[return-value]


@operator(torch.randn(4, 5, 5, 32).movedim(3, 1), torch.rand(32) + 0.5, torch.randn(32))
def batch_norm_(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(x, None, None, weight, bias, training=True, relu=True)


@operator(torch.randn(2, 9, 32), torch.randn(2, 9, 32).to(BF16), torch.ones(32), torch.zeros(32))
def add_norm_(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    sums, normed = add_norm(x, y, weight, bias, 1e-5, BF16)
    return torch.cat([sums, normed.float()])


@operator(
    torch.randn(1024, 64).to(BF16),  # fewer rows are PyTorch's
    torch.randn(256, 64).to(BF16) / 8,
    torch.randn(256).to(BF16),
    torch.randn(64, 256).to(BF16) / 16,
    torch.randn(64).to(BF16),
)
def mlp_(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return mlp(x, (w1, b1), (w2, b2))


def gradients(name: str, change: Callable[[Tensor], Tensor] = lambda grad: grad) -> list[Tensor]:
    function, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, change(grad))]


@needs_native
@pytest.mark.parametrize("name", OPERATORS)
def test_the_sign_of_a_negative_gradient_counts(name):
    """Its memory holds the opposite, and a kernel reads memory."""
    found = gradients(name, lambda grad: torch._neg_view(-grad))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(name), strict=True))


class Seen(TorchDispatchMode):
    """Nothing is changed, but operators must be called to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **kwargs or {})


@needs_native
@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("add_norm_", "mlp_")])
def test_the_operator_gives_the_same_bits(name):
    with Seen() as seen:
        theirs = gradients(name)
    called = {n for n in seen.names if n.startswith("mokd_fast.") and "backward" in n}
    left = {"self_attention_": cpu.bf16_why_not(), "prototype_linear_bf16": cpu.bf16_why_not()}
    assert called or (left | {"prototype_linear_": cpu.fp32_why_not()}).get(name)
    assert all(torch.equal(a, b) for a, b in zip(theirs, gradients(name), strict=True))


class Cut(torch.autograd.Function):
    """Gives no gradient: the operator before it is called without one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@needs_native
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_gradient_stays_none(name, seen):
    """By the operator of torch.library as well. What has a Function of its own may make zeros."""
    function, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with Seen() if seen else nullcontext():
        for create in (False, True):
            Cut.apply(function(*leaves)).sum().backward(create_graph=create)
    if name in ("add_norm_", "mlp_"):
        assert not any(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
    else:
        assert all(leaf.grad is None for leaf in leaves)


@needs_native
@pytest.mark.parametrize("which", [0, 1])
def test_of_two_results_one_may_be_without_a_gradient(which):
    tokens = [torch.randn(2, 1, 5, 16, requires_grad=True) for _ in range(3)]
    queries = [torch.randn(3, 2, 1, 16, requires_grad=True) for _ in range(3)]
    leaves = [*tokens, *queries]

    def found(backend: str) -> tuple[Tensor, ...]:
        result = joint_attention(*leaves, backend=backend)[which]
        return torch.autograd.grad(result.square().sum(), leaves, materialize_grads=True)

    for mine, want in zip(found("cpu"), found("reference"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
