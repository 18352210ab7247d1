"""A whole picture, from command to file: how long does it take, and how long next to diffusers?

    python -m benchmarks.picture [--rounds 3] [--steps 4] [--only-small]

First the command with the embedded model, 20 steps, and `--help`, each in a fresh process: wall and CPU seconds (of all
threads). Aims: a picture in 8 s of wall time, the help in 0.3 s of CPU time. Then a picture of 512x512 pixels from the
same random checkpoint of full size, bfloat16 on the CPU, already loaded, with guidance: ours and diffusers' in turn, in
one process.

Writes benchmarks/results/picture.md.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import measure

PROMPT = "a futuristic city on Mars during sunset"
COMMAND = ["a red apple", "--steps", "20", "--sampler", "dpmpp_2m", "--cfg-scale", "4", "--checkpoint",
           "data/emoji.safetensors", "--overwrite"]


def run(*arguments):
    """Runs cli.py and returns (wall, CPU) seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "cli.py", *arguments], cwd=measure.ROOT, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command_times(rounds):
    """Returns rows of the first table: the command with the embedded model, and its help."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        picture = [*COMMAND, "--output", Path(folder) / "apple.png"]
        for what, arguments in [("a picture, 20 steps", picture), ("--help", ["--help"])]:
            run(*arguments)  # not counted: it reads the files from disk
            walls, cpus = zip(*[run(*arguments) for _ in range(rounds)])
            rows.append([what, f"{sorted(walls)[rounds // 2]:.2f}", f"{sorted(cpus)[rounds // 2]:.2f}"])
            print(*rows[-1], flush=True)
    return rows


def full_size_times(rounds, steps):
    """Returns {"ours": [seconds, ...], "diffusers": [...]}"""
    import model_loader
    from pipeline import generate

    path = measure.random_checkpoint()
    models = model_loader.preload_models_from_standard_weights(path, "cpu", "bfloat16", pack=True)
    tokenizer = model_loader.load_tokenizer()
    pipeline = measure.diffusers_pipeline(path, torch.bfloat16)

    def ours():
        generate(PROMPT, models=models, tokenizer=tokenizer, sampler_name="ddim", n_inference_steps=steps, seed=42)

    def theirs():
        pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(42))

    return measure.interleave({"ours": ours, "diffusers": theirs}, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only-small", action="store_true", help="the command alone, without the full size")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    text = measure.table(["python cli.py, embedded model", "wall, s", "CPU, s"], command_times(arguments.rounds))
    if not arguments.only_small:
        times = full_size_times(arguments.rounds, arguments.steps)
        rows = [[name, f"{sorted(seconds)[arguments.rounds // 2]:.1f}"] for name, seconds in times.items()]
        ratio = f"{measure.ratio(times, 'ours', 'diffusers'):.2f}"
        text += "\n\n" + measure.table([f"512x512, {arguments.steps} steps, bfloat16", "wall, s"],
                                     [*rows, ["ours / diffusers", ratio]])
    measure.write("picture.md", f"{text}\n\nMedians of {arguments.rounds} rounds. {measure.peer_versions()}")


if __name__ == "__main__":
    main()
