"""Recipes: the published numbers, strictness, overrides."""

from importlib import resources

import pytest
import yaml

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
    assert (cnn.mlp_head.batch_norm, vit.mlp_head.batch_norm) == (False, False)
    assert (vit.mlp_head.hidden, vit.mlp_head.bottleneck, vit.mlp_head.layers) == (2048, 256, 3)
    assert (r.t_head.depth, r.t_head.heads, r.t_head.mlp_ratio) == (3, 6, 4.0)
    assert r.t_head.dim is None  # the ViT's width
    assert (a.flip, a.jitter, a.brightness, a.contrast) == (0.5, 0.8, 0.4, 0.4)
    assert (a.saturation, a.hue, a.grey, a.blur_sigma) == (0.2, 0.1, 0.2, (0.1, 2.0))
    assert (a.blur, a.solarize) == ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
    assert (r.data.mean, r.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_official_file_states_every_number():
    """It leans on no default: a changed default cannot change a published run."""
    text = resources.files("mokd_fast") / "recipes" / "resnet50-vit_small.yaml"
    stated = yaml.safe_load(text.read_text())
    official = load_recipe("resnet50-vit_small").model_dump(mode="json")
    # AdamW has no momentum, and neither optimizer is LARS.
    unused = {"kwargs", "momentum", "trust", "train_limit", "test_limit"}

    def missing(whole, part):
        if isinstance(whole, dict) and part is not None:
            for key, value in whole.items():
                if key not in part:
                    yield key
                else:
                    yield from missing(value, part[key])
        elif isinstance(whole, list):
            for one, other in zip(whole, part, strict=True):
                yield from missing(one, other)

    assert set(missing(official, stated)) <= unused
    assert stated["models"][0]["optimizer"]["momentum"] == 0.9


def test_the_baselines_are_the_official_vit():
    vit = load_recipe("resnet50-vit_small").models[1]
    for name in ("dino", "self-distill"):
        assert load_recipe(name).models[0].model_copy(update={"cross_weight": 0.1}) == vit


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modles=3", r"unknown key modles; did you mean models\?"),
        ("batch=3", r"unknown key batch; did you mean train.batch\?"),
        ("models.0.lr=3", r"did you mean models.0.optimizer.lr\?"),
        ("train.bach=3", "unknown key train.bach; did you mean train.batch"),
        ("trian.batch=3", r"unknown key trian; did you mean train\?"),
        ("models.1.optimizer.momentun=0.5", "did you mean models.1.optimizer.momentum"),
        ("train.batch=1.5", "train.batch: .*integer"),
        ("augment.flip=2", "augment.flip"),
        ("data.channels=2", "data.channels"),
        ("data.std=[0.0]", "std must be > 0"),
        ("models.0.optimizer.lr=.inf", "finite number"),
        ("data.std=[.nan]", "data.std.0: .*finite number"),
        ("data.mean=[0.5", "value is not valid YAML"),
        ("data.root=[a]", r"data.root: .*string, got \['a'\]"),
        ("train=3", "train: .*dictionary"),
        ("train.batch.x=3", "train.batch.x: train.batch is a value"),
        ("train.seed=99999999999999999999", "train.seed"),
        ("teacher.momentum=1.5", "teacher.momentum: .*less than or equal to 1"),
        ("models.0.optimizer.lr=-1", "models.0.optimizer.lr: .*greater than 0"),
        ("models.0.optimizer.name=lion", "models.0.optimizer.name: .*'sgd', 'adamw', .*got 'lion'"),
        ("models=[]", "models: .*at least 1"),
        ("evaluate.k=[0]", "evaluate.k"),
        ("evaluate.k=[]", "evaluate.k"),
        ("=3", "is not key=value"),
        ("data.mean=[0.1,0.2]", "mean needs 1 values"),
        ("train.duration=5", "duration"),
        ("train.duration=five", "3ep, 200it or 8%"),
        ("train.pack_crops=ture", r"train.pack_crops: .*'auto', True or False, got 'ture'"),
        ("train.accumulate=3", "must be a multiple of accumulate=3"),
        ("t_head=", "two models need one"),
        ("t_head.search=some", "t_head.search: .*'joint', 'cross' or 'none', got 'some'"),
        ("t_head={search: none, maps: both}", "t_head: search=none searches nothing: leave"),
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
    both = load_recipe("resnet50-vit_small", ["pair=resnet18+resnet34"]).models
    assert [m.optimizer.name for m in both] == ["sgd", "sgd"]
    free = load_recipe("resnet50-vit_small", ["models.1.clip=null", "models.0.clip="])
    assert [m.clip for m in free.models] == [None, None]
    tree = small("x").model_dump(mode="json")
    assert load_recipe(tree, ["train.batch=8"]).train.batch == 8
    assert tree["train"]["batch"] == 4, "the caller's dict is left alone"


def test_a_pair_needs_models_to_name():
    with pytest.raises(UserError, match="no list of models"):
        load_recipe({"name": "x", "data": None}, ["pair=resnet18+resnet18"])


def test_files_of_recipes(tmp_path):
    tree = small("x").model_dump(mode="json")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree).replace("lr: 0.05", "lr: 5e-2"))  # YAML 1.1: a string
    assert load_recipe(path) == small("x")
    for content, message in (
        (b"", "must be a mapping of keys"),
        (b"a: [1", "is not valid YAML"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"name: x\n", "models: Field required"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_recipe(path)
    with pytest.raises(UserError, match=r"gone.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match=r"no recipe 'dinno'.*dino, fashion-mnist"):
        load_recipe("dinno")


@pytest.mark.parametrize(
    "key", ["train.warmup", "train.freeze_last_layers", "models.1.temperature_warmup.cross"]
)
def test_a_warmup_longer_than_the_run(key):
    """All of them are said at once: a shorter published run has six."""
    recipe = small("x", f"{key}=5ep")
    with pytest.raises(UserError, match=rf"{key}=5ep is 15 steps: longer than the run"):
        total_steps(recipe, 3)
    assert total_steps(small("x"), 3) == 12
    for wrong in ("50%", "0it", "0.1ep"):
        with pytest.raises(UserError, match=rf"train.duration={wrong}: at least one step"):
            total_steps(small("x", f"train.duration={wrong}"), 3)


@pytest.mark.parametrize("number", ["20", "0.5", "true"])
def test_a_duration_without_a_unit(number):
    message = rf"train.duration: a duration is written 3ep, 200it or 8%, got {number.capitalize()}$"
    with pytest.raises(UserError, match=message):
        small("x", f"train.duration={number}")


def test_every_long_warmup_is_named_at_once():
    recipe = load_recipe("resnet50-vit_small", ["train.duration=20ep"])
    with pytest.raises(UserError) as error:
        total_steps(recipe, 10)
    for i in (0, 1):
        for kind in ("self", "cross", "search"):
            assert f"models.{i}.temperature_warmup.{kind}=" in str(error.value)
    overrides = str(error.value).partition("in %: ")[2].split()  # ready to be pasted
    assert total_steps(load_recipe("resnet50-vit_small", ["train.duration=20ep", *overrides]), 10)


def test_batch_norm_needs_two_rows():
    with pytest.raises(UserError, match=r"raise train.batch or augment.locals"):
        small("x", "train.batch=1", "augment.locals=1")
    small("x", "train.batch=1", "augment.locals=0")


def test_packs_are_not_made_again():
    both = ("train.pack_crops=true", "train.checkpoint_activations=true")
    with pytest.raises(UserError, match="exclude each other: set one of them to false"):
        load_recipe("resnet50-vit_small", list(both))
    for one in both:
        load_recipe("resnet50-vit_small", [one])
