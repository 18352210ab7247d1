"""What add-ons cost, at SD 1.5's size, beside diffusers: merging a LoRA, and a guided step that a ControlNet leads.

    OMP_NUM_THREADS=2 python -m benchmarks.addons [--only lora controlnet] [--size 256]

The LoRA has rank 64, in float16, for the 278 layers of the UNet that those with convolutions change. Measured is the
way from its file to merged weights in float32: `add_lora` beside `load_lora_weights` and `fuse_lora`.
"""

import argparse
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from benchmarks import measure
from diffusion import Diffusion, DiffusionConfig, get_time_embedding
from extensions.lora import add_lora, lora
from model_converter import diffusers_names

LORA_LAYERS = re.compile(r"attentions\.\d+\.(proj_in|proj_out|.*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))$|"
                         r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)$|samplers\.0\.conv$")


def random_weights(model):
    """Returns a module from the meta device with random weights, all of one small scale."""
    for weight in model.to_empty(device="cpu").parameters():
        weight.normal_(0, 0.02)
    return model.eval()


def shared_unets():
    """Returns our UNet and diffusers', with the same random weights in one memory."""
    with torch.device("meta"):
        unet, theirs = Diffusion(), UNet2DConditionModel(cross_attention_dim=768)
    unet = random_weights(unet)
    config = DiffusionConfig()
    weights = {name: part for ours, weight in unet.state_dict().items() for names in
               [diffusers_names("diffusion", ours, config)] for name, part in zip(names, weight.chunk(len(names)))}
    theirs.load_state_dict({name: weights[name].reshape(weight.shape) for name, weight in theirs.state_dict().items()},
                           assign=True)
    return unet, theirs


def lora_merge(arguments):
    """From a file to merged weights: the table's rows."""
    unet, theirs = shared_unets()
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=theirs, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False)
    layers = {path: layer.weight for path, layer in theirs.named_modules() if LORA_LAYERS.search(path)}
    assert len(layers) == 278
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        tensors = {}
        for name, weight in layers.items():
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(64, *weight.shape[1:]).half() / 100
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(len(weight), 64, *[1] * (weight.ndim - 2)).half() / 100
        save_file(tensors, path)

        def fuse():
            pipe.load_lora_weights(path)
            pipe.fuse_lora()

        def clean(name):
            if name == "diffusers":
                pipe.unfuse_lora()
                pipe.unload_lora_weights()

        candidates = {"ours": lambda: add_lora({"diffusion": unet}, path), "diffusers": fuse}
        some = list(layers.values())[::20]
        before = [weight.clone() for weight in some]
        with lora({"diffusion": unet}, path):
            merged = [weight.clone() for weight in some]
        fuse()
        smallest, largest = (f(map(lambda a, b: (a - b).abs().max(), some, others)) for f, others in
                             ((min, before), (max, merged)))
        print(f"weights change by {smallest:.1e} or more; largest difference to diffusers: {largest:.1e}")
        clean("diffusers")
        times, memory = {name: [] for name in candidates}, {name: [] for name in candidates}
        for _ in range(arguments.rounds):
            for name, run in candidates.items():
                measured = measure.watch_memory(run)[1]
                times[name].append(measured["seconds"])
                memory[name].append(measured["grown"])
                clean(name)
    for name in candidates:
        yield ["LoRA merge", name, f"{measure.statistics.median(times[name]):.2f}",
               f"{measure.ratio(times, 'diffusers', name):.2f}", f"{measure.statistics.median(memory[name]):.0f}"]


def controlnet_step(arguments):
    """A step of two rows, with guidance, as the pipelines do it: the table's rows."""
    from extensions.controlnet import Controlled, convert_controlnet

    size, rounds = arguments.size, arguments.rounds
    unet, their_unet = shared_unets()
    with torch.device("meta"):
        their_control = ControlNetModel(cross_attention_dim=768)
    their_control = random_weights(their_control)
    control = convert_controlnet(their_control.state_dict(), {"unet_heads": 8, "unet_groups": 32}, {}).eval()
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 4, size // 8, size // 8, generator=generator), torch.randn(2, 77, 768)
    image, time_embedding = torch.rand(1, 3, size, size, generator=generator), get_time_embedding(500)

    def begin(unet, control):
        run = Controlled(unet, [(control, image, 1.0)]).for_run(SimpleNamespace(timesteps=range(100)))
        return lambda: run(latents, context, time_embedding)

    def diffusers_step():
        rows, images = torch.cat([latents] * 2), torch.cat([image] * 2)
        down, middle = their_control(rows, 500, context, images, 1.0, return_dict=False)
        return their_unet(rows, 500, context, down_block_additional_residuals=down,
                          mid_block_additional_residual=middle, return_dict=False)[0]

    ours, plain = begin(unet, control), lambda: unet(latents, context, time_embedding)
    print(f"largest difference to diffusers: {(ours() - diffusers_step()).abs().max():.1e}")
    candidates = {"ours": ours, "diffusers": diffusers_step, "ours, without a ControlNet": plain}
    times = measure.interleave(candidates, rounds)
    memory = {name: measure.watch_memory(run)[1]["grown"] for name, run in candidates.items()}
    for name in candidates:
        yield ["ControlNet step", name, f"{measure.statistics.median(times[name]):.2f}",
               f"{measure.ratio(times, 'diffusers', name):.2f}", f"{memory[name]:.0f}"]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    questions = {"lora": lora_merge, "controlnet": controlnet_step}
    parser.add_argument("--only", nargs="+", choices=questions, default=list(questions))
    arguments = parser.parse_args()
    rows = [row for name in arguments.only for row in questions[name](arguments)]
    header = ["", "", "seconds", "times as fast as diffusers", "MiB while it runs"]
    measure.write("addons.md", f"""\
{measure.table(header, rows)}

ControlNet: pictures of {arguments.size} pixels a side. All in float32. Medians of {arguments.rounds} rounds,
interleaved; ratios are medians of ratios within a round.
{measure.peer_versions()}""")


if __name__ == "__main__":
    main()
