"""Runs that start from files of weights: who takes them, what goes before them, what is kept."""

import pytest
import torch

import mokd_fast
from mokd_fast.train.checkpoint import checkpoints
from mokd_fast.train.loop import Trainer, pretrain
from mokd_fast.train.recipe import load_recipe
from tests.train.recipes import CNN, VIT, broken_off, pictures, silent, small
from tests.train.test_loop import final_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("start") / "data", 14)


@pytest.fixture(scope="module")
def before(data, tmp_path_factory):
    """A run and the two backbones it exports."""
    recipe = small(data, "train.duration=1ep", "train.warmup=0it", models=(CNN, VIT))
    folder = tmp_path_factory.mktemp("before")
    run = pretrain(short(recipe), run=folder / "run", console=silent())
    return run, [mokd_fast.export(run, model=i) for i in (1, 2)]


def short(recipe):
    """Three steps: without warm-ups of epochs."""
    tree = recipe.model_dump(mode="json")
    for section in tree["models"]:
        section["temperature_warmup"] = dict.fromkeys(("self", "cross", "search"), "0it")
    tree["train"] |= {"warmup": "0it", "freeze_last_layers": "0it"}
    return load_recipe(tree)


def recipe_of(data, files, *more):
    names = [f"models.{i}.weights={path}" for i, path in enumerate(files)]
    return small(data, "train.seed=5", "train.checkpoint_every=2it", *names, *more)


def test_students_and_teachers_take_an_export(data, before, tmp_path):
    run, files = before
    console = silent()
    trainer = Trainer(recipe_of(data, files), tmp_path / "run", console)
    _, given = mokd_fast.load_run(run)
    for models in (trainer.mokd.students, trainer.mokd.teachers):
        for mine, theirs in zip(models, given.teachers, strict=True):
            theirs = theirs.state_dict()
            for key, value in mine.state_dict().items():
                if key.startswith("backbone."):
                    assert torch.equal(value, theirs[key]), key
    heads = [m.mlp_head.state_dict() for m in (trainer.mokd.students[0], given.teachers[0])]
    assert not torch.equal(*(next(iter(head.values())) for head in heads)), "the backbone alone"
    said = console.file.getvalue()
    assert (
        f"models.0.weights: 54 tensors of {files[0]}; optimizers and schedules begin anew" in said
    )
    assert trainer.done == 0 and final_state(tmp_path / "run")["step"] == 0
    trainer.lock.release()


def test_one_of_two(data, before, tmp_path):
    """The other starts as it would without; so do the heads."""
    files = before[1]
    states = []
    for i, names in enumerate(([], files[:1])):
        trainer = Trainer(recipe_of(data, names), tmp_path / str(i), silent())
        states.append({k: v.clone() for k, v in trainer.mokd.state_dict().items()})
    other = {k for k, v in states[0].items() if not torch.equal(v, states[1][k])}
    assert other and all(".0.backbone." in key for key in other)


def test_a_run_that_goes_on_does_not_need_them(data, before, tmp_path):
    """Cut off before its first checkpoint of a step; the files are gone by then."""
    files = [tmp_path / path.name for path in before[1]]
    for mine, path in zip(files, before[1], strict=True):
        mine.write_bytes(path.read_bytes())
    recipe = recipe_of(data, files, "train.duration=2ep")
    whole = pretrain(recipe, run=tmp_path / "whole", console=silent())
    broken_off(recipe, tmp_path / "parts", 1)
    for path in files:
        path.unlink()
    parts = pretrain(recipe, run=tmp_path / "parts", console=silent())
    one, two = final_state(whole), final_state(parts)
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    with pytest.raises(mokd_fast.UserError, match=r"these keys differ:\n  models.0.weights: "):
        pretrain(recipe_of(data, before[1], "train.duration=2ep"), run=parts, console=silent())
    mokd_fast.load_run(parts)  # nor does what comes after the training


def test_a_warm_start_goes_before_them(data, before, tmp_path):
    run, files = before
    console = silent()
    trainer = Trainer(recipe_of(data, files[:1]), tmp_path / "run", console, warm_start=run)
    given = final_state(run)["model"]
    assert all(torch.equal(v, given[k]) for k, v in trainer.mokd.state_dict().items())
    said = console.file.getvalue()
    assert "models.0.weights is left alone: --warm-start goes before it" in said
    assert "tensors of" not in said and "models.1" not in said


def test_mistakes_are_known_before_the_first_step(data, before, tmp_path):
    files = before[1]
    for names, message in (
        ([tmp_path / "no"], r"models.0.weights: .*/no: no such file; give a .safetensors, "),
        ([tmp_path], r"models.0.weights: .*: is a folder, not a file; "),
        (files[::-1], r"models.0.weights: .* does not fit mokd_cnn_tiny: not in it: "),
    ):
        with pytest.raises(mokd_fast.UserError, match=message):
            pretrain(recipe_of(data, names), run=tmp_path / "run", console=silent())
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_another_pair_does_not_take_them(before):
    named = ["models.1.weights=w.pth", "pair=resnet18+vit_tiny"]
    with pytest.raises(mokd_fast.UserError, match=r"models.1.weights is of .*write pair= in front"):
        load_recipe("resnet50-vit_small", named)
    recipe = load_recipe("resnet50-vit_small", named[::-1])
    assert [m.weights for m in recipe.models] == [None, "w.pth"]
    load_recipe(recipe.model_dump(mode="json"), ["models.1.weights=", "pair=resnet18+vit_tiny"])
