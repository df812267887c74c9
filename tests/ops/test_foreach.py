"""EMA and the per-tensor clip against the official loops."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.baseline.official import clip_per_tensor_, ema_
from mokd_fast.ops import clip_grad_per_tensor_, cpu, ema_update_, foreach
from mokd_fast.ops.foreach import Snapshot


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double() for _ in "st"
    )
    return student, teacher


def test_ema_is_the_official_one_and_leaves_buffers():
    student, teacher = nets()
    twin, buffer = copy.deepcopy(teacher), teacher[1].running_mean.clone()
    student[1].running_mean.fill_(3)
    ema_update_(list(teacher.parameters()), list(student.parameters()), 0.9)
    ema_(twin, student, 0.9)
    for mine, theirs in zip(teacher.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-15, atol=1e-16)
    assert torch.equal(teacher[1].running_mean, buffer)


@pytest.mark.parametrize("momentum", [0.0, 0.996, 1.0])
def test_ema_in_fp32(momentum):
    student, teacher = (net.float() for net in nets())
    twin = copy.deepcopy(teacher)
    ema_update_(tuple(teacher.parameters()), tuple(student.parameters()), momentum)
    ema_(twin, student, momentum)
    for mine, theirs in zip(teacher.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-7, atol=1e-8)
    ema_update_([], [], momentum)


def test_clip_is_the_official_one():
    student, _ = nets()
    student(torch.randn(9, 5, dtype=torch.float64)).pow(2).sum().mul(10).backward()
    student[0].bias.grad = None
    twin = copy.deepcopy(student)
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    sizes = sorted(p.grad.norm().item() for p in student.parameters() if p.grad is not None)
    limit = (sizes[1] + sizes[2]) / 2  # so that some tensors are clipped and some are not
    norms = clip_grad_per_tensor_(student.parameters(), limit)
    assert [norm.item() for norm in norms] == clip_per_tensor_(twin, limit)
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)
    assert clip_grad_per_tensor_([], 1.0) == []
    assert clip_grad_per_tensor_([nn.Parameter(torch.ones(3))], 1.0) == []  # no gradient yet


def test_clip_of_odd_gradients():
    """A zero gradient stays, a layout survives, a bad value is not hidden."""
    params = [nn.Parameter(torch.ones(2, 3, 4, 4)) for _ in range(3)]
    params[0].grad = torch.zeros(2, 3, 4, 4)
    params[1].grad = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    params[2].grad = torch.full((2, 3, 4, 4), torch.nan)
    norms = clip_grad_per_tensor_(iter(params), 2.0)
    assert norms[0] == 0 and norms[2].isnan()
    assert (params[0].grad == 0).all() and params[2].grad.isnan().all()
    assert params[1].grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(params[1].grad.norm(), torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_are_scaled_at_once_as_a_gpu_has_it(dtype):
    """The bits of one after the other; of every layout and size, NaN among them."""
    torch.manual_seed(0)
    shapes = [(5,), (), (1,), (0,), (3, 4), (7,), (2, 3, 4, 4)]
    grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grads += [torch.randn(8, dtype=dtype)[::2], torch.randn(6, dtype=torch.float64)]
    grads[6] = grads[6].to(memory_format=torch.channels_last)
    grads[5][2] = torch.nan
    scales = list(torch.rand(len(grads)).to(dtype).unbind())
    want = [grad.clone().mul_(scale) for grad, scale in zip(grads, scales, strict=True)]
    with Calls() as calls:
        foreach._scale_in_few_launches(grads, scales)
    assert calls.found == [3, 6]  # tensors of each product
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


class Calls(TorchDispatchMode):
    """How many tensors each foreach operator takes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_foreach_" in str(func):
            self.found.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize("max_norm", [0.5, 30.0, math.inf])
def test_clip_of_the_native_kernel(level, max_norm, monkeypatch):
    """Against fp64: many sizes around its blocks, a gap in memory, the same bits on all threads."""
    try:
        cpu.native.cpu_level(level)
    except ValueError:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", level)
    torch.manual_seed(0)
    sizes = [0, 1, 15, 16, 63, 1000, 1024, 1025, 16383, 16384, 16385, 50001]
    grads = [0.1 * torch.randn(n) for n in sizes] + [torch.tensor(7.0)]
    calls, native = [], cpu.clip
    monkeypatch.setattr(cpu, "clip", lambda *a: calls.append(1) or native(*a))

    def clipped(grads, threads):
        params = [nn.Parameter(torch.empty_like(g)) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        versions = [p.grad._version for p in params]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        norms = clip_grad_per_tensor_(params, max_norm)
        torch.set_num_threads(before)
        moved = [p.grad._version > v for p, v in zip(params, versions, strict=True)]
        assert moved == [max_norm < math.inf] * len(grads)  # else they are norms alone
        return [p.grad for p in params], norms

    found, norms = clipped(grads, 1)
    for got, norm, grad in zip(found, norms, grads, strict=True):
        exact = grad.double().norm()
        assert abs(norm.double() - exact) <= 3e-7 * exact
        scale = min(1.0, max_norm / (exact.item() + 1e-6))
        torch.testing.assert_close(got.double(), grad.double() * scale, rtol=5e-7, atol=1e-30)
        assert scale < 1 or torch.equal(got, grad)
    again, _ = clipped(grads, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert len(calls) == 2
    gap = torch.randn(40, 10)[:, :5]
    for odd in ([gap], [gap.contiguous().double()], [grads[5], grads[5]], [Subclass(grads[5])]):
        params = [nn.Parameter(torch.empty(0)) for _ in odd]
        want = [g.norm() for g in odd]
        for p, g in zip(params, odd, strict=True):
            p.data, p.grad = g, g
        torch.testing.assert_close(clip_grad_per_tensor_(params, max_norm), want)
    assert len(calls) == 2, "plain fp32 without gaps alone"


class Subclass(torch.Tensor):
    """As a DTensor is one, whose memory is not here."""


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the host reads a value"
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host():
    student, teacher = nets()
    student(torch.randn(9, 5, dtype=torch.float64)).sum().backward()
    with NoHostRead():
        clip_grad_per_tensor_(student.parameters(), 0.1)
        ema_update_(list(teacher.parameters()), list(student.parameters()), 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ema_with_a_momentum_on_the_device(dtype):
    student, teacher = (net.to(dtype) for net in nets())
    twin = copy.deepcopy(teacher)
    momentum = torch.tensor(0.996, dtype=torch.float64)
    ema_update_(list(teacher.parameters()), list(student.parameters()), momentum)
    ema_(twin, student, 0.996)
    tolerance = 1e-15 if dtype == torch.float64 else 2e-7
    for mine, theirs in zip(teacher.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 20)
    before = copy.deepcopy(teacher)
    ema_update_(list(teacher.parameters()), list(student.parameters()), torch.ones_like(momentum))
    for mine, theirs in zip(teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_snapshot():
    """Back to the old bits where the flag says so, whatever is there now."""
    tensors = [torch.randn(3), torch.tensor(7), torch.randn(2, 2), torch.tensor(1.5).double()]
    large = torch.randn(700, 400)
    tensors += [large, large.new_ones(9, 8, 64, 64).to(memory_format=torch.channels_last)]
    tensors += [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), large.T.clone().T]
    old = [tensor.clone() for tensor in tensors]
    snapshot = Snapshot(tensors)
    for flag in (True, False):
        snapshot.take()
        tensors[0].fill_(torch.nan), tensors[1].add_(1), tensors[2].mul_(2)
        for tensor in tensors[4:]:
            tensor[1, ::2] = torch.nan
        now = [tensor.clone() for tensor in tensors]
        with NoHostRead():
            snapshot.restore_(torch.tensor(flag))
        for tensor, expected in zip(tensors, old if flag else now, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
