"""LoRA and its kin: small files of changes to a model's weights, added for good or for a while.

    add_lora(models, "style.safetensors", scale=0.8)
    with lora(models, "style.safetensors", scale=0.8):
        image = generate("a red apple", models=models)

LoRA (arXiv 2106.09685, section 4.1) turns a weight W (out, in) into W + scale * alpha / r * B A, with B (out, r) and
A (r, in). Its kin make the change otherwise: a function each, below. The files of all trainers go through one table of
names, RULES. Nothing changes before the whole of a file is known to fit; then weights change in place, one by one.
"""

import json
import math
import re
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch
from torch.nn import functional as F

from checkpoint_file import CheckpointError, read_checkpoint
from checkpoint_layout import PREFIXES, substitute
from model_converter import NETWORKS, diffusers_names, standard_names, strip_ones
from pipeline import split_words

Layer = namedtuple("Layer", "network, module, part, n_parts")  # a third of a fused projection has rows of its own


def add_lora(models: dict, path, scale: float = 1.0, unet_scale: float | None = None,
             text_scale: float | None = None) -> dict[str, torch.Tensor]:
    """Adds a LoRA (or LoCon, LoHa, LoKr, DoRA, full difference) to the weights of UNet and text encoder, for good.

    Args:
        models: as `preload_models_from_standard_weights` returns them, not packed.
        path: a `.safetensors`, `.pt` or `.bin` file of any trainer for SD 1.x, or a folder of diffusers or PEFT.
        scale: the strength; 1 is what was trained, 0 nothing, less than 0 leads away from it.
        unet_scale, text_scale: the strength in one network, where the two are not to have the same.

    Returns:
        The embeddings that the file brings along, {name: (n, d_embed)}, for `encode_weighted(embeddings=…)`; mostly {}.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is of another kind or for another model, or broken; the weights are as they were.
        ValueError: the models are packed, or a scale is no number.
    """
    changes, embeddings, words = read_changes(models, path, scale, unet_scale, text_scale)
    apply(changes)
    learn_words(models, words)
    return embeddings


@contextmanager
def lora(models: dict, path, scale: float = 1.0, unet_scale: float | None = None, text_scale: float | None = None):
    """As `add_lora`, for a `with` block, which is given the embeddings. After it the weights are bit for bit what they
    were: copies of those that change are kept meanwhile. For several, put one block into the other."""
    changes, embeddings, words = read_changes(models, path, scale, unet_scale, text_scale)
    originals = [(layer, kind, rows(layer, kind).clone()) for layer, kind, _ in changes]
    clip = models.get("clip")
    config = None if clip is None else clip.config
    try:
        apply(changes)
        learn_words(models, words)
        yield embeddings
    finally:
        for layer, kind, original in originals:
            rows(layer, kind).copy_(original)
        if clip is not None and clip.config is not config:
            clip.config = config


def apply(changes):
    for layer, kind, change in changes:
        weight = rows(layer, kind)
        weight.copy_(change(weight.float()))  # in float32 often the very same tensor, and then nothing is copied


def learn_words(models, words):
    """Adds words to those that a text encoder says it knows, if it says so."""
    clip = models.get("clip")
    if clip is not None and clip.config.words:
        clip.config = replace(clip.config, words=tuple(sorted({*clip.config.words, *words})))


def rows(layer, kind):
    """Returns the "weight" or "bias" of a layer as it is now: a network may have moved to another device."""
    return getattr(layer.module, kind).detach().chunk(layer.n_parts)[layer.part]


# ---- names: which layer a file's key means

# What each dialect's keys become, by regular expressions in turn: a layer's path, a dot, the tensor's name at kohya's.
RULES = [
    (r"^(lora|lycoris)_(unet_|te1?_)?", ""),  # kohya, OneTrainer; LyCORIS
    (r"^(unet|text_encoder)\.", ""),  # diffusers
    (r"^diffusion_model\.|^text_encoders\.(clip_l\.transformer\.)?", ""),  # ComfyUI
    (r"^base_model\.model\.", ""),  # PEFT
    (r"\.processor\.", "."),  # diffusers when LoRAs were attention processors
    (r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora."),
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.lora(_linear_layer)?\.(down|up)\.", r".lora_\2."),  # diffusers a little later
    (r"\.lora_A(\.[^.]+)?\.weight$", ".lora_down.weight"),  # PEFT, with or without the name of the adapter
    (r"\.lora_B(\.[^.]+)?\.weight$", ".lora_up.weight"),
    (r"\.lora_magnitude_vector(\.[^.]+)*$", ".lora_magnitude_vector"),
]
TENSOR = re.compile(r"(.+)\.(lora_(?:down|up|mid)\.weight|alpha|scale|dora_scale|lora_magnitude_vector|"
                    r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm)")
ORIGINAL_LAYOUT = re.compile("(input_blocks|middle_block|output_blocks|time_embed|out)_[0-9]")


def split_key(key):
    """Returns (the layer's path without the dialect's prefix, the tensor's name), or (None, None)."""
    match = TENSOR.fullmatch(substitute(RULES, key))
    return match.groups() if match else (None, None)


def find_layers(models):
    """Returns {path with underscores for dots: Layer}, with each layer under all the paths that files give it. A path
    is looked up here, and not made out of a key, whose underscores do not tell which of them were dots."""
    layers = {}
    for network in {"diffusion", "clip"} & models.keys():
        module = next((part for part in models[network].modules() if isinstance(part, NETWORKS[network])), None)
        if module is None or any(hasattr(layer, "packed_weight") for layer in module.modules()):
            raise ValueError(f"models[{network!r}] is packed or no {NETWORKS[network].__name__}, so no LoRA can be "
                             f"added; load with pack=False, add the LoRA, then pack with cpu.packed.pack")
        for name in module.state_dict():
            if not name.endswith(".weight"):
                continue
            ours = module.get_submodule(name.removesuffix(".weight"))
            for names in (standard_names(network, name), diffusers_names(network, name, module.config)):
                for part, path in enumerate(names):
                    path = path.removeprefix(PREFIXES[network]).removesuffix(".weight").replace(".", "_")
                    for spelling in (path, path.removeprefix("text_model_")):
                        layers[spelling] = Layer(network, ours, part, len(names))
    return layers


# ---- files

FILES = [name + suffix for name in ("pytorch_lora_weights", "adapter_model") for suffix in (".safetensors", ".bin")]

# What is not read: a mark in its keys, a mark in what kohya's metadata says of the model.
OTHERS = {
    "IA3": (r"\.on_input$|\.ia3_l", None),
    "GLoRA": (r"\.[ab][12]\.weight$", None),
    "OFT or BOFT": (r"(^|\.)b?oft_", None),
    "T-LoRA": (r"\.lambda_layer$", None),
    "LyCORIS's sparse biases": (r"\.bias_(indices|values|size)$", None),
    "cloneofsimo's lora, whose layers have numbers instead of names": (r"^(unet|text_encoder):\d+:", None),
    "Flux": (r"(double|single)_blocks|single_transformer_blocks", "flux"),
    "SD 3": (r"joint_blocks|^transformer\.transformer_blocks|^lora_te3_", "sd3|stable-diffusion-3"),
    "AnimateDiff": (r"motion_modules", "animatediff"),
    "SDXL": (r"^lora_te2_|^text_encoder_2\.|\.clip_g$|"
             r"(attentions[._]\d+|(put_blocks[._]\d+|middle_block)[._]1)[._]transformer_blocks[._][1-9]",
             "sdxl|stable-diffusion-xl"),
    "SD 2": (r"encoder[._]layers[._](1[2-9]|2\d)[._]", "sd_v2|stable-diffusion-v2"),
}


def read_lora(path):
    """Returns [(key, tensor, what PEFT's configuration says of its network, or {})] of a file or folder, and the words
    of the captions that it was trained on, as far as it names them."""
    path = Path(path)
    folders = [path, path / "unet", path / "text_encoder"] if path.is_dir() else []
    files = [next((folder / name for name in FILES if (folder / name).is_file()), None) for folder in folders] or [path]
    if not any(files):
        raise FileNotFoundError(f"{path}: no LoRA in this folder; expected one of {', '.join(FILES)}")
    entries, words = [], set()
    for file in filter(None, files):
        try:
            weights, metadata = read_checkpoint(file)
        except CheckpointError as error:
            is_list = "pickled list" in str(error)
            raise CheckpointError(f"{error}{', not the list of cloneofsimo' * is_list}") from None
        refuse_others(file, list(map(str, weights)), metadata)
        configs = read_configs(file, metadata)
        words |= read_words(metadata)
        for key, tensor in weights.items():
            check_tensor(f"{file}: {key!r}", tensor)
            config = next((config for start, config in configs.items() if str(key).startswith(start)), {})
            entries.append((str(key), tensor, config))
    if not entries:
        raise CheckpointError(f"{path}: found no weights; expected a LoRA for SD 1.x")
    return entries, words


def read_words(metadata):
    """Returns the words of the captions that kohya's scripts note, {"folder": {"caption": how often, …}}."""
    try:
        captions = json.loads(metadata.get("ss_tag_frequency", "{}"))
        return {word for folder in captions.values() for caption in folder for word in split_words(caption)}
    except (AttributeError, TypeError, ValueError):  # a stranger's note
        return set()


def refuse_others(file, keys, metadata):
    claims = [metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", ""),
              "sd_v2 (ss_v2)" if metadata.get("ss_v2") == "True" else ""]
    for what, (mark, claim) in OTHERS.items():
        found = [key for key in keys if re.search(mark, key)]
        found += [said for said in claims if claim and re.match(claim, said)]
        if found:
            raise CheckpointError(f"{file}: found a file of {what}, by {found[0]!r}; expected LoRA, LoCon, LoHa, LoKr, "
                                  f"DoRA or full differences for SD 1.x")


def check_tensor(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if not 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes():  # strides fake any size
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, of which the file has but a part; expected all")
    if not tensor.float().isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinite values; expected finite ones")


def read_configs(file, metadata):
    """Returns what PEFT knew besides the weights, {start of the keys that it is about: dict}."""
    try:
        known = json.loads(metadata.get("lora_adapter_metadata", "{}")).items()
        configs = {start: {name.removeprefix(start): value for name, value in known if name.startswith(start)}
                   for start in ("unet.", "text_encoder.")}
        if file.stem == "adapter_model" and file.with_name("adapter_config.json").is_file():
            configs[""] = dict(json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8")))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its PEFT configuration cannot be read ({error}); expected JSON") from None
    for config in configs.values():
        if config.get("peft_type", "LORA") not in ("LORA", "LOHA", "LOKR"):
            raise CheckpointError(f"{file}: found PEFT's {config['peft_type']}; expected LORA, LOHA or LOKR")
        if re.match("pissa|olora|corda|loftq", str(config.get("init_lora_weights"))):
            raise CheckpointError(f"{file}: found init_lora_weights={config['init_lora_weights']!r}, with which the "
                                  f"model was changed too; expected a plain LoRA, into which PEFT can convert it")
    return configs


# ---- from keys to changes


def read_changes(models, path, scale, unet_scale, text_scale):
    """Returns ([(Layer, "weight" or "bias", function from its values to the changed ones)], embeddings, words)."""
    scales = {network: scale if own is None else own for network, own in
              (("diffusion", unet_scale), ("clip", text_scale))}
    for number in scales.values():
        if not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"the scale of a LoRA is {number!r}; give a number such as 0.8")
    layers, (entries, words) = find_layers(models), read_lora(path)

    embeddings, found, unknown = {}, {}, []
    for key, tensor, config in entries:
        bundled = re.fullmatch(r"bundle_emb\.([^.]+)\.(string_to_param\.)?[^.]+", key)
        if bundled and "clip" in models and tensor.shape[-1:] == (models["clip"].config.d_embed,):
            embeddings[bundled[1]] = torch.atleast_2d(tensor)
            continue
        dotted, name = split_key(key)
        spelling = (dotted or "").replace(".", "_")
        place = spelling, "bias" if name in ("diff_b", "b_norm") else "weight"
        if spelling not in layers or name in found.get(place, [{}])[0]:
            unknown.append(key)
        else:
            found.setdefault(place, ({}, key, config))[0][name] = tensor
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} of {len(entries)} keys fit no layer of this model: "
                              f"{', '.join(map(repr, unknown[:3]))}; expected a LoRA for SD 1.x")

    changes, misfits = {}, []
    for spelling, kind in sorted(found, key=lambda place: bool(ORIGINAL_LAYOUT.match(place[0]))):
        layer, (tensors, key, config) = layers[spelling], found[spelling, kind]
        if (layer, kind) in changes:  # the file has this layer in both layouts
            continue
        shape = () if getattr(layer.module, kind) is None else tuple(rows(layer, kind).shape)
        try:
            changes[layer, kind] = plan_change(tensors, split_key(key)[0], config, scales[layer.network], shape)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, re.error):
            changes[layer, kind] = None
            sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            misfits.append(f"{key!r}, of a layer with {sizes}, where the model's {kind} has {shape or 'no values'}")
    if misfits:
        others = [model for width, model in ((1024, "SD 2"), (2048, "SDXL"))
                  if any(re.search(rf"attn2[._]to_[kv].*\b{width}\b", text) for text in misfits)]
        raise CheckpointError(f"{path}: {len(misfits)} of {len(changes)} changes do not fit this model's layers: "
                              f"{'; '.join(misfits[:3])}; expected a LoRA for SD 1.x{', not '.join(['', *others])}")
    changes = [(layer, kind, change) for (layer, kind), change in changes.items() if scales[layer.network]]
    return changes, embeddings, words


def plan_change(tensors, name, config, scale, shape):
    """Returns the function from a layer's values, float32 of this shape, to the changed ones, which may take their
    place. Raises ValueError, or what PyTorch and Python raise, where the tensors do not fit."""
    parts = {key: tensor for key, tensor in tensors.items() if key not in ("alpha", "scale")}
    norms, peft_norms = parts.pop("dora_scale", None), parts.pop("lora_magnitude_vector", None)
    kind = next((kind for mark, kind in KINDS.items() if any(key.startswith(mark) for key in parts)), None)
    found, rank, make = kind(parts)
    is_narrow = shape[1:] == (9, 3, 3) and math.prod(found[1:]) == 4 * 3 * 3  # into an inpainting model
    # A linear layer and a 1x1 convolution are the same in two shapes, and some kinds know no kernels.
    if parts or not is_narrow and strip_ones(found) not in (strip_ones(shape), (shape[0], math.prod(shape[1:]))):
        raise ValueError(f"a change of shape {found}, and {len(parts)} tensors more, for {shape}")
    if norms is not None:
        norms = norms.reshape(*norms.shape[:2], *[1] * len(shape[2:]))
        if norms.shape[:2] not in ((shape[0], 1), (1, shape[1])):
            raise ValueError(f"norms of shape {tuple(norms.shape)} for {shape}")
    if peft_norms is not None:
        peft_norms = peft_norms.reshape(shape[0], 1, *[1] * len(shape[2:]))
    factor = get_factor(tensors, name, config, rank)

    def change(weight):
        def to(tensor):
            return tensor.to(weight.device, torch.float32)

        delta = make(to)
        if is_narrow:
            delta = F.pad(delta.reshape(-1, 4, 3, 3), (0, 0, 0, 0, 0, 5))
        delta = delta.reshape(weight.shape)
        if norms is not None:  # a scale as the web UIs mean it
            return weight + scale * (set_norms(weight + factor * delta, to(norms)) - weight)
        weight.add_(delta, alpha=scale * factor)
        return weight if peft_norms is None else set_norms(weight, to(peft_norms))

    return change


def get_factor(tensors, name, config, rank):
    """Returns what a change is multiplied by besides the user's scale: alpha / rank, or 1 where nothing tells alpha.

    Args:
        tensors: of this layer; its `alpha` goes before what config says, and `scale` (AUTOMATIC1111's) before both.
        name: the layer's path, for the patterns in config.
        config: PEFT's, or {}.
        rank: None for what is whole: that has a factor with PEFT alone.
    """
    if "scale" in tensors:
        return tensors["scale"].item()
    if "alpha" in tensors:
        return tensors["alpha"].item() / rank if rank else 1.0
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha")))
    rank = rank or by_pattern(config.get("rank_pattern"), name, config.get("r"))
    if alpha is None or rank is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_pattern(values, name, default):
    """PEFT's rule: a pattern is a regular expression for a layer's path, or for the end of it after a dot."""
    found = (value for pattern, value in (values or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, default)


def set_norms(weight, norms):
    """DoRA (arXiv 2402.09353, eq. 5): gives what makes an output these norms (out, 1, ...), or what looks at an input,
    (1, in, ...), as LyCORIS had it before 3.1.1."""
    dims = [dim for dim, size in enumerate(norms.shape) if size == 1]
    return norms * weight / torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


# ---- the kinds: a layer's tensors, which are taken out -> (shape of its change, rank or None, function that makes it)
# The function is given another that moves a tensor to where it is needed. Ranks that disagree raise ValueError.


def lora_kind(tensors):
    """LoRA, and LoCon for convolutions (arXiv 2309.14859, section 3): down (r, in, k, k), up (out, r, 1, 1); or with a
    kernel of its own between the two (Tucker)."""
    down, up, mid = tensors.pop("lora_down.weight"), tensors.pop("lora_up.weight"), tensors.pop("lora_mid.weight", None)
    shape, make = product(up, down) if mid is None else tucker(mid, up.flatten(1).T, down.flatten(1))
    return shape, len(down), make


def loha_kind(tensors):
    """LoHa (arXiv 2108.06098, proposition 1): the elementwise product of two matrices of low rank."""
    shape, rank, w1 = matrix(tensors, "hada_w1", "hada_t1")
    other_shape, _, w2 = matrix(tensors, "hada_w2", "hada_t2")
    if shape != other_shape:
        raise ValueError(f"factors of shapes {shape} and {other_shape}")
    return shape, rank, lambda to: w1(to) * w2(to)


def lokr_kind(tensors):
    """LoKr (arXiv 2309.14859, section 3): the Kronecker product of two matrices, each whole or of low rank."""
    (a, b), rank_1, w1 = matrix(tensors, "lokr_w1", None)
    (c, d, *kernel), rank_2, w2 = matrix(tensors, "lokr_w2", "lokr_t2")
    return (a * c, b * d, *kernel), rank_2 or rank_1, lambda to: torch.kron(w1(to), w2(to).flatten(1))


def full_kind(tensors):
    """The change of a weight or bias itself."""
    _, tensor = tensors.popitem()
    return tuple(tensor.shape), None, lambda to: to(tensor)


KINDS = {"lora_": lora_kind, "hada_": loha_kind, "lokr_": lokr_kind,
         "diff": full_kind, "w_norm": full_kind, "b_norm": full_kind}


def matrix(tensors, name, core):
    """Returns (shape, rank or None, function that makes it) of a factor that is whole or itself of low rank."""
    if name in tensors:
        whole = tensors.pop(name)
        return tuple(whole.shape), None, lambda to: to(whole)
    a, b = tensors.pop(f"{name}_a"), tensors.pop(f"{name}_b")
    shape, make = tucker(tensors.pop(core), a, b) if core in tensors else product(a, b)
    return shape, len(b), make


def product(a, b):
    """a (out, r), b (r, in, ...) -> (out, in, ...), as a shape and a function that makes (out, in * ...)"""
    if math.prod(a.shape[1:]) != len(b):
        raise ValueError(f"ranks of {tuple(a.shape)} and {tuple(b.shape)}")
    return (len(a), *b.shape[1:]), lambda to: to(a).flatten(1) @ to(b).flatten(1)


def tucker(core, a, b):
    """core (r, r, k, k), a (r, out), b (r, in) -> (out, in, k, k), as a shape and a function that makes it"""
    if core.shape[:2] != (len(a), len(b)):
        raise ValueError(f"ranks of {tuple(core.shape)}, {tuple(a.shape)} and {tuple(b.shape)}")
    shape = (a.shape[1], b.shape[1], *core.shape[2:])
    return shape, lambda to: torch.einsum("ijhw,io,jc->ochw", to(core), to(a), to(b))


# ---- what the command line needs


def find_lora(name: str, folder="data/loras") -> Path:
    """Returns the path that a LoRA's name means: a file or folder, or, for a name without a path, the one in `folder`
    (or below) that is called so, or was by who trained it (`ss_output_name`). Raises FileNotFoundError."""
    path, folder = Path(name), Path(__file__).resolve().parent.parent / folder
    if path.is_file() or path.name != name:
        return path
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt", ".ckpt", ".bin"))
    for file in [*files, *(file.parent for file in files)]:
        if name in (file.name, file.stem) and file != folder:
            return file
    for file in files:
        if file.suffix == ".safetensors" and read_checkpoint(file, mapped=True)[1].get("ss_output_name") == name:
            return file
    here = ", ".join(file.stem for file in files[:10]) or "none"
    raise FileNotFoundError(f"{name}: no LoRA of this name in {folder}; there are: {here}")


def parse_tags(prompt: str) -> tuple[str, list[tuple[str, float, float]]]:
    """Takes the web UIs' tags `<lora:NAME:SCALE>` out of a prompt.

    Args:
        prompt: `<lora:NAME>` is strength 1, `<lora:NAME:TEXT_SCALE:UNET_SCALE>` one for each network, and either can be
            named: `<lora:NAME:te=0.5:unet=1>` (AUTOMATIC1111, extra_networks_lora.py).

    Returns:
        (the prompt without tags, [(name, scale in the UNet, scale in the text encoder)])

    Raises:
        ValueError: for tags of other kinds and for what is no number.
    """
    tags = re.findall(r"<(\w+):([^>]+)>", prompt)
    return re.sub(r"<\w+:[^>]+>", "", prompt), [parse_tag(*tag) for tag in tags]


def parse_tag(kind, arguments):
    name, *scales = arguments.split(":")
    named = dict(scale.split("=", 1) for scale in scales if "=" in scale)
    plain = [scale for scale in scales if "=" not in scale]
    try:
        text = float(named.pop("te", plain[0] if plain else 1))
        unet = float(named.pop("unet", plain[1] if plain[1:] else text))
    except ValueError:
        named["no"] = "number"
    if kind not in ("lora", "lyco") or named or plain[2:]:
        raise ValueError(f"the prompt has <{kind}:{arguments}>; expected <lora:NAME:SCALE>, or <lora:NAME:TEXT:UNET> "
                         f"with a scale for the text encoder and one for the UNet")
    return name, unet, text
