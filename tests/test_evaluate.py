"""The judge of the embedded model, on pictures whose verdict is known."""

import random

import numpy as np
import pytest
import torch
from test_scenes import drawings, grammar  # noqa: F401  (fixtures)

from training import evaluate, scenes


@pytest.fixture
def judge(grammar, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scenes, "OBJECT_COLOURS", {"red": (220, 30, 30), "blue": (30, 80, 220)})
    monkeypatch.setattr(grammar, "backgrounds", ["white", "yellow", "night", "beach"])
    return evaluate.Judge(grammar)


@pytest.mark.parametrize("kind, made", [
    ("colour", [((0,), ("blue",), "whole", "white"), ((1,), ("red",), "whole", "white")]),
    ("position", [((0,), (None,), "top left", "white"), ((1,), (None,), "bottom", "white")]),
    ("count", [((0,), (None,), 3, "white"), ((1,), (None,), 2, "white")]),
    ("pair", [((0, 1), (None, None), "right of", "white"), ((2, 1), (None, None), "above", "white")]),
    ("background", [((0,), (None,), "whole", "beach"), ((1,), (None,), "whole", "yellow")])])
def test_real_scenes_are_seen_as_what_they_are(judge, kind, made):
    chosen = [scenes.Scene(*parts, style="coded") for parts in made]
    pictures = np.stack([judge.grammar.draw(random.Random(7), scene) for scene in chosen])
    noisy = (pictures + np.random.default_rng(0).normal(0, 8, pictures.shape)).clip(0, 255).astype(np.uint8)
    assert judge.see(kind, pictures) == judge.see(kind, noisy) == [evaluate.answer(kind, scene) for scene in chosen]


def test_the_answer_for_a_pair_says_who_is_where():
    scene = scenes.Scene((4, 9), (None, None), "right of")
    assert evaluate.answer("pair", scene) == (9, 4, "across")
    assert evaluate.answer("pair", scenes.Scene((4, 9), (None, None), "above")) == (4, 9, "down")


def test_interval_of_a_share():
    """Wilson's for 8 of 10, as statsmodels gives it: 0.490 to 0.943"""
    low, high = evaluate.wilson(8, 10)
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3


def test_held_out_scenes_are_fixed_and_plain(grammar):  # noqa: F811
    chosen = evaluate.held_out_scenes(grammar, "background", 2)
    assert chosen == evaluate.held_out_scenes(grammar, "background", 2) and len(set(chosen)) == 2
    for scene in chosen:
        assert scene.layout == "whole" and scene.colours == (None,)
        assert scenes.is_held_out("background", grammar.world[scene.things[0]].singular, scene.background)


def test_round_trip_is_rounded_to_eight_bits():
    images = torch.zeros(3, 3, 128, 128)
    models = {"encoder": lambda images, noise: images, "decoder": lambda latents: latents + 0.2}
    trip = evaluate.round_trip(images, models)
    assert torch.equal(((trip + 1) * 127.5).round(), (trip + 1) * 127.5) and abs(trip.mean() - 0.2) < 1 / 127


def test_a_sheet_has_every_picture_and_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path)
    pictures = np.zeros((3, 128, 128, 3), dtype=np.uint8)
    evaluate.save_sheet("sheet.jpg", [(picture, "a small black square in the corner") for picture in pictures], 2)
    sheet = np.asarray(evaluate.Image.open(tmp_path / "sheet.jpg"))
    assert sheet.shape == (300, 232, 3) and (sheet[50, 50] < 20).all() and (sheet[200, 50] < 20).all()
    assert (sheet[200, 170] > 235).all() and [path.name for path in tmp_path.iterdir()] == ["sheet.jpg"]
