"""The mean of `distill_with_mean` against float64; its loss is as without."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mokd_fast.ops import Target, cpu, cross_view_pairs, distill, distill_cross_entropy
from mokd_fast.ops.distill import distill_with_mean

from .conftest import levels
from .oracle import dense
from .test_cpu_memory import guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True, params=["reference", *levels()])
def backend(request, monkeypatch):
    name = "reference" if request.param == "reference" else "cpu"
    monkeypatch.setenv("MOKD_FAST_BACKEND", name)
    if name == "cpu":
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return name


def case(t=2, v=3, b=3, k=97, dtype=torch.float32):
    g = torch.Generator().manual_seed(k + b)
    student, teacher = (torch.randn(n, b, k, generator=g) * 3 for n in (v, t))
    center = torch.randn(k, generator=g)
    target = Target(dense(t, v), (teacher + 20).to(dtype), None, 0.05, center)
    return student.to(dtype).requires_grad_(), target


def check(student, target):
    want, _ = distill_cross_entropy(student, [target])
    loss, mean = distill_with_mean(student, target)
    assert torch.equal(loss, want)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, want)]
    assert torch.equal(*gradients)
    assert mean.dtype == torch.promote_types(student.dtype, torch.float32)
    assert not mean.requires_grad
    tolerance = 1e-14 if student.dtype == torch.float64 else 1e-6  # as column_mean's
    exact = target.logits.double().flatten(0, 1).mean(0)
    torch.testing.assert_close(mean.double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 33, 2049, 16485])
@pytest.mark.parametrize("b", [1, 17])  # 8 images of two rows are one group
def test_loss_and_mean(b, k, dtype):
    check(*case(b=b, k=k, dtype=dtype))


@pytest.mark.parametrize("t", [1, 4, 5, 17])  # 4 rows are added at a time, 16 a group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(t, dtype):
    check(*case(t=t, b=5, k=2100, dtype=dtype))


def test_a_row_for_one_view_alone():
    student, target = case(t=2, v=2)
    check(student, Target(((1.0, 0.0), (0.0, 0.5)), target.logits, None, 0.05))


@pytest.mark.parametrize("shape", [(2, 700, 33), (2, 50_000, 1)])
def test_many_equal_rows(shape):
    """One chain of fp32 additions would be off by 1e-5."""
    teacher = torch.full(shape, 0.1)
    target = Target(cross_view_pairs(2, 3), teacher)
    _, mean = distill_with_mean(torch.zeros(3, *shape[1:]), target)
    torch.testing.assert_close(mean, teacher[0, 0], rtol=5e-7, atol=0)


def test_a_center_of_every_kind():
    student, target = case()
    want, mean = distill_with_mean(student, target)
    center = target.center
    assert center is not None
    negative = torch.complex(center, -center).conj().imag
    assert negative.is_neg()
    for same in (negative, center.double(), center.clone().requires_grad_()):
        found = distill_with_mean(student, Target(target.pairs, target.logits, None, 0.05, same))
        assert torch.equal(found[0], want) and torch.equal(found[1], mean)
        assert not found[1].requires_grad


def test_any_stride_and_the_sign_of_a_negative_view():
    student, target = case(b=4)
    rows = target.logits
    turned = rows.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    negative = torch.complex(rows, -rows).conj().imag
    assert negative.is_neg()
    for logits in (turned, negative, rows[:1].expand(2, 4, 97), rows.flip(-1)):
        check(student, Target(target.pairs, logits, None, 0.05, target.center))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_columns(dtype):
    student, target = case(k=70, dtype=dtype)
    target.logits[1, 2, 66], target.logits[0, 0, 5] = torch.nan, -torch.inf
    _, mean = distill_with_mean(student, target)
    assert mean.isfinite().logical_not().nonzero().flatten().tolist() == [5, 66]
    assert mean[66].isnan() and mean[5] == -torch.inf


def test_without_images_it_is_zero():
    loss, mean = distill_with_mean(*case(b=0))
    assert loss == 0
    assert torch.equal(mean, torch.zeros(97))


@pytest.mark.parametrize(
    ("own", "others"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]
)
def test_the_arithmetic_is_the_students(own, others):
    student, target = case()
    target = Target(target.pairs, target.logits.to(others), None, 0.05)
    _, mean = distill_with_mean(student.to(own), target)
    exact = target.logits.double().flatten(0, 1).mean(0)
    assert mean.dtype == own
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", levels(), indirect=True)  # a library promises no such thing
def test_bits_do_not_depend_on_the_threads():
    """Of one thread to more than there are pieces of work with the images together."""
    before = torch.get_num_threads()
    try:
        for b, k in ((3, 97), (20, 97), (9, 8200), (33, 20000), (40, 9000)):
            student, target = case(b=b, k=k)
            found = []
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                found.append(distill_with_mean(student, target))
            for loss, mean in found[1:]:
                assert torch.equal(loss, found[0][0]) and torch.equal(mean, found[0][1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", levels(), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 31, 2049, 8223])
def test_nothing_outside_of_the_tensors_is_touched(k, dtype):
    """A violation ends the process."""
    student, target = case(b=2, k=k, dtype=dtype)
    loss, expected = distill_with_mean(student, target)
    for at_end in (False, True):
        rows = guarded(target.logits, at_end)
        center, mean = guarded(target.center, at_end), guarded(expected, at_end)
        arguments = student.detach(), [rows], [center], [torch.empty(0)]
        scalars = torch.tensor([0.1, target.temperature, 1.0], dtype=torch.float64)
        pairs = [w for row in target.pairs for w in row]
        found, *_ = cpu.distill_forward(*arguments, scalars, pairs, [False], mean=mean.zero_())
        assert torch.equal(found, loss) and torch.equal(mean, expected)


@pytest.mark.parametrize("backend", levels(), indirect=True)
def test_the_operator():
    student, target = case()
    pairs = [w for row in target.pairs for w in row]
    lists = [target.logits], [target.center], [torch.empty(0)]
    scalars = torch.tensor([0.1, target.temperature, 1.0], dtype=torch.float64)
    arguments = (student, *lists, scalars, pairs, [False], "cpu", True)
    torch.library.opcheck(distill._forward, arguments)
    *_, mean = distill._forward(*arguments)
    assert torch.equal(mean, distill_with_mean(student, target)[1])


def test_traced_and_compiled_it_is_the_same():
    student, target = case()
    eager = distill_with_mean(student, target)
    step = lambda s: distill_with_mean(s, target)  # noqa: E731
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for call in (compiled, make_fx(step)(student)):
        for have, want in zip(call(student), eager, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_what_it_refuses():
    student, target = case()
    with pytest.raises(ValueError, match="only logits have a mean"):
        distill_with_mean(student, Target(target.pairs, probs=target.logits.softmax(-1)))
    with pytest.raises(ValueError, match=r"center must be \[97\], got \[5\]"):
        distill_with_mean(student, Target(target.pairs, target.logits, None, 1.0, torch.zeros(5)))
