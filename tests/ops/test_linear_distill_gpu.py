"""What linear_distill_cross_entropy does on a GPU beside its kernels: on one if there is one, else
with tensors of a device that is not there, in PyTorch's own checks of types and shapes."""

import contextlib
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode, fake_impls

from mokd_fast.ops import LinearTarget, cpu, distill, linear_chunks, linear_distill
from mokd_fast.ops.dispatch import pick

from .oracle import dense

V, T, B, D = 4, 2, 3, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
a_gpu = contextlib.nullcontext if GPU else FakeTensorMode
new = partial(torch.empty, device="cuda")


@pytest.fixture
def l2(monkeypatch):
    """Sets the bytes of the cache. (Those of a GPU's properties would be Dynamo's, too: it asks for
    all of them, and keeps them.)"""
    return lambda size: monkeypatch.setattr(linear_chunks, "l2_bytes", lambda index: size)


@pytest.fixture
def addmm(monkeypatch):
    """What a GPU's addmm with an out_dtype checks. PyTorch's own check without a GPU takes the
    dtype for beta in torch 2.11 (pytorch/pytorch#179634 mended it)."""
    if GPU:
        return
    table, name = torch._decomp.decomposition_table, torch.ops.aten.addmm.dtype_out
    if "out_dtype" in inspect.signature(table[name]).parameters:
        return

    def checked(mode, function, total, a, b, out_dtype, *, out):
        assert total.dtype == out.dtype == out_dtype
        return out.copy_(total + torch.mm(a, b, out_dtype=out_dtype))

    monkeypatch.delitem(table, name)
    monkeypatch.setitem(fake_impls.op_implementations_dict, name, checked)


class Nothing:
    """Kernels that compute nothing, for tensors that hold nothing."""

    class ForwardChunks:
        def __init__(self, columns):
            pass

        def add(self, student, rows, *rest):
            self.outputs = cpu.results(student, rows)

    @staticmethod
    def distill_backward(grad, stats, student, *rest, out):
        assert out.shape == student.shape and out.is_contiguous()
        return out


@pytest.mark.parametrize("b", [0, B])
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_product_is_one_that_a_gpu_makes(dtype, weight, b, l2, addmm, monkeypatch):
    monkeypatch.setattr(distill, "_kernels", lambda backend: Nothing)
    monkeypatch.setattr(linear_chunks, "_identity", id)  # there are no addresses
    calls, k = [], 1300
    monkeypatch.setattr(linear_distill, "_forward", lambda *call: calls.append(call) or call)
    l2(0)
    with a_gpu():
        x, w = new(V, b, D, dtype=dtype), new(k, D, dtype=weight)
        targets = [LinearTarget(dense(T, V), new(T, b, D), new(k, D), center=new(k)),
                   LinearTarget(dense(T, V), new(T, b, D), w)]  # fmt: skip
        linear_distill._run("cuda", x, w, targets, 0.1, None)
        call = linear_chunks.Call(*calls[0])
        assert call.chunk == 512 and call.first_kept == k
        loss, _, stats, kept = linear_chunks.forward_pass(call)
        dx, dw = linear_chunks.backward_pass(loss, stats, kept, call, [True, True])
    assert kept.numel() == 0  # after the forward pass nothing of K's size
    assert (dx.shape, dx.dtype) == (x.shape, dtype) and (dw.shape, dw.dtype) == (w.shape, weight)
    assert {t.device.type for t in (loss, dx, dw)} == {"cuda"}


@pytest.mark.parametrize(
    ("images", "mib", "columns"), [(64, 50, 7680), (8, 50, 30208), (4096, 50, 512), (0, 50, 51200)]
)
def test_a_chunk_and_all_it_touches_take_half_of_the_cache(images, mib, columns, l2):
    l2(mib << 20)
    with a_gpu():
        x = new(10, images, 256)
        assert linear_chunks.chunk_size(x, 12 * images, torch.bfloat16) == columns
        if images < 4096:
            half = (22 * images + 256) * 2 * columns / (mib << 19)
            assert 0.9 < half <= 1


def test_one_chunk_is_kept_and_of_several_none():
    with a_gpu():
        kept = partial(linear_chunks.first_kept, new(10, 64, 256), 768, dtype=torch.bfloat16)
        assert kept(7680, 7680) == 0 and kept(7680, 7936) == 0 and kept(7681, 7680) == 7681


def test_the_cache_is_a_constant_in_a_compiled_graph(monkeypatch):
    """Dynamo calls for it once, and breaks no graph."""
    if not GPU:
        found = SimpleNamespace(L2_cache_size=50 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)

    def columns(x):
        return x.new_empty(linear_chunks.chunk_size(x, 768, torch.bfloat16))

    with a_gpu():
        x = new(10, 64, 256)
        compiled = torch.compile(columns, backend="eager", fullgraph=True)
        assert compiled(x).shape == columns(x).shape
        assert GPU or compiled(x).shape == (7680,)


@pytest.mark.parametrize(("able", "name"), [(3, "cuda"), (2, "triton"), (0, "reference")])
def test_what_runs_is_what_distill_cross_entropy_would_take(able, name, monkeypatch):
    asked = []

    def why_not(backend, student, rows):
        asked.append(backend)
        return None if backend in ("cpu", "triton", "cuda")[:able] else "it is not there"

    monkeypatch.setattr(distill, "why_not", why_not)
    monkeypatch.delenv("MOKD_FAST_BACKEND", raising=False)
    with a_gpu():
        x, w = new(V, B, D), new(97, D)
        target = LinearTarget(dense(T, V), new(T, B, D), w)
        assert pick(linear_distill.OP, x, w, [target], 0.1, None).name == name
    assert asked == ["cuda", "triton", "cpu"][: len(asked)]
