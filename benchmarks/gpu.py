"""How many pictures a second on an NVIDIA GPU, next to diffusers, eager and compiled?

    python -m benchmarks.gpu [--batches 1 4 8 16 32] [--steps 20] [--rounds 3] [--no-compile]

One random checkpoint of full size (2 GiB, made on first use), float16, 512x512 pixels with guidance, DDIM; ours and
diffusers', each plain and compiled (torch.compile, mode "reduce-overhead": a minute or two for each batch size, not
counted), in turn within one process. Share of the matrix rate: FLOP of all steps and the decoding per second, over what
a product of 8192x8192 matrices in bfloat16 reaches. Peak memory is what PyTorch allocates for one picture, as it is and
with idle_device="cpu", with the networks on the CPU before.

Writes benchmarks/results/gpu.md.
"""

import argparse
from functools import partial

import torch

import model_loader
from benchmarks import measure
from decoder import VAE_Decoder
from diffusion import Diffusion
from pipeline import generate

PROMPT = "a futuristic city on Mars during sunset"


def flop_of_a_picture(steps):
    step = measure.count_flop(Diffusion, (2, 4, 64, 64), (2, 77, 768), (1, 320))
    return steps * step + measure.count_flop(VAE_Decoder, (1, 4, 64, 64))


def matrix_rate(size=8192):
    """GFLOP/s of a matrix product in bfloat16, the best of 10 runs of 10."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)

    def multiply():
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()

    return 10 * 2 * size**3 / min(measure.timed(multiply) for _ in range(10)) / 1e9


def candidates(path, steps, with_compile):
    """Returns {name: function that draws a batch}"""
    tokenizer, drawers = model_loader.load_tokenizer(), {}
    for is_compiled in [False, True][: 1 + with_compile]:
        models = model_loader.preload_models_from_standard_weights(path, "cuda", "float16", compile=is_compiled)
        pipeline = measure.diffusers_pipeline(path, torch.float16).to("cuda")
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        if is_compiled:
            pipeline.unet.compile(mode="reduce-overhead")
            pipeline.vae.decoder.compile(mode="reduce-overhead")
        suffix = ", compiled" * is_compiled
        drawers["ours" + suffix] = lambda batch, models=models: generate(
            [PROMPT] * batch, models=models, tokenizer=tokenizer, sampler_name="ddim", n_inference_steps=steps, seed=42)
        drawers["diffusers" + suffix] = lambda batch, pipeline=pipeline: pipeline(
            [PROMPT] * batch, num_inference_steps=steps, generator=torch.Generator().manual_seed(42)).images
    return drawers


def peak_memory(path, steps, idle_device):
    """Returns the MiB that PyTorch allocates at most for one picture, beyond what it has before."""
    models = model_loader.preload_models_from_standard_weights(path, "cpu", "float16")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generate(PROMPT, models=models, tokenizer=model_loader.load_tokenizer(), sampler_name="ddim", seed=42,
             device="cuda", n_inference_steps=steps, idle_device=idle_device, progress=False)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: PyTorch finds no CUDA device on this machine, which this benchmark needs")
    path = measure.random_checkpoint()
    peaks = [peak_memory(path, arguments.steps, idle_device) for idle_device in (None, "cpu")]
    drawers = candidates(path, arguments.steps, not arguments.no_compile)
    rate, flop, rows = matrix_rate(), flop_of_a_picture(arguments.steps), []
    for batch in arguments.batches:
        draw_batch = {name: partial(draw, batch) for name, draw in drawers.items()}
        times = measure.interleave(draw_batch, arguments.rounds)
        for name in drawers:
            speed = batch / measure.statistics.median(times[name])
            rows.append([batch, name, f"{speed:.2f}", f"{measure.ratio(times, 'diffusers', name):.2f}",
                         f"{speed * flop / 1e9 / rate:.0%}"])
    header = ["batch", "", "pictures a second", "times as fast as diffusers", "of the matrix rate"]
    measure.write("gpu.md", f"""\
{measure.table(header, rows)}

Peak memory of a picture: {peaks[0]:.0f} MiB; with idle_device="cpu" {peaks[1]:.0f} MiB.
{torch.cuda.get_device_name()}, float16, 512x512, {arguments.steps} steps with guidance; medians of {arguments.rounds}
rounds. A matrix product reached {rate / 1000:.0f} TFLOP/s in bfloat16. {measure.peer_versions()}""")


if __name__ == "__main__":
    main()
