"""The kernels of distill_cross_entropy against float64: every level, dtype, shape and stride."""

import pytest
import torch

from mokd_fast.ops import Target, cross_view_pairs, matched_pairs

from .oracle import check, dense, run

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def displaced(x, dtype, offset=1):
    """A copy that starts `offset` elements into its storage: no vector of it is aligned."""
    storage = torch.empty(x.numel() + offset, dtype=dtype)
    return storage[offset:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 97, 1000, 65537, 262144])
@pytest.mark.parametrize("scale", [3.0, 0.02])  # one peak a row; flat, so that every column counts
def test_columns(scale, k, dtype):
    b = 3 if k <= 1000 else 1
    teacher, center = randn(2, b, k, dtype=dtype, scale=scale), randn(k, scale=scale / 3)
    target = Target(cross_view_pairs(2, 3), teacher, None, 0.04, center)
    *_, gradient = check(randn(3, b, k, dtype=dtype, scale=scale), [target])
    if dtype in (torch.float32, torch.float64):  # n softmax - sum of n distributions
        sums = gradient.double().sum(-1).abs()
        assert (sums <= 30 * torch.finfo(dtype).eps * gradient.abs().sum(-1)).all()


# Two registers hold 8, 16 and 32 bf16 columns in baseline, v3 and v4; a block 2048, a tile 8192.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k", [8, 16, 32, 33, 48, 1047, 2040, 2048, 2056, 2079, 2080, 4127, 8192, 8200, 8223, 8224]
)
@pytest.mark.parametrize("offset", [0, 1])
def test_around_every_border_and_alignment(k, dtype, offset):
    student = displaced(randn(5, 2, k), dtype, offset)
    teacher, center = displaced(randn(2, 2, k), dtype, offset), displaced(randn(k), dtype, offset)
    check(student, [Target(cross_view_pairs(2, 5), teacher, None, 0.05, center)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("t", "v"), [(1, 1), (1, 4), (3, 1), (4, 2), (5, 2), (9, 3), (2, 10), (24, 2), (8, 18)]
)
def test_rows_and_views(t, v, dtype):
    for k in (97, 96):
        target = Target(dense(t, v), randn(t, 2, k, dtype=dtype), temperature=0.07)
        check(randn(v, 2, k, dtype=dtype), [target])


@pytest.mark.parametrize("common", [0, 1, 4, 5])  # a group is 4 rows
@pytest.mark.parametrize("k", [31, 97, 1056, 8223])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_one_view_only(dtype, k, common):
    """Two rows for one view, none for another, beside rows for all views."""
    lone = ((1.0, 0.0, 0.0, 0.0), (0.5, 0.0, 0.0, 0.0), (0.0, 0.0, 0.3, 0.0), (0.0, 0.0, 0.0, 0.2))
    targets = [Target(lone, randn(4, 2, k, dtype=dtype), temperature=0.07, weight=0.7)]
    if common:
        teacher = randn(common, 2, k, dtype=dtype)
        targets.append(Target(dense(common, 4), teacher, None, 0.05, randn(k)))
    check(randn(4, 2, k, dtype=dtype), targets)


@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("k", [97, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_of_every_kind_and_type(dtype, k, b):
    student, row = randn(4, b, k, dtype=dtype), randn(b, scale=1.0).abs()
    half = torch.tensor(0.5)  # as a schedule on the device is
    few = ((0.5, 0.0, 0.2, 0.0), (0.0, 0.0, 0.7, 0.0), (0.3, 0.0, 0.0, 0.0))  # two views alone
    probs = 0.7 * randn(1, b, k).softmax(-1)  # need not sum to 1
    loss, terms, _ = check(
        student,
        [
            Target(cross_view_pairs(2, 4), randn(2, b, k, dtype=torch.bfloat16), None, 0.05),
            Target(few, randn(3, b, k), None, 0.3, randn(k).bfloat16(), weight=0.6),
            Target(dense(1, 4), probs=probs, row_weight=row),
            Target(dense(1, 4), probs=probs.bfloat16(), weight=half, row_weight=row.half()),
            Target(dense(2, 4), randn(2, b, k).double(), None, 0.2, randn(k).double()),
            Target(matched_pairs(4, 1), randn(3, b, k).half(), row_weight=row, weight=0.0),
        ],
    )
    weights = torch.tensor([1.0, 0.6, 1.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(loss, (terms * weights.to(terms)).sum())
    assert b == 0 or terms[-1] > 0  # a term of weight 0 is logged all the same


@pytest.mark.parametrize("k", [1000, 12345])
def test_the_mass_of_given_probabilities(k):
    """Equal numbers are the worst case of a sum: every addition rounds the same way."""
    probs = torch.full((2, 2, k), 1 / k)
    check(randn(3, 2, k), [Target(cross_view_pairs(2, 3), probs=probs)])


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("moved", ["student", "teacher", "both"])
def test_a_common_offset_keeps_the_digits(moved, offset):
    k, pairs = 2100, cross_view_pairs(2, 3)
    student = randn(3, 2, k) + offset * (moved != "teacher")
    teacher = randn(2, 2, k) + offset * (moved != "student")
    *_, gradient = check(student, [Target(pairs, teacher, temperature=0.04)])
    assert gradient.double().sum(-1).abs().max() <= 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand(dtype):
    for k in (97, 4096):
        signs = randn(3, 2, k).sign() * 1e4
        student, teacher = (randn(3, 2, k) + signs).to(dtype), randn(2, 2, k) - signs[:2]
        check(student, [Target(cross_view_pairs(2, 3), teacher.to(dtype), temperature=0.04)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.01, 0.5, 1.0, 8.0, 1000.0, -0.5, -1000.0])
def test_maxima_that_rise_or_fall_from_block_to_block(step, dtype):
    """A kernel that keeps the maximum of the columns it has seen is wrong here first."""
    k, pairs = 20000, cross_view_pairs(2, 3)
    stairs = torch.arange(k).div(1000, rounding_mode="floor") * step
    student = (randn(3, 1, k, scale=0.5) + stairs).to(dtype)
    teacher = (randn(2, 1, k, scale=0.5) + stairs.flip(0)).to(dtype)
    for rows in (teacher, teacher.flip(-1)):
        check(student, [Target(pairs, rows, temperature=0.05)])
    late = randn(3, 1, k, dtype=dtype)
    late[..., -1] = 50 * step  # the last column alone
    check(late, [Target(pairs, late[:2].flip(-1), temperature=0.05)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_no_less_than_the_entropy(dtype):
    """Gibbs; equal, and without a gradient, where the student is the teacher."""
    teacher = randn(1, 2, 65537, dtype=dtype)
    q = (teacher.double() / 0.1).softmax(-1)
    entropy = -(q * q.clamp_min(1e-300).log()).sum(-1).mean()
    near = (teacher + randn(1, 2, 65537, scale=0.3)).to(dtype)
    assert run(near, [Target(((1.0,),), teacher, temperature=0.1)])[0] > entropy
    loss, _, gradient = run(teacher, [Target(((1.0,),), teacher, temperature=0.1)])
    torch.testing.assert_close(loss.double(), entropy, rtol=1e-6, atol=0)
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities(dtype):
    k, pairs = 17000, cross_view_pairs(2, 3)
    student, teacher = randn(3, 1, k, dtype=dtype), randn(2, 1, k, dtype=dtype)
    teacher[:, :, :9000] = -torch.inf  # the first tile is of nothing else
    teacher[:, :, 16384:] = -torch.inf  # nor is the last
    finite = teacher.clamp_min(-1e30)  # the same distribution, by the same loops
    *_, gradient = run(student, [Target(pairs, teacher)])
    check(student, [Target(pairs, finite)])
    torch.testing.assert_close(gradient, run(student, [Target(pairs, finite)])[2], rtol=0, atol=0)
    assert (gradient[:, :, :9000] >= 0).all()
    for bad in (slice(12000, 12001), slice(0, 9000), slice(None)):
        broken = student.clone()
        broken[1, 0, bad] = -torch.inf
        assert not run(broken, [Target(pairs, teacher)])[0].isfinite()
    teacher[1] = -torch.inf
    assert run(student, [Target(pairs, teacher)])[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 50, 95, slice(None)])
@pytest.mark.parametrize("which", ["student", "logits", "probs", "center", "row_weight"])
def test_nan_in_is_nan_out_and_of_its_image_alone(which, column, dtype):
    pairs, k = cross_view_pairs(2, 3), 96
    parts = {
        "student": randn(3, 2, k, dtype=dtype),
        "logits": randn(2, 2, k, dtype=dtype),
        "probs": randn(2, 2, k).softmax(-1).to(dtype),
        "center": randn(k),
        "row_weight": torch.ones(2),
    }
    bad = parts[which]
    if which == "center":
        bad[column] = torch.nan
    elif which == "row_weight":
        bad[1] = torch.nan
    else:
        bad[1, 1, column] = torch.nan
    targets = [
        Target(pairs, parts["logits"], None, 0.1, parts["center"], 1.0, parts["row_weight"]),
        Target(pairs, probs=parts["probs"]),
    ]
    loss, _, gradient = run(parts["student"], targets)
    assert loss.isnan() and gradient[:, 1].isnan().any()
    assert which == "center" or gradient[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [97, 96, 2048])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_no_pair_names_may_hold_anything(value, k, dtype):
    """A view and teacher rows without a pair, as the global views are in MOKD's search."""
    student, teacher = randn(3, 2, k, dtype=dtype), randn(2, 2, k, dtype=dtype)
    probs = randn(2, 2, k).softmax(-1)
    pairs = ((0.0, 0.5, 0.5), (0.0, 0.0, 0.0))
    student[0], teacher[1], probs[1] = value, value, value
    loss, _, gradient = run(student, [Target(pairs, teacher), Target(pairs, probs=probs)])
    assert loss.isfinite() and (gradient[0] == 0).all() and gradient.isfinite().all()
    # Nor does a row of one view reach another.
    pairs = ((0.0, 0.5, 0.0), (0.0, 0.0, 0.5))
    _, _, gradient = run(student, [Target(pairs, probs=probs)])
    assert (gradient[0] == 0).all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [97, 96])
def test_any_strides(k, dtype):
    one, columns = randn(1, 3, k, dtype=dtype), randn(k, 3, 4, dtype=dtype).permute(2, 1, 0)
    images = randn(3, 4, k, dtype=dtype).transpose(0, 1)
    cut = randn(4, 5, k + 100, dtype=dtype)[:, 1:4, 3 : k + 3]
    every_other = randn(8, 6, 2 * k, dtype=dtype)[::2, ::2, ::2]
    rows = (randn(1, 1, k, dtype=dtype).expand(2, 3, k), cut[1:3], columns[:2], images[:2].flip(-1))
    for student in (one.expand(4, 3, k), columns, images, cut, every_other):
        for teacher in rows:
            center, weight = columns[0, 0], columns[0, :, 0].abs()
            target = Target(dense(2, 4), teacher, None, 0.1, center, 0.7, weight)
            parts = (teacher.contiguous(), None, 0.1, center.contiguous(), 0.7, weight.contiguous())
            copied = run(student.contiguous(), [Target(dense(2, 4), *parts)])
            for mine, theirs in zip(run(student, [target]), copied, strict=True):
                tolerance = 1e-12 if dtype == torch.float64 else 1e-6
                top = theirs.double().abs().max()
                step = torch.finfo(mine.dtype).eps if mine.ndim == 3 else 0
                error = (mine.double() - theirs.double()).abs()
                assert (error <= tolerance * top + step * theirs.double().abs()).all()


@pytest.mark.parametrize("k", [5, 16, 40, 96])
@pytest.mark.parametrize("temperature", [1e29, 1e-3, 1.0])
def test_what_fills_the_last_vector_does_not_count(temperature, k):
    check(randn(3, 2, k), [Target(dense(2, 3), randn(2, 2, k), None, 0.1)], temperature)


@pytest.mark.parametrize("k", [5, 16, 96, 5000])
def test_logits_that_fp32_does_not_hold(k):
    student = randn(3, 2, k, dtype=torch.float64) - 1e39
    check(student, [Target(dense(2, 3), randn(2, 2, k, dtype=torch.float64))])


def test_a_teachers_nan_counts_with_a_weight_of_zero():
    """As in 0 * NaN: what is named must be finite."""
    teacher = randn(2, 2, 96)
    teacher[1, 1, 3] = torch.nan
    _, _, gradient = run(randn(3, 2, 96), [Target(dense(2, 3), teacher, None, 0.1, weight=0.0)])
    assert gradient[:, 1].isnan().all() and (gradient[:, 0] == 0).all()
