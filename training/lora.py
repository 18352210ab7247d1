"""Teaches a model a style or a thing, as a LoRA: a small file of changes to its weights (arXiv 2106.09685).

    python -m training.lora pictures/ --name mine --caption "a mug in my style"
    python cli.py "a cat in my style <lora:mine:1>"

Writes data/loras/NAME.safetensors in kohya's layout, and meanwhile, to training/runs/lora-NAME/, a log (CSV), sheets of
pictures, and what the run needs to go on: stop it with Ctrl-C and repeat the command. README.md has more.
"""

import json
import math
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip import CLIPLayer
from diffusion import GEGLU, AttentionBlock, Downsample, ResidualBlock, Upsample
from model_converter import diffusers_names
from pipeline import tokenize
from training import loop, pictures, teaching

PREFIXES = {"diffusion": "lora_unet_", "clip": "lora_te_"}  # of kohya's names
NETWORKS = {"unet": "diffusion", "text": "clip"}


class LowRank(nn.Module):
    """What is added to what a layer returns: x -> alpha / rank * up(down(x)), 0 before training.

    Args:
        layer: a linear layer or a convolution.
        n_parts: how many projections it fuses; this is for one of them.
    """

    def __init__(self, layer: nn.Module, n_parts: int, rank: int, alpha: float):
        super().__init__()
        out, *shape = layer.weight.shape
        self.down = nn.Parameter(torch.empty(rank, *shape))
        self.up = nn.Parameter(torch.zeros(out // n_parts, rank, *[1] * len(shape[1:])))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.place = {"stride": layer.stride, "padding": layer.padding} if shape[1:] else None
        self.alpha, self.scale = alpha, alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.place:
            return F.conv2d(F.conv2d(x, down, **self.place), up) * self.scale
        return F.linear(F.linear(x, down), up) * self.scale


def add_low_rank(network: str, module: nn.Module, rank: int, alpha: float, conv_rank: int = 0) -> nn.ModuleDict:
    """Has the layers of a network add low-rank changes, which are returned by kohya's names, on the CPU in float32.

    Args:
        network: "diffusion" or "clip".
        module: a `Diffusion` or `CLIP`; its own weights stay as they are.
        rank, alpha: of the linear layers around attention.
        conv_rank: of the convolutions in residual blocks and between levels, with alpha in proportion; 0 is none.
    """
    changes = nn.ModuleDict()
    for parent, block in module.named_modules():
        kind, block_rank = None, rank
        if isinstance(block, (AttentionBlock, CLIPLayer)):
            kind = nn.Linear
        if isinstance(block, (ResidualBlock, Downsample, Upsample)) and conv_rank:
            kind, block_rank = nn.Conv2d, conv_rank
        for name, layer in block.named_modules():
            if not kind or not isinstance(layer, kind):
                continue
            paths = diffusers_names(network, f"{parent}.{name}.weight", module.config)
            parts = [LowRank(layer, len(paths), block_rank, alpha * block_rank / rank) for _ in paths]
            attach(layer, parts)
            for path, part in zip(paths, parts):
                changes[PREFIXES[network] + path.removesuffix(".weight").replace(".", "_")] = part
    return changes


def attach(layer, parts):
    """Has a layer add to its product what its parts, those of a fused projection side by side, make of its input."""

    def change(x):
        return torch.cat([part(x) for part in parts], dim=-1) if len(parts) > 1 else parts[0](x)

    def gated(x):  # GEGLU multiplies before it returns
        hidden, gate = (F.linear(x, layer.weight, layer.bias) + change(x)).chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    if isinstance(layer, GEGLU):
        layer.forward = gated
    else:
        layer.register_forward_hook(lambda _, inputs, output: output + change(inputs[0]))


class LoraStage:
    """Low-rank changes to the UNet, the text encoder or both, for `loop.train`."""

    def __init__(self, lesson: teaching.Lesson, networks, rank: int, alpha: float, conv_rank: int, prompts: list[str]):
        self.lesson, self.prompts = lesson, prompts
        captions = [example.caption for example in lesson.examples]
        self.contexts = lesson.encode(captions)
        self.tokens = tokenize(captions, lesson.tokenizer, lesson.clip.config.n_tokens).to(lesson.device)
        self.modules = nn.ModuleDict({network: add_low_rank(network, lesson.models[network], rank, alpha, conv_rank)
                                      for network in networks}).to(lesson.device)

    def loss(self, step, batch, generator):
        rows = self.lesson.pick(batch, generator)
        context = self.lesson.clip(self.tokens[rows]) if "clip" in self.modules else self.contexts[rows]
        return self.lesson.noise_loss(self.lesson.unet, self.lesson.latents[rows], context, generator)

    def report(self):
        return "; ".join(self.prompts), loop.sheet(self.lesson.draw(self.prompts), len(self.prompts))


def to_kohya(modules: nn.ModuleDict) -> dict[str, Tensor]:
    """Returns trained changes as kohya's scripts store them, in float16: {"lora_unet_….lora_down.weight": …, …}"""
    tensors = {}
    for changes in modules.values():
        for name, change in changes.items():
            for half, weight in (("down", change.down), ("up", change.up)):
                is_conv = name.startswith("lora_unet_") and name.endswith(("proj_in", "proj_out"))  # in SD 1.x's files
                weight = weight.detach()[:, :, None, None] if is_conv else weight.detach()
                tensors[f"{name}.lora_{half}.weight"] = weight.half()
            tensors[f"{name}.alpha"] = torch.tensor(float(change.alpha))
    return tensors


def describe(arguments, lesson, alpha):
    """Returns the metadata that kohya's scripts write, as far as it applies."""
    captions = Counter(example.caption for example in lesson.examples)
    return {
        "ss_base_model_version": "sd_v1", "ss_sd_model_name": lesson.path.name, "ss_output_name": arguments.name,
        "ss_network_module": "networks.lora", "ss_network_dim": arguments.rank, "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": arguments.conv_rank,
                                       "conv_alpha": alpha * arguments.conv_rank / arguments.rank}),
        "ss_v2": False, "ss_learning_rate": arguments.learning_rate, "ss_max_train_steps": arguments.steps,
        "ss_batch_size_per_device": arguments.batch, "ss_gradient_accumulation_steps": arguments.accumulate,
        "ss_resolution": (lesson.size, lesson.size), "ss_num_train_images": len(lesson.examples),
        "ss_mixed_precision": str(lesson.dtype).removeprefix("torch."), "ss_min_snr_gamma": arguments.snr_gamma,
        "ss_tag_frequency": json.dumps({arguments.folder.name: captions}),
    }


def main(argv=None):
    parser = teaching.make_parser(__doc__.splitlines()[0], "loras", steps=500, learning_rate=1e-3)
    add = parser.add_argument
    add("--caption", help="for the pictures that have none of their own")
    add("--rank", type=int, default=8, help="the size of the changes (%(default)s)")
    add("--alpha", type=float, help="their strength is alpha / rank (as rank)")
    add("--conv-rank", type=int, default=0, help="the same for convolutions; 0 leaves them alone (%(default)s)")
    add("--networks", nargs="+", choices=NETWORKS, default=["unet"], help="which are changed (%(default)s)")
    arguments = parser.parse_args(argv)
    teaching.check(arguments)
    if arguments.conv_rank < 0 or arguments.conv_rank and "unet" not in arguments.networks:
        raise ValueError(f"--conv-rank is {arguments.conv_rank}; give a number from 0 on, and --networks with unet")
    examples = pictures.read_folder(arguments.folder, arguments.caption)
    result, run = teaching.begin("lora", arguments, arguments.name)

    torch.manual_seed(0)
    lesson = teaching.Lesson(arguments, examples)
    networks = [NETWORKS[name] for name in dict.fromkeys(arguments.networks)]
    alpha = arguments.alpha or arguments.rank
    stage = LoraStage(lesson, networks, arguments.rank, alpha, arguments.conv_rank, lesson.sample_prompts(arguments))
    modules = loop.train("lora", stage, lesson.settings(arguments), run)
    teaching.write(result, to_kohya(modules), describe(arguments, lesson, alpha))


if __name__ == "__main__":
    teaching.run(main)
