"""What do a guidance interval and cached deep layers save, and what do they cost in quality? One plot and a table.

    python -m benchmarks.savings [--prompts 60] [--rounds 3]

The embedded model draws the same prompts with the same seeds in each setting (float32, dpmpp_2m, cfg_scale 4, fixed
prompts of trained pairs). Quality: root mean square distance, in grey levels of 255, to the exact picture, the one at
20 steps without savings; and how often the nearest real drawing still shows the concept that the prompt names, as in
training/evaluate.py, which needs the drawings (python training/emoji.py). Fewer steps are the yardstick: a saving pays
where its curve lies below theirs. Time: seconds a picture, drawn one at a time, settings in turn.

Writes benchmarks/results/savings.md and savings.png.
"""

import argparse

import numpy as np
import torch

import model_loader
from benchmarks import measure
from training import emoji
from training.evaluate import CFG_SCALE, STEPS, Judge, draw, sample_rows
from training.train import MODEL, N_CONCEPTS, STYLES

CURVES = {
    "fewer steps": [(f"{steps} steps", {"n_inference_steps": steps}) for steps in (15, 10, 7, 5, 3)],
    "guidance interval": [(f"guidance in ({low:g}, {high:g})", {"guidance_interval": (low, high)})
                          for low, high in [(0.2, 8), (0.5, 8), (0.5, 4), (1, 4), (2, 3)]],
    "cached deep layers": [(f"cache_interval {n}", {"cache_interval": n}) for n in (2, 3, 5, 10)],
    "both": [("guidance in (0.5, 8), cache_interval 2", {"guidance_interval": (0.5, 8), "cache_interval": 2})],
}


def short(name):
    return name.replace("guidance in ", "").replace("cache_interval", "every").removesuffix(" steps")


def plot(points, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, what, label in [(axes[0], 1, "distance to the exact picture, grey levels"), (axes[1], 2, "concept recall, %")]:
        for curve, curve_points in points.items():
            axis.plot([point[0] for point in curve_points], [point[what] for point in curve_points], "o-", label=curve)
        axis.set(xlabel="time, as a share of the exact picture's", ylabel=label)
        axis.grid(alpha=0.3)
    for share, distance, _, name in sum(points.values(), []):
        axes[0].annotate(name, (share, distance), (4, 4), textcoords="offset points", fontsize=8)
    axes[0].legend()
    axes[1].set_ylim(0, 104)
    figure.savefig(path, dpi=110, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    models = model_loader.preload_models_from_standard_weights(MODEL, "cpu", "float32")
    tokenizer, drawings = model_loader.load_tokenizer(), emoji.load_drawings(n_concepts=N_CONCEPTS, styles=STYLES)
    judge, rows = Judge(drawings), sample_rows(emoji.trained_pairs(drawings), arguments.prompts)
    prompts = judge.prompts(rows)
    curves = {"exact": [(f"{STEPS} steps", {})], **CURVES}
    settings = dict(setting for curve in curves.values() for setting in curve)

    pictures = {name: draw(prompts, models, tokenizer, **setting) for name, setting in settings.items()}
    exact = pictures[f"{STEPS} steps"].astype(float)
    distance = {name: np.sqrt(np.mean((picture - exact) ** 2)) for name, picture in pictures.items()}
    recall = {name: judge.recall(picture, rows)[0] for name, picture in pictures.items()}
    times = measure.interleave({name: lambda setting=setting: draw(prompts[:1], models, tokenizer, **setting)
                              for name, setting in settings.items()}, arguments.rounds)
    seconds = {name: measure.statistics.median(times[name]) for name in settings}
    share = {name: measure.ratio(times, name, f"{STEPS} steps") for name in settings}

    points = {curve: [(share[name], distance[name], 100 * recall[name], short(name)) for name, _ in members]
              for curve, members in curves.items()}
    measure.replace("savings.png", lambda path: plot(points, path))
    rows = [[name, f"{seconds[name]:.2f}", f"{share[name]:.2f}", f"{distance[name]:.1f}", f"{recall[name]:.1%}"]
            for name in settings]
    measure.write("savings.md", f"""\
{measure.table(["", "s a picture", "share of the exact one's time", "distance, grey levels", "concept recall"], rows)}

{len(prompts)} prompts, cfg_scale {CFG_SCALE:g}; times are medians of {arguments.rounds} rounds of one picture, decoding included.
{measure.machine()}""")


if __name__ == "__main__":
    with torch.no_grad():
        main()
