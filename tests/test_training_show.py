"""How what was taught is judged, and the memory that teaching takes, against closed forms."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import drawings, grammar  # noqa: F401  (fixtures)
from torch import nn
from torch.nn import functional as F

from training import emoji, memory, scenes, show


def edges_at(*columns):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, list(columns)] = 255
    return image


@pytest.mark.parametrize("asked, drawn, precision, recall", [
    ([20], [20], 1, 1), ([20], [22], 1, 1), ([20], [23], 0, 0), ([20, 40], [21], 1, 0.5), ([20], [21, 50], 0.5, 1),
    ([20], [], 0, 0)])
def test_edges_count_within_two_pixels(monkeypatch, asked, drawn, precision, recall):
    monkeypatch.setattr(show, "canny", lambda image: image)
    assert show.compare_edges(edges_at(*asked), edges_at(*drawn)) == (precision, recall)


def judge(drawings):  # noqa: F811
    room = object.__new__(show.Class)  # without a model
    room.drawings, room.features = drawings, show.cut_drawings(drawings.rgba)
    return room


@pytest.mark.parametrize("background", ["white", "sky blue", "purple"])
def test_the_judge_knows_a_drawing_however_it_is_placed(drawings, background):  # noqa: F811
    room = judge(drawings)
    rows, images = [0, len(drawings.rgba) - 1], []
    for k, row in enumerate(rows):
        picture = Image.new("RGB", (128, 128), emoji.COLOURS[background])
        scenes.paste(random.Random(k), picture, drawings.rgba[row].numpy(), 0.45, 0.55, 0.7, flip=k == 1)
        images.append(np.asarray(picture))
    assert room.see(images) == [(drawings.concepts[drawings.concept[row]], background) for row in rows]


def test_the_judge_of_one_style_looks_at_its_drawings_alone(drawings):  # noqa: F811
    room = judge(drawings)
    row = int((drawings.style == 0).nonzero()[0])
    image = Image.new("RGB", (128, 128), "white")
    scenes.paste(random.Random(0), image, drawings.rgba[row].numpy(), 0.5, 0.5, 0.7, flip=False)
    assert room.rank([np.asarray(image)] * 3, drawings.concepts[drawings.concept[row]]) == 1
    assert room.rank([np.asarray(image)], drawings.concepts[drawings.concept[-1]]) > 1
    for style in (0, 1):
        (concept, _), = room.see([np.asarray(image)], drawings.styles[style])
        has_style = drawings.concept[drawings.style == style]
        assert drawings.concepts.index(concept) in has_style
        assert style or concept == drawings.concepts[drawings.concept[row]]


@pytest.mark.parametrize("colour, share, expected", [
    ((0, 0, 0), 1, True), ((90, 60, 40), 1, True), ((200, 30, 30), 0, True), ((200, 30, 30), 0.04, True),
    ((200, 30, 30), 0.1, False)])
def test_ink_has_no_colours(colour, share, expected):
    image = np.full((100, 100, 3), 255, np.uint8)
    image[20:70, 20:70] = 10
    if share:
        image[20 : 20 + round(50 * share), 20:70] = colour
    assert show.is_ink(image) == expected
    assert not show.is_ink(np.full((8, 8, 3), 255, np.uint8))


def test_what_a_forward_pass_keeps():
    """A linear layer keeps what it is given, and so does silu; weights are not counted, nor anything twice."""
    layer = nn.Linear(8, 16)
    x = torch.randn(4, 8)
    with torch.enable_grad():
        assert memory.kept([layer], lambda: F.silu(layer(x))) == 4 * (4 * 8 + 4 * 16)
        assert memory.kept([layer], lambda: layer(x) + layer(x)) == 4 * (4 * 8)
