"""Teaches a model to follow a second picture, edges or whatever, by a ControlNet (arXiv 2302.05543).

    python -m training.controlnet pairs/ --name edges
    python cli.py "a cat" --control data/controlnets/edges.safetensors edges.png

The folder has a control picture for each picture, of the same name, in its folder `control`. Writes
data/controlnets/NAME.safetensors in lllyasviel's layout, and meanwhile, to training/runs/controlnet-NAME/, a log (CSV),
sheets of pictures, and what the run needs to go on: stop it with Ctrl-C and repeat the command. README.md has more.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint_layout import UNET
from diffusion import Diffusion
from extensions.controlnet import Controlled, ControlNet
from images import open_image, to_tensor
from model_converter import to_standard_weights
from training import loop, pictures, teaching


def copy_unet(unet: Diffusion) -> ControlNet:
    """Returns a ControlNet that starts as the way down of a UNet and adds nothing (section 3.1), float32 on the CPU."""
    controlnet = ControlNet(unet.config)
    shared = {name: weight.float().cpu() for name, weight in unet.state_dict().items() if name in
              controlnet.state_dict()}
    controlnet.load_state_dict(shared, strict=False)
    for conv in (*(layer[0] for layer in controlnet.zero_convs), controlnet.middle_block_out[0],
                 controlnet.input_hint_block[-1]):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    return controlnet


class ControlStage:
    """A ControlNet, for `loop.train`.

    Args:
        empty: the share of pictures whose caption is left out, so that the control picture has to tell (section 3.4).
    """

    def __init__(self, lesson: teaching.Lesson, controlnet: ControlNet, empty: float):
        self.lesson, self.empty = lesson, empty
        self.contexts = lesson.encode([example.caption for example in lesson.examples])
        self.no_context = lesson.encode([""])
        pixels = [to_tensor(open_image(example.control), lesson.size, lesson.size) for example in lesson.examples]
        self.controls = (torch.cat(pixels) + 1) / 2  # (n, 3, h, w) in [0, 1]
        self.modules = nn.ModuleDict({"controlnet": controlnet.to(lesson.device)})
        self.controlled = Controlled(lesson.unet, [(controlnet, lesson.examples[0].control, 1.0)])

    def loss(self, step, batch, generator):
        rows = self.lesson.pick(batch, generator)
        is_empty = (torch.rand(batch, generator=generator) < self.empty).to(self.lesson.device)
        context = torch.where(is_empty[:, None, None], self.no_context, self.contexts[rows])
        self.controlled.images = [list(self.controls[rows].split(1))]
        return self.lesson.noise_loss(self.controlled, self.lesson.latents[rows], context, generator)

    def report(self):
        """The first control pictures, and what is drawn after them."""
        shown = self.lesson.examples[: teaching.SAMPLES]
        self.controlled.images = [list(self.controls[: len(shown)].split(1))]
        images = self.lesson.draw([example.caption for example in shown],
                                  models=self.lesson.models | {"diffusion": self.controlled})
        controls = (self.controls[: len(shown)] * 255).round().byte().permute(0, 2, 3, 1)
        both = torch.cat([controls, torch.from_numpy(images)]).numpy()
        return "; ".join(example.caption for example in shown), loop.sheet(both, len(shown))


def to_lllyasviel(controlnet: ControlNet, dtype=torch.float16) -> dict[str, Tensor]:
    """Returns the weights by the names of control_sd15_canny.pth; matrices and kernels in `dtype`, the rest float16."""
    weights = to_standard_weights({"diffusion": controlnet.state_dict()})
    return {"control_model." + name.removeprefix(UNET): weight.to(dtype if weight.ndim > 1 else torch.float16)
            for name, weight in weights.items()}


def main(argv=None):
    parser = teaching.make_parser(__doc__.splitlines()[0], "controlnets", steps=2000, learning_rate=3e-4)
    add = parser.add_argument
    add("--caption", help="for the pictures that have none of their own")
    add("--copy-from", type=Path, metavar="CHECKPOINT", help="whose UNet it starts as (the model's own)")
    add("--empty-prompts", type=float, default=0.5, metavar="SHARE",
        help="of pictures whose caption is left out, so that the control picture has to tell (%(default)s)")
    add("--float8", action="store_true", help="store matrices in 8 bits instead of 16")
    arguments = parser.parse_args(argv)
    teaching.check(arguments)
    if not 0 <= arguments.empty_prompts <= 1:
        raise ValueError(f"--empty-prompts is {arguments.empty_prompts}; give a share from 0 to 1")
    if arguments.copy_from and not arguments.copy_from.exists():
        raise FileNotFoundError(f"{arguments.copy_from}: no such file or folder; name a model of SD 1.x")
    examples = pictures.read_folder(arguments.folder, arguments.caption, controls=True)
    result, run = teaching.begin("controlnet", arguments, arguments.name)

    torch.manual_seed(0)
    lesson = teaching.Lesson(arguments, examples)
    origin = teaching.load_frozen(arguments.copy_from)["diffusion"] if arguments.copy_from else lesson.unet
    controlnet = copy_unet(origin)
    if arguments.gradient_checkpointing:
        loop.checkpoint_gradients(controlnet)
    stage = ControlStage(lesson, controlnet, arguments.empty_prompts)
    loop.train("controlnet", stage, lesson.settings(arguments), run)
    config = controlnet.config
    teaching.write(result, to_lllyasviel(controlnet, torch.float8_e4m3fn if arguments.float8 else torch.float16), {
        "unet_heads": config.n_heads, "unet_groups": config.n_groups, "steps": arguments.steps,
        "model": lesson.path.name})


if __name__ == "__main__":
    teaching.run(main)
