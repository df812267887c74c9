"""Crops of two sizes in one pass: what each gets is what it gets alone."""

import copy
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch._subclasses.fake_tensor import FakeTensorMode

from mokd_fast.nn import Temperatures, blocks
from mokd_fast.nn import packed as packing
from mokd_fast.nn.fast import quicken
from mokd_fast.nn.packed import PackedAttention, PackedDropPath, packs, prepare, run
from mokd_fast.ops import cpu
from mokd_fast.train.networks import build
from tests.nn.test_parity import PAIRS
from tests.train.recipes import small

TAUS = [Temperatures(0.05, 0.04, 0.04)] * 2


@pytest.mark.parametrize("pair", PAIRS)
def test_losses_and_gradients(pair):
    models, more = PAIRS[pair]
    torch.manual_seed(0)
    recipe = small("unused", models=models, **more)
    apart = build(recipe).double().train()
    together = copy.deepcopy(apart)
    vits = [i for i, m in enumerate(recipe.models, 1) if "vit" in m.name]
    assert together.pack() == vits
    augment = recipe.augment
    views = torch.randn(2, 3, 1, *augment.global_hw, dtype=torch.float64)
    small_views = torch.randn(augment.locals, 3, 1, *augment.local_hw, dtype=torch.float64)
    for mokd in (apart, together):
        out = mokd(views, small_views if augment.locals else None, TAUS)
        torch.stack(out.totals).sum().backward()
        mokd.losses = [*out.totals, *out.terms.values()]
    torch.testing.assert_close(together.losses, apart.losses, rtol=1e-12, atol=0)
    mine, theirs = dict(together.named_parameters()), dict(apart.named_parameters())
    for name, parameter in theirs.items():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
    for name, buffer in apart.named_buffers():
        torch.testing.assert_close(together.get_buffer(name), buffer, rtol=1e-12, atol=0)
    assert list(together.state_dict()) == list(apart.state_dict())


def test_one_pass(monkeypatch):
    """Each block sees the tokens of all crops once, and attention each crop alone."""
    mokd = build(small("x")).train()
    mokd.pack()
    seen = []
    for block in mokd.students[1].backbone.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    mokd(torch.randn(2, 4, 1, 28, 28), torch.randn(2, 4, 1, 14, 14), TAUS)
    width = mokd.students[1].backbone.embed_dim
    tokens = 8 * (1 + 16) + 8 * (1 + 4)
    assert seen == [(1, tokens, width)] * len(mokd.students[1].backbone.blocks)


@pytest.mark.skipif(cpu.bf16_why_not() is not None, reason=str(cpu.bf16_why_not()))
def test_in_bf16_all_groups_are_one_call(monkeypatch):
    """With the layer's own scale."""
    torch.manual_seed(0)
    plain = Attention(32, 2, qkv_bias=True)
    plain.fused_attn, plain.scale = False, 0.4
    packed = copy.deepcopy(plain)
    quicken(packed, torch.device("cpu"), "bf16")
    prepare(packed)
    groups = [torch.randn(3, 7, 32), torch.randn(5, 2, 32)]
    calls, attend = [], blocks.self_attention
    monkeypatch.setattr(
        blocks, "self_attention", lambda *a, **k: calls.append(k["groups"]) or attend(*a, **k)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = run_attention(packed, groups)
    assert calls == [[(3, 7), (5, 2)]]
    for got, x in zip(found, groups, strict=True):
        torch.testing.assert_close(got.float(), plain(x), rtol=0.03, atol=0.02)


def test_drop_path_drops_whole_crops():
    torch.manual_seed(0)
    path = PackedDropPath(0.5).train()
    path.groups = [(300, 3), (200, 2)]
    out = path(torch.ones(1, 300 * 3 + 200 * 2, 4))[0]
    kept = [
        part.unflatten(0, shape)
        for part, shape in zip(out.split([900, 400]), path.groups, strict=True)
    ]
    for crops in kept:
        rows = crops.flatten(1)
        assert (rows == rows[:, :1]).all()  # all tokens of a crop have one fate
        assert set(rows.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < (rows[:, 0] > 0).float().mean() < 0.6
    path.groups = None
    assert path.eval()(out) is out
    x = torch.randn(1, 5, 4)
    path.groups = [(1, 5)]
    assert path(x) is x  # in evaluation


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_normalised_heads_and_by_xformers(monkeypatch, fused, normalised):
    """xformers has no attention for the CPU: its contract is held by a stand-in that knows its
    block-diagonal mask, which is the package's own."""
    ops = pytest.importorskip("xformers.ops")
    torch.manual_seed(0)
    plain = Attention(32, 4, qkv_bias=True, qk_norm=normalised, norm_layer=torch.nn.LayerNorm)
    plain = plain.double()
    plain.fused_attn = fused
    packed = copy.deepcopy(plain)
    prepare(packed)
    assert type(packed) is PackedAttention
    groups = [torch.randn(3, 7, 32).double(), torch.randn(5, 2, 32).double()]
    want = [plain(x) for x in groups]
    torch.testing.assert_close(run_attention(packed, groups), want)
    torch.testing.assert_close(packed(groups[0]), want[0])  # without groups

    def attention(q, k, v, attn_bias):
        S = q.shape[1]
        mask = attn_bias.materialize((1, 1, S, S), dtype=q.dtype)
        rows = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask)
        return out.transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attention)
    qkv = packed.qkv(torch.cat([x.flatten(0, 1) for x in groups])).unflatten(1, (3, 4, -1))
    packed.groups = [(3, 7), (5, 2)]
    packed.mask = packing._mask(((3, 7), (5, 2)), torch.device("cpu"))
    by_group = torch.cat([
        packed._group(part, *shape)
        for part, shape in zip(qkv.split([21, 10]), packed.groups, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(packed._xformers(qkv), by_group)


def test_a_mask_is_made_once(monkeypatch):
    """For all blocks and steps of the same groups, on their device: a recording reads it there."""
    made, used = [], []

    class Mask:
        def __init__(self, lengths):
            made.append(lengths)

        from_seqlens = classmethod(lambda cls, lengths: cls(lengths))

        def to(self, device):
            self.device = device
            return self

    def attention(q, k, v, attn_bias):
        used.append((attn_bias, attn_bias.device == q.device))
        return v

    monkeypatch.setattr(packing, "xformers_missing", lambda: None)
    monkeypatch.setattr(packing, "_mask", cache(packing._mask.__wrapped__))
    for name, parts in {
        "xformers.ops": {"memory_efficient_attention": attention},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": Mask},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts))
    with FakeTensorMode():
        layers = [Attention(32, 4, qkv_bias=True, device="cuda") for _ in range(2)]
        both = torch.nn.Sequential(*layers)
        prepare(both)
        for tokens in (5, 5, 6):
            run(both, [torch.empty(B, N, 32, device="cuda") for B, N in ((3, 7), (2, tokens))])
    assert made == [[7, 7, 7, 5, 5], [7, 7, 7, 6, 6]]
    masks, there = zip(*used, strict=True)
    assert all(there) and len(masks) == 6 and len(set(masks)) == 2
    assert all(layer.mask is None and layer.groups is None for layer in layers)


def run_attention(attention, groups):
    class Only(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention

        def forward(self, x):
            return self.attn(x)

    return run(Only(), groups)


def test_what_does_not_pack():
    cnn = build(small("x")).students[0].backbone
    assert not packs(cnn)
    vit = build(small("x")).students[1].backbone
    assert packs(vit)
    vit.blocks[0].attn.attn_drop.p = 0.1
    assert not packs(vit)
    small_one = {"img_size": 28, "patch_size": 14, "depth": 1, "embed_dim": 12, "num_heads": 2}
    assert not packs(timm.create_model("vit_small_patch16_18x2_224", **small_one))  # two in a block
