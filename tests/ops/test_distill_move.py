"""The centre that `distill_and_move` moves, against float64; its loss is as without."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mokd_fast.ops import Target, cpu, cross_view_pairs, distill, distill_cross_entropy
from mokd_fast.ops.distill import distill_and_move

from .conftest import levels
from .oracle import dense
from .test_cpu_memory import guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MOMENTUM = 0.9


@pytest.fixture(autouse=True, params=["reference", *levels()])
def backend(request, monkeypatch):
    name = "reference" if request.param == "reference" else "cpu"
    monkeypatch.setenv("MOKD_FAST_BACKEND", name)
    if name == "cpu":
        monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return name


def case(t=2, v=3, b=3, k=97, dtype=torch.float32, center=True):
    g = torch.Generator().manual_seed(k + b)
    student, teacher = (torch.randn(n, b, k, generator=g) * 3 for n in (v, t))
    moving = torch.randn(k, generator=g) if center else None
    target = Target(dense(t, v), (teacher + 20).to(dtype), None, 0.05, moving)
    return student.to(dtype).requires_grad_(), target


def exact(target):
    """The centre after the step, in float64."""
    rows = target.logits.double().flatten(0, 1)
    center = torch.zeros(rows.shape[-1]) if target.center is None else target.center
    return MOMENTUM * center.double() + (1 - MOMENTUM) * rows.mean(0)


def check(student, target):
    want, _ = distill_cross_entropy(student, [target])
    loss, moved = distill_and_move(student, target, MOMENTUM)
    assert torch.equal(loss, want)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, want)]
    assert torch.equal(*gradients)
    assert moved.dtype == torch.promote_types(student.dtype, torch.float32)
    assert not moved.requires_grad
    tolerance = 1e-15 if student.dtype == torch.float64 else 1e-7
    size = target.logits.double().abs().max()  # a centre near 0 may be the difference of two others
    torch.testing.assert_close(moved.double(), exact(target), rtol=0, atol=tolerance * size)
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 33, 97, 2047, 2048, 2049, 8193, 16485])
@pytest.mark.parametrize("b", [1, 9, 17])  # 8 images of two rows are one group
def test_loss_and_center(b, k, dtype):
    check(*case(b=b, k=k, dtype=dtype))


@pytest.mark.parametrize("t", [1, 4, 5, 17])  # 4 rows are added at a time, 16 a group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(t, dtype):
    check(*case(t=t, b=5, k=2100, dtype=dtype))
    check(*case(t=t, b=5, k=2100, dtype=dtype, center=False))


def test_a_row_for_one_view_alone():
    student, target = case(t=2, v=2)
    check(student, Target(((1.0, 0.0), (0.0, 0.5)), target.logits, None, 0.05))


def test_many_equal_rows():
    """One chain of fp32 additions would be off by 1e-5."""
    teacher = torch.full((2, 700, 33), 0.1)
    student = torch.zeros(3, 700, 33)
    _, moved = distill_and_move(student, Target(cross_view_pairs(2, 3), teacher), 0.0)
    torch.testing.assert_close(moved, teacher[0, 0], rtol=5e-7, atol=0)


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
    _, moved = distill_and_move(student, target, MOMENTUM)
    assert moved.isfinite().logical_not().nonzero().flatten().tolist() == [5, 66]
    assert moved[66].isnan() and moved[5] == -torch.inf


@pytest.mark.parametrize("center", [True, False])
def test_without_images_it_stays(center):
    student, target = case(b=0, center=center)
    loss, moved = distill_and_move(student, target, MOMENTUM)
    assert loss == 0
    assert torch.equal(moved, target.center if center else torch.zeros(97))
    assert target.center is None or moved.data_ptr() != target.center.data_ptr()


def test_bits_do_not_depend_on_the_threads(backend):
    """Of one thread to more than there are pieces of work with the images together."""
    before = torch.get_num_threads()
    try:
        for b, k in ((3, 97), (20, 97), (9, 8200), (33, 20000)):
            student, target = case(b=b, k=k)
            found = []
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                found.append(distill_and_move(student, target, MOMENTUM))
            if backend == "cpu":  # of a library's mean nobody promises it
                for loss, moved in found[1:]:
                    assert torch.equal(loss, found[0][0]) and torch.equal(moved, found[0][1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", levels(), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 31, 2049, 8223])
def test_nothing_outside_of_the_tensors_is_touched(k, dtype):
    """A violation ends the process."""
    student, target = case(b=2, k=k, dtype=dtype)
    loss, expected = distill_and_move(student, target, MOMENTUM)
    for at_end in (False, True):
        rows = guarded(target.logits, at_end)
        center, moved = guarded(target.center, at_end), guarded(expected, at_end)
        arguments = student.detach(), [rows], [center], [torch.empty(0)]
        scalars = torch.tensor([0.1, target.temperature, 1.0], dtype=torch.float64)
        pairs = [w for row in target.pairs for w in row]
        found, *_ = cpu.distill_forward(
            *arguments, scalars, pairs, [False], moved=moved.zero_(), momentum=MOMENTUM
        )
        assert torch.equal(found, loss) and torch.equal(moved, expected)


@pytest.mark.parametrize("backend", levels(), indirect=True)
def test_the_operator():
    student, target = case()
    pairs = [w for row in target.pairs for w in row]
    lists = [target.logits], [target.center], [torch.empty(0)]
    scalars = torch.tensor([0.1, target.temperature, 1.0], dtype=torch.float64)
    arguments = (student, *lists, scalars, pairs, [False], "cpu", MOMENTUM)
    torch.library.opcheck(distill._forward, arguments)
    *_, moved = distill._forward(*arguments)
    assert torch.equal(moved, distill_and_move(student, target, MOMENTUM)[1])


def test_traced_and_compiled_it_is_the_same():
    student, target = case()
    eager = distill_and_move(student, target, MOMENTUM)
    step = lambda s: distill_and_move(s, target, MOMENTUM)  # noqa: E731
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for call in (compiled, make_fx(step)(student)):
        for have, want in zip(call(student), eager, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_what_it_refuses(backend):
    student, target = case()
    probs = Target(target.pairs, probs=target.logits.softmax(-1))
    with pytest.raises(ValueError, match="probabilities have no centre"):
        distill_and_move(student, probs, MOMENTUM)
    with pytest.raises(ValueError, match=r"center must be \[97\], got \[5\]"):
        wrong = Target(target.pairs, target.logits, None, 0.05, torch.zeros(5))
        distill_and_move(student, wrong, MOMENTUM)
    if backend == "cpu":
        pairs = [w for row in target.pairs for w in row] * 2
        lists = [target.logits] * 2, [target.center] * 2, [torch.empty(0)] * 2
        scalars, moved = torch.tensor([0.1, 0.05, 0.05, 1.0, 1.0]), torch.empty(97)
        with pytest.raises(ValueError, match="one target has a centre to move"):
            cpu.distill_forward(student, *lists, scalars, pairs, [False] * 2, moved=moved)
