"""The pointing score, with heads whose attention is known."""

import numpy as np
import pytest
import torch
from torch import nn

from mokd_fast import UserError
from mokd_fast.data import AugmentConfig, ViewLoader, draw_views, open_source, render
from mokd_fast.data.pillow import Image
from mokd_fast.evaluate.attention import search_attention
from mokd_fast.evaluate.pointing import (
    box_in_view,
    footprint,
    overlap,
    pointing,
    pointing_scores,
    sample_crops,
    search_crops,
    summarise,
)
from mokd_fast.nn import MOKD, MLPHead, Model, THead
from tests.train.recipes import pictures

PLAIN = AugmentConfig(
    global_size=32, local_size=16, locals=2, global_scale=(0.6, 1.0), local_scale=(0.05, 0.12),
    jitter=0, grey=0, blur=(0, 0, 0), solarize=(0, 0, 0),
)  # fmt: skip
SCALE = {"channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize("seed", range(6))
def test_footprint_is_where_the_rendered_view_shows_the_crop(seed):
    """Of a picture that is white inside the crop alone, the view's cells average to the cover."""
    augment = PLAIN.model_copy(update={"global_size": 256, "local_scale": (0.2, 0.5)})
    box, view = (draw_views(augment, seed, 0, 3, 300, 400)[v] for v in (2, 0))
    picture = np.zeros((300, 400), np.uint8)
    picture[box.top : box.top + box.height, box.left : box.left + box.width] = 255
    seen = torch.from_numpy(render(Image.fromarray(picture), [view], augment)[0].copy()) / 255
    cells = seen.reshape(4, 64, 8, 32).mean(dim=(1, 3)).flatten()
    cover = footprint(box, view, (4, 8))
    torch.testing.assert_close(cover, cells, atol=0.02, rtol=0)
    share = overlap(box, view) / (view.height * view.width)
    assert cover.mean() == pytest.approx(share, abs=1e-6)
    assert all(0 <= side <= 1 for side in box_in_view(box, view))


def test_scores_of_known_attention():
    cover = torch.tensor([1.0, 0.5, 0.0, 0.0])
    even, inside, outside = torch.full((4,), 0.25), torch.eye(4)[0], torch.eye(4)[3]
    found = pointing_scores(torch.stack([even, inside, outside]), cover)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 0.375, 0.0]))


def still_head(dim: int, grid: tuple[int, int], sharpness: float, depth: int = 2) -> THead:
    """A T-Head whose blocks change nothing and whose attention is softmax(sharpness * q . k)."""
    head = THead(dim, 4, dim=dim, grid=grid, stem=False, depth=depth, heads=1)
    nn.init.zeros_(head.pos_embed)
    for block in head.blocks:
        block.norm1 = nn.Identity()
        eye = torch.eye(dim)
        block.attn.qkv.weight.data = torch.cat([eye * sharpness * dim**0.5, eye, eye * 0])
        nn.init.zeros_(block.attn.qkv.bias)
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return head


@torch.no_grad()
def test_a_query_that_is_one_token_points_at_it():
    head = still_head(6, (2, 3), 30.0)
    tokens = torch.eye(6)[None]
    found = search_attention(head, tokens, (2, 3), torch.eye(6)[[4, 1]][:, None] * 2)
    assert found.shape == (2, 2, 1, 1, 6)
    expected = torch.eye(6)[[4, 1]].expand(2, 2, 6)
    torch.testing.assert_close(found[:, :, 0, 0], expected, atol=1e-4, rtol=0)


class Places(nn.Module):
    """A backbone that knows where it is in the gradient pictures below: [B, 4, h, w]."""

    num_features = 4

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.unused = nn.Parameter(torch.zeros(1))

    def forward_features(self, x):
        turn = nn.functional.avg_pool2d(x[:, :2], self.stride) * 3
        return torch.cat([turn.cos(), turn.sin()], dim=1)

    def forward_head(self, y, pre_logits):
        return y.mean(dim=(2, 3))


@pytest.fixture
def gradients(tmp_path):
    """Pictures whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[0:60, 0:80]
    picture = np.stack([columns * 3, rows * 4, 0 * rows], axis=2).astype(np.uint8)
    for i in range(60):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    return open_source(tmp_path)


def pair(sharpness: float) -> MOKD:
    def models():
        return [
            Model(Places(stride), MLPHead(4, 8, hidden=8, bottleneck=4),
                  still_head(4, (32 // stride,) * 2, sharpness))
            for stride in (4, 8)
        ]  # fmt: skip

    return MOKD(models(), models(), prototypes=8)


def test_a_pair_that_knows_its_place_scores_and_one_that_looks_everywhere_does_not(gradients):
    knows = pointing(pair(40.0), gradients, PLAIN, limit=50, **SCALE)
    assert knows["crops"] == 50 and set(knows["directions"]) == {"1->2", "2->1"}
    for found in knows["directions"].values():
        assert [block["reaches_output"] for block in found["blocks"]] == [True, False]
        for block in found["blocks"]:
            assert found["best"] > block["own"]["mean"] > 3
            assert block["random"]["mean"] < 2
            assert block["difference"]["mean"] > 5 * block["difference"]["ci95"] > 0
    even = pointing(pair(0.0), gradients, PLAIN, limit=50, **SCALE)
    for found in even["directions"].values():
        for block in found["blocks"]:
            assert block["own"]["mean"] == pytest.approx(1, abs=1e-5)
            assert block["difference"]["mean"] == pytest.approx(0, abs=1e-6)


def test_summary_is_the_mean_with_its_interval(gradients):
    crops = sample_crops(gradients, PLAIN, channels=3, limit=20)
    found = search_crops(pair(2.0), 0, crops, mean=SCALE["mean"], std=SCALE["std"], batch=7)
    own = pointing_scores(found.attention[0, :, 0], found.covers).double().numpy()
    control = pointing_scores(found.control[0, :, 0], found.covers).double().numpy()
    block = summarise([found], crops)["directions"]["1->2"]["blocks"][0]
    for name, values in (("own", own), ("random", control), ("difference", own - control)):
        assert block[name]["mean"] == pytest.approx(values.mean(), abs=1e-6)
        error = 1.96 * values.std(ddof=1) / 20**0.5
        assert block[name]["ci95"] == pytest.approx(error, abs=1e-6)


def test_crops_are_those_of_the_training(gradients):
    """The very bits that the loader gives for the first epoch."""
    augment = PLAIN.model_copy(update={"jitter": 0.8, "blur": (1.0, 0.1, 0.5)})
    crops = sample_crops(gradients, augment, channels=3, seed=5, limit=100)
    batch = next(ViewLoader(gradients, augment, batch=60, channels=3, seed=5, workers=0).batches())
    place = {int(i): b for b, i in enumerate(batch.index)}
    assert batch.locals is not None and crops.left_out >= 1  # the broken one
    found = [(p, i) for p, i in enumerate(crops.pictures) if i in place]
    assert len(found) >= 50  # the loader's last place is another picture's for the broken one
    for p, i in found:
        assert torch.equal(crops.asking[p], batch.locals[0, place[i]])
        assert torch.equal(crops.asked[p], batch.globals[0, place[i]])


def test_without_local_crops_view_1_asks_view_2(gradients):
    crops = sample_crops(gradients, PLAIN.model_copy(update={"locals": 0}), channels=3, limit=4)
    assert crops.asking.shape == crops.asked.shape == (4, 32, 32, 3)
    assert not torch.equal(crops.asking, crops.asked)


def test_what_cannot_be_scored_says_so(tmp_path, gradients):
    alone = MOKD(pair(1.0).students[:1], pair(1.0).teachers[:1], prototypes=8)
    with pytest.raises(UserError, match="one model alone"):
        pointing(alone, gradients, PLAIN, **SCALE)
    with pytest.raises(UserError, match="of 1 pictures gives a crop"):
        sample_crops(open_source(pictures(tmp_path / "one", 1)), PLAIN, channels=3)
