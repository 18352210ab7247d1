"""The grammar of scenes, on the three drawings of test_emoji.py."""

import hashlib
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_emoji import drawings  # noqa: F401  (a fixture)

from training import emoji, scenes


@pytest.fixture
def grammar(drawings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(emoji, "read_held_out", lambda path=None: {("opal disc", "named")})
    world = [scenes.Thing("red square", "square", "squares", ("box",)), scenes.Thing("opal disc", "disc", "discs", ()),
             scenes.Thing("bars", "bars", "", ())]
    return scenes.Grammar(drawings, world)


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_every_thing_of_the_world_has_a_drawing():
    known = {concept.name for concept in emoji.read_concepts()}
    world = scenes.read_world()
    assert len(world) >= 70 and {thing.drawing for thing in world} <= known
    names = [name for thing in world for name in (thing.singular, *thing.synonyms)]
    assert len(names) == len(set(names))


def test_what_is_held_out_is_fixed_and_of_the_stated_share():
    assert scenes.is_held_out("pair", "dog", "cat") == scenes.is_held_out("pair", "cat", "dog")
    for name in ("apple", "cat", "dog", "moon"):
        number = int(hashlib.sha256(f"colour:{name}:blue".encode()).hexdigest()[:8], 16)
        assert scenes.is_held_out("colour", name, "blue") == (number / 2**32 < 0.12)
    share = np.mean([scenes.is_held_out("count", f"thing {k}", 3) for k in range(4000)])
    assert abs(share - 0.15) < 0.02


def test_nothing_held_out_is_drawn_and_everything_else_is(grammar):
    drawn = [grammar.scene(random.Random(k)) for k in range(3000)]
    seen = {fact for scene in drawn for fact in scenes.facts(scene, grammar.world)}
    assert not any(scenes.is_held_out(*fact) for fact in seen)
    everything = {("position", thing.singular, place) for thing in grammar.world for place in scenes.POSITIONS}
    assert {fact for fact in seen if fact[0] == "position"} == {f for f in everything if not scenes.is_held_out(*f)}
    assert not any(scene.style == "named" and 1 in scene.things for scene in drawn)
    assert not any(scene.layout in scenes.COUNTS and 2 in scene.things for scene in drawn)  # bars cannot be counted


def test_held_out_scenes_hold_out_one_fact_of_the_kind(grammar):
    for scene in grammar.held_out_scenes(random.Random(0), "background", 2):
        held_out = [fact for fact in scenes.facts(scene, grammar.world) if scenes.is_held_out(*fact)]
        assert [fact[0] for fact in held_out] == ["background"]


@pytest.mark.parametrize("layout, middles", [
    ("left of", ((0.27, 0.5), (0.73, 0.5))), ("right of", ((0.73, 0.5), (0.27, 0.5))),
    ("above", ((0.5, 0.27), (0.5, 0.73))), ("below", ((0.5, 0.73), (0.5, 0.27)))])
def test_relations_put_both_in_their_places(grammar, layout, middles):
    picture = pixels(grammar.draw(random.Random(0), scenes.Scene((0, 2), ("green", "blue"), layout, style="coded")))
    for (x, y), colour in zip(middles, ("green", "blue")):
        seen = picture[round(y * 128), round(x * 128)]
        assert np.abs(seen - scenes.OBJECT_COLOURS[colour]).max() < 40


def test_counts_and_positions_are_seen(grammar):
    for count in scenes.COUNTS:
        picture = pixels(grammar.draw(random.Random(0), scenes.Scene((0,), (None,), count, style="coded")))
        inked = sum((np.abs(255 - picture[round(y * 128), round(x * 128)]).max() > 100)
                    for x in (0.27, 0.5, 0.73) for y in (0.27, 0.5, 0.73))
        assert inked == count
    for place, (x, y) in scenes.POSITIONS.items():
        picture = pixels(grammar.draw(random.Random(0), scenes.Scene((0,), (None,), place, style="coded")))
        rows, columns = np.nonzero(np.abs(255 - picture).max(axis=2) > 100)
        assert abs(columns.mean() / 128 - x) < 0.05 and abs(rows.mean() / 128 - y) < 0.05


def test_backgrounds_are_told_apart(grammar):
    means = [pixels(scenes.draw_background(random.Random(0), name)).mean(axis=(0, 1)) for name in grammar.backgrounds]
    distances = [np.abs(a - b).max() for k, a in enumerate(means) for b in means[:k]]
    assert min(distances) > 8
    for name, colour in emoji.COLOURS.items():
        assert (pixels(scenes.draw_background(random.Random(0), name)) == colour).all()


def test_recolouring_keeps_light_and_shade():
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[0] = [(0, 0, 0, 255), (100, 100, 100, 255), (255, 255, 255, 255)]
    rgba[1] = [(100, 100, 100, 255), (100, 100, 100, 255), (9, 9, 9, 0)]
    out = scenes.recolour(rgba, (200, 30, 30))
    assert (out[0, 0] == (0, 0, 0, 255)).all() and (out[0, 1] == (200, 30, 30, 255)).all()
    assert (out[0, 2, :3] > (240, 200, 200)).all() and (out[..., 3] == rgba[..., 3]).all()


def test_captions_say_what_is_to_be_seen(grammar):
    scene = scenes.Scene((0, 1), ("red", None), "left of", "beach", "coded")
    for k in range(200):
        text = grammar.caption(random.Random(k), scene)
        assert re.search(r"\bred (box|square)\b", text) and "disc" in text and re.search("beach|sand|desert", text)
    three = [grammar.caption(random.Random(k), scenes.Scene((0,), (None,), 3, style="coded")) for k in range(100)]
    assert all(re.search(r"\b(three|3) (\w+ )?squares\b", text) for text in three) and len(set(three)) > 10
    named = replace(scene, things=(1,), colours=(None,), layout="whole", background="white", names_style=True)
    assert all("coded" in grammar.caption(random.Random(k), named) for k in range(50))


def test_held_out_wordings_are_never_trained_on(grammar):
    scene = scenes.Scene((0, 1), (None, None), "above", style="coded")
    trained = {grammar.caption(random.Random(k), scene) for k in range(2000)}
    held_out = {grammar.caption(random.Random(k), scene, scenes.HELD_OUT) for k in range(2000)}
    assert len(held_out) > 5 and not trained & held_out
    for part in (*scenes.PLACES.values(), scenes.PLAIN, scenes.FRAMES, *scenes.WHERE.values(), *scenes.PAIRS.values()):
        assert not set(part[scenes.TRAINED]) & set(part[scenes.HELD_OUT])


def test_no_newcomers_prompt_is_a_caption(grammar, monkeypatch):
    newcomers = scenes.NEWCOMERS.read_text().splitlines()
    assert len(newcomers) == 50
    scene = scenes.Scene((0,), (None,), style="coded")
    monkeypatch.setattr(grammar, "newcomers", {"a square", "square", "a box"})
    texts = {grammar.caption(random.Random(k), scene) for k in range(500)}
    assert not texts & grammar.newcomers and "the square" in texts


def test_words_are_those_of_the_captions(grammar):
    rng = random.Random(0)
    words = set(grammar.words())
    for _ in range(2000):
        assert set(re.findall(r"[a-z0-9'-]+", grammar.caption(rng, grammar.scene(rng)))) <= words
    assert {"square", "squares", "two", "2", "moonlight", "violet", "coded"} <= words and "mars" not in words


def test_newcomers_file_is_utf8_lines():
    assert Path(scenes.NEWCOMERS).read_text(encoding="utf-8").endswith("\n")
