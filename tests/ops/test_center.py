"""Center against the official loss, sinkhorn_center against DINOv2's formula; both on two ranks."""

import copy
import doctest
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.baseline.official import DINOLoss
from mokd_fast.ops import (
    Center,
    Target,
    center,
    cross_view_pairs,
    distill_cross_entropy,
    sinkhorn_center,
)
from mokd_fast.ops.center import LinearLogits

V, T, B, K = 4, 2, 3, 7
HEADS = {"mlp_1": 5, "t_1": K}


def logits(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*(shape or (T, B, K)), generator=g, dtype=torch.float64) * 2).to(dtype)


def pending(momentum: float = 0.9) -> tuple[Center, torch.Tensor]:
    """A centre with an update that nobody has read yet, and what it will be."""
    center, x = Center(K, momentum), logits(0, dtype=torch.float32)
    center.update(x)
    assert not any(buffer.any() for buffer in center.buffers()), "it was applied at once"
    return center, x.flatten(0, 1).mean(0) * (1 - momentum)


def test_loss_takes_the_centre_from_before_the_update_as_the_official_one():
    official, center = DINOLoss(K, V, [0.05]).double(), Center(K).double()
    for step in range(4):
        student, teacher = logits(step, V, B, K), logits(10 + step)
        target = Target(cross_view_pairs(T, V), teacher, temperature=0.05, center=center.value)
        loss, _ = distill_cross_entropy(student, [target])
        center.update(teacher)
        theirs = official(student.flatten(0, 1), teacher.flatten(0, 1), 0)  # moves its own centre
        torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(center.value, official.center[0], rtol=1e-14, atol=1e-16)


def test_update_before_backward_leaves_the_gradient():
    gradients = []
    for early in (False, True):
        center, student = Center(K), logits(1, V, B, K, dtype=torch.float32).requires_grad_()
        center.update(logits(2, dtype=torch.float32))
        teacher = logits(3, dtype=torch.float32)
        target = Target(cross_view_pairs(T, V), teacher, temperature=0.05, center=center.value)
        loss, _ = distill_cross_entropy(student, [target])
        if early:
            center.update(teacher * 3)
            center.wait()
        loss.backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients)


READS = {
    "value": lambda c: c.value,
    "item": lambda c: c["center"],
    "state_dict": lambda c: c.state_dict()["center"],
    "state_dict of a parent": lambda c: nn.ModuleDict({"x": c}).state_dict()["x.center"],
    "wait": lambda c: (c.wait(), *c.buffers())[1],
    "to": lambda c: next(c.to(torch.float64).buffers()).float(),
    "deepcopy": lambda c: next(copy.deepcopy(c).buffers()),
    "deepcopy of a parent": lambda c: next(copy.deepcopy(nn.Sequential(c)).buffers()),
    "pickle": lambda c: next(pickle.loads(pickle.dumps(c)).buffers()),
}


@pytest.mark.parametrize("read", READS)
def test_a_pending_update_is_never_lost(read):
    center, expected = pending()
    torch.testing.assert_close(READS[read](center), expected)
    torch.testing.assert_close(center.value.float(), expected)  # once, and not again


def test_the_next_update_applies_the_one_before():
    center, first = pending()
    center.update(torch.ones(B, K))
    torch.testing.assert_close(center.value, 0.9 * first + 0.1)


def test_a_loaded_centre_replaces_the_pending_update():
    center, _ = pending()
    loaded = torch.arange(K, dtype=torch.float32)
    center.load_state_dict({"center": loaded})
    assert torch.equal(center.value, loaded)


def test_a_copy_moves_alone():
    center, expected = pending()
    twin = copy.deepcopy(center)
    twin.update(torch.ones(B, K))
    torch.testing.assert_close(center.value, expected)
    torch.testing.assert_close(twin.value, 0.9 * expected + 0.1)


def test_several_heads_each_with_its_own_mean():
    center = Center(HEADS, momentum=0.5)
    mlp, t = logits(0, T, B, 5, dtype=torch.float32), logits(1, dtype=torch.float32)
    center.update({"t_1": t, "mlp_1": mlp})
    center.update({"t_1": t})  # the other one stays
    torch.testing.assert_close(center["mlp_1"], 0.5 * mlp.mean((0, 1)))
    torch.testing.assert_close(center["t_1"], 0.75 * t.mean((0, 1)))
    assert list(center.state_dict()) == list(HEADS)
    before = copy.deepcopy(center.state_dict())
    center.update({})
    assert all(torch.equal(before[name], center[name]) for name in HEADS)


def features(seed: int) -> tuple[LinearLogits, torch.Tensor]:
    """Features [T, B, 3] with prototypes [K, 3], and their logits."""
    h, w = logits(seed, T, B, 3), logits(seed + 100, K, 3)
    return LinearLogits(h, w), h @ w.T


@pytest.mark.parametrize("read", READS)
def test_the_logits_need_not_be_there(read):
    """Their mean is prototypes @ mean(features), with the prototypes of that step."""
    center = Center(HEADS, momentum=0.5).double()
    linear, z = features(0)
    mlp = logits(1, T, B, 5)
    center.update({"t_1": linear, "mlp_1": mlp})
    center.update({"t_1": features(2)[0]})
    alone = Center(K).double()
    alone.update(linear)
    torch.testing.assert_close(center["mlp_1"], 0.5 * mlp.mean((0, 1)))
    expected = 0.25 * z.mean((0, 1)) + 0.5 * features(2)[1].mean((0, 1))
    torch.testing.assert_close(center["t_1"], expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(READS[read](alone).double(), 0.1 * z.mean((0, 1)))
    alone.update(LinearLogits(linear.features[:, :0], linear.prototypes))  # no images
    torch.testing.assert_close(alone.value, 0.1 * z.mean((0, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        alone.update(linear)
    torch.testing.assert_close(alone.value, 0.19 * z.mean((0, 1)))


@pytest.mark.parametrize(
    ("h", "w", "message"),
    [
        ((2, 3), (K, 4), r"prototypes of 'center' must be floating \[7, 3\] for features \[2, 3\]"),
        ((2, 3), (5, 3), r"must be floating \[7, 3\] .* got torch.float32 of shape \[5, 3\]"),
        ((), (K, 3), r"features of 'center' must be floating \[..., D\]"),
    ],
)
def test_features_and_prototypes_that_do_not_fit(h, w, message):
    with pytest.raises(ValueError, match=message):
        Center(K).update(LinearLogits(torch.ones(h), torch.ones(w)))


@pytest.mark.parametrize("shape", [(T * B, K), (K,), (T, B, K), (1, T, B, 1, K)])
def test_any_leading_shape_and_a_mean_as_one_row(shape):
    x = logits(0, dtype=torch.float32)
    center = Center(K, momentum=0.0)
    center.update(x.mean((0, 1)) if shape == (K,) else x.reshape(shape))
    torch.testing.assert_close(center.value, x.mean((0, 1)))


def test_no_images_leave_the_centre():
    center = Center(HEADS, momentum=0.5)
    center.update({"mlp_1": torch.ones(1, 5), "t_1": torch.ones(1, K)})
    center.update({"mlp_1": torch.ones(0, 5), "t_1": torch.ones(2, 0, K)})
    assert torch.equal(center["mlp_1"], torch.full((5,), 0.5))
    center.update({"mlp_1": torch.ones(1, 5), "t_1": torch.ones(2, 0, K)})
    assert torch.equal(center["mlp_1"], torch.full((5,), 0.75))
    assert torch.equal(center["t_1"], torch.full((K,), 0.5))


@pytest.mark.parametrize("mean", [torch.nan, torch.inf, 1.0])
def test_a_skipped_update_leaves_the_centre(mean):
    center = Center(K, momentum=0.5)
    center.update(torch.full((1, K), 3.0))
    center.update(torch.full((1, K), mean), skip=torch.tensor(True))
    assert torch.equal(center.value, torch.full((K,), 1.5))
    center.update(torch.full((1, K), 3.0), skip=torch.tensor(False))
    assert torch.equal(center.value, torch.full((K,), 2.25))


def test_it_is_fp32_without_gradient():
    x = logits(0, 512, K, dtype=torch.bfloat16).requires_grad_()
    center = Center(K, momentum=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        center.update(x)
        value = center.value
    assert value.dtype == torch.float32 and not value.requires_grad
    torch.testing.assert_close(value, x.detach().double().mean(0).float(), rtol=1e-5, atol=1e-6)
    for narrow in (center.half(), center.bfloat16()):
        assert torch.equal(narrow.value, value)
    assert center.double().value.dtype == torch.float64


def test_read_in_inference_mode_can_be_saved_for_backward():
    center, _ = pending()
    with torch.inference_mode():
        assert not center.value.is_inference()
    weight = torch.ones(K, requires_grad=True)
    (weight * center.value).sum().backward()
    assert torch.equal(weight.grad, center.value)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    center, eager = Center(K), Center(K)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        out = (x - center.value).sum()
        center.update(x)
        return out

    for i in range(3):
        x = logits(i, dtype=torch.float32)
        torch.testing.assert_close(step(x), (x - eager.value).sum())
        eager.update(x)
    torch.testing.assert_close(center.value, eager.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Center(0), "K >= 1"),
        (lambda: Center({}), "K >= 1"),
        (lambda: Center(K, momentum=1.5), "momentum must lie in 0..1, got 1.5"),
        (lambda: Center(HEADS)["t_2"], "no head 't_2'; there are mlp_1, t_1"),
        (lambda: Center(HEADS).value, "several heads, name them: mlp_1, t_1"),
        (lambda: Center(HEADS).update(torch.zeros(B, K)), "several heads, name them: mlp_1, t_1"),
        (lambda: Center(HEADS).update({"t": torch.zeros(B, K)}), "no head 't'; there are mlp_1"),
        (
            lambda: Center(HEADS).update({"mlp_1": torch.zeros(B, K)}),
            r"'mlp_1' must be floating \[..., 5\], got torch.float32 of shape \[3, 7\]",
        ),
        (lambda: Center(K).update(torch.zeros(B, K).long()), "got torch.int64 of shape"),
        (lambda: Center(K).update(torch.tensor(1.0)), r"of shape \[\]"),
        (lambda: Center(K).update(torch.zeros(B, K, device="meta")), "are on meta"),
        (lambda: sinkhorn_center(torch.zeros(B, K), 0.1), r"floating \[T, B, K\]"),
        (lambda: sinkhorn_center(torch.zeros(T, B, K).int(), 0.1), "int32"),
        (lambda: sinkhorn_center(torch.zeros(T, B, K), 0.0), "temperature must be > 0"),
        (lambda: sinkhorn_center(torch.zeros(T, B, K), 0.1, 0), "iterations must be >= 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_update_changes_nothing():
    center, expected = pending()
    with pytest.raises(ValueError, match="must be floating"):
        center.update(torch.zeros(B, K + 1))
    torch.testing.assert_close(center.value, expected)


def plain_sinkhorn(rows, temperature, iterations):
    """DINOv2's assignment [N, K] of N samples to K prototypes, as it is written there."""
    mass = (rows / temperature).exp().t()  # [K, N]
    prototypes, samples = mass.shape
    mass = mass / mass.sum()
    for _ in range(iterations):
        mass = mass / mass.sum(dim=1, keepdim=True) / prototypes
        mass = mass / mass.sum(dim=0, keepdim=True) / samples
    return (mass * samples).t()


@pytest.mark.parametrize("temperature", [0.04, 0.1, 1.0])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_is_a_softmax_with_a_centre(iterations, temperature):
    for shape in ((2, 5, 7), (1, 3, 40), (3, 20, 4), (1, 1, 9), (2, 3, 1)):
        z = logits(iterations, *shape)
        z = z + logits(99, *shape[:2], 1)  # images whose logits lie higher than others'
        center = sinkhorn_center(z, torch.tensor(temperature, dtype=z.dtype), iterations)
        expected = plain_sinkhorn(z.flatten(0, 1), temperature, iterations)
        mine = ((z - center) / temperature).softmax(-1).flatten(0, 1)
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-300)


def test_sinkhorn_does_not_overflow_where_the_plain_form_does():
    z = logits(5, 2, 16, 12, dtype=torch.float32)
    z = z * 20 / z.abs().max()  # exp(20 / 0.04) is no fp32 number, but an fp64 one
    assert plain_sinkhorn(z.flatten(0, 1), 0.04, 3).isnan().any()
    expected = plain_sinkhorn(z.flatten(0, 1).double(), 0.04, 3)
    mine = ((z - sinkhorn_center(z, 0.04)) / 0.04).softmax(-1).flatten(0, 1)
    assert sinkhorn_center(z, 0.04).dtype == torch.float32
    torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-4)
    for scale in (1e4, 1e30):  # one-hot, far past what fp64 could exponentiate
        center = sinkhorn_center(z * scale, 0.04)
        assert center.isfinite().all()
        assert ((z * scale - center) / 0.04).softmax(-1).isfinite().all()


def test_sinkhorn_keeps_its_digits_under_an_offset():
    z = (logits(6, 2, 16, 12) * 64).round() / 64  # so that adding the offset rounds nothing
    offset = torch.arange(12.0) * 1024
    center = sinkhorn_center((z + offset).float(), 0.04)
    exact = sinkhorn_center(z, 0.04)
    torch.testing.assert_close(center.double() - offset, exact, rtol=0, atol=1e-3)


def test_sinkhorn_gives_each_prototype_the_same_mass_in_the_end():
    z = logits(7, 2, 20, 8)
    mass = ((z - sinkhorn_center(z, 0.5, 500)) / 0.5).softmax(-1).sum((0, 1))
    torch.testing.assert_close(mass, torch.full((8,), 40 / 8, dtype=z.dtype), rtol=1e-9, atol=0)


def test_sinkhorn_of_infinite_logits_nan_and_no_rows():
    z = logits(8)
    z[..., 2] = -torch.inf  # a prototype nobody may take
    z[0, 1, 4] = -torch.inf
    center = sinkhorn_center(z, 0.1)
    kept = [k for k in range(K) if k != 2]
    assert center[2] == 0 and center.isfinite().all()
    mine = ((z - center) / 0.1).softmax(-1).flatten(0, 1)
    assert torch.equal(mine[:, 2], torch.zeros(T * B, dtype=z.dtype))
    expected = plain_sinkhorn(z[..., kept].flatten(0, 1), 0.1, 3)
    torch.testing.assert_close(mine[:, kept], expected, rtol=1e-10, atol=1e-300)
    z[1, 0, 0] = torch.nan
    assert sinkhorn_center(z, 0.1)[0].isnan()
    assert torch.equal(sinkhorn_center(torch.zeros(2, 0, K), 0.1), torch.zeros(K))


def test_sinkhorn_takes_any_strides_and_no_gradient():
    z = logits(9, K, B, T)
    center = sinkhorn_center(z.permute(2, 1, 0).requires_grad_(), 0.1)
    assert torch.equal(center, sinkhorn_center(z.permute(2, 1, 0).contiguous(), 0.1))
    assert not center.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        half = sinkhorn_center(z.bfloat16(), 0.1)
    assert torch.equal(half, sinkhorn_center(z.bfloat16().float(), 0.1))


def batch(step: int, rank: int, rows: int = B) -> dict[str, torch.Tensor]:
    seed = 100 * step + 10 * rank
    found = {name: logits(seed + i, T, rows, k) for i, (name, k) in enumerate(HEADS.items())}
    # Dictionaries keep their order, and ranks may differ in it.
    return dict(reversed(found.items())) if rank else found


def _rank(rank: int, folder: str) -> None:
    """What one of two ranks does; its results go to a file for the tests below."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=wait)
    reduced, plain = [], dist.all_reduce
    dist.all_reduce = lambda x, *a, **options: (reduced.append(x.shape), plain(x, *a, **options))[1]
    found: dict[str, object] = {}
    center = Center(HEADS).double()
    for step in range(3):
        center.update(batch(step, rank))
        if step == 1 and rank == 0:  # as a trainer saves: one rank, with the update under way
            found["saved"] = copy.deepcopy(center.state_dict())
        if step == 1 and rank == 1:
            found["saved"] = copy.deepcopy(center).state_dict()
        if step == 1:
            assert len(reduced) == 2
    found["several"], found["reduced"] = copy.deepcopy(center.state_dict()), list(reduced)
    for name, rows in {"uneven": (1, 5), "one empty": (2, 0), "both empty": (0, 0)}.items():
        center.load_state_dict(found["several"])
        center.update(batch(4, rank, rows[rank]))
        found[name] = copy.deepcopy(center.state_dict())
    z = batch(5, rank, (3, 1)[rank])["t_1"]
    reduced.clear()
    found["sinkhorn"] = sinkhorn_center(z, 0.05)
    found["sinkhorn reduced"] = len(reduced)
    found["sinkhorn, one empty"] = sinkhorn_center(z[:, : 3 * (1 - rank)], 0.05)
    reduced.clear()
    linear = Center(K).double()
    for step in range(2):
        linear.update(
            features(10 * step + rank)[0]._replace(prototypes=features(step)[0].prototypes)
        )
    found["linear"], found["linear reduced"] = linear.value, list(reduced)
    reduced.clear()
    own = [dist.new_group([r]) for r in range(2)][rank]
    alone = Center(K).double()
    alone.update(z, group=own)
    found["alone"] = {"center": alone.value, "sinkhorn": sinkhorn_center(z, 0.05, group=own)}
    found["alone reduced"] = len(reduced)
    both = dist.new_group([0, 1])
    used: list[object] = []
    dist.all_reduce = lambda *a, **options: (used.append(options["group"]), plain(*a, **options))[1]
    alone.update(z, group=both)
    sinkhorn_center(z, 0.05, group=both)
    found["group used"] = len(used) == 1 + 1 + 3 and all(group is both for group in used)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_rank, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(mine: dict[str, torch.Tensor], center: Center) -> None:
    assert mine.keys() == HEADS.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, center[name], rtol=1e-13, atol=1e-15)


def test_two_ranks_are_one_process_with_the_doubled_batch(ranks):
    one = Center(HEADS).double()
    for step in range(3):
        mine, theirs = batch(step, 0), batch(step, 1)
        one.update({name: torch.cat([mine[name], theirs[name]], 1) for name in HEADS})
        if step == 1:
            for rank in ranks:
                same(rank["saved"], one)
    for rank in ranks:
        same(rank["several"], one)
        assert rank["reduced"] == [torch.Size([5 + 1 + K + 1])] * 3  # one a step for both heads


@pytest.mark.parametrize(
    ("case", "rows"), [("uneven", (1, 5)), ("one empty", (2, 0)), ("both empty", (0, 0))]
)
def test_ranks_weigh_equally_and_empty_ones_not_at_all(ranks, case, rows):
    for rank in ranks:
        one = Center(HEADS).double()
        one.load_state_dict(rank["several"])
        batches = [batch(4, r, n) for r, n in enumerate(rows) if n]
        if batches:
            one.update(
                {name: torch.stack([b[name].mean((0, 1)) for b in batches]) for name in HEADS}
            )
        same(rank[case], one)


def test_features_on_two_ranks(ranks):
    """The all-reduce carries a number for each feature, none for a prototype."""
    one = Center(K).double()
    for step in range(2):
        both = torch.cat([features(10 * step + rank)[0].features for rank in range(2)])
        one.update(both @ features(step)[0].prototypes.T)
    for rank in ranks:
        torch.testing.assert_close(rank["linear"], one.value, rtol=1e-13, atol=1e-15)
        assert rank["linear reduced"] == [torch.Size([3 + 1])] * 2


def test_sinkhorn_on_two_ranks_assigns_all_samples_together(ranks):
    z = [batch(5, 0, 3)["t_1"], batch(5, 1, 1)["t_1"]]
    for rank in ranks:
        whole = sinkhorn_center(torch.cat(z, 1), 0.05)
        torch.testing.assert_close(rank["sinkhorn"], whole, rtol=1e-12, atol=1e-14)
        assert rank["sinkhorn reduced"] == 1 + 3
        first = sinkhorn_center(z[0], 0.05)
        torch.testing.assert_close(rank["sinkhorn, one empty"], first, rtol=1e-12, atol=1e-14)


def test_the_group_decides_who_reduces(ranks):
    for r, rank in enumerate(ranks):
        z = batch(5, r, (3, 1)[r])["t_1"]
        torch.testing.assert_close(rank["alone"]["center"], 0.1 * z.mean((0, 1)))
        assert torch.equal(rank["alone"]["sinkhorn"], sinkhorn_center(z, 0.05))
        assert rank["alone reduced"] == 0
        assert rank["group used"]


def test_examples_in_the_documentation_run():
    assert doctest.testmod(center).failed == 0


@pytest.mark.parametrize("name", ["momentum", "update", "value", "training"])
def test_heads_that_would_hide_an_attribute(name):
    with pytest.raises(ValueError, match=f"called '{name}': Center has an attribute of that name"):
        Center({name: 4})


@pytest.mark.parametrize("name", ["a.b", "", 3])
def test_heads_whose_name_is_none(name):
    with pytest.raises(ValueError, match=f"called {name!r}: the name must be a string, not empty"):
        Center({name: 4})


@pytest.mark.parametrize("size", [3.5, True, "7", -1])
def test_sizes_that_are_none(size):
    for prototypes in (size, {"a": size}):
        with pytest.raises(ValueError, match=r"a size K >= 1 for each head, got"):
            Center(prototypes)
