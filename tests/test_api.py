"""From Python: evaluation beside its controls, and an export that timm takes strictly."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mokd_fast
from mokd_fast.nn.backbones import features
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


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mokd_fast.trian  # noqa: B018
