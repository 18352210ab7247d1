"""TAESD: an autoencoder of a fiftieth of the size, for previews and for machines with little memory.

    models["decoder"] = load_tiny_decoder("taesd_decoder.safetensors", "cpu", "float32")

By Ollin Boer Bohan (https://github.com/madebyollin/taesd): convolutions alone, trained to do what SD 1.x's autoencoder
does, with blurred detail. It is called like that one, and takes and returns latents of the same unit scale. Files for
SDXL (taesdxl) have the same shapes and cannot be told apart: their pictures come out in wrong colours.
"""

import re

import torch
from torch import Tensor, nn

from checkpoint_file import CheckpointError, read_checkpoint
from decoder import DecoderConfig
from encoder import EncoderConfig
from model_loader import check_device, resolve_dtype


class Block(nn.Module):
    """Three convolutions beside a skip connection: (batch, channels, h, w) -> the same shape"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(),
                                  conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pictures to latents, called like `encoder.VAE_Encoder`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width = config.channels[0]
        self.layers = nn.Sequential(conv(config.in_channels, width), Block(width))
        for _ in config.channels[1:]:
            self.layers.append(conv(width, width, stride=2, bias=False))
            self.layers.extend(Block(width) for _ in range(config.n_blocks))
        self.layers.append(conv(width, config.latent_channels))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (batch, 3, h, w) in [-1, 1] -> latents (batch, 4, h / 8, w / 8) of unit scale; noise is not used, as
        this encoder finds no distribution."""
        return self.layers((images + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents to pictures, called like `decoder.VAE_Decoder`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        width = config.channels[0]
        self.layers = nn.Sequential(conv(config.latent_channels, width), nn.ReLU())
        for _ in config.channels[1:]:
            self.layers.extend(Block(width) for _ in range(config.n_blocks))
            self.layers.extend([nn.Upsample(scale_factor=2), conv(width, width, bias=False)])
        self.layers.extend([Block(width), conv(width, config.out_channels)])

    def forward(self, latents: Tensor) -> Tensor:
        """latents (batch, 4, h / 8, w / 8) of unit scale -> images (batch, 3, h, w), about [-1, 1] (not clamped)"""
        return self.layers(3 * torch.tanh(latents / 3)) * 2 - 1


def conv(in_channels: int, out_channels: int, **settings) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **settings)


def load_tiny_decoder(path, device, dtype="auto") -> TinyDecoder:
    """Loads the decoder of a TAESD file.

    Args:
        path: `taesd_decoder` (.pth or .safetensors), or the file of both halves that diffusers' AutoencoderTiny writes.
        device, dtype: as for `model_loader.preload_models_from_standard_weights`.

    Returns:
        A module for models["decoder"], in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it has no such decoder.
    """
    weights = read_layers(path, "decoder")
    if "1.weight" in weights and "0.weight" not in weights:  # the original counts the clamping of its input as a layer
        weights = {f"{int(number) - 1}.{rest}": tensor for (number, _, rest), tensor in
                   ((name.partition("."), tensor) for name, tensor in weights.items())}
    width, latent_channels = sizes(weights, path, "decoder")
    config = DecoderConfig(latent_channels=latent_channels, channels=(width,) * 4, n_blocks=3, n_groups=1)
    return fill(TinyDecoder(config), weights, path, device, dtype)


def load_tiny_encoder(path, device, dtype="auto") -> TinyEncoder:
    """Loads the encoder of a TAESD file, `taesd_encoder` or one of both halves; otherwise as `load_tiny_decoder`. The
    module is for models["encoder"]."""
    weights = read_layers(path, "encoder")
    width, in_channels = sizes(weights, path, "encoder")
    config = EncoderConfig(in_channels=in_channels, channels=(width,) * 4, n_blocks=3, n_groups=1)
    return fill(TinyEncoder(config), weights, path, device, dtype)


def read_layers(path, half):
    """Returns {"0.weight": tensor, ...} of one half: all keys that are of its form, without what stands before the
    number of a layer."""
    weights, _ = read_checkpoint(path)
    form = re.compile(rf"(?:(?:taesd_)?{half}\.)?(?:layers\.)?(\d{{1,2}}\.(?:conv\.\d\.)?(?:weight|bias))")
    matches = {name: form.fullmatch(name) for name in weights if isinstance(name, str)}
    found = {match[1]: weights[name] for name, match in matches.items() if match}
    other = "encoder" if half == "decoder" else "decoder"
    unknown = [name for name in weights if not matches.get(name) and not name.startswith((other, f"taesd_{other}"))]
    if unknown or not found:
        some = ", ".join(repr(name) for name in (unknown or list(weights))[:3]) or "no weights"
        raise CheckpointError(f"{path}: found {some}; expected the {half} of a TAESD file, with keys such as "
                              f"'3.conv.0.weight' or '{half}.layers.3.conv.0.weight'")
    return found


def sizes(weights, path, half):
    """Returns (width, input channels) off the first convolution."""
    first = weights.get("0.weight")
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise CheckpointError(f"{path}: its first layer is not a convolution; expected the {half} of a TAESD file")
    expected = 4 if half == "decoder" else 3
    if first.shape[1] != expected:
        raise CheckpointError(f"{path}: the {half} takes {first.shape[1]} channels; expected {expected}, as SD 1.x's "
                              f"(files for SD 3 and Flux have 16, and a file of the other half another number)")
    return tuple(first.shape[:2])


def fill(module, weights, path, device, dtype):
    expected = module.layers.state_dict()
    for name in [*expected, *weights]:
        given, wanted = (tuple(values[name].shape) if name in values else None for values in (weights, expected))
        if given != wanted:
            raise CheckpointError(f"{path}: layer {name} has shape {given or 'none: it is missing'}; expected "
                                  f"{wanted or 'no such layer'}, as TAESD has it")
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; expected finite weights")
    device = check_device(device)
    module.layers.load_state_dict(weights)
    return module.to(device, resolve_dtype(dtype, device)).eval()
