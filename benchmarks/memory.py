"""How much memory does a whole 512x512 picture take in bfloat16 on the CPU, next to diffusers?

    python -m benchmarks.memory [--rounds 1] [--steps 3]

Each in a process of its own, in turn, from the same random float16 checkpoint of full size (2 GiB, made on first use):
load, encode the prompt, denoise with guidance, decode, save a PNG. `resident` is the peak of all that the process has
in memory; `anonymous` the peak of its own, without files mapped into memory, which the system can drop and read again.
Aim: `resident` at most 0.75 times diffusers'. diffusers is smaller where accelerate is installed: install it first.

Then, ours alone: what decoding adds to the process, at once and in tiles of 512 pixels (`tile_size=512`), of random
latents at 512x512, 1024x1024 and 2048x2048, and how far a tiled picture is from the one decoded at once.

Writes benchmarks/results/memory.md. Reads /proc, so Linux only.
"""

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

import torch

from benchmarks import measure

NAMES = ["ours", "diffusers"]
TILE_SIZE = 512
PROMPT = "a futuristic city on Mars during sunset"


def draw(name, path, steps):
    """In a process of its own: draws one picture and prints what it took."""
    if name == "ours":
        from PIL import Image

        import model_loader
        from pipeline import generate

        def from_file():
            models = model_loader.preload_models_from_standard_weights(path, "cpu", "bfloat16", pack=True)
            image = generate(PROMPT, models=models, sampler_name="ddim", n_inference_steps=steps, seed=42)
            return Image.fromarray(image)
    else:
        def from_file():
            pipeline = measure.diffusers_pipeline(path, torch.bfloat16)
            return pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(42)).images[0]

    with tempfile.TemporaryDirectory() as folder:
        image, measured = measure.watch_memory(lambda: from_file().save(Path(folder) / "picture.png"))
    print(json.dumps(measured))


@torch.no_grad()
def decode(path):
    """In a process of its own: decodes in several sizes and prints by how many MiB the process grew, and seconds."""
    import model_loader

    models = model_loader.preload_models_from_standard_weights(path, "cpu", "bfloat16", pack=True)
    decoder = models["decoder"]  # the others stay: what they leave free would hide a part of the growth, or add to it
    measured, pictures = {}, {}
    for size, tile_size in [(512, None), (1024, TILE_SIZE), (1024, None), (2048, TILE_SIZE)]:
        latents = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        run = (lambda: decoder.decode_tiled(latents, tile_size)) if tile_size else (lambda: decoder(latents))
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed goes back to the system, or it would hide the growth
        picture, memory = measure.watch_memory(run)
        pictures[size, tile_size] = picture.float().clamp(-1, 1) * 127.5
        name = f"{size}x{size}, {f'tiles of {tile_size}' if tile_size else 'at once'}"
        measured[name] = [memory["grown"], memory["seconds"]]
    difference = (pictures[1024, TILE_SIZE] - pictures[1024, None]).abs().mean().item()
    print(json.dumps({"decode": measured, "difference": difference}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, path = arguments.child
        return decode(path) if name == "decode" else draw(name, path, arguments.steps)
    path, runs = measure.random_checkpoint(), {name: [] for name in NAMES}
    for round in range(arguments.rounds):
        for name in NAMES:
            run = measure.in_child(__file__, "--child", name, path, "--steps", arguments.steps)
            print(f"round {round} {name}: {run}", flush=True)
            runs[name].append(run)
    medians = {name: [measure.median(runs[name], what) for what in ("resident", "anonymous")] for name in NAMES}
    rows = [[name, *(f"{size:.0f}" for size in medians[name])] for name in NAMES]
    ratios = [f"{ours / theirs:.2f}" for ours, theirs in zip(medians["ours"], medians["diffusers"])]
    text = measure.table(["512x512", "peak resident, MiB", "peak anonymous, MiB"],
                       [*rows, ["ours / diffusers", *ratios]])
    decoding = measure.in_child(__file__, "--child", "decode", path)
    rows = [[name, f"{grown:.0f}", f"{seconds:.1f}"] for name, (grown, seconds) in decoding["decode"].items()]
    measure.write("memory.md", f"""\
{text}

{measure.table(["decoding", "adds at most, MiB", "s"], rows)}

At 1024x1024, tiled and at once differ by {decoding['difference']:.2f} grey levels of 255 on average.

Medians of {arguments.rounds} processes, {arguments.steps} steps with guidance, bfloat16, weights of 2034 MiB.
{measure.peer_versions()}""")


if __name__ == "__main__":
    main()
