"""Tiny random checkpoints in the standard layout, and the models of diffusers and transformers that read them.

The oracles get their weights through diffusers' own converters, so that neither side marks its own homework.
"""

from dataclasses import replace as replace

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from clip import CLIPConfig
from decoder import DecoderConfig
from diffusion import DiffusionConfig
from encoder import EncoderConfig
from model_converter import NETWORKS, to_standard_weights

TINY = {
    "clip": CLIPConfig(n_vocab=49408, n_tokens=77, d_embed=32, d_mlp=80, n_layers=2, n_heads=4),
    "encoder": EncoderConfig(channels=(16, 32, 32, 48), n_blocks=1, n_groups=8),
    "decoder": DecoderConfig(channels=(16, 32, 32, 48), n_blocks=2, n_groups=8),
    "diffusion": DiffusionConfig(channels=(32, 64, 64), attends=(True, True, False), n_blocks=2, n_heads=4,
                                 d_context=32, n_groups=8, sample_size=64),
}
METADATA = {"clip_heads": "4", "unet_heads": "4", "unet_groups": "8", "vae_groups": "8", "sample_size": "64"}


def picture(size=(64, 64), seed=0):
    """A smooth coloured RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def randomize(module, seed=0):
    """Gives every weight a random value, those that start as zero or one included, at a scale that keeps activations
    near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            noise = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embedding" not in name or "linear" in name:
            noise = noise / weight[0].numel() ** 0.5
        weight.copy_(noise)
    return module


def random_weights(configs=TINY, seed=0):
    """Returns random weights by standard name for the four networks of these configs."""
    return to_standard_weights({network: randomize(NETWORKS[network](config), seed + i).state_dict()
                                for i, (network, config) in enumerate(configs.items())})


def write_checkpoint(path, configs=TINY, metadata=METADATA, seed=0):
    """Writes a random checkpoint as safetensors and returns its weights."""
    weights = random_weights(configs, seed)
    save_file(weights, path, metadata)
    return weights


def empty_models(configs=TINY):
    """diffusers' UNet and VAE and transformers' text encoder of these sizes, with weights of their own."""
    clip, encoder, config = configs["clip"], configs["encoder"], configs["diffusion"]
    n_levels = len(encoder.channels)
    unet = UNet2DConditionModel(
        sample_size=config.sample_size // 8, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=config.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attends)),
        layers_per_block=config.n_blocks, cross_attention_dim=config.d_context,
        attention_head_dim=config.n_heads, norm_num_groups=config.n_groups)
    vae = AutoencoderKL(
        in_channels=encoder.in_channels, out_channels=3, latent_channels=encoder.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * n_levels, up_block_types=("UpDecoderBlock2D",) * n_levels,
        block_out_channels=encoder.channels, layers_per_block=encoder.n_blocks, norm_num_groups=encoder.n_groups)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=clip.n_vocab, hidden_size=clip.d_embed, intermediate_size=clip.d_mlp,
        num_hidden_layers=clip.n_layers, num_attention_heads=clip.n_heads,
        max_position_embeddings=clip.n_tokens, hidden_act="quick_gelu", projection_dim=clip.d_embed))
    return unet, vae, text


def clip_oracle(weights, config=TINY["clip"]):
    model = empty_models({**TINY, "clip": config})[2]
    converted = single_file_utils.convert_ldm_clip_checkpoint(weights)
    converted = {name: weight for name, weight in converted.items() if not name.endswith("position_ids")}
    if not hasattr(model, "text_model"):  # transformers since 5.6
        converted = {name.removeprefix("text_model."): weight for name, weight in converted.items()}
    model.load_state_dict(converted)
    return model.eval()


def vae_oracle(weights, encoder=TINY["encoder"]):
    model = empty_models({**TINY, "encoder": encoder})[1]
    model.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(weights, model.config))
    return model.eval()


def unet_oracle(weights, config=TINY["diffusion"]):
    model = empty_models({**TINY, "diffusion": config})[0]
    model.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(weights, model.config))
    return model.eval()


def norms(network):
    """The width and eps of each norm, sorted: on features of tiny variance eps is what counts."""
    return sorted((type(norm).__name__, norm.weight.numel(), norm.eps) for norm in network.modules()
                  if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)))
