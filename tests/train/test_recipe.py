"""Recipes: the published numbers, strictness, overrides."""

import pytest

from mokd_fast import UserError
from mokd_fast.train.recipe import load_recipe, published_recipes, total_steps
from tests.train.recipes import small


def test_all_published_recipes_load():
    assert published_recipes() == ["dino", "fashion-mnist", "resnet50-vit_small", "self-distill"]
    assert [len(load_recipe(name).models) for name in published_recipes()] == [1, 2, 2, 1]
    assert load_recipe("dino").t_head is None and load_recipe("self-distill").t_head is not None


def test_every_number_of_the_official_run():
    r = load_recipe("resnet50-vit_small")
    cnn, vit = r.models
    assert (cnn.name, vit.name, r.prototypes) == ("resnet50", "vit_small_patch16_224", 65536)
    assert (r.train.batch, r.train.duration, r.train.warmup) == (256, "100ep", "10ep")
    assert (cnn.optimizer.name, cnn.optimizer.momentum, cnn.optimizer.lr) == ("sgd", 0.9, 0.1)
    assert cnn.optimizer.final_lr == 0.0048
    assert cnn.optimizer.weight_decay == cnn.optimizer.final_weight_decay == 1e-4
    assert (vit.optimizer.name, vit.optimizer.lr, vit.optimizer.final_lr) == ("adamw", 3e-4, 1e-5)
    assert (vit.optimizer.weight_decay, vit.optimizer.final_weight_decay) == (0.04, 0.4)
    t = cnn.t_head_optimizer
    assert (t.lr, t.final_lr, t.weight_decay, t.final_weight_decay) == (3e-4, 1e-5, 0.04, 0.4)
    assert vit.t_head_optimizer is None and r.train.lr_batch == 256
    assert (cnn.cross_weight, vit.cross_weight) == (1.0, 0.1)
    assert (cnn.drop_path, vit.drop_path) == (0.0, 0.1)
    assert (cnn.clip, vit.clip, r.train.freeze_last_layers) == (3.0, 3.0, "1ep")
    assert (r.teacher.momentum, r.teacher.final_momentum) == (0.996, 1.0)
    warm = cnn.temperature_warmup, vit.temperature_warmup
    assert [(w.self, w.cross, w.search) for w in warm] == [
        ("50ep", "30ep", "30ep"), ("30ep", "30ep", "30ep")
    ]  # fmt: skip
    loss = r.loss
    assert (loss.warmup_teacher_temperature, loss.teacher_temperature) == (0.04, 0.07)
    assert (loss.student_temperature, loss.center_momentum) == (0.1, 0.9)
    a = r.augment
    assert (a.global_size, a.global_scale, a.locals) == (224, (0.25, 1.0), 8)
    assert (a.local_size, a.local_scale) == (96, (0.05, 0.25))
    assert (cnn.mlp_head.train_norm, vit.mlp_head.train_norm) == (False, True)
    assert (cnn.mlp_head.hidden, cnn.mlp_head.bottleneck, cnn.mlp_head.layers) == (2048, 256, 3)
    assert (r.t_head.depth, r.t_head.heads, r.t_head.mlp_ratio) == (3, 6, 4.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bach=3", "unknown key train.bach; did you mean train.batch"),
        ("trian.batch=3", "unknown key trian"),
        ("models.1.optimizer.momentun=0.5", "did you mean models.1.optimizer.momentum"),
        ("train.batch=1.5", "train.batch: .*integer"),
        ("augment.flip=2", "augment.flip"),
        ("data.channels=2", "data.channels"),
        ("data.std=[0.0]", "std must be > 0"),
        ("data.mean=[0.1,0.2]", "mean needs 1 values"),
        ("train.duration=5", "duration"),
        ("train.duration=five", "3ep, 200it or 8%"),
        ("train.accumulate=3", "must be a multiple of accumulate=3"),
        ("t_head=", "two models need one"),
        ("models.7.name=x", "a number from 0 to 1"),
        ("batch", "is not key=value"),
        ("pair=resnet18", "joined by"),
        ("pair=resnet18+nonsense_net", "unknown model 'nonsense_net'"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        small("x", override)


def test_overrides():
    recipe = load_recipe("resnet50-vit_small", ["models.0.optimizer.lr=1e-3", "data.root=a b/c"])
    assert recipe.models[0].optimizer.lr == 1e-3 and recipe.data.root == "a b/c"
    pair = load_recipe("resnet50-vit_small", ["pair=vit_small+resnet18"]).models
    assert [m.optimizer.name for m in pair] == ["adamw", "sgd"]
    assert [m.name for m in pair] == ["vit_small", "resnet18"]


@pytest.mark.parametrize(
    "key", ["train.warmup", "train.freeze_last_layers", "models.1.temperature_warmup.cross"]
)
def test_a_warmup_longer_than_the_run(key):
    recipe = small("x", f"{key}=5ep")
    with pytest.raises(UserError, match=rf"{key}=5ep is 15 steps, longer than the run"):
        total_steps(recipe, 3)
    assert total_steps(small("x"), 3) == 12
