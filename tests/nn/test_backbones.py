"""Any timm or torchvision network gives a pooled feature and a token map, or says why not."""

import pytest
import timm
import torch
import torchvision

from bench.baseline.official import resize_positions as official_resize
from mokd_fast import UserError
from mokd_fast.nn.backbones import build_backbone, features, inspect_backbone, resize_positions

VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
REGISTERS = {**VIT, "reg_tokens": 2, "no_embed_class": True}
POOLED = {**VIT, "class_token": False, "global_pool": "avg"}


def build(name, size=(64, 64), **kwargs):
    return build_backbone(name, size=size, kwargs=kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "width", "grid", "is_map"),
    [
        ("resnet18", {}, 512, (2, 2), True),
        ("convnext_atto", {}, 320, (2, 2), True),
        ("efficientnet_b0", {}, 1280, (2, 2), True),
        ("shufflenet_v2_x0_5", {}, 1024, (2, 2), True),  # torchvision alone has it
        ("vit_tiny_patch16_224", VIT, 24, (8, 8), False),
        ("vit_tiny_patch16_224", REGISTERS, 24, (8, 8), False),
        ("vit_tiny_patch16_224", POOLED, 24, (8, 8), False),
    ],
)  # fmt: skip
def test_pooled_and_tokens(name, kwargs, width, grid, is_map):
    model = build(name, **kwargs)
    sizes = {"augment.global_size": (64, 64), "augment.local_size": (32, 64)}
    layout = inspect_backbone(model, name, 3, sizes)
    assert layout == (width, grid, is_map)
    assert model.training
    found = features(model, torch.randn(3, 3, 32, 64))
    assert found.grid == (grid[0] // 2, grid[1])
    assert found.tokens.shape == (3, grid[0] * grid[1] // 2, width)


@pytest.mark.parametrize(
    "extra", [{}, {"reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 1}]
)
def test_a_vit_at_its_own_size_is_timms(extra):
    model = build("vit_tiny_patch16_224", **VIT, **extra).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(features(model, x).pooled, model(x))
    tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
    assert torch.equal(features(model, x).tokens, tokens)


def test_tokens_of_a_map_run_row_by_row():
    model = build("resnet18").eval()
    x = torch.randn(2, 3, 64, 96)
    expected = model.forward_features(x)
    for memory in (torch.contiguous_format, torch.channels_last):
        found = features(model, x.to(memory_format=memory))
        grid = found.tokens.unflatten(1, found.grid)
        torch.testing.assert_close(grid.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pooled, found.tokens.mean(1), rtol=1e-4, atol=1e-4)


def test_resnet_is_torchvisions():
    ours, theirs = build("resnet18").eval(), torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(features(ours, x).pooled, theirs(x))
    assert all((m.bn2.weight == 1).all() for m in build("resnet18").layer1), "zero-init of last BN"


def test_class_token_starts_with_std_002():
    token = build("vit_tiny_patch16_224", embed_dim=768, num_heads=3, depth=1).cls_token
    assert 0.015 < token.std() < 0.025


@pytest.mark.parametrize("new", [(1, 1), (3, 3), (6, 6), (2, 5), (20, 11)])
def test_position_resize_is_the_official_one(new):
    pos = torch.randn(1, 14 * 14, 8, dtype=torch.float64)
    found = resize_positions(pos, (14, 14), new)
    assert found.shape == (1, new[0] * new[1], 8)
    torch.testing.assert_close(found, official_resize(pos, (14, 14), new), rtol=1e-13, atol=0)
    theirs = timm.layers.resample_abs_pos_embed(
        pos, list(new), (14, 14), num_prefix_tokens=0, verbose=False
    )
    assert not torch.allclose(found, theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet5o", {}, "did you mean resnet50"),
        ("resnet18", {"bogus": 1}, "cannot be built with"),
        ("vit_b_16", {}, "take a vit_"),
        ("mobilenetv3_large_100", {}, r"\[B, C\] and \[B, N, C\] of one width are needed"),
        ("vit_tiny_patch16_224", {**VIT, "patch_size": 7}, "cannot take augment.global_size"),
        ("mixer_s32_224", {}, "cannot take augment.local_size"),
    ],
)
def test_what_is_refused(name, kwargs, message):
    sizes = {"augment.global_size": (64, 64), "augment.local_size": (32, 32)}
    with pytest.raises(UserError, match=message):
        inspect_backbone(build(name, **kwargs), name, 3, sizes)
