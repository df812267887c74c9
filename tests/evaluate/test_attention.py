"""Attention weights against what timm's own modules compute."""

import pytest
import timm
import torch
from torch import Tensor, nn

from mokd_fast import UserError
from mokd_fast.evaluate.attention import (
    block_attention,
    class_attention,
    search_attention,
    t_head_attention,
)
from mokd_fast.nn import THead
from mokd_fast.nn.backbones import build_backbone

GRID = (3, 4)


@pytest.fixture
def head() -> THead:
    torch.manual_seed(0)
    head = THead(20, 8, dim=16, grid=GRID, stem=True, depth=3, heads=4)
    for block in head.blocks:  # larger than at the start, so that attention is far from even
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return head.eval()


def weights_of(module: nn.Module, run) -> Tensor:
    """What timm's unfused attention hands to its dropout."""
    found: list[Tensor] = []
    module.fused_attn = False
    handle = module.attn_drop.register_forward_hook(lambda *x: found.append(x[-1]))
    with torch.no_grad():
        run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_attention_is_timms(qk_norm):
    block = timm.models.vision_transformer.Block(24, 3, qkv_bias=True, qk_norm=qk_norm)
    nn.init.normal_(block.attn.qkv.weight, std=0.3)
    x = torch.randn(2, 7, 24)
    theirs = weights_of(block.attn, lambda: block(x))
    torch.testing.assert_close(block_attention(block, x).detach(), theirs)
    assert theirs.max() > 0.3, "the case must not be an even one"


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mokd_vit_tiny", {}),
        ("vit_tiny_patch16_224", {"patch_size": 7, "depth": 2, "reg_tokens": 3}),
        ("vit_tiny_patch16_224", {"patch_size": 7, "depth": 1, "no_embed_class": True}),
    ],
)
def test_class_attention_leaves_class_and_registers_out(name, kwargs):
    backbone = build_backbone(name, channels=1, size=(28, 28), kwargs=kwargs).eval()
    x = torch.randn(2, 1, 28, 28)
    weights, has_class = class_attention(backbone, x)
    theirs = weights_of(backbone.blocks[-1].attn, lambda: class_attention(backbone, x))
    torch.testing.assert_close(weights.detach(), theirs[:, :, 0, backbone.num_prefix_tokens :])
    assert has_class and weights.shape[2] == 16
    assert not backbone.blocks[-1]._forward_pre_hooks


def test_class_attention_without_a_class_token():
    kwargs = {"patch_size": 7, "depth": 1, "class_token": False, "global_pool": "avg"}
    backbone = build_backbone("vit_tiny_patch16_224", size=(28, 28), kwargs=kwargs).eval()
    weights, has_class = class_attention(backbone, torch.randn(2, 3, 28, 28))
    assert not has_class
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["mokd_cnn_tiny", "swin_tiny_patch4_window7_224"])
def test_networks_without_class_attention_say_so(name):
    with pytest.raises(UserError, match="no plain ViT"):
        class_attention(build_backbone(name, size=(56, 56)), torch.zeros(1, 3, 56, 56))


def test_windowed_blocks_are_refused():
    swin = build_backbone("swin_tiny_patch4_window7_224", size=(56, 56))
    with pytest.raises(UserError, match="SwinTransformerBlock with WindowAttention"):
        block_attention(swin.layers[0].blocks[0], torch.zeros(1, 49, 96))


def test_t_head_attention_is_the_last_blocks(head):
    tokens = torch.randn(2, 12, 20)
    theirs = weights_of(head.blocks[-1].attn, lambda: head(tokens, GRID))
    torch.testing.assert_close(t_head_attention(head, tokens, GRID).detach(), theirs.mean(dim=2))


def literal(head: THead, tokens: Tensor, queries: Tensor) -> Tensor:
    """The search block by block: what hooks on the blocks see (test_heads.py: it is the same)."""
    x = head.norm(head.blocks(head.join(tokens, GRID, queries)))[:, 1:].mean(dim=1)
    return x.unflatten(0, queries.shape[:2])


@torch.no_grad()
def test_search_attention_is_the_searchs(head):
    tokens, queries = torch.randn(2, 12, 20), torch.randn(3, 2, 16)
    rows = search_attention(head, tokens, GRID, queries)
    assert rows.shape == (3, 3, 2, 4, 12)
    for b, block in enumerate(head.blocks):
        theirs = weights_of(block.attn, lambda: literal(head, tokens, queries))
        theirs = theirs[:, :, 0, 1:].unflatten(0, (3, 2))
        torch.testing.assert_close(rows[b], theirs / theirs.sum(dim=-1, keepdim=True))


@torch.no_grad()
def test_the_query_of_the_last_block_changes_nothing(head):
    """What the caption under every search picture claims."""
    tokens, queries = torch.randn(2, 12, 20), torch.randn(3, 2, 16)
    before = literal(head, tokens, queries)

    def without_query(_, inputs, output):
        return torch.cat([torch.zeros_like(output[:, :1]), output[:, 1:]], dim=1)

    changed = []
    for block in head.blocks:
        handle = block.register_forward_hook(without_query)
        changed.append(not torch.equal(literal(head, tokens, queries), before))
        handle.remove()
    assert changed == [True, True, False]


@torch.no_grad()
def test_every_row_of_a_cross_search_reaches_its_output(head):
    head.mode = "cross"
    tokens, queries = torch.randn(2, 12, 20), torch.randn(3, 2, 16)
    rows = search_attention(head, tokens, GRID, queries)
    assert rows.shape == (3, 3, 2, 4, 12)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(3, 3, 2, 4))
    first, x = head.blocks[0], head.embed(tokens, GRID)
    q, k, _ = first.attn.qkv(first.norm1(torch.cat([queries.transpose(0, 1), x], 1))).chunk(3, -1)
    q, k = q[:, :3].unflatten(2, (4, 4)), k[:, 3:].unflatten(2, (4, 4))
    expected = (torch.einsum("bqhd,bnhd->qbhn", q, k) / 2).softmax(-1)
    torch.testing.assert_close(rows[0], expected)
