"""Heads: names, starts, and the search against its literal form."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.baseline.official import THead as OfficialTHead
from mokd_fast.nn import heads
from mokd_fast.nn.heads import MLPHead, THead
from mokd_fast.nn.prototypes import Prototypes


def t_head(stem: bool = True) -> THead:
    torch.manual_seed(0)
    width = 20 if stem else 12
    return THead(width, 33, dim=12, grid=(4, 4), stem=stem, depth=2, heads=3).double()


def test_prototypes_are_weight_norm():
    layer = Prototypes(6, 9, train_norm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.utils.weight_norm(nn.Linear(6, 9, bias=False))
    layer.weight_g.data.uniform_(0.5, 2)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), theirs(x))
    for module in (layer, theirs):
        module(x).pow(2).sum().backward()
    for name in ("weight_g", "weight_v"):
        mine, expected = layer.get_parameter(name).grad, theirs.get_parameter(name).grad
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_head_step_by_step(batch_norm):
    head = MLPHead(6, 9, hidden=8, bottleneck=5, layers=3, batch_norm=batch_norm)
    first, second = (3, 6) if batch_norm else (2, 4)
    linear = {f"mlp.{i}.{w}" for i in (0, first, second) for w in ("weight", "bias")}
    last = {"last_layer.weight_g", "last_layer.weight_v"}
    norm = {f"mlp.{i}.{w}" for i in (1, 4) for w in ("weight", "bias")} if batch_norm else set()
    assert {name for name, _ in head.named_parameters()} == linear | norm | last
    y = x = torch.randn(4, 6)
    for i in (0, first):
        y = head.mlp[i](y)
        y = F.gelu(head.mlp[i + 1](y) if batch_norm else y)
    y = head.mlp[second](y)
    y = y / y.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), y)
    logits = F.linear(y, F.normalize(head.last_layer.weight_v))
    torch.testing.assert_close(head.last_layer(head(x)), logits)
    assert len(MLPHead(6, 9, layers=1).mlp) == 1


def test_names_and_starts():
    """Stem and prototypes keep PyTorch's start; everything else linear has std 0.02."""
    head = MLPHead(64, 4096, hidden=256, bottleneck=64, train_norm=False)
    assert not head.last_layer.weight_g.requires_grad and (head.last_layer.weight_g == 1).all()
    assert list(head.state_dict())[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]
    assert 0.018 < head.mlp[0].weight.std() < 0.022 and (head.mlp[0].bias == 0).all()
    bound = 1 / 64**0.5  # nn.Linear: uniform in +-1/sqrt(fan in)
    assert bound * 0.99 < head.last_layer.weight_v.abs().max() <= bound
    t = THead(100, 512, dim=48, grid=(4, 4), stem=True, depth=1, heads=4)
    assert 0.099 < t.stem.weight.abs().max() <= 0.1
    assert t.last_layer.weight_g.requires_grad
    assert 0.015 < t.pos_embed.std() < 0.025 and 0.018 < t.blocks[0].attn.qkv.weight.std() < 0.022
    roots = {name.split(".")[0] for name in t.state_dict()}
    assert roots == {"stem", "pos_embed", "blocks", "norm", "last_layer"}
    assert "stem" not in {n.split(".")[0] for n in t_head(stem=False).state_dict()}


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_t_head_is_the_official_one(stem, grid):
    """Strict state dict, plain pass and the search with its repeated maps."""
    head = t_head(stem)
    width = 20 if stem else 12
    official = OfficialTHead(width, 12, 33, (4, 4), depth=2, num_heads=3, stem=stem).double()
    official.load_state_dict(head.state_dict())
    tokens = torch.randn(2, grid[0] * grid[1], width, dtype=torch.float64)
    queries = torch.randn(3, 2, 12, dtype=torch.float64)
    plain, _ = official(tokens, grid)
    searched, _ = official(tokens.repeat(3, 1, 1), grid, queries.flatten(0, 1))
    found = head.last_layer(head(tokens, grid))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)
    found = head.last_layer(head.search(tokens, grid, queries)).flatten(0, 1)
    torch.testing.assert_close(found, searched, rtol=1e-12, atol=1e-13)


def test_search_is_the_literal_concatenation():
    head, tokens = t_head(), torch.randn(2, 6, 20, dtype=torch.float64)
    queries = torch.randn(3, 2, 12, dtype=torch.float64)
    found = head.search(tokens, (2, 3), queries)
    for q in range(3):
        x = torch.cat([queries[q].unsqueeze(1), head.embed(tokens, (2, 3))], dim=1)
        for block in head.blocks:
            x = block(x)
        expected = head.norm(x)[:, 1:].mean(1)
        torch.testing.assert_close(found[q], expected, rtol=1e-12, atol=1e-13)


def test_the_query_is_detached_and_the_pooled_stem():
    head, tokens = t_head(), torch.randn(2, 6, 20, dtype=torch.float64, requires_grad=True)
    query = head.query(tokens.mean(1))
    assert not query.requires_grad
    torch.testing.assert_close(query, head.stem(tokens).mean(1).detach())
    pooled = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    query = t_head(stem=False).query(pooled)  # of the T-Head's width: the feature itself
    assert torch.equal(query, pooled) and not query.requires_grad


def literal(head, tokens, grid, queries):
    """The search as the official code runs it: tokens repeated, one concatenation a query."""
    x = head.norm(head.blocks(head.join(tokens, grid, queries)))[:, 1:].mean(dim=1)
    return x.unflatten(0, queries.shape[:2])


def wide(dtype, depth=3, **options):
    """A head whose attention runs on the kernels; attention far from even."""
    torch.manual_seed(0)
    head = THead(20, 8, dim=48, grid=(4, 4), stem=True, depth=depth, heads=3, **options)
    for block in head.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return head.to(dtype)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_joint_search_is_the_literal_one(depth, grid, dtype, within, monkeypatch):
    """Values and, where they are asked for, gradients; in groups of any size."""
    head = wide(dtype, depth)
    tokens = torch.randn(5, grid[0] * grid[1], 20, dtype=dtype)
    queries = torch.randn(3, 5, 48, dtype=dtype)
    expected = literal(head, tokens, grid, queries)
    scale = expected.abs().max()
    for group in (1, 40 * 48 * dtype.itemsize, 1 << 20):
        monkeypatch.setitem(heads.GROUP, "cpu", group)
        found = head.search(tokens, grid, queries)
        assert (found - expected).abs().max() <= within * scale
        with torch.no_grad():
            assert (head.search(tokens, grid, queries) - expected).abs().max() <= within * scale
    into = [p for name, p in head.named_parameters() if "last_layer" not in name]
    cotangent = torch.randn(expected.shape, dtype=dtype)
    unused = {"allow_unused": True, "materialize_grads": True}
    for mine, theirs in zip(
        torch.autograd.grad(found, into, cotangent, **unused),
        torch.autograd.grad(expected, into, cotangent, **unused),
        strict=True,
    ):
        assert (mine - theirs).abs().max() <= 10 * within * (1 + theirs.abs().max())


def test_cross_search_step_by_step():
    """Queries attend over the tokens of the plain pass, which knows nothing of them."""
    head = wide(torch.float64, search="cross")
    tokens = torch.randn(2, 6, 20, dtype=torch.float64)
    queries = torch.randn(3, 2, 48, dtype=torch.float64)
    found, x, asking = head.search(tokens, (2, 3), queries), head.embed(tokens, (2, 3)), queries
    for block in head.blocks:
        width = block.attn.qkv.weight.chunk(3)[0].shape[0]
        q = block.attn.qkv(block.norm1(asking))[..., :width].unflatten(2, (3, -1))
        k, v = (t.unflatten(2, (3, -1)) for t in block.attn.qkv(block.norm1(x)).chunk(3, -1)[1:])
        look = (torch.einsum("qbhd,bnhd->qbhn", q, k) / 4).softmax(-1)
        asking = asking + block.attn.proj(torch.einsum("qbhn,bnhd->qbhd", look, v).flatten(2))
        asking = asking + block.mlp(block.norm2(asking))
        x = block(x)
    torch.testing.assert_close(found, head.norm(asking), rtol=1e-12, atol=1e-13)
    assert set(head.state_dict()) == set(wide(torch.float64).state_dict())


@pytest.mark.parametrize("search", ["joint", "cross"])
@torch.no_grad()
def test_search_under_autocast_is_as_near_as_the_literal_one(search):
    head = wide(torch.float32, search=search)
    tokens, queries = torch.randn(2, 6, 20), torch.randn(3, 2, 48)
    exact = head.double().search(tokens.double(), (2, 3), queries.double())
    head.float().mode = search
    with torch.autocast("cpu", torch.bfloat16):
        found = head.search(tokens, (2, 3), queries)
        theirs = literal(head, tokens, (2, 3), queries)
    assert found.dtype == torch.float32
    error = (found - exact).abs().max()
    assert error <= 0.05 if search == "cross" else error <= 1.5 * (theirs - exact).abs().max()


@pytest.mark.parametrize("search", ["joint", "cross"])
def test_queries_of_16_bits(search, monkeypatch):
    """A stem gives them under autocast. Residual sums stay in fp32, and no LayerNorm sees two
    dtypes, which only CPUs take."""
    head = wide(torch.float32, search=search)
    tokens, pooled = torch.randn(2, 6, 20), torch.randn(2, 20)
    seen, own = [], heads.add_norm
    monkeypatch.setattr(heads, "add_norm", lambda x, *rest: seen.append(x.dtype) or own(x, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        queries = head.query(pooled).expand(3, -1, -1)
        found = head.search(tokens, (2, 3), queries)
        assert queries.dtype == torch.bfloat16 and set(seen) == {torch.float32}
        assert torch.equal(found, head.search(tokens, (2, 3), queries.float()))


def test_searches_that_do_not_fit():
    head, tokens = t_head(), torch.randn(2, 6, 20, dtype=torch.float64)
    queries = torch.randn(3, 2, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="6 tokens are no map of 2 x 2"):
        head.search(tokens, (2, 2), queries)
    for wrong in (queries[:, :1], queries[..., :6], queries[0]):
        with pytest.raises(ValueError, match=r"queries must be \[Q, B, D\] = \[Q, 2, 12\]"):
            head.search(tokens, (2, 3), wrong)
    with pytest.raises(ValueError, match="'joint' or 'cross', got 'both'"):
        THead(20, 8, dim=12, grid=(4, 4), stem=True, heads=3, search="both")
    with pytest.raises(ValueError, match="width 12 cannot be split into 5 heads"):
        THead(20, 8, dim=12, grid=(4, 4), stem=True, heads=5)
    assert head.search(tokens, (2, 3), queries[:0]).shape == (0, 2, 12)
