"""What can be read out of a caption's context by a linear map: what cannot, no UNet can draw.

The probes are fitted on captions of trained combinations, and tried on held-out ones.
"""

import random

import torch
from torch.nn import functional as F

from pipeline import tokenize
from training import scenes

N_FITTED, N_TRIED = 2000, 20


def features(captions, clip, tokenizer):
    """(n, 2 d): the context at the end token, and its mean over the caption's tokens"""
    found = []
    for part in (captions[k : k + 250] for k in range(0, len(captions), 250)):
        tokens = tokenize(part, tokenizer)
        context = clip(tokens)
        last = tokens.argmax(dim=1)  # the end token has the highest number
        inside = torch.arange(tokens.shape[1]) <= last[:, None]
        mean = (context * inside[..., None]).sum(dim=1) / inside.sum(dim=1, keepdim=True)
        found.append(torch.cat([context[torch.arange(len(part)), last], mean], dim=1))
    return torch.cat(found)


def probe(grammar, clip, tokenizer):
    """{"colour" | "count" | "position" | "relation": share read out right on held-out combinations}"""
    rng = random.Random(0)
    trained = [grammar.scene(rng) for _ in range(N_FITTED)]
    out = {}
    for name, kind, classes in [("colour", "colour", list(scenes.OBJECT_COLOURS)),
                                ("count", "count", list(scenes.COUNTS)),
                                ("position", "position", list(scenes.POSITIONS)),
                                ("relation", "pair", list(scenes.RELATIONS))]:
        held_out = grammar.held_out_scenes(rng, kind, N_TRIED)
        (x, right), (x_new, right_new) = (read(grammar, rng, found, name, classes, clip, tokenizer)
                                          for found in (trained, held_out))
        out[name] = (fit(x, right, len(classes))(x_new).argmax(dim=1) == right_new).float().mean().item()
    return out


def read(grammar, rng, found, name, classes, clip, tokenizer):
    """Features and classes of those scenes that say something on a question."""
    values = [(scene, scene.colours[0] if name == "colour" else scene.layout) for scene in found]
    values = [(scene, value) for scene, value in values if value in classes]
    captions = [caption(grammar, rng, scene) for scene, _ in values]
    return features(captions, clip, tokenizer), torch.tensor([classes.index(value) for _, value in values])


def caption(grammar, rng, scene):
    """One that says which of two things is where ("a cat and a dog" leaves it open)."""
    while True:
        text = grammar.caption(rng, scene)
        if scene.layout not in scenes.RELATIONS or not any(word in text for word in (" and ", " next to ", " beside ",
                                                                                     " with ")):
            return text


@torch.enable_grad()
def fit(x, classes, n):
    """Logistic regression on features brought to mean 0 and deviation 1; returns a function of features."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    linear = torch.nn.Linear(x.shape[1], n)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear((x - mean) / std), classes) + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda other: linear((other - mean) / std).detach()
