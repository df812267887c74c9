"""prototype_loss: the same loss whichever way, and why the automatic choice takes which."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mokd_fast.ops import (
    LinearTarget,
    Target,
    WeightNormed,
    cpu,
    cross_view_pairs,
    distill,
    explain,
    linear_distill,
    linear_distill_cross_entropy,
    prototype_loss,
)
from mokd_fast.ops.dispatch import pick
from mokd_fast.ops.prototype_loss import OP, device_memory

MODULE = sys.modules["mokd_fast.ops.prototype_loss"]  # mokd_fast.ops has the function of that name
V, T, B, K, D = 4, 2, 3, 97, 16
WAYS = ("fused", "fused-linear", "reference")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("MOKD_FAST_BACKEND", raising=False)


def example(dtype=torch.float32):
    x, w, h = (
        F.normalize(torch.randn(s, dtype=dtype), dim=-1) for s in ((V, B, D), (K, D), (T, B, D))
    )
    pairs = cross_view_pairs(T, V)
    targets = [
        LinearTarget(pairs, h, w + 0.01, 0.04, torch.randn(K, dtype=torch.float32) / 10),
        Target(pairs, torch.randn(T, B, K, dtype=dtype), temperature=0.07, weight=0.3),
    ]
    return x.requires_grad_(), w.requires_grad_(), targets


def run(backend, x, w, targets):
    loss, terms = prototype_loss(x, w, targets, temperature=0.2, backend=backend)
    return loss.detach(), terms, *torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_way_is_the_same_loss(way, dtype):
    x, w, targets = example(dtype)
    loss, terms = linear_distill_cross_entropy(x, w, targets, temperature=0.2, backend="reference")
    want = loss.detach(), terms, *torch.autograd.grad(loss, (x, w))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for have, good in zip(run(way, x, w, targets), want, strict=True):
        assert have.dtype == good.dtype
        torch.testing.assert_close(have, good, rtol=tolerance, atol=tolerance * good.abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_products_are_autocasts(way):
    x, w, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        have = run(way, x, w, targets)
    want = run(way, x.detach().bfloat16().requires_grad_(), w, targets)
    torch.testing.assert_close(have[0], want[0], rtol=1e-3, atol=1e-3)
    assert have[2].dtype == have[3].dtype == torch.float32


def chosen(*args):
    return pick(OP, *args).name


def test_the_choice_and_its_reasons(monkeypatch):
    fp32, fp64 = example(), example(torch.float64)
    assert chosen(*fp32) == "fused"
    assert "fused-linear: can run, but so few logits are stored as well" in explain(OP, *fp32)
    monkeypatch.setattr(MODULE, "KEEP_BYTES", (V + T) * B * K * 4)
    assert chosen(*fp32) == "fused"
    monkeypatch.setattr(MODULE, "KEEP_BYTES", (V + T) * B * K * 4 - 1)
    assert chosen(*fp32) == "fused-linear"
    assert explain(OP, *fp32).splitlines() == [
        "fused: can run, but it was measured slower in fp32 on a CPU (bench/linear_distill.py)",
        "fused-linear: chosen",
        "reference: can run too",
    ]
    assert chosen(*fp64) == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(*fp32) == "fused"
        assert "fused-linear: can run, but storing was measured faster" in explain(OP, *fp32)
    # V and a gradient for each, and T of the one target whose logits are not there.
    size = (2 * V + T) * B * K * 8
    monkeypatch.setattr(MODULE, "device_memory", lambda *device: 16 * size)
    assert chosen(*fp64) == "fused"
    monkeypatch.setattr(MODULE, "device_memory", lambda *device: 16 * size - 1)
    assert chosen(*fp64) == "fused-linear"
    assert "fused: can run, but its logits take 2.17e-05 GiB, more than 1/16 of" in explain(
        OP, *fp64
    )
    assert chosen(*fp64[:2], fp64[2][1:]) == "fused"


@pytest.mark.skipif(cpu.fp32_why_not() is not None, reason="needs products of our own in fp32")
def test_a_weight_norm_that_the_product_makes_is_stored_in_fp32(monkeypatch):
    monkeypatch.setattr(MODULE, "KEEP_BYTES", 0)
    h = torch.randn(T, B, 32)
    for K, way in ((96, "fused"), (97, "fused-linear")):  # 97 rows are the library's
        normed = WeightNormed(torch.randn(K, 32), torch.ones(K, 1))
        rows = [LinearTarget(cross_view_pairs(T, V), h, torch.randn(K, 32))]
        for weight, chosen_way in ((normed, way), (normed.matrix(), "fused-linear")):
            args = torch.randn(V, B, 32), weight, rows
            assert chosen(*args) == chosen_way
            stored = "but storing was measured faster with a weight norm" in explain(OP, *args)
            assert stored == (chosen_way == "fused")


def test_the_memory_of_this_machine():
    assert 2**30 < device_memory("cpu", -1) < 2**50


def test_forced(monkeypatch):
    args, called = example(), []

    def watched(op, *args, backend=None):
        called.append((op, backend))
        return pick(op, *args, backend=backend)

    for module in (distill, linear_distill):
        monkeypatch.setattr(module, "pick", watched)
    expected = {
        "fused": ("distill_cross_entropy", None),
        "fused-linear": ("linear_distill_cross_entropy", None),
        "reference": ("linear_distill_cross_entropy", "reference"),
    }
    for way in WAYS:
        run(way, *args)
        assert called.pop() == expected[way] and not called
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    assert chosen(*args) == "reference"
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")  # of the operators below this one
    assert chosen(*args) == "fused"
    with pytest.raises(ValueError, match=r"backend=cpu .* it has fused, fused-linear, reference"):
        run("cpu", *args)


@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_compiles_whole(way, monkeypatch):
    """With the automatic choice in the graph."""
    monkeypatch.setattr(MODULE, "KEEP_BYTES", 0 if way == "fused-linear" else 1 << 20)
    x, w, targets = example()
    assert chosen(x, w, targets) == way

    def loss(x, w, tau):
        return prototype_loss(x, w, targets, temperature=tau)[0]

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tau = torch.tensor(0.2)
    torch.testing.assert_close(compiled(x, w, tau), loss(x, w, tau))


def test_bad_input():
    x, w, targets = example()
    with pytest.raises(ValueError, match=r"weight must be floating prototypes \[K, 16\]"):
        prototype_loss(x, w[:, :5], targets)
    with pytest.raises(ValueError, match="features must be floating"):
        prototype_loss(x[0], w, targets)
