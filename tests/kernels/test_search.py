"""What the Triton feature search compiles to for a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from mokd_fast.kernels import search as kernels

from .aot import compile_only, resources
from .test_distill import narrow_offsets


def compiled(capability, dtype, d, images=2, heads=6, queries=24, tokens=196):
    """All kernels, launched as the operators launch them."""
    new = torch.empty
    maps = [new(images, heads, tokens, d, dtype=dtype) for _ in range(3)]
    asking = [new(queries, images, heads, d, dtype=dtype) for _ in range(3)]
    with compile_only(capability) as found:
        *results, rows, stats = kernels.joint_forward(*maps, *asking)
        grads = [new(t.shape, dtype=dtype) for t in results]
        kernels.joint_backward(*grads, rows, stats, *maps, *asking)
    return found


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [64, 128])
def test_no_spill_and_64_bit_offsets(capability, dtype, d, tmp_path):
    found = compiled(capability, dtype, d)
    names = {"_attend", "_merge", "_unmerge", "_row_gradients", "_key_gradients"}
    assert set(found) == names
    for name, kernel in found.items():
        used = resources(kernel, tmp_path)
        assert used["STACK"] == 0 and used["LOCAL"] == 0 and used["REG"] <= 255, (name, used)
        assert used["SHARED"] <= 99 * 1024, (name, used)  # what every GPU from 8.0 on has
        narrow = narrow_offsets(kernel.asm["ttir"]) - {"arith.constant", "tt.make_range"}
        assert narrow <= {"arith.addi", "tt.broadcast", "tt.expand_dims"}, (name, narrow)


def test_products_run_on_the_tensor_cores():
    for name in ("_attend", "_row_gradients", "_key_gradients"):
        ptx = compiled(80, torch.bfloat16, 64)[name].asm["ptx"]
        assert "mma.sync" in ptx, name


@pytest.mark.parametrize("d", [1, 16])
def test_sizes_of_one(d):
    """Triton makes a constant of an argument that is 1."""
    found = compiled(90, torch.float32, d, images=1, heads=1, queries=1, tokens=1)
    with compile_only(90) as more:
        kernels.search_forward(*[torch.empty(1, 1, 1, d)] * 3, True)
    assert len(found) == 5 and more["_attend"] is not found["_attend"]
