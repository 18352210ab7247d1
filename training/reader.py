"""What a text encoder is asked before a UNet looks at it: what is where, in which colour, before what.

A UNet finds in the context what belongs to a place by attention, if it is there to be found; from the noise's loss
alone a text encoder hardly learns to put it there. When it had been trained along for 11,300 steps, both things of a
pair could be read in their places from 9% of captions; after 300 steps of this, from 98%.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attention import CrossAttention
from training import scenes

PLACES = torch.tensor(list(scenes.POSITIONS.values()))
NOT_ASKED = -100  # of the colour where nothing is; what cross_entropy leaves out


class Reader(nn.Module):
    """Ten learnt queries, for nine places and the background, look at the context as a UNet's would.

    Args:
        n_things: of the world.
        backgrounds: their names.
        d_context, n_heads: the text encoder's.
    """

    def __init__(self, n_things: int, backgrounds: list[str], d_context: int, n_heads: int):
        super().__init__()
        self.backgrounds = backgrounds
        self.queries = nn.Parameter(0.3 * torch.randn(len(PLACES) + 1, d_context))
        self.attention = CrossAttention(n_heads, d_context, d_context)
        self.thing = nn.Linear(d_context, n_things + 1)  # the last: nothing
        self.colour = nn.Linear(d_context, len(scenes.THING_COLOURS))
        self.background = nn.Linear(d_context, len(backgrounds))

    def forward(self, context):
        """(n, tokens, d) -> logits of the things (n, 9, things + 1), colours (n, 9, colours), background (n, names)"""
        read = self.attention(self.queries.expand(len(context), -1, -1), context)
        return self.thing(read[:, :-1]), self.colour(read[:, :-1]), self.background(read[:, -1])

    def answers(self, some):
        """Scenes -> the classes that `forward` should find: (n, 9), (n, 9), (n,)"""
        things = torch.full((len(some), len(PLACES)), self.thing.out_features - 1)
        colours = torch.full_like(things, NOT_ASKED)
        for row, scene in enumerate(some):
            for k, middle in scenes.middles(scene):
                place = (PLACES - torch.tensor(middle)).square().sum(dim=1).argmin()
                things[row, place] = scene.things[k]
                colours[row, place] = scenes.THING_COLOURS.index(scene.colours[k])
        return things, colours, torch.tensor([self.backgrounds.index(scene.background) for scene in some])

    def loss(self, context, some):
        """Cross entropy of all answers, things, colours and background alike."""
        return sum(F.cross_entropy(logits.flatten(0, -2), classes.flatten(), ignore_index=NOT_ASKED)
                   for logits, classes in zip(self(context), self.answers(some)))

    def is_right(self, context, some):
        """(n,) whether all is read as it is"""
        found = [(logits.argmax(dim=-1) == classes) | (classes == NOT_ASKED)
                 for logits, classes in zip(self(context), self.answers(some))]
        return torch.cat([right.reshape(len(some), -1) for right in found], dim=1).all(dim=1)
