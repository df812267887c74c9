"""augment_crops: Pillow's bits, the Gaussian against float64, PyTorch around it, bad input."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from mokd_fast.data import AugmentConfig, ViewParams, augment_table, draw_views
from mokd_fast.data.pillow import augment
from mokd_fast.ops import augment as augment_module
from mokd_fast.ops import augment_crops, augment_params, cpu, explain, reference

from .conftest import levels

needs_native = pytest.mark.skipif(cpu.native is None, reason="the native module was not built")
BYTES = {"mean": (0.0,), "std": (1 / 255,)}  # the result is the byte itself
PLAIN = ViewParams(0, 0, 1, 1, False, None, (1.0, 1.0, 1.0, 0.0), False, 0.0, False)
ORDERS = tuple(itertools.permutations(range(4)))
SINGLE = {
    "nothing": {},
    "flip": {"flip": True},
    "darker": {"order": (0, 1, 2, 3), "factors": (0.62, 1.0, 1.0, 0.0)},
    "brighter": {"order": (0, 1, 2, 3), "factors": (1.37, 1.0, 1.0, 0.0)},
    "less contrast": {"order": (0, 1, 2, 3), "factors": (1.0, 0.6, 1.0, 0.0)},
    "more contrast": {"order": (0, 1, 2, 3), "factors": (1.0, 1.4, 1.0, 0.0)},
    "less colour": {"order": (0, 1, 2, 3), "factors": (1.0, 1.0, 0.8, 0.0)},
    "more colour": {"order": (0, 1, 2, 3), "factors": (1.0, 1.0, 1.9, 0.0)},
    "hue": {"order": (0, 1, 2, 3), "factors": (1.0, 1.0, 1.0, 0.1)},
    "hue back": {"order": (0, 1, 2, 3), "factors": (1.0, 1.0, 1.0, -0.5)},
    "hue of no shift": {"order": (0, 1, 2, 3), "factors": (1.0, 1.0, 1.0, 1e-3)},
    "grey": {"grey": True},
    "solarize": {"solarize": True},
    "black": {"order": (0, 1, 2, 3), "factors": (0.0, 0.0, 0.0, 0.0)},
}


@pytest.fixture(params=["reference", "baseline", "v3", "v4"])
def backend(request, monkeypatch):
    """The reference, then the CPU kernel of each x86-64 level that this processor has."""
    if request.param == "reference":
        return "reference"
    if request.param not in levels():
        pytest.skip(f"no native module here with kernels of level {request.param}")
    monkeypatch.setenv("MOKD_FAST_CPU_LEVEL", request.param)
    return "cpu"


def picture(h, w, c=3, seed=0):
    """Smooth, with noise on it and extremes, as uint8 [h, w, c]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w, :1][:2]
    waves = 127 + 120 * np.sin(x / 9 + y / 5 * np.arange(1, c + 1)) + rng.normal(0, 12, (h, w, c))
    return waves.round().clip(0, 255).astype(np.uint8)


def pillow(crop, p):
    image = augment(Image.fromarray(crop if crop.shape[-1] == 3 else crop[..., 0]), p)
    return torch.from_numpy(np.asarray(image).reshape(crop.shape).copy())


def ours(crops, params, backend, **options):
    """Bytes again, [B, H, W, C]."""
    crops = torch.from_numpy(np.stack(crops)) if isinstance(crops, list) else crops
    options = {name: value * crops.shape[-1] for name, value in BYTES.items()} | options
    out = augment_crops(crops, params, backend=backend, **options)
    return out.permute(0, 2, 3, 1)


def drawn(n, blur=False):
    """Views with every order of jitter and many other numbers."""
    cfg = AugmentConfig(jitter=1.0, grey=0.1, solarize=(0.3,) * 3, hue=0.5, contrast=0.9)
    views = [p for i in range(n // 10 + 1) for p in draw_views(cfg, 3, 1, i, 50, 60)][:n]
    views = [replace(p, order=ORDERS[i % 24]) for i, p in enumerate(views)]
    return views if blur else [replace(p, sigma=0.0) for p in views]


@pytest.mark.parametrize("c", [3, 1])
def test_every_step_is_pillows_bit_for_bit(backend, c):
    views = [replace(PLAIN, **changes) for changes in SINGLE.values()]
    for h, w in ((37, 51), (1, 1), (2, 64)):
        crop = picture(h, w, c)
        found = ours([crop] * len(views), torch.from_numpy(augment_table(views)), backend)
        for name, p, x in zip(SINGLE, views, found, strict=True):
            assert torch.equal(x, pillow(crop, p).float()), (name, h, w)


@pytest.mark.parametrize("c", [3, 1])
def test_whole_views_without_blur_are_pillows_bit_for_bit(backend, c):
    views = drawn(96)
    crops = [picture(29, 33, c, seed) for seed in range(len(views))]
    found = ours(crops, torch.from_numpy(augment_table(views)), backend)
    expected = torch.stack([pillow(crop, p) for crop, p in zip(crops, views, strict=True)])
    assert torch.equal(found, expected.float())


@needs_native
@pytest.mark.parametrize("hue", [0.1, -0.37])
def test_the_hue_of_all_colours(hue):
    n = np.arange(1 << 24, dtype=np.uint32)
    crop = np.stack([n >> 16, n >> 8 & 255, n & 255], -1).astype(np.uint8).reshape(4096, 4096, 3)
    p = replace(PLAIN, order=(3, 0, 1, 2), factors=(1.0, 1.0, 1.0, hue))
    expected = pillow(crop, p)
    table = torch.from_numpy(augment_table([p]))
    found = ours([crop], table, "cpu", dtype=torch.float16)[0]  # which holds whole numbers to 2048
    assert torch.equal(found.to(torch.uint8), expected)
    part = slice(0, 4096, 64)
    rough = ours([crop[part]], table, "reference")[0]
    assert torch.equal(rough, expected[part].float())


def gaussian(crop, sigma):
    """In float64, by its definition; edges repeated, as far as 3 sigma."""
    x, R = torch.from_numpy(crop).double(), math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-R, R + 1).double() / sigma) ** 2)
    for dim in (0, 1):
        near = torch.arange(x.shape[dim])[:, None] + torch.arange(-R, R + 1)
        neighbours = x.movedim(dim, 0)[near.clamp(0, x.shape[dim] - 1)]  # [n, 2 R + 1, ..]
        x = torch.einsum("nj...,j->n...", neighbours, taps / taps.sum()).movedim(0, dim)
    return x


@pytest.mark.parametrize("c", [3, 1])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.5, 1.3, 2.0, 7.0])
def test_blur_is_the_gaussian(backend, sigma, c):
    for h, w in ((40, 43), (3, 70), (1, 1)):  # some smaller than the radius
        crop = picture(h, w, c)
        found = ours([crop], augment_params(1, sigma=sigma), backend)[0]
        assert (found == found.round()).all()
        assert (found - gaussian(crop, sigma)).abs().max() <= 0.5 + 1e-4


def test_blur_is_near_pillows_boxes(backend):
    for sigma in (0.1, 0.4, 1.0, 2.0):
        crop = picture(64, 96)
        found = ours([crop], augment_params(1, sigma=sigma), backend)[0]
        difference = (found - pillow(crop, replace(PLAIN, sigma=sigma)).float()).abs().mean()
        assert difference <= 1.5, sigma


def test_sigma_ends_at_100(backend):
    crop, params = torch.from_numpy(picture(9, 70)[None]), augment_params(1, sigma=100)
    params_beyond = params.clone()
    params_beyond[0, 10] = math.inf
    assert torch.equal(ours(crop, params, backend), ours(crop, params_beyond, backend))


@needs_native
def test_blurred_views_equal_the_reference_up_to_a_rounding():
    views = drawn(48, blur=True)
    crops = [picture(29, 47, seed=seed) for seed in range(len(views))]
    table = torch.from_numpy(augment_table(views))
    difference = (ours(crops, table, "cpu") - ours(crops, table, "reference")).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("c", [3, 1])
@pytest.mark.parametrize("dtype", augment_module.DTYPES)
def test_normalised_and_rounded_once(backend, dtype, c):
    mean, std = (0.485, 0.456, 0.406)[:c], (0.229, 0.224, 0.225)[:c]
    crops = torch.from_numpy(np.stack([picture(7, 21, c), picture(7, 21, c, 1)]))
    out = augment_crops(crops, augment_params(2, sigma=[0, 1.0]), mean=mean, std=std, dtype=dtype,
                        backend=backend)  # fmt: skip
    blurred = ours(crops, augment_params(2, sigma=[0, 1.0]), backend)
    scale, shift = (torch.tensor(x) for x in reference.affine(mean, std))
    expected = (blurred * scale + shift).to(dtype).permute(0, 3, 1, 2)
    assert torch.equal(out, expected) and out.dtype == dtype
    exact = (blurred.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(out.permute(0, 2, 3, 1).double(), exact, rtol=2**-7, atol=1e-3)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_strides(backend):
    wide = torch.from_numpy(np.stack([picture(20, 90), picture(20, 90, seed=1)]))
    params = augment_params(2, contrast=1.3, hue=0.1, sigma=[0, 0.7], flip=[1, 0])
    for crops in (
        wide[:, 3:17, 5:70],
        wide.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        wide.flip(0)[:, ::2],
        wide[:1].expand(2, -1, -1, -1),
        wide[:, :, 4:5],
        wide[..., 1:2],
    ):
        assert torch.equal(ours(crops, params, backend), ours(crops.clone(), params, backend))
    columns = params.T.contiguous().T
    assert torch.equal(ours(wide, columns, backend), ours(wide, params, backend))


def test_codes_of_the_order(backend):
    """-1 and what is no code are nothing; a step named twice counts once."""
    crop = torch.from_numpy(picture(9, 13)[None])
    params = augment_params(1, order=(2, 0, 1, -1), saturation=0.5, brightness=1.2, contrast=0.8)
    expected = ours(crop, params, backend)
    for order in ((2, 0, 2, 1), (7, 2, 0, 1), (2, 0, 1, 1), (2, -3, 0, 1)):
        params[0, 1:5] = torch.tensor(order)
        assert torch.equal(ours(crop, params, backend), expected), order


def test_no_crops(backend):
    crops = torch.zeros(0, 4, 5, 3, dtype=torch.uint8)
    out = augment_crops(crops, augment_params(0), mean=(0,) * 3, std=(1,) * 3, backend=backend)
    assert out.shape == (0, 3, 4, 5)


@needs_native
def test_bits_do_not_depend_on_the_thread_count():
    views = drawn(17, blur=True)
    crops = torch.from_numpy(np.stack([picture(40, 40, seed=s) for s in range(17)]))
    table = torch.from_numpy(augment_table(views))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ours(crops, table, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(found, results[0]) for found in results)
    alone = torch.cat([ours(crops[b : b + 1], table[b : b + 1], "cpu") for b in range(17)])
    assert torch.equal(alone, results[0])


class InWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return ours([picture(40, 40)] * 3, augment_params(3, hue=0.1, sigma=1.0), "cpu")


@needs_native
def test_inside_a_forked_worker():
    torch.set_num_threads(2)
    expected = InWorker()[0]  # starts the thread pool in the parent
    torch.set_num_threads(1)
    for found in DataLoader(InWorker(), num_workers=1, batch_size=None, timeout=30):
        assert torch.equal(found, expected)


def test_params_are_the_columns_and_equal_the_table_of_drawn_views():
    views = drawn(24, blur=True)
    b, c, s, h = zip(*(p.factors for p in views), strict=True)
    params = augment_params(
        24, flip=[p.flip for p in views], order=[p.order for p in views], brightness=b, contrast=c,
        saturation=s, hue=h, grey=[p.grey for p in views], sigma=[p.sigma for p in views],
        solarize=torch.tensor([p.solarize for p in views]),
    )  # fmt: skip
    assert torch.equal(params, torch.from_numpy(augment_table(views)))
    assert params.shape == (24, len(augment_module.AUGMENT_COLUMNS))
    for hue in np.linspace(-0.5, 0.5, 511):  # every byte and its ends
        assert int(float(augment_params(1, hue=hue)[0, 8]) * 255) == int(hue * 255)
    assert augment_params(1)[0, 8] == 0


@needs_native
def test_opcheck_and_compiles_whole():
    crops = torch.from_numpy(np.stack([picture(9, 13)] * 2))
    params = augment_params(2, hue=0.1, sigma=[0, 1.0])
    numbers = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    arguments = crops, params, *numbers, torch.bfloat16, "cpu"
    torch.library.opcheck(augment_module._augment, arguments)
    counter = CompileCounterWithBackend("aot_eager")

    def normal(crops, params):
        return augment_crops(crops, params, mean=numbers[0], std=numbers[1]) * 2

    compiled = torch.compile(normal, backend=counter, fullgraph=True)
    assert torch.equal(compiled(crops, params), normal(crops, params))
    assert compiled(crops, params).stride() == normal(crops, params).stride()
    assert counter.frame_count == 1


def test_explain_and_reasons(monkeypatch):
    crops, numbers = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), {"mean": [0] * 3, "std": [1] * 3}
    lines = explain("augment_crops", crops, augment_params(1), **numbers).splitlines()
    assert lines[0].startswith("triton: it takes tensors on a GPU")
    assert lines[-1].startswith("reference: ")
    monkeypatch.setattr(cpu, "native", None)
    with pytest.raises(RuntimeError, match="native module was not built"):
        augment_crops(crops, augment_params(1), backend="cpu", **numbers)
    assert augment_crops(crops, augment_params(1), **numbers).shape == (1, 3, 2, 2)
    assert "on meta" in cpu.augment_why_not(crops.to("meta"))


def test_bad_input():
    crops, params = torch.zeros(2, 4, 5, 3, dtype=torch.uint8), augment_params(2)
    good = {"crops": crops, "params": params, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    wrong = {
        r"crops must be uint8 \[B, H, W, C\], got torch.float32 of": {"crops": crops.float()},
        r"got torch.uint8 of shape \[4, 5, 3\]": {"crops": crops[0]},
        r"C of 1 or 3 .* got \[2, 3, 4, 5\]; they look like \[B, C, H, W\]: permute\(0, 2, 3, 1\)":
            {"crops": crops.permute(0, 3, 1, 2)},
        r"C of 1 or 3 and a pixel at least, got \[2, 0, 5, 3\]": {"crops": crops[:, :0]},
        r"params must be float32 \[B, 12\] = \[2, 12\], a row a crop .* got torch.float32 of shape "
        r"\[1, 12\]": {"params": params[:1]},
        r"got torch.float64 of shape \[2, 12\]": {"params": params.double()},
        "params must be on cpu like crops, got meta": {"params": params.to("meta")},
        "mean and std must have a number a channel, 3, got 1 and 3": {"mean": [0.5]},
        "std must be above 0, got": {"std": (0.2, 0.0, 0.2)},
        "dtype must be float32, bfloat16 or float16, got torch.float64": {"dtype": torch.float64},
    }  # fmt: skip
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            augment_crops(**(good | change))
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        augment_crops(**good, backend="cuda")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"hue must be from -0.5 to 0.5, got 0.6", {"hue": 0.6}),
        (r"sigma must be from 0 to 100.0, got \[1.0, nan\]", {"sigma": [1.0, math.nan]}),
        (r"brightness must be a number or 2, got \[3\]", {"brightness": [1, 1, 1]}),
        (r"grey must be from 0 to 1, got 2", {"grey": 2}),
        (r"order must be \[4\] or \[2, 4\], got \[3\]", {"order": (0, 1, 2)}),
        (r"each of 0, 1, 2, 3 once at most", {"order": (0, 1, 1, 2)}),
        (r"order holds -1 for none", {"order": (0, 1, 2, 4)}),
    ],
)
def test_bad_params(message, change):
    with pytest.raises(ValueError, match=message):
        augment_params(2, **change)


@needs_native
def test_the_flat_call_refuses_what_would_crash():
    for sizes, scale in (((1, 2, 2, 2), [1.0] * 2), ((1, 2, 2, 3), [1.0]), ((1, 0, 2, 1), [1.0])):
        with pytest.raises(ValueError, match="one or three channels"):
            cpu.native.augment_crops((0, 1, 1), sizes, 0, scale, scale, 0, 0, 1, "")
