"""A model as diffusers keeps it, a folder with a part of the model in each subfolder: read and written.

What is in the files of weights is not looked at here; `model_converter.py` knows the names.
"""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from checkpoint_file import CheckpointError, read_checkpoint

# Settings that change what the networks compute, and what they are in SD 1.x; where one is absent, that is its default.
EXPECTED = {
    "unet": {"act_fn": "silu", "addition_embed_type": None, "center_input_sample": False, "class_embed_type": None,
             "dual_cross_attention": False, "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
             "mid_block_scale_factor": 1, "norm_eps": 1e-5, "only_cross_attention": False,
             "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "timestep_post_act": None,
             "transformer_layers_per_block": 1},
    "vae": {"act_fn": "silu", "latents_mean": None, "latents_std": None, "scaling_factor": 0.18215,
            "shift_factor": None},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                  "num_train_timesteps": 1000, "trained_betas": None},
}
# What the shapes of weights do not tell: where it stands, and what `model_converter.infer_configs` calls it.
TOLD = {
    "unet": {"attention_head_dim": "unet_heads", "num_attention_heads": "unet_heads", "norm_num_groups": "unet_groups"},
    "vae": {"norm_num_groups": "vae_groups"},
    "text_encoder": {"num_attention_heads": "clip_heads"},
    "scheduler": {"prediction_type": "modelspec.prediction_type", "rescale_betas_zero_snr": "ss_zero_terminal_snr"},
}
STEM, KIND = r"(?:diffusion_pytorch_model|pytorch_model|model)", r"\.(?P<kind>safetensors|bin)"
WEIGHTS = re.compile(STEM + r"(?:\.(?P<variant>\w+))?" + KIND)
INDEX = re.compile(STEM + KIND +
                   r"(?:\.index(?:\.(?P<variant>\w+))?|\.(?P<old_variant>\w+)\.index)\.json")


def read_folder(folder, parts=("text_encoder", "vae", "unet"), use_ema: bool = False):
    """Reads parts of a model.

    Args:
        folder: the folder of the model; or, for one part, that part's own.
        parts: the names of subfolders.
        use_ema: take the variant "ema" of the weights where there is one beside the plain ones.

    Returns:
        ({part: {name: tensor}}, what config files and metadata tell of the model, as the metadata of a checkpoint)

    Raises:
        CheckpointError: a file is missing or broken, or a config asks for what SD 1.x does not have.
    """
    folder = Path(folder)
    is_model = any((folder / part).is_dir() for part in parts)
    weights, metadata = {}, {}
    for part in parts:
        path = folder / part if is_model or len(parts) > 1 else folder
        if not path.is_dir():
            raise CheckpointError(f"{folder}: found a folder without {part!r}; expected that of a diffusers model, "
                                  f"with {', '.join(parts)} in it")
        weights[part], told = read_weights(path, use_ema)
        metadata |= told | read_config(part, path / "config.json")
    if is_model:
        metadata |= read_config("scheduler", folder / "scheduler" / "scheduler_config.json")
    return weights, metadata


def read_weights(folder, use_ema):
    """Returns ({name: tensor}, metadata) of the one set of weights in a folder that is to be taken."""
    found = []
    for path in sorted(folder.iterdir()):
        match = WEIGHTS.fullmatch(path.name) or INDEX.fullmatch(path.name)
        if match:
            groups = match.groupdict()
            found.append((groups["variant"] or groups.get("old_variant") or "", groups["kind"], path))
    if not found:
        raise CheckpointError(f"{folder}: found no weights; expected diffusion_pytorch_model.safetensors, "
                              f"model.safetensors or the like")
    order = ["ema"] * use_ema + ["", "non_ema", "fp16"]
    _, _, path = min(found, key=lambda entry: (order.index(entry[0]) if entry[0] in order else len(order),
                                               entry[1] == "bin"))
    if path.suffix != ".json":
        return read_checkpoint(path, mapped=True)
    places = read_json(path).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else {None}
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
        raise CheckpointError(f"{path}: found no table of names and files under 'weight_map'; expected one")
    weights, metadata = {}, {}
    for name in sorted(names):
        shard, told = read_checkpoint(folder / name, mapped=True)
        weights |= shard
        metadata |= told
    return weights, metadata


def read_config(part, path):
    """Returns what a part's config tells beyond the shapes of its weights; refuses what SD 1.x does not have."""
    if not path.is_file():
        return {}
    config = read_json(path)
    for key, expected in EXPECTED[part].items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"{path}: {key} is {config[key]!r:.80}; expected {expected!r}, as in SD 1.x")
    told = {name: str(config[key]) for key, name in TOLD[part].items() if config.get(key) is not None}
    if part == "unet" and isinstance(config.get("sample_size"), int):
        told["sample_size"] = str(8 * config["sample_size"])
    return told


def read_json(path):
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: found a broken JSON file ({str(error)[:80]!r}); expected a whole one") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found a JSON {type(content).__name__}; expected an object with settings")
    return content


def write_folder(folder, weights: dict[str, dict[str, Tensor]], configs: dict, metadata: dict[str, str],
                 tokenizer_files: list[Path]) -> None:
    """Writes a model.

    Args:
        folder: where; it must not exist.
        weights: {"text_encoder": {name: tensor}, "vae": ..., "unet": ...}
        configs: our configs of the four networks.
        metadata: put into each file of weights.
        tokenizer_files: copied into its subfolder.
    """
    folder = Path(folder)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as temporary:
        whole = Path(temporary) / "model"
        for name, config in to_json(configs).items():
            path = whole / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        for part, tensors in weights.items():
            name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
            save_file(tensors, whole / part / name, {"format": "pt", **metadata})
        for path in tokenizer_files:
            shutil.copy(path, whole / "tokenizer")
        whole.rename(folder)


def to_json(configs):
    """Returns {path in the folder: settings}."""
    clip, encoder, unet = (configs[network] for network in ("clip", "encoder", "diffusion"))
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in unet.attends]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(unet.attends)]
    n_levels = len(encoder.channels)
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionInpaintPipeline" if unet.in_channels == 9 else "StableDiffusionPipeline",
            "_diffusers_version": "0.21.0", "feature_extractor": [None, None], "requires_safety_checker": False,
            "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
            "prediction_type": "v_prediction" if unet.prediction == "v" else "epsilon",
            "rescale_betas_zero_snr": unet.zero_terminal_snr,
            "timestep_spacing": "trailing" if unet.zero_terminal_snr else "leading"},
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
            "add_prefix_space": False, "errors": "replace", "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
            "hidden_size": clip.d_embed, "intermediate_size": clip.d_mlp, "num_hidden_layers": clip.n_layers,
            "num_attention_heads": clip.n_heads, "max_position_embeddings": clip.n_tokens, "vocab_size": clip.n_vocab,
            "projection_dim": clip.d_embed, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1},
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": encoder.channels,
            "down_block_types": ["DownEncoderBlock2D"] * n_levels, "up_block_types": ["UpDecoderBlock2D"] * n_levels,
            "in_channels": encoder.in_channels, "out_channels": configs["decoder"].out_channels,
            "latent_channels": encoder.latent_channels, "layers_per_block": encoder.n_blocks,
            "norm_num_groups": encoder.n_groups, "sample_size": unet.sample_size, "scaling_factor": 0.18215},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": unet.n_heads,
            "block_out_channels": unet.channels, "down_block_types": down, "up_block_types": up,
            "cross_attention_dim": unet.d_context, "in_channels": unet.in_channels,
            "out_channels": unet.out_channels, "layers_per_block": unet.n_blocks,
            "norm_num_groups": unet.n_groups, "norm_eps": 1e-5, "sample_size": unet.sample_size // 8,
            "flip_sin_to_cos": True, "freq_shift": 0, "time_cond_proj_dim": unet.d_guidance or None},
    }
