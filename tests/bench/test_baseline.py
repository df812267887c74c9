"""The baseline step against formulas written out by hand, timm's own modules and its contract."""

import ast
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import bench.baseline
from bench.baseline.official import (
    DINOLoss,
    MLPHead,
    ModelSettings,
    OfficialModel,
    OfficialStep,
    SearchLoss,
    THead,
    VisionTransformer,
    clip_per_tensor_,
    cosine_schedule,
    ema_twin,
    official_settings,
    parameter_groups,
    resize_positions,
    temperature_schedule,
)

K, D, B = 24, 12, 2
GLOBAL = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are five times slower on a thread pool that shares its cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_cnn(size=(GLOBAL, GLOBAL), width=16, seed=0):
    torch.manual_seed(seed)
    body = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 8, 8, width), stem_width=4)
    body.conv1.stride = (1, 1)  # 32 px -> a 2x2 map
    head = MLPHead(width, K, hidden_dim=20, bottleneck_dim=8, norm_last_layer=True)
    grid = (size[0] // 16, size[1] // 16)
    return OfficialModel(body, head, THead(width, D, K, grid, depth=2, num_heads=3, stem=True))


def make_vit(size=(GLOBAL, GLOBAL), width=D, drop_path=0.0, seed=1):
    torch.manual_seed(seed)
    grid = (size[0] // 8, size[1] // 8)
    body = VisionTransformer(grid, width, 2, 3, patch=8, drop_path=drop_path)
    head = MLPHead(width, K, hidden_dim=20, bottleneck_dim=8, norm_last_layer=False)
    t_head = THead(width, D, K, grid, depth=2, num_heads=3, stem=width != D)
    return OfficialModel(body, head, t_head)


def make_step(students=None, n_local=2, iters=4, dtype=torch.float64, **options):
    students = students or (make_cnn(), make_vit())
    for model in students:
        model.to(dtype)
    settings = (
        ModelSettings("sgd", np.linspace(0.1, 0.2, iters), [1e-4] * iters, t_head_as_other=True),
        ModelSettings("adamw", [3e-3] * iters, np.linspace(0.04, 0.4, iters), weight=0.1),
    )
    options = {"epochs": 6, "warmup_1": 5, "warmup_2": 3} | options
    momentum = options.pop("momentum", [0.9] * iters)
    return OfficialStep(students, settings, momentum, out_dim=K, n_views=2 + n_local, **options)


def make_crops(n_local=2, size=(GLOBAL, GLOBAL), dtype=torch.float64, seed=5):
    g = torch.Generator().manual_seed(seed)
    local = (size[0] // 2, size[1] // 2)
    shapes = [size] * 2 + [local] * n_local
    return [torch.randn(B, 3, *shape, generator=g).to(dtype) for shape in shapes]


def softmax_rows(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# losses and schedules


@pytest.mark.parametrize("views", [2, 3, 10])
def test_dino_loss_is_the_double_sum_and_moves_its_center_afterwards(views):
    rng = np.random.default_rng(0)
    s, z = rng.normal(size=(views, B, K)), rng.normal(size=(2, B, K))
    loss_fn = DINOLoss(K, views, temperature_schedule(0.04, 0.07, 2, 3)).double()
    center = np.zeros(K)
    for epoch in (0, 1, 2):
        q = softmax_rows((z - center) / (0.04, 0.07, 0.07)[epoch])
        logp = np.log(softmax_rows(s / 0.1))
        pairs = [(t, v) for t in range(2) for v in range(views) if t != v]
        want = np.mean([-(q[t] * logp[v]).sum(-1).mean() for t, v in pairs])
        flat = torch.tensor(s).flatten(0, 1), torch.tensor(z).flatten(0, 1)
        assert loss_fn(*flat, epoch).item() == pytest.approx(want, rel=1e-12)
        center = 0.9 * center + 0.1 * z.mean((0, 1))
        np.testing.assert_allclose(loss_fn.center[0].numpy(), center, rtol=1e-13)


def test_search_loss_pairs_row_by_row_without_center():
    rng = np.random.default_rng(1)
    s, z = rng.normal(size=(6, K)), rng.normal(size=(6, K))
    want = -(softmax_rows(z / 0.07) * np.log(softmax_rows(s / 0.1))).sum(-1).mean()
    loss_fn = SearchLoss([0.04, 0.07])
    assert loss_fn(torch.tensor(s), torch.tensor(z), 1).item() == pytest.approx(want, rel=1e-12)
    assert not loss_fn.state_dict()


def test_temperatures_are_indexed_by_whole_epochs_and_include_the_end_point():
    assert temperature_schedule(0.04, 0.07, 4, 6).tolist() == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    )
    with pytest.raises(ValueError, match="longer"):
        temperature_schedule(0.04, 0.07, 7, 6)
    step = make_step()
    for name, loss_fn in step.centered.items():
        warmup = 5 if name in ("self_mlp_1", "self_t_1") else 3
        want = temperature_schedule(0.04, 0.07, warmup, 6)
        np.testing.assert_array_equal(loss_fn.temperatures, want)
    np.testing.assert_array_equal(step.search_loss.temperatures, want)


def test_cosine_schedule():
    values = cosine_schedule(2.0, 1.0, epochs=5, iters_per_epoch=2, warmup_epochs=1)
    assert values[:3].tolist() == [0.0, 2.0, 2.0]
    i = np.arange(8)
    np.testing.assert_allclose(values[2:], 1 + 0.5 * (1 + np.cos(np.pi * i / 8)))


def test_official_numbers():
    cnn, vit, momentum = official_settings(iters_per_epoch=5, epochs=100, batch=512)
    assert (cnn.optimizer, cnn.weight, cnn.clip, cnn.t_head_as_other) == ("sgd", 1.0, 3.0, True)
    assert (vit.optimizer, vit.weight, vit.clip, vit.t_head_as_other) == ("adamw", 0.1, 3.0, False)
    assert (cnn.lr[49], vit.lr[49]) == pytest.approx((0.2, 6e-4))
    assert cnn.lr[-1] == pytest.approx(0.0048, rel=1e-2)  # not scaled by the batch
    assert (vit.weight_decay[0], cnn.weight_decay[77]) == pytest.approx((0.04, 1e-4))
    assert momentum[0] == pytest.approx(0.996)
    assert len(momentum) == len(cnn.lr) == 500


# positions, heads and backbones


def bicubic_axis(old, new):
    """The [new, old] matrix of PyTorch's bicubic kernel (a = -0.75) at factor (new + 0.1) / old."""
    matrix, a = np.zeros((new, old)), -0.75
    for i in range(new):
        x = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("grid", [(2, 2), (7, 7), (14, 14), (3, 8), (16, 5)])
def test_positions_come_out_in_the_exact_size_and_follow_the_official_factor(grid):
    g = torch.Generator().manual_seed(0)
    pos = torch.randn(1, grid[0] * grid[1], 2, generator=g, dtype=torch.float64)
    plane = pos.reshape(*grid, 2).numpy()
    assert resize_positions(pos, grid, grid) is pos
    for h in range(1, 26, 2):
        for w in range(1, 26, 3):
            if (h, w) == grid:
                continue
            out = resize_positions(pos, grid, (h, w))
            assert out.shape == (1, h * w, 2)
            rows, columns = bicubic_axis(grid[0], h), bicubic_axis(grid[1], w)
            want = np.einsum("hi,wj,ijd->hwd", rows, columns, plane)
            np.testing.assert_allclose(out.reshape(h, w, 2).numpy(), want, atol=1e-12)


def test_vit_is_timm_s_at_its_own_size():
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=3, num_classes=0
    ).double()
    ours = VisionTransformer((4, 4), D, 2, 3, patch=8).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    tokens, size = ours(images)
    assert size == (4, 4)
    torch.testing.assert_close(tokens, theirs.forward_features(images), rtol=1e-11, atol=1e-12)


def test_vit_takes_another_patch_embedding():
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, D, 3, 2, 1))
    vit = VisionTransformer((7, 7), D, 1, 3, patch_embed=stem)
    tokens, size = vit(torch.randn(B, 1, 28, 20))
    assert size == (7, 5) and tokens.shape == (B, 36, D)
    assert "patch_embed.0.weight" in vit.state_dict()


def test_initialisation():
    vit, head = VisionTransformer((14, 14), 96, 1, 3), THead(96, 96, 512, (14, 14), stem=True)
    for p in (vit.pos_embed, vit.cls_token, head.pos_embed, head.blocks[0].attn.qkv.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.3)
    bound = 96**-0.5  # PyTorch's uniform default, on stem and prototypes alike
    for p in (head.stem.weight, head.last_layer.weight_v, MLPHead(8, 99).last_layer.weight_v):
        assert p.std().item() == pytest.approx(p.shape[1] ** -0.5 / 3**0.5, rel=0.1)
    assert head.stem.bias.abs().max() > 0.5 * bound
    assert torch.equal(head.last_layer.weight_g, torch.ones(512, 1))
    assert head.last_layer.weight_g.requires_grad
    assert not MLPHead(8, 9, norm_last_layer=True).last_layer.weight_g.requires_grad
    assert MLPHead(8, 9, norm_last_layer=False).last_layer.weight_g.requires_grad


def test_mlp_head_of_unit_prototypes_gives_cosines():
    head = MLPHead(8, K, hidden_dim=16, bottleneck_dim=6, use_bn=True).double()
    assert [type(m).__name__ for m in head.mlp][:3] == ["Linear", "BatchNorm1d", "GELU"]
    x = torch.randn(5, 8, dtype=torch.float64)
    want = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), want)


def test_t_head_refuses_a_width_without_stem():
    with pytest.raises(ValueError, match="needs a stem"):
        THead(16, D, K, (2, 2))


@pytest.mark.parametrize("searching", [False, True])
def test_t_head_written_out(searching):
    head = THead(16, D, K, (2, 3), depth=2, num_heads=3, stem=True).double()
    tokens = torch.randn(B, 6, 16, dtype=torch.float64)
    query = torch.randn(B, D, dtype=torch.float64) if searching else None
    x = tokens @ head.stem.weight.T + head.stem.bias + head.pos_embed
    x = x if query is None else torch.cat((x, query[:, None]), 1)  # attention knows no order
    for block in head.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, D // 3)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv)  # [B, heads, N, d]
        x = x + block.attn.proj(heads.transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    mean = F.layer_norm(x, (D,), head.norm.weight, head.norm.bias, 1e-6)[:, :6].mean(1)
    want = mean @ F.normalize(head.last_layer.weight_v, dim=1).T * head.last_layer.weight_g[:, 0]
    torch.testing.assert_close(head(tokens, (2, 3), query)[0], want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("make", [make_cnn, lambda **k: make_vit(width=18, **k), make_vit])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_repeated_search_is_one_search_a_query(make, size):
    model = make(size=size).double()
    crops, n = make_crops(0, size), 3
    queries = torch.randn(n * B, D, dtype=torch.float64)
    mlp, t, searched = ema_twin(model).teach(crops, queries, n)
    assert mlp.shape == t.shape == (2 * B, K) and searched.shape == (n * B, K)
    _, tokens, grid = ema_twin(model).features(crops)
    for j in range(n):
        for b in range(B):
            row = slice(j * B + b, j * B + b + 1)
            alone, _ = model.t_head(tokens[b : b + 1], grid, queries[row])  # view 1, image b
            torch.testing.assert_close(searched[row], alone, rtol=1e-11, atol=1e-12)
    assert (searched[:B] - t[:B]).abs().max() > 1e-4  # the query does steer the tokens


@pytest.mark.parametrize("model", [make_cnn(), make_vit(width=18), make_vit()])
def test_query_is_the_pooled_feature_at_the_t_head_s_width(model):
    model.double()
    _, _, query = model(make_crops(0))
    pooled, _, _ = model.features(make_crops(0))
    stem = model.t_head.stem
    torch.testing.assert_close(query, pooled if stem is None else stem(pooled))
    assert query.shape == (2 * B, D)


# the step


def test_state_dict_keys():
    cnn, vit = make_cnn(), make_vit()
    ends = {"weight_g", "weight_v"}
    for model in (cnn, vit):
        keys = set(model.state_dict())
        assert {f"{h}.last_layer.{e}" for h in ("mlp_head", "t_head") for e in ends} <= keys
        assert {"mlp_head.mlp.0.weight", "t_head.pos_embed", "t_head.norm.bias"} <= keys
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            assert {f"t_head.blocks.1.{part}.{e}" for e in ("weight", "bias")} <= keys
        assert {k.split(".")[0] for k in keys} == {"backbone", "mlp_head", "t_head"}
    assert cnn.state_dict()["t_head.stem.weight"].shape == (D, 16)
    assert not any("stem" in k for k in vit.state_dict())


def test_the_eight_losses_are_the_losses_of_the_parts():
    step, crops = make_step(), make_crops()
    out = step.losses(crops, epoch=1)
    fresh = make_step()  # same seeds: the same networks and untouched centres
    student = [
        [torch.cat(p) for p in zip(m(crops[:2]), m(crops[2:]), strict=True)] for m in fresh.students
    ]
    local = slice(2 * B, None)
    teacher = [
        fresh.teachers[i].teach(crops[:2], student[1 - i][2][local].detach(), 2) for i in (0, 1)
    ]
    for i in (0, 1):
        j, n, o = 1 - i, i + 1, {k[:-2]: v for k, v in out.items() if k.endswith(str(i + 1))}
        want = {
            "self_mlp": fresh.centered[f"self_mlp_{n}"](student[i][0], teacher[i][0], 1),
            "self_t": fresh.centered[f"self_t_{n}"](student[i][1], teacher[i][1], 1),
            "cross": fresh.centered[f"cross_{n}"](student[i][0], teacher[j][0], 1),
            "search": fresh.search_loss(student[i][1][local], teacher[j][2], 1),
        }
        weight = (1.0, 0.1)[i]
        mutual = weight * (want["cross"] + want["search"])
        want["loss"] = want["self_mlp"] + want["self_t"] + mutual
        for kind, value in want.items():
            torch.testing.assert_close(o[kind], value, rtol=1e-12, atol=0)
    # the cross centres follow the *other* model's teacher
    torch.testing.assert_close(step.centered["cross_1"].center, step.centered["self_mlp_2"].center)
    torch.testing.assert_close(step.centered["cross_2"].center, step.centered["self_mlp_1"].center)


def test_each_loss_reaches_its_own_student_alone_and_all_of_it():
    step = make_step()
    step.losses(make_crops(), 0)["loss_1"].backward()
    assert all(p.grad is not None for p in step.students[0].parameters() if p.requires_grad)
    others = [step.students[1], *step.teachers]
    assert all(p.grad is None for model in others for p in model.parameters())


def test_without_local_crops_each_view_searches_the_other_one():
    step, crops = make_step(n_local=0), make_crops(0)
    out, fresh = step.losses(crops, 0), make_step(n_local=0)
    cnn, vit = fresh.students[0](crops), fresh.students[1](crops)
    tau = fresh.search_loss.temperatures[0]
    for i, (student, other) in enumerate(((cnn, vit), (vit, cnn))):
        searcher = fresh.teachers[1 - i]
        _, tokens, grid = searcher.features(crops)
        loss = 0.0
        for v in (0, 1):
            rows = slice(v * B, v * B + B)
            across = slice((1 - v) * B, (1 - v) * B + B)
            target, _ = searcher.t_head(tokens[across], grid, student[2][rows])
            logp = F.log_softmax(student[1][rows] / 0.1, -1)
            loss = loss - (F.softmax(target / tau, -1) * logp).sum(-1).mean() / 2
        torch.testing.assert_close(out[f"search_{i + 1}"], loss, rtol=1e-11, atol=0)
        assert other is not student


def test_parameter_groups():
    model = make_cnn()
    names = {p: n for n, p in model.named_parameters()}
    decayed, plain, t_head = (
        {names[p] for p in group["params"]} for group in parameter_groups(model, True)
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        decayed | plain | t_head
        == trained
        == set(names.values()) - {"mlp_head.last_layer.weight_g"}
    )
    assert t_head == {n for n in trained if n.startswith("t_head.")}
    assert {"backbone.bn1.weight", "backbone.bn1.bias", "mlp_head.mlp.0.bias"} <= plain
    assert {"backbone.conv1.weight", "mlp_head.last_layer.weight_v"} <= decayed

    vit = make_vit()
    names = {p: n for n, p in vit.named_parameters()}
    groups = parameter_groups(vit, False)
    assert len(groups) == 2
    decayed = {names[p] for p in groups[0]["params"]}
    assert {f"{h}.last_layer.weight_g" for h in ("mlp_head", "t_head")} <= decayed
    assert {"backbone.cls_token", "backbone.pos_embed", "t_head.pos_embed"} <= decayed
    assert all(names[p].endswith(".bias") or p.ndim == 1 for p in groups[1]["params"])


def test_cnn_t_head_follows_the_vit_s_rates():
    step = make_step()
    step.set_rates(2)
    cnn, vit = (o.param_groups for o in step.optimizers)
    lr, decay = np.linspace(0.1, 0.2, 4)[2], np.linspace(0.04, 0.4, 4)[2]
    assert [(g["lr"], g["weight_decay"]) for g in cnn] == [(lr, 1e-4), (lr, 0.0), (3e-3, decay)]
    assert [(g["lr"], g["weight_decay"]) for g in vit] == [(3e-3, decay), (3e-3, 0.0)]
    assert all(g["momentum"] == 0.9 for g in cnn)
    assert isinstance(step.optimizers[0], torch.optim.SGD)
    assert isinstance(step.optimizers[1], torch.optim.AdamW)


def test_clip_is_a_norm_for_each_tensor():
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 5.0), torch.tensor([0.1, 0.2])
    norms = clip_per_tensor_(model, 3.0)
    assert norms == pytest.approx([5 * 6**0.5, 0.05**0.5])
    assert model.weight.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert model.bias.grad.tolist() == pytest.approx([0.1, 0.2])


def test_last_layers_stand_still_while_frozen():
    step = make_step(freeze_epochs=1)

    def last_layers():
        named = [x for m in step.students for x in m.named_parameters()]
        return [p.detach().clone() for n, p in named if "last_layer" in n and p.requires_grad]

    start = last_layers()
    step.step(make_crops(), it=0, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(start, last_layers(), strict=True))
    step.step(make_crops(), it=1, epoch=1)
    assert not any(torch.equal(a, b) for a, b in zip(start, last_layers(), strict=True))


def test_ema_averages_parameters_and_leaves_the_teacher_s_own_buffers():
    step = make_step(freeze_epochs=0)
    alone = ema_twin(step.students[0])
    alone.features(make_crops()[:2])  # what one forward of the global crops does to the buffers
    before = [[p.clone() for p in t.parameters()] for t in step.teachers]
    step.step(make_crops(), it=0, epoch=0)
    for student, teacher, olds in zip(step.students, step.teachers, before, strict=True):
        for p, q, old in zip(student.parameters(), teacher.parameters(), olds, strict=True):
            torch.testing.assert_close(q, 0.9 * old + 0.1 * p, rtol=1e-13, atol=1e-15)
            assert not q.requires_grad
    buffers = dict(step.teachers[0].named_buffers())
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    tracked = "backbone.bn1.num_batches_tracked"
    # global and local crops are two batches to the student, and the teacher sees only the first
    assert buffers[tracked] == 1 and step.students[0].state_dict()[tracked] == 2


def test_teachers_draw_nothing_at_random_and_stay_in_train_mode():
    student = make_vit(drop_path=0.5).double()
    student.backbone.blocks.append(nn.Dropout(0.5))
    teacher = ema_twin(student)
    assert teacher.training and student.backbone.blocks[1].drop_path.drop_prob == 0.5
    crops = make_crops(0)
    assert torch.equal(teacher.features(crops)[1], teacher.features(crops)[1])
    assert not torch.equal(student.features(crops)[1], student.features(crops)[1])


PAIRS = {
    "cnn+vit": lambda s: (make_cnn(s), make_vit(s)),
    "cnn+cnn": lambda s: (make_cnn(s), make_cnn(s, width=24, seed=3)),
    "vit+vit": lambda s: (make_vit(s), make_vit(s, width=18, seed=3)),
    "vit+cnn": lambda s: (make_vit(s, drop_path=0.1), make_cnn(s)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("n_local", [0, 2])
def test_any_pair_trains_on_any_shape(pair, n_local):
    size = (32, 64)
    step = make_step(PAIRS[pair](size), n_local, dtype=torch.float32)
    crops = make_crops(n_local, size, torch.float32)
    for it in range(2):
        out = step.step(crops, it, epoch=it)
    assert len(out) == 10 and all(v.isfinite() and not v.requires_grad for v in out.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(dtype):
    crops = make_crops(dtype=torch.float32)
    want = make_step(dtype=torch.float32).step(crops, 0, 0)
    step = make_step(dtype=torch.float32, autocast=dtype)
    out = step.step(crops, 0, 0)
    assert all(s.is_enabled() == (dtype == torch.float16) for s in step.scalers)
    for name, value in out.items():
        assert value.item() == pytest.approx(want[name].item(), rel=0.05)


def test_bad_input_is_refused_by_name():
    step = make_step(freeze_epochs=0)
    with pytest.raises(ValueError, match="3 crops given to a step built for 4"):
        step.losses(make_crops(1), 0)
    crops = make_crops()
    crops[0][0, 0, 0, 0] = float("nan")
    before = [p.clone() for p in step.students[0].parameters()]
    with pytest.raises(FloatingPointError, match="loss_1"):
        step.step(crops, 0, 0)
    assert all(map(torch.equal, before, step.students[0].parameters()))
    with pytest.raises(ValueError, match="'lars'"):
        bad = ModelSettings("lars", [0.1], [0.0])
        OfficialStep(step.students, (bad, bad), [0.9], out_dim=K)


def test_the_oracle_does_not_import_what_it_judges():
    for path in Path(bench.baseline.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("mokd_fast") for name in names), path.name
