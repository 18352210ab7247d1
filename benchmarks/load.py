"""From file to ready modules: how long does it take, and how much memory, next to diffusers' `from_single_file`?

    python -m benchmarks.load [--rounds 3] [--formats safetensors ckpt] [--files float32 float16] [--dtypes bfloat16 float32]

Loads the same random checkpoint of full size, each time in a new process and ours and diffusers' in turn: in float32 as
SD 1.5 was published (4 GiB), and in float16 (2 GiB); made on first use and in the page cache. `load` is the time inside
the process from path to modules and tokenizer, imports not included; `CPU` that of all threads, `process` the whole
process, imports included. `memory` is by how much the process's anonymous memory grew while loading, at its peak, in
sizes of the weights in the dtype that they are loaded as. Aims: at most half of diffusers' time, and 1.1 times the
weights; if memory misses its aim, the script fails. diffusers loads faster where accelerate is installed, as its users are
advised, which pip does not do by itself: both are measured.

Writes benchmarks/results/load.md. Reads /proc, so Linux only.
"""

import argparse
import importlib.util
import json
import sys

import torch

from benchmarks import measure

NAMES = ["ours", "diffusers", "diffusers without accelerate"]
LIMIT = 1.1  # anonymous memory that loading may take, in sizes of the weights


def load(name, path, dtype):
    """In a process of its own: loads once and prints what it took."""
    dtype = getattr(torch, dtype)
    if name == "ours":
        from transformers import CLIPTokenizerFast  # noqa: F401  for the import not to count

        import model_loader

        def from_file():
            model_loader.load_tokenizer()
            return model_loader.preload_models_from_standard_weights(path, "cpu", dtype).values()
    else:
        if name == "diffusers without accelerate":
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *path: None if name == "accelerate" else find(name, *path)
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401  for these not to count either

        def from_file():
            pipeline = measure.diffusers_pipeline(path, dtype)
            return pipeline.text_encoder, pipeline.vae, pipeline.unet

    modules, measured = measure.watch_memory(from_file)
    size = sum(weight.nbytes for module in modules for weight in module.parameters()) / 2**20
    print(json.dumps({"load": measured["seconds"], "cpu": measured["cpu"], "memory": measured["grown"] / size}))


def compare(path, dtype, rounds):
    """Returns rows of the table and the most memory that ours took: `rounds` loads by each, after one that is not counted.
    """
    runs = {name: [] for name in NAMES}
    for round in range(rounds + 1):
        for name in NAMES:
            run = measure.in_child(__file__, "--child", name, path, dtype)
            print(f"round {round} {path.name} {dtype} {name}: {run}" + " (warm-up)" * (round == 0), flush=True)
            if round:
                runs[name].append(run)
    times, rows = {name: [run["load"] for run in runs[name]] for name in NAMES}, []
    for name in NAMES:
        figures = [f"{measure.median(runs[name], what):.2f}" for what in ("load", "process", "memory")]
        rows.append([path.name.removeprefix("random-"), dtype, name, *figures, f"{measure.ratio(times, 'ours', name):.2f}"])
    return rows, max(run["memory"] for run in runs["ours"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", nargs="+", choices=["float32", "float16"], default=["float32", "float16"])
    parser.add_argument("--formats", nargs="+", choices=["safetensors", "ckpt"], default=["safetensors", "ckpt"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"],
                        default=["bfloat16", "float32"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return load(*arguments.child)
    results = [compare(measure.random_checkpoint(f".{suffix}", getattr(torch, file)), dtype, arguments.rounds)
               for file in arguments.files for suffix in arguments.formats for dtype in arguments.dtypes]
    header = ["file", "loaded as", "", "load, s", "process, s", "memory", "ours / this"]
    text = measure.table(header, [row for rows, _ in results for row in rows])
    measure.write("load.md", f"""\
{text}

Medians of {arguments.rounds} rounds, the file in the page cache; memory in sizes of the loaded weights.
{measure.peer_versions()}""")
    worst = max(memory for _, memory in results)
    if worst > LIMIT:
        sys.exit(f"loading took {worst:.2f} of the weights' size, more than {LIMIT}")


if __name__ == "__main__":
    main()
