"""What the Triton weight_norm compiles to for a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from mokd_fast.kernels import weight_norm as kernels

from .aot import compile_only, resources
from .test_distill import narrow_offsets


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("D", "dtype"), [(1, BF16), (97, FP16), (256, BF16), (256, FP16), (384, BF16), (8192, FP16)]
)
def test_no_spill_wide_loads_and_64_bit_offsets(capability, D, dtype, tmp_path):
    v, g = torch.empty(1000, D), torch.empty(1000, 1)
    with compile_only(capability) as found:
        w, norms = kernels.weight_norm(v, g, dtype)
        kernels.weight_norm_backward(w, v, g, norms)
    assert set(found) == {"_normalize", "_gradients"}
    for name, kernel in found.items():
        used = resources(kernel, tmp_path)
        assert used["STACK"] == 0 and used["LOCAL"] == 0 and used["REG"] <= 255, (name, used)
        assert not narrow_offsets(kernel.asm["ttir"]), name
        if D % 16 == 0:  # else an address a number
            # Eight programs of four warps on a multiprocessor: 64 KiB of v on the way.
            assert used["REG"] <= 64, (name, used)
            for wide in ("ld.global.v4.b32", "st.global.v4.b32"):
                assert wide in kernel.asm["ptx"], name


def test_another_number_of_rows_does_not_compile_again():
    found = []
    for K in (1000, 65536, 1, 16):
        v, g = torch.empty(K, 256), torch.empty(K, 1)
        with compile_only(90) as kernel:
            kernels.weight_norm_backward(v.bfloat16(), v, g, kernels.weight_norm(v, g, BF16)[1])
        found.append(kernel)
    assert all(other == found[0] for other in found)
