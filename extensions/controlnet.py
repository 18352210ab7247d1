"""ControlNet: a second picture (edges, a pose, depths) says where things are, while the prompt says what they are.

    controlnet = load_controlnet("control_v11p_sd15_canny.safetensors", "cpu")
    edges = canny("cat.png", 100, 200)
    controlled = models | {"diffusion": Controlled(models["diffusion"], [(controlnet, edges, 1.0)])}
    image = generate("a tiger", models=controlled)

A copy of the UNet's way down sees the latents and, from its first block on, the control image. What each of its blocks
finds passes a convolution that was zero when training began, and is added to the skip connection of the UNet's block.
Adding Conditional Control to Text-to-Image Diffusion Models, arXiv 2302.05543, section 3.2; cldm/cldm.py.
"""

import copy
import math
import re
from itertools import count, takewhile
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint_file import CheckpointError, read_checkpoint
from checkpoint_layout import UNET, check_tensors, substitute
from diffusers_folder import read_config, read_json, read_weights
from diffusion import Diffusion, DiffusionConfig, repeat_rows
from images import open_image
from model_converter import diffusers_names, is_finite, standard_names, take
from model_loader import check_device, resolve_dtype


class ControlNet(Diffusion):
    """The way down and the bottleneck of a UNet, each block with a convolution to what it adds to the UNet's.

    What a UNet does not have is named as in the original file. `pools`: whether all pixels get the mean over them, and
    what guidance moves away from gets nothing, as the ControlNet "shuffle" was trained.
    """

    def __init__(self, config: DiffusionConfig = DiffusionConfig(), hint_channels: tuple[int, ...] = (16, 32, 96, 256),
                 pools: bool = False):
        super().__init__(config)
        del self.decoders, self.norm_out, self.conv_out
        self.pools = pools
        skips = [config.channels[0]]  # channels of what the encoders return
        for i, channels in enumerate(config.channels):
            is_last = i == len(config.channels) - 1
            skips += [channels] * (config.n_blocks + (not is_last))
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 1)) for channels in skips)
        self.middle_block_out = nn.Sequential(nn.Conv2d(skips[-1], skips[-1], 1))

        width = hint_channels[0]
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        for channels in hint_channels[1:]:  # each halves width and height
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, channels, 3, padding=1, stride=2), nn.SiLU()]
            width = channels
        self.input_hint_block = nn.Sequential(*layers, nn.Conv2d(width, config.channels[0], 3, padding=1))

    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor, hint: Tensor) -> list[Tensor]:
        """Looks at the latents and the control image.

        Args:
            latents, context, time_embedding: as for `Diffusion`.
            hint: (1 or batch, channels[0], h / 8, w / 8), what `input_hint_block` makes of control images (1 or batch,
                3, h, w) in [0, 1].

        Returns:
            What is to be added to the UNet's skip connections and, last, to what its bottleneck returns: of the same
            shapes, or (rows, channels, 1, 1) if it pools.
        """
        time = self.time_embedding(time_embedding)
        x = self.encoders[0](latents, context, time) + hint
        deepest, skips = self.encode(x, context, time, self.encoders[1:])
        controls = [conv(skip) for conv, skip in zip(self.zero_convs, [x, *skips])]
        controls.append(self.middle_block_out(self.bottleneck(deepest, context, time)))
        return [control.mean((2, 3), keepdim=True) for control in controls] if self.pools else controls


class Controlled(nn.Module):
    """A UNet that ControlNets lead; called like the UNet, and to be put in its place: models["diffusion"].

    Args:
        diffusion: a `diffusion.Diffusion`; it stays as it is.
        controls: (ControlNet, control image, scale) for each of them; their effects add up. An image is what
            `images.open_image` takes, or floats, which are not rounded: an array (h, w, 3) or a tensor (3, h, w) in
            [0, 1], with -1 in all channels where the ControlNet "inpaint" is to draw anew; or a list, with an image for
            each picture that is drawn. It is stretched to the size of the picture.
        start, end: the shares of a run between which there is control, counted in calls of the UNet: of ten calls, 0.3
            to 0.6 controls the fourth, fifth and sixth. Called outside of a run, it controls always.
        guess_mode: leave alone what guidance moves away from, and add less to the finer levels, so that the picture can
            be guessed from the control image without a prompt (cldm/cldm.py; the scales are diffusers').

    Raises:
        ValueError: an argument is out of range, or a ControlNet is not for this UNet.
    """

    n_calls = None  # of the run that this is for

    def __init__(self, diffusion: Diffusion, controls: list[tuple], start: float = 0.0, end: float = 1.0,
                 guess_mode: bool = False):
        super().__init__()
        if not isinstance(diffusion, Diffusion):
            raise ValueError(f"Controlled takes the UNet itself, not {type(diffusion).__name__}; give all ControlNets "
                             f"in one list, and put other wrappers around Controlled")
        if not controls:
            raise ValueError("controls is empty; give at least one (ControlNet, image, scale)")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start is {start!r} and end is {end!r}; give shares of the run, 0 <= start < end <= 1")
        for controlnet, _, scale in controls:
            check_control(diffusion, controlnet, scale)
        self.config = diffusion.config
        self.diffusion = diffusion
        self.controlnets = nn.ModuleList(controlnet for controlnet, _, _ in controls)
        self.images = [read_control_image(image) for _, image, _ in controls]
        self.scales = [scale for _, _, scale in controls]
        self.start, self.end, self.guess_mode = start, end, guess_mode

    def for_run(self, sampler) -> "Controlled":
        """Returns what one run calls in the place of this: with the same networks, but a count of its own."""
        run = copy.copy(self)
        run.n_calls, run.calls, run.hints = len(sampler.timesteps), count(), None
        return run

    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor) -> Tensor:
        """As `Diffusion.forward`."""
        unet = self.diffusion
        if self.n_calls is None:
            hints = self.make_hints(latents)
        else:
            i = next(self.calls)
            if i / self.n_calls < self.start or (i + 1) / self.n_calls > self.end:
                return unet(latents, context, time_embedding)
            hints = self.hints = self.hints or self.make_hints(latents)

        time = unet.time_embedding(time_embedding)
        x, skips = unet.encode(latents, context, time)
        skips.append(unet.bottleneck(x, context, time))
        for controlnet, scale, hint in zip(self.controlnets, self.scales, hints):
            scales = [scale] * len(skips)
            if self.guess_mode and not controlnet.pools:
                scales = (scale * torch.logspace(-1, 0, len(skips))).tolist()
            # The prompts' rows of the context come first, behind them those that guidance moves away from.
            prompts_only = len(context) > len(latents) and (self.guess_mode or controlnet.pools)
            seen = (latents[:, : controlnet.config.in_channels], context[: len(latents)] if prompts_only else context,
                    time_embedding[:, : controlnet.config.channels[0]])
            for k, control in enumerate(controlnet(*(x.to(hint.dtype) for x in seen), hint)):
                if prompts_only:
                    control = torch.cat([control, torch.zeros_like(control)])
                rows = max(len(skips[k]), len(control))
                control = repeat_rows(control, rows).to(latents.dtype)
                skips[k] = torch.add(repeat_rows(skips[k], rows), control, alpha=scales[k])
        x = unet.decode(skips.pop(), skips, context, time)
        return unet.conv_out(nn.functional.silu(unet.norm_out(x)))

    def make_hints(self, latents):
        """Returns what each ControlNet sees of its image, which stays the same for all steps: (batch, width, h, w)."""
        height, width = (8 * size for size in latents.shape[2:])
        hints = []
        for controlnet, images in zip(self.controlnets, self.images):
            if len(latents) % len(images):
                raise ValueError(f"there are {len(images)} control images for {len(latents)} pictures; give one for "
                                 f"all, or as many as pictures")
            pixels = torch.cat([to_pixels(image, height, width) for image in images])
            hint = controlnet.input_hint_block(pixels.to(next(controlnet.parameters())))
            hints.append(repeat_rows(hint, len(latents)))
        return hints


def check_control(diffusion, controlnet, scale):
    if not isinstance(controlnet, ControlNet):
        raise ValueError(f"found {type(controlnet).__name__} where a ControlNet is expected; give what load_controlnet "
                         f"returns")
    for field in ("channels", "attends", "n_blocks", "d_context"):
        theirs, ours = getattr(controlnet.config, field), getattr(diffusion.config, field)
        if theirs != ours:
            raise ValueError(f"the ControlNet is for another UNet: its {field} is {theirs}, the UNet's {ours}")
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"the scale of a ControlNet is {scale!r}; give a finite number, such as 1.0")


def read_control_image(image):
    """One control image, or a list of them -> list of PIL RGB images, or of tensors (1, 3, h, w) for floats"""
    if isinstance(image, (list, tuple)):
        return [control for one in image for control in read_control_image(one)]
    if isinstance(image, Tensor):
        image = image.detach().movedim(-3, -1).float().cpu().numpy()  # channels last
    if not (isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.shape[-1] == 3):
        return [open_image(image)]
    pixels = torch.from_numpy(image.astype(np.float32)).movedim(-1, -3)
    if not ((pixels >= 0) & (pixels <= 1) | (pixels == -1)).all():
        raise ValueError(f"the control image has values from {pixels.min()} to {pixels.max()}; floats must lie in "
                         f"[0, 1], or be -1 where a ControlNet for inpainting draws anew")
    return list(pixels.reshape(-1, 1, *pixels.shape[-3:]))


def to_pixels(image, height, width):
    """What `read_control_image` returned -> (1, 3, height, width) float32, resized as diffusers' image processor does:
    pictures smoothly, floats to the nearest pixel, which leaves -1 what it is"""
    if isinstance(image, Image.Image):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    return nn.functional.interpolate(image, size=(height, width))


def canny(image, low: float = 100, high: float = 200) -> np.ndarray:
    """Returns the edges of a picture, white on black, as the ControlNet "canny" was trained with: (h, w, 3) uint8.

    Args:
        image: what `images.open_image` takes.
        low, high: how steep an edge must be: above `high`, or above `low` and connected to one that is above `high`
            (Canny 1986).
    """
    try:
        import cv2
    except ImportError:
        raise ImportError("canny needs OpenCV: pip install opencv-python-headless") from None
    edges = cv2.Canny(np.array(open_image(image)), low, high)
    return np.stack([edges] * 3, axis=-1)


# ---- loading

# From the original names to diffusers', for what a UNet does not have.
DIFFUSERS_RULES = [
    (r"^zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1"),
    (r"^middle_block_out\.0", "controlnet_mid_block"),
    (r"^input_hint_block\.0", "controlnet_cond_embedding.conv_in"),
    (r"^input_hint_block\.14", "controlnet_cond_embedding.conv_out"),
    (r"^input_hint_block\.(\d+)", lambda match: f"controlnet_cond_embedding.blocks.{int(match[1]) // 2 - 1}"),
]

OTHERS = [  # what only looks like a ControlNet for SD 1.x, and by which names it is known
    ("a Control-LoRA, which holds changes to a UNet", r"^lora_controlnet$|\.(up|down)$"),
    ("a ControlLLLite", "lllite"),
    ("a LoRA", r"^lora_|\.lora_(up|down|A|B)\.|\.(hada|lokr)_"),
    ("an IP-Adapter", r"^(image_proj|ip_adapter)\b"),
    ("a T2I-Adapter", r"^(adapter\.)?body\.0\.|^adapter$|^style_embedding$"),
    ("a union ControlNet", r"^task_embedding$|^control_add_embedding\."),
    ("a SparseCtrl model, for videos", r"motion_modules\."),
    ("a ControlNet for SDXL", r"^label_emb\.|^add_embedding\."),
    ("a ControlNet for SD 3 or Flux", r"^controlnet_blocks\.|^(double|joint|transformer)_blocks\."),
    ("a checkpoint without a ControlNet", r"^model\.diffusion_model\.|^up_blocks\.|^output_blocks\."),
]


def load_controlnet(path, device, dtype="auto", base: dict | None = None) -> ControlNet:
    """Loads a ControlNet for SD 1.x.

    Args:
        path: a `.pth`, `.ckpt` or `.safetensors` file with the names of lllyasviel's v1.0 and v1.1 or with diffusers';
            a complete checkpoint with a ControlNet in it, of which the rest is left alone; or a diffusers folder. A
            file with "shuffle" in its name is taken for the ControlNet of that name, as nothing within it tells.
        device, dtype: as for `model_loader.preload_models_from_standard_weights`.
        base: the models that the ControlNet is for, as that function returns them. A file that holds the difference to
            the UNet is added to theirs, which must not be packed; for all others they tell the number of heads and
            groups, if it is not SD 1.5's.

    Returns:
        A ControlNet in eval mode, which `cpu.packed.pack` makes faster on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no ControlNet for SD 1.x, it is broken, or it needs another base.
    """
    path, unet = Path(path), base["diffusion"] if base else None
    device = check_device(device)
    dtype = resolve_dtype(dtype, device)
    weights, settings = read_controlnet(path)
    like = unet.config if unet else DiffusionConfig()
    settings = {"unet_heads": like.n_heads, "unet_groups": like.n_groups} | settings
    try:
        controlnet = convert_controlnet(weights, settings, dict(unet.named_parameters()) if unet else {}).to(dtype)
        for name, weight in controlnet.state_dict().items():
            if not is_finite(weight):
                raise CheckpointError(f"{name} holds NaN, infinity or what is beyond {dtype}; expected finite weights")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    controlnet.pools = settings.get("global_pool_conditions", "shuffle" in path.name.lower())
    return controlnet.to(device).eval()


def read_controlnet(path):
    """Returns what a file or a diffusers folder holds: weights by name, and the metadata or the config beside them."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_file() and not (path.name.startswith("diffusion_pytorch_model") and config.is_file()):
        return read_checkpoint(path)
    settings = read_json(config) if config.is_file() else {}
    found = settings.get("_class_name", "nothing of diffusers")
    if path.is_dir() and found != "ControlNetModel":
        raise CheckpointError(f"{path}: found {found} in this folder; expected a ControlNetModel for SD 1.x, or a file")
    weights, _ = read_weights(path, use_ema=False) if path.is_dir() else read_checkpoint(path)
    return weights, settings | read_config("unet", config)


def convert_controlnet(weights, settings, base):
    """Returns a ControlNet with the weights of a file; `base` has those of the UNet that they may be the difference to.
    """
    is_difference = "difference" in weights
    weights = {name: weight for name, weight in weights.items() if isinstance(name, str) and name != "difference"}
    prefix = "control_model." if any(name.startswith("control_model.") for name in weights) else ""
    weights = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
    for found, mark in OTHERS:
        if any(re.search(mark, name.removeprefix(prefix)) for name in weights):
            raise CheckpointError(f"found {found}; expected a ControlNet for SD 1.x")
    check_tensors(weights)
    is_original = "conv_in.weight" not in weights

    def names(name, n_blocks):
        """Returns the file's names for one of our weights; diffusers' depend on how many blocks a level has."""
        if is_original:
            return [prefix + theirs.removeprefix(UNET) for theirs in standard_names("diffusion", name)]
        theirs = diffusers_names("diffusion", name, DiffusionConfig(n_blocks=n_blocks))
        return [substitute(DIFFUSERS_RULES, name) for name in theirs]

    config, hint_channels = infer_config(weights, names, settings)
    with torch.device("meta"):
        controlnet = ControlNet(config, hint_channels)
    state_dict = {}
    for name, expected in controlnet.state_dict().items():
        parts = names(name, config.n_blocks)
        shape = (expected.shape[0] // len(parts), *expected.shape[1:])
        weight = torch.cat([take(weights, part, shape) for part in parts])
        if is_difference and name.startswith(("time_embedding.", "encoders.", "bottleneck.")):
            if name not in base or base[name].shape != weight.shape:
                raise CheckpointError(f"found the difference to a UNet whose {name} has shape {tuple(weight.shape)}; "
                                      f"give the models with that, loaded with pack=False: base=models")
            weight = weight.float() + base[name].float().cpu()
        state_dict[name] = weight
    if weights:
        raise CheckpointError(f"found {', '.join(map(repr, list(weights)[:3]))} ({len(weights)} such keys), which a "
                              f"ControlNet for SD 1.x does not have; expected those of control_v11p_sd15_canny.pth")
    if settings.get("controlnet_conditioning_channel_order") == "bgr":
        state_dict["input_hint_block.0.weight"] = state_dict["input_hint_block.0.weight"].flip(1)
    controlnet.load_state_dict(state_dict, assign=True)
    return controlnet


def infer_config(weights, names, settings):
    """Reads (config of the UNet that it is a half of, channels of the hint) off the shapes of a file's weights."""

    def starts_level(i, n_blocks):
        return names(f"encoders.{i}.0.conv_1.weight", n_blocks)[0] in weights

    def shape(name):
        name = names(name, n_blocks)[0]
        if name not in weights or weights[name].ndim < 2:
            some = ", ".join(map(repr, list(weights)[:3])) or "no weights"
            raise CheckpointError(f"found {some}, but no weight {name!r}; expected a ControlNet for SD 1.x")
        return weights[name].shape

    n_blocks = next(n for n in count() if not starts_level(n + 1, n_blocks=1000))
    levels = list(takewhile(lambda i: starts_level(i, n_blocks), count(1, n_blocks + 1))) or [1]
    channels = tuple(shape(f"encoders.{i}.0.conv_1.weight")[0] for i in levels)
    attends = tuple(names(f"encoders.{i}.1.proj_in.weight", n_blocks)[0] in weights for i in levels)
    d_context = shape("bottleneck.1.attention_2.k_proj.weight")[1]
    if d_context == 1024:
        raise CheckpointError("found a ControlNet for SD 2.x; expected a ControlNet for SD 1.x")
    told = [str(settings[key]) for key in ("unet_heads", "unet_groups")]
    n_heads, n_groups = (int(number) if number.isdecimal() else 0 for number in told)
    if not all(n and width % n == 0 for n in (n_heads, n_groups) for width in channels):
        raise CheckpointError(f"{' or '.join(told)} heads and groups do not divide the levels' {channels} channels; "
                              f"give the models that it is for: base=models")
    config = DiffusionConfig(in_channels=shape("encoders.0.0.weight")[1], channels=channels, attends=attends,
                             n_blocks=n_blocks, n_heads=n_heads, d_context=d_context, n_groups=n_groups)
    return config, tuple(shape(f"input_hint_block.{i}.weight")[0] for i in (0, 4, 8, 12))
