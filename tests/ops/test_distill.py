"""distill_cross_entropy against the official loop (bench.baseline), and its contract."""

import doctest

import pytest
import torch

from bench.baseline.official import DINOLoss, SearchLoss
from mokd_fast.ops import (
    Target,
    column_mean,
    cross_view_pairs,
    distill,
    distill_cross_entropy,
    explain,
    matched_pairs,
)

V, T, B, K = 5, 2, 3, 17


pytestmark = pytest.mark.usefixtures("backend")  # every test holds for every backend


def logits(rows: int, dtype=torch.float64, scale=3.0, **options) -> torch.Tensor:
    g = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, B, K, generator=g, dtype=torch.float64) * scale).to(dtype, **options)


def official(student, teacher, center, tau):
    loss = DINOLoss(K, len(student), [tau]).to(student.dtype)
    loss.center.copy_(center)
    return loss(student.flatten(0, 1), teacher.flatten(0, 1), 0)


def test_dino_and_search_equal_the_official_loops():
    student, teacher, searched = logits(V).requires_grad_(), logits(T), logits(V - 2)
    center = torch.linspace(-1, 1, K, dtype=torch.float64)
    targets = [
        Target(cross_view_pairs(T, V), teacher, temperature=0.05, center=center),
        Target(matched_pairs(V, 2), searched, temperature=0.04, weight=0.3),
    ]
    loss, terms = distill_cross_entropy(student, targets)
    dino = official(student, teacher, center, 0.05)
    search = SearchLoss([0.04])(student[2:].flatten(0, 1), searched.flatten(0, 1), 0)
    torch.testing.assert_close(terms, torch.stack([dino, search]).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, dino + 0.3 * search, rtol=1e-12, atol=0)
    (mine,) = torch.autograd.grad(loss, student)
    (theirs,) = torch.autograd.grad(dino + 0.3 * search, student)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert not terms.requires_grad


@pytest.mark.parametrize(("v", "t", "k"), [(1, 3, 7), (4, 1, 1), (3, 5, 33)])
def test_the_formula_as_a_double_sum(v, t, k):
    """Any pairs and any shape: loss and gradient as the design writes them."""
    g = torch.Generator().manual_seed(v)
    student, teacher = (torch.randn(n, B, k, generator=g, dtype=torch.float64) * 3 for n in (v, t))
    student.requires_grad_()
    center, pairs = torch.randn(k, generator=g, dtype=torch.float64), torch.rand(t, v, generator=g)
    pairs[0, -1] = 0
    row = torch.rand(B, generator=g, dtype=torch.float64)
    target = Target(tuple(map(tuple, pairs.tolist())), teacher, None, 0.07, center, 0.5, row)
    loss, terms = distill_cross_entropy(student, [target], temperature=0.2)
    (mine,) = torch.autograd.grad(loss, student)
    weights, q = pairs.double(), ((teacher - center) / 0.07).softmax(-1)
    expected, gradient = 0.0, torch.zeros_like(student)
    for j in range(v):
        log_p = (student[j] / 0.2).log_softmax(-1)
        for i in range(t):
            expected += weights[i, j] * (row * -(q[i] * log_p).sum(-1)).mean()
            gradient[j] += weights[i, j] * row[:, None] * (log_p.exp() - q[i]) / (0.2 * B)
    torch.testing.assert_close(terms[0], expected.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss, 0.5 * expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(mine, 0.5 * gradient.detach(), rtol=1e-12, atol=1e-14)


def test_one_call_is_the_sum_of_its_targets():
    student, pairs = logits(V).requires_grad_(), cross_view_pairs(T, V)
    targets = [
        Target(pairs, logits(T), temperature=0.05),
        Target(matched_pairs(V), logits(V), temperature=0.3, weight=-2.0),
        Target(pairs, probs=logits(T).softmax(-1), weight=0.0),
    ]
    loss, terms = distill_cross_entropy(student, targets)
    alone = [distill_cross_entropy(student, [target]) for target in targets]
    torch.testing.assert_close(loss, torch.stack([x for x, _ in alone]).sum())
    torch.testing.assert_close(terms, torch.cat([x for _, x in alone]))
    torch.testing.assert_close(loss, terms[0] - 2 * terms[1])
    (mine,) = torch.autograd.grad(loss, student)
    (theirs,) = torch.autograd.grad(sum(x for x, _ in alone), student)
    torch.testing.assert_close(mine, theirs)


def test_gradcheck_row_sums_and_entropy_bound(backend):
    # The emulated kernels take 2.6 s for every view of every image, and nothing else sees more.
    student = (logits(V)[:2, :1] if backend == "cuda" else logits(V)).requires_grad_()
    rows = logits(T)[:, : student.shape[1]]
    target = Target(cross_view_pairs(T, len(student)), rows, temperature=0.5)
    assert torch.autograd.gradcheck(
        lambda s: distill_cross_entropy(s, [target], temperature=0.5)[0], student
    )
    loss, _ = distill_cross_entropy(student, [target], temperature=0.5)
    loss.backward()
    assert student.grad.sum(-1).abs().max() < 1e-15  # n * 1 - n
    q = (target.logits / 0.5).softmax(-1)
    assert loss > -(q * q.log()).sum(-1).mean()  # Gibbs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moved", [(0, 0), (1e4, 0), (-1e4, 0), (0, 1e4), (0, -1e4), (-1e4, 1e4)])
def test_low_precision_is_no_worse_than_the_official_loop(dtype, moved):
    # 1e4 leaves fp16 no digit of the logits.
    of_student, of_teacher = (x / 10 if dtype == torch.float16 else x for x in moved)
    student, teacher = (logits(V) + of_student).to(dtype), (logits(T) + of_teacher).to(dtype)
    center = torch.zeros(K, dtype=torch.float64)
    leaf, mid, low = (student.to(d).requires_grad_() for d in (torch.float64, torch.float32, dtype))
    exact = official(leaf, teacher.double(), center, 0.04)
    rough = official(mid, teacher.float(), center.float(), 0.04)
    mine, _ = distill_cross_entropy(
        low, [Target(cross_view_pairs(T, V), teacher, temperature=0.04)]
    )
    assert mine.dtype == torch.float32
    assert (mine - exact).abs() <= (rough - exact).abs() + 1e-6 * exact.abs()
    for loss in (exact, rough, mine):
        loss.backward()
    assert low.grad.dtype == dtype
    # One rounding to the student's type on top of the official fp32 error.
    error, allowed = ((x.grad - leaf.grad).abs() for x in (low, mid))
    top = leaf.grad.abs()
    assert (error <= allowed + 1e-6 * top.max() + torch.finfo(dtype).eps * top).all()


def test_row_weights_probabilities_and_tensor_temperatures():
    student, teacher = logits(V), logits(T)
    pairs = cross_view_pairs(T, V)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    tau = torch.tensor(0.3)
    loss, _ = distill_cross_entropy(
        student, [Target(pairs, teacher, temperature=tau, row_weight=weight)], temperature=tau
    )
    q, p = (teacher / 0.3).softmax(-1), (student / 0.3).log_softmax(-1)
    rows = [
        pairs[t][v] * (weight * -(q[t] * p[v]).sum(-1)).mean() for t in range(T) for v in range(V)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).sum(), rtol=1e-6, atol=0)
    given, _ = distill_cross_entropy(
        student, [Target(pairs, probs=q, row_weight=weight)], temperature=0.3
    )
    torch.testing.assert_close(given, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_is_a_number_or_a_tensor_with_the_same_bits(dtype):
    """0, negative and not finite too; the terms never have it."""
    student, teacher = logits(V, dtype).requires_grad_(), logits(T, dtype)
    pairs, wide = cross_view_pairs(T, V), torch.promote_types(dtype, torch.float32)

    def run(weight):
        targets = [Target(pairs, teacher, weight=0.5), Target(pairs, teacher.exp(), weight=weight)]
        loss, terms = distill_cross_entropy(student, targets)
        return loss.detach(), terms, torch.autograd.grad(loss, student)[0]

    _, unscaled, _ = run(1.0)
    for weight in (0.3, 0.0, -2.0, torch.inf, torch.nan):
        loss, terms, gradient = run(weight)
        for tensor in (torch.tensor(weight), torch.tensor(weight, dtype=torch.float64)):
            if tensor.dtype == torch.float64 or wide == torch.float32:  # else 0.3 is another number
                for mine, theirs in zip(run(tensor), (loss, terms, gradient), strict=True):
                    assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
        assert torch.equal(terms, unscaled) and loss.isfinite() == (abs(weight) < torch.inf)
        torch.testing.assert_close(
            loss, 0.5 * terms[0] + weight * terms[1], rtol=1e-6, atol=0, equal_nan=True
        )


def test_extreme_and_empty_inputs():
    pairs = cross_view_pairs(T, V)
    student, teacher = logits(V).requires_grad_(), logits(T)
    empty = torch.zeros(V, 0, K, requires_grad=True)
    loss, _ = distill_cross_entropy(empty, [Target(pairs, torch.zeros(T, 0, K))])
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape
    teacher[..., 0] = -torch.inf  # probability 0, and the student's column there is pushed down
    q = torch.cat([torch.zeros(T, B, 1), teacher[..., 1:].softmax(-1)], dim=-1)
    loss, _ = distill_cross_entropy(student, [Target(pairs, teacher)])
    torch.testing.assert_close(loss, distill_cross_entropy(student, [Target(pairs, probs=q)])[0])
    loss.backward()
    assert (student.grad[..., 0] > 0).all()
    bad = student.detach().clone()
    bad[0, 0, 1] = -torch.inf
    assert not distill_cross_entropy(bad, [Target(pairs, teacher)])[0].isfinite()
    bad[0, 0, 1] = torch.nan
    assert distill_cross_entropy(bad, [Target(pairs, teacher)])[0].isnan()
    teacher[1, 2, 3] = torch.nan
    assert distill_cross_entropy(student, [Target(pairs, teacher)])[0].isnan()


def test_any_strides():
    pairs = cross_view_pairs(T, V)
    one_view, one_row = logits(1), logits(1)[:, :1].expand(T, B, K)  # stride 0
    columns = (
        logits(V).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )  # K is not the last in memory
    for student in (one_view.expand(V, B, K), columns, logits(2 * V)[::2].flip(-1)):
        copies = [Target(pairs, one_row.contiguous(), center=columns[0, 0].contiguous())]
        views = [Target(pairs, one_row, center=columns[0, 0])]
        torch.testing.assert_close(
            distill_cross_entropy(student, views)[0],
            distill_cross_entropy(student.contiguous(), copies)[0],
        )


def test_no_gradient_leaves_through_a_target():
    """Same dtype as the arithmetic: a cast alone would hand back the tensor with its graph."""
    student, pairs = logits(V).requires_grad_(), cross_view_pairs(T, V)
    own = {"logits": logits(T), "probs": logits(T).softmax(-1), "center": logits(1)[0, 0]}
    own = {name: x.detach().requires_grad_() for name, x in own.items()}
    row = torch.ones(B, dtype=torch.float64, requires_grad=True)
    tau, weight = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = [
        Target(pairs, own["logits"], center=own["center"], row_weight=row),
        Target(pairs, probs=own["probs"], temperature=tau, weight=weight, row_weight=row),
    ]
    loss, terms = distill_cross_entropy(student, targets)
    loss.backward()
    assert student.grad is not None and not terms.requires_grad
    assert all(x.grad is None for x in (row, tau, weight, *own.values()))


def test_the_backend_is_chosen_and_explained(monkeypatch):
    monkeypatch.delenv("MOKD_FAST_BACKEND")
    student, targets = logits(V), [Target(cross_view_pairs(T, V), logits(T))]
    *_, first, last = explain("distill_cross_entropy", student, targets, 0.1).split("\n")
    assert first == "cpu: chosen" or "not built" in first
    assert last in ("reference: chosen", "reference: can run too")
    loss, _ = distill_cross_entropy(student, targets, backend="reference")
    torch.testing.assert_close(loss, distill_cross_entropy(student, targets)[0])
    with pytest.raises(ValueError, match="no backend 'fastest'"):
        distill_cross_entropy(student, targets, backend="fastest")


def test_strides_autocast_and_no_gradient_to_the_teacher():
    pairs = cross_view_pairs(T, V)
    student, teacher = logits(V), logits(T).requires_grad_()
    wide = student.repeat(1, 1, 2)[..., :K].transpose(0, 1).contiguous().transpose(0, 1)
    one = distill_cross_entropy(student, [Target(pairs, teacher)])[0]
    torch.testing.assert_close(distill_cross_entropy(wide, [Target(pairs, teacher)])[0], one)
    assert not one.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = distill_cross_entropy(student.float(), [Target(pairs, teacher.float())])
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, one.float(), rtol=1e-5, atol=0)


def test_pairs():
    assert cross_view_pairs(2, 3) == ((0.0, 0.25, 0.25), (0.25, 0.0, 0.25))
    assert matched_pairs(3, 1) == ((0.0, 0.5, 0.0), (0.0, 0.0, 0.5))
    with pytest.raises(ValueError, match="nothing to pair"):
        cross_view_pairs(1, 1)
    assert all(abs(sum(map(sum, cross_view_pairs(t, v))) - 1) < 1e-15 for t, v in ((2, 10), (3, 1)))
    for t, v in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="nothing to pair"):
            cross_view_pairs(t, v)
    for first in (2, -1):
        with pytest.raises(ValueError, match="first"):
            matched_pairs(2, first)


GOOD = {"pairs": cross_view_pairs(T, V), "logits": torch.zeros(T, B, K)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(T, B, K + 1)}, r"targets\[0\] must hold floating"),
        ({"logits": torch.zeros(T, B, K, dtype=torch.int64)}, "floating"),
        ({"logits": torch.zeros(T, B, K, device="meta")}, "is on meta"),
        ({"logits": None}, "either logits or probs"),
        ({"probs": torch.zeros(T, B, K)}, "either logits or probs"),
        ({"pairs": cross_view_pairs(T, V - 1)}, r"pairs must be \[T, V\]"),
        ({"pairs": ((0.0,) * V,) * T}, "nothing to pair"),
        ({"pairs": cross_view_pairs(T + 1, V)}, r"pairs must be \[T, V\] = \[2, 5\]"),
        ({"logits": None, "probs": torch.zeros(T, B + 1, K)}, "must hold floating"),
        ({"logits": None, "probs": torch.zeros(T, B, K), "center": torch.zeros(K)}, "no center"),
        ({"center": torch.zeros(K, device="meta")}, "center is on meta"),
        ({"row_weight": torch.zeros(B, device="meta")}, "row_weight is on meta"),
        ({"temperature": torch.ones(1, 1)}, "must be 0-d"),
        ({"temperature": 0.0}, r"targets\[0\].temperature must be > 0"),
        ({"temperature": torch.nan}, "must be > 0"),
        ({"temperature": torch.inf}, "must be > 0 and finite, got inf"),
        ({"weight": torch.ones(2)}, r"targets\[0\].weight must be 0-d, .* got shape \[2\]"),
        ({"center": torch.zeros(K + 1)}, r"center must be \[17\]"),
        ({"row_weight": torch.zeros(B + 1)}, r"row_weight must be \[3\]"),
    ],
)
def test_bad_targets(change, message):
    with pytest.raises(ValueError, match=message):
        distill_cross_entropy(torch.zeros(V, B, K), [Target(**{**GOOD, **change})])


def test_bad_students():
    with pytest.raises(ValueError, match="student must be floating logits"):
        distill_cross_entropy(torch.zeros(B, K), [Target(**GOOD)])
    with pytest.raises(ValueError, match="student must be floating logits"):
        distill_cross_entropy(torch.zeros(V, B, K, dtype=torch.int64), [Target(**GOOD)])
    with pytest.raises(ValueError, match="student has no prototypes"):
        empty = Target(GOOD["pairs"], torch.zeros(T, B, 0))
        distill_cross_entropy(torch.zeros(V, B, 0), [empty])
    with pytest.raises(ValueError, match="temperature must be 0-d"):
        distill_cross_entropy(torch.zeros(V, B, K), [Target(**GOOD)], temperature=torch.ones(1))
    with pytest.raises(ValueError, match=r"targets\[1\].temperature"):
        bad = Target(**{**GOOD, "temperature": -1.0})
        distill_cross_entropy(torch.zeros(V, B, K), [Target(**GOOD), bad])
    with pytest.raises(ValueError, match=r"got a single one: pass \[target\]"):
        distill_cross_entropy(torch.zeros(V, B, K), Target(**GOOD))
    with pytest.raises(ValueError, match="targets is empty"):
        distill_cross_entropy(torch.zeros(V, B, K), [])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill_cross_entropy(torch.zeros(V, B, K), [Target(**GOOD)], temperature=-1)


def test_the_docstring_example():
    found = doctest.testmod(distill)
    assert found.failed == 0 and found.attempted > 0


def test_column_mean_without_rows_is_zero():
    assert torch.equal(column_mean(torch.zeros(2, 0, K)), torch.zeros(K))
    rows = logits(T)
    torch.testing.assert_close(column_mean(rows), rows.flatten(0, 1).mean(0))
    assert column_mean(rows.bfloat16()).dtype == torch.float32
