"""Parameter groups, rates and the freeze, as the official code sets them."""

import torch

from mokd_fast.train.loop import build
from mokd_fast.train.optim import ScheduledOptimizer, freeze_last_layers, parameter_groups
from tests.train.recipes import CNN, T_HEAD, VIT, small


def names(model, group) -> set[str]:
    found = {id(p): n for n, p in model.named_parameters()}
    return {found[id(p)] for p in group}


def test_groups():
    cnn, vit = build(small("x")).students
    decayed, plain = (names(vit, group) for group in parameter_groups(vit, own_t_head=False))
    assert {"backbone.cls_token", "backbone.pos_embed", "t_head.pos_embed"} <= decayed
    assert {"mlp_head.last_layer.weight_g", "mlp_head.last_layer.weight_v"} <= decayed
    assert all(n.endswith(".bias") or "norm" in n or ".bn." in n for n in plain)
    decayed, plain, head = (names(cnn, group) for group in parameter_groups(cnn, own_t_head=True))
    assert {n for n, _ in cnn.named_parameters() if n.startswith("t_head.")} == head
    assert "mlp_head.last_layer.weight_g" not in decayed | plain | head  # frozen at 1


def test_rates_follow_the_schedules():
    recipe = small("x", models=({**CNN, "t_head_optimizer": T_HEAD}, VIT))
    student = build(recipe).students[0]
    optimizer = ScheduledOptimizer(recipe.models[0], student, total=10, warmup=2, lr_scale=4.0)
    optimizer.schedule(1)
    groups = optimizer.torch.param_groups
    assert [g["lr"] for g in groups] == [0.2, 0.2, 0.004]  # the ends of the ramps, scaled
    assert [round(g["weight_decay"], 6) for g in groups] == [
        1e-4,
        0.0,
        round(groups[2]["weight_decay"], 6),
    ]
    assert 0.04 < groups[2]["weight_decay"] < 0.4
    optimizer.schedule(9)
    assert 0.001 < groups[0]["lr"] < 0.02  # final_lr is not scaled


def test_frozen_layers_do_not_move():
    recipe = small("x")
    for config, student in zip(recipe.models, build(recipe).students, strict=True):
        optimizer = ScheduledOptimizer(config, student, total=4, warmup=0, lr_scale=1.0)
        before = {n: p.detach().clone() for n, p in student.named_parameters()}
        for step in range(2):
            for p in student.parameters():
                p.grad = torch.ones_like(p)
            freeze_last_layers(student.named_parameters())
            optimizer.schedule(step)
            optimizer.torch.step()
        for name, parameter in student.named_parameters():
            frozen = ".last_layer." in name
            assert torch.equal(parameter, before[name]) == frozen, name
