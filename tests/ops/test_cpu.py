"""The CPU kernel of distill_cross_entropy: registration, levels, threads, forks, odd sizes."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from mokd_fast.ops import Target, cpu, cross_view_pairs, distill, distill_cross_entropy

from .conftest import levels

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")


def case(v=4, t=2, b=3, k=97, dtype=torch.float32):
    g = torch.Generator().manual_seed(k)
    student = (torch.randn(v, b, k, generator=g) * 4).to(dtype).requires_grad_()
    teacher = (torch.randn(t, b, k, generator=g) * 2).to(dtype)
    center = torch.randn(k, generator=g)
    return student, Target(cross_view_pairs(t, v), teacher, temperature=0.05, center=center)


def run(student, target, backend="cpu"):
    loss, _ = distill_cross_entropy(student, [target], backend=backend)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def test_levels(monkeypatch):
    """What MOKD_FAST_CPU_LEVEL asks for runs, forward and backward, or is refused by name."""
    assert {"baseline", cpu.native.cpu_level()} <= set(levels())
    for name in levels():
        assert cpu.native.cpu_level(name) == name
    student, target = case()
    loss, _ = distill_cross_entropy(student, [target], backend="cpu")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", "v9")
    message = "MOKD_FAST_CPU_LEVEL must be baseline, v3, v4 or empty, got 'v9'"
    for call in (lambda: run(student, target), loss.backward, lambda: cpu.column_mean(student)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="this processor cannot run the CPU kernels of level v9"):
        cpu.native.cpu_level("v9")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", "")
    assert run(student, target)[0] == loss


def test_opcheck():
    student, target = case(k=33)
    empty = torch.empty(0)
    pairs = [w for row in target.pairs for w in row]
    arguments = (
        student, [target.logits], [target.center], [empty], torch.tensor([0.1, 0.05, 1.0]),
        pairs, [False], "cpu",
    )  # fmt: skip
    torch.library.opcheck(distill._forward, arguments)
    _, _, stats, _ = distill._forward(*arguments)
    torch.library.opcheck(
        distill._backward, (torch.ones(()), stats, student.detach(), *arguments[1:])
    )


def test_compiles_whole_and_once_for_changing_temperatures():
    student, target = case()

    def loss(student, tau):
        moved = Target(target.pairs, target.logits, temperature=tau, center=target.center)
        return distill_cross_entropy(student, [moved], temperature=tau * 2, backend="cpu")[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for tau in (0.04, 0.05, 0.07):
        tau = torch.tensor(tau)
        torch.testing.assert_close(compiled(student, tau), loss(student, tau))
    compiled(student, torch.tensor(0.04)).backward()
    assert student.grad is not None and counter.frame_count == 1


def test_bits_do_not_depend_on_the_thread_count():
    student, target = case(b=3, k=20000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(student, target))
    torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def both_operators(k):
    """Loss and gradient without autograd, which torch refuses in some forked children."""
    student, target = case(k=k)
    pairs = [w for row in target.pairs for w in row]
    rest = [target.logits], [target.center], [torch.empty(0)], torch.tensor([0.1, 0.05, 1.0])
    arguments = (student.detach(), *rest, pairs, [False], "cpu")
    loss, _, stats, _ = distill._forward(*arguments)
    return loss, distill._backward(torch.ones(()), stats, *arguments)


class InWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return both_operators(5000)


def test_inside_a_forked_worker():
    torch.set_num_threads(2)
    expected = both_operators(5000)  # starts the thread pool in the parent
    torch.set_num_threads(1)
    for found in DataLoader(InWorker(), num_workers=1, batch_size=None, timeout=30):
        for value, right in zip(found, expected, strict=True):
            assert torch.equal(value, right)


def test_strides_beyond_32_bits(tmp_path):
    """Images and columns 2^31 elements apart, in a file that is nearly all hole."""
    step = 2**31 + 8
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step + 600).detach()
    student, target = case(v=2, b=2, k=260)
    far = file.as_strided((2, 2, 260), (260, step, 1)).copy_(student.detach())
    assert torch.equal(run(far.requires_grad_(), target)[1], run(student, target)[1])
    narrow, target = case(v=2, b=1, k=2)
    far = file.as_strided((2, 1, 2), (1, 1, step)).copy_(narrow.detach())
    assert torch.equal(run(far.requires_grad_(), target)[1], run(narrow, target)[1])


@pytest.mark.slow
@pytest.mark.parametrize("k", [65568, 65537])  # gradients straight to their place, or not
def test_more_than_32_bits_of_logits_and_gradients(k):
    """4.3 GB of bf16 logits, and as many of gradients: one image many times, then another."""
    images = 2**14  # so that dividing by it rounds nothing
    student, target = case(v=2, t=1, b=2, k=k, dtype=torch.bfloat16)
    first, last = (image.clone() for image in student.detach().split(1, dim=1))
    many = first.repeat(1, images, 1)
    many[:, -1:] = last
    assert many.numel() > 2**31

    def run(student):
        rows = target.logits[:, :1].expand(1, student.shape[1], k)
        target_of_all = Target(target.pairs, rows, temperature=0.05, center=target.center)
        loss, _ = distill_cross_entropy(student.requires_grad_(), [target_of_all], backend="cpu")
        scale = torch.tensor(float(student.shape[1]))  # what an image gets does not depend on B
        return loss.detach().double(), torch.autograd.grad(loss, student, scale)[0]

    (loss, gradient), of_first, of_last = run(many), run(first), run(last)
    expected = ((images - 1) * of_first[0] + of_last[0]) / images
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(gradient[:, -1:], of_last[1])
    for image in gradient[:, :-1].split(512, dim=1):
        assert (image == of_first[1]).all()


def test_reasons(monkeypatch):
    student, target = case()
    assert "on meta" in cpu.why_not(student.to("meta"))
    assert "int64" in cpu.why_not(torch.zeros(3, dtype=torch.int64))
    monkeypatch.setattr(cpu, "native", None)
    with pytest.raises(RuntimeError, match="native module was not built"):
        run(student, target)
    monkeypatch.setitem(os.environ, "MOKD_FAST_BACKEND", "")
    assert distill_cross_entropy(student, [target])[0].isfinite()  # falls through


def test_without_memory_it_is_an_error():
    code = """
import resource, torch
from mokd_fast.ops import Target, distill_cross_entropy
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
rows = torch.zeros(1, 1, 2).expand(18, 3000000, 2)
target = Target(((1.0,) * 18,) * 18, rows)
try:
    distill_cross_entropy(rows, [target], backend="cpu")
except MemoryError as error:
    print("MemoryError")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "MemoryError\n"), done.stderr


def test_a_module_that_cannot_be_loaded_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mokd_fast._C", None)
    monkeypatch.delattr("mokd_fast._C")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object())
    native, reason = cpu._load()
    assert native is None and "is built but cannot be loaded: " in reason
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    assert cpu._load() == (None, cpu.NOT_BUILT)


def test_the_flat_operator_refuses_what_would_crash():
    rows, empty, scalars = torch.zeros(2, 2, 40), torch.empty(0), torch.tensor([0.1, 0.05, 1.0])
    for student, pairs in ((torch.zeros(0, 2, 40), []), (torch.zeros(3, 2, 40), [1.0])):
        with pytest.raises(ValueError, match="Distill: at least a student row"):
            distill._forward(student, [rows], [empty], [empty], scalars, pairs, [False], "cpu")
    arguments = torch.zeros(3, 2, 40), [rows], [empty], [empty], scalars[:2], [1.0] * 6, [False]
    with pytest.raises(ValueError, match=r"scalars must be \[3\], got \[2\]"):
        distill._forward(*arguments, "cpu")
    lists = [[rows], [empty], [empty], [False]]
    for i in range(4):
        one, two, three, four = (x * (1 + (i == j)) for j, x in enumerate(lists))
        wrong = one, two, three, torch.tensor([0.1, *[0.05, 1.0] * len(one)]), [1.0] * 12, four
        with pytest.raises(ValueError, match="must have an entry a target"):
            distill._forward(torch.zeros(3, 2, 40), *wrong, "cpu")
