"""What the Triton distill_cross_entropy compiles to, without a GPU."""

import re
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch

from mokd_fast.ops import Target, cross_view_pairs, distill_cross_entropy, explain

pytest.importorskip("triton")

import triton
from mokd_fast.kernels import configs
from mokd_fast.kernels import distill as kernels

from .aot import compile_only, resources


def compiled(capability, dtype, counts, shape=(10, 2, 65536), weight=1.0, variant=False):
    """The four kernels for targets of `counts` rows, with centres or (variant) row weights."""
    (views, images, columns), empty = shape, torch.empty(0)
    arguments = (
        torch.empty(shape, dtype=dtype),
        [torch.empty(t, images, columns, dtype=dtype) for t in counts],
        [empty if variant else torch.empty(columns) for _ in counts],
        [torch.empty(images) if variant else empty for _ in counts],
        torch.empty(1 + 2 * len(counts)),
        [weight] * views * sum(counts),
        [False] * len(counts),
    )
    gpu = mock.patch.object(configs, "gpu", lambda index: (capability, 1))
    with gpu, compile_only(capability) as found:
        *_, stats = kernels.distill_forward(*arguments)
        kernels.distill_backward(torch.empty(()), stats, *arguments)
    return found


def narrow_offsets(ttir):
    """What defines the 32-bit offsets of a kernel's pointers."""
    defined = dict(re.findall(r"(%\w+) = ([\w.]+)", ttir))
    found = re.findall(r"tt\.addptr %\w+, (%\w+) : \S+, (?:tensor<\S*x)?i32>?", ttir)
    return {defined[name] for name in found}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


LINES = [line for line in configs.TABLE if line.backend == "triton"]
COUNTS = {4: (2, 2), 16: (8, 8), 24: (8, 16)}  # of the targets' rows, for the most of a line
# Bytes of a thread's stack: what Triton 3.6 makes of one kernel needs more registers than there
# are, with ptxas 12.8 (its own) and 12.9; what 3.8 makes of it does not.
OLD = triton.__version__.startswith("3.6.")
SPILLED = {(90, 24, torch.float32, "_backward"): 48} if OLD else {}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"line{configs.TABLE.index(line)}")
def test_no_spill_wide_loads_and_64_bit_offsets(line, tmp_path):
    """Of every line, for all types that it takes; and the bytes in flight that it promises."""
    shape = (10, 2, min(line.columns, 65536))
    for dtype in (torch.bfloat16, torch.float32):
        case = configs.Case(line.capability, 1, *shape, line.rows, dtype.itemsize)
        if configs.lookup("triton", case) is not line:
            continue
        found = compiled(line.capability, dtype, COUNTS[line.rows], shape)
        assert set(found) == {"_forward", "_merge", "_total", "_backward"}
        used = {name: resources(kernel, tmp_path) for name, kernel in found.items()}
        for name, kernel in found.items():
            stack = SPILLED.get((line.capability, line.rows, dtype, name), 0)
            assert used[name]["STACK"] == stack and 0 < used[name]["REG"] <= 255, (name, used[name])
            # 32 bits end at 2^31 elements: no product of a stride, a number of tiles, of images.
            assert narrow_offsets(kernel.asm["ttir"]) <= {"arith.constant", "tt.make_range"}, name
        threads, columns = 32 * line.config.warps, line.config.columns
        bytes = min(columns // threads * dtype.itemsize, 16)
        for name in ("_forward", "_backward"):
            ptx = found[name].asm["ptx"]
            assert "ld.global.v4.b32" in ptx, name  # teachers
            copies = rf"cp\.async\.c[ag]\.shared\.global .*, {bytes:#x}"  # students
            assert re.search(copies, ptx), name
        assert f"st.global.v{bytes // 4}.b32" in found["_backward"].asm["ptx"]
        registers = max(used[name]["REG"] for name in ("_forward", "_backward"))
        blocks = 65536 // (-(-registers // 8) * 8 * threads)
        in_flight = blocks * columns * dtype.itemsize * (line.config.stages - 1) / 1024
        assert in_flight >= line.in_flight, (registers, in_flight)


def test_the_call_of_mokd(tmp_path):
    """Self, cross and search in one call."""
    for kernel in compiled(90, torch.float16, (2, 2, 8)).values():
        assert resources(kernel, tmp_path)["STACK"] == 0


@pytest.mark.parametrize("columns", [1000, 65537])
def test_few_and_odd_columns(columns, tmp_path):
    found = compiled(90, torch.bfloat16, (2, 3), (4, 1, columns), variant=True)
    for kernel in found.values():
        assert resources(kernel, tmp_path)["STACK"] == 0
        assert narrow_offsets(kernel.asm["ttir"]) <= {"arith.constant", "tt.make_range"}


def test_sizes_of_one():
    """Triton makes a constant of an argument that is 1."""
    for counts in ((1,), (1, 1)):
        assert len(compiled(90, torch.float32, counts, (1, 1, 1), variant=len(counts) > 1)) == 4


def test_numbers_that_change_do_not_compile_again():
    first = compiled(90, torch.bfloat16, (2,))
    again = compiled(90, torch.bfloat16, (2,), (16, 48, 65536), weight=0.25)
    assert all(again[name] is kernel for name, kernel in first.items())


def test_chunks_take_the_kernels_of_the_whole():
    """Nothing compiles again for columns that come in chunks, but for those left over."""
    whole, chunk = compiled(90, torch.bfloat16, (2,)), 8192
    views, images, columns = 10, 2, 65536
    new = partial(torch.empty, dtype=torch.bfloat16)
    rest = [torch.empty(0)], torch.empty(3), [1.0] * 2 * views, [False]
    gpu = mock.patch.object(configs, "gpu", lambda index: (90, 1))
    with gpu, compile_only(90) as found:
        chunks = kernels.ForwardChunks(columns)
        for _ in range(0, columns, chunk):
            call = new(views, images, chunk), [new(2, images, chunk)], [torch.empty(chunk)], *rest
            chunks.add(*call)
            assert found["_forward"] is whole["_forward"]
        out = new(views, images, chunk)
        grad = kernels.distill_backward(torch.empty(()), chunks.outputs[2], *call, out=out)
    assert grad is out and found == whole


def test_it_is_imported_at_first_use_and_says_why_not():
    code = "import sys, mokd_fast.ops; print('triton' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
    student, target = torch.zeros(4, 3, 8), Target(cross_view_pairs(2, 4), torch.zeros(2, 3, 8))
    reason = "it takes tensors on a GPU, this one is on cpu"
    assert f"triton: {reason}" in explain("distill_cross_entropy", student, [target], 0.1)
    with pytest.raises(RuntimeError, match=reason):
        distill_cross_entropy(student, [target], backend="triton")
