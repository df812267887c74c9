"""Clip, optimizer step and EMA at once, against the three one after the other and in fp64."""

import contextlib
import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mokd_fast.ops import Clip, Ema, cpu, explain, grad_norms, update_
from tests.ops.test_foreach import NoHostRead, Subclass

MAX, MOMENTUM = 2.0, 0.9
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}
ADAMW = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, SGD),
    "plain sgd": (torch.optim.SGD, {**SGD, "momentum": 0.0}),
    "adamw": (torch.optim.AdamW, ADAMW),
}
SHAPES = [(1,), (15,), (16,), (33,), (3, 5), (1000,), (16383,), (16384,), (16401,), (40, 1025)]

native = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)


class Twin:
    """A model of such parameters, its teacher and its optimizer, from one seed."""

    def __init__(self, name, dtype=torch.float32):
        kind, options = OPTIMIZERS[name]
        generator = torch.Generator().manual_seed(0)

        def drawn():
            made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
            conv = torch.randn(8, 4, 3, 3, generator=generator).to(dtype)
            one = torch.randn(8, 4, 1, 1, generator=generator).to(dtype)
            last = torch.randn(7, generator=generator).to(dtype)
            made += [conv.to(memory_format=torch.channels_last), one, last]
            return [nn.Parameter(t) for t in made]

        self.student, self.teacher = drawn(), drawn()
        half = len(SHAPES) // 2
        groups = [{"params": self.student[:half]}, {"params": self.student[half:-1], "lr": 0.05}]
        self.optimizer = kind(groups, **options, fused=True)  # without the last
        if options.get("momentum"):
            for p in self.student[:-1]:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def step(self, k, skip=None):
        generator = torch.Generator().manual_seed(k + 1)
        for p in self.student[:-1]:
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = grad.to(memory_format=torch.channels_last) if p.ndim == 4 else grad
        if k == 2:
            self.student[1].grad = None  # as of a layer that is frozen
        norms = {p: p.grad.norm() for p in self.student if p.grad is not None}
        clip = Clip(norms, MAX)
        momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
        update_(self.optimizer, clip, Ema(self.teacher, self.student, momentum), skip)

    def tensors(self):
        states = [self.optimizer.state[p].values() for p in self.student[:-1]]
        return [t.detach() for t in (*self.student, *self.teacher, *(v for s in states for v in s))]


@pytest.fixture
def calls(monkeypatch):
    """Of the kernel."""
    found, run = [], cpu.update
    monkeypatch.setattr(cpu, "update", lambda *a: found.append(len(a[0])) or run(*a))
    return found


@native
@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_errs_no_more_than_the_three(name, level, monkeypatch, calls):
    try:
        cpu.native.cpu_level(level)
    except ValueError:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
    runs = {}
    for backend in ("cpu", "reference", ""):
        monkeypatch.setenv("MOKD_FAST_BACKEND", backend)
        twin = Twin(name, torch.float32 if backend else torch.float64)
        for k in range(5):
            twin.step(k)
        runs[backend] = twin.tensors()
    # AdamW's state is made by its own first step.
    assert calls == [len(SHAPES) + 3] * (4 if name == "adamw" else 5)
    for mine, theirs, exact in zip(runs["cpu"], runs["reference"], runs[""], strict=True):
        error, allowed = ((t.double() - exact).abs().max() for t in (mine, theirs))
        assert error <= 1.5 * allowed + 2e-7 * exact.abs().max()
    # Of whole registers the bits, where PyTorch has the same ones.
    if level == {"AVX512": "v4", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability()):
        for mine, theirs in zip(runs["cpu"], runs["reference"], strict=True):
            assert mine.numel() % 16 or torch.equal(mine, theirs)


@native
def test_its_bits_do_not_depend_on_threads(calls):
    twins = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        twins.append(Twin("adamw"))
        for k in range(3):
            twins[-1].step(k)
        torch.set_num_threads(1)
    assert len(calls) == 6
    for other in twins[1:]:
        assert all(map(torch.equal, twins[0].tensors(), other.tensors()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=native), "reference"])
def test_a_skipped_step_moves_the_teachers_alone(name, backend, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", backend)
    twin = Twin(name)
    twin.step(0, torch.tensor(False))
    before = copy.deepcopy(twin.tensors())
    twin.step(1, torch.tensor(True))
    n = len(twin.student)
    for i, (old, new) in enumerate(zip(before, twin.tensors(), strict=True)):
        followed = n <= i < 2 * n
        assert torch.equal(old, new) != followed
        if followed:
            want = old + (1 - MOMENTUM) * (twin.student[i - n].detach() - old)
            torch.testing.assert_close(new, want)
    twin.step(2, torch.tensor(False))
    assert not any(map(torch.equal, before[2:n], twin.tensors()[2 : n - 1]))


@native
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_it_leaves_alone_and_what_it_bumps(name, calls):
    """Gradients keep their bits; everything that moved has another version."""
    twin = Twin(name)
    twin.step(0)
    calls.clear()
    buffers = [t for state in twin.optimizer.state.values() for t in state.values()]
    moved = [*twin.student[:-1], *twin.teacher, *buffers]
    versions = [t._version for t in moved]
    with NoHostRead():
        twin.step(1)
    assert len(calls) == 1
    assert all(t._version > v for t, v in zip(moved, versions, strict=True))
    assert twin.student[-1]._version == 0
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(twin.student[0].grad, torch.randn(SHAPES[0], generator=generator))


@native
def test_without_clip_or_ema_it_is_the_step(calls):
    mine, theirs = twins = Twin("adamw"), Twin("adamw")
    for twin in twins:
        twin.step(0)
        for k in range(3):
            for p in twin.student[:-1]:
                p.grad = torch.full_like(p, k - 1.5)
            update_(twin.optimizer) if twin is mine else twin.optimizer.step()
    assert len(calls) == 3
    for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=3e-7)


def other(**options):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return torch.optim.AdamW([p], **{"fused": True, **options})


def hooked():
    optimizer = other()
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def before():
    optimizer = other()
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def wrapped():
    optimizer = other()
    optimizer.step = lambda: None
    return optimizer


@native
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.optim.Adam([nn.Parameter(torch.ones(2))], fused=True), "not of Adam"),
        (lambda: other(fused=False), "fused=True"),
        (lambda: other(amsgrad=True), "no amsgrad"),
        (lambda: other(maximize=True), "no maximize"),
        (lambda: other(differentiable=True, fused=False), "fused=True"),
        (lambda: one(momentum=0.9, nesterov=True)[1], "no nesterov"),
        (lambda: one(momentum=0.9, dampening=0.5)[1], "no dampening"),
        (lambda: other(weight_decay=torch.tensor(0.1)), "one is a tensor"),
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(2).bfloat16())], fused=True), "bfloat16"),
        (before, "hooks"),
        (lambda: other(lr=torch.tensor(0.1)), "one is a tensor"),
        (hooked, "hooks"),
        (wrapped, "hooks"),
    ],
)
def test_what_it_does_not_take_and_says_so(make, reason):
    assert reason in explain("update_", make())
    assert explain("update_", other()).startswith("cpu: chosen")


def one(lr=0.1, n=8, **options):
    p = nn.Parameter(torch.ones(n))
    p.grad = torch.ones(n)
    return p, torch.optim.SGD([p], lr=lr, fused=True, **options)


@native
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: torch.randn(20, 6)[:, :3],
        lambda t: Subclass(t),
        lambda t: t.bfloat16(),
    ],
)
def test_odd_tensors_take_the_three(change, calls):
    p = nn.Parameter(change(torch.randn(20, 3)))
    mine, theirs = p, nn.Parameter(p.detach().clone())
    for parameter in (mine, theirs):
        optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
        for _ in range(2):
            parameter.grad = torch.ones_like(parameter)
            update_(optimizer) if parameter is mine else optimizer.step()
    assert not calls
    if p.is_contiguous():  # with a gap PyTorch's fused SGD (2.14) is wrong
        assert torch.equal(mine, theirs)


@native
@pytest.mark.parametrize("what", ["grad", "momentum_buffer", "teacher"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: torch._neg_view(-t),
    ],
)
def test_one_odd_tensor_is_enough(what, change, calls):
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    beside = {"grad": torch.randn(4, 6), "momentum_buffer": torch.randn(4, 6)}
    beside["teacher"] = torch.randn(4, 6)
    beside[what] = change(beside[what])
    p.grad = beside["grad"]
    optimizer.state[p]["momentum_buffer"] = beside["momentum_buffer"]
    with contextlib.suppress(RuntimeError):  # PyTorch's own refusal
        update_(optimizer, ema=Ema([beside["teacher"]], [p], 0.5))
    assert not calls


@native
def test_gaps_are_not_read(calls):
    """Not even where all tensors have the same."""
    p = nn.Parameter(torch.zeros(4, 6)[:, :3])
    p.grad = torch.ones(4, 6)[:, :3]
    assert p.stride() == p.grad.stride() == (6, 1)
    update_(torch.optim.SGD([p], lr=1.0, fused=True))
    assert not calls


@native
def test_another_shape_or_dtype_of_a_teacher_or_norm_is_not_read(calls):
    p, optimizer = one()
    for teacher in (torch.zeros(1), torch.zeros(8, dtype=torch.float64)):
        with contextlib.suppress(RuntimeError):
            update_(optimizer, ema=Ema([teacher], [p], 0.5))
    update_(optimizer, Clip({p: torch.tensor(1.0, dtype=torch.float64)}, 0.5))
    update_(optimizer, Clip({p: torch.ones(8)}, 9.0))
    assert not calls


@native
def test_nothing_beyond_a_tensor_is_written():
    flat = torch.full((5 * 64,), 7.0)
    places = [slice(64 * i + 1, 64 * i + 1 + n) for i, n in enumerate((1, 15, 17, 33, 62))]
    params = [nn.Parameter(flat[place]) for place in places]
    teachers = flat.clone()
    optimizer = torch.optim.SGD(params, lr=0.5, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    update_(optimizer, ema=Ema([teachers[place] for place in places], params, 0.5))
    for place in places:
        assert (flat[place] == 6.5).all() and (teachers[place] == 6.75).all()
        flat[place], teachers[place] = 7, 7
    assert (flat == 7).all() and (teachers == 7).all()


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_student_by_another_name_is_followed_after_its_step(threads):
    model, teacher = nn.Linear(1024, 512), nn.Linear(1024, 512)
    teacher.load_state_dict(model.state_dict())
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.set_num_threads(threads)
    students = list(model.state_dict().values())
    update_(optimizer, ema=Ema(list(teacher.state_dict().values()), students, 0.5))
    torch.set_num_threads(1)
    torch.testing.assert_close(teacher.weight.detach(), before - 0.5)


@native
def test_a_student_with_two_teachers():
    p, optimizer = one()
    teachers = [torch.zeros(8), torch.zeros(8)]
    update_(optimizer, ema=Ema(teachers, [p, p], 0.5))
    assert torch.equal(*teachers) and teachers[0][0] == 0.45


@native
def test_far_teachers_and_infinite_weights(calls):
    """The roundings of PyTorch's lerp: momentum 0 copies. And no decay is none."""
    p, optimizer = one(lr=0.0)
    with torch.no_grad():
        p[1] = math.inf
    teacher = torch.full((8,), 1e8)
    update_(optimizer, ema=Ema([teacher], [p], 0.0))
    assert p[1] == math.inf and torch.equal(teacher[2:], p[2:].detach())
    assert calls == [1]


@native
@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
def test_norms_that_are_not_finite(max_norm, calls):
    """Without a maximum the rest of a gradient counts; with one the tensor shows what it had."""
    p, optimizer = one()
    p.grad[0] = math.nan
    update_(optimizer, Clip(grad_norms([p]), max_norm))
    assert calls == [1] and p[0].isnan()
    assert p[1:].isfinite().all() == (max_norm == math.inf)


@native
def test_no_crash():
    """Flags and memory that are not there: refused, or passed over."""
    code = """
import torch
from torch import nn
from mokd_fast.ops import Ema, update_

def attempt(change):
    p = nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    o, t, momentum = torch.optim.SGD([p], lr=0.1, fused=True), torch.zeros(8), change(p)
    try:
        update_(o, ema=Ema([t], [p], momentum))
    except (RuntimeError, NotImplementedError) as error:
        print(error)

attempt(lambda p: torch.set_default_device("meta") or 0.9)
torch.set_default_device("cpu")
attempt(lambda p: torch.ones((), device="meta"))
attempt(lambda p: (p.untyped_storage().resize_(0), 0.9)[1])
print("all three")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "all three" in found.stdout, found.stderr


def test_empty_groups_and_tensors(calls):
    update_(torch.optim.SGD([{"params": []}], lr=0.1, fused=True))
    empty = nn.Parameter(torch.empty(0))
    optimizer = torch.optim.AdamW([empty], fused=True)
    for _ in range(3):
        empty.grad = torch.empty(0)
        update_(optimizer)
    assert optimizer.state[empty]["step"] == 3
    assert calls == [1, 1] * (cpu.native is not None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, o: update_(o, skip=torch.tensor(1.0)), "skip must be a 0-d bool"),
        (lambda p, o: update_(o, skip=torch.tensor([True])), "skip must be a 0-d bool"),
        (lambda p, o: update_(o, Clip({}, None)), "max_norm must be a number above 0"),
        (lambda p, o: update_(o, Clip({}, 0.0)), "max_norm must be a number above 0"),
        (lambda p, o: update_(o, ema=Ema([], [p], 0.5)), "a teacher a student, got 0 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*one())


@native
def test_norms_that_are_there_clip_by_the_kernel(monkeypatch):
    """Of optimizers that have no pass of their own: gradients that are short enough stay unread."""
    seen, clip = [], cpu.clip
    monkeypatch.setattr(cpu, "clip", lambda *a: seen.append(a[2] is not None) or clip(*a))
    params = [nn.Parameter(torch.zeros(n)) for n in (5, 40000)]
    for p in params:
        p.grad = torch.ones_like(p)
    norms = grad_norms(params)
    Clip({**norms, params[0]: torch.tensor(2.0)}, 1.0).apply()
    assert seen == [False, True]
    torch.testing.assert_close(params[0].grad, torch.full((5,), 0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(params[1].grad, torch.full((40000,), 0.005), rtol=1e-5, atol=0)


@native
def test_it_is_a_step_for_a_schedule(calls):
    """PyTorch warns of a scheduler whose optimizer has made no step."""
    optimizer = other(lr=1.0)
    optimizer.step()
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_(optimizer)
        schedule.step()
    assert calls == [1] and optimizer.param_groups[0]["lr"] == 0.5


def test_a_flag_is_for_those_that_obey_one():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="fused=True, SGD here is none"):
        update_(torch.optim.SGD([p], lr=1.0), skip=torch.tensor(True))


def test_a_hook_of_all_optimizers_is_called():
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    update_(one()[1])
    handle.remove()
    assert seen == [1]


def test_no_flag_is_left_for_a_step_of_the_users():
    p = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([p], fused=True)
    p.grad = torch.ones(8)
    update_(optimizer, skip=torch.tensor(True))
    optimizer.step()
    assert not torch.equal(p, torch.ones(8))


def test_no_flag_is_left_from_the_step_before(monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "reference")
    twin = Twin("sgd")
    twin.step(0, torch.tensor(True))
    before = twin.student[0].detach().clone()
    twin.step(1)
    assert not torch.equal(before, twin.student[0])


def test_norms_are_those_of_the_clip():
    params = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)]
    params[0].grad, params[2].grad = torch.ones(3), torch.full((5,), math.nan)
    norms = grad_norms(params)
    assert list(norms) == [params[0], params[2]]
    torch.testing.assert_close(norms[params[0]], torch.tensor(math.sqrt(3)))
    assert norms[params[2]].isnan() and params[0].grad.tolist() == [1, 1, 1]
    assert grad_norms(params[1:2]) == {}
    known = {p: torch.tensor(7.0) for p in params[:2]}  # the second has no gradient
    found = grad_norms(params, known)
    assert list(found) == [params[0], params[2]]
    assert found[params[0]] is known[params[0]] and found[params[2]].isnan()
    Clip(norms, 1.0).apply()
    torch.testing.assert_close(params[0].grad, torch.ones(3) / math.sqrt(3), rtol=1e-5, atol=0)
    Clip({}, 1.0).apply()
