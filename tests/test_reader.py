"""What the text encoder's reader is asked, on the three things of test_scenes.py."""

import random

import torch
from test_scenes import drawings, grammar  # noqa: F401  (fixtures)

from training import reader, scenes

PLACES = list(scenes.POSITIONS)
SQUARE, DISC, NOTHING = 0, 1, 3


def make_reader(grammar):  # noqa: F811
    return reader.Reader(len(grammar.world), grammar.backgrounds, 16, 4)


def told(scene, grammar):  # noqa: F811
    """({place: thing}, {place: colour}, background) of a scene, by the reader's classes"""
    things, colours, background = make_reader(grammar).answers([scene])
    return ({place: k for place, k in zip(PLACES, things[0].tolist()) if k != NOTHING},
            {place: scenes.THING_COLOURS[k] for place, k in zip(PLACES, colours[0].tolist()) if k != reader.NOT_ASKED},
            grammar.backgrounds[background])


def test_what_is_where(grammar):  # noqa: F811
    pair = scenes.Scene((SQUARE, DISC), ("red", None), "right of", "night")
    assert told(pair, grammar) == ({"right": SQUARE, "left": DISC}, {"right": "red", "left": None}, "night")
    below = scenes.Scene((SQUARE, DISC), (None, None), "below")
    assert told(below, grammar)[0] == {"bottom": SQUARE, "top": DISC}
    three = scenes.Scene((DISC,), ("blue",), 3)
    assert told(three, grammar)[0] == {"top": DISC, "bottom left": DISC, "bottom right": DISC}
    assert told(scenes.Scene((DISC,), (None,), "top left"), grammar)[0] == {"top left": DISC}
    assert told(scenes.Scene((DISC,), (None,), background="grass"), grammar)[0] == {"middle": DISC}


def test_what_is_told_is_what_is_drawn(grammar):  # noqa: F811
    """A pixel in the middle of each place is white where the reader is to say that there is nothing."""
    rng = random.Random(3)
    for layout in (*scenes.POSITIONS, *scenes.RELATIONS):
        n = 2 if layout in scenes.RELATIONS else 1
        scene = scenes.Scene((SQUARE, DISC)[:n], ("green", "blue")[:n], layout, style="coded")
        picture, (_, colours, _) = grammar.draw(rng, scene).astype(int), told(scene, grammar)
        for place, (x, y) in scenes.POSITIONS.items():
            seen = picture[round(128 * y), round(128 * x)]
            nearest = min(["green", "blue", "white"], key=lambda name: abs(seen - scenes.OBJECT_COLOURS[name]).sum())
            if place != "middle" or layout not in scenes.RELATIONS:  # there, the two may touch
                assert nearest == (colours.get(place) or "white"), (layout, place)


def test_it_learns_from_a_context_that_says_so_and_not_from_one_that_does_not(grammar):  # noqa: F811
    """One token a place, which holds the thing's number: an attention can find it. Captions' order is shuffled."""
    torch.manual_seed(0)
    rng = random.Random(0)
    some = [scenes.Scene((rng.randrange(2),), (None,), rng.choice(PLACES)) for _ in range(64)]
    context = torch.zeros(64, 2, 16)
    for row, scene in enumerate(some):
        context[row, rng.randrange(2), [PLACES.index(scene.layout), 9 + scene.things[0]]] = 3.0

    def learn(context):
        model = make_reader(grammar)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        with torch.enable_grad():
            for _ in range(150):
                optimizer.zero_grad()
                model.loss(context[:32], some[:32]).backward()
                optimizer.step()
        return model.is_right(context[32:], some[32:]).float().mean()

    assert learn(context) > 0.8
    assert learn(context[torch.randperm(64)]) < 0.3
