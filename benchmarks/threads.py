"""How many pictures a second does the embedded model draw at batch 1, 8 and 32, on an idle machine and on a busy one?

    python -m benchmarks.threads [--steps 10] [--rounds 3] [--busy 2]

`ours` chooses the threads as `cpu/threads.py` does; beside it are networks that compute in one thread and in all,
whatever the batch. On the busy machine, as many other processes as --busy compute without end. All take turns.

Writes benchmarks/results/threads.md.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from functools import partial

import torch

import model_loader
from benchmarks import measure
from pipeline import generate

ENDLESS = "while True: pass"


@contextlib.contextmanager
def busy(n):
    """Keeps n processors busy with other processes."""
    others = [subprocess.Popen([sys.executable, "-c", ENDLESS]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def without_hooks(models):
    for network in models.values():
        network._forward_pre_hooks.clear()
        network._forward_hooks.clear()
    return models


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    path = model_loader.ROOT / "data" / "emoji.safetensors"
    chosen, plain = (model_loader.preload_models_from_standard_weights(path, "cpu") for _ in range(2))
    without_hooks(plain)
    cores, rows = os.cpu_count(), []

    def draw(models, threads, batch):
        torch.set_num_threads(threads)
        generate(["a red apple"] * batch, models=models, seed=1, cfg_scale=4, sampler_name="dpmpp_2m",
                 n_inference_steps=arguments.steps, progress=False)

    for others in (0, arguments.busy):
        for batch in (1, 8, 32):
            candidates = {"ours": (chosen, cores), "one thread": (plain, 1), f"{cores} threads": (plain, cores)}
            with busy(others):
                times = measure.interleave({name: partial(draw, *how, batch) for name, how in candidates.items()},
                                           arguments.rounds)
            rows.append([others, batch, *(f"{batch / measure.statistics.median(times[name]):.2f}"
                                          for name in candidates)])
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    measure.write("threads.md", f"""\
{measure.table(["other processes", "batch", *candidates], rows)}

Pictures a second, 128x128, {arguments.steps} guided steps; medians of {arguments.rounds} rounds, interleaved. Load of
the machine at the end, over 1, 5 and 15 minutes: {load}. {measure.machine()}""")


if __name__ == "__main__":
    main()
