"""How long is a guided step of the UNet as an exported ONNX program, in onnxruntime and OpenVINO, next to our own?

    python -m benchmarks.export [--checkpoint data/emoji.safetensors] [--sizes 128 256] [--rounds 25] [--threads 1]

All compute in float32 what one step of `generate` does, a batch of two, with the weights of one checkpoint, and take
turns within one process. `ours` is the network as it is loaded, `ours, packed` with its weights arranged for the CPU.
The program is exported on first use, which takes minutes, and kept in cache/.

Writes benchmarks/results/export.md.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import openvino
import torch

from benchmarks import measure
from extensions.export import ExportedDiffusion, UNet, read_onnx, write_onnx
from model_loader import preload_models_from_standard_weights
from pipeline import get_time_embedding


def export_once(path, unet):
    """Returns the path of a checkpoint's UNet as an ONNX program."""
    program = measure.CACHE / f"onnx-{Path(path).stem}" / "model.onnx"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        write_onnx(UNet(unet).eval(), program)
    return program


def candidates(path, size, threads):
    """Returns ({name: function that computes a step}, {name: greatest difference to ours})."""
    ours, packed = (preload_models_from_standard_weights(path, "cpu", "float32", pack=pack)["diffusion"]
                    for pack in (False, True))
    program, config = export_once(path, ours), ours.config
    exported = ExportedDiffusion(read_onnx(program, torch.device("cpu")), config, torch.float32)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(program, "CPU", hints)

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, size // 8, size // 8, generator=generator)
    context = torch.randn(2, 77, config.d_context, generator=generator)
    inputs = latents, context, get_time_embedding(500, config.channels[0])
    both = {"sample": latents.repeat(2, 1, 1, 1), "timestep": torch.tensor([500.0]), "encoder_hidden_states": context}
    found = {"ours": lambda: ours(*inputs), "ours, packed": lambda: packed(*inputs),
             "onnxruntime": lambda: exported(*inputs),
             "OpenVINO": lambda: torch.from_numpy(compiled(both)["out_sample"])}
    return found, {name: (run() - ours(*inputs)).abs().max().item() for name, run in found.items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="data/emoji.safetensors")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="pixels a side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [line for size in arguments.sizes
             for line in rows(*candidates(arguments.checkpoint, size, arguments.threads), size, arguments.rounds)]
    header = ["pixels", "", "milliseconds", "of processor time", "processor time over ours", "greatest difference"]
    measure.write("export.md", f"""\
{measure.table(header, lines)}

A guided step of `{Path(arguments.checkpoint).name}` in float32. Medians of {arguments.rounds} rounds, interleaved;
ratios are medians of ratios within a round. At the end {os.getloadavg()[0]:.0f} processes shared {os.cpu_count()}
cores: where they are more than the cores, only processor time tells, and caches are cold.
{measure.machine("onnxruntime", "openvino", "onnxscript")}""")


def rows(functions, differences, size, rounds):
    """The table's rows for one size."""
    cpu = {name: [] for name in functions}
    times = measure.interleave({name: count_cpu(function, cpu[name]) for name, function in functions.items()}, rounds)
    cpu = {name: seconds[1:] for name, seconds in cpu.items()}  # without the warm-up
    for name in functions:
        yield [f"{size}×{size}", name, f"{1000 * statistics.median(times[name]):.0f}",
               f"{1000 * statistics.median(cpu[name]):.0f}", f"{measure.ratio(cpu, name, 'ours'):.2f}",
               f"{differences[name]:.0e}"]


def count_cpu(function, seconds):
    """Returns the function with its processor time, that of all threads, noted in a list."""
    def run():
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)

    return run


if __name__ == "__main__":
    main()
