"""What the Triton batch_norm compiles to for a GPU."""

import re

import pytest
import torch

pytest.importorskip("triton")

from mokd_fast.kernels import batch_norm as kernels

from .aot import compile_only, resources

SUMS = {"_statistics", "_sums"}  # their tiles come by asynchronous copies
STREAMS = {"_result", "_for_x", *SUMS}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spill_16_bytes_at_a_time_and_64_bit_offsets(capability, dtype, tmp_path):
    for channels, add in ((64, True), (256, False)):
        x = torch.zeros(4, channels, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.ones(channels)
        with compile_only(capability) as found:
            y, stats = kernels.batch_norm(x, w, w, x if add else None, 1e-5, True, (w, w, 0.1))
            kernels.batch_norm_backward(x, x, w, w, stats, y if add else None, True)
        assert set(found) == {*STREAMS, "_join_statistics", "_join_sums"}
        for name, kernel in found.items():
            used = resources(kernel, tmp_path)
            # A correctly rounded root calls its rare cases: 8 bytes for the way back on sm_100.
            stack = 8 if capability == 100 and re.search(r"\w+\.rn\.f32", kernel.asm["ptx"]) else 0
            assert used["STACK"] <= stack and used["LOCAL"] == 0, (name, used)
            assert used["REG"] <= (160 if name in SUMS else 128), (name, used)
            if name in STREAMS:
                wide = (
                    r"cp\.async\.\w+\.shared\.global .*, 0x10"
                    if name in SUMS
                    else r"ld\.global\.v4\.b32"
                )
                assert re.search(wide, kernel.asm["ptx"]), name
                # Where a tile begins in 64 bits; what is within it in 32, the same in all of them.
                ttir = kernel.asm["ttir"]
                begins = re.findall(r"tt\.addptr %\w+, %\w+ : !tt\.ptr<\w+>, (i\d+)", ttir)
                narrow = re.findall(r"tt\.addptr %\w+, (%\w+) : \S+, (?:tensor<\S*x)?i32>?", ttir)
                assert set(begins) == {"i64"} and len(set(narrow)) == 1, name
                assert narrow[0].startswith("%within"), (name, narrow)
                assert ttir.count("arith.trunci") <= 1, name  # C, for what is within a tile
            if name in ("_result", "_for_x"):
                assert "st.global.v4.b32" in kernel.asm["ptx"], name


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 1, 1), (1, 16, 1, 1)])
def test_sizes_of_one(shape, add):
    """Triton makes a constant of an argument that is 1."""
    x, w = torch.zeros(shape), torch.ones(shape[1])
    with compile_only(90) as found:
        y, stats = kernels.batch_norm(x, w, w, x if add else None, 1e-5, True, (w, w, 0.1))
        kernels.batch_norm_backward(x, x, w, w, stats, y if add else None, True)
    assert len(found) == 6
