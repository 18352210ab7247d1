"""How what was taught is judged, and the memory that teaching takes, against closed forms."""

import random
from types import SimpleNamespace

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


@pytest.mark.parametrize("background", ["white", "sky blue", "purple"])
def test_the_judge_knows_a_drawing_however_it_is_placed(drawings, background):  # noqa: F811
    room = SimpleNamespace(features=show.cut_drawings(drawings.rgba), drawings=drawings)
    rows, images = [0, len(drawings.rgba) - 1], []
    for k, row in enumerate(rows):
        picture = Image.new("RGB", (128, 128), emoji.COLOURS[background])
        scenes.paste(random.Random(k), picture, drawings.rgba[row].numpy(), 0.45, 0.55, 0.7, flip=k == 1)
        images.append(np.asarray(picture))
    seen = [(concept, colour) for concept, _, colour in show.Class.see(room, images)]  # its styles are alike
    assert seen == [(drawings.concepts[drawings.concept[row]], background) for row in rows]


def test_what_a_forward_pass_keeps():
    """A linear layer keeps what it is given, and so does silu; weights are not counted, nor anything twice."""
    layer = nn.Linear(8, 16)
    x = torch.randn(4, 8)
    with torch.enable_grad():
        assert memory.kept([layer], lambda: F.silu(layer(x))) == 4 * (4 * 8 + 4 * 16)
        assert memory.kept([layer], lambda: layer(x) + layer(x)) == 4 * (4 * 8)
