"""Extraction: order, crops, shifts, one reading for all models, labels and broken files."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mokd_fast.errors import UserError
from mokd_fast.evaluate import Pictures, extract, pixels
from mokd_fast.evaluate.draws import shift_of
from mokd_fast.evaluate.pictures import resize_and_crop, translate

GREY = {"channels": 1, "mean": (0.0,), "std": (1.0,)}
SAME = {"size": 12, "resize": 12, **GREY}


def test_features_stand_in_the_order_of_the_source(squares, generators_untouched):
    source = squares(7)
    features, labels = extract(
        {"a": pixels, "mean": lambda x: x.mean((2, 3))}, source, batch=3, **SAME
    )
    expected = torch.from_numpy(np.stack(source.pictures)).flatten(1) / 255
    torch.testing.assert_close(features["a"], expected)
    torch.testing.assert_close(features["mean"], expected.mean(1, keepdim=True))
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and labels.dtype == torch.int64
    assert source.reads == list(range(7))  # once, for both models


def test_normalised_by_mean_and_std(array_source):
    source = array_source([np.full((4, 4, 3), (255, 0, 51), np.uint8)], [0])
    options = {"size": 4, "resize": 4, "mean": (0.5, 0.5, 0.0), "std": (0.5, 0.25, 0.1)}
    features, _ = extract({"m": lambda x: x.mean((2, 3))}, source, **options)
    torch.testing.assert_close(features["m"], torch.tensor([[1.0, -2.0, 2.0]]))


def test_workers_change_nothing(squares, generators_untouched):
    source = squares(23)
    alone = extract({"a": pixels}, source, shift=3, batch=5, **SAME)
    helped = extract({"a": pixels}, source, shift=3, batch=5, workers=2, **SAME)
    assert torch.equal(alone[0]["a"], helped[0]["a"]) and torch.equal(alone[1], helped[1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("wh", [(40, 40), (61, 40), (33, 90), (20, 25), (49, 98)])
@pytest.mark.parametrize(("size", "resize"), [((28, 28), 32), ((24, 17), 24), ((28, 28), 28)])
def test_resize_and_crop_is_torchvisions(mode, wh, size, resize):
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*wh[::-1], 3), dtype=np.uint8)).convert(mode)
    bicubic = transforms.InterpolationMode.BICUBIC
    chain = [transforms.Resize(resize, bicubic), transforms.CenterCrop(size)]
    expected = np.asarray(transforms.Compose(chain)(picture))
    found = resize_and_crop(picture, size, resize)
    assert found.shape == (*size, 1 if mode == "L" else 3) and found.dtype == np.uint8
    assert np.array_equal(found.squeeze(-1) if mode == "L" else found, expected)


def test_a_crop_larger_than_resize_enlarges_and_does_not_pad():
    picture = Image.new("L", (10, 20), 200)
    assert (resize_and_crop(picture, (30, 40), 8) == 200).all()


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (3, -2), (-1, 4), (-5, -5), (2, 0)])
def test_translate_is_slicing_a_padded_picture(dy, dx):
    picture = np.random.default_rng(0).integers(1, 256, (6, 7, 3), dtype=np.uint8)
    padded = np.pad(picture, ((5, 5), (5, 5), (0, 0)))
    expected = padded[5 - dy : 11 - dy, 5 - dx : 12 - dx]
    assert np.array_equal(translate(picture, dy, dx), expected)


def test_shifted_pictures_are_the_clean_ones_moved(squares):
    source = squares(30)
    options = {"size": 12, "resize": 12, "channels": 1}
    clean, moved = Pictures(source, **options), Pictures(source, shift=4, seed=7, **options)
    amounts = [shift_of(7, i, 4) for i in range(30)]
    assert len(set(amounts)) > 15
    for i, (dy, dx) in enumerate(amounts):
        padded = np.pad(clean[i][0].numpy()[..., 0], 4)
        expected = padded[4 - dy : 16 - dy, 4 - dx : 16 - dx]
        assert np.array_equal(moved[i][0].numpy()[..., 0], expected)


def test_shift_is_uniform_and_depends_on_seed_and_position_alone(squares):
    amounts = np.array([shift_of(0, i, 2) for i in range(2000)])
    for axis in (0, 1):
        counts = np.bincount(amounts[:, axis] + 2, minlength=5)
        assert len(counts) == 5 and counts.min() > 320 and counts.max() < 480  # 400 +- 4.5 sigma
    assert abs(np.corrcoef(amounts.T)[0, 1]) < 0.1
    source, options = squares(20), {"size": 12, "resize": 12, "channels": 1, "shift": 4}
    whole, part = Pictures(source, **options), Pictures(source, limit=5, **options)
    for position, i in enumerate(part.index):
        assert torch.equal(part[position][0], whole[i][0])  # a limit moves no picture otherwise
    other = Pictures(source, seed=1, **options)
    assert any(not torch.equal(other[i][0], whole[i][0]) for i in range(20))


def test_every_model_sees_the_same_shifts(squares):
    features, _ = extract({"a": pixels, "b": pixels}, squares(9), shift=4, batch=4, **SAME)
    assert torch.equal(features["a"], features["b"])
    one, _ = extract({"b": pixels}, squares(9), shift=4, batch=9, **SAME)
    assert torch.equal(features["a"], one["b"])


def test_limit_is_a_random_choice_in_order(array_source):
    pictures = [np.full((4, 4), i, np.uint8) for i in range(100)]
    source = array_source(pictures, [i // 50 for i in range(100)])  # class by class, as in folders
    options = {"size": 4, "resize": 4, **GREY}
    features, labels = extract({"a": pixels}, source, limit=40, **options)
    chosen = (features["a"][:, 0] * 255).round().int().tolist()
    assert chosen == sorted(set(chosen)) == source.reads and len(chosen) == 40
    assert labels.tolist() == [i // 50 for i in chosen] and 10 < int(labels.sum()) < 30
    assert len(extract({"a": pixels}, source, limit=1000, **options)[1]) == 100


def test_broken_files_are_left_out_named_and_counted(squares, caplog):
    source = squares(6)
    good, labels = extract({"a": pixels}, source, **SAME)
    source.pictures[0] = source.pictures[3] = source.pictures[4] = None
    with caplog.at_level(logging.WARNING):
        found, kept = extract({"a": pixels}, source, batch=1, **SAME)
    left = [1, 2, 5]
    assert torch.equal(found["a"], good["a"][left]) and torch.equal(kept, labels[left])
    assert "picture3.png" in caplog.text and "3 of 6 pictures" in caplog.text
    source.pictures = [None] * 6
    with pytest.raises(UserError, match=r"none of the 6 .*picture0\.png"):
        extract({"a": pixels}, source, **SAME)


def test_unlabelled_pictures_are_refused_with_the_way_out(array_source):
    source = array_source([np.zeros((4, 4), np.uint8)], [-1], classes=())
    with pytest.raises(UserError, match=r"picture0\.png.*folder of its own: root/CLASS/"):
        extract({"a": pixels}, source, size=4, resize=4, **GREY)
    with pytest.raises(UserError, match="no picture"):
        extract({"a": pixels}, array_source([], []), size=4, resize=4, **GREY)


class Watcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(1)
        self.norm.eval()  # frozen
        self.seen = set()

    def forward(self, x):
        self.seen.add((self.training, self.drop.training, torch.is_grad_enabled()))
        return self.norm(self.drop(x)).flatten(1)


def test_modules_run_in_eval_mode_and_get_their_modes_back(squares):
    model = Watcher().train()
    model.norm.eval()
    extract({"m": model}, squares(3), **SAME)
    assert model.seen == {(False, False, False)}
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)

    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        extract({"m": model, "broken": broken}, squares(3), **SAME)
    assert (model.training, model.drop.training, model.norm.training) == (True, True, False)


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: (x, x), lambda x: x.flatten(1)[:1]])
def test_features_of_another_shape_are_refused(squares, wrong):
    with pytest.raises(ValueError, match=r"model 'w' must give features \[3, D\]"):
        extract({"w": wrong}, squares(3), **SAME)


def test_bad_numbers_are_refused(squares):
    for bad in ({"shift": 12}, {"shift": -1}, {"limit": 0}, {"channels": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            extract({"a": pixels}, squares(3), **{**SAME, **bad})


def test_control_averages_large_pictures():
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = x.view(2, 3, 32, 7, 32, 7).mean((3, 5)).flatten(1)
    torch.testing.assert_close(pixels(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pixels(x[..., :28, :32]), x[..., :28, :32].flatten(1))
    assert pixels(x[..., :20, :64]).shape == (2, 3 * 20 * 32)


def test_progress_reaches_the_end(squares):
    calls = []
    extract({"a": pixels}, squares(7), batch=3, progress=lambda *c: calls.append(c), **SAME)
    assert calls == [(3, 7), (6, 7), (7, 7)]
