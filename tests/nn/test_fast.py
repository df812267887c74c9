"""Library layers as they are fastest on the CPU: the same numbers, keys and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import nn

from mokd_fast.nn import Temperatures
from mokd_fast.nn.fast import Linear, compile_blocks, quicken
from mokd_fast.ops import onednn
from mokd_fast.train.networks import build
from tests.train.recipes import small

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not onednn.usable("cpu", torch.float32), reason="this torch has no oneDNN"
)


def layers(shape: tuple[int, ...], out: int, *, bias: bool = True) -> list[nn.Linear]:
    """One layer in fp64, fp32 and with oneDNN's products, with equal weights."""
    torch.manual_seed(0)
    exact = nn.Linear(shape[-1], out, bias=bias).double()
    plain = copy.deepcopy(exact).float()
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, "fp32")
    assert type(fast) is Linear
    return [exact, plain, fast]


def results(layer: nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    dtype = layer.weight.dtype
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad.to(dtype).expand_as(y))
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "out"), [((8, 197, 64), 128), ((1600, 128), 64), ((300, 192), 576), ((5, 64), 128)]
)
def test_error_is_no_larger_than_that_of_the_library(shape, out, bias, monkeypatch):
    calls = []
    monkeypatch.setattr(onednn, "_product", lambda *a, f=onednn._product: calls.append(1) or f(*a))
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], out)
    exact, plain, fast = (results(layer, x, grad) for layer in layers(shape, out, bias=bias))
    assert len(calls) == (3 if x.numel() * out >= onednn.ENOUGH else 0)
    for want, theirs, mine in zip(exact, plain, fast, strict=True):
        allowed = (theirs.double() - want).abs().max() + 1e-6 * want.abs().max()
        assert mine.is_contiguous() and (mine.double() - want).abs().max() <= allowed


@needs_onednn
def test_strides_and_what_needs_no_gradient():
    shape, out = (8, 197, 64), 128
    exact, _, fast = layers(shape, out)
    base = torch.randn(64, 197, 8).permute(2, 1, 0)  # not contiguous
    row = torch.randn(1, 1, out)  # expanded: stride 0
    for want, mine in zip(results(exact, base, row), results(fast, base, row), strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-4)
    wide = nn.Linear(1 << 13, 1 << 10)
    quicken(wide, CPU, "fp32")
    vector = torch.randn(1 << 13)  # no rows
    assert torch.equal(wide(vector), F.linear(vector, wide.weight, wide.bias))
    fast.requires_grad_(False).zero_grad()
    x = torch.randn(shape, requires_grad=True)
    fast(x).sum().backward()
    assert fast.weight.grad is None and x.grad is not None
    fast.requires_grad_(True).zero_grad()
    fast(x.detach()).sum().backward()
    assert fast.weight.grad is not None


def test_second_derivative_is_refused():
    *_, fast = layers((8, 197, 64), 128)
    x = torch.randn(8, 197, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_other_devices_dtypes_and_autocast_keep_the_library():
    *_, fast = layers((8, 197, 64), 128)
    x = torch.randn(8, 197, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), F.linear(x, fast.weight, fast.bias))
    twin = copy.deepcopy(fast).double()
    assert torch.equal(twin(x.double()), F.linear(x.double(), twin.weight, twin.bias))
    for device, precision in ((torch.device("cuda"), "fp32"), (CPU, "fp16")):
        model = nn.Sequential(nn.Linear(3, 3), Attention(8, 2))
        quicken(model, device, precision)
        assert type(model[0]) is nn.Linear and model[1].fused_attn


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_keeps_its_keys(precision):
    mokd = build(small("x"))
    keys = list(mokd.state_dict())
    quicken(mokd, CPU, precision)
    assert list(mokd.state_dict()) == keys
    kinds = {type(m) for m in mokd.modules()}
    assert (Linear in kinds) == (precision == "fp32") and (nn.Linear in kinds) == (
        precision == "bf16"
    )
    attentions = [m for m in mokd.modules() if isinstance(m, Attention)]
    assert attentions and all(m.fused_attn == (precision == "fp32") for m in attentions)


def test_attention_in_bf16_is_as_exact_as_the_fused_one():
    torch.manual_seed(0)
    exact = Attention(64, 4, qkv_bias=True).double()
    x = torch.randn(3, 50, 64)
    errors = {}
    for name in ("fused", "products"):
        model = copy.deepcopy(exact).float()
        if name == "products":
            quicken(model, CPU, "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().sum().backward()
        errors[name] = [
            (out.double() - exact(x.double())).abs().max().item(),
            model.qkv.weight.grad.isfinite().all().item(),
        ]
    assert errors["products"][1] and errors["products"][0] <= 1.5 * errors["fused"][0] + 1e-3


@pytest.mark.parametrize(("size", "stride", "kernel"), [(1, 2, 3), (2, 4, 5), (1, 3, 3), (4, 2, 3)])
def test_bf16_gradients_of_maps_smaller_than_the_stride(size, stride, kernel):
    """oneDNN alone leaves what was in memory before where a tap meets no pixel."""
    torch.manual_seed(0)
    exact = nn.Conv2d(64, 64, kernel, stride, kernel // 2).double()
    conv = copy.deepcopy(exact).float()
    quicken(conv, CPU, "bf16")
    assert list(conv.state_dict()) == list(exact.state_dict())
    x = torch.randn(8, 64, size, size)
    for _ in range(5):
        conv.zero_grad(), exact.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        junk = [torch.full((n,), 3e18) for n in (1 << 16, 36864, 18432, 102400)]
        del junk
        y.float().sum().backward()
        want = exact(x.double())
        want.sum().backward()
        torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.05)
        torch.testing.assert_close(
            conv.weight.grad.double(), exact.weight.grad, rtol=0.05, atol=0.3
        )


@needs_onednn
def test_matvec():
    matrix, vector = torch.randn(70000, 128), torch.randn(128)
    want = matrix.double() @ vector.double()
    torch.testing.assert_close(onednn.matvec(matrix, vector).double(), want, rtol=0, atol=1e-4)
    small_one = torch.randn(5, 3)
    assert torch.equal(onednn.matvec(small_one, vector[:3]), small_one @ vector[:3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_are_one_graph_and_not_compiled_again(precision, monkeypatch):
    """Whole blocks (fullgraph), oneDNN's products in them, and no graph after the first step."""
    import torch._dynamo.utils as dynamo

    monkeypatch.setattr(onednn, "ENOUGH", 1)
    monkeypatch.setattr(  # Inductor takes minutes for what is tested here: a slow test has it
        nn.Module, "compile",
        lambda self, f=nn.Module.compile, **k: f(self, backend="aot_eager", **k),
    )  # fmt: skip
    torch._dynamo.reset()
    models = [build(small("x")), build(small("x"))]
    models[1].load_state_dict(models[0].state_dict())
    for mokd in models:
        quicken(mokd, CPU, precision)
    assert compile_blocks(models[1]) == len(
        [m for m in models[1].modules() if type(m).__name__ == "Block"]
    )
    taus, found, graphs = [Temperatures(0.04, 0.04, 0.04)] * 2, [], []
    views = torch.randn(2, 4, 1, 28, 28), torch.randn(2, 4, 1, 14, 14)
    for mokd in models:
        mokd.train()
        for _ in range(2):
            mokd.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = mokd(*views, taus)
            torch.stack(out.totals).sum().backward()
            graphs.append(dynamo.counters["stats"]["unique_graphs"])
        found.append([*out.totals, *(p.grad for s in mokd.students for p in s.parameters())])
    assert graphs[2] > graphs[1] and graphs[3] == graphs[2]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.1, "atol": 0.02}
    for mine, theirs in zip(found[1], found[0], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, **tolerance)
