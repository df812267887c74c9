"""What is easy to get wrong in the method, one test a line of the design."""

import pytest
import torch

from mokd_fast import UserError
from mokd_fast.nn import Temperatures
from mokd_fast.nn.build import NetworkConfig, THeadConfig, build_mokd
from mokd_fast.train.loop import build
from tests.train.recipes import CNN, VIT, small

TAUS = [Temperatures(0.04, 0.04, 0.04)] * 2


def views(n_local: int = 2):
    torch.manual_seed(1)
    return torch.randn(2, 4, 1, 28, 28), torch.randn(n_local, 4, 1, 14, 14) if n_local else None


def test_no_parameter_lives_on_the_search_path_alone():
    mokd = build(small("x")).train()
    torch.stack(mokd(*views(), TAUS).totals).sum().backward()
    for name, parameter in mokd.named_parameters():
        if name.startswith("teachers"):
            assert not parameter.requires_grad and parameter.grad is None
        elif parameter.requires_grad:
            assert parameter.grad is not None, name


def test_teachers_start_as_copies_without_drop_path():
    vit = {**VIT, "drop_path": 0.4, "kwargs": {"proj_drop_rate": 0.3}}
    mokd = build(small("x", models=(CNN, vit))).train()
    for student, teacher in zip(mokd.students, mokd.teachers, strict=True):
        for name, value in student.state_dict().items():
            assert torch.equal(value, teacher.state_dict()[name])
    x, _ = views()
    first, second = (mokd.teachers[1](x).mlp for _ in range(2))
    assert torch.equal(first, second)
    first, second = (mokd.students[1](x).mlp for _ in range(2))
    assert not torch.equal(first, second)


def test_ema_moves_parameters_alone():
    mokd = build(small("x")).train()
    mokd(*views(), TAUS)
    before = {k: v.clone() for k, v in mokd.teachers.state_dict().items()}
    with torch.no_grad():
        for p in mokd.students.parameters():
            p.add_(1)
    mokd.update_teachers(0.75)
    parameters = dict(mokd.teachers.named_parameters())
    for name, value in mokd.teachers.state_dict().items():
        moved = 0.25 if name in parameters else 0
        torch.testing.assert_close(value, before[name] + moved)


def test_centre_is_the_moving_mean_of_teacher_logits():
    mokd = build(small("x")).train()
    out = mokd(*views(), TAUS)
    mokd.update_centers(out.center_means)
    for name, mean in out.center_means.items():
        torch.testing.assert_close(mokd.get_buffer(name), 0.1 * mean)
    logits = mokd.teachers[0](views()[0]).mlp
    torch.testing.assert_close(out.center_means["center_mlp_1"], logits.flatten(0, 1).mean(0))


def test_lambda_scales_the_total_and_not_the_terms():
    totals = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        mokd = build(small("x", f"models.0.cross_weight={weight}")).train()
        totals.append(mokd(*views(), TAUS))
    (none, full) = totals
    for name, term in none.terms.items():
        assert torch.equal(term, full.terms[name])
    mutual = full.terms["cross_1"] + full.terms["search_1"]
    torch.testing.assert_close(full.totals[0] - none.totals[0], mutual, rtol=1e-4, atol=1e-4)
    assert torch.equal(full.totals[1], none.totals[1])


@pytest.mark.parametrize(("t_head", "names"), [(None, ["self_mlp_1"]), ({"heads": 4}, None)])
def test_one_model_is_self_distillation(t_head, names):
    mokd = build(small("x", models=[VIT], t_head=t_head)).train()
    out = mokd(*views(), TAUS)
    assert list(out.terms) == (names or ["self_mlp_1", "self_t_1"]) and len(out.totals) == 1


def build_pair(*names: str, **t_head):
    kwargs = {"vit": {"depth": 1}, "res": {}, "mok": {}}
    networks = [NetworkConfig(name=name, kwargs=kwargs[name[:3]]) for name in names]
    return build_mokd(
        networks, THeadConfig(**t_head), prototypes=8, channels=3,
        global_size=(32, 32), local_size=None,
    )  # fmt: skip


def test_width_of_the_t_head_and_its_stems():
    def widths(mokd):
        return [
            (head.pos_embed.shape[-1], isinstance(head.stem, torch.nn.Linear))
            for head in (student.t_head for student in mokd.students)
        ]

    assert widths(build_pair("resnet18", "vit_tiny_patch16_224")) == [(192, True), (192, False)]
    assert widths(build_pair("resnet18", "mokd_cnn_tiny")) == [(384, True), (384, True)]
    # 128 is the CNN's own width: it has a stem all the same, as the official one.
    assert widths(build_pair("mokd_cnn_tiny", "resnet18", dim=128, heads=4))[0] == (128, True)
    pair = build_pair("vit_small_patch16_224", "vit_tiny_patch16_224")
    assert widths(pair) == [(192, True), (192, False)]
    with pytest.raises(UserError, match=r"t_head.heads=5 does not divide"):
        build_pair("resnet18", "vit_tiny_patch16_224", heads=5)
