"""The parts of a picture plate, pixel by pixel."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from mokd_fast.report.pictures import principal_colours
from mokd_fast.report.strips import cell, heat, strip

SIDE = 128


def test_a_small_picture_keeps_its_pixels_and_its_aspect():
    pixels = np.array([[[10], [200]], [[30], [90]], [[0], [255]], [[1], [2]]], np.uint8)
    found = np.asarray(cell(pixels))
    assert found.shape == (SIDE, SIDE, 3)
    edge = np.concatenate([found[[0, -1], 32:96].ravel(), found[:, [32, 95]].ravel()])
    assert (edge == 0x99).all(), "or a white picture would run into the gaps"
    assert (found[:, :32] == 255).all() and (found[:, 96:] == 255).all()  # white beside it
    assert (found[16::32, 48::32][:, :2] == pixels).all()
    assert np.unique(found[1:-1, 33:95]).tolist() == [0, 1, 2, 10, 30, 90, 200, 255]


def test_a_maps_cell_has_the_aspect_of_its_view():
    found = np.asarray(cell(np.zeros((3, 3, 1), np.uint8), shape=(20, 40)))
    assert (
        (found[33:95, 1:-1] == 0).all() and (found[:32] == 255).all() and (found[96:] == 255).all()
    )


def test_boxes_are_seen_on_black_and_on_white():
    for tone in (0, 255):
        flat = np.full((64, 64, 3), tone, np.uint8)
        plain = np.asarray(cell(flat))[:, :, 0]
        solid = np.asarray(cell(flat, [(0.25, 0.25, 0.75, 0.75)]))[:, :, 0] != plain
        rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
        for found in (rows, columns):
            assert abs(found[0] - 32) <= 3 and abs(found[-1] - 95) <= 3
        assert not solid[40:88, 40:88].any()
        whole = (0.0, 0.0, 1.0, 1.0)
        dashed = np.asarray(cell(flat, [whole, (0.25, 0.25, 0.75, 0.75)]))[:, :, 0] != plain
        edge = dashed[34, 40:88] | dashed[33, 40:88] | dashed[32, 40:88]
        assert 0.2 < edge.mean() < 0.9, "a dashed line has gaps"


def test_even_attention_is_one_medium_tone_and_a_peak_is_brighter():
    even = heat(torch.full((6,), 1 / 6), (2, 3)).astype(int).sum(axis=2)
    noise = heat(torch.tensor([0.17, 0.16, 0.17, 0.16, 0.17, 0.17]), (2, 3)).astype(int).sum(axis=2)
    peak = heat(torch.tensor([0.0, 0.9, 0.1, 0, 0, 0]), (2, 3)).astype(int).sum(axis=2)
    assert even.shape == (2, 3) and len(np.unique(even)) == 1
    assert abs(noise - even).max() < 40
    assert peak[0, 0] < peak[0, 2] < even[0, 0] < peak[0, 1]


def test_a_strip_is_a_row_of_cells_no_wider_than_the_page():
    cells = [cell(np.full((4, 4, 1), tone, np.uint8)) for tone in range(0, 220, 20)]
    for count, width in ((3, 3 * 136 - 8), (11, 900)):
        found = strip("label", cells[:count])
        data = base64.b64decode(found.uri.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).width == width and found.cells == count


def test_principal_colours_follow_the_features():
    torch.manual_seed(0)
    tokens = torch.randn(2, 8, 10) * 0.01
    tokens[:, :4, 3] += 5.0  # the first component parts the first half from the rest
    colours = principal_colours(tokens)
    assert colours.shape == (2, 8, 3) and colours.dtype == torch.uint8
    assert (colours[:, :4, 0] > 200).all() and (colours[:, 4:, 0] < 55).all()
    assert torch.equal(
        principal_colours(tokens[:, :, :1])[:, :, 1:], torch.full((2, 8, 2), 128).byte()
    )
