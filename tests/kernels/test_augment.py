"""What the Triton augment_crops compiles to for a GPU."""

import re

import pytest
import torch

pytest.importorskip("triton")

from mokd_fast.kernels import augment as kernels

from mokd_fast.ops import augment_params

from .aot import compile_only, resources


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("capability", "c"), [(80, 3), (90, 3), (100, 3), (90, 1)])
def test_no_spill_no_fusion_and_64_bit_offsets(capability, c, tmp_path):
    crops = torch.zeros(2, 224, 224, c, dtype=torch.uint8)
    with compile_only(capability) as found:
        kernels.augment_crops(crops, augment_params(2), (0.5,) * c, (0.2,) * c, torch.bfloat16)
    assert set(found) == {"_sum_luma", "_colour", "_blur_along", "_blur_across"}
    for name, kernel in found.items():
        used = resources(kernel, tmp_path)
        # A correctly rounded division calls its rare cases: 8 bytes for the way back on sm_100.
        stack = 8 if capability == 100 and "div.rn" in kernel.asm["ptx"] else 0
        assert used["STACK"] <= stack and used["LOCAL"] == 0 and used["REG"] <= 64, (name, used)
        # From a 64-bit place to the other channels, no further.
        narrow = re.findall(r"tt\.addptr %\w+, (%\w+) : .*, tensor<\S+xi32>", kernel.asm["ttir"])
        assert all(offset.startswith("%cst") for offset in narrow), (name, narrow)
        assert "xi64>" in kernel.asm["ttir"], name
        if name in ("_sum_luma", "_colour"):  # Pillow has no fused a * b + c
            assert not re.search(r"\bfma\.", kernel.asm["ptx"]), name


@pytest.mark.parametrize("c", [3, 1])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 5), (5, 1)])
def test_sides_of_one(h, w, c):
    """Triton makes a constant of an argument that is 1."""
    crops = torch.zeros(1, h, w, c, dtype=torch.uint8)
    with compile_only(90) as found:
        kernels.augment_crops(crops, augment_params(1), (0.5,) * c, (0.2,) * c, torch.float32)
    assert len(found) == 4
