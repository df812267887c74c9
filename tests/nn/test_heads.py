"""Heads: names, starts, and the search against its literal form."""

import warnings

import torch
from torch import nn

from mokd_fast.nn.heads import MLPHead, Prototypes, THead


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


def test_search_is_the_literal_concatenation():
    head, tokens = t_head(), torch.randn(2, 6, 20, dtype=torch.float64)
    queries = torch.randn(3, 2, 12, dtype=torch.float64)
    found = head.search(tokens, (2, 3), queries)
    for q in range(3):
        x = torch.cat([queries[q].unsqueeze(1), head._embed(tokens, (2, 3))], dim=1)
        for block in head.blocks:
            x = block(x)
        expected = head.last_layer(head.norm(x)[:, 1:].mean(1))
        torch.testing.assert_close(found[q], expected, rtol=1e-12, atol=1e-13)


def test_the_query_is_detached_and_the_pooled_stem():
    head, tokens = t_head(), torch.randn(2, 6, 20, dtype=torch.float64, requires_grad=True)
    query = head.query(tokens.mean(1))
    assert not query.requires_grad
    torch.testing.assert_close(query, head.stem(tokens).mean(1).detach())
