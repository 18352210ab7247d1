import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint_layout
import model_converter
import oracle
from clip import CLIPConfig
from decoder import DecoderConfig
from diffusion import DiffusionConfig
from encoder import EncoderConfig
from model_converter import (
    NETWORKS,
    CheckpointError,
    ema_name,
    infer_configs,
    load_from_standard_weights,
    standard_names,
    to_standard_weights,
)

LAYOUT = {name: tuple(shape) for name, shape in
          json.loads((Path(__file__).parent / "sd15_checkpoint_layout.json").read_text())}
UNET = "model.diffusion_model."


def assert_same(loaded, weights):
    """The loaded state dicts hold these weights by standard name, and nothing else."""
    ours = to_standard_weights(loaded)
    assert ours.keys() == weights.keys()
    for name in ours:
        assert torch.equal(ours[name].float(), weights[name].float().reshape(ours[name].shape)), name


# ---- names and sizes


def test_full_size_names_and_shapes_are_those_of_the_release():
    with torch.device("meta"):
        state_dicts = {network: NETWORKS[network]().state_dict() for network in NETWORKS}
    ours = {name: tuple(weight.shape) for name, weight in to_standard_weights(state_dicts).items()}
    assert ours == LAYOUT


def test_the_release_implies_the_default_configs():
    weights = {name: torch.empty(shape, device="meta") for name, shape in LAYOUT.items()}
    assert infer_configs(weights, {}) == {"clip": CLIPConfig(), "encoder": EncoderConfig(), "decoder": DecoderConfig(),
                                          "diffusion": DiffusionConfig()}


def test_configs_are_read_off_shapes_and_metadata(weights):
    assert infer_configs(weights, oracle.METADATA) == oracle.TINY


def test_a_fused_projection_holds_queries_keys_and_values_in_turn(weights, checkpoint):
    loaded = load_from_standard_weights(checkpoint)
    names = standard_names("diffusion", "encoders.1.1.attention_1.in_proj.weight")
    assert names == tuple(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_{x}.weight" for x in "qkv")
    fused = loaded["diffusion"]["encoders.1.1.attention_1.in_proj.weight"]
    assert torch.equal(fused, torch.cat([weights[name] for name in names]))


# ---- diffusers' names


def diffusers_shapes(network, config):
    """diffusers' names of a network's weights, and the shapes that they have there (ones at the end left out)."""
    with torch.device("meta"):
        state_dict = NETWORKS[network](config).state_dict()
    shapes = {}
    for name, weight in state_dict.items():
        names = model_converter.diffusers_names(network, name, config)
        for diffusers_name in names:
            assert diffusers_name not in shapes
            shapes[diffusers_name] = model_converter.strip_ones((len(weight) // len(names), *weight.shape[1:]))
    return shapes


def shapes_of(model, prefix=""):
    return {prefix + name: model_converter.strip_ones(weight.shape) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("size", ["full", "tiny", "more blocks and fewer levels"])
def test_diffusers_names_are_those_of_its_models_one_for_one(size):
    configs = {"full": {"clip": CLIPConfig(), "encoder": EncoderConfig(), "decoder": DecoderConfig(),
                        "diffusion": DiffusionConfig()}, "tiny": oracle.TINY,
               "more blocks and fewer levels": {
                   "clip": oracle.TINY["clip"], "encoder": EncoderConfig(channels=(16, 32), n_blocks=3, n_groups=8),
                   "decoder": DecoderConfig(channels=(16, 32), n_blocks=4, n_groups=8),
                   "diffusion": replace(oracle.TINY["diffusion"], channels=(32, 64), attends=(False, True),
                                        n_blocks=3)}}[size]
    with torch.device("meta"):
        unet, vae, clip = oracle.empty_models(configs)
    assert diffusers_shapes("diffusion", configs["diffusion"]) == shapes_of(unet)
    encoder, decoder = (diffusers_shapes(network, configs[network]) for network in ("encoder", "decoder"))
    assert not encoder.keys() & decoder.keys() and {**encoder, **decoder} == shapes_of(vae)
    assert diffusers_shapes("clip", configs["clip"]) == shapes_of(clip, "" if hasattr(clip, "text_model") else
                                                                  "text_model.")


# ---- what is read


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_pickles(written, tiny, weights, legacy, wrapped, name):
    path = written({"state_dict": weights, "epoch": 3} if wrapped else weights, name,
                   _use_new_zipfile_serialization=not legacy)
    assert_same(load_from_standard_weights(path, "cpu"), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(written, tiny, weights, dtype, tmp_path):
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(stored, tmp_path / "model.safetensors", oracle.METADATA)
    for path in [written(stored), tmp_path / "model.safetensors"]:
        loaded = load_from_standard_weights(path)
        assert {weight.dtype for state_dict in loaded.values() for weight in state_dict.values()} == {dtype}
        assert_same(loaded, stored)
        loaded = load_from_standard_weights(path, dtype=torch.float32)
        assert {weight.dtype for state_dict in loaded.values() for weight in state_dict.values()} == {torch.float32}


def averages(weights, change=1.0):
    """The UNet's weights, changed, under the names of moving averages, with what goes with them."""
    return {**{ema_name(name): weight + change for name, weight in weights.items() if name.startswith(UNET)},
            "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32)}


def test_the_average_is_taken_only_where_it_is_asked_for(written, tiny, weights):
    ema = {name: weight + 1 for name, weight in weights.items() if name.startswith(UNET)}
    assert ema_name(f"{UNET}input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    path = written({"state_dict": {**weights, **averages(weights)}})
    assert_same(load_from_standard_weights(path), weights)
    assert_same(load_from_standard_weights(path, use_ema=True), {**weights, **ema})
    assert_same(load_from_standard_weights(written(weights), use_ema=True), weights)


def test_averages_alone_are_loaded(written, tiny, weights):
    rest = {name: weight for name, weight in weights.items() if not name.startswith(UNET)}
    path = written({**rest, **averages(weights, change=0.0)})
    for use_ema in (False, True):
        assert_same(load_from_standard_weights(path, use_ema=use_ema), weights)


def test_the_names_of_full_size_averages_alone_are_told_apart():
    names = [name for name in LAYOUT if name.startswith(UNET)] + [f"{UNET}time_embedding.cond_proj.weight"]
    assert [checkpoint_layout.name_of_ema(ema_name(name)) for name in names] == names


def test_a_part_of_the_averages_is_refused_by_name(written, tiny, weights):
    ema = averages(weights)
    missing = ema_name(f"{UNET}out.2.bias")
    del ema[missing]
    path = written({**weights, **ema})
    assert_same(load_from_standard_weights(path), weights)
    with pytest.raises(CheckpointError, match=f"{missing} is missing, the moving average of {UNET}out.2.bias"):
        load_from_standard_weights(path, use_ema=True)


def test_nan_in_an_average_is_blamed_on_it(written, tiny, weights):
    key = ema_name(f"{UNET}out.2.bias")
    path = written({**weights, **averages(weights), key: torch.full((4,), float("nan"))})
    assert_same(load_from_standard_weights(path), weights)
    with pytest.raises(CheckpointError, match=f"{key} holds NaN"):
        load_from_standard_weights(path, use_ema=True)


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v", "to_out.0", "norm"),
                                   ("to_q", "to_k", "to_v", "to_out.0", "group_norm"),
                                   ("query", "key", "value", "proj_attn", "group_norm")])
def test_other_names_of_the_vaes_attention(written, tiny, weights, names):
    changed = {}
    for name, weight in weights.items():
        for old, new in zip(("q", "k", "v", "proj_out", "norm"), names):
            name = name.replace(f".attn_1.{old}.", f".attn_1.{new}.")
        changed[name] = weight
    assert changed.keys() != weights.keys()
    assert_same(load_from_standard_weights(written(changed)), weights)
    bad = f"first_stage_model.encoder.mid.attn_1.{names[3]}.bias"
    with pytest.raises(CheckpointError, match=rf"{bad} has shape \(7,\)"):
        load_from_standard_weights(written({**changed, bad: torch.zeros(7)}))


def test_biases_as_those_of_convolutions(written, tiny, weights):
    changed = {name: weight[:, None, None] if ".attn_1." in name and name.endswith("bias") else weight
               for name, weight in weights.items()}
    assert_same(load_from_standard_weights(written(changed)), weights)


def test_a_whole_clip_model_and_a_lora_beside(written, tiny, weights):
    """A full CLIPModel in the place of its text half; keys of a LoRA and of a ControlNet beside the model."""
    clip = "cond_stage_model.transformer."
    extra = {clip + name: torch.zeros(2, 2) for name in
             ("vision_model.embeddings.class_embedding", "visual_projection.weight", "text_projection.weight",
              "logit_scale")}
    assert_same(load_from_standard_weights(written({**extra, **weights})), weights)
    beside = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2),
              "control_model.input_blocks.0.0.weight": torch.zeros(2, 2)}
    with pytest.warns(UserWarning, match="'lora_unet_.*' and 1 more keys of a LoRA or ControlNet beside the model are"):
        assert_same(load_from_standard_weights(written({**weights, **beside})), weights)


def test_one_block_a_level_counted_as_if_there_were_two(written, tiny, tmp_path):
    """As scripts wrote it that know SD 1.5's numbers alone: gaps where a second block would be, and an upsampling alone
    in a block."""
    configs = {**oracle.TINY, "diffusion": replace(oracle.TINY["diffusion"], n_blocks=1)}
    weights = oracle.random_weights(configs)

    def other(match):
        side, number = match[1], int(match[2])
        if side == "input_blocks":  # conv, block, down, block, down, block
            return f"{UNET}{side}.{[0, 1, 3, 4, 6, 7][number]}."
        return f"{UNET}{side}.{[0, 1, 3, 4, 6, 7][number]}."

    changed = {}
    for name, weight in weights.items():
        new = re.sub(rf"^{UNET}(input_blocks|output_blocks)\.(\d+)\.", other, name)
        new = re.sub(rf"^({UNET}output_blocks)\.1\.1\.conv", r"\1.2.1.conv", new)
        changed[re.sub(rf"^({UNET}output_blocks)\.4\.2\.conv", r"\1.5.2.conv", new)] = weight
    assert f"{UNET}output_blocks.5.2.conv.weight" in changed and f"{UNET}output_blocks.2.1.conv.bias" in changed
    loaded = load_from_standard_weights(written(changed))
    assert_same(loaded, weights)
    del changed[f"{UNET}output_blocks.7.0.in_layers.0.bias"]
    with pytest.raises(CheckpointError, match="in_layers.0.bias is missing"):
        load_from_standard_weights(written(changed))


def test_added_tokens_make_rows(written, tiny, weights):
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    more = {**weights, key: torch.cat([weights[key], torch.ones(2, 32)])}
    loaded = load_from_standard_weights(written(more))
    assert loaded["clip"]["token_embedding.weight"].shape == (49410, 32)
    assert_same(loaded, more)


def test_what_belongs_to_training_is_ignored(written, tiny, weights):
    extra = {
        "betas": torch.zeros(1000, dtype=torch.float64), "alphas_cumprod": torch.zeros(1000),
        "logvar": torch.zeros(1000), "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4, dtype=torch.int8),
        "first_stage_model.loss.perceptual_loss.net.slice1.0.bias": torch.full((4,), float("nan")),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6), "scale_factor": torch.tensor(0.18215),
    }
    checkpoint = {"state_dict": {**weights, **extra}, "epoch": 1, "global_step": 470000, "lr_schedulers": [],
                  "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3, dtype=torch.uint8)}}}],
                  "hyper_parameters": {"base_lr": 1e-4, 3: None}}
    assert_same(load_from_standard_weights(written(checkpoint)), weights)


@pytest.mark.parametrize("form", ["without", "both"])
def test_text_encoder_names_with_and_without_text_model(written, tiny, weights, form):
    renamed = {name.replace(".text_model.", "."): weight for name, weight in weights.items()}
    both = {**renamed, **weights} if form == "both" else renamed
    assert_same(load_from_standard_weights(written(both)), weights)


def test_attention_as_linear_layers_or_as_convolutions(written, tiny, weights):
    other = {name: weight[:, :, 0, 0] if "attn_1." in name and weight.ndim == 4 else weight
             for name, weight in weights.items()}
    assert sum(weight.shape != weights[name].shape for name, weight in other.items()) == 8
    assert_same(load_from_standard_weights(written(other)), weights)


def test_a_fine_tune_in_half_precision_with_keys_of_its_own(written, tiny, weights):
    half = {name: weight.half() for name, weight in weights.items()}
    extra = {"sd_merge_recipe": {"type": "webui"}, "ztsnr": torch.ones(1), "edm_vpred.sigma_max": torch.tensor(20.0),
             "cond_stage_model.transformer.text_projection.weight": torch.zeros(2, 2), "v_pred": torch.empty(0),
             7: "seven", "denoiser.sigmas": torch.zeros(1000, dtype=torch.float64), "sd_merge_models": "..."}
    assert_same(load_from_standard_weights(written({**extra, **half})), half)


def test_an_inpainting_model_has_nine_input_channels(tmp_path):
    configs = {**oracle.TINY, "diffusion": replace(oracle.TINY["diffusion"], in_channels=9)}
    weights = oracle.write_checkpoint(tmp_path / "inpainting.safetensors", configs)
    assert infer_configs(weights, oracle.METADATA) == configs
    assert_same(load_from_standard_weights(tmp_path / "inpainting.safetensors"), weights)


# ---- what is refused


@pytest.mark.parametrize("name, message", [
    ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "an SDXL checkpoint"),
    ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "an SD 2.x checkpoint"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA file"),
    ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA file"),
    ("control_model.input_blocks.0.0.weight", "a ControlNet file"),
    ("down_blocks.0.resnets.0.conv1.weight", "a diffusers folder"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "SD 3"),
    ("fc.weight", "'fc.weight'"),
    ("first_stage_model.quantize.embedding.weight", "VQ codebook"),
])
def test_other_models(tmp_path, name, message):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors: found .*{message}.*expected") as caught:
        load_from_standard_weights(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["encoder.down", "decoder.up"])
def test_a_vae_without_levels(tmp_path, weights, side):
    rest = {name: weight for name, weight in weights.items() if f".{side}." not in name}
    save_file(rest, tmp_path / "model.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match=rf"first_stage_model.{side}.0.block.0.conv1.weight is missing"):
        load_from_standard_weights(tmp_path / "model.safetensors")


def spoiled(weights, key, value):
    rest = {name: weight for name, weight in weights.items() if name != key}
    return rest if value is None else {**rest, key: value}


@pytest.mark.parametrize("key, value, message", [
    ("first_stage_model.decoder.conv_in.bias", None, "is missing; expected a tensor of shape"),
    (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", None, "is missing"),
    ("first_stage_model.post_quant_conv.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", torch.zeros(3, 3), r"has shape \(3, 3\); expected \(128, 32\)"),
    (f"{UNET}out.0.bias", torch.full((32,), float("nan")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.full((32,), float("inf")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.zeros(32, dtype=torch.int64), "' is torch.int64; expected a tensor of floating point"),
    (f"{UNET}label_emb.0.0.weight", torch.zeros(4), "does not have"),
    ("first_stage_model.quantize.embedding.weight", torch.zeros(4, 4), "VQ codebook"),
])
def test_broken_weights_name_the_key(tmp_path, weights, key, value, message):
    save_file(spoiled(weights, key, value), tmp_path / "broken.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_from_standard_weights(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


class Recorder(dict):
    """Weights that remember which of them were asked for."""

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 2, 2), (2, 2, 2, 2, 2)])
def test_sizes_are_not_read_off_a_wrong_shape(weights, shape):
    recorder = Recorder(weights)
    recorder.asked = set()
    infer_configs(recorder, oracle.METADATA)
    assert len(recorder.asked) > 15
    for key in recorder.asked:
        with pytest.raises(CheckpointError, match=re.escape(f"{key} has shape {shape}; expected")):
            infer_configs(spoiled(weights, key, torch.zeros(shape)), oracle.METADATA)


def test_an_absurd_number_in_a_name_is_one_error(tmp_path, weights):
    key = f"cond_stage_model.transformer.text_model.encoder.layers.{'9' * 5000}.mlp.fc1.weight"
    save_file({**weights, key: torch.zeros(2, 2)}, tmp_path / "model.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match="layers.2.*is missing"):
        load_from_standard_weights(tmp_path / "model.safetensors")


def test_an_object_in_place_of_a_tensor_names_the_key(written, tiny, weights):
    key = f"{UNET}out.0.bias"
    with pytest.raises(CheckpointError, match=f"{key}' is 'argparse.Namespace' object; expected a tensor"):
        load_from_standard_weights(written(spoiled(weights, key, argparse.Namespace(a=1))))


@pytest.mark.parametrize("changes, message", [
    ({"unet_heads": "x"}, "unet_heads is 'x'; expected a whole number from 1"),
    ({"unet_heads": "9" * 5000}, "expected a whole number from 1 to 99999"),
    ({"sample_size": "65"}, "65, which 8 .sample_size. does not divide"),
    ({"unet_heads": "0"}, "unet_heads is '0'"),
    ({"unet_heads": "5"}, "32, which 5 .unet_heads. does not divide"),
    ({"vae_groups": "32"}, "vae_groups"),
    ({"clip_heads": "7"}, "clip_heads"),
])
def test_bad_metadata(tmp_path, weights, changes, message):
    save_file(weights, tmp_path / "model.safetensors", {**oracle.METADATA, **changes})
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(tmp_path / "model.safetensors")


def test_all_of_float16_becomes_bfloat16_as_pytorch_does_it():
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)  # every number there is, NaNs included
    tensor = halves.repeat(40)[: 2**21 + 4].reshape(-1, 3)  # more than one block
    result = torch.empty_like(tensor, dtype=torch.bfloat16)
    model_converter.copy(tensor, result)
    torch.testing.assert_close(result, tensor.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
