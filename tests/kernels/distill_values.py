"""Values of the Triton distill_cross_entropy against float64. `test_distill.py` runs this file in a
process of its own, interpreted on the CPU (TRITON_INTERPRET=1, to be set before triton is imported)
and, where there is a GPU, compiled."""

import os
from dataclasses import replace

import pytest
import torch
from mokd_fast.kernels import distill as kernels

from mokd_fast.ops import Target, cross_view_pairs, distill, distill_cross_entropy, matched_pairs

from .interpreter import _bfloat16_rounds_to_nearest, _quick  # noqa: F401

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense(t, v):
    """Positive weights for every pair, none like another."""
    return tuple(tuple((1 + i + 2 * j) / (t * v) for j in range(v)) for i in range(t))


def run(student, targets, backend="triton", temperature=0.1):
    leaf = student.detach().requires_grad_()
    loss, terms = distill_cross_entropy(leaf, targets, temperature=temperature, backend=backend)
    return loss.detach(), terms, torch.autograd.grad(loss, leaf)[0]


def double(target):
    names = ("logits", "probs", "center", "row_weight")
    tensors = {n: getattr(target, n) for n in names}
    return replace(target, **{n: x.double() for n, x in tensors.items() if x is not None})


def check(student, targets, temperature=0.1):
    """No error of loss, terms and gradient is larger than the reference's in the same dtype: up to
    1e-6 of the largest value, and 1e-8 where the loss is 0 (one column)."""
    exact = run(student.double(), [double(t) for t in targets], "reference", temperature)
    rough = run(student, targets, "reference", temperature)
    mine = run(student, targets, "triton", temperature)
    assert mine[0].dtype == mine[1].dtype == torch.float32 and mine[2].dtype == student.dtype
    for m, r, e, name in zip(mine, rough, exact, ("loss", "terms", "gradient"), strict=True):
        scale = e.abs().max() if e.numel() else 0.0
        error, allowed = ((x.double() - e).abs().flatten() for x in (m, r))
        assert e.isfinite().all()
        if e.numel():
            assert error.max() <= allowed.max() + 1e-6 * scale + 1e-8, name
    return mine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 97, 1000, 4097])  # below, at and above one tile
@pytest.mark.parametrize("scale", [3.0, 0.02])  # one peak a row; flat, so that every column counts
def test_columns(scale, k, dtype):
    teacher, center = randn(2, 2, k, dtype=dtype, scale=scale), randn(k, scale=scale / 3)
    student = randn(3, 2, k, dtype=dtype, scale=scale)
    check(student, [Target(cross_view_pairs(2, 3), teacher, None, 0.05, center)])


@pytest.mark.parametrize(("t", "v"), [(1, 1), (1, 4), (3, 5), (4, 2), (2, 10), (8, 18), (16, 2)])
def test_rows_and_views(t, v):
    check(randn(v, 2, 33), [Target(dense(t, v), randn(t, 2, 33), temperature=0.07)])


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_targets(images, dtype):
    """MOKD's call and more: own temperatures, centres, weights, types, given probabilities."""
    student, row = randn(4, images, 97, dtype=dtype), randn(images, scale=1.0).abs()
    targets = [
        Target(cross_view_pairs(2, 4), randn(2, images, 97, dtype=dtype), None, 0.05, randn(97)),
        Target(matched_pairs(4, 1), randn(3, images, 97), temperature=0.3, weight=-2.0),
        Target(dense(1, 4), probs=0.7 * randn(1, images, 97).softmax(-1), row_weight=row),
        Target(dense(2, 4), randn(2, images, 97).double(), None, 0.2, None, 0.5, row.to(dtype)),
    ]
    loss, terms, gradient = check(student, targets)
    torch.testing.assert_close(loss, terms[0] - 2 * terms[1] + terms[2] + 0.5 * terms[3])
    moved = [replace(t, weight=torch.tensor(t.weight, device=DEVICE)) for t in targets]
    assert all(map(torch.equal, run(student, moved), (loss, terms, gradient)))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_keeps_the_digits(offset):
    teacher, pairs = randn(2, 2, 4097) - offset, cross_view_pairs(2, 3)
    for student in (randn(3, 2, 4097) + offset, randn(3, 2, 4097)):
        *_, grad = check(student, [Target(pairs, teacher, temperature=0.04)])
        assert grad.double().sum(-1).abs().max() <= 1e-5 * grad.abs().max()


def test_any_strides():
    one, columns = randn(1, 3, 97), randn(97, 3, 4).permute(2, 1, 0)
    expanded, sliced = randn(2, 1, 97).expand(2, 3, 97), randn(2, 5, 200)[:, 1:4, 3:100]
    students = one.expand(4, 3, 97), columns, randn(8, 6, 97)[::2, ::2]
    for student, rows in zip(students, (expanded, sliced, columns[:2]), strict=True):
        target = Target(dense(2, 4), rows, None, 0.1, columns[0, 0], row_weight=columns[0, :, 0])
        tensors = {n: getattr(target, n).contiguous() for n in ("logits", "center", "row_weight")}
        copy = replace(target, **tensors)
        torch.testing.assert_close(run(student, [target]), run(student.contiguous(), [copy]))


def test_stats_are_the_maximum_of_the_logits_and_their_sum_over_the_temperature():
    student, teacher, probs = randn(3, 2, 4097), randn(1, 2, 4097), randn(1, 2, 4097).softmax(-1)
    empty = torch.empty(0, device=DEVICE)
    scalars = torch.tensor([0.1, 0.5, 1.0, 1.0, 1.0], device=DEVICE)
    rest = scalars, [1.0] * 6, [False, True]
    *_, stats = kernels.distill_forward(
        student, [teacher, 3 * probs], [empty] * 2, [empty] * 2, *rest
    )
    z, u = student.double() / 0.1, teacher.double() / 0.5
    sums = [(z - z.amax(-1, True)).exp().sum(-1).log(), (u - u.amax(-1, True)).exp().sum(-1)]
    tops = [student.amax(-1).double(), teacher.amax(-1), torch.zeros(1, 2, device=DEVICE)]
    expected = torch.stack([torch.cat(tops), torch.cat([*sums, 3 * probs.sum(-1)])], -1)
    torch.testing.assert_close(stats, expected.float())


def test_the_sharpest_temperatures_are_a_choice():
    """tau 1e-30: the maximum has the whole probability, and nothing is NaN."""
    student, teacher, pairs = randn(3, 2, 4097), randn(2, 2, 4097), cross_view_pairs(2, 3)
    _, _, grad = check(student, [Target(pairs, teacher, temperature=1e-30)])
    assert (grad.argmin(-1)[0] == teacher.argmax(-1)[1]).all()
    check(student, [Target(pairs, teacher)], temperature=1e-30)


def test_infinities():
    student, teacher, pairs = randn(3, 2, 4097), randn(2, 2, 4097), cross_view_pairs(2, 3)
    teacher[:, :, 5:4096] = -torch.inf  # probability 0; at least one whole tile, of 2048 or less
    *_, grad = check(student, [Target(pairs, teacher)])
    assert (grad[:, :, 5:4096] >= 0).all()
    for bad in (slice(5, 6), slice(0, 3000)):
        student = randn(3, 2, 4097)
        student[0, 0, bad] = -torch.inf
        assert not run(student, [Target(pairs, randn(2, 2, 4097))])[0].isfinite()
    teacher[0, 1] = -torch.inf
    assert run(randn(3, 2, 4097), [Target(pairs, teacher)])[0].isnan()


@pytest.mark.parametrize("column", [0, 1030, slice(None)])
def test_nan_in_is_nan_out_and_of_its_image_alone(column):
    pairs = cross_view_pairs(2, 3)
    for which in range(3):
        parts = [randn(3, 2, 1100), randn(2, 2, 1100), randn(2, 2, 1100).softmax(-1)]
        parts[which][1, 0, column] = torch.nan
        loss, _, grad = run(parts[0], [Target(pairs, parts[1]), Target(pairs, probs=parts[2])])
        assert loss.isnan() and grad[:, 0].isnan().any() and grad[:, 1].isfinite().all()


def test_what_no_pair_names_may_hold_nan():
    """A view and a teacher row without a pair, as the global views of MOKD's search are."""
    student, teacher = randn(3, 2, 97), randn(2, 2, 97)
    student[0], teacher[1] = torch.nan, torch.nan
    loss, _, grad = run(student, [Target(((0.0, 0.5, 0.5), (0.0, 0.0, 0.0)), teacher)])
    assert loss.isfinite() and (grad[0] == 0).all() and grad[1:].isfinite().all()


def test_a_row_of_one_view_does_not_reach_another():
    probs = randn(2, 2, 97).softmax(-1)
    probs[1] = torch.nan
    pairs = ((0.0, 0.5, 0.0), (0.0, 0.0, 0.5))
    _, _, grad = run(randn(3, 2, 97), [Target(pairs, probs=probs)])
    assert (grad[0] == 0).all() and grad[1].isfinite().all() and grad[2].isnan().all()


def test_the_same_bits_twice_and_two_backward_passes():
    student, targets = randn(3, 2, 4097), [Target(cross_view_pairs(2, 3), randn(2, 2, 4097))]
    first = run(student, targets)
    for a, b in zip(first, run(student, targets), strict=True):
        assert torch.equal(a, b)
    leaf = student.clone().requires_grad_()
    loss, _ = distill_cross_entropy(leaf, targets, backend="triton")
    loss.expand(3).sum().backward(retain_graph=True)
    loss.backward(torch.tensor(65536.0, device=DEVICE))  # as a GradScaler does
    torch.testing.assert_close(leaf.grad, first[2] * 65539)


def test_opcheck():
    student, target = randn(3, 2, 33), Target(cross_view_pairs(2, 3), randn(2, 2, 33))
    empty, pairs = torch.empty(0, device=DEVICE), [w for row in target.pairs for w in row]
    scalars = torch.tensor([0.1, 0.05, 1.0], device=DEVICE)
    rest = ([target.logits], [empty], [empty], scalars, pairs, [False], "triton")
    torch.library.opcheck(distill._forward, (student.requires_grad_(), *rest))
    stats = distill._forward(student, *rest)[2]
    grad = torch.ones((), device=DEVICE)
    torch.library.opcheck(distill._backward, (grad, stats.detach(), student.detach(), *rest))


def test_compiles_whole_and_once_for_changing_temperatures_and_weights():
    student, teacher = randn(3, 2, 97).requires_grad_(), randn(2, 2, 97)

    def loss(student, tau):
        target = Target(cross_view_pairs(2, 3), teacher, temperature=tau, weight=3 * tau)
        return distill_cross_entropy(student, [target], temperature=2 * tau, backend="triton")[0]

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for tau in (0.04, 0.05, 0.07):
        tau = torch.tensor(tau, device=DEVICE)
        torch.testing.assert_close(compiled(student, tau), loss(student, tau))
    compiled(student, torch.tensor(0.04, device=DEVICE)).backward()
    assert student.grad is not None and counter.frame_count == 1


def test_what_it_cannot_take_is_said():
    student, pairs = randn(3, 2, 33), dense(16, 3)
    with pytest.raises(RuntimeError, match=r"fp32, bf16 and fp16, the student is torch.float64"):
        run(student.double(), [Target(pairs, randn(16, 2, 33))])
    with pytest.raises(RuntimeError, match=r"takes 24 teacher rows, .*: here they are 32"):
        run(student, [Target(pairs, randn(16, 2, 33)), Target(dense(9, 3), randn(9, 2, 33))])


def test_the_table_of_pairs_is_copied_once():
    student, targets = randn(3, 2, 33), [Target(dense(2, 3), randn(2, 2, 33))]
    kernels._table.cache_clear()
    for tau, weight in ((0.04, 0.5), (0.05, 1.0)):  # schedules: neither is in the table
        run(student, [replace(targets[0], temperature=tau, weight=weight)])
    assert kernels._table.cache_info().misses == 1
