"""How long is one guided step of the UNet at 512x512, one decoding, one text encoding, next to diffusers and OpenVINO?

    python -m benchmarks.unet_step [--dtypes bfloat16 float32] [--parts unet decoder text] [--rounds 5] [--no-openvino]

All have the weights of one random checkpoint of full size (made on first use) and the same inputs, and take turns
within one process. `ours` has packed weights, as `generate` loads large checkpoints on the CPU; `ours, plain` is what
the loader returns with pack=False. The peers are diffusers, eager, and its UNet through OpenVINO, to which a hint says
in which precision to compute; converting for it takes two minutes and is not counted.

A guided step predicts noise for the prompt and for the empty prompt: a batch of two for the peers; ours is given the
latents once. Before timing, each output is compared with diffusers' in float32.

Share of the matrix rate: FLOP per second, over what a product of 2048x2048 matrices reaches. The FLOP are those of a
plain batch of two (convolutions and products, those within attention included); work that ours saves counts as done.

Writes benchmarks/results/unet_step-PROCESSOR.md, a file for each kind of processor.
"""

import argparse

import torch

import model_loader
from benchmarks import measure
from clip import CLIP
from decoder import VAE_Decoder
from diffusion import Diffusion
from pipeline import get_time_embedding


class Plain(torch.nn.Module):
    """diffusers' UNet, with tensors alone in and out."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timestep, context):
        return self.unet(latents, timestep, encoder_hidden_states=context, return_dict=False)[0]


def openvino_unet(path, inputs, dtype):
    """Returns diffusers' UNet as a compiled OpenVINO model: a function of (latents, timestep, context)."""
    import openvino

    model = measure.CACHE / "openvino-unet.xml"
    if not model.exists():
        unet = Plain(measure.diffusers_pipeline(path, torch.float32).unet)
        example = tuple(torch.from_numpy(x) for x in inputs)
        openvino.save_model(openvino.convert_model(unet, example_input=example), model)  # in float16, as in the file
    hint = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda *inputs: torch.from_numpy(compiled(inputs)[0])


def unet_candidates(ours, plain, pipeline, dtype, with_openvino):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 64, 64, generator=generator).bfloat16().to(dtype)  # the same numbers in both dtypes
    context = torch.randn(2, 77, 768, generator=generator).bfloat16().to(dtype)
    both, timestep, embedding = latents.repeat(2, 1, 1, 1), torch.tensor(500), get_time_embedding(500).to(dtype)
    candidates = {
        "ours": lambda: ours["diffusion"](latents, context, embedding),
        "ours, plain": lambda: plain["diffusion"](latents, context, embedding),
        "diffusers": lambda: pipeline.unet(both, timestep, encoder_hidden_states=context, return_dict=False)[0],
    }
    if with_openvino:
        inputs = both.float().numpy(), timestep.numpy(), context.float().numpy()
        compiled = openvino_unet(measure.random_checkpoint(), inputs, dtype)
        candidates["openvino"] = lambda: compiled(*inputs)
    return candidates


def decoder_candidates(ours, plain, pipeline, dtype):
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    scale = pipeline.vae.config.scaling_factor
    return {"ours": lambda: ours["decoder"](latents), "ours, plain": lambda: plain["decoder"](latents),
            "diffusers": lambda: pipeline.vae.decode(latents / scale, return_dict=False)[0]}


def text_candidates(ours, plain, pipeline):
    tokens = torch.randint(49408, (2, 77), generator=torch.Generator().manual_seed(0))
    return {"ours": lambda: ours["clip"](tokens), "ours, plain": lambda: plain["clip"](tokens),
            "diffusers": lambda: pipeline.text_encoder(tokens)[0]}


def part_candidates(part, ours, plain, pipeline, dtype, with_openvino=False):
    if part == "unet":
        return unet_candidates(ours, plain, pipeline, dtype, with_openvino)
    if part == "decoder":
        return decoder_candidates(ours, plain, pipeline, dtype)
    return text_candidates(ours, plain, pipeline)


def rows(part, candidates, exact, dtype, rounds, rate):
    """The table's rows for one part: medians, ratios to diffusers, speed, and distance to the exact result."""
    distances = {name: (run().float() - exact).square().mean().sqrt() / exact.std()
                 for name, run in candidates.items()}
    times = measure.interleave(candidates, rounds)
    for name, distance in distances.items():
        seconds = measure.statistics.median(times[name])
        speed, ratio = FLOP[part]() / seconds / 1e9, measure.ratio(times, "diffusers", name)
        yield [part, str(dtype).removeprefix("torch."), name, f"{seconds:.3f}", f"{ratio:.2f}", f"{speed:.0f}",
               f"{speed / rate:.0%}", f"{distance:.1e}"]


FLOP = {"unet": lambda: measure.count_flop(Diffusion, (2, 4, 64, 64), (2, 77, 768), (1, 320)),
        "decoder": lambda: measure.count_flop(VAE_Decoder, (1, 4, 64, 64)),
        "text": lambda: 2 * 2 * 77 * sum(weight.numel() for layer in CLIP().layers for weight in layer.parameters())}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--parts", nargs="+", choices=list(FLOP), default=list(FLOP))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-openvino", action="store_true")
    arguments = parser.parse_args()
    path, load, lines, rates = measure.random_checkpoint(), model_loader.preload_models_from_standard_weights, [], []
    pipeline = measure.diffusers_pipeline(path, torch.float32)
    exact = {part: part_candidates(part, None, None, pipeline, torch.float32)["diffusers"]()
             for part in arguments.parts}
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        del pipeline  # several copies of the weights are more than 16 GB
        ours, plain = load(path, "cpu", dtype, pack=True), load(path, "cpu", dtype)
        pipeline = measure.diffusers_pipeline(path, dtype)
        rate = measure.matrix_rate(dtype)
        rates.append(f"{str(dtype).removeprefix('torch.')} {rate:.0f} GFLOP/s")
        for part in arguments.parts:
            candidates = part_candidates(part, ours, plain, pipeline, dtype, not arguments.no_openvino)
            rounds = arguments.rounds * (10 if part == "text" else 1)  # so short that noise weighs more
            lines += rows(part, candidates, exact[part], dtype, rounds, rate)
        del ours, plain, candidates
    header = ["part", "dtype", "", "seconds", "times as fast as diffusers", "GFLOP/s", "of the matrix rate",
              "distance to float32"]
    measure.write(f"unet_step-{measure.processor()}.md", f"""\
{measure.table(header, lines)}

Medians of {arguments.rounds} rounds (text: ten times as many), interleaved; ratios are medians of ratios within a
round. Distance: root mean square to diffusers' result in float32, in its standard deviations.
Matrix products: {', '.join(rates)}.
{measure.peer_versions()}""")


if __name__ == "__main__":
    main()
