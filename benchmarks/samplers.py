"""How fast does each sampler reach its own limit? One contact sheet, samplers by steps, and a table of distances.

    python -m benchmarks.samplers [--checkpoint FILE] [--prompt TEXT]

Writes benchmarks/results/samplers.png and samplers.md. Each picture starts from the same noise. The distance is the
root mean square difference, in grey levels of 255, to the picture of the same sampler at 200 steps. Samplers that draw
noise on the way (ddpm, euler_a, dpmpp_2m_sde, lcm, tcd) draw another picture with more steps, so their distance need
not fall.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import model_loader
from benchmarks import measure
from pipeline import generate
from samplers import SAMPLERS

STEPS = [5, 10, 20, 50]
LIMIT = 200
LABEL = 120  # pixels at the left, for the sampler's name


def draw_all(models, tokenizer, prompt, cfg_scale, seed):
    """Returns {sampler: {steps: uint8 picture}}; LCM knows 50 steps at most, and is its own limit there."""
    pictures = {}
    for name in tqdm(SAMPLERS, desc="samplers"):
        limit = 50 if name in ("lcm", "tcd") else LIMIT
        settings = dict(models=models, tokenizer=tokenizer, sampler_name=name, cfg_scale=cfg_scale, seed=seed)
        pictures[name] = {steps: generate(prompt, n_inference_steps=steps, **settings) for steps in [*STEPS, limit]}
    return pictures


def contact_sheet(pictures):
    height, width = next(iter(next(iter(pictures.values())).values())).shape[:2]
    sheet = Image.new("RGB", (LABEL + width * (len(STEPS) + 1), 20 + height * len(pictures)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, by_steps) in enumerate(pictures.items()):
        pen.text((6, 20 + row * height + height // 2), name, fill="black", font_size=13)
        for column, (steps, image) in enumerate(by_steps.items()):
            sheet.paste(Image.fromarray(image), (LABEL + column * width, 20 + row * height))
            if row == 0:
                pen.text((LABEL + column * width + 4, 3), f"{steps} steps", fill="black", font_size=13)
    return sheet


def table(pictures):
    """Markdown: the distance of each picture to its sampler's limit."""
    lines = [f"| sampler | {' | '.join(f'{steps} steps' for steps in STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    for name, by_steps in pictures.items():
        limit = by_steps[max(by_steps)].astype(float)
        distances = [np.sqrt(np.mean((by_steps[steps] - limit) ** 2)) for steps in STEPS]
        lines.append(f"| {name} | {' | '.join(f'{distance:.1f}' for distance in distances)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="default: the best one in data/")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or model_loader.find_checkpoint()
    models = model_loader.preload_models_from_standard_weights(checkpoint, model_loader.best_device(), "float32")
    pictures = draw_all(models, model_loader.load_tokenizer(), arguments.prompt, arguments.cfg_scale, arguments.seed)
    text = (f"`{Path(checkpoint).name}`, “{arguments.prompt}”, guidance {arguments.cfg_scale}, seed {arguments.seed}, "
            f"float32; distance to {LIMIT} steps of the same sampler (50 for lcm and tcd), in grey "
            f"levels\n\n{table(pictures)}")
    measure.replace("samplers.png", lambda path: contact_sheet(pictures).save(path, format="PNG"))
    measure.write("samplers.md", text)


if __name__ == "__main__":
    main()
