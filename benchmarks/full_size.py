"""Does it work at full size? Builds a random SD 1.5 checkpoint, loads it and draws 512x512 in 2 steps on the CPU.

    python benchmarks/full_size.py [--format safetensors|ckpt] [--stored float16] [--dtype auto]

Prints seconds and memory. Anonymous memory is what the process itself takes; mapped memory is the file, which the
system can drop and read again. While loading, anonymous memory may grow by 1.15 times the weights' size in their final
dtype; if it grows by more, the script says so and fails. The checkpoint lies in a temporary folder (2 GiB in float16, 4
in float32; TMPDIR chooses the disk) and is removed at the end. Reads /proc, so Linux only.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.15  # anonymous memory that loading may take, in sizes of the weights
sys.path.insert(0, str(ROOT))


def write_checkpoint(path, dtype):
    """Random weights of SD 1.5's shapes: matrices scaled by their fan-in, gains near one, so that activations stay
    near one."""
    import torch
    from safetensors.torch import save_file

    from model_converter import NETWORKS, to_standard_weights

    with torch.device("meta"):
        shapes = to_standard_weights({name: network().state_dict() for name, network in NETWORKS.items()})
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, like in shapes.items():
        weight = torch.randn(like.shape, generator=generator)
        weight = weight / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight * 0.1 + name.endswith("weight")
        weights[name] = weight.to(getattr(torch, dtype))
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)


class Memory(threading.Thread):
    """Watches what this process holds in memory, in MiB: `anonymous` and `mapped` are the peaks since the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.anonymous, self.mapped = self.read()
        self.start()

    @staticmethod
    def read():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        size = {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "RssShmem")}
        return size["RssAnon"], size["RssFile"] + size["RssShmem"]  # a file in a tmpfs counts as shared memory

    def run(self):
        while True:
            anonymous, mapped = self.read()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
            time.sleep(0.005)


def load_and_draw(path, dtype):
    import torch

    import model_loader
    from pipeline import generate

    tokenizer = model_loader.load_tokenizer()
    memory, began = Memory(), time.perf_counter()
    before = memory.anonymous
    models = model_loader.preload_models_from_standard_weights(path, "cpu", dtype)
    seconds, grown = time.perf_counter() - began, memory.anonymous - before
    weights = [weight for model in models.values() for weight in model.parameters()]
    size = sum(weight.nbytes for weight in weights) / 2**20
    print(f"load as {weights[0].dtype}: {seconds:.1f} s; weights {size:.0f} MiB; anonymous memory grew by {grown:.0f} "
          f"MiB, {grown / size:.2f} of the weights (at most {LIMIT}); mapped {memory.mapped:.0f} MiB", flush=True)

    began = time.perf_counter()
    image = generate("a futuristic city on Mars during sunset", models=models, tokenizer=tokenizer, n_inference_steps=2,
                     sampler_name="ddim", seed=42)
    print(f"draw {image.shape[1]}x{image.shape[0]}, 2 steps with guidance: {time.perf_counter() - began:.1f} s on "
          f"{torch.get_num_threads()} threads; grey levels {image.mean():.0f} ± {image.std():.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak of the whole process: {peak:.0f} MiB, of these anonymous at most {memory.anonymous:.0f} MiB")
    if grown > LIMIT * size:
        sys.exit(f"loading took {grown / size:.2f} of the weights' size, more than {LIMIT}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=["safetensors", "ckpt"], default="safetensors")
    parser.add_argument("--stored", choices=["float16", "bfloat16", "float32"], default="float16",
                        help="the dtype in the file")
    parser.add_argument("--dtype", default="auto", help="the dtype to load into")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the second process
    arguments = parser.parse_args()
    if arguments.load:
        return load_and_draw(arguments.load, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"random.{arguments.format}"
        write_checkpoint(path, arguments.stored)
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB, {arguments.stored}", flush=True)
        command = [sys.executable, __file__, "--load", path, "--dtype", arguments.dtype]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
