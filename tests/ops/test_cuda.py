"""The CUDA kernels of distill_cross_entropy: emulated on the host (on a GPU where there is one),
their machine code, the plan, the reasons. What every backend must do is in test_distill.py.
"""

import ctypes
import mmap
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mokd_fast.kernels import configs
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mokd_fast.ops import (
    Target,
    cpu,
    cross_view_pairs,
    cuda,
    distill,
    distill_cross_entropy,
    reference,
)

from .conftest import NVCC, ROOT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def backend(cuda_kernels, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cuda")


def case(v=4, t=2, b=2, k=97, dtype=torch.float32):
    g = torch.Generator().manual_seed(k)
    student = (torch.randn(v, b, k, generator=g) * 4).to(dtype).requires_grad_()
    teacher = (torch.randn(t, b, k, generator=g) * 2).to(dtype)
    center = torch.randn(k, generator=g)
    return student, Target(cross_view_pairs(t, v), teacher, temperature=0.05, center=center)


def run(student, *targets, backend="cuda"):
    loss, terms = distill_cross_entropy(student, targets, backend=backend)
    return loss.detach(), terms, torch.autograd.grad(loss, student)[0]


def wide(target):
    rows = (None if x is None else x.double() for x in (target.logits, target.probs))
    rest = (target.temperature, target.center, target.weight, target.row_weight)
    return Target(target.pairs, *rows, *rest)


def check(student, *targets):
    """No worse than the reference in the same dtype, both against float64."""
    exact = run(
        student.detach().double().requires_grad_(), *map(wide, targets), backend="reference"
    )
    rough = run(student, *targets, backend="reference")
    mine = run(student, *targets)
    assert mine[2].dtype == student.dtype
    for have, allowed, truth in zip(mine, rough, exact, strict=True):
        top = truth.abs().max()
        error = (have.double() - truth).abs().max()
        assert error <= (allowed.double() - truth).abs().max() + 1e-6 * top


@pytest.mark.parametrize("multiprocessors", [1, 132])  # the longest tiles, the shortest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_columns_around_every_border(backend, dtype, multiprocessors, monkeypatch):
    monkeypatch.setattr(configs, "gpu", lambda index: (90, multiprocessors))
    for k in (1, 7, 8, 255, 256, 257, 1000, 1024, 1025, 4097):
        check(*case(v=3, k=k, dtype=dtype))


@pytest.mark.parametrize(("t", "v"), [(1, 2), (8, 18), (24, 8), (8, 24)])
def test_views_and_teachers(backend, t, v):
    check(*case(v=v, t=t, b=1, k=300))


@pytest.mark.parametrize("t", [1, 3, 4, 5, 7, 8, 9, 12])
def test_whole_tiles_that_do_not_fill_a_block(backend, t):
    """Warps without a tile, and rows in groups of 3, 4, 4, ...; a few pairs are missing."""
    for tiles, dtype in (1, torch.float16), (5, torch.float32), (6, torch.bfloat16):
        student, target = case(v=3, t=t, b=3, k=512 * tiles + 8, dtype=dtype)
        pairs = tuple(
            tuple(0.0 if (3 * i + v) % 4 == 1 else w + 0.01 for v, w in enumerate(row))
            for i, row in enumerate(target.pairs)
        )
        logits = target.logits.float().softmax(-1).to(dtype)
        check(
            student,
            Target(pairs, target.logits, temperature=0.05, center=target.center),
            *[Target(pairs[:1], probs=logits[:1], weight=0.5)] * (t < 12),
        )


def test_what_has_no_pair_may_hold_anything(backend):
    """In whole tiles and in a ragged one; with one teacher row of them, with several."""
    for t in (2, 6):
        student, target = case(v=4, t=t, b=2, k=1024 + 40)
        pairs = [[0.0, 0.3, 0.0, 0.2] for _ in range(t)]
        pairs[-1] = [0.0] * 4
        expected = run(student, Target(pairs, target.logits, temperature=0.05))
        held, logits = student.detach().clone(), target.logits.clone()
        for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            held[::2, :, 7 + i :: 100] = bad
            logits[-1, :, 7 + i :: 100] = bad
        found = run(held.requires_grad_(), Target(pairs, logits, temperature=0.05))
        assert all(map(torch.equal, found, expected)) and not found[2][::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_whole_tiles_cannot_take(backend, dtype):
    """What is read 16 bytes at a time must lie at a multiple of 16 bytes: a stride, an address or a
    type forbids it. (Emulated, another address ends the process.)"""
    student, target = case(v=3, t=2, b=2, k=1024, dtype=dtype)
    rows, center, k = target.logits, target.center, 1024

    def wider(x, *shape):
        """The same numbers in a larger tensor: other strides."""
        return x.detach().new_zeros(shape)[tuple(map(slice, x.shape))].copy_(x.detach())

    def shifted(x):
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x.detach())

    def target_of(rows=rows, center=center):
        return Target(target.pairs, rows, temperature=0.05, center=center)

    odd = k + 1
    of_views = student.new_zeros(3 * (2 * k + 1)).as_strided((3, 2, k), (2 * k + 1, k, 1))
    columns = student.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for moved in (
        wider(student, 3, 2, odd),
        of_views.copy_(student.detach()),
        shifted(student),
        columns,
    ):
        check(moved.requires_grad_(), target_of())
    spread = (x.detach().new_zeros(*x.shape[:2], 2 * k) for x in (student, rows))
    one, other = (x[..., ::2] for x in spread)  # columns 2 apart, other numbers between them
    check(one.copy_(student.detach()).requires_grad_(), target_of())
    check(student, target_of(other.copy_(rows)))
    for other in (wider(rows, 2, 2, odd), shifted(rows), rows.double(), rows.float(), rows.half()):
        check(student, target_of(other))
    check(student, target_of(center=shifted(center)))
    check(student, target_of(rows[:, :1].expand(2, 2, k)))
    # One image or one view: its stride says nothing.
    one = student.detach().as_strided((1, 1, k), (7, 3, 1)).requires_grad_()
    check(one, Target([[1.0]], rows.as_strided((1, 1, k), (5, 9, 1)), temperature=0.05))
    # Rows of a gradient whose columns are no multiple of 8 begin anywhere.
    narrow = wider(student, 3, 2, odd + 7)[..., : k - 3].requires_grad_()
    check(narrow, target_of(wider(rows, 2, 2, odd + 7)[..., : k - 3], center[: k - 3]))


def flat(student, target):
    """The arguments of cuda.distill_forward."""
    empty, pairs = torch.empty(0), [w for row in target.pairs for w in row]
    scalars = torch.tensor([0.1, 0.05, 1.0])
    return student.detach(), [target.logits], [target.center], [empty], scalars, pairs, [False]


def test_a_gradient_at_an_odd_address(backend):
    student, target = case(k=1024)
    arguments = flat(student, target)
    kernels = distill._kernels("cuda")
    stats, grad = kernels.distill_forward(*arguments)[2], torch.ones(())
    out = torch.empty(student.numel() + 1)[1:].view(student.shape)
    expected = kernels.distill_backward(grad, stats, *arguments)
    torch.testing.assert_close(kernels.distill_backward(grad, stats, *arguments, out=out), expected)


@pytest.mark.parametrize("k", [1024, 1000])  # the kernels for whole tiles alone; the others too
def test_chunks_count_images_from_0(backend, k):
    """With whatever lay in the counter's place before."""
    student, target = case(b=3, k=k)
    student, rows, centers, *rest = flat(student, target)
    kernels = distill._kernels("cuda")
    expected = kernels.distill_forward(student, rows, centers, *rest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ends in ([k], [512, k], [8, 264, 263 + 512, k]):
        chunks, begin = kernels.ForwardChunks(k), 0
        chunks._shares = torch.full((3 + 1,), 1e300, dtype=torch.float64, device=device)
        for end in ends:
            at = slice(begin, end)
            chunks.add(student[..., at], [rows[0][..., at]], [centers[0][at]], *rest)
            begin = end
        for mine, theirs in zip(chunks.outputs, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulator, as on a GPU: below")
def test_numbers_of_the_host_go_along(backend, dtype, monkeypatch):
    student, target = case(k=300, dtype=dtype)
    targets = [
        Target(target.pairs, target.logits, temperature=0.05 + i / 30, weight=0.7 - i)
        for i in range(3)
    ]
    expected, real = run(student, *targets), cuda._native_call

    def on_host(*arguments):
        call, alive = real(*arguments)
        assert not call.scalars_on_host  # on the tensors' own device
        call.scalars_on_host = True
        return call, alive

    monkeypatch.setattr(cuda, "_native_call", on_host)
    assert all(map(torch.equal, run(student, *targets), expected))


def test_images_for_several_warps_and_of_no_weight(backend):
    """The last block sums them by all of its warps; that nothing comes out tells none to stop."""
    student, target = case(v=3, b=70, k=8)
    check(student, target)
    zeros = torch.zeros(70)
    nothing = Target(target.pairs, target.logits, temperature=0.05, row_weight=zeros)
    assert not any(found.any() for found in run(student, nothing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_number_of_a_tile_is_found_in_every_column(backend, dtype):
    """One far above all others in each row: relative to another maximum it would be infinite."""
    student, target = case(v=16, t=1, b=16, k=256, dtype=dtype)
    at = torch.arange(256).view(16, 16, 1)
    check(student.detach().scatter(2, at, 100.0).requires_grad_(), target)


def test_which_numbers_stay_on_the_host(backend, monkeypatch):
    """Those of calls whose kernels are launched at once, and by CUDA: what is traced is for any."""
    student, target = case()
    seen, real = [], reference.scalars

    def noted(numbers, like, on_host=False):
        seen.append(on_host)
        return real(numbers, like, on_host)

    monkeypatch.setattr(reference, "scalars", noted)
    run(student, target)
    make_fx(lambda s: distill_cross_entropy(s, [target])[0])(student.detach())
    assert seen == [True, False]
    far = torch.empty(2, device="meta")  # of another device than the host
    assert real([0.1, 2.0], far).is_meta and real([0.1, torch.tensor(2.0)], far, True).is_meta
    assert torch.equal(real([0.1, 2.0], far, True), torch.tensor([0.1, 2.0]))


def test_more_tiles_than_lanes_of_a_warp(backend):
    check(*case(v=2, b=1, k=40 * 256 + 5))


def test_targets_of_every_kind_and_type(backend):
    student, one = case(v=5, b=3, k=520, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, 520, generator=g)
    weight = torch.tensor([0.5, 0.0, 2.0])
    pairs = tuple(tuple(row) for row in torch.rand(5, 5, generator=g).tolist())
    probs = (logits * 3).softmax(-1) * 0.7  # need not sum to 1
    check(
        student,
        one,
        Target(pairs, logits.double(), temperature=0.3, weight=-2.0, row_weight=weight),
        Target(pairs, probs=probs, weight=0.3, row_weight=weight),
        Target(pairs, logits.half(), temperature=0.04, weight=0.0),
    )


def test_rows_that_are_not_aligned_or_not_dense(backend):
    student, target = case(k=515)
    expected = run(student, target)
    flat = torch.empty(student.numel() + 1)
    shifted = flat[1:].view(student.shape).copy_(student.detach())  # 4 bytes off
    columns = student.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    row = target.logits[:, :1].contiguous()
    expanded = Target(target.pairs, row.expand(2, 2, 515), temperature=0.05, center=target.center)
    for moved in (shifted, columns):
        again = run(moved.requires_grad_(), target)
        assert all(map(torch.equal, again, expected))
    check(student, expanded)


def before_a_wall(tensor):
    """A copy whose last byte is the last one that may be read: the page after it is not mapped."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    count, offset = tensor.numel(), pages - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    return copy.view(tensor.shape).copy_(tensor.detach())


@pytest.mark.parametrize("k", [8, 260, 263, 1032])
def test_nothing_is_read_past_the_end(backend, k):
    """A read beyond ends the process, as a wall does. (On a GPU compute-sanitizer sees it.)"""
    student, target = case(v=2, k=k)
    logits, center = before_a_wall(target.logits), before_a_wall(target.center)
    walled = Target(target.pairs, logits, temperature=0.05, center=center)
    again = run(before_a_wall(student).requires_grad_(), walled)
    assert all(map(torch.equal, again, run(student, target)))


@pytest.mark.parametrize("k", [1024, 1025])  # whole tiles, and rows that allow none
def test_infinities_and_nan_stay_where_they_are(backend, k):
    student, target = case(v=3, b=2, k=k)
    target.logits[:, :, :512] = -torch.inf  # whole tiles
    check(student, target)
    bad = student.detach().clone()
    bad[2, 1, 700] = torch.nan
    loss, _, gradient = run(bad.requires_grad_(), target)
    assert loss.isnan() and gradient[2, 1].isnan().all() and gradient[:, 0].isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets_cost_no_digits(backend, offset):
    student, target = case(k=1000)
    check((student.detach() + offset).requires_grad_(), target)


def test_offsets_beyond_32_bits(backend, tmp_path):
    step = 2**31 + 8
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step + 600).detach()
    student, target = case(v=2, b=2, k=260)
    far = file.as_strided((2, 2, 260), (260, step, 1)).copy_(student.detach())
    assert torch.equal(run(far.requires_grad_(), target)[2], run(student, target)[2])
    # Here it is the columns that are far apart.
    narrow, target = case(v=2, b=1, k=2)
    far = file.as_strided((2, 1, 2), (1, 1, step)).copy_(narrow.detach())
    assert torch.equal(run(far.requires_grad_(), target)[2], run(narrow, target)[2])


def test_the_same_bits_in_any_order_of_threads(backend, monkeypatch):
    student, target = case(v=5, b=3, k=3000)
    once = run(student, target)
    monkeypatch.setenv("MOKD_EMULATE_REVERSED", "1")
    assert all(map(torch.equal, run(student, target), once))


def test_operators(backend):
    student, target = case(k=33)
    empty, pairs = torch.empty(0), [w for row in target.pairs for w in row]
    scalars = torch.tensor([0.1, 0.05, 1.0])
    lists = [target.logits], [target.center], [empty]
    arguments = (student, *lists, scalars, pairs, [False], "cuda")
    torch.library.opcheck(distill._forward, arguments)
    _, _, stats, _ = distill._forward(*arguments)
    backward = (torch.ones(()), stats, student.detach(), *arguments[1:])
    torch.library.opcheck(distill._backward, backward)


def test_compiles_whole_with_its_reasons(backend, monkeypatch):
    """Dynamo meets the native module in why_not; it must neither trace it nor break the graph."""
    if not torch.cuda.is_available():  # Dynamo asks a real one, too
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "why_not", lambda s, rows: cuda._native_why_not(len(s), 2, 0))
    student, target = case()

    def loss(student):
        return distill_cross_entropy(student, [target])[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student), loss(student))


def shape(emulated, v=10, t=2, b=64, k=65536, type=0):
    student, teacher = (0, type, v, b * k, k, 1), (0, type, t, b * k, k, 1)
    return emulated.Distill(student, [(teacher, 0, 0, False)], [1.0] * t * v, 0, b, k, 1)


def case_of(rows, bytes, images=64, columns=65536):
    return configs.Case(90, 132, 10, images, columns, rows, bytes)


def test_plan(emulated):
    assert shape(emulated).cuda_plan(1024) == (4, 64)
    assert shape(emulated, k=257).cuda_plan(256) == (4, 2)
    for t in range(1, 25):
        for type, bytes in ((0, 4), (1, 8), (2, 2)):
            call, size = shape(emulated, v=8, t=t, type=type), max(bytes, 4)
            for config in configs.candidates("cuda", case_of(t, bytes)):
                warps, _ = call.cuda_plan(config.columns)
                assert 1 <= warps <= 4 and warps * t * config.columns * size <= 48 << 10
    for wrong in (
        {"tile": 0},
        {"tile": 128},
        {"tile": 300},
        {"tile": 2048},
        {"type": 1},
        {"t": 13},
    ):
        tile = wrong.pop("tile", 1024)
        with pytest.raises(ValueError, match=f"no CUDA kernel has tiles of {tile} columns for"):
            shape(emulated, **wrong).cuda_plan(tile)


@pytest.mark.parametrize("line", [line for line in configs.TABLE if line.backend == "cuda"])
def test_what_the_table_says_of_the_bytes_in_flight(line, emulated):
    """A multiprocessor of sm_80: 164 KiB to keep teacher rows in, 1 of them taken by each block;
    registers for 16 warps of the backward pass, by its launch bounds."""
    found = []
    for bytes, type in ((2, 2), (8, 1)):
        case = case_of(line.rows, bytes, columns=min(line.columns, 65536))
        if configs.lookup("cuda", case) is line:
            warps, _ = shape(emulated, v=8, t=line.rows, type=type).cuda_plan(line.config.columns)
            kept = warps * line.rows * line.config.columns * max(bytes, 4) + 1024
            blocks = min(16 // warps, (164 << 10) // kept)
            found.append(blocks * warps * line.config.columns * bytes / 1024)
    assert min(found) == line.in_flight


def test_tuning_times_the_kernels_and_both_passes_use_the_fastest(backend, monkeypatch):
    """With a timer of ours; when nothing may be timed: tests/kernels/test_configs.py."""
    student, target = case(v=3, b=2, k=1500)
    expected, used, real = run(student, target), [], cpu.native.Distill
    fake = {1024: 3.0, 512: 1.0, 256: 2.0}

    def seconds(call):
        call()
        return fake[used[-1]]

    class Watched:
        """The native call, which notes the tile of every pass."""

        def __init__(self, *arguments):
            self.call = real(*arguments)
            self.cuda_plan, self.state_size = self.call.cuda_plan, self.call.state_size
            self.cuda_finish = self.call.cuda_finish

        def cuda_forward(self, *arguments):
            used.append(arguments[2])
            self.call.cuda_forward(*arguments)

        def cuda_backward(self, *arguments):
            used.append(arguments[3])
            self.call.cuda_backward(*arguments)

    native = SimpleNamespace(Distill=Watched)
    monkeypatch.setattr(cpu, "native", native)
    monkeypatch.setattr(configs, "seconds", seconds)
    monkeypatch.setattr(configs, "_may_time", lambda student: True)
    monkeypatch.setattr(configs, "_found", {})
    monkeypatch.setenv("MOKD_FAST_AUTOTUNE", "1")
    for _ in range(2):
        for mine, theirs in zip(run(student, target), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert used == [256, 256, 1024, 1024, 512, 512, *[512] * 4]


def test_as_many_targets_as_rows(emulated):
    """Numbers of the host have room for so many; targets without a row do not slip through."""
    none, one = [(((0, 0, n, 8, 8, 1), 0, 0, False)) for n in (0, 1)]
    many = emulated.Distill((0, 0, 1, 8, 8, 1), [*[none] * 24, one], [1.0], 0, 1, 8, 1)
    with pytest.raises(ValueError, match="more rows or pairs than a CUDA kernel takes"):
        many.cuda_forward(0, 0, 256, 0, 0)


def test_capacity_is_refused_by_the_native_module_too(emulated):
    assert emulated.CUDA_CAPACITY == (24, 24, 192)
    for many in ({"v": 25, "t": 1}, {"v": 1, "t": 25}, {"v": 24, "t": 9}):
        with pytest.raises(ValueError, match="more rows or pairs than a CUDA kernel takes"):
            shape(emulated, **many).cuda_forward(0, 0, 256, 0, 0)


def test_an_error_of_cuda_is_a_runtime_error(emulated):
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        shape(emulated).cuda_backward(0, 0, 0, 256, 7, 0)


@pytest.mark.gpu
def test_reasons(monkeypatch):
    student, target = case()
    assert "one is on cpu" in cuda.why_not(student, [target.logits])
    monkeypatch.setattr(cpu, "native", None)
    with FakeTensorMode():
        on_gpu = torch.empty(25, 3, 5, device="cuda")
        assert "int64" in cuda.why_not(on_gpu, [torch.empty(1, 3, 5, device="cuda").long()])
        assert "was not built" in cuda.why_not(on_gpu, [on_gpu[:1]])
        monkeypatch.setattr(cpu, "native", SimpleNamespace())
        assert "built without CUDA" in cuda.why_not(on_gpu, [on_gpu[:1]])
        archs = ["sm_90a", "compute_80"]
        native = SimpleNamespace(
            CUDA_CAPACITY=(24, 24, 192),
            cuda_versions=lambda: (13000, 13010),
            build_info=lambda: {"cuda_archs": archs},
        )
        monkeypatch.setattr(cpu, "native", native)
        assert "up to 24 student views, these are 25" in cuda.why_not(on_gpu, [on_gpu[:1]])
        assert "up to 192 pairs" in cuda.why_not(on_gpu[:20], [on_gpu[:10]])
        ours = on_gpu[:10], [on_gpu[:2], on_gpu[:8]]
        capability = [9, 0]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert cuda.why_not(*ours) is None
        capability[:] = 7, 5
        reason = cuda.why_not(*ours)
        assert "for sm_90a, compute_80, this GPU is sm_75 (MOKD_FAST_CUDA_ARCHS=75" in reason
        native.cuda_versions = lambda: (12080, 13000)
        assert cuda.why_not(*ours) == "the driver takes CUDA 12.8, the kernels need 13.0"


@pytest.mark.parametrize(
    ("arch", "gpus"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("sm_90a", [(9, 0)]),
        ("sm_100", [(10, 0), (10, 3)]),
        ("compute_80", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
    ],
)
def test_which_gpus_an_architecture_runs_on(arch, gpus):
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [gpu for gpu in every if cuda._runs(arch, *gpu)] == gpus


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory):
    """[(architecture, kernel, bytes of its stack, SASS)] of the module as it is installed where
    that is of these sources and holds all three architectures, else compiled here."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    archs = ("80", "90a", "100")
    files = [Path(cpu.native.__file__)] if cpu.native else []
    sources = [path for part in ("core", "cuda") for path in (ROOT / "csrc" / part).iterdir()]
    built = cpu.native.build_info()["cuda_archs"] if files else []
    newest = max(path.stat().st_mtime for path in sources)
    if not {f"sm_{a}" for a in archs} <= set(built) or files[0].stat().st_mtime < newest:
        folder = tmp_path_factory.mktemp("nvcc")
        files = [folder / f"{name}.o" for name in ("distill", "search")]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        for out in files:
            source = ROOT / f"csrc/cuda/{out.stem}.cu"
            command = [NVCC, "-O3", "-std=c++17", "--threads=4", *codes, "-c", source, "-o", out]
            build = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            said = build.stdout + build.stderr
            assert build.returncode == 0 and "warning" not in said, said
    cuobjdump = Path(NVCC).resolve().with_name("cuobjdump")
    if not cuobjdump.exists():
        triton = pytest.importorskip("triton")
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dumped(option):
        """{(architecture, kernel): what cuobjdump says of it}"""
        found = {}
        for file in files:
            text = subprocess.run(
                [cuobjdump, option, file], capture_output=True, text=True, check=True
            ).stdout
            for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
                arch = part.split()[0]
                for code in re.split(r"Function\s*:?\s+", part)[1:]:
                    found[arch, re.match(r"\w+", code)[0]] = code
        return found

    used, sass = dumped("-res-usage"), dumped("-sass")
    assert used.keys() == sass.keys()
    return [(*key, int(re.search(r"STACK:(\d+)", used[key])[1]), sass[key]) for key in used]


def test_no_kernel_spills(machine_code):
    # Two for four types, two for three of them and whole tiles of three sizes, two for two types;
    # of the search four for two types.
    assert len(machine_code) == 3 * (2 * 4 + 2 * 3 * 3 + 2 * 2 + 4 * 2)
    for arch, name, stack, code in machine_code:
        assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), (arch, name, stack)


def test_global_memory_is_touched_16_bytes_at_a_time(machine_code):
    of_the_loss = [one for one in machine_code if "_distill_cu_" in one[1]]
    assert len(of_the_loss) == 3 * 30
    for arch, name, _, code in of_the_loss:
        wide = re.search("ward_(tiles|whole)", name), re.search("backward_(tiles|whole)", name)
        for access, expected in zip((r"LDG\.E\.128", r"STG\.E\.128"), wide, strict=True):
            assert bool(re.search(access, code)) == bool(expected), (arch, name, access)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_keeps_the_call_and_nothing_synchronises():
    student, target = case(k=4096, dtype=torch.bfloat16)
    on_gpu = Target(target.pairs, target.logits.cuda(), temperature=0.05)
    logits = student.detach().cuda()

    def step(target=on_gpu):
        # A leaf of its own: one that another step's graph still holds keeps that step's stream for
        # its gradient, and a capture may not make the default stream wait.
        return run(logits.detach().requires_grad_(), target)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensors = Target(target.pairs, on_gpu.logits, temperature=torch.tensor(0.05, device="cuda"))
    assert all(map(torch.equal, step(tensors), expected))  # numbers of the device
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph asks for
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, expected))
