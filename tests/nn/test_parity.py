"""Ours against bench/baseline, the official step in plain PyTorch, from the same weights."""

import copy
from pathlib import Path

import pytest
import torch

from bench.baseline.best import BestStep
from bench.twin import official_step, official_students
from mokd_fast.nn import Temperatures
from mokd_fast.train.loop import Trainer
from mokd_fast.train.networks import build
from tests.train.recipes import CNN, SGD, T_HEAD, VIT, model, pictures, silent, small

WIDE_VIT = model("vit_tiny_patch16_224", kwargs={"patch_size": 7, "depth": 2, "embed_dim": 24})
WIDE_VIT["kwargs"]["num_heads"] = 3
PAIRS = {
    "cnn+vit": ((CNN, VIT), {}),
    "cnn+cnn": ((CNN, model("resnet18", SGD, kwargs={"layers": [1, 1, 1, 1]})), {}),
    "vit+vit, unequal widths": ((VIT, WIDE_VIT), {}),
    "vit with the T-Head's width": ((CNN, VIT), {"t_head": {"depth": 2, "heads": 4}}),
    "no local crops": ((CNN, VIT), {"augment": {"global_size": 28, "locals": 0}}),
    "one local crop": (
        (CNN, VIT),
        {"augment": {"global_size": 28, "local_size": 14, "locals": 1}},
    ),
    "not square": (
        (CNN, WIDE_VIT),
        {"augment": {"global_size": [28, 42], "local_size": [14, 28], "locals": 2}},
    ),
}


def both(pair: str, dtype: torch.dtype, way: str = "auto"):
    """Losses and gradients of both steps on the same weights, views and centres."""
    models, more = PAIRS[pair]
    torch.manual_seed(0)
    recipe = small("unused", f"loss.prototypes={way}", models=models, **more)
    ours = build(recipe).to(dtype).train()
    taus = [Temperatures(0.05, 0.04, 0.04), Temperatures(0.04, 0.04, 0.04)]
    students = official_students(ours, recipe)
    official = _official(students, recipe, dtype)
    augment = recipe.augment
    views = [torch.randn(8, 1, *augment.global_hw, dtype=dtype) for _ in range(2)]
    views += [torch.randn(8, 1, *augment.local_hw, dtype=dtype) for _ in range(augment.locals)]
    local_views = torch.stack(views[2:]) if augment.locals else None
    for _ in range(2):  # the second time with centres that have moved
        for module in (ours, *official.students):
            module.zero_grad()
        out = ours(torch.stack(views[:2]), local_views, taus)
        torch.stack(out.totals).sum().backward()
        ours.centers.update(out.center_means)
        theirs = official.losses(views, epoch=0)
        (theirs["loss_1"] + theirs["loss_2"]).backward()
    mine = dict(out.terms) | {f"loss_{i}": t for i, t in enumerate(out.totals, 1)}
    return ours, official, mine, theirs


def _official(students, recipe, dtype):
    from bench.baseline import official

    settings = [
        official.ModelSettings("adamw", [1e-3], [0.0], config.cross_weight)
        for config in recipe.models
    ]
    step = official.OfficialStep(
        students, tuple(settings), [0.9], out_dim=recipe.prototypes,
        n_views=2 + recipe.augment.locals, epochs=1, temperature=(0.04, 0.04),
        warmup_1=0, warmup_2=0,
    )  # fmt: skip
    for kind in ("self_mlp_1", "self_t_1"):  # model 1's self losses have a schedule of their own
        step.centered[kind].temperatures = [0.05]
    return step


@pytest.mark.parametrize(
    ("pair", "way"),
    [*((pair, "fused-linear") for pair in PAIRS), ("cnn+vit", "fused"), ("cnn+vit", "reference")],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_losses_and_gradients(pair, way, dtype, tolerance):
    ours, official, mine, theirs = both(pair, dtype, way)
    assert mine.keys() == theirs.keys() and len(mine) == 10
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name].detach(), value.detach(), rtol=tolerance, atol=0)
    for student, twin in zip(ours.students, official.students, strict=True):
        gradients = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
        expected = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
        assert gradients.keys() == expected.keys()
        scale = max(g.abs().max() for g in expected.values())
        for name, gradient in gradients.items():
            assert gradient is not None, f"{name} gets no gradient"
            torch.testing.assert_close(
                gradient, expected[name], rtol=tolerance, atol=tolerance * scale, msg=name
            )
    for name in ("mlp", "t"):
        for i in (1, 2):
            theirs_center = official.centered[f"self_{name}_{i}"].center.flatten()
            torch.testing.assert_close(ours.centers[f"{name}_{i}"], theirs_center)


def test_the_batch_statistics_are_the_official_ones():
    """Globals and locals are two BatchNorm batches; the teacher sees globals alone."""
    ours, official, _, _ = both("cnn+vit", torch.float64)
    for mine, theirs in (
        (ours.students[0], official.students[0]),
        (ours.teachers[0], official.teachers[0]),
    ):
        expected = dict(theirs.named_buffers())
        for name, value in mine.named_buffers():
            torch.testing.assert_close(value, expected[name])
    assert ours.students[0].backbone.stem.bn.num_batches_tracked == 4
    assert ours.teachers[0].backbone.stem.bn.num_batches_tracked == 2


def curves(tmp_path: Path, steps: int, models, *overrides: str, dtype=torch.float64, order=1):
    """A trainer and the official step from the same weights and crops, and their losses in every
    step; `order` -1 gives the official one each batch's pictures from the last to the first, and
    the trainer makes no steps."""
    data = pictures(tmp_path / "data", 20)
    recipe = small(data, f"train.duration={steps // 5}ep", *overrides, models=models)
    trainer = Trainer(recipe, tmp_path / "run", silent())
    assert trainer.total == steps
    trainer.mokd.to(dtype).train()
    official = official_step(trainer)
    for student in official.students:
        student.to(dtype)
    crops = trainer.loader.batches(0)
    trainer.to_device = lambda views: tuple(v.to(dtype).permute(0, 1, 4, 2, 3) / 255 for v in views)
    mine, theirs = [], []
    for k in range(steps):
        views = next(crops)[:2]
        given = [x.to(dtype).permute(0, 3, 1, 2) / 255 for group in views for x in group]
        given = [x.flip(0) if order < 0 else x for x in given]
        theirs.append(official.step(given, k, k // trainer.steps_per_epoch))
        if order > 0:
            mine.append(trainer.step(k, iter([copy.deepcopy(views)])).losses)
    return trainer, official, mine, theirs


@pytest.mark.parametrize(
    ("official_groups", "way", "steps"),
    [(True, "fused-linear", 50), (False, "fused", 20), (True, "reference", 20)],
)
def test_curve_in_fp64(tmp_path: Path, official_groups: bool, way: str, steps: int):
    """The curve of a tiny pair: optimizers, groups, clip, freeze, EMA, centres, all of it. With
    stored logits and without it is the official one."""
    cnn = {**CNN, "t_head_optimizer": T_HEAD} if official_groups else CNN
    cnn = {**cnn, "temperature_warmup": {"self": "3ep", "cross": "2ep", "search": "2ep"}}
    overrides = "models.0.clip=0.3", f"loss.prototypes={way}"
    trainer, official, mine, theirs = curves(tmp_path, steps, (cnn, VIT), *overrides)
    for k, (own, want) in enumerate(zip(mine, theirs, strict=True)):
        for name, value in want.items():
            torch.testing.assert_close(own[name], value, rtol=1e-9, atol=0, msg=f"{name} at {k}")
    for mine_model, theirs_model in zip(trainer.mokd.teachers, official.teachers, strict=True):
        expected = theirs_model.state_dict()
        for name, value in mine_model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_curve_in_fp32(tmp_path: Path):
    """Within twice what the official step differs from itself when each batch's pictures come in
    another order, which changes nothing but roundings."""
    models = CNN, VIT
    _, _, mine, theirs = curves(tmp_path / "1", 50, models, dtype=torch.float32)
    *_, other = curves(tmp_path / "2", 50, models, dtype=torch.float32, order=-1)

    def distance(curve) -> float:
        steps = zip(curve, theirs, strict=True)
        return max(float((own[n] - want[n]).abs()) for own, want in steps for n in want)

    assert 0 < distance(mine) <= 2 * distance(other)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("pair", ["cnn+vit", "vit+vit, unequal widths", "no local crops"])
def test_best_plain_step_is_the_official_one(tmp_path: Path, pair: str, attention: str):
    models, more = PAIRS[pair]
    data = pictures(tmp_path / "data", 8)
    recipe = small(data, "train.freeze_last_layers=0it", models=models, **more)
    trainer = Trainer(recipe, tmp_path / "run", silent())
    trainer.mokd.double().train()
    steps = [
        official_step(trainer),
        official_step(trainer, BestStep, attention=attention, compiled=False),
    ]
    augment = recipe.augment
    for k in range(4):
        crops = [torch.randn(4, 1, *augment.global_hw).double() for _ in range(2)]
        crops += [torch.randn(4, 1, *augment.local_hw).double() for _ in range(augment.locals)]
        want, found = (step.step(crops, k, 0) for step in steps)
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0, msg=f"{name} at {k}")
    for plain, best in zip(*(step.teachers for step in steps), strict=True):
        torch.testing.assert_close(best.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-9)
    for name, loss in steps[0].centered.items():
        torch.testing.assert_close(steps[1].centered[name].center, loss.center)
