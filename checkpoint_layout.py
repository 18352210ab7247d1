"""What a file of SD 1.x holds, as merges, fine-tunes and scripts wrote it -> the weights by their standard names.

These are the names of the original release (CompVis, `v1-5-pruned-emaonly.ckpt`).
"""

import re
import warnings
from pathlib import Path

from torch import Tensor

from checkpoint_file import CheckpointError, describe

TEXT, VAE, UNET = "cond_stage_model.transformer.text_model.", "first_stage_model.", "model.diffusion_model."
PREFIXES = {"clip": "cond_stage_model.transformer.", "encoder": VAE, "decoder": VAE, "diffusion": UNET}

# What a checkpoint may hold besides the four networks' weights, within the networks' own prefixes.
IGNORED = re.compile(r"position_ids$|^cond_stage_model\..*(logit_scale|text_projection|visual|vision_model)|"
                     r"^first_stage_model\.(?!encoder\.|decoder\.|quant_conv\.|post_quant_conv\.)")

# Other spellings of the same, by converter scripts and by diffusers before 0.17.
SPELLINGS = [
    (r"^cond_stage_model\.transformer\.(?!text_model\.)", TEXT),
    (r"\.(attn_1|attentions\.0)\.query\.", r".\1.to_q."),
    (r"\.(attn_1|attentions\.0)\.key\.", r".\1.to_k."),
    (r"\.(attn_1|attentions\.0)\.value\.", r".\1.to_v."),
    (r"\.(attn_1|attentions\.0)\.proj_attn\.", r".\1.to_out.0."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.time_embed\.cond_proj\.", ".time_embedding.cond_proj."),
]
LORA, CONTROL = r"^lora_|\.lora_(up|down|A|B)\.", r"^control_model\."
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v"}


def known_weights(weights, use_ema=False, origins=None):
    """Picks the weights of the four networks, under their standard names, out of all that a checkpoint holds.

    `origins` receives the file's names of those that are called otherwise there.
    """
    origins = {} if origins is None else origins
    refuse_other_models(weights)
    beside = [name for name in weights if re.search(f"{LORA}|{CONTROL}", str(name))]
    if beside:
        warnings.warn(f"{beside[0]!r} and {len(beside) - 1} more keys of a LoRA or ControlNet beside the model are not "
                      f"used", stacklevel=4)
    known = standard_spelling(weights, origins)
    averages = {name: tensor for name, tensor in weights.items()
                if isinstance(name, str) and name.startswith("model_ema.diffusion_model")}
    plain = [name for name in known if name.startswith(UNET)]
    if averages and (use_ema or not plain):
        for name in plain or map(name_of_ema, averages):
            if ema_name(name) not in averages:
                raise CheckpointError(f"{ema_name(name)} is missing, the moving average of {name}; load this file with "
                                      f"use_ema=False, for the plain weights")
            known[name], origins[name] = averages[ema_name(name)], ema_name(name)
    check_tensors(known)
    return {name: tensor.detach() for name, tensor in close_gaps(known, origins).items()}


def standard_spelling(weights, origins):
    """Returns the weights of the four networks by their standard names; where a file has both, those go first."""
    known = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not name.startswith(tuple(PREFIXES.values())) or IGNORED.search(name):
            continue
        standard_name = substitute(SPELLINGS, name)
        if standard_name == name or standard_name not in weights:
            known[standard_name] = tensor
        if standard_name != name:
            origins[standard_name] = name
    return known


def check_tensors(weights):
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else describe(tensor)
            raise CheckpointError(f"{name!r} is {found}; expected a tensor of floating point numbers")


def ema_name(name: str) -> str:
    """Returns the name of a UNet weight's moving average in a checkpoint that holds both (`ldm/modules/ema.py`)."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def name_of_ema(name):
    """The inverse of `ema_name`, for a file that has the averages alone: of the numbers in input_blocks111…, the last
    digit is a layer's, those before it are the block's."""
    name = name.removeprefix("model_ema.diffusion_model")
    place = re.match(r"(input_blocks|output_blocks)(\d+)(\d)(?=\D)|(middle_block|time_embed|out)(\d)", name)
    start = ".".join(part for part in place.groups() if part) if place else ""
    rest = name[place.end():] if place else name
    rest = re.sub(r"(transformer_blocks|in_layers|out_layers|emb_layers|to_out|net)(\d)", r".\1.\2", rest)
    rest = re.sub(r"(?<![._])(attn\d|norm\d?|ff|to_[qkv]|proj_in|proj_out|(?<!cond_)proj|op|conv|skip_connection|"
                  r"weight|bias)", r".\1", rest)
    return UNET + start + rest


def close_gaps(weights, origins):
    """Renumbers the UNet's blocks where a script counted three a level, though there are two: input_blocks 1, 3, 4, 6,
    and so on, and an upsampling that is a block of its own."""
    numbers = {side: sorted({int(match[1]) for match in map(re.compile(rf"{re.escape(UNET)}{side}\.(\d+)\.0\.").match,
                                                            weights) if match})
               for side in ("input_blocks", "output_blocks")}
    if all(found == list(range(len(found))) for found in numbers.values()):
        return weights

    def renumber(match):
        side, number, layer = match[1], int(match[2]), int(match[3])
        found = numbers[side]
        if number in found:
            return f"{UNET}{side}.{found.index(number)}.{layer}."
        before = sum(other < number for other in found) - 1
        attends = any(name.startswith(f"{UNET}{side}.{found[before]}.1.") for name in weights)
        return f"{UNET}{side}.{before}.{1 + attends}."

    renumbered = {}
    for name, tensor in weights.items():
        new = re.sub(rf"^{re.escape(UNET)}(input_blocks|output_blocks)\.(\d{{1,4}})\.(\d)\.", renumber, name)
        renumbered[new] = tensor
        origins[new] = origins.get(name, name)
    return renumbered


def refuse_other_models(weights):
    names = [name for name in weights if isinstance(name, str)]
    expected = "expected a checkpoint of the SD 1.x family"
    whole = all(any(name.startswith(prefix) for name in names) for prefix in (UNET, VAE, PREFIXES["clip"]))
    for found, mark, may_be_beside in [
        ("an SDXL checkpoint", r"^conditioner\.embedders\.", False),
        ("an SD 2.x checkpoint", r"^cond_stage_model\.model\.", False),
        ("an SD 3 or Flux checkpoint", r"joint_blocks\.|double_blocks\.", False),
        ("an autoencoder with a VQ codebook", r"^first_stage_model\.quantize\.", False),
        ("a LoRA file, which holds changes to a model", LORA, True),
        ("a ControlNet file", CONTROL, True),
        ("weights in the layout of a diffusers folder; give that folder", r"^(down|up|mid)_blocks?\.", True),
    ]:
        marked = next((name for name in names if re.search(mark, name)), None)
        if marked and not (whole and may_be_beside):
            raise CheckpointError(f"found {found} (with the key {marked!r}); {expected}")
    if not any(name.startswith((UNET, VAE, "model_ema.diffusion_model")) for name in names):
        some = ", ".join(repr(name) for name in names[:3]) or "no weights"
        raise CheckpointError(f"found {some}; {expected}, with keys such as '{UNET}input_blocks.0.0.weight'")


def find_prediction(path, weights, metadata, prediction=None):
    """Returns what the UNet predicts, and on which schedule, as metadata: as asked for, or else what the first of these
    says: a .yaml beside the file, metadata (of a folder: its scheduler's config), marks among the weights."""
    beside = Path(path).with_suffix(".yaml")
    text = beside.read_text("utf-8", "replace") if Path(path).is_file() and beside.is_file() else ""
    line = re.search(r"""^\s*parameterization:\s*["']?(\w+)""", text, re.MULTILINE)
    is_v1_v = re.fullmatch(r"sd_v1\S*_v", str(metadata.get("ss_base_model_version")))
    found = (prediction or line and line[1] or metadata.get("modelspec.prediction_type") or is_v1_v and "v"
             or ("v" if "v_pred" in weights else "epsilon"))
    if found not in PREDICTIONS:
        raise CheckpointError(f"the model predicts {found!r}; expected one that predicts 'epsilon' or 'v'")
    zero_snr = str(metadata.get("ss_zero_terminal_snr")).lower() == "true" or "ztsnr" in weights
    return {"modelspec.prediction_type": PREDICTIONS[found], "ss_zero_terminal_snr": str(zero_snr)}


def substitute(rules, name):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
