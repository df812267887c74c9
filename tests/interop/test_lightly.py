"""lightly.DINOLoss and IBOTPatchLoss against lightly itself, where it is installed."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mokd_fast.interop import lightly as mine
from tests.interop.cases import B, K, T, V, logits

# iBOT's published test numbers: see test_ibot_golden.
TEACHER = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
STUDENT = torch.tensor([[0.7, 0.8], [0.9, 1.0], [1.1, 1.2]])
TEMPERATURES = [
    {},
    {"teacher_temp": 0.125},
    {"epoch": 0},
    {"epoch": 2},
    {"epoch": 3},  # the first past the warm-up
    {"epoch": 7},
    {"epoch": 0, "teacher_temp": 0.125},
]


@pytest.fixture
def lightly():
    import lightly.loss  # of the dev extra: without it these tests prove nothing

    return lightly.loss


def same(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", TEMPERATURES, ids=str)
def test_dino_equals_lightly(lightly, dtype, tolerance, options):
    arguments = (K, 0.03125, 0.0625, 3, 0.1, 0.8)
    losses = mine.DINOLoss(*arguments).to(dtype), lightly.DINOLoss(*arguments).to(dtype)
    for step in range(4):
        student, teacher = logits(step, dtype)
        students = [student.clone().requires_grad_() for _ in losses]
        out = [
            loss(list(teacher), list(s), **options)
            for loss, s in zip(losses, students, strict=True)
        ]
        same(*out, tolerance)
        for value in out:
            value.backward()
        same(*(s.grad for s in students), tolerance)
        same(*(loss.center for loss in losses), tolerance)


@pytest.mark.parametrize(("rows", "views"), [(1, 2), (2, 1), (1, 4), (3, 2), (2, 2)])
def test_any_numbers_of_views(lightly, rows, views):
    student, teacher = (x.flatten(0, 1) for x in logits())
    student, teacher = student[: views * 3].chunk(views), teacher[: rows * 3].chunk(rows)
    out = [module.DINOLoss(K).double()(teacher, student) for module in (mine, lightly)]
    same(*out, 1e-6)  # lightly holds the temperature 0.04 in fp32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("temperature", [None, 0.125])
def test_ibot_equals_lightly(lightly, dtype, tolerance, temperature):
    """float64 to 1e-7: lightly's 1 / (masked patches) is of fp32."""
    losses = [
        module.IBOTPatchLoss(K, 0.0625, 0.2, "mean", 0.7).to(dtype) for module in (mine, lightly)
    ]
    g = torch.Generator().manual_seed(3)
    for step in range(4):
        mask = torch.rand(5, 2, 4, generator=g) < 0.4
        mask[step] = False  # an image without a mask counts
        student, teacher = (x.flatten(0, 1)[: mask.sum()] for x in logits(step, dtype))
        teacher = student.flip(0) if len(teacher) < len(student) else teacher
        students = [student.clone().requires_grad_() for _ in losses]
        out = [
            loss(teacher, s, mask, temperature) for loss, s in zip(losses, students, strict=True)
        ]
        same(*out, tolerance)
        for value in out:
            value.backward()
        same(*(s.grad for s in students), tolerance)
        same(*(loss.center.value for loss in losses), tolerance)


def test_states_pass_both_ways(lightly):
    for name in ("DINOLoss", "IBOTPatchLoss"):
        ours, theirs = (getattr(module, name)(K) for module in (mine, lightly))
        state = {key: torch.randn_like(x) for key, x in theirs.state_dict().items()}
        ours.load_state_dict(state)
        theirs.load_state_dict(ours.state_dict())
        for key, value in copy.deepcopy(theirs).state_dict().items():
            assert torch.equal(value, state[key])


def test_the_defaults_are_lightlys(lightly):
    for name in ("DINOLoss", "IBOTPatchLoss"):
        ours, theirs = (getattr(module, name) for module in (mine, lightly))
        for method in ("__init__", "forward"):
            assert contract(getattr(ours, method)) == contract(getattr(theirs, method))


def contract(function):
    """Names, order and defaults of the arguments."""
    code, count = function.__code__, function.__code__.co_argcount
    return code.co_varnames[:count], function.__defaults__


def test_ibot_golden():
    """The value of lightly's own test (tests/loss/test_ibot_loss.py): 0.4057."""
    mask = torch.zeros(3, 2, 2).bool()
    mask[0, 0] = mask[1, 0, 0] = True  # 2, 1 and no patches: weights 1/2, 1/2, 1
    loss = mine.IBOTPatchLoss(2, teacher_temp=0.1, student_temp=0.2)
    assert loss(TEACHER, STUDENT, mask).item() == pytest.approx(0.4057, abs=5e-5)
    torch.testing.assert_close(loss.center.value, 0.1 * TEACHER.mean(0, keepdim=True))


def test_a_step_without_masked_patches():
    """0 and a zero gradient; the centre stays, where lightly's becomes NaN."""
    loss = mine.IBOTPatchLoss(2)
    student = torch.zeros(0, 2, requires_grad=True)
    value = loss(torch.zeros(0, 2), student, torch.zeros(3, 2, 2).bool())
    value.backward()
    assert value == 0
    assert student.grad.shape == (0, 2)
    assert torch.equal(loss.center.value, torch.zeros(1, 2))


def test_bad_input_is_a_value_error():
    teacher, student = torch.randn(T, B, K), torch.randn(V, B, K)
    loss = mine.DINOLoss(K)
    with pytest.raises(ValueError, match="leave nothing to pair"):
        loss([teacher[0]], [student[0]])
    with pytest.raises(ValueError, match=r"student_out must list views of one shape"):
        loss(list(teacher), [student[0], student[1, 1:]])
    with pytest.raises(ValueError, match="teacher_out must list views"):
        loss([], list(student))
    with pytest.raises(ValueError, match="3 patch rows need as many weights, got \\[12\\]"):
        mine.IBOTPatchLoss(2)(TEACHER, STUDENT, torch.ones(3, 2, 2).bool())
    for module in (mine.DINOLoss, mine.IBOTPatchLoss):
        with pytest.raises(ValueError, match="center_mode must be 'mean'"):
            module(K, center_mode="median")


def test_a_compiled_step_follows_the_epoch():
    torch.compiler.reset()
    counter = CompileCounter()
    compiled, eager = (mine.DINOLoss(K, 0.04, 0.07, 4) for _ in range(2))
    student, teacher = (list(torch.randn(rows, B, K).unbind()) for rows in (V, T))
    step = torch.compile(
        lambda epoch: compiled(teacher, student, epoch=epoch), backend=counter, fullgraph=True
    )
    for epoch in range(8):
        torch.testing.assert_close(step(epoch), eager(teacher, student, epoch=epoch))
    assert counter.frame_count == 2  # for the first epoch, then for any
