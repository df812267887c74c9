"""bench/augment.py: every form makes the same views, and its rows hold what the README reads."""

import torch

from bench import augment, augment_gpu, gpu_check
from mokd_fast.ops import cpu


def crops():
    return augment.Crops(augment.photographs(None), "local", 1, 24)


def test_a_row_of_each_kind():
    row = augment.speed(crops(), "local", 1, rounds=1, copy_rate=1e10)
    names = {"cpu", "cpu bfloat16", "pillow", "torchvision v2", "reference"}
    assert set(row["seconds"]) == names and all(s > 0 for s in row["seconds"].values())
    assert row["ratio"] > 0 and 0 < row["floor_fraction"] < 1
    assert row["shape"] == {"view": "local", "B": 8, "side": 24}


def test_the_forms_make_the_same_batch():
    runs = augment.forms(crops(), threads=2)
    pillow, *others = (runs[name]() for name in ("pillow", "cpu", "reference", "torchvision v2"))
    level = 1 / (255 * min(augment.STD))
    for found in others:
        assert found.shape == pillow.shape == (8, 3, 24, 24)
        assert (found - pillow).abs().mean() < 1.5 * level
    assert torch.equal(runs["cpu bfloat16"](), runs["cpu"]().bfloat16())


def test_parity_is_that_of_the_promise():
    rows = augment.parity(crops())
    assert [row["operation"] for row in rows] == [
        *("brightness", "contrast", "saturation", "hue", "jitter", "grey", "blur", "solarize"),
        "whole view",
    ]
    for row in rows:
        blurred = row["operation"] in ("blur", "whole view")
        assert row["cpu"]["mean"] <= (1.5 if blurred else 0.0), row
        assert row["torchvision v2"]["mean"] < 5


def test_the_check_for_gpus_notices_wrong_kernels(monkeypatch, capsys):
    monkeypatch.setenv("MOKD_FAST_BACKEND", "cpu")  # `passes` sets it, and is undone with this
    real = cpu.augment_crops
    at = gpu_check.Where("cpu", "cpu", small=True)
    wrong = {
        "a level": lambda *args: real(*args) + 1 / 255,
        "a row of params": lambda crops, params, *rest: real(crops, params.flip(0), *rest),
        "the blur": lambda crops, params, *rest: real(crops, no_blur(params), *rest),
    }
    for what, kernel in wrong.items():
        monkeypatch.setattr(cpu, "augment_crops", kernel)
        assert not gpu_check.passes(augment_gpu.augmented, at), what
    assert "FAIL cpu augmented" in capsys.readouterr().out


def no_blur(params):
    params = params.clone()
    params[:, 10] = 0
    return params


def test_a_row_for_a_gpu():
    row = augment_gpu.measure("local", 1, torch.bfloat16, "cpu", 1)
    assert row["shape"] == {"view": "local", "B": 8, "side": 96} and row["eager_s"] > 0
    assert row["floor_bytes"] == 8 * 96 * 96 * 3 * 3 < row["moved_bytes"]
    assert 0 < row["floor_fraction"] < row["moved_fraction"]
