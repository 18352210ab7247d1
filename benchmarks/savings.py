"""What do a guidance interval and cached deep layers save, and what do they cost in quality? One plot and a table.

    python -m benchmarks.savings [--prompts 60] [--rounds 3]

The embedded model draws the same prompts with the same seeds in each setting (float32, dpmpp_2m, cfg_scale 4, fixed
prompts of trained pairs). Quality: root mean square distance, in grey levels of 255, to the exact picture, the one at
20 steps without savings; and how often the nearest real drawing still shows the concept that the prompt names, as in
training/evaluate.py, which needs the drawings (python -m training.emoji). Fewer steps are the yardstick: a saving pays
where its curve lies below theirs. Time: seconds a picture, drawn one at a time, settings in turn.

Writes benchmarks/results/savings.md and savings.png.
"""

import argparse
from functools import partial

import numpy as np
import torch

import model_loader
from benchmarks import measure
from extensions.deep_cache import DeepCache
from training.evaluate import Judge, cut, draw
from training.train import MODEL, load_grammar

STEPS, CFG_SCALE = 20, 4.0

CURVES = {  # {curve: [(steps, noise levels with guidance or None for all, interval of the deep layers), ...]}
    "exact": [(STEPS, None, 1)],
    "fewer steps": [(steps, None, 1) for steps in (15, 10, 7, 5, 3)],
    "guidance interval": [(STEPS, levels, 1) for levels in [(0.2, 8), (0.5, 8), (0.5, 4), (1, 4), (2, 3)]],
    "cached deep layers": [(STEPS, None, interval) for interval in (2, 3, 5, 10)],
    "both": [(STEPS, (0.5, 8), 2)],
}


def describe(steps, levels, interval):
    """Returns a setting's name in the table, and a short one for the plot."""
    parts = []
    if levels is not None:
        span = f"({levels[0]:g}, {levels[1]:g})"
        parts.append((f"guidance in {span}", span))
    if interval > 1:
        parts.append((f"deep layers every {interval}", f"every {interval}"))
    if not parts:
        return f"{steps} steps", str(steps)
    return tuple(", ".join(names) for names in zip(*parts))


def draw_with(setting, prompts, models, tokenizer):
    """Returns pictures of the prompts, drawn with a setting (steps, levels, interval)."""
    steps, levels, interval = setting
    if interval > 1:
        models = models | {"diffusion": DeepCache(models["diffusion"], interval)}
    cfg_scale = CFG_SCALE
    if levels is not None:
        cfg_scale = lambda sigma: CFG_SCALE if levels[0] <= sigma <= levels[1] else 1.0
    return draw(prompts, models, tokenizer, cfg_scale=cfg_scale, n_inference_steps=steps)


def plot(points, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = "distance to the exact picture, grey levels", "concept recall, %"
    for what, (axis, label) in enumerate(zip(axes, labels), start=1):
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
    tokenizer, grammar = model_loader.load_tokenizer(), load_grammar()
    judge, prompts = Judge(grammar), [thing.singular for thing in grammar.world][: arguments.prompts]
    settings = {describe(*setting)[0]: setting for curve in CURVES.values() for setting in curve}

    pictures = {name: draw_with(setting, prompts, models, tokenizer) for name, setting in settings.items()}
    exact = pictures[f"{STEPS} steps"].astype(float)
    distance = {name: np.sqrt(np.mean((picture - exact) ** 2)) for name, picture in pictures.items()}
    recall = {name: np.mean([thing == (k,) for k, thing in enumerate(judge.nearest("thing", cut(picture))[0])])
              for name, picture in pictures.items()}
    times = measure.interleave({name: partial(draw_with, setting, prompts[:1], models, tokenizer)
                                for name, setting in settings.items()}, arguments.rounds)
    seconds = {name: measure.statistics.median(times[name]) for name in settings}
    share = {name: measure.ratio(times, name, f"{STEPS} steps") for name in settings}

    points = {curve: [(share[name], distance[name], 100 * recall[name], short)
                      for name, short in (describe(*setting) for setting in members)]
              for curve, members in CURVES.items()}
    measure.replace("savings.png", lambda path: plot(points, path))
    rows = [[name, f"{seconds[name]:.2f}", f"{share[name]:.2f}", f"{distance[name]:.1f}", f"{recall[name]:.1%}"]
            for name in settings]
    measure.write("savings.md", f"""\
{measure.table(["", "s a picture", "share of the exact one's time", "distance, grey levels", "concept recall"], rows)}

{len(prompts)} prompts, cfg_scale {CFG_SCALE:g}; times are medians of {arguments.rounds} rounds of one picture, decoding
included.
{measure.machine()}""")


if __name__ == "__main__":
    with torch.no_grad():
        main()
