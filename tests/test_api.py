"""From Python: evaluation beside its controls, and an export that timm takes strictly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

import mokd_fast
from mokd_fast.interop.export import export_backbone
from mokd_fast.nn.backbones import build_backbone, features
from mokd_fast.nn.build import NetworkConfig
from mokd_fast.train.loop import pretrain
from tests.train.recipes import CNN, model, pictures, silent, small

WIDE = {"patch_size": 7, "depth": 1, "embed_dim": 24, "num_heads": 3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = small(
        pictures(tmp_path / "data", 12), "train.duration=2ep",
        models=(CNN, model("vit_tiny_patch16_224", kwargs=WIDE, drop_path=0.1)),
    )  # fmt: skip
    return pretrain(recipe, run=tmp_path / "run", console=silent())


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("number", [1, 2])
def test_export_is_the_backbone_of_the_run(run, number, which):
    path = mokd_fast.export(run, model=number, which=which)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    backbone = timm.create_model(**json.loads(facts["create_model"])).eval()
    backbone.load_state_dict(load_file(path))  # strict
    _, mokd = mokd_fast.load_run(run)
    x = torch.randn(2, 1, 28, 28)
    trained = getattr(mokd, f"{which}s")[number - 1].backbone.eval()
    assert torch.equal(features(trained, x).pooled, backbone(x))
    assert json.loads(facts["mean"]) == [0.5]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t", "coat_lite_tiny"])
def test_export_of_other_kinds_loads_strictly(tmp_path, name):
    """Bias tables that depend on the picture's size; a CNN; tied weights."""
    backbone = build_backbone(name, size=(64, 64)).eval()
    network = NetworkConfig(name=name)
    path = export_backbone(backbone, network, tmp_path / "x", channels=3, size=(64, 64))
    with safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["create_model"])
    again = timm.create_model(**arguments).eval()
    again.load_state_dict(load_file(path))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), backbone(x))


def test_export_of_a_torchvision_network_does_not_claim_timm(tmp_path):
    backbone = build_backbone("shufflenet_v2_x0_5")
    network = NetworkConfig(name="shufflenet_v2_x0_5")
    path = export_backbone(backbone, network, tmp_path / "x", channels=3, size=(64, 64))
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert "create_model" not in facts
    whole = torchvision.models.get_model(**json.loads(facts["get_model"]))
    missing, unexpected = whole.load_state_dict(load_file(path), strict=False)
    assert not unexpected and all(key.startswith("fc.") for key in missing)


def test_export_of_a_run_that_is_not_there(tmp_path):
    with pytest.raises(mokd_fast.UserError, match=r"nothing: no such run folder"):
        mokd_fast.export(tmp_path / "nothing")
    with pytest.raises(mokd_fast.UserError, match=r"holds no checkpoint"):
        mokd_fast.export(tmp_path)


def test_pretrain_from_a_dict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = small(pictures(tmp_path / "data", 8)).model_dump(mode="json")
    run = mokd_fast.pretrain(tree, "train.duration=4it", console=silent())
    assert run == Path("runs/small")
    recipe, mokd = mokd_fast.load_run(run / "checkpoints" / "00000004.pt")
    assert recipe.train.duration == "4it" and len(mokd.students) == 2
    with pytest.raises(mokd_fast.UserError, match=r"train.duration: 4it there, 5it now"):
        mokd_fast.pretrain(recipe, "train.duration=5it", run=run)


def test_evaluation_of_unlabelled_pictures(run, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate((tmp_path / "data").rglob("*.png")):
        path.rename(flat / f"{i}.png")
    with pytest.raises(mokd_fast.UserError, match="label"):
        mokd_fast.knn(run, f"evaluate.train={flat}", f"evaluate.test={flat}")
    with pytest.raises(mokd_fast.UserError, match=r"evaluate.train is not set"):
        mokd_fast.linear(run)


def test_a_result_that_cannot_be_kept_is_still_returned(run, tmp_path, caplog):
    (run / "knn.json").mkdir()
    roots = [f"evaluate.{key}={tmp_path / 'data'}" for key in ("train", "test")]
    assert "pixels" in mokd_fast.knn(run, *roots, which="student")
    assert "knn.json cannot be written" in caplog.text


def test_export_refuses_a_model_that_is_not_there(run):
    with pytest.raises(mokd_fast.UserError, match=r"model=3: the run has 2"):
        mokd_fast.export(run, model=3)


def test_evaluation_stands_beside_its_controls(run, tmp_path):
    labelled = pictures(tmp_path / "labelled", 20)
    roots = [f"evaluate.train={labelled}", f"evaluate.test={labelled}", "evaluate.resize=28"]
    knn = mokd_fast.knn(run, *roots, "evaluate.k=[1,5]")
    assert list(knn) == [
        "1 mokd_cnn_tiny teacher", "2 vit_tiny_patch16_224 teacher",
        "1 mokd_cnn_tiny random", "2 vit_tiny_patch16_224 random", "pixels",
    ]  # fmt: skip
    assert all(row["knn"]["1"] == 100 for row in knn.values())  # every picture is its own nearest
    linear = mokd_fast.linear(run, *roots)
    assert all("linear" in row for row in linear.values())
    assert json.loads((run / "linear.json").read_text()) == linear


def test_sources_that_are_not_installed_say_so(tmp_path):
    """What Python finds in a clone's own folder after `pip install .`"""
    (tmp_path / "mokd_fast").mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(Path(mokd_fast.__file__).with_name(name), tmp_path / "mokd_fast")
    command = [sys.executable, "-S", "-c", "import mokd_fast"]  # -S: nothing is installed
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"ImportError: {tmp_path}/mokd_fast is the source of mokd_fast, not" in ended.stderr


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mokd_fast.trian  # noqa: B018


def test_only_the_evaluation_can_be_changed_afterwards(run):
    with pytest.raises(mokd_fast.UserError, match=r"train.seed=9: .*only evaluate"):
        mokd_fast.knn(run, "train.seed=9")


def test_export_of_a_checkpoint_file_lands_in_its_run(run, tmp_path):
    file = sorted((run / "checkpoints").glob("*.pt"))[-1]
    assert mokd_fast.export(file).parent == run / "exported"
    alone = tmp_path / "alone" / "x.pt"
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    assert mokd_fast.export(alone).parent == tmp_path / "alone" / "exported"
