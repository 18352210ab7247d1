"""LoRA files of every dialect and kind, against diffusers, peft and lycoris, which read or made the same weights."""

import copy
import json
import re

import peft
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file

import oracle
from checkpoint_file import CheckpointError
from cpu.packed import pack
from diffusion import Diffusion
from extensions.lora import add_lora, find_lora, lora, parse_tags, read_changes
from clip import CLIP
from pipeline import get_time_embedding

SCALES = [1.0, 0.6, -0.5]
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"


@pytest.fixture
def own(models):
    """A copy of the tiny models, to be changed."""
    return copy.deepcopy({"clip": models["clip"], "diffusion": models["diffusion"]})


@pytest.fixture
def theirs(weights):
    return {"diffusion": oracle.unet_oracle(weights), "clip": oracle.clip_oracle(weights)}


def weights_of(models):
    return {f"{network} {name}": weight.clone() for network, module in models.items()
            for name, weight in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_outputs(own, theirs, tolerance=1e-5):
    """Both networks, with the same inputs, compute the same, and not what they did before a LoRA was added."""
    generator = torch.Generator().manual_seed(0)
    latents, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([[49406, 320, 1125, 49407]])
    context = theirs["clip"](tokens).last_hidden_state
    torch.testing.assert_close(own["clip"](tokens), context, atol=tolerance, rtol=0)
    eps = theirs["diffusion"](latents, 500, context).sample
    time = get_time_embedding(500, own["diffusion"].config.channels[0])
    torch.testing.assert_close(own["diffusion"](latents, context, time), eps, atol=tolerance, rtol=0)


def random_lora(theirs, pattern=ATTENTION, rank=4, seed=0):
    """Returns {(network, diffusers' path): (down, up)} for the layers that a pattern finds, at a scale that shows."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for network, module in theirs.items():
        for path, layer in module.named_modules():
            if re.search(pattern, path) and getattr(layer, "weight", torch.empty(0)).ndim > 1 and "embedding" not in path:
                out, *rest = layer.weight.shape
                down = torch.randn(rank, *rest, generator=generator) / rest[0] ** 0.5
                up = torch.randn(out, rank, *[1] * len(rest[1:]), generator=generator) / 3
                layers[network, with_text_model(network, path)] = down, up
    return layers


def with_text_model(network, path):
    return path if network == "diffusion" or path.startswith("text_model.") else f"text_model.{path}"


def original_paths(weights):
    """Returns {diffusers' path: the original's} of the UNet, by diffusers' converter."""
    prefix = "model.diffusion_model."
    names = {tensor.data_ptr(): name.removeprefix(prefix) for name, tensor in weights.items() if name.startswith(prefix)}
    converted = oracle.single_file_utils.convert_ldm_unet_checkpoint(dict(weights), oracle.unet_oracle(weights).config)
    return {name.removesuffix(".weight"): names[tensor.data_ptr()].removesuffix(".weight")
            for name, tensor in converted.items()}


def underscored(path):
    return path.replace(".", "_")


def old_name(path, half):
    """The attention processors' names, and the text encoder's of the same age."""
    parent, _, layer = path.replace("to_out.0", "to_out").rpartition(".")
    layer = layer.replace("_proj", "")
    where = f"{parent}.processor" if "attn1" in path or "attn2" in path else parent
    return f"{where}.{layer if layer.startswith('to_') else f'to_{layer}'}_lora.{half}.weight"


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
DIALECTS = {  # (network, path, path in the original layout, "down" or "up") -> key
    "kohya": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(path)}.{KOHYA[half]}",
    "kohya, original layout": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(ldm)}.{KOHYA[half]}",
    "OneTrainer": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te1'}_{underscored(path)}.{KOHYA[half]}",
    "kohya, without text_model": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(path.removeprefix('text_model.'))}.{KOHYA[half]}",
    "LyCORIS": lambda net, path, ldm, half: f"lycoris_{underscored(path)}.{KOHYA[half]}",
    "ComfyUI": lambda net, path, ldm, half:
        f"{'diffusion_model' if net == 'diffusion' else 'text_encoders'}.{ldm}.{KOHYA[half]}",
    "ComfyUI, full path": lambda net, path, ldm, half:
        f"{'diffusion_model' if net == 'diffusion' else 'text_encoders.clip_l.transformer'}.{ldm}.{KOHYA[half]}",
    "diffusers": lambda net, path, ldm, half:
        f"{'unet' if net == 'diffusion' else 'text_encoder'}.{path}.{PEFT[half]}",
    "diffusers, without text_model": lambda net, path, ldm, half:
        f"{'unet' if net == 'diffusion' else 'text_encoder'}.{path.removeprefix('text_model.')}.{PEFT[half]}",
    "PEFT": lambda net, path, ldm, half: f"base_model.model.{path}.{PEFT[half]}",
    "PEFT, live adapter": lambda net, path, ldm, half:
        f"base_model.model.{path}.{PEFT[half].replace('.', '.default.')}",
    "attention processors": lambda net, path, ldm, half:
        ("" if net == "diffusion" else "text_encoder.") + old_name(path, half),
    "attention processors, unet.": lambda net, path, ldm, half:
        ("unet." if net == "diffusion" else "text_encoder.") + old_name(path, half),
    "middle era": lambda net, path, ldm, half:
        f"unet.{path}.lora.{half}.weight" if net == "diffusion" else
        f"text_encoder.{path}.lora_linear_layer.{half}.weight",
}


def write(path, layers, weights, dialect="kohya", alpha=None, metadata=None):
    ldm, name = original_paths(weights), DIALECTS[dialect]
    tensors = {}
    for (network, layer), halves in layers.items():
        for half, tensor in zip(("down", "up"), halves):
            tensors[name(network, layer, ldm.get(layer, layer), half)] = tensor
        if alpha is not None:
            tensors[name(network, layer, ldm.get(layer, layer), "up").replace("lora_up.weight", "alpha")] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def fuse(theirs, path, scale):
    """Has diffusers add a file to the networks."""
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=theirs["clip"], tokenizer=None, unet=theirs["diffusion"], scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.load_lora_weights(path)
    pipe.fuse_lora(lora_scale=scale)


# ---- names


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "middle era", "attention processors, unet."])
def test_the_same_as_diffusers(own, theirs, weights, tmp_path, dialect, scale):
    alpha = 1.5 if dialect == "kohya" else None
    path = write(tmp_path / "lora.safetensors", random_lora(theirs), weights, dialect, alpha)
    fuse(theirs, path, scale)
    assert add_lora(own, path, scale) == {}
    check_outputs(own, theirs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same(own, theirs, weights, tmp_path, dialect):
    layers = random_lora(theirs, ATTENTION if "processors" in dialect else ".")
    before = weights_of(own)
    with lora(own, write(tmp_path / "kohya.safetensors", layers, weights)):
        expected = weights_of(own)
    add_lora(own, write(tmp_path / "lora.safetensors", layers, weights, dialect))
    assert same(weights_of(own), expected) and not same(expected, before)
