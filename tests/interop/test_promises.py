"""What every drop-in loss promises, whatever it is called with: one table, all classes."""

import copy
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mokd_fast.interop import shared
from mokd_fast.ops import cpu
from tests.interop import oracle
from tests.interop.cases import CASES, MASK, MASKED_ROWS_ONLY, B, K, T, V, center_of, logits


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def seen(case, teacher):
    """The teacher rows that move the centre."""
    return teacher[MASK] if case.name in MASKED_ROWS_ONLY else teacher.flatten(0, 1)


def close(mine, theirs, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    theirs = theirs.to(mine.dtype)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_gradient_and_center_over_six_steps(case, dtype):
    """Also the compositions: DINOv2's sums and DINOv3's means are DINO's mean."""
    loss, center = case.build().to(dtype), torch.zeros(K, dtype=torch.float64)
    for step in range(6):
        student, teacher = logits(step, dtype)
        exact = student.double().requires_grad_()
        student.requires_grad_()
        mine, theirs = case.call(loss, student, teacher), case.formula(exact, teacher, center)
        close(mine, theirs, dtype)
        mine.backward()
        theirs.backward()
        close(student.grad, exact.grad, dtype)
        if case.center:
            center = oracle.moved(center, seen(case, teacher.double()))
            close(center_of(case, loss), center, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_sgd_steps_give_the_parameters_of_the_formula(case, dtype):
    torch.manual_seed(0)
    features = torch.randn(V, B, 5, dtype=torch.float64).to(dtype)
    first = torch.nn.Linear(5, K, dtype=dtype)
    heads, loss = [copy.deepcopy(first) for _ in range(2)], case.build().to(dtype)
    center = torch.zeros(K, dtype=dtype)

    def formula(student, teacher):
        nonlocal center
        total = case.formula(student, teacher, center)
        if case.center:
            center = oracle.moved(center, seen(case, teacher))
        return total

    for head, compute in zip(heads, [lambda s, t: case.call(loss, s, t), formula], strict=True):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
        for step in range(20):
            optimizer.zero_grad()
            compute(head(features), logits(step, dtype)[1]).backward()
            optimizer.step()
    assert (heads[0].weight - first.weight).abs().max() > 0.1
    for mine, theirs in zip(*(head.parameters() for head in heads), strict=True):
        close(mine, theirs, dtype)


def test_the_teacher_gets_no_gradient(case):
    student, teacher = (x.requires_grad_() for x in logits())
    case.call(case.build().double(), student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


MOVING = [case for case in CASES if hasattr(case.build(), "update_center") and case.center]


@pytest.mark.parametrize("way", ["class", "subclass", "instance"])
@pytest.mark.parametrize("case", MOVING, ids=lambda case: case.name)
def test_an_update_center_of_the_users_own_is_what_moves_it(case, way, monkeypatch):
    """Not the mean that comes with the loss: a training with another rule keeps it."""
    loss, calls = case.build().double(), []

    def update_center(*rows):
        calls.append(rows)

    method = lambda self, *rows: update_center(*rows)  # noqa: E731
    if way == "instance":
        loss.update_center = update_center
    elif way == "class":
        monkeypatch.setattr(type(loss), "update_center", method)
    else:
        loss.__class__ = type("Own", (type(loss),), {"update_center": method})
    case.call(loss, *logits())
    assert len(calls) == 1
    assert torch.equal(center_of(case, loss), torch.zeros(K, dtype=torch.float64))


ONE_READ = [case for case in CASES if case.name in ("dino", "solo", "lightly")]


@pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
@pytest.mark.parametrize("case", ONE_READ, ids=lambda case: case.name)
def test_on_a_cpu_the_center_needs_no_read_of_its_own(case, monkeypatch):
    def refuse(*args):
        raise AssertionError("the teacher is read once more")

    monkeypatch.setattr(shared, "column_mean", refuse)
    monkeypatch.setattr(cpu, "column_mean", refuse)
    loss = case.build()
    case.call(loss, *logits(dtype=torch.float32))
    assert center_of(case, loss).abs().max() > 0


@pytest.mark.parametrize("case", ONE_READ, ids=lambda case: case.name)
def test_a_center_momentum_that_changes(case):
    """As a number in a compiled step too, with one compilation more; or one a prototype."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss, eager = case.build(), case.build()
    step = torch.compile(lambda *args: case.call(loss, *args), backend=counter, fullgraph=True)
    for i in range(10):
        loss.center_momentum = eager.center_momentum = 0.9 + i / 200
        batch = logits(i, torch.float32)
        assert torch.equal(step(*batch), case.call(eager, *batch))
    assert counter.frame_count <= 2
    loss.center_momentum = eager.center_momentum = torch.linspace(0, 1, K)  # one a prototype
    for i in range(2):
        batch = logits(i, torch.float32)
        assert torch.equal(step(*batch), case.call(eager, *batch))


def test_lightlys_center_stays_the_same_buffer():
    case = next(case for case in CASES if case.name == "lightly")
    loss = case.build()
    center = loss.center
    case.call(loss, *logits(dtype=torch.float32))
    assert loss.center is center and center.abs().max() > 0


@pytest.mark.parametrize("case", ONE_READ, ids=lambda case: case.name)
def test_the_mean_is_in_the_teachers_arithmetic(case):
    student, teacher = logits(dtype=torch.float32)[0], logits()[1]
    assert teacher.dtype == torch.float64
    loss = case.build()
    case.call(loss, student, teacher)
    exact = oracle.moved(torch.zeros(K, dtype=torch.float64), seen(case, teacher))
    torch.testing.assert_close(center_of(case, loss).double(), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", MOVING, ids=lambda case: case.name)
def test_a_wider_center_stays_wide(case):
    loss = case.build().double()
    teacher = logits(dtype=torch.float32)[1]
    case.call(loss, *logits(dtype=torch.float32))
    center = center_of(case, loss)
    assert center.dtype == torch.float64
    exact = oracle.moved(torch.zeros(K, dtype=torch.float64), seen(case, teacher.double()))
    close(center, exact, torch.float32)


def test_fp32_under_autocast(case):
    student, teacher = logits(dtype=torch.bfloat16)
    exact = case.formula(student.double(), teacher.double(), torch.zeros(K))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = case.build()
            mine = case.call(loss, student, teacher)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=0)
        assert all(x.dtype == torch.float32 for x in loss.state_dict().values())


def test_the_state_dict_is_the_peers(case):
    assert {key: tuple(x.shape) for key, x in case.build().state_dict().items()} == case.state
    peers = {key: torch.randn(shape) for key, shape in case.state.items()}
    loss = case.build()
    loss.load_state_dict(peers)
    student, teacher = logits(dtype=torch.float32)
    center = peers[case.center].flatten() if case.center else torch.zeros(K)
    close(case.call(loss, student, teacher), case.formula(student, teacher, center), torch.float32)


def _loaded(case, loss):
    fresh = case.build().double()
    fresh.load_state_dict(loss.state_dict())
    return fresh


def _pickled(case, loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "twin",
    [_loaded, _pickled, lambda case, loss: copy.deepcopy(loss)],
    ids=["load", "pickle", "copy"],
)
def test_the_state_survives(case, twin):
    """A pending centre update too: the twin goes on with the same bits as the uninterrupted run."""
    loss, uninterrupted = case.build().double(), case.build().double()
    for step in range(3):
        case.call(loss, *logits(step))
        case.call(uninterrupted, *logits(step))
    second = twin(case, loss)
    for step in range(3, 6):
        student, teacher = logits(step)
        expected = case.call(uninterrupted, student, teacher)
        assert torch.equal(case.call(second, student, teacher), expected)
        assert torch.equal(case.call(loss, student, teacher), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_center_moves_in_eval_mode_and_without_gradients(case, mode):
    loss = case.build().double().eval()
    with mode():
        student, teacher = logits()
        case.call(loss, student, teacher)
    student, teacher = logits(1)
    student.requires_grad_()
    center = torch.zeros(K, dtype=torch.float64)
    if case.center:
        center = oracle.moved(center, seen(case, logits()[1]))
    mine = case.call(loss, student, teacher)  # its centre was made without gradients
    mine.backward()
    close(mine, case.formula(student, teacher, center), torch.float64)


# lightly's selects the masked patches inside: as many as the values say, which a graph cannot hold.
IN_A_GRAPH = [case for case in CASES if case.name != "lightly patch"]


@pytest.mark.parametrize("case", IN_A_GRAPH, ids=lambda case: case.name)
def test_one_graph_without_breaks(case):
    torch.compiler.reset()  # the cases share one code object and its limit of recompilations
    loss, eager = case.build(), case.build()
    step = torch.compile(lambda *args: case.call(loss, *args), backend="aot_eager", fullgraph=True)
    for batch in range(2):
        student, teacher = logits(batch, torch.float32)
        assert torch.equal(step(student, teacher), case.call(eager, student, teacher))


# Of the patch losses the mask is empty, not the batch: see their own files.
NOT_PATCHES = [case for case in CASES if "patch" not in case.name]


@pytest.mark.parametrize("case", NOT_PATCHES, ids=lambda case: case.name)
def test_no_images_give_zero_a_zero_gradient_and_leave_the_center_alone(case):
    loss = case.build()
    case.call(loss, *logits(dtype=torch.float32))
    before = center_of(case, loss).clone()
    student = torch.zeros(V, 0, K, requires_grad=True)
    teacher = torch.zeros(T, 0, K)
    if case.name == "ibot cls":  # its patches are not those of the images here
        teacher_patch = student_patch = torch.zeros(T, 1, K)
        mask = [torch.ones(1, 1, 1).bool()] * T
        output = (student[:2].flatten(0, 1), student_patch), (teacher.flatten(0, 1), teacher_patch)
        mine = loss(*output, student[2:].flatten(0, 1), mask, 0)["cls"]
    else:
        mine = case.call(loss, student, teacher)
    mine.backward()
    assert mine == 0
    assert student.grad.shape == student.shape
    assert torch.equal(center_of(case, loss), before)
