"""How good is the embedded model? Deterministic: fixed prompts, fixed seeds, float32.

    python training/evaluate.py [--checkpoint data/emoji.safetensors]

Writes training/results/evaluation.md and sheets of pictures beside it. What is measured:

- Recall: a picture, reduced to 32x32, is compared in L2 with all real drawings; the nearest one's concept (or style) is
  the prompt's. On trained (concept, style) pairs and on pairs that no training step saw.
- Background: the mean of the outermost ring of pixels is nearest to the named colour, among all colours.
- The autoencoder's PSNR on the drawings.
- Guidance: recall by cfg_scale. Image to image: by strength, distance to the input and recall of the new prompt
  (the sheet has a row for each strength).
"""

import argparse
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_loader
from pipeline import generate
from training import emoji
from training.train import MODEL, N_CONCEPTS, STYLES, sheet

RESULTS = ROOT / "training" / "results"
STEPS, CFG_SCALE, BATCH = 20, 4.0, 20
COLOURS = list(emoji.COLOURS)
PALETTE = torch.tensor(list(emoji.COLOURS.values()))


def draw(prompts, models, tokenizer, cfg_scale=CFG_SCALE, **settings):
    """Returns a uint8 picture (n, 128, 128, 3) for each prompt; picture k has seed k."""
    settings = {"sampler_name": "dpmpp_2m", "n_inference_steps": STEPS, "cfg_scale": cfg_scale, **settings}
    pictures = [generate(prompts[k : k + BATCH], models=models, tokenizer=tokenizer, seed=k, **settings)
                for k in range(0, len(prompts), BATCH)]
    return np.concatenate(pictures)


def to_images(pictures):
    """uint8 (n, h, w, 3) -> float (n, 3, h, w) in [-1, 1]"""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def small(images):
    """(n, 3, 128, 128) -> (n, 3 * 32 * 32): what pictures are compared by"""
    return F.avg_pool2d(images, 4).flatten(1)


class Judge:
    """Knows all real drawings, on white."""

    def __init__(self, drawings):
        self.drawings = drawings
        white = torch.full((len(drawings.rgba), 3), 255)
        self.images = emoji.composite(drawings.rgba, white)
        self.features = small(self.images)

    def recall(self, pictures, rows):
        """Returns the shares of pictures whose nearest drawing has the concept, and the style, of their rows."""
        nearest = torch.cdist(small(to_images(pictures)), self.features).argmin(dim=1)
        concept = self.drawings.concept[nearest] == self.drawings.concept[rows]
        style = self.drawings.style[nearest] == self.drawings.style[rows]
        return concept.float().mean().item(), style.float().mean().item()

    def prompts(self, rows, colours=None):
        """A prompt for each row, in turn in each of the wordings that name the style."""
        prompts = []
        for k, row in enumerate(rows.tolist()):
            wordings = emoji.wordings(self.drawings.concepts[self.drawings.concept[row]],
                                      self.drawings.styles[self.drawings.style[row]], colours[k] if colours else None)
            prompts.append(wordings[3 + k % 3])
        return prompts


def background_accuracy(pictures, colours):
    """The share of pictures whose outermost ring of pixels is on average nearest to the named colour."""
    images = torch.from_numpy(pictures).float()
    ring = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1).mean(dim=1)
    nearest = torch.cdist(ring, PALETTE.float()).argmin(dim=1)
    return np.mean([COLOURS[k] == colour for k, colour in zip(nearest.tolist(), colours)])


def psnr(images, models):
    """Mean PSNR in dB of images in [-1, 1] after encoding (to the mean) and decoding, rounded to 8 bits."""
    values = []
    for part in tqdm(images.split(BATCH), desc="PSNR"):
        latents = models["encoder"](part, torch.zeros(len(part), 4, 16, 16))
        decoded = ((models["decoder"](latents).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        values.append(10 * (4 / (decoded - part).square().mean(dim=(1, 2, 3))).log10())
    return torch.cat(values).mean().item()


def sample_rows(rows, n):
    """n rows, the same ones each time, or all if there are fewer."""
    return torch.tensor(sorted(random.Random(0).sample(rows.tolist(), min(n, len(rows)))))


def colour_pairs(drawings, held_out, n):
    """Rows and colours of n (drawing, colour) pairs, all trained or all held out."""
    trained = emoji.trained_colours(drawings)
    pairs = [(row, k) for row in emoji.trained_pairs(drawings).tolist() for k in range(1, len(COLOURS))
             if trained[drawings.concept[row], k] != held_out]
    pairs = random.Random(0).sample(pairs, min(n, len(pairs)))
    return torch.tensor([row for row, _ in pairs]), [COLOURS[k] for _, k in pairs]


def write(name, save):
    """Writes a file in results/, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    save(RESULTS / f".{name}")
    os.replace(RESULTS / f".{name}", RESULTS / name)


def save_sheet(name, pictures, columns=12):
    """Whole rows of pictures, at most 60 of them."""
    pictures = pictures[: min(60, len(pictures) // columns * columns)]
    write(name, lambda path: sheet(pictures, columns).save(path, format="JPEG", quality=90))


def evaluate(models, tokenizer, drawings):
    """Returns the Markdown of all tables."""
    judge = Judge(drawings)
    trained, held_out = sample_rows(emoji.trained_pairs(drawings), 240), emoji.held_out_pairs(drawings)
    lines = ["| | concept | style |", "|---|---|---|"]
    for name, rows in [("trained", trained), ("held-out", held_out)]:
        pictures = draw(judge.prompts(rows), models, tokenizer)
        concept, style = judge.recall(pictures, rows)
        lines.append(f"| recall@1, {len(rows)} {name} pairs | {concept:.1%} | {style:.1%} |")
        save_sheet(f"{name}.jpg", pictures)

    lines += ["", "| | background |", "|---|---|"]
    for name, is_held_out in [("trained", False), ("held-out", True)]:
        rows, colours = colour_pairs(drawings, is_held_out, 60)
        pictures = draw(judge.prompts(rows, colours), models, tokenizer)
        lines.append(f"| colour accuracy, {len(rows)} {name} (concept, colour) pairs | "
                     f"{background_accuracy(pictures, colours):.1%} |")
        save_sheet(f"colours-{name}.jpg", pictures)

    lines += ["", f"Autoencoder: PSNR {psnr(judge.images, models):.2f} dB on {len(judge.images)} drawings on white.",
              "", "| cfg_scale | concept | style |", "|---|---|---|"]
    rows = sample_rows(emoji.trained_pairs(drawings), 40)
    for cfg_scale in (1.0, 2.0, 4.0, 7.5):
        concept, style = judge.recall(draw(judge.prompts(rows), models, tokenizer, cfg_scale), rows)
        lines.append(f"| {cfg_scale:g} | {concept:.1%} | {style:.1%} |")

    lines += ["", "| strength | RMS distance to the input, grey levels | recall of the new prompt |", "|---|---|---|"]
    start, rows = rows[0], rows[1:21]
    input_image = ((judge.images[start] + 1) * 127.5).permute(1, 2, 0).round().byte().numpy()
    strips = []
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        pictures = draw(judge.prompts(rows), models, tokenizer, input_image=input_image, strength=strength)
        distance = np.sqrt(np.mean((pictures.astype(float) - input_image) ** 2))
        lines.append(f"| {strength} | {distance:.1f} | {judge.recall(pictures, rows)[0]:.1%} |")
        strips.append(pictures[:12])
    save_sheet("image-to-image.jpg", np.concatenate(strips))
    return "\n".join(lines)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=MODEL)
    checkpoint = Path(parser.parse_args().checkpoint)
    models = model_loader.preload_models_from_standard_weights(checkpoint, "cpu", "float32")
    tables = evaluate(models, model_loader.load_tokenizer(), emoji.load_drawings(n_concepts=N_CONCEPTS, styles=STYLES))
    text = (f"# `{checkpoint.name}`, {checkpoint.stat().st_size / 1e6:.1f} MB\n\n"
            f"By `python training/evaluate.py`: dpmpp_2m, {STEPS} steps, seeds from 0, cfg_scale {CFG_SCALE:g} where\n"
            f"none is named.\n\n{tables}\n")
    write("evaluation.md", lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
