"""Values of the Triton augment_crops: run by test_augment.py, interpreted or on a GPU."""

import numpy as np
import pytest
import torch

from mokd_fast.data import augment_table
from mokd_fast.ops import augment_crops, augment_params
from tests.ops.test_augment import PLAIN, SINGLE, drawn, picture, replace

from .interpreter import _quick  # noqa: F401

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts bf16 off instead of rounding.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if GPU else ()))
NUMBERS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.3,), (0.35,))}


def both(crops, params, dtype=torch.float32):
    mean, std = NUMBERS[crops.shape[-1]]
    crops, params = crops.to(DEVICE), params.to(DEVICE)
    return (
        augment_crops(crops, params, mean=mean, std=std, dtype=dtype, backend=backend)
        for backend in ("triton", "reference")
    )


def crops_of(n, h, w, c):
    return torch.from_numpy(np.stack([picture(h, w, c, seed) for seed in range(n)]))


@pytest.mark.parametrize("c", [3, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_without_blur_bit_for_bit(c, dtype):
    views = [*(replace(PLAIN, **changes) for changes in SINGLE.values()), *drawn(6)]
    views = views if dtype == torch.float32 else views[::3]
    mine, expected = both(
        crops_of(len(views), 11, 17, c), torch.from_numpy(augment_table(views)), dtype
    )
    assert torch.equal(mine, expected) and mine.dtype == dtype
    assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("c", [3, 1])
def test_blurred_views_up_to_a_rounding(c):
    views = drawn(4, blur=True)
    table = torch.from_numpy(augment_table(views))
    table[0, 10], table[1, 10] = 3.0, 1e-3  # a radius beyond the height, and none
    mine, expected = both(crops_of(len(views), 8, 37, c), table)
    level = 1 / (255 * min(NUMBERS[c][1]))
    assert (mine - expected).abs().max() <= level * 1.0001
    assert ((mine - expected).abs() > 1e-6).double().mean() < 1e-2


def test_strides_and_codes():
    wide = crops_of(3, 12, 20, 3)
    params = augment_params(3, contrast=1.3, hue=0.1, flip=[1, 0, 1])
    params[:, 1:5] = torch.tensor([[1, 3, 1, 0], [9, 1, -2, 3], [3, 3, 3, 1]])
    for crops in (
        wide[:, 2:9, 3:18],
        wide.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        wide[:1].expand(3, -1, -1, -1),
        wide[:, :1, :1],
        wide[:, :, :1],
        wide[..., :1],
    ):
        assert torch.equal(*both(crops, params))
    assert torch.equal(*both(wide[:0], params[:0]))


@pytest.mark.parametrize("n", [7, 300])
def test_the_mean_that_contrast_turns_about_is_rounded_as_by_the_host(n):
    """Sums at, below and above halves."""
    crops = torch.zeros(6, 1, n, 1, dtype=torch.uint8)
    for crop, sum in zip(crops, (n // 2, (n + 1) // 2, n // 2 + 1, 0, 3 * n // 2, 0), strict=True):
        crop.view(-1)[:] = sum // n
        crop.view(-1)[: sum % n] += 1
    crops[5] = 255
    assert torch.equal(*both(crops, augment_params(6, contrast=0.5)))
