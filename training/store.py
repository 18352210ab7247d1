"""Scenes as latents, drawn and encoded once: the encoder is finished when the UNet begins.

    python -m training.store 0 80      # the files 0 to 79, 250 scenes each; those that exist are kept

File k depends on k alone, so several processes can share the work.
"""

import argparse
import random

import torch
from tqdm import trange

from training import train

SCENES = 250


def make_shard(grammar, encoder, number):
    """{"scenes": list of Scene, "latents": (SCENES, 4, 16, 16) float16}, the means that the encoder finds."""
    rng = random.Random(1_000_000 + number)
    scenes = [grammar.scene(rng) for _ in range(SCENES)]
    images = train.draw_images(grammar, rng, scenes)
    with torch.no_grad():
        latents = [encoder(part, torch.zeros(len(part), 4, 16, 16)) for part in images.split(10)]
    return {"scenes": scenes, "latents": torch.cat(latents).half()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    arguments = parser.parse_args()
    grammar = train.load_grammar()
    encoder = train.load_vae(grammar)["encoder"]
    train.STORE.mkdir(parents=True, exist_ok=True)
    for number in trange(arguments.first, arguments.end, desc="store", unit="file", mininterval=10):
        path = train.STORE / f"{number:05}.pt"
        if not path.exists():
            train.save(path, make_shard(grammar, encoder, number))


if __name__ == "__main__":
    main()
