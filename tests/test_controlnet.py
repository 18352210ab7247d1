import copy
import json
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file

import oracle
from checkpoint_file import CheckpointError
from cpu import packed
from diffusion import Diffusion, DiffusionConfig, get_time_embedding
from extensions.controlnet import Controlled, canny, convert_controlnet, load_controlnet
from model_converter import to_standard_weights
from model_loader import load_tokenizer
from pipeline import generate

CONFIG = oracle.TINY["diffusion"]
HINTS = (8, 16, 24, 32)


def control_shapes(config=CONFIG, hint_channels=HINTS):
    """The shapes of a ControlNet's weights under lllyasviel's names, without the prefix, as cldm.py has them."""
    with torch.device("meta"):
        unet = to_standard_weights({"diffusion": Diffusion(config).state_dict()})
    prefix = "model.diffusion_model."
    shapes = {name.removeprefix(prefix): weight.shape for name, weight in unet.items()
              if name.startswith((f"{prefix}time_embed.", f"{prefix}input_blocks.", f"{prefix}middle_block."))}
    n_levels, width = len(config.channels), config.channels[0]
    skips = [width] + [c for i, c in enumerate(config.channels) for _ in range(config.n_blocks + (i < n_levels - 1))]
    for i, channels in enumerate(skips):
        shapes |= {f"zero_convs.{i}.0.weight": (channels, channels, 1, 1), f"zero_convs.{i}.0.bias": (channels,)}
    shapes |= {"middle_block_out.0.weight": (channels, channels, 1, 1), "middle_block_out.0.bias": (channels,)}
    a, b, c, d = hint_channels
    for i, (ins, outs) in enumerate([(3, a), (a, a), (a, b), (b, b), (b, c), (c, c), (c, d), (d, width)]):
        shapes |= {f"input_hint_block.{2 * i}.weight": (outs, ins, 3, 3), f"input_hint_block.{2 * i}.bias": (outs,)}
    return shapes


def control_weights(seed):
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in control_shapes().items():
        weight = torch.randn(shape, generator=generator)
        is_gain = len(shape) == 1 and name.endswith("weight")
        weights[name] = weight / weight[0].numel() ** 0.5 if len(shape) > 1 else weight * 0.1 + is_gain
    return weights


def controlnet_oracle(weights, config=CONFIG, hint_channels=HINTS, **settings):
    """diffusers' ControlNet with these weights, through its own converter."""
    model = ControlNetModel(
        block_out_channels=config.channels, layers_per_block=config.n_blocks, cross_attention_dim=config.d_context,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attends),
        attention_head_dim=config.n_heads, norm_num_groups=config.n_groups,
        conditioning_embedding_out_channels=hint_channels, **settings)
    model.load_state_dict(single_file_utils.convert_controlnet_checkpoint(weights, model.config))
    return model.eval()


def with_prefix(weights, prefix="control_model."):
    return {prefix + name: weight for name, weight in weights.items()}


@pytest.fixture(scope="module")
def edges():
    return control_weights(11)


@pytest.fixture(scope="module")
def depths():
    return control_weights(12)


@pytest.fixture
def load(models, tmp_path):
    """load_controlnet() of weights under lllyasviel's names."""
    def load(weights, name="control_v11p_sd15_canny.safetensors", metadata=None, base=models, **settings):
        save_file(weights, tmp_path / name, metadata)
        return load_controlnet(tmp_path / name, "cpu", torch.float32, base=base, **settings)
    return load


def picture(size, seed=0):
    """A smooth coloured RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def draw(models, tokenizer):
    """generate() with a Controlled UNet -> (picture, latents after each step)."""
    def draw(controlled, prompt="a cat", **settings):
        latents = []
        settings = {"n_inference_steps": 3, "cfg_scale": 4.0, "seed": 7, "height": 64, "width": 72,
                    "sampler_name": "ddim", **settings}
        image = generate(prompt, models=models | {"diffusion": controlled}, tokenizer=tokenizer,
                         callback=lambda step, timestep, x: latents.append(x.clone()) and None, **settings)
        return image, torch.stack(latents)
    return draw


@pytest.fixture(scope="module")
def draw_diffusers(weights, tokenizer):
    """The same by diffusers' pipeline; `control` has its settings."""
    parts = {"vae": oracle.vae_oracle(weights), "text_encoder": oracle.clip_oracle(weights), "tokenizer": tokenizer,
             "unet": oracle.unet_oracle(weights), "safety_checker": None, "feature_extractor": None,
             "requires_safety_checker": False}

    def draw(controlnet, image, prompt="a cat", steps=3, cfg_scale=4.0, seeds=(7,), height=64, width=72, **control):
        latents = []
        pipe = StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet,
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                    clip_sample=False, steps_offset=1, set_alpha_to_one=False))
        pipe.set_progress_bar_config(disable=True)
        images = pipe(prompt, image=image, height=height, width=width, num_inference_steps=steps,
                      guidance_scale=cfg_scale, output_type="np",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                      callback_on_step_end=lambda pipe, i, t, found: latents.append(found["latents"]) or {},
                      **control).images
        return images, torch.stack(latents)
    return draw


def assert_same(ours, theirs):
    (image, latents), (images, expected) = ours, theirs
    for i in range(len(expected)):  # 1e-5 a step, and random networks blow up what the steps before were off by
        torch.testing.assert_close(latents[i], expected[i], atol=2e-5 * (i + 1), rtol=0)
    assert np.abs(image / 255 - images).max() <= 0.51 / 255  # half a grey level is what rounding costs


# ---- the same function as diffusers


def test_one_controlnet_equals_diffusers(models, load, edges, draw, draw_diffusers):
    control = picture((50, 81))  # neither the size nor the shape of the picture
    controlled = Controlled(models["diffusion"], [(load(with_prefix(edges)), control, 0.8)])
    ours = draw(controlled)
    assert_same(ours, draw_diffusers(controlnet_oracle(edges), control, controlnet_conditioning_scale=0.8))
    assert (draw(models["diffusion"])[1] - ours[1]).abs().max() > 0.1  # the control matters


def test_two_controlnets_equal_diffusers(models, load, edges, depths, draw, draw_diffusers):
    controls = picture((72, 64), 1), picture((40, 40), 2)
    controlled = Controlled(models["diffusion"], [(load(edges), controls[0], 1.0), (load(depths), controls[1], -0.5)])
    theirs = draw_diffusers([controlnet_oracle(edges), controlnet_oracle(depths)], list(controls),
                            controlnet_conditioning_scale=[1.0, -0.5])
    assert_same(draw(controlled), theirs)


@pytest.mark.parametrize("cfg_scale", [4.0, 1.0])
def test_guess_mode_equals_diffusers(models, load, edges, depths, draw, draw_diffusers, cfg_scale):
    controls = picture((72, 64), 1), picture((72, 64), 2)
    controlled = Controlled(models["diffusion"], [(load(edges), controls[0], 1.0), (load(depths), controls[1], 0.5)],
                            guess_mode=True)
    theirs = draw_diffusers([controlnet_oracle(edges), controlnet_oracle(depths)], list(controls), guess_mode=True,
                            controlnet_conditioning_scale=[1.0, 0.5], cfg_scale=cfg_scale)
    assert_same(draw(controlled, cfg_scale=cfg_scale, do_cfg=cfg_scale != 1), theirs)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_shuffle_pools_as_in_diffusers(models, load, edges, draw, draw_diffusers, guess_mode):
    control = picture((72, 64))
    controlnet = load(with_prefix(edges), "control_v11e_sd15_shuffle.safetensors")
    theirs = controlnet_oracle(edges, global_pool_conditions=True)
    controlled = Controlled(models["diffusion"], [(controlnet, control, 1.5)], guess_mode=guess_mode)
    assert_same(draw(controlled), draw_diffusers(theirs, control, guess_mode=guess_mode,
                                                 controlnet_conditioning_scale=1.5))


@pytest.mark.parametrize("start, end, steps, controlled_steps", [
    (0.3, 0.6, 10, [3, 4, 5]), (0.1, 0.7, 10, [1, 2, 3, 4, 5, 6]), (0.34, 1.0, 3, [2]), (0.0, 0.5, 3, [0])])
def test_an_interval_counts_calls(models, load, edges, start, end, steps, controlled_steps):
    controlnet, calls, step = load(edges), [], [0]
    controlnet.register_forward_hook(lambda *call: calls.append(step[0]))
    controlled = Controlled(models["diffusion"], [(controlnet, picture((72, 64)), 1.0)], start, end)
    inputs = torch.zeros(1, 4, 4, 4), torch.zeros(2, 9, 32), torch.zeros(1, 32)
    run = controlled.for_run(SimpleNamespace(timesteps=range(steps)))
    for number in range(steps):
        step[0] = number
        run(*inputs)
    assert calls == controlled_steps
    controlled(*inputs)
    assert len(calls) == len(controlled_steps) + 1  # outside of a run it controls always


@pytest.mark.parametrize("start, end", [(0.2, 0.6), (0.3, 1.0)])
def test_an_interval_equals_diffusers(models, load, edges, draw, draw_diffusers, start, end):
    controlled = Controlled(models["diffusion"], [(load(edges), picture((72, 64)), 1.0)], start, end)
    theirs = draw_diffusers(controlnet_oracle(edges), picture((72, 64)), steps=5, control_guidance_start=start,
                            control_guidance_end=end)
    assert_same(draw(controlled, n_inference_steps=5), theirs)


def test_a_batch_with_a_control_image_for_each_equals_diffusers(models, load, edges, draw, draw_diffusers):
    controls, prompts = [picture((72, 64), 1), picture((72, 64), 2)], ["a cat", "a red dog"]
    controlled = Controlled(models["diffusion"], [(load(edges), controls, 1.0)])
    assert_same(draw(controlled, prompts), draw_diffusers(controlnet_oracle(edges), controls, prompts, seeds=(7, 8)))


@pytest.mark.parametrize("kind", ["array", "tensor", "small tensor"])
def test_inpainting_marks_pixels_with_minus_one(models, load, edges, draw, draw_diffusers, kind):
    pixels = np.asarray(picture((72, 64)), dtype=np.float64) / 255
    pixels[10:30, 20:50] = -1
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    if kind == "small tensor":
        tensor = torch.nn.functional.interpolate(tensor, (32, 36))
    controlled = Controlled(models["diffusion"], [(load(edges), pixels if kind == "array" else tensor, 1.0)])
    assert_same(draw(controlled), draw_diffusers(controlnet_oracle(edges), tensor))


@pytest.mark.parametrize("height, width", [(6, 8), (7, 5)])
def test_a_nine_channel_unet_equals_diffusers(load, edges, height, width):
    """The ControlNet sees the latents, and not the mask and the picture that an inpainting model gets with them."""
    configs = oracle.TINY | {"diffusion": replace(CONFIG, in_channels=9)}
    weights = oracle.random_weights(configs, seed=3)
    unet = Diffusion(configs["diffusion"])
    unet.load_state_dict(oracle.randomize(Diffusion(configs["diffusion"]), 3 + 3).state_dict())
    generator = torch.Generator().manual_seed(4)
    latents, context = torch.randn(2, 9, height, width, generator=generator), torch.randn(2, 7, 32, generator=generator)
    image = torch.rand(1, 3, 8 * height, 8 * width, generator=generator)
    ours = Controlled(unet, [(load(edges), image, 0.7)])(latents, context, get_time_embedding(321, 32))
    down, middle = controlnet_oracle(edges)(latents[:, :4], 321, context, image, 0.7, return_dict=False)
    theirs = oracle.unet_oracle(weights, configs["diffusion"])(
        latents, 321, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# ---- every kind of file


def residuals(controlnet):
    generator = torch.Generator().manual_seed(5)
    latents, context = torch.randn(1, 4, 6, 8, generator=generator), torch.randn(1, 9, 32, generator=generator)
    hint = controlnet.input_hint_block(torch.rand(1, 3, 48, 64, generator=generator))
    return controlnet(latents, context, get_time_embedding(500, CONFIG.channels[0]), hint)


def assert_equal_networks(ours, expected):
    weights = ours.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name
    for a, b in zip(residuals(ours), residuals(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", ["prefix", "bare", "checkpoint", "pth", "fp16"])
def test_original_files(models, load, edges, weights, tmp_path, keep):
    expected = load(with_prefix(edges))
    if keep == "bare":
        controlnet = load(edges)
    elif keep == "checkpoint":
        controlnet = load(weights | with_prefix(edges))
    elif keep == "fp16":
        halves = {name: weight.half() for name, weight in edges.items()}
        controlnet, expected = load(halves), load({name: weight.float() for name, weight in halves.items()})
    else:
        torch.save({"state_dict": with_prefix(edges), "global_step": 3}, tmp_path / "control_sd15_canny.pth")
        controlnet = load_controlnet(tmp_path / "control_sd15_canny.pth", "cpu", torch.float32, base=models)
        if keep == "prefix":
            controlnet = load(with_prefix(edges))
    assert_equal_networks(controlnet, expected)
    assert not controlnet.training and not controlnet.pools


@pytest.mark.parametrize("options", [
    {}, {"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "100KB"},
    {"max_shard_size": "100KB", "variant": "fp16"}])
def test_diffusers_folders(load, edges, tmp_path, options):
    controlnet_oracle(edges).save_pretrained(tmp_path / "canny", **options)
    controlnet = load_controlnet(tmp_path / "canny", "cpu", torch.float32)  # the folder tells the number of heads
    assert_equal_networks(controlnet, load(edges))


def test_a_diffusers_folder_tells_of_pooling_and_the_order_of_colours(models, load, edges, tmp_path):
    theirs = controlnet_oracle(edges, global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    theirs.save_pretrained(tmp_path / "x")
    controlnet = load_controlnet(tmp_path / "x", "cpu", torch.float32)
    assert controlnet.pools
    generator = torch.Generator().manual_seed(5)
    latents, context = torch.randn(1, 4, 6, 8, generator=generator), torch.randn(1, 9, 32, generator=generator)
    image = torch.rand(1, 3, 48, 64, generator=generator)
    down, middle = theirs(latents, 500, context, image, return_dict=False)
    ours = controlnet(latents, context, get_time_embedding(500, 32), controlnet.input_hint_block(image))
    for a, b in zip(ours, [*down, middle], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_single_files_with_diffusers_names(load, edges, tmp_path):
    assert_equal_networks(load(controlnet_oracle(edges).state_dict()), load(edges))
    controlnet_oracle(edges, global_pool_conditions=True).save_pretrained(tmp_path / "x")
    file = load_controlnet(tmp_path / "x/diffusion_pytorch_model.safetensors", "cpu", torch.float32)
    assert file.pools  # as the config beside it says


def test_metadata_tells_the_number_of_heads(load, edges):
    metadata = {"unet_heads": "4", "unet_groups": "8"}
    assert_equal_networks(load(edges, metadata=metadata, base=None), load(edges))


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_differences_are_added_to_the_base(models, load, edges, weights, prefix):
    base = {name.removeprefix("model.diffusion_model."): weight for name, weight in weights.items()}
    difference = {name: weight - base[name] if name in base else weight for name, weight in edges.items()}
    file = with_prefix(difference, prefix) | {"difference": torch.ones(1)}
    controlnet, expected = load(file), load(edges)
    found = controlnet.state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found[name], weight)
    before = models["diffusion"].state_dict()["encoders.1.0.conv_1.weight"].clone()
    controlnet.encoders[1][0].conv_1.weight.add_(1)
    assert torch.equal(models["diffusion"].state_dict()["encoders.1.0.conv_1.weight"], before)

    with pytest.raises(CheckpointError, match="canny.safetensors: found the difference .*base=models"):
        load(file, base=None)
    other = {"diffusion": Diffusion(replace(CONFIG, d_context=64))}
    with pytest.raises(CheckpointError, match="canny.safetensors: found the difference .*whose"):
        load(file, base=other)


def test_a_packed_base_serves_where_its_weights_are_not_needed(load, edges):
    base = {"diffusion": packed.pack(oracle.randomize(Diffusion(CONFIG)))}
    assert_equal_networks(load(edges, base=base), load(edges))
    with pytest.raises(CheckpointError, match="canny.safetensors: found the difference .*pack=False"):
        load(edges | {"difference": torch.ones(1)}, base=base)


def test_whole_size_names_fit_exactly():
    shapes = control_shapes(DiffusionConfig(), (16, 32, 96, 256))
    with torch.device("meta"):
        names = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = ControlNetModel(cross_attention_dim=768).state_dict()
    assert len(names) == len(theirs) == 340
    for weights in (names, theirs):
        controlnet = convert_controlnet(dict(weights), {"unet_heads": 8, "unet_groups": 32}, {})
        assert controlnet.config == DiffusionConfig()
        assert sum(weight.numel() for weight in controlnet.state_dict().values()) == 361_279_120


@pytest.mark.parametrize("change, message", [
    ({"middle_block_out.0.weight": None}, "control_model.middle_block_out.0.weight is missing"),
    ({"zero_convs.0.0.weight": torch.ones(3, 3)}, "control_model.zero_convs.0.0.weight has shape .3, 3.;"),
    ({"zero_convs.99.0.weight": torch.ones(3)}, r"'control_model.zero_convs.99.0.weight' .1 such"),
    ({"time_embed.0.weight": torch.ones(128, 32).int()}, "'control_model.time_embed.0.weight' is torch.int32"),
    ({"input_blocks.0.0.weight": None}, "'control_model.input_blocks.0.0.weight'"),
    ({"input_hint_block.0.weight": torch.ones(8, 4, 3, 3)}, "input_hint_block.0.weight has shape"),
    ({"zero_convs.0.0.weight": torch.full((32, 32, 1, 1), torch.nan)}, "NaN"),
])
def test_bad_weights_are_named(load, edges, change, message):
    weights = {name: weight for name, weight in (edges | change).items() if weight is not None}
    with pytest.raises(CheckpointError, match=f"canny.safetensors: .*{message}"):
        load(with_prefix(weights))


@pytest.mark.parametrize("name, shape, found", [
    ("lora_controlnet", (1,), "Control-LoRA"),
    ("body.0.in_conv.weight", (8, 4, 1, 1), "T2I-Adapter"),
    ("adapter.body.0.resnets.0.block1.weight", (8, 8, 3, 3), "T2I-Adapter"),
    ("body.0.block2.weight", (8, 8, 3, 3), "T2I-Adapter"),
    ("task_embedding", (6, 8), "union"),
    ("control_add_embedding.linear_1.bias", (8,), "union"),
    ("add_embedding.linear_1.weight", (8, 8), "SDXL"),
    ("label_emb.0.0.bias", (8,), "SDXL"),
    ("controlnet_blocks.0.weight", (8, 8), "SD 3 or Flux"),
    ("ip_adapter.1.to_k_ip.weight", (8, 8), "IP-Adapter"),
    ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", (8, 8), "ControlLLLite"),
    ("down_blocks.0.motion_modules.0.norm.weight", (8,), "SparseCtrl"),
    ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", (8, 8), "LoRA"),
    ("model.diffusion_model.input_blocks.0.0.weight", (32, 4, 3, 3), "without a ControlNet"),
    ("something.else", (8, 8), "something.else"),
])
def test_what_only_looks_like_a_controlnet_is_refused_by_name(load, name, shape, found):
    with pytest.raises(CheckpointError, match=f"canny.safetensors: found .*{found}.*; expected a ControlNet for SD 1"):
        load({name: torch.ones(shape)})


def test_controlnets_for_other_models_are_refused(models, load, edges, tmp_path):
    sd2 = replace(CONFIG, d_context=1024)
    with pytest.raises(CheckpointError, match="SD 2.x"):
        load({name: torch.zeros(shape) for name, shape in control_shapes(sd2).items()})
    other = {name: torch.zeros(shape) for name, shape in control_shapes(replace(CONFIG, d_context=24)).items()}
    with pytest.raises(ValueError, match="another UNet: its d_context is 24, the UNet's 32"):
        Controlled(models["diffusion"], [(load(other), picture((8, 8)), 1.0)])
    with pytest.raises(CheckpointError, match="base=models"):
        odd = replace(CONFIG, channels=(20, 20), n_groups=4)
        load({name: torch.zeros(shape) for name, shape in control_shapes(odd).items()})
    controlnet_oracle(edges).save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    for change, message in [({"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel"),
                            ({"addition_embed_type": "text_time"}, "addition_embed_type")]:
        (tmp_path / "x/config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_controlnet(tmp_path / "x", "cpu", torch.float32)
    (tmp_path / "x/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        load_controlnet(tmp_path / "x", "cpu", torch.float32)


def test_broken_files_are_named(load, edges, tmp_path):
    load(edges)
    whole = (tmp_path / "control_v11p_sd15_canny.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    touch = f"touch {tmp_path / 'hit'}".encode()
    (tmp_path / "evil.pth").write_bytes(b"\x80\x04cposix\nsystem\n(S'" + touch + b"'\ntR.")
    (tmp_path / "empty").mkdir()
    for name in ("cut.safetensors", "evil.pth", "empty"):
        with pytest.raises(CheckpointError, match=name):
            load_controlnet(tmp_path / name, "cpu", torch.float32)
    assert not (tmp_path / "hit").exists()
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        load_controlnet(tmp_path / "nothing.pth", "cpu", torch.float32)


# ---- in use


@pytest.mark.parametrize("change, message", [
    ({"controls": []}, "controls is empty"), ({"start": 0.5, "end": 0.5}, "start is 0.5 and end is 0.5"),
    ({"start": -0.1}, "start is -0.1"), ({"end": 1.1}, "end is 1.1"), ({"scale": "1"}, "scale of a ControlNet is '1'"),
    ({"scale": float("nan")}, "is nan"), ({"image": np.full((8, 8, 3), 1.5)}, "from 1.5 to 1.5"),
    ({"image": np.full((8, 8, 3), -0.5)}, "from -0.5"), ({"controlnet": torch.nn.Identity()}, "found Identity"),
    ({"image": "no such.png"}, "no such.png"), ({"diffusion": torch.nn.Identity()}, "not Identity"),
])
def test_bad_arguments_get_one_line(models, load, edges, change, message):
    settings = {"diffusion": models["diffusion"], "controlnet": load(edges), "image": picture((8, 8)), "scale": 1.0}
    settings |= change
    control = [tuple(settings.pop(name) for name in ("controlnet", "image", "scale"))]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Controlled(**{"controls": control} | settings)


def test_images_for_other_pictures_are_refused(models, load, edges):
    controlled = Controlled(models["diffusion"], [(load(edges), [picture((8, 8))] * 2, 1.0)])
    with pytest.raises(ValueError, match="2 control images for 3 pictures"):
        controlled(torch.zeros(3, 4, 8, 8), torch.zeros(6, 9, 32), torch.zeros(1, 32))


def test_every_kind_of_image_means_the_same(models, load, edges, tmp_path):
    control = picture((72, 64))
    control.save(tmp_path / "control.png")
    inputs, controlnet = (torch.ones(1, 4, 8, 9), torch.ones(2, 9, 32), torch.ones(1, 32)), load(edges)
    expected, *others = [Controlled(models["diffusion"], [(controlnet, image, 1.0)])(*inputs) for image in (
        control, np.asarray(control), tmp_path / "control.png", str(tmp_path / "control.png"), [control],
        np.asarray(control) / 255, torch.from_numpy(np.asarray(control) / 255).permute(2, 0, 1))]
    for other in others:
        torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)


def test_two_threads_draw_with_one_object(models, load, edges):
    controlled = Controlled(models["diffusion"], [(load(edges), picture((72, 64)), 1.0)], 0.2, 0.7)
    sizes, together = [(4, 6, 3), (5, 3, 7)], {}

    def draw(height, width, steps):
        run = controlled.for_run(SimpleNamespace(timesteps=range(steps)))
        x, context = torch.ones(1, 4, height, width), torch.ones(2, 9, 32)
        for _ in range(steps):
            x = run(x, context, torch.ones(1, 32))[1:].tanh()
        return x

    threads = [threading.Thread(target=lambda size=size: together.update({size: draw(*size)})) for size in sizes]
    alone = {size: draw(*size) for size in sizes}
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[size], together[size]) for size in sizes)


def test_packed_networks_and_half_precision_stay_close(models, load, edges):
    inputs, control = (torch.ones(1, 4, 8, 8), torch.ones(2, 9, 32), torch.ones(1, 32)), picture((72, 64))
    expected = Controlled(models["diffusion"], [(load(edges), control, 1.0)])(*inputs)
    fast = Controlled(packed.pack(copy.deepcopy(models["diffusion"])), [(packed.pack(load(edges)), control, 1.0)])
    torch.testing.assert_close(fast(*inputs), expected, atol=1e-5, rtol=0)
    half = Controlled(models["diffusion"], [(load(edges).to(torch.bfloat16), control, 1.0)])(*inputs)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - expected).abs().max() < 0.1


def test_canny_is_opencvs(tmp_path, monkeypatch):
    pixels = np.asarray(picture((60, 40)))
    edges = canny(Image.fromarray(pixels), 20, 60)
    assert edges.shape == (40, 60, 3) and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    for channel in range(3):
        assert np.array_equal(edges[:, :, channel], cv2.Canny(pixels, 20, 60))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        canny(pixels)
