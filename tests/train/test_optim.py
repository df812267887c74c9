"""Parameter groups, rates and the freeze, as the official code sets them."""

import copy

import pytest
import torch

from bench.baseline import official
from mokd_fast.ops import cpu
from mokd_fast.train.loop import Trainer
from mokd_fast.train.networks import build
from mokd_fast.train.optim import ScheduledOptimizer, freeze_last_layers, parameter_groups
from tests.train.recipes import CNN, SGD, T_HEAD, VIT, model, pictures, silent, small

GO = torch.tensor(False)


def names(model, group) -> set[str]:
    found = {id(p): n for n, p in model.named_parameters()}
    return {found[id(p)] for p in group}


def test_groups():
    vit = build(small("x")).students[1]
    decayed, plain = (names(vit, group) for group in parameter_groups(vit, own_t_head=False))
    for name in (
        "backbone.cls_token", "backbone.pos_embed", "t_head.pos_embed",
        "mlp_head.last_layer.weight_g", "mlp_head.last_layer.weight_v",
        "t_head.last_layer.weight_g", "t_head.last_layer.weight_v",
    ):  # fmt: skip
        assert name in decayed, name
    trained = {n: p for n, p in vit.named_parameters() if p.requires_grad}
    assert plain == {n for n, p in trained.items() if n.endswith(".bias") or p.ndim == 1}
    assert decayed == trained.keys() - plain
    assert any(n.endswith("norm.weight") for n in plain)


def test_the_t_head_group_of_the_cnn():
    cnn = build(small("x")).students[0]
    decayed, plain, head = (names(cnn, group) for group in parameter_groups(cnn, own_t_head=True))
    assert {n for n, _ in cnn.named_parameters() if n.startswith("t_head.")} == head
    assert any(n.endswith(".bias") for n in head) and any("norm" in n for n in head)
    rest = {n for n, _ in cnn.named_parameters()} - head
    # train_norm is false for the CNN: its prototype norms stay 1 and are in no group.
    assert decayed | plain == rest - {"mlp_head.last_layer.weight_g"} and not decayed & plain


def test_rates_follow_the_schedules():
    recipe = small("x", models=({**CNN, "t_head_optimizer": T_HEAD}, VIT))
    student = build(recipe).students[0]
    optimizer = ScheduledOptimizer(recipe.models[0], student, total=10, warmup=2, lr_scale=4.0)
    lr = official.cosine_schedule(0.05 * 4, 0.001, 10, 1, warmup_epochs=2)
    lr_head = official.cosine_schedule(1e-3 * 4, 1e-5, 10, 1, warmup_epochs=2)
    decay = official.cosine_schedule(0.04, 0.4, 10, 1)
    for step in range(10):
        optimizer.schedule(step)
        groups = optimizer.torch.param_groups
        assert [g["lr"] for g in groups] == pytest.approx([lr[step], lr[step], lr_head[step]])
        assert [g["weight_decay"] for g in groups] == pytest.approx([1e-4, 0.0, decay[step]])
        assert {type(g["lr"]) for g in groups} == {float}  # a NumPy number would not load again


def test_lr_scales_with_the_batch(tmp_path):
    """lr_batch: lr is for that batch; final_lr does not scale; null leaves it as it is."""
    data = pictures(tmp_path / "data", 14)
    for lr_batch, factor in ((2, 2.0), ("null", 1.0)):
        recipe = small(data, f"train.lr_batch={lr_batch}", "train.duration=40it")
        trainer = Trainer(recipe, tmp_path / str(lr_batch), silent())
        rates = trainer.optimizers[0].schedules[0][0]
        assert rates.max() == pytest.approx(0.05 * factor)
        assert 0.001 < rates[-1] < 0.001 + 0.01 * 0.05 * factor


def test_frozen_layers_do_not_move():
    recipe = small("x", models=({**CNN, "t_head_optimizer": T_HEAD}, VIT))
    for config, student in zip(recipe.models, build(recipe).students, strict=True):
        optimizer = ScheduledOptimizer(config, student, total=4, warmup=0, lr_scale=1.0)
        before = {n: p.detach().clone() for n, p in student.named_parameters()}
        for step in range(2):
            for p in student.parameters():
                p.grad = torch.ones_like(p)
            freeze_last_layers(student.named_parameters())
            optimizer.schedule(step)
            optimizer.step(GO)
        for name, parameter in student.named_parameters():
            frozen = ".last_layer." in name
            assert torch.equal(parameter, before[name]) == frozen, name
        for p in student.parameters():
            p.grad = torch.ones_like(p)
        optimizer.schedule(2)
        optimizer.step(GO)  # momentum of some tensors only, since the others were frozen
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                assert not torch.equal(parameter, before[name]), name


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
def test_clip_step_and_ema_are_one_pass(tmp_path, monkeypatch):
    """Of both models, from the first step on that makes no optimizer state: convolutions of 1 x 1,
    whose gradients have other strides, and layers without a gradient are no exception."""
    seen, run = [], cpu.update
    monkeypatch.setattr(cpu, "update", lambda *a: seen.append(len(a[0])) or run(*a))
    resnet = model("resnet18", SGD, kwargs={"layers": [1, 1, 1, 1]})
    recipe = small(pictures(tmp_path / "data", 14), models=(resnet, VIT))
    trainer = Trainer(recipe, tmp_path / "run", silent())
    trainer.mokd.train()
    batches = trainer.loader.batches()
    calls = []
    for k in range(trainer.frozen_steps + 2):
        trainer.step(k, batches)
        calls.append(list(seen))
        seen.clear()
    everything = [len(list(student.parameters())) for student in trainer.mokd.students]
    starts = 0, trainer.frozen_steps  # AdamW's moments are made by its own step; SGD's before it
    for k, found in enumerate(calls):
        assert found == (everything[:1] if k in starts else everything), k


def test_fused_sgd_is_the_ordinary_one():
    """Over a freeze, decay and momentum: the zero momentum it starts from changes nothing."""
    recipe = small("x", models=({**CNN, "t_head_optimizer": T_HEAD}, VIT))
    student = build(recipe).students[0].double().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(student)
    optimizer, plain = (
        ScheduledOptimizer(recipe.models[0], net, total=9, warmup=2, lr_scale=1.0)
        for net in (student, twin)
    )
    groups = [{"params": g["params"], "weight_decay": 0.0} for g in plain.torch.param_groups]
    plain.torch = torch.optim.SGD(groups, momentum=0.9, foreach=False)
    for step in range(6):
        for p, q in zip(student.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step < 2:
            freeze_last_layers(student.named_parameters())
            freeze_last_layers(twin.named_parameters())
        optimizer.schedule(step)
        optimizer.step(GO)
        plain.schedule(step)
        plain.torch.step()
        for p, q in zip(student.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-16)
