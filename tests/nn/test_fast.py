"""Library layers as they are fastest on the CPU: the same numbers, keys and gradients."""

import copy
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from mokd_fast.nn import Temperatures, blocks, fast, heads
from mokd_fast.nn.blocks import Block, Linear, Mlp
from mokd_fast.nn.fast import FEW, MANY, Conv2d, compile_blocks, quicken
from mokd_fast.nn.heads import THead
from mokd_fast.ops import block, cpu, ema_update_, onednn
from mokd_fast.train.networks import build
from tests.train.recipes import small

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not onednn.usable("cpu", torch.float32), reason="this torch has no oneDNN"
)

needs_bf16 = pytest.mark.skipif(
    cpu.native is None or not onednn.usable("cpu", torch.bfloat16),
    reason="the native module and oneDNN's products of bf16 are needed",
)


@pytest.fixture(autouse=True)
def _seed():  # errors are held against those of a library: not by another draw each time
    torch.manual_seed(0)


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
    assert Linear in kinds and Conv2d in kinds and nn.Linear not in kinds
    assert all(m.groups > 1 for m in mokd.modules() if type(m) is nn.Conv2d)
    attentions = [m for m in mokd.modules() if isinstance(m, Attention)]
    assert attentions and all(m.fused_attn == (precision == "fp32") for m in attentions)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"gated": True}, {"attn_drop": 0.1}])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_in_bf16_is_as_exact_as_the_fused_one(options, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(fast.cpu, "bf16_why_not", lambda: "this processor has none")
    calls = []
    attend = blocks.self_attention
    monkeypatch.setattr(
        blocks, "self_attention", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    torch.manual_seed(0)
    exact = Attention(64, 4, qkv_bias=True, norm_layer=nn.LayerNorm, **options).double()
    x = torch.randn(3, 50, 64)
    errors = {}
    for name in ("fused", "quick"):
        model = copy.deepcopy(exact).float()
        if name == "quick":
            quicken(model, CPU, "bf16")
            assert isinstance(model, blocks.Attention) == (fast.cpu.bf16_why_not() is None)
        if "attn_drop" in options:
            model.eval(), exact.eval()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().sum().backward()
        errors[name] = [
            (out.double() - exact(x.double())).abs().max().item(),
            model.qkv.weight.grad.isfinite().all().item(),
        ]
    assert errors["quick"][1] and errors["quick"][0] <= 1.5 * errors["fused"][0] + 1e-3
    plain = isinstance(model, blocks.Attention) and not set(options) & {"qk_norm", "gated"}
    assert len(calls) == plain
    if plain:  # what timm's attention knows beside is timm's
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(x, torch.zeros(50, 50), is_causal=False), model(x, is_causal=True)
            assert len(calls) == 1
            model(x, attn_mask=None, is_causal=False)
        assert len(calls) == 1 + ("attn_drop" not in options)


@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize(("size", "stride", "kernel"), [(1, 2, 3), (2, 4, 5), (1, 3, 3), (4, 2, 3)])
def test_bf16_gradients_of_maps_smaller_than_the_stride(size, stride, kernel, groups):
    """oneDNN alone leaves what was in memory before where a tap meets no pixel."""
    torch.manual_seed(0)
    exact = nn.Conv2d(64, 64, kernel, stride, kernel // 2, groups=groups).double()
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


# (images, in, out, map, kernel, stride, padding), and whether it is a product.
CONVOLUTIONS = [
    ((4, 256, 256, (5, 4), 1, 1, 0), True),
    ((4, 256, 256, (5, 4), 1, 2, 0), True),
    ((2, 64, 128, (7, 3), 3, 1, 1), True),
    ((3, 128, 64, (6, 5), 3, 2, 1), True),
    ((2, 32, 160, (9, 8), (5, 3), (3, 1), (2, 1)), True),
    ((5, 96, 96, (2, 2), 3, 3, 1), True),  # a map smaller than the stride
    ((2, 256, 256, (3, 3), 1, 1, 1), True),  # padded though it has one tap
    ((8, 512, 512, (5, 4), 1, 1, 0), True),  # these two by oneDNN
    ((4, 128, 512, (6, 5), 3, 2, 1), True),
    ((4, 64, 64, (3, 3), 3, 1, 1), False),  # few weights
    ((8, 64, 128, (12, 12), 3, 1, 1), False),  # many windows
]


def convolution(case, precision: str, *, bias: bool = False) -> list[nn.Conv2d]:
    """One layer in fp64, in fp32, and as it is fastest."""
    torch.manual_seed(0)
    _, channels, out, _, kernel, stride, padding = case
    exact = nn.Conv2d(channels, out, kernel, stride, padding, bias=bias).double()
    plain = copy.deepcopy(exact).float().to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, precision)
    assert type(fast) is Conv2d
    return [exact, plain, fast]


def through(conv: nn.Conv2d, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    x = x.to(conv.weight.dtype, memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    return [y.detach(), x.grad, *(p.grad for p in conv.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("case", "product"), CONVOLUTIONS)
def test_convolution_as_a_product(case, product, bias, precision, monkeypatch):
    calls, own = [], Conv2d._product
    monkeypatch.setattr(Conv2d, "_product", lambda *a: calls.append(1) or own(*a))
    exact, plain, fast = convolution(case, precision, bias=bias)
    x = torch.randn(case[0], case[1], *case[3])
    want = through(exact, x, False)
    autocast = precision == "bf16"
    mine, theirs = through(fast, x, autocast), through(plain, x, autocast)
    assert len(calls) == product
    for got, other, right in zip(mine, theirs, want, strict=True):
        assert got.shape == right.shape and got.dtype == other.dtype
        # Where the library reads what was in memory (Conv2d says when) it is no measure.
        allowed = min(0.02 * right.abs().max(), (other.double() - right).abs().max().nan_to_num(9))
        assert (got.double() - right).abs().max() <= 1.5 * allowed + 3e-6 * right.abs().max()


@needs_onednn
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_product_of_onednn_can_change_in_place_and_needs_no_gradient(precision, monkeypatch):
    calls = []
    monkeypatch.setattr(onednn, "_product", lambda *a, f=onednn._product: calls.append(1) or f(*a))
    case = (8, 512, 512, (5, 4), 1, 1, 0)
    exact, _, fast = convolution(case, precision, bias=True)
    x = torch.randn(8, 512, 5, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = F.relu(fast(last), inplace=True)  # as a network without BatchNorm has it
        with torch.no_grad():
            teacher = F.relu(fast(last), inplace=True)
    assert len(calls) == (2 if precision == "fp32" else onednn.usable("cpu", torch.bfloat16))
    found.float().sum().backward()
    want = exact(x.double()).relu()
    want.sum().backward()
    pairs, tolerance = [(found, want), (teacher, want)], 1e-2
    if precision == "fp32":  # in bf16 another few pass the ReLU
        pairs, tolerance = [*pairs, (fast.weight.grad, exact.weight.grad)], 1e-5
    for got, right in pairs:
        assert (got.double() - right).abs().max() <= tolerance * right.abs().max()
    linear = layers((8, 197, 64), 128)[2]
    F.relu(linear(torch.randn(8, 197, 64)), inplace=True).sum().backward()


def test_without_bf16_products_the_library_is_taken(monkeypatch):
    """oneDNN has none for processors before AVX-512."""
    monkeypatch.setattr(onednn, "_takes_bf16", lambda: False)
    monkeypatch.setattr(onednn, "linear", None)
    assert not onednn.usable("cpu", torch.bfloat16) and onednn.usable("cpu", torch.float32)
    layer = nn.Linear(64, 256)
    quicken(layer, CPU, "bf16")
    x = torch.randn(1024, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_convolutions_compile_whole():
    for case, _ in CONVOLUTIONS[2:5]:
        _, _, fast = convolution(case, "fp32")
        x = torch.randn(case[0], case[1], *case[3]).to(memory_format=torch.channels_last)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), fast(x))


def test_windows_and_their_gradient():
    exact, _, fast = convolution((2, 64, 128, (7, 3), 3, 2, 1), "fp32")
    fast.double()
    x = torch.randn(2, 64, 7, 3)
    for got, want in zip(through(fast, x, False), through(exact, x, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_which_convolutions_stay():
    assert FEW == 4096 and MANY == 65536
    plain = nn.Conv2d(256, 256, 1, bias=False)
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, "fp32")
    x = torch.randn(2, 256, 5, 5)  # not channels_last
    assert torch.equal(fast(x), plain(x)) and fast(x).is_contiguous()
    assert fast(x[:0].contiguous(memory_format=torch.channels_last)).shape == (0, 256, 5, 5)
    assert fast(x[0]).shape == (256, 5, 5)  # unbatched
    apart = nn.Conv2d(512, 512, 3, padding=1, groups=4)  # few windows, many weights
    twin = copy.deepcopy(apart)
    quicken(apart, CPU, "fp32")
    rows = torch.randn(2, 512, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(apart(rows), twin(rows))
    patches = nn.Conv2d(1, 768, 16, 16)
    quicken(patches, CPU, "fp32")
    found = patches(torch.randn(2, 1, 32, 32))  # of both layouts
    assert found.is_contiguous()
    with pytest.raises(RuntimeError, match="to have 256 channels, but got 3"):
        fast(x[:, :3].contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input"):
        convolution((1, 64, 128, (1, 1), 3, 1, 0), "fp32")[2](torch.randn(1, 64, 2, 2))
    for kept in (
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ):
        quicken(kept, CPU, "bf16")
        assert type(kept) is nn.Conv2d


def test_linear_layers_without_gradient_in_bf16():
    """Teachers: the bias comes with the product, so that it is rounded once."""
    exact, plain, fast = layers((8, 197, 64), 128)
    x = torch.randn(8, 197, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fast(x), plain(x)
    want = exact(x.double())
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - want).abs().max() <= (theirs.double() - want).abs().max() * 1.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_are_one_graph_and_not_compiled_again(precision, monkeypatch):
    """Whole blocks (fullgraph), oneDNN's products in them, and no graph after the first step."""
    import torch._dynamo.utils as dynamo

    monkeypatch.setattr(onednn, "ENOUGH", 1)
    # What runs uncompiled is then the library's blocks, as what is compiled.
    monkeypatch.setattr(blocks, "half_precision", lambda x: False)
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
        [m for m in models[1].modules() if isinstance(m, TimmBlock)]
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("search", ["joint", "cross"])
def test_compiled_searches_are_the_plain_ones(search, backend, monkeypatch):
    """What lies between attentions, where products are not oneDNN's, as on a GPU: few graphs, in
    groups too, none after the first search, none where oneDNN is."""
    import torch._dynamo.utils as dynamo

    def graphs() -> int:
        return dynamo.counters["stats"]["unique_graphs"]

    monkeypatch.setattr(
        nn.Module, "compile",
        lambda self, f=nn.Module.compile, **k: f(self, backend=backend, **k),
    )  # fmt: skip
    torch._dynamo.reset()
    plain = THead(20, 8, dim=48, grid=(4, 4), stem=True, heads=3, search=search)
    head = copy.deepcopy(plain)
    assert compile_blocks(head) == 3 and head.state_dict().keys() == plain.state_dict().keys()
    before = graphs()
    if onednn.usable("cpu", torch.float32):
        with torch.no_grad():
            args = torch.randn(4, 16, 20), (4, 4), torch.randn(2, 4, 48)
            assert torch.equal(head.search(*args), plain.search(*args)) and graphs() == before
    monkeypatch.setattr(onednn, "usable", lambda *_: False)
    # Room for three of four images: two and two, so that each size there is is compiled once.
    monkeypatch.setitem(heads.GROUP, "cpu", 3 * 2 * 16 * 48 * 4)
    # Joint: products of tokens, queries and both, the rest of the first two blocks and of the last.
    # Cross: products of tokens, the last block's of those and of queries; the rest of both.
    for made in (5, 0):
        before = graphs()
        args = torch.randn(4, 16, 20), (4, 4), torch.randn(2, 4, 48)
        with torch.no_grad():
            found = head.search(*args)
            torch.testing.assert_close(found, plain.search(*args), rtol=1e-5, atol=1e-6)
        assert graphs() == before + made
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(head.search(*args), plain.search(*args), rtol=0, atol=0.02)
    nothing = args[2][:0]
    assert head.search(*args[:2], nothing).shape == (0, 4, 48)
    grads = []
    for one in (head, plain):
        one.search(*args).square().sum().backward()
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def vit_blocks(**options) -> list[nn.Sequential]:
    """Blocks in fp64, as timm has them, and quickened, with equal weights."""
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    made = (TimmBlock(64, 2, qkv_bias=True, norm_layer=norm, **options) for _ in range(2))
    exact = nn.Sequential(*made).double()
    plain = copy.deepcopy(exact).float()
    fast = copy.deepcopy(plain)
    quicken(fast, CPU, "bf16")
    return [exact, plain, fast]


def trained(model: nn.Module, inputs: list[torch.Tensor], *, autocast: bool) -> list[torch.Tensor]:
    dtype, found = next(model.parameters()).dtype, []
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), onednn.copies_kept():
        given = [x.to(dtype).requires_grad_() for x in inputs]
        found = [model(x) for x in given]
    sum(y.square().sum() for y in found).backward()
    return [
        *(y.detach() for y in found),
        *(x.grad for x in given),
        *(p.grad for p in model.parameters()),
    ]


@needs_bf16
@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"proj_bias": False}])
def test_blocks_in_bf16_are_as_exact_as_the_library(options, monkeypatch):
    monkeypatch.setattr(onednn, "ENOUGH", 1)
    calls, own = [], block._Mlp.apply
    monkeypatch.setattr(block._Mlp, "apply", lambda *a: calls.append(1) or own(*a))
    exact, plain, fast = vit_blocks(**options)
    assert all(type(b) is Block and type(b.mlp) is Mlp for b in fast)
    inputs = [torch.randn(3, 50, 64), torch.randn(5, 17, 64)]
    want = trained(exact, inputs, autocast=False)
    theirs, mine = (trained(m, inputs, autocast=True) for m in (plain, fast))
    assert len(calls) == 4
    ratios = []
    for got, other, right in zip(mine, theirs, want, strict=True):
        assert got.dtype == other.dtype == torch.float32
        ratios.append(((got - right).norm() / (other - right).norm()).item())
    # Of one tensor of 64 numbers that is chance: of them all it is not.
    assert max(ratios) <= 1.5 and statistics.geometric_mean(ratios) <= 1.03
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        teacher = fast(inputs[0])
        assert (teacher.double() - want[0]).norm() <= 1.15 * (theirs[0].double() - want[0]).norm()


@needs_bf16
@pytest.mark.parametrize("case", ["fp64", "norm", "layers"])
def test_blocks_that_are_the_librarys(case):
    """Of another dtype, another norm, another attention."""
    torch.manual_seed(0)
    block = TimmBlock(64, 2, qkv_bias=True)
    if case == "norm":
        block.norm1 = nn.LayerNorm((20, 64))
    if case == "layers":
        block.attn = nn.Identity()
        block.attn.forward = lambda x, **_: x.float()  # which timm gives fp32
    plain, x = copy.deepcopy(block), torch.randn(2, 20, 64)
    if case == "fp64":
        block, plain, x = block.double(), plain.double(), x.double()
    quicken(block, CPU, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x), plain(x), rtol=0.02, atol=0.05)


@needs_bf16
def test_hooks_on_the_parts_of_a_block_are_called():
    block = TimmBlock(64, 2, qkv_bias=True)
    quicken(block, CPU, "bf16")
    names = ["norm1", "norm2", "attn", "attn.attn_drop", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"]
    called = []
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 20, 64))
    assert sorted(called) == sorted(names)


def test_blocks_with_drops_and_checkpoints(monkeypatch):
    monkeypatch.setattr(onednn, "ENOUGH", 1)
    x = torch.randn(6, 10, 64)
    for options in ({"drop_path": 0.5}, {"proj_drop": 0.5}):
        _, plain, fast = vit_blocks(**options)
        found = []
        for model in (plain, fast):
            torch.manual_seed(1)
            found.append(trained(model, [x], autocast=True)[0])
        torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.05)
    _, _, fast = vit_blocks()
    cut = copy.deepcopy(fast)
    kept = trained(fast, [x], autocast=True)
    cut.forward = lambda x: checkpoint_seq(list(cut), x)
    for got, want in zip(trained(cut, [x], autocast=True), kept, strict=True):
        assert torch.equal(got, want)


@needs_bf16
@pytest.mark.parametrize("change", ["fused", "foreach", "ema", "load", "in place", "data"])
def test_no_copy_of_a_weight_outlives_its_change(change, monkeypatch):
    """Copies live from a forward pass to its end: whatever then changes a weight is seen."""
    monkeypatch.setattr(onednn, "ENOUGH", 1)
    _, plain, fast = vit_blocks()
    x = torch.randn(3, 20, 64)
    first = trained(fast, [x], autocast=True)[0]
    trained(plain, [x], autocast=True)
    target = [torch.randn_like(p) * 0.2 for p in fast.parameters()]
    for theirs, mine in zip(plain.parameters(), fast.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    for model in (plain, fast):
        parameters = list(model.parameters())
        if change in ("fused", "foreach"):
            torch.optim.AdamW(parameters, lr=0.1, **{change: True}).step()
        elif change == "ema":
            ema_update_(parameters, target, 0.5)
        elif change == "load":
            names = model.state_dict().keys()
            model.load_state_dict(dict(zip(names, target, strict=True)))
        for p, new in zip(parameters, target, strict=True):
            if change == "in place":
                with torch.no_grad():
                    p.copy_(new)
            elif change == "data":
                p.data.copy_(new)
    theirs, mine = (trained(m, [x], autocast=True)[0] for m in (plain, fast))
    assert (mine - first).norm() > 0.1 * first.norm()
    assert (mine - theirs).norm() < 0.02 * theirs.norm()
    assert onednn._kept.get() is None


@needs_bf16
def test_copies_are_made_once_while_they_are_kept():
    weight = nn.Parameter(torch.randn(4, 4))
    assert onednn.half(weight) is not onednn.half(weight)
    with onednn.copies_kept():
        assert onednn.half(weight) is onednn.half(weight) and onednn.half(weight).requires_grad
        with torch.no_grad():
            assert not onednn.half(weight).requires_grad
    (onednn.half(weight) * 2).sum().backward()
    assert weight.grad.dtype == torch.float32 and (weight.grad == 2).all()
