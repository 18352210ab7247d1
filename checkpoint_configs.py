"""The configs of the four networks: read off the shapes of a checkpoint's weights and its metadata, and put into it."""

import re
from dataclasses import replace

from checkpoint_file import CheckpointError
from checkpoint_layout import PREDICTIONS, TEXT, UNET, VAE
from clip import CLIPConfig
from decoder import DecoderConfig
from diffusion import DiffusionConfig
from encoder import EncoderConfig


def infer_configs(weights, metadata):
    """Reads the four configs off the shapes of a checkpoint's weights.

    Args:
        weights: tensors by standard name.
        metadata: the safetensors metadata, whose `unet_heads`, `unet_groups`, `vae_groups`, `clip_heads`,
            `sample_size`, `cfg_scale`, `words` (with spaces between), `guidance_rescale` and what `find_prediction`
            returns tell what shapes cannot; SD 1.5's values hold for those that are absent.
    """

    def shape(name):
        if name not in weights:
            raise CheckpointError(f"{name} is missing; expected an SD 1.x checkpoint with text encoder, VAE and UNet")
        tensor = weights[name]
        if tensor.ndim not in (2, 4) or tensor.numel() == 0:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; expected the weight of a linear layer or "
                                  f"of a convolution")
        return tuple(tensor.shape)

    def number(key, default):
        value = metadata.get(key, default)
        if not re.fullmatch("[1-9][0-9]{0,4}", str(value)):
            raise CheckpointError(f"the metadata's {key} is {value!r}; expected a whole number from 1 to 99999")
        return int(value)

    def decimal(key, default):
        value = metadata.get(key, default)
        if not re.fullmatch(r"\d{1,5}(\.\d{1,20})?", str(value)):
            raise CheckpointError(f"the metadata's {key} is {value!r}; expected a number such as 7.5")
        return float(value)

    n_vocab, d_text = shape(f"{TEXT}embeddings.token_embedding.weight")[:2]
    clip = CLIPConfig(
        n_vocab=n_vocab,
        n_tokens=shape(f"{TEXT}embeddings.position_embedding.weight")[0],
        d_embed=d_text,
        d_mlp=shape(f"{TEXT}encoder.layers.0.mlp.fc1.weight")[0],
        n_layers=count(weights, TEXT + r"encoder\.layers\.(\d+)\."),
        n_heads=number("clip_heads", d_text // 64 if d_text % 64 == 0 else 12),
        words=tuple(str(metadata.get("words", "")).split()),
    )
    encoder = EncoderConfig(
        in_channels=shape(f"{VAE}encoder.conv_in.weight")[1],
        latent_channels=shape(f"{VAE}post_quant_conv.weight")[1],
        channels=tuple(shape(f"{VAE}encoder.down.{i}.block.0.conv1.weight")[0]
                       for i in range(count(weights, VAE + r"encoder\.down\.(\d+)\."))),
        n_blocks=count(weights, VAE + r"encoder\.down\.0\.block\.(\d+)\."),
        n_groups=number("vae_groups", EncoderConfig.n_groups),
    )
    decoder = DecoderConfig(
        out_channels=shape(f"{VAE}decoder.conv_out.weight")[0],
        latent_channels=encoder.latent_channels,
        channels=tuple(shape(f"{VAE}decoder.up.{i}.block.0.conv1.weight")[0]
                       for i in range(count(weights, VAE + r"decoder\.up\.(\d+)\."))),
        n_blocks=count(weights, VAE + r"decoder\.up\.0\.block\.(\d+)\."),
        n_groups=encoder.n_groups,
    )
    if not encoder.channels or not decoder.channels:
        raise CheckpointError(f"{VAE}{'decoder.up' if encoder.channels else 'encoder.down'}.0.block.0.conv1.weight is "
                              f"missing; expected the levels of a VAE")
    diffusion = replace(
        infer_diffusion(weights, shape, number),
        prediction=PREDICTIONS[metadata.get("modelspec.prediction_type", "epsilon")],
        zero_terminal_snr=metadata.get("ss_zero_terminal_snr") == "True",
        cfg_scale=decimal("cfg_scale", DiffusionConfig.cfg_scale),
        guidance_rescale=decimal("guidance_rescale", DiffusionConfig.guidance_rescale),
    )
    if encoder.latent_channels != diffusion.out_channels:
        raise CheckpointError(f"the VAE's latents have {encoder.latent_channels} channels, the UNet's "
                              f"{diffusion.out_channels}; expected a VAE and a UNet that belong together")
    for what, value, divisor, source in [
        ("the size of the pictures", diffusion.sample_size, 8, "sample_size"),
        ("the text encoder's width", clip.d_embed, clip.n_heads, "clip_heads"),
        *(("a width of the UNet", width, diffusion.n_heads, "unet_heads") for width in diffusion.channels),
        *(("a width of the UNet", width, diffusion.n_groups, "unet_groups") for width in diffusion.channels),
        *(("a width of the VAE", width, encoder.n_groups, "vae_groups") for width in encoder.channels),
        *(("a width of the VAE", width, decoder.n_groups, "vae_groups") for width in decoder.channels),
    ]:
        if value % divisor:
            raise CheckpointError(f"{what} is {value}, which {divisor} ({source}) does not divide; expected the true "
                                  f"count in the safetensors metadata under {source!r}")
    return {"clip": clip, "encoder": encoder, "decoder": decoder, "diffusion": diffusion}


def infer_diffusion(weights, shape, number):
    """The UNet's levels lie in one flat list, input_blocks: residual blocks, with a downsampling between levels."""
    channels, attends, blocks = [], [], []
    new_level = True
    for i in range(1, count(weights, UNET + r"input_blocks\.(\d+)\.")):
        if f"{UNET}input_blocks.{i}.0.op.weight" in weights:
            new_level = True
            continue
        if new_level:
            channels.append(shape(f"{UNET}input_blocks.{i}.0.out_layers.3.weight")[0])
            attends.append(f"{UNET}input_blocks.{i}.1.norm.weight" in weights)
            blocks.append(0)
            new_level = False
        blocks[-1] += 1
    if not blocks:
        raise CheckpointError(f"{UNET}input_blocks.1.0.out_layers.3.weight is missing; expected the blocks of a UNet")
    if len(set(blocks)) > 1:
        raise CheckpointError(f"the UNet's levels have {blocks} blocks; expected the same number in each")
    guidance = f"{UNET}time_embedding.cond_proj.weight"
    return DiffusionConfig(
        in_channels=shape(f"{UNET}input_blocks.0.0.weight")[1],
        out_channels=shape(f"{UNET}out.2.weight")[0],
        channels=tuple(channels),
        attends=tuple(attends),
        n_blocks=blocks[0],
        n_heads=number("unet_heads", DiffusionConfig.n_heads),
        d_context=shape(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        n_groups=number("unet_groups", DiffusionConfig.n_groups),
        sample_size=number("sample_size", DiffusionConfig.sample_size),
        d_guidance=shape(guidance)[1] if guidance in weights else 0,
    )


def count(weights, pattern):
    """Returns how many different numbers there are in the place of the pattern's group."""
    pattern = re.compile(pattern)
    return len({match[1] for match in map(pattern.match, weights) if match})


def to_metadata(configs: dict) -> dict[str, str]:
    """Returns what the weights' shapes do not tell of the four configs, as safetensors metadata: `infer_configs` reads
    it."""
    clip, encoder, diffusion = (configs[network] for network in ("clip", "encoder", "diffusion"))
    metadata = {"clip_heads": clip.n_heads, "unet_heads": diffusion.n_heads, "unet_groups": diffusion.n_groups,
                "vae_groups": encoder.n_groups, "sample_size": diffusion.sample_size, "cfg_scale": diffusion.cfg_scale,
                "words": " ".join(clip.words), "modelspec.prediction_type": diffusion.prediction,
                "ss_zero_terminal_snr": diffusion.zero_terminal_snr, "guidance_rescale": diffusion.guidance_rescale}
    return {key: str(value) for key, value in metadata.items() if value != ""}
