"""What is easy to get wrong in the method, one test a line of the design."""

import copy
import sys

import pytest
import torch
from timm.layers import DropPath
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.baseline.official import SearchLoss
from mokd_fast import UserError
from mokd_fast.nn import Temperatures
from mokd_fast.nn.build import NetworkConfig, THeadConfig, build_mokd
from mokd_fast.nn.heads import THead
from mokd_fast.ops import cpu
from mokd_fast.train.networks import build
from tests.train.recipes import CNN, VIT, model, small

TAUS = [Temperatures(0.04, 0.04, 0.04)] * 2


def views(n_local: int = 2):
    torch.manual_seed(1)
    return torch.randn(2, 4, 1, 28, 28), torch.randn(n_local, 4, 1, 14, 14) if n_local else None


NARROW = model("vit_tiny_patch16_224", kwargs={"patch_size": 7, "depth": 1, "embed_dim": 24})
NARROW["kwargs"]["num_heads"] = 3


@pytest.mark.parametrize(
    ("models", "t_head"),
    [
        ((CNN, VIT), {"dim": 48, "depth": 2, "heads": 4}),  # both have a stem
        ((CNN, VIT), {"depth": 1, "heads": 4}),  # the ViT has none
        ((CNN, CNN), {"dim": 128, "depth": 1, "heads": 4}),
        ((NARROW, VIT), {"depth": 1, "heads": 4}),  # unequal widths
    ],
)
@pytest.mark.parametrize("locals_", [0, 2])
def test_no_parameter_lives_on_the_search_path_alone(models, t_head, locals_):
    mokd = build(small("x", models=models, t_head=t_head)).train()
    torch.stack(mokd(*views(locals_), TAUS).totals).sum().backward()
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
    assert not any(isinstance(m, DropPath) and m.drop_prob for m in mokd.teachers.modules())
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in mokd.teachers.modules())
    assert not any(p.requires_grad for p in mokd.teachers.parameters())
    x, _ = views()
    first, second = (mokd.teachers[1](x).mlp for _ in range(2))
    assert torch.equal(first, second)
    first, second = (mokd.students[1](x).mlp for _ in range(2))
    assert not torch.equal(first, second)


def test_batch_norm_of_a_teacher_sees_the_globals_alone():
    mokd = build(small("x")).train()
    x, local = views()
    mokd(x, local, TAUS)
    teacher, student = (m.backbone.stem.bn for m in (mokd.teachers[0], mokd.students[0]))
    assert teacher.num_batches_tracked == 1 and student.num_batches_tracked == 2
    y = mokd.teachers[0].backbone.stem.conv(x.flatten(0, 1))
    torch.testing.assert_close(teacher.running_mean, 0.1 * y.mean((0, 2, 3)))
    mokd.teachers[0].backbone.stem.bn.reset_running_stats()
    again = mokd.teachers[0](x).mlp  # batch statistics, not the running ones
    mokd.eval()
    assert not torch.allclose(mokd.teachers[0](x).mlp, again)


@pytest.mark.parametrize("search", ["joint", "cross"])
@pytest.mark.parametrize("locals_", [0, 1, 3])
def test_who_searches_which_map(locals_, search):
    """Locals search view 1's map; without them view 1 searches view 2's and the other way round."""
    t_head = {"dim": 48, "depth": 2, "heads": 4, "search": search}
    mokd = build(small("x", t_head=t_head)).train()
    x, local = views(locals_)
    out = mokd(x, local, TAUS)
    for i in (0, 1):
        student, teacher = mokd.students[i], mokd.teachers[1 - i]
        maps = teacher(x).features.tokens.unflatten(0, (2, 4))
        grid, head = teacher(x).features.grid, teacher.t_head
        own = student(x if local is None else local)
        searched = [
            head.search(maps[1 - q if local is None else 0], grid, own.query[q : q + 1])[0]
            for q in range(len(own.query))
        ]
        logits = student.t_head.last_layer(own.t).flatten(0, 1)
        expected = SearchLoss([0.04])(logits, head.last_layer(torch.cat(searched)), 0)
        torch.testing.assert_close(out.terms[f"search_{i + 1}"], expected.detach())


@pytest.mark.parametrize("search", ["joint", "cross"])
@pytest.mark.parametrize(
    ("queries", "maps", "asked"),
    [
        ("local", "both", [(2, 0), (3, 0), (2, 1), (3, 1)]),
        ("all", "first", [(0, 1), (1, 0), (2, 0), (3, 0)]),
        ("all", "both", [(0, 1), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]),
    ],
)
def test_other_choices_of_queries_and_maps(queries, maps, asked, search):
    """The mean over (view, map) pairs of one cross-entropy each."""
    t_head = {"dim": 48, "depth": 2, "heads": 4, "queries": queries, "maps": maps, "search": search}
    mokd = build(small("x", t_head=t_head)).train()
    x, local = views(2)
    out = mokd(x, local, TAUS)
    student, teacher = mokd.students[0], mokd.teachers[1]
    found = teacher(x).features
    own = [student(x), student(local)]
    queries_, t = (torch.cat([getattr(o, name) for o in own]) for name in ("query", "t"))
    terms = []
    for view, chosen in asked:
        tokens = found.tokens.unflatten(0, (2, 4))[chosen]
        searched = teacher.t_head.search(tokens, found.grid, queries_[view : view + 1])[0]
        logits, target = student.t_head.last_layer(t[view]), teacher.t_head.last_layer(searched)
        terms.append(SearchLoss([0.04])(logits, target, 0))
    torch.testing.assert_close(out.terms["search_1"], torch.stack(terms).mean().detach())


def test_without_a_search_the_other_losses_stay_as_they_are(monkeypatch):
    """Nothing searches, and every parameter still learns."""
    x, local = views()
    outs = []
    for search in ("joint", "none"):
        torch.manual_seed(0)
        t_head = {"dim": 48, "depth": 2, "heads": 4, "search": search}
        mokd = build(small("x", t_head=t_head)).train()
        outs.append(mokd(x, local, TAUS))
        monkeypatch.setattr(THead, "search", None)  # a second search would raise
    with_it, without = outs
    names = {f"{name}_{i}" for name in ("self_mlp", "self_t", "cross") for i in (1, 2)}
    assert set(without.terms) == names == {n for n in with_it.terms if "search" not in n}
    assert all(torch.equal(without.terms[name], with_it.terms[name]) for name in names)
    torch.stack(without.totals).sum().backward()
    assert all(p.grad is not None for p in mokd.students.parameters() if p.requires_grad)


def test_a_cross_search_shares_the_plain_pass(monkeypatch):
    """Each T-Head embeds the tokens of a pass once, a teacher's with the search too; what the self
    losses read of that pass is the joint model's."""
    losses = []
    for search in ("joint", "cross"):
        torch.manual_seed(0)
        t_head = {"dim": 48, "depth": 2, "heads": 4, "search": search}
        mokd = build(small("x", t_head=t_head)).train()
        calls = []
        real = THead.embed
        spy = lambda self, *given: calls.append(self) or real(self, *given)  # noqa: E731, B023
        monkeypatch.setattr(THead, "embed", spy)
        torch.manual_seed(1)
        losses.append(mokd(*views(), TAUS).terms)
        monkeypatch.setattr(THead, "embed", real)
        assert [calls.count(t.t_head) for t in mokd.teachers] == [1 + (search == "joint")] * 2
        assert [calls.count(s.t_head) for s in mokd.students] == [2, 2]
    for name in ("self_t_1", "self_t_2", "cross_1"):
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert losses[0]["search_1"] != losses[1]["search_1"]


def test_a_training_step_goes_through_the_kernels_of_the_search(monkeypatch):
    """Of both teachers, once each, with nothing kept for a backward pass."""
    calls = []
    real = cpu.joint_forward

    def spy(*tensors):
        calls.append((tensors[0].shape, tensors[3].shape, torch.is_grad_enabled()))
        return real(*tensors)

    monkeypatch.setattr(cpu, "joint_forward", spy)
    t_head = {"dim": 64, "depth": 2, "heads": 4}
    torch.stack(build(small("x", t_head=t_head))(*views(2), TAUS).totals).sum().backward()
    images = sum(tokens[0] for tokens, _, _ in calls)
    assert images == 2 * 4 and {shape[0] for _, shape, _ in calls} == {2}
    assert not any(grad for *_, grad in calls)


def changed(mokd, taus):
    """Names of the losses that are not those of the plain temperatures and centres."""
    plain = build(small("x")).train()
    plain.load_state_dict(mokd.state_dict())
    for center in plain.centers.buffers():
        center.zero_()
    before, after = plain(*views(), TAUS).terms, mokd(*views(), taus).terms
    assert list(before) == list(after) and len(before) == 8
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_temperature_belongs_to_its_own_losses():
    mokd = build(small("x")).train()
    for i in (0, 1):
        for kind in ("self", "cross", "search"):
            taus = list(TAUS)
            taus[i] = taus[i]._replace(**{kind: 0.09})
            names = {"self_mlp", "self_t"} if kind == "self" else {kind}
            assert changed(mokd, taus) == {f"{name}_{i + 1}" for name in names}


def test_each_centre_belongs_to_its_teacher():
    """Cross-distillation takes the other teacher's centre, the search none."""
    users = {
        "mlp_1": {"self_mlp_1", "cross_2"},
        "mlp_2": {"self_mlp_2", "cross_1"},
        "t_1": {"self_t_1"},
        "t_2": {"self_t_2"},
    }
    mokd = build(small("x")).train()
    assert mokd.centers.state_dict().keys() == users.keys()
    for name, losses in users.items():
        mokd.centers[name].normal_()
        assert changed(mokd, TAUS) == losses
        mokd.centers[name].zero_()


def test_ema_moves_parameters_alone():
    mokd = build(small("x")).train()
    mokd(*views(), TAUS)
    before = {k: v.clone() for k, v in mokd.teachers.state_dict().items()}
    with torch.no_grad():
        for p in mokd.students.parameters():
            p.add_(1)
    for ema in mokd.emas(0.75):
        ema.apply()
    parameters = dict(mokd.teachers.named_parameters())
    for name, value in mokd.teachers.state_dict().items():
        moved = 0.25 if name in parameters else 0
        torch.testing.assert_close(value, before[name] + moved)


def test_centre_is_the_moving_mean_of_teacher_logits():
    mokd = build(small("x")).train()
    out = mokd(*views(), TAUS)
    mokd.centers.update(out.center_means)
    assert set(out.center_means) == {"mlp_1", "t_1", "mlp_2", "t_2"}
    for i, teacher in enumerate(mokd.teachers, start=1):
        found = teacher(views()[0])
        for name in ("mlp", "t"):
            logits = getattr(teacher, f"{name}_head").last_layer(getattr(found, name))
            mean = logits.flatten(0, 1).mean(0)
            torch.testing.assert_close(mokd.centers[f"{name}_{i}"], 0.1 * mean)


class Wide(TorchDispatchMode):
    """Most rows of a tensor with K columns."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == 193:
                self.rows = max(self.rows, x.numel() // 193)
        return out


@pytest.mark.parametrize("way", ["fused-linear", "fused"])
def test_no_logits_in_a_whole_step(way):
    """Loss, backward and centres; `fused` shows that they would be seen."""
    mokd = build(small("x", "prototypes=193", f"loss.prototypes={way}")).train()
    with Wide() as wide:
        out = mokd(*views(), TAUS)
        torch.stack(out.totals).sum().backward()
        mokd.centers.update(out.center_means)
        mokd.centers.wait()
    assert (wide.rows > 0) == (way == "fused")


def own_products(*overrides: str):
    """A pair whose heads have widths that the CPU's own products of prototypes take."""
    head = {**CNN["mlp_head"], "bottleneck": 32}
    models = [{**one, "mlp_head": {**one["mlp_head"], **head}} for one in (CNN, VIT)]
    t_head = {"dim": 64, "depth": 1, "heads": 4}
    return small("x", "prototypes=160", *overrides, models=models, t_head=t_head)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("way", ["fused-linear", "fused", "reference"])
def test_prototypes_are_normalised_once_a_head_or_not_at_all(way, own, monkeypatch):
    """Two students and two teachers with two heads each; official: at every pass, 14 times."""
    override, calls = f"loss.prototypes={way}", []
    module = sys.modules["mokd_fast.ops.weight_norm"]  # mokd_fast.ops has the function of that name
    made = module.weight_norm
    monkeypatch.setattr(module, "weight_norm", lambda *a: calls.append(a[0]) or made(*a))
    mokd = build(own_products(override) if own else small("x", override)).train()
    out = mokd(*views(), TAUS)
    torch.stack(out.totals).sum().backward()
    mokd.centers.update(out.center_means)
    mokd.centers.wait()
    unmade = own and way == "fused" and cpu.fp32_why_not() is None
    assert len(calls) == len(set(calls)) == (0 if unmade else 8)


@pytest.mark.skipif(cpu.fp32_why_not() is not None, reason="needs products of our own in fp32")
@pytest.mark.parametrize("way", ["fused", "fused-linear"])
def test_products_of_our_own_change_no_loss_gradient_or_centre(way, monkeypatch):
    found = []
    for level in ("", "baseline"):  # which leaves them to PyTorch
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
        torch.manual_seed(3)
        mokd = build(own_products(f"loss.prototypes={way}")).train()
        out = mokd(*views(), TAUS)
        torch.stack(out.totals).sum().backward()
        assert len(out.grad_norms) == (4 if way == "fused" and not level else 0)
        for v, norm in out.grad_norms.items():
            torch.testing.assert_close(norm, v.grad.norm(), rtol=1e-5, atol=0)
        mokd.centers.update(out.center_means)
        grads = [p.grad for p in mokd.parameters() if p.grad is not None]
        found.append([*out.terms.values(), *mokd.centers.state_dict().values(), *grads])
    for have, want in zip(*found, strict=True):
        # A bias before a BatchNorm has a gradient of nothing but rounding.
        torch.testing.assert_close(
            have, want, rtol=1e-3, atol=1e-5 * want.abs().max().item() + 1e-6
        )


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
    torch.testing.assert_close(out.totals[0].detach(), sum(out.terms.values()))


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


def test_one_model_after_the_other():
    """With a backward of their own the gradients are the same bits, and nothing of the first
    model's graph is alive in the second one's forward pass."""
    together = build(small("x", models=(CNN, {**VIT, "drop_path": 0.3}))).train()
    apart = copy.deepcopy(together)
    given, seen, alive = views(), [], []

    def remember(module, args, out):
        seen.append(StorageWeakRef(out.untyped_storage()))  # which the next layer's graph keeps

    apart.students[0].mlp_head.mlp[0].register_forward_hook(remember)
    apart.students[1].register_forward_pre_hook(
        lambda module, args: alive.extend(r for r in seen if not r.expired())
    )
    torch.manual_seed(1)
    torch.stack(together(*given, TAUS).totals).sum().backward()
    torch.manual_seed(1)
    apart(*given, TAUS)
    assert seen and len(alive) == len(seen)  # so that it would be noticed
    seen.clear(), alive.clear()
    torch.manual_seed(1)
    out = apart(*given, TAUS, lambda i, total: total.backward())
    assert seen and not alive and not any(total.requires_grad for total in out.totals)
    for mine, theirs in zip(apart.parameters(), together.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_prototypes_have_the_dtype_of_their_products():
    """Cast once, where they are normalised: of teachers and students, in the losses and centres."""
    mokd = build(small("x")).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = mokd(*views(), TAUS)
        head = mokd.students[0].mlp_head.last_layer
        assert head.matrix(torch.randn(2, 3)).dtype == torch.bfloat16
    assert {rows.prototypes.dtype for rows in out.teachers.values()} == {torch.bfloat16}
    assert head.matrix(torch.randn(2, 3)).dtype == head.matrix().dtype == torch.float32
    torch.stack(out.totals).sum().backward()
    assert head.weight_v.grad.dtype == torch.float32 and head.weight_v.grad.any()
