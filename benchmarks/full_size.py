"""Does it work at full size? Builds a random SD 1.5 checkpoint, loads it and draws 512x512 in 2 steps on the CPU.

    python benchmarks/full_size.py [--format safetensors|ckpt] [--stored float16] [--dtype auto]

Prints seconds and memory. Anonymous memory is what the process itself takes; mapped memory is the file, which the
system can drop and read again. Loading has to stay within 1.15 times the weights' size in their final dtype, anonymous
memory counted. The checkpoint lies in a temporary folder and is removed at the end.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_checkpoint(path, dtype):
    """Random weights of SD 1.5's shapes, each scaled by its fan-in, so that activations stay near one."""
    import torch
    from safetensors.torch import save_file

    from model_converter import NETWORKS, to_standard_weights

    with torch.device("meta"):
        shapes = to_standard_weights({name: network().state_dict() for name, network in NETWORKS.items()})
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, like in shapes.items():
        weight = torch.randn(like.shape, generator=generator)
        weight = weight / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight * 0.1 + ("norm" in name)
        weights[name] = weight.to(dtype)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)


class Memory(threading.Thread):
    """Watches this process's memory; the peaks are in MiB. Linux only."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_anonymous = self.read()[0]
        self.anonymous = self.mapped = 0.0
        self.start()

    @staticmethod
    def read():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]

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
    models = model_loader.preload_models_from_standard_weights(path, "cpu", dtype)
    seconds = time.perf_counter() - began
    weights = [weight for model in models.values() for weight in model.parameters()]
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 2**20
    grown = memory.anonymous - memory.start_anonymous
    print(f"load {path.suffix} as {weights[0].dtype}: {seconds:.1f} s; weights {size:.0f} MiB; peak anonymous memory "
          f"{grown:.0f} MiB ({grown / size:.2f} of the weights), mapped {memory.mapped:.0f} MiB")

    began = time.perf_counter()
    image = generate("a futuristic city on Mars during sunset", models=models, tokenizer=tokenizer, n_inference_steps=2,
                     sampler_name="ddim", seed=42)
    print(f"draw {image.shape[1]}x{image.shape[0]}, 2 steps with guidance: {time.perf_counter() - began:.1f} s; peak "
          f"anonymous memory {memory.anonymous:.0f} MiB, mapped {memory.mapped:.0f} MiB; {torch.get_num_threads()} threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=["safetensors", "ckpt"], default="safetensors")
    parser.add_argument("--stored", default="float16", help="the dtype in the file")
    parser.add_argument("--dtype", default="auto", help="the dtype to load into")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the second process
    arguments = parser.parse_args()
    if arguments.load:
        return load_and_draw(arguments.load, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"random.{arguments.format}"
        import torch
        write_checkpoint(path, getattr(torch, arguments.stored))
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB, {arguments.stored}", flush=True)
        subprocess.run([sys.executable, __file__, "--load", path, "--dtype", arguments.dtype], check=True)


if __name__ == "__main__":
    main()
