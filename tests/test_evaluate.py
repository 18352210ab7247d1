"""The judge of the embedded model, on pictures whose verdict is known."""

import numpy as np
import torch
from test_emoji import drawings  # noqa: F401  (a fixture)

from images import to_uint8
from training import emoji, evaluate


def test_a_real_drawing_is_recalled_and_another_is_not(drawings):  # noqa: F811
    judge = evaluate.Judge(drawings)
    rows = torch.tensor([0, 3, 6])  # one of each concept
    pictures = to_uint8(judge.images[rows])
    noisy = (pictures + np.random.default_rng(0).normal(0, 20, pictures.shape)).clip(0, 255).astype(np.uint8)
    assert drawings.concept[rows].tolist() == [0, 1, 2]
    assert judge.recall(pictures, rows)[0] == judge.recall(noisy, rows)[0] == 1
    assert judge.recall(pictures, rows[[1, 2, 0]])[0] == 0
    assert judge.recall(pictures, rows[[0, 2, 1]])[0] == np.float32(1 / 3)


def test_background_colours(drawings):  # noqa: F811
    colours = list(emoji.COLOURS)
    rows = torch.zeros(len(colours), dtype=torch.int64)
    images = emoji.composite(drawings.rgba[rows], torch.tensor(list(emoji.COLOURS.values())))
    assert evaluate.background_accuracy(to_uint8(images), colours) == 1
    assert evaluate.background_accuracy(to_uint8(images), colours[1:] + colours[:1]) == 0


def test_psnr_of_a_known_error():
    images = torch.zeros(3, 3, 128, 128)
    models = {"encoder": lambda images, noise: images, "decoder": lambda latents: latents + 0.2}
    assert abs(evaluate.psnr(images, models) - 20) < 0.1  # 10 log10(2² / 0.2²)


def test_prompts_and_pairs_are_fixed_and_kept_apart(drawings, monkeypatch):  # noqa: F811
    allowed = torch.ones(3, len(emoji.COLOURS), dtype=torch.bool)
    allowed[0, 4] = False
    monkeypatch.setattr(emoji, "trained_colours", lambda drawings: allowed)
    rows, colours = evaluate.colour_pairs(drawings, True, 100)
    assert set(colours) == {list(emoji.COLOURS)[4]} and (drawings.concept[rows] == 0).all()
    rows, colours = evaluate.colour_pairs(drawings, False, 20)
    again, _ = evaluate.colour_pairs(drawings, False, 20)
    assert len(colours) == 20 and torch.equal(rows, again) and "white" not in colours
    prompts = evaluate.Judge(drawings).prompts(rows, colours)
    assert all(f"{colour} background" in prompt for colour, prompt in zip(colours, prompts))
