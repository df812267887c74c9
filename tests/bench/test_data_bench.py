"""bench/data.py: its pictures, that every form makes batches, and what its rows hold."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from bench import augment, data, data_parts, pictures, timing
from bench.baseline.augmentation import MEAN, STD, Official, Tensors
from bench.report.data import _levels
from mokd_fast.data import AugmentConfig, decode, draw_views, normalize, open_source, render

PLAIN = {"jitter": 0.0, "flip": 0.0, "grey": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}
SMALL = AugmentConfig(global_size=32, local_size=16, locals=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(load_sample_images().images):
        augment.Image.fromarray(image).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    return pictures.make(8, photos, tmp_path_factory.mktemp("cache"))


def test_the_same_pictures_each_time(folder, photos, tmp_path):
    files = sorted(folder.rglob("*.jpg"))
    again = sorted(pictures.make(8, photos, tmp_path).rglob("*.jpg"))
    assert len(files) == 8 and len({file.read_bytes() for file in files}) == 8
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    assert {augment.Image.open(file).size for file in files} == {(500, 375)}
    stamp = again[0].stat().st_mtime_ns
    pictures.make(8, photos, tmp_path)
    assert again[0].stat().st_mtime_ns == stamp


def test_without_photographs_scikit_learns_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "BACKGROUNDS", tmp_path / "none")
    assert pictures.make(2, None, tmp_path).name == "2-of-2-in-images"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="--photos, or on Debian: apt install"):
        pictures.make(3, None, tmp_path)


def test_photographs_that_will_not_do(tmp_path):
    with pytest.raises(SystemExit, match="--photos, or on Debian: apt install"):
        pictures.make(8, tmp_path, tmp_path)
    augment.Image.new("RGB", (640, 200)).save(tmp_path / "flat.jpg")
    with pytest.raises(SystemExit, match=r"flat.jpg: 640 x 200, must be 500 x 375 or more"):
        pictures.make(8, tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["flat.jpg"]


@pytest.mark.parametrize("change", [{}, {"flip": 1.0}, {"grey": 1.0}, {"blur": (1.0,) * 3},
                                    {"solarize": (1.0,) * 3}])  # fmt: skip
def test_the_baselines_do_what_pillow_does(change, folder):
    """Whole pictures and probabilities of 0 or 1 leave nothing to chance."""
    whole = {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    sizes = {"global_size": 224, "local_size": 96, "locals": 1, "blur_sigma": (1.5, 1.5)}
    cfg = AugmentConfig(**{**whole, **sizes, **PLAIN, **change})
    image = decode(open_source(folder).read(0), 3)
    want = render(image, draw_views(cfg, 0, 0, 0, 375, 500), cfg)
    found = zip(Official(cfg)(image), Tensors(cfg)(image), want, strict=True)
    for official, tensors, pixels in found:
        expected = normalize(torch.from_numpy(pixels.copy()), MEAN, STD)
        assert official.shape == tensors.shape == expected.shape
        torch.testing.assert_close(official, expected, atol=1e-5, rtol=0)
        assert (tensors - expected).abs().mean() < 1.5 / (255 * min(STD))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_forms_make_batches(workers, folder):
    made = {name: list(form(0, 3)) for name, form in data.forms(folder, SMALL, 2, workers).items()}
    assert {"official", "torchvision v2", "pillow", "pillow + augment_crops", "cpu"} <= set(made)
    for name, batches in made.items():
        assert len(batches) == 3, name
        for batch in batches:
            assert sum(x.numel() for x in batch) == 2 * 3 * (2 * 32**2 + 2 * 16**2), name
            assert all(x.dtype == torch.float32 for x in batch), name
    pillow = made.pop("pillow")
    for name in set(made) - {"official", "torchvision v2"}:
        for x, y in zip(pillow, made[name], strict=True):
            off = (x[0] - y[0]).abs().mean()
            assert off < 1.5 / (255 * min(STD)), name


def test_rows(folder):
    random.seed(0)
    forms = data.forms(folder, SMALL, 2, 0)
    rows = data.speed({name: forms[name] for name in ("official", "cpu")}, 2, 2, rounds=2)
    assert [row["backend"] for row in rows] == ["official", "cpu"]
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1
    for row in rows:
        for key in ("", "cpu_"):
            low, high = row[f"{key}range_s"]
            assert 0 < low <= row[f"{key}median_s"] <= high


def test_memory(folder):
    peaks = data.memory("cpu", folder, 4, 2)
    assert peaks["peak_bytes"] > 2**26 and peaks["worker_peak_bytes"] > 2**24


def test_processor_time_counts_processes_that_ended():
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    run = [sys.executable, "-S", "-c", burn]
    times = timing.interleave({"a": lambda: subprocess.run(run, check=True)}, rounds=1)
    assert 0.2 <= times.cpu["a"][0] < 0.6 and len(times.turns["a"]) == 1


def test_parts(folder, monkeypatch):
    monkeypatch.setenv("MOKD_FAST_CACHE", "mine")
    index = data_parts.index_pass(folder, 0)
    assert 0 < index["again_s"] < index["first_s"] and index["pictures"] == 8
    assert data_parts.os.environ["MOKD_FAST_CACHE"] == "mine"
    parts = data_parts.breakdown(folder, 1, 2)
    assert set(parts) == {"read", "decode", "draw", "resize", "collect", "augment"}
    assert all(ms > 0 for ms in parts.values())


def test_parity_is_that_of_the_promise(folder):
    rows = data_parts.parity(folder, 2)
    assert [row["operation"] for row in rows[:2]] == ["crop", "brightness"] and len(rows) == 20
    for row in rows:
        kinds = ["same crops"] * (row["operation"] != "crop") + data_parts.loaders()
        for kind in kinds:
            assert row[kind]["mean"] <= (1.0 if row["operation"] == "grey" else 1.5), row
        if row["operation"] == "solarize":
            assert row["same crops"]["max"] == 0


def test_the_readme_tells_the_levels():
    row = {"cpu": {"mean": 0.5, "p99": 1.0, "worst_crop": 0.75, "max": 3.0}}
    exact = {"cpu": dict.fromkeys(row["cpu"], 0.0)}
    assert _levels([row, exact], "cpu") == "0.250, 1, 0.75"
    assert _levels([exact], "cpu") == "0" and _levels([row], "dali") == ""
    off = augment.differences(torch.zeros(2, 1, 2, 3), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1))
    assert off == {"mean": 1.5, "p99": 3.0, "worst_crop": 3.0, "max": 3.0}
    assert np.isfinite(list(off.values())).all()
