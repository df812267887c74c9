"""Backbones from files: timm's and torchvision's names, adapted as timm does it, or refused."""

import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from mokd_fast.errors import UserError
from mokd_fast.interop.export import export_backbone
from mokd_fast.nn.backbones import build_backbone, features
from mokd_fast.nn.build import NetworkConfig
from mokd_fast.nn.weights import load_backbone

VIT = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}


def whole(name, path, **kwargs):
    """A network of timm with its classifier, in a file, with statistics that are its own."""
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    for key, value in model.state_dict().items():
        if "running_" in key:
            value.uniform_(0.5, 1.5)
    save_file(model.state_dict(), path) if path.suffix == ".safetensors" else torch.save(
        model.state_dict(), path
    )
    return model


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet10t", "fc.bias, fc.weight"),
        ("test_vit", "head.bias, head.weight"),
        ("test_convnext", "head.fc.bias, head.fc.weight"),  # its head.norm is the backbone's
        ("test_efficientnet", "classifier.bias, classifier.weight"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_pooled_features_are_timms(tmp_path, name, head, ending):
    path = tmp_path / f"w.{ending}"
    theirs = whole(name, path)
    size = theirs.pretrained_cfg["input_size"][-2:]
    backbone = build_backbone(name, size=size)
    said = load_backbone(backbone, name, path, 3)
    assert f"of {path}; left out: {head}" in said and "adapted" not in said
    x = torch.randn(2, 3, *size)
    expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features(backbone.eval(), x).pooled, expected)


def test_positions_of_another_grid_are_resized_by_timm(tmp_path):
    """As create_model(..., img_size=) does it on load, class token kept."""
    path = tmp_path / "w.safetensors"
    theirs = whole("vit_tiny_patch16_224", path, img_size=64, **VIT)
    backbone = build_backbone("vit_tiny", size=(32, 48), kwargs=VIT)
    said = load_backbone(backbone, "vit_tiny", path, 3)
    assert "adapted: pos_embed [1, 65, 24] -> [1, 25, 24]" in said
    expected = resample_abs_pos_embed(theirs.pos_embed, (4, 6), (8, 8), num_prefix_tokens=1)
    torch.testing.assert_close(backbone.pos_embed, expected)
    assert torch.equal(backbone.pos_embed[:, :1], theirs.pos_embed[:, :1])


def test_windows_of_another_size(tmp_path):
    path = tmp_path / "w.safetensors"
    name = "swin_tiny_patch4_window7_224"
    small = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)}
    whole(name, path, img_size=128, window_size=4, **small)
    wide, narrow = ({"window_size": n, **small} for n in (4, 2))
    backbone = build_backbone(name, size=(64, 64), kwargs=narrow)
    said = load_backbone(backbone, name, path, 3)
    assert "relative_position_bias_table [49, 1] -> [9, 1]" in said and "and 1 more" in said
    given = build_backbone(name, size=(64, 64), kwargs=wide)  # an export of the same size
    config = NetworkConfig(name=name, kwargs=wide)
    export_backbone(given, config, path, channels=3, size=(64, 64))
    assert "relative_position_bias_table [49, 1] -> [9, 1]" in load_backbone(
        backbone, name, path, 3
    )


@pytest.mark.parametrize(("theirs", "mine"), [(3, 1), (1, 3)])
@pytest.mark.parametrize(
    ("name", "conv"), [("resnet10t", "conv1.0"), ("test_vit", "patch_embed.proj")]
)
def test_the_first_convolution_of_other_channels(tmp_path, name, conv, theirs, mine):
    """3 to 1 is the sum, which answers to grey in three channels; 1 to 3 is a third each."""
    path = tmp_path / "w.pth"
    given = whole(name, path, in_chans=theirs).get_submodule(conv).weight
    backbone = build_backbone(name, channels=mine, size=(160, 160))
    said = load_backbone(backbone, name, path, mine)
    shapes = [[*given.shape[:1], c, *given.shape[2:]] for c in (theirs, mine)]
    assert f"{conv}.weight {shapes[0]} -> {shapes[1]}" in said
    weight = backbone.get_submodule(conv).weight
    torch.testing.assert_close(weight.sum(1), given.sum(1))
    torch.testing.assert_close(weight[:, :1], given.sum(1, keepdim=True) / mine)


def test_training_checkpoints_of_timm(tmp_path):
    """The EMA's weights first, and the prefixes of DDP and torch.compile."""
    model, average = (whole("resnet10t", tmp_path / f"{i}.pth") for i in range(2))
    state = {f"module.{k}": v for k, v in average.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "state_dict_ema": state},
               tmp_path / "w.pth.tar")  # fmt: skip
    backbone = build_backbone("resnet10t")
    load_backbone(backbone, "resnet10t", tmp_path / "w.pth.tar", 3)
    assert torch.equal(backbone.layer1[0].conv1.weight, average.layer1[0].conv1.weight)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5", "resnet18"])
def test_torchvision_names(tmp_path, name):
    """resnet18 is timm's here, whose ResNets have torchvision's names."""
    theirs = torchvision.models.get_model(name, weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(name)
    said = load_backbone(backbone, name, tmp_path / "w.pth", 3)
    assert re.search(r"left out: (fc|classifier.1)\.", said)
    mine = backbone.state_dict()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in mine.items())


def test_files_without_the_counter_of_batches(tmp_path):
    """As PyTorch wrote them before 0.4.1, and as torchvision's old files are."""
    state = whole("resnet10t", tmp_path / "a.pth").state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pth")
    load_backbone(build_backbone("resnet10t"), "resnet10t", tmp_path / "w.pth", 3)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [("vit_tiny", (16, 64), VIT), ("test_convnext", (64, 64), {}), ("mokd_vit_tiny", (28, 28), {}),
     ("mokd_cnn_tiny", (28, 28), {}), ("shufflenet_v2_x0_5", (64, 64), {})],
)  # fmt: skip
def test_what_we_export_comes_back_bit_for_bit(tmp_path, name, size, kwargs):
    """(16, 64) is 2 x 8 tokens, as many as the square 4 x 4: the file says which."""
    given = build_backbone(name, size=size, kwargs=kwargs)
    path = tmp_path / "w.safetensors"
    export_backbone(given, NetworkConfig(name=name, kwargs=kwargs), path, channels=3, size=size)
    backbone = build_backbone(name, size=size, kwargs=kwargs)
    said = load_backbone(backbone, name, path, 3)
    assert "left out" not in said and "adapted" not in said
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, given.state_dict()[key]), key


def test_an_export_of_another_size(tmp_path):
    """Not square, and of as many tokens as here: timm is told the grid it comes from."""
    given = build_backbone("vit_tiny", size=(16, 64), kwargs=VIT)
    path = tmp_path / "w.safetensors"
    config = NetworkConfig(name="vit_tiny", kwargs=VIT)
    export_backbone(given, config, path, channels=3, size=(16, 64))
    for size in ((32, 32), (24, 48)):
        backbone = build_backbone("vit_tiny", size=size, kwargs=VIT)
        load_backbone(backbone, "vit_tiny", path, 3)
        grid = (size[0] // 8, size[1] // 8)
        expected = resample_abs_pos_embed(given.pos_embed, grid, (2, 8), num_prefix_tokens=1)
        torch.testing.assert_close(backbone.pos_embed, expected)
        assert not hasattr(backbone, "pretrained_model_args")


def refusal(path, name="resnet10t", **options):
    with pytest.raises(UserError) as error:
        load_backbone(build_backbone(name, **options), name, path, 3)
    return str(error.value)


def test_other_networks_are_refused_with_the_first_names(tmp_path):
    path = tmp_path / "w.pth"
    whole("resnet10t", path)
    said = refusal(path, "resnet26t")
    assert re.search(r"not in it: layer1\.\S+, layer1\.\S+, layer1\.\S+ and \d+ more; ", said)
    assert "other shape: layer1.0.conv1.weight is [64, 64, 3, 3] there, [64, 64, 1, 1] here" in said
    assert "w.pth does not fit resnet26t: " in said and "Give a file of this network" in said
    said = refusal(path, "test_vit", size=(160, 160))
    assert "not in it: cls_token, pos_embed, " in said and "unknown here: conv1.0.weight, " in said
    state = torch.load(path)
    torch.save({f"backbone.{k}": v for k, v in state.items()}, path)
    assert "unknown here: backbone.conv1.0.weight" in refusal(path)
    state["bn1.weight"][3] = torch.nan
    torch.save(state, path)
    assert "not finite: bn1.weight" in refusal(path)


def test_files_that_are_none(tmp_path):
    assert "no such file; give a .safetensors" in refusal(tmp_path / "no.pth")
    assert "is a folder, not a file" in refusal(tmp_path)
    for name in ("w.safetensors", "w.bin"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        assert f"{name} cannot be read as weights (" in refusal(tmp_path / name)
    torch.save({"model": {"students.0.backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "c.pt")
    assert "is a checkpoint of mokd-fast" in refusal(tmp_path / "c.pt")
    torch.save([torch.zeros(1)], tmp_path / "l.pt")
    assert "l.pt cannot be read as weights" in refusal(tmp_path / "l.pt")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "e.pt")
    assert "unknown here: epoch, optimizer" in refusal(tmp_path / "e.pt")


class Harmful:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(1), "x": Harmful()}, tmp_path / "w.pth")
    assert "cannot be read as weights (weights_only=True blocked" in refusal(tmp_path / "w.pth")
    assert "ran" not in capsys.readouterr().out


def test_safetensors_hold_the_very_bits(tmp_path):
    path = tmp_path / "w.safetensors"
    whole("test_vit", path)
    backbone = build_backbone("test_vit", size=(160, 160))
    load_backbone(backbone, "test_vit", path, 3)
    given = load_file(path)
    assert all(torch.equal(value, given[key]) for key, value in backbone.state_dict().items())
