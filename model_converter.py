"""An SD 1.x checkpoint in, four state dicts and the configs that its shapes imply out.

The layout is that of the original release (CompVis, `v1-5-pruned-emaonly.ckpt`), which fine-tunes and merges keep.
Reading the file itself, of which nothing is ever executed, is `checkpoint_file.py`'s part.
"""

import functools
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import diffusers_folder
from checkpoint_configs import count, infer_configs
from checkpoint_file import CheckpointError, find_mapped, read_checkpoint, release
from checkpoint_layout import (
    IGNORED,
    PREFIXES,
    SPELLINGS,
    TEXT,
    UNET,
    VAE,
    check_tensors,
    find_prediction,
    known_weights,
    refuse_other_models,
    standard_spelling,
    substitute,
)
from checkpoint_layout import ema_name as ema_name
from clip import CLIP, CLIPConfig
from decoder import DecoderConfig, VAE_Decoder
from diffusion import Diffusion, DiffusionConfig
from encoder import EncoderConfig, VAE_Encoder

NETWORKS = {"clip": CLIP, "encoder": VAE_Encoder, "decoder": VAE_Decoder, "diffusion": Diffusion}

FOLDER_OF = {"clip": "text_encoder", "encoder": "vae", "decoder": "vae", "diffusion": "unet"}

# The one table between our names and the checkpoint's: for each network, regular expressions applied in turn to a
# module's name. Our fused projections stand for several modules of the checkpoint, in braces.
VAE_RULES = [
    (r"^(up|down)\.(\d+)\.(\d+)", r"\1.\2.block.\3"),
    (r"^mid\.0", "mid.block_1"),
    (r"^mid\.1", "mid.attn_1"),
    (r"^mid\.2", "mid.block_2"),
    (r"(norm|conv)_(\d)$", r"\1\2"),
    (r"skip$", "nin_shortcut"),
    (r"attention\.in_proj$", "{q,k,v}"),
    (r"attention\.out_proj$", "proj_out"),
]
RULES = {
    "clip": [
        (r"^(token|position)_embedding", r"embeddings.\1_embedding"),
        (r"^layers", "encoder.layers"),
        (r"\bnorm_(\d)$", r"layer_norm\1"),
        (r"attention\.in_proj$", "self_attn.{q,k,v}_proj"),
        (r"attention\.out_proj$", "self_attn.out_proj"),
        (r"linear_(\d)$", r"mlp.fc\1"),
        (r"^final_norm", "final_layer_norm"),
        (r"^", TEXT),
    ],
    "encoder": VAE_RULES + [(r"^(?!quant_conv)", "encoder."), (r"^", VAE)],
    "decoder": VAE_RULES + [(r"^(?!post_quant_conv)", "decoder."), (r"^", VAE)],
    "diffusion": [
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^encoders\.(\d+)\.0\.conv$", r"encoders.\1.0.op"),
        (r"^encoders", "input_blocks"),
        (r"^bottleneck", "middle_block"),
        (r"^decoders", "output_blocks"),
        (r"^norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"\.norm_1$", ".in_layers.0"),
        (r"\.conv_1$", ".in_layers.2"),
        (r"\.time$", ".emb_layers.1"),
        (r"\.norm_2$", ".out_layers.0"),
        (r"\.conv_2$", ".out_layers.3"),
        (r"\.skip$", ".skip_connection"),
        (r"layer_norm_(\d)$", r"transformer_blocks.0.norm\1"),
        (r"attention_(\d)\.in_proj$", r"transformer_blocks.0.attn\1.to_{q,k,v}"),
        (r"attention_(\d)\.([qkv])_proj$", r"transformer_blocks.0.attn\1.to_\2"),
        (r"attention_(\d)\.out_proj$", r"transformer_blocks.0.attn\1.to_out.0"),
        (r"linear_geglu$", "transformer_blocks.0.ff.net.0.proj"),
        (r"linear_out$", "transformer_blocks.0.ff.net.2"),
        (r"^", UNET),
    ],
}

# From the checkpoint's names, without the prefix, to those in diffusers' folders; where `number_levels` has been.
DIFFUSERS_RULES = {
    "clip": [],
    "vae": [
        (r"(up|down)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
        (r"(up|down)\.(\d+)\.(up|down)sample\.", r"\1_blocks.\2.\3samplers.0."),
        (r"mid\.block_1", "mid_block.resnets.0"),
        (r"mid\.block_2", "mid_block.resnets.1"),
        (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
        (r"mid\.attn_1\.([qkv])", r"mid_block.attentions.0.to_\1"),
        (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
        (r"norm_out", "conv_norm_out"),
        (r"nin_shortcut", "conv_shortcut"),
    ],
    "diffusion": [
        (r"^time_embed\.0", "time_embedding.linear_1"),
        (r"^time_embed\.2", "time_embedding.linear_2"),
        (r"^input_blocks\.0\.0", "conv_in"),
        (r"^middle_block\.0", "mid_block.resnets.0"),
        (r"^middle_block\.1", "mid_block.attentions.0"),
        (r"^middle_block\.2", "mid_block.resnets.1"),
        (r"^out\.0", "conv_norm_out"),
        (r"^out\.2", "conv_out"),
        (r"^(down_blocks\.\d+)\.\d+\.0\.op", r"\1.downsamplers.0.conv"),
        (r"^(up_blocks\.\d+)\.\d+\.\d+\.conv", r"\1.upsamplers.0.conv"),
        (r"^(\w+_blocks\.\d+)\.(\d+)\.0\.", r"\1.resnets.\2."),
        (r"^(\w+_blocks\.\d+)\.(\d+)\.1\.", r"\1.attentions.\2."),
        (r"in_layers\.0", "norm1"),
        (r"in_layers\.2", "conv1"),
        (r"emb_layers\.1", "time_emb_proj"),
        (r"out_layers\.0", "norm2"),
        (r"out_layers\.3", "conv2"),
        (r"skip_connection", "conv_shortcut"),
    ],
}

def standard_names(network: str, name: str) -> tuple[str, ...]:
    """Returns the checkpoint's names for one of our weights.

    Args:
        network: "clip", "encoder", "decoder" or "diffusion".
        name: a name in that network's state dict, such as "layers.0.attention.in_proj.weight".

    Returns:
        A tuple of names: one, or three for a fused projection, whose rows are those of the three in turn.
    """
    module, _, kind = name.rpartition(".")
    return tuple(f"{standard}.{kind}" for standard in standard_modules(network, module))


@functools.cache  # a module has several weights, and other files the same ones
def standard_modules(network, module):
    start, _, rest = substitute(RULES[network], module).partition("{")
    choices, _, end = rest.partition("}")
    return tuple(f"{start}{choice}{end}" for choice in choices.split(","))


def diffusers_names(network: str, name: str, config) -> tuple[str, ...]:
    """Returns the names that one of our weights has in the state dicts of diffusers' UNet2DConditionModel and
    AutoencoderKL and of transformers' CLIPTextModel (in its form with `text_model.`).

    Args:
        network: "clip", "encoder", "decoder" or "diffusion".
        name: a name in that network's state dict, such as "encoders.1.0.conv_1.weight".
        config: that network's config; the names of levels and blocks depend on how many there are.

    Returns:
        A tuple of names, which stand for the same weights as those of `standard_names`, one by one.
    """
    prefix = PREFIXES[network]
    rules = DIFFUSERS_RULES["vae" if prefix == VAE else network]
    return tuple(substitute(rules, number_levels(network, standard_name.removeprefix(prefix), config))
                 for standard_name in standard_names(network, name))


def number_levels(network, name, config):
    """diffusers counts a UNet's blocks level by level (input_blocks.5 -> down_blocks.1.1), and the levels of a decoder
    from the lowest resolution."""
    place = re.match(r"(input_blocks|output_blocks|decoder\.up)\.(\d+)", name)
    if not place or place[0] == "input_blocks.0":
        return name
    side, number = place[1], int(place[2])
    if side == "decoder.up":
        return f"decoder.up.{len(config.channels) - 1 - number}" + name[place.end():]
    level, block = divmod(number - (side == "input_blocks"), config.n_blocks + 1)
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}.{block}" + name[place.end():]


# ---- from ours to theirs


def to_standard_weights(state_dicts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the weights of the four networks under the names of the SD 1.x layout, the inverse of loading.

    Args:
        state_dicts: {'clip': ..., 'encoder': ..., 'decoder': ..., 'diffusion': ...}, or some of them; those of networks
            inside torch.compile or DataParallel, too.

    Returns:
        One dict of contiguous tensors; the projections that the original stores as 1x1 convolutions are so here.

    Raises:
        ValueError: a state dict is that of a packed network.
    """
    weights = {}
    for network, name, tensor in each_weight(state_dicts):
        names = standard_names(network, name)
        for standard_name, part in zip(names, tensor.chunk(len(names))):
            if part.ndim == 2 and re.search(r"attn_1\.\w+\.weight$|\.proj_(in|out)\.weight$", standard_name):
                part = part[:, :, None, None]
            weights[standard_name] = part.contiguous()
        if name == "position_embedding.weight":
            weights[f"{TEXT}embeddings.position_ids"] = torch.arange(len(tensor))[None]
    return weights


def to_diffusers_weights(state_dicts: dict[str, dict[str, Tensor]], configs: dict) -> dict[str, dict[str, Tensor]]:
    """Returns the weights as diffusers' folders have them: {'text_encoder': ..., 'vae': ..., 'unet': ...}.

    Args:
        state_dicts: as for `to_standard_weights`, all four.
        configs: the four configs.
    """
    weights = {"text_encoder": {}, "vae": {}, "unet": {}}
    for network, name, tensor in each_weight(state_dicts):
        names = diffusers_names(network, name, configs[network])
        for diffusers_name, part in zip(names, tensor.chunk(len(names))):
            if network == "diffusion" and re.search(r"\.proj_(in|out)\.weight$", name):
                part = part[:, :, None, None]
            weights[FOLDER_OF[network]][diffusers_name] = part.contiguous()
    return weights


def each_weight(state_dicts):
    """Yields (network, name, tensor), without the prefixes that torch.compile and DataParallel put before a name."""
    for network, state_dict in state_dicts.items():
        state_dict = {re.sub(r"(^|\.)(_orig_mod|module)(?=\.)", "", name).lstrip("."): tensor
                      for name, tensor in state_dict.items()}
        for name in state_dict:
            if name.endswith("bias") and name.removesuffix("bias") + "weight" not in state_dict:
                raise ValueError(f"{name!r} of {network!r} is without its weight, as in packed networks, which cannot "
                                 f"be saved; load the checkpoint with pack=False")
        for name, tensor in state_dict.items():
            yield network, name, tensor


# ---- from a file's weights to ours


def load_from_standard_weights(path, device="cpu", dtype: torch.dtype | None = None,
                               use_ema: bool = False) -> dict[str, dict[str, Tensor]]:
    """Reads an SD 1.x model.

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors` file, or a diffusers folder.
        device: where the tensors go.
        dtype: the torch.dtype that they get; None keeps the file's.
        use_ema: take the moving average of the UNet's weights where the file has it beside the plain ones.

    Returns:
        {'clip': state dict, 'encoder': ..., 'decoder': ..., 'diffusion': ...}

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not an SD 1.x model, or it is broken.
    """
    return {network: module.state_dict() for network, module in read_networks(path, device, dtype, use_ema).items()}


def read_networks(path, device="cpu", dtype=None, use_ema=False, finish=None, vae=None, prediction=None):
    """As `load_from_standard_weights`, but returns modules.

    Each block of a network is replaced by what `finish`, if given, makes of it before the next block is read. `vae` and
    `prediction` are as for `model_loader.preload_models_from_standard_weights`.
    """
    origins = {}  # what the file calls a weight, where that is not its standard name
    weights, metadata = read_model(path, use_ema, origins)
    try:
        metadata = {**metadata, **find_prediction(path, weights, metadata, prediction)}
        weights = known_weights(weights, use_ema, origins)
        if vae is not None:
            weights, metadata = swap_vae(weights, metadata, vae, origins)
        mapped = find_mapped()
        modules = {network: build(network, config) for network, config in infer_configs(weights, metadata).items()}
        for network, module in modules.items():
            for parent, name, prefix in blocks(module):
                block = getattr(parent, name)
                state_dict = convert(network, block, weights, device, dtype, mapped, prefix)
                block.load_state_dict(state_dict, assign=True)
                setattr(parent, name, finish(block) if finish else block)
        if weights:
            raise CheckpointError(f"found {next(iter(weights))!r}, which an SD 1.x model of these shapes does not have "
                                  f"({len(weights)} such keys); expected the layout of v1-5-pruned-emaonly.ckpt")
    except CheckpointError as error:
        message = re.sub(r"[\w.]+\w", lambda name: origins.get(name[0], name[0]), str(error))  # the file's own names
        raise CheckpointError(f"{path}{f' with the VAE of {vae}' if vae is not None else ''}: {message}") from None
    return modules


def read_model(path, use_ema, origins):
    """Returns (weights by standard name and whatever else there is, metadata) of a file or a diffusers folder."""
    if not Path(path).is_dir():
        return read_checkpoint(path, mapped=True)
    parts, metadata = diffusers_folder.read_folder(path, ("text_encoder", "vae", "unet"), use_ema)
    weights = {}
    for folder, part in parts.items():
        weights.update(from_diffusers(folder, part, f"{path}/{folder}", origins))
    return weights, metadata


def from_diffusers(folder, weights, path, origins):
    """Returns the weights of a part of a diffusers folder ("text_encoder", "vae" or "unet") by their standard names."""
    prefix = PREFIXES["clip"] if folder == "text_encoder" else ""
    weights = {substitute(SPELLINGS, name): tensor for name, tensor in weights.items()
               if isinstance(name, str) and not IGNORED.search(prefix + name)}
    if folder == "text_encoder" and not any(name.startswith("text_model.") for name in weights):
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}  # transformers from 5.6 on
    names = {}
    for network, config in largest_configs(folder, weights, path).items():
        for name in build(network, config).state_dict():
            names.update(zip(diffusers_names(network, name, config), standard_names(network, name)))
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise CheckpointError(f"{path}: found {unknown[0]!r}, which this part of an SD 1.x model does not have "
                              f"({len(unknown)} such keys); expected the layout of diffusers' stable-diffusion-v1-5")
    origins.update({standard_name: f"{folder}/{name}" for name, standard_name in names.items()})
    return {names[name]: tensor for name, tensor in weights.items()}


def largest_configs(folder, weights, path):
    """Returns configs of networks that have as many levels and blocks as these weights, in the narrowest widths that
    differ, so that every block has a skip connection: their names are all that there can be."""

    def size(levels):
        n_levels, n_blocks = count(weights, rf"{levels}\.(\d+)\."), count(weights, rf"{levels}\.0\.resnets\.(\d+)\.")
        if not n_levels or not n_blocks:
            raise CheckpointError(f"{path}: no key begins with '{levels}.0.resnets.'; expected the layout of "
                                  f"diffusers' stable-diffusion-v1-5")
        return {"channels": tuple(range(1, n_levels + 1)), "n_blocks": n_blocks, "n_groups": 1}

    if folder == "text_encoder":
        n_layers = count(weights, r"text_model\.encoder\.layers\.(\d+)\.")
        return {"clip": CLIPConfig(n_vocab=1, n_tokens=1, d_embed=1, d_mlp=1, n_layers=n_layers, n_heads=1)}
    if folder == "vae":
        return {"encoder": EncoderConfig(**size("encoder.down_blocks")),
                "decoder": DecoderConfig(**size("decoder.up_blocks"))}
    sizes = size("down_blocks")
    attends = tuple(any(name.startswith(f"down_blocks.{i}.attentions.") for name in weights)
                    for i in range(len(sizes["channels"])))
    return {"diffusion": DiffusionConfig(**sizes, attends=attends, n_heads=1, d_context=1, d_guidance=1)}


def swap_vae(weights, metadata, path, origins):
    """Returns weights and metadata with the VAE of another file or folder in the place of the model's own."""
    vae, vae_metadata = read_vae(path, origins)
    refuse_other_models(vae)
    vae = standard_spelling(vae, origins)
    check_tensors(vae)
    conv_in = f"{VAE}encoder.conv_in.weight"
    if "vae_groups" not in vae_metadata and conv_in in weights and vae[conv_in].shape != weights[conv_in].shape:
        metadata = {key: value for key, value in metadata.items() if key != "vae_groups"}  # it was the other VAE's
    metadata = {**metadata, **{key: value for key, value in vae_metadata.items() if key == "vae_groups"}}
    return {**{name: tensor for name, tensor in weights.items() if not name.startswith(VAE)}, **vae}, metadata


def read_vae(path, origins):
    """Returns (weights by standard name, metadata) of the VAE in a checkpoint, in a file of its own (with or without
    `first_stage_model.`, or as diffusers has it), in a diffusers folder or in the folder `vae` of one."""
    if Path(path).is_dir():
        parts, metadata = diffusers_folder.read_folder(path, ("vae",))
        return from_diffusers("vae", parts["vae"], path, origins), metadata
    weights, metadata = read_checkpoint(path, mapped=True)
    own = {name: tensor for name, tensor in weights.items() if isinstance(name, str) and name.startswith(VAE)}
    bare = {name: tensor for name, tensor in weights.items() if isinstance(name, str) and
            name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    if not own and any(".down_blocks." in name for name in bare):
        return from_diffusers("vae", bare, path, origins), metadata
    own = own or {VAE + name: tensor for name, tensor in bare.items()}
    if f"{VAE}decoder.conv_in.weight" not in own or f"{VAE}encoder.conv_in.weight" not in own:
        some = ", ".join(repr(name) for name in list(weights)[:3]) or "no weights"
        raise CheckpointError(f"found {some}; expected the VAE of an SD 1.x model, with keys such as "
                              f"'{VAE}decoder.conv_in.weight' or 'decoder.conv_in.weight'")
    return own, metadata


class SkipInit(TorchFunctionMode):
    """Leaves weights undrawn, which even without storage takes longer than all else in making a network."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(network, config):
    """Returns a network whose weights have shapes alone."""
    with torch.device("meta"), SkipInit():
        return NETWORKS[network](config)


def blocks(module, prefix=""):
    """Yields (parent, name, full name with a dot) for each part of a network, those in lists one by one."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.ModuleList):
            yield from blocks(child, f"{prefix}{name}.")
        else:
            yield module, name, f"{prefix}{name}."


def convert(network, module, weights, device, dtype, mapped=(), prefix=""):
    """Takes the weights of a network, or of its part `prefix`, out of `weights` and returns them as the state dict that
    `module` wants.

    What is returned is in memory of its own, not in the file's; the pages of `mapped`, what `find_mapped` returned, are
    let go of one by one.
    """
    state_dict = {}
    for name, expected in module.state_dict().items():
        names = standard_names(network, prefix + name)
        shape = (expected.shape[0] // len(names), *expected.shape[1:])
        originals = [take(weights, standard_name, shape) for standard_name in names]
        widest = max((original.dtype for original in originals), key=lambda dtype: dtype.itemsize)
        weight = torch.empty(expected.shape, dtype=dtype or widest, device="cpu")
        for part, original, standard_name in zip(weight.chunk(len(names)), originals, names):
            copy(original, part)
            check_finite(part, original, standard_name)
            release(original, mapped)
        state_dict[name] = weight.to(device)
    return state_dict


def copy(tensor, target):
    """`target.copy_(tensor)`; from float16 to bfloat16 by way of float32, as PyTorch's way takes thrice the time."""
    if (tensor.dtype, target.dtype) != (torch.float16, torch.bfloat16):
        target.copy_(tensor)
        return
    for part, target_part in zip(tensor.flatten().split(2**20), target.flatten().split(2**20)):  # stays in the cache
        target_part.copy_(part.float())


def check_finite(tensor, original, name):
    """Raises CheckpointError if a weight, or what became of it in another dtype, is not finite."""
    if is_finite(tensor):
        return
    if is_finite(original):
        largest = original.float().abs().max().item()
        raise CheckpointError(f"{name} holds {largest:.6g}, which {tensor.dtype} cannot hold; load it as float32 or "
                              f"bfloat16")
    raise CheckpointError(f"{name} holds NaN or infinite values; expected finite weights")


def is_finite(tensor):
    if tensor.dtype.itemsize == 1:  # PyTorch does not compare 8-bit floating point numbers
        tensor = tensor.float()
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def take(weights, name, shape):
    """Removes one tensor from `weights` and returns it in the given shape."""
    if name not in weights:
        raise CheckpointError(f"{name} is missing; expected a tensor of shape {shape}")
    tensor = weights.pop(name)
    if strip_ones(tensor.shape) != strip_ones(shape):
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    return tensor.reshape(shape)


def strip_ones(shape):
    """A linear layer's weight and a 1x1 convolution's, a bias (n,) and (n, 1, 1), are one thing in two shapes."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
