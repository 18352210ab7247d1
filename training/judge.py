"""A judge that has never seen the model: a small classifier of things, colours, layouts and backgrounds.

It is trained on real renderings alone:

    python -m training.train judge

Beside the nearest rendering (see `evaluate.py`), a second opinion that errs in other ways.
"""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training import scenes

LAYOUTS = ["whole", *scenes.POSITIONS, *scenes.COUNTS]


class Classifier(nn.Module):
    """Pictures (n, 3, 128, 128) in [-1, 1] -> {"thing" | "colour" | "layout" | "background": logits (n, classes)}."""

    def __init__(self, grammar):
        super().__init__()
        self.features = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 32, 3, padding=1), nn.GELU())
        for n_in, n_out in [(32, 64), (64, 128), (128, 128), (128, 128)]:  # 64 pixels to 4
            self.features.extend([nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.GroupNorm(8, n_out), nn.GELU()])
        self.features.append(nn.Flatten())
        classes = {"thing": grammar.world, "colour": scenes.THING_COLOURS, "layout": LAYOUTS,
                   "background": grammar.backgrounds}
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 4 * 4, len(known)) for name, known in classes.items()})

    def forward(self, images):
        x = self.features(images)
        return {name: head(x) for name, head in self.heads.items()}


class JudgeStage:
    """Trains the classifier on scenes of one thing, held-out combinations and styles included; new ones in each step,
    as of some thousand it learns the pictures by heart, not the things."""

    def __init__(self, grammar):
        self.grammar = grammar
        self.modules = nn.ModuleDict({"judge": Classifier(grammar)})

    def loss(self, step, batch, generator):
        rng = random.Random(torch.randint(2**60, (), generator=generator).item())
        pictures, answers = draw_single(self.grammar, rng, batch)
        logits = self.modules["judge"](to_images(pictures))
        return sum(F.cross_entropy(logits[name], answers[name]) for name in logits)

    def report(self):
        pictures, answers = draw_single(self.grammar, random.Random(-1), 500)
        logits = self.modules["judge"](to_images(pictures))
        right = {name: (logits[name].argmax(dim=1) == answers[name]).float().mean() for name in logits}
        return ", ".join(f"{name} {share:.1%}" for name, share in right.items()), None


def draw_single(grammar, rng, n):
    """Pictures (n, 128, 128, 3) uint8 of scenes of one thing, and {"thing": classes (n,), ...}."""
    chosen = []
    while len(chosen) < n:
        scene = grammar.any_scene(rng)
        scene = scenes.replace(scene, style=rng.choice(grammar.all_styles[scene.things[0]]))
        if len(scene.things) == 1 and grammar.is_drawable(scene):
            chosen.append(scene)
    pictures = torch.stack([torch.tensor(grammar.draw(rng, scene)) for scene in chosen])
    answers = {"thing": [scene.things[0] for scene in chosen],
               "colour": [scenes.THING_COLOURS.index(scene.colours[0]) for scene in chosen],
               "layout": [LAYOUTS.index(scene.layout) for scene in chosen],
               "background": [grammar.backgrounds.index(scene.background) for scene in chosen]}
    return pictures, {name: torch.tensor(classes) for name, classes in answers.items()}


def to_images(pictures):
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def see(judge, grammar, kind, pictures):
    """What the classifier sees in pictures (n, 128, 128, 3) uint8, as `evaluate.answer` gives it for scenes."""
    if kind == "pair":
        return see_pairs(judge, pictures)
    seen = {name: logits.argmax(dim=1).tolist() for name, logits in judge(to_images(torch.tensor(pictures))).items()}
    name, known = {"colour": ("colour", scenes.THING_COLOURS), "background": ("background", grammar.backgrounds)}.get(
        kind, ("layout", LAYOUTS))
    return [(thing, known[k]) for thing, k in zip(seen["thing"], seen[name])]


def see_pairs(judge, pictures):
    """(thing, thing, axis): each part is looked at alone, and the more certain axis counts."""
    found = []
    for axis, layout in [("across", "left of"), ("down", "above")]:
        sure, things = 0, []
        for x, y in scenes.RELATIONS[layout]:
            left, top = (round(float(np.clip(centre * scenes.SIZE - 34, 0, scenes.SIZE - 68))) for centre in (x, y))
            part = to_images(torch.tensor(pictures[:, top : top + 68, left : left + 68]))
            whole = F.interpolate(part, (scenes.SIZE, scenes.SIZE), mode="bilinear", antialias=True)
            best = judge(whole)["thing"].log_softmax(dim=1).max(dim=1)
            sure = sure + best.values
            things.append(best.indices.tolist())
        found.append((axis, sure, things))
    (_, across, (left, right)), (_, down, (top, bottom)) = found
    return [(left[k], right[k], "across") if across[k] > down[k] else (top[k], bottom[k], "down")
            for k in range(len(pictures))]
