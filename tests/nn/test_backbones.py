"""Any timm or torchvision network gives a pooled feature and a token map, or says why not."""

import pytest
import timm
import torch
import torchvision

from bench.baseline.official import resize_positions as official_resize
from mokd_fast import UserError
from mokd_fast.nn.backbones import (
    build_backbone,
    features,
    inspect_backbone,
    is_map_network,
    resize_positions,
)

VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
REGISTERS = {**VIT, "reg_tokens": 2, "no_embed_class": True}
SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
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
        ("mobilenet_v3_small", {}, 576, (2, 2), True),  # and this
        ("swin_tiny_patch4_window7_224", {**SWIN, "strict_img_size": False}, 96, (2, 2), True),
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


def test_the_tiny_pair_takes_grey_28_px_pictures():
    for name, width in (("mokd_cnn_tiny", 128), ("mokd_vit_tiny", 96)):
        model = build_backbone(name, channels=1, size=(28, 28))
        sizes = {"augment.global_size": (28, 28), "augment.local_size": (14, 20)}
        layout = inspect_backbone(model, name, 1, sizes)
        assert layout == (width, (4, 4), name == "mokd_cnn_tiny")
        assert features(model, torch.randn(2, 1, 14, 20)).grid == (2, 3)


def test_a_vit_takes_every_size_its_patch_divides():
    model = build("vit_tiny_patch16_224", **VIT).eval()
    for h in range(1, 10):
        for w in range(1, 10):
            found = features(model, torch.zeros(1, 3, 8 * h, 8 * w))
            assert found.grid == (h, w) and found.tokens.shape == (1, h * w, 24)


EXTRAS = [{}, {"reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 1}]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_vit_at_another_size_is_timms_with_the_official_positions(extra):
    """Prefix tokens keep their own positions; only those of the patches are resized."""
    model = build("vit_tiny_patch16_224", **VIT, **extra).eval()
    other = build("vit_tiny_patch16_224", (24, 40), **VIT, **extra).eval()
    state = dict(model.state_dict())
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    own, patches = state["pos_embed"].split([prefix, 64], dim=1)
    state["pos_embed"] = torch.cat([own, official_resize(patches, (8, 8), (3, 5))], dim=1)
    other.load_state_dict(state)
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(features(model, x).pooled, other(x))


@pytest.mark.parametrize("extra", EXTRAS)
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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(name):
    ours, theirs = build(name), torchvision.models.get_model(name)
    last = "bn2" if name == "resnet18" else "bn3"
    assert all((block.get_submodule(last).weight == 1).all() for block in ours.layer1), "zero-init"
    ours.eval(), theirs.eval()
    theirs.fc = torch.nn.Identity()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(features(ours, x).pooled, theirs(x))


@pytest.mark.parametrize(
    ("name", "kwargs", "rate"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, "drop_path_rate"),
        ("efficientnet_v2_s", {}, "stochastic_depth_prob"),
    ],
)
def test_nothing_is_random_that_was_not_asked_for(name, kwargs, rate):
    """Both libraries drop paths by default in some networks; a teacher must not."""

    def differs(**more):
        model, x = build(name, **kwargs, **more), torch.randn(4, 3, 64, 64)
        return not torch.equal(features(model, x).pooled, features(model, x).pooled)

    torch.manual_seed(0)
    assert not differs()
    assert differs(**{rate: 0.5})


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


def test_torchvision_takes_colour_alone():
    with pytest.raises(UserError, match=r"takes 3 channels, data\.channels=1"):
        build_backbone("shufflenet_v2_x0_5", channels=1)


def test_cnn_or_transformer_is_known_without_weights():
    assert is_map_network("resnet50") and not is_map_network("vit_small")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet5o", {}, "did you mean resnet50"),
        ("resnet18", {"bogus": 1}, "cannot be built with"),
        ("vit_b_16", {}, "take a vit_"),
        ("mobilenetv3_large_100", {}, r"\[B, C\] and \[B, N, C\] of one width are needed"),
        ("vit_tiny_patch16_224", {**VIT, "patch_size": 7}, "cannot take augment.global_size"),
        ("vit_tiny_patch16_224", {**VIT, "patch_size": 64}, "take augment.local_size=.32, 32"),
        ("vit_tny", {}, "did you mean vit_tiny"),
        ("vgg11", {}, "of one width are needed"),
        ("mixer_s32_224", {}, "cannot take augment.local_size"),
    ],
)
def test_what_is_refused(name, kwargs, message):
    sizes = {"augment.global_size": (64, 64), "augment.local_size": (32, 32)}
    with pytest.raises(UserError, match=message):
        inspect_backbone(build(name, **kwargs), name, 3, sizes)


def test_a_network_of_several_maps_is_refused():
    with pytest.raises(UserError, match="gives a list, not one map"):
        inspect_backbone(build("coat_tiny"), "coat_tiny", 3, {"augment.global_size": (64, 64)})
