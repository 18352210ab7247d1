"""LoRAs that we train, against peft's on diffusers' and transformers' networks, which also read the files."""

import copy
import json
import re

import numpy as np
import peft
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training_pictures import folder, loaded, make_lesson, runs, teach  # noqa: F401  (fixtures)

import oracle
from diffusion import get_time_embedding
from extensions.lora import add_lora
from extensions.lora import lora as lora_for_a_while
from images import open_image, to_tensor
from pipeline import generate
from training import loop, lora, teaching

LINEAR = r"attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out"
CONVOLUTION = r"conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv"
TEXT = r"(q|k|v|out)_proj|fc1|fc2"


@pytest.fixture
def oracles(weights):
    return copy.deepcopy({"diffusion": oracle.unet_oracle(weights), "clip": oracle.clip_oracle(weights)})


def add_peft(oracles, rank, alpha, conv_rank):
    """Has PEFT add LoRAs of the same ranks; returns {kohya's name: (down, up)} of its parameters."""
    oracles["diffusion"].requires_grad_(False).add_adapter(peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=rf".*\b({LINEAR}|{CONVOLUTION})",
        rank_pattern={CONVOLUTION: conv_rank}, alpha_pattern={CONVOLUTION: alpha * conv_rank / rank}))
    oracles["clip"].requires_grad_(False).add_adapter(
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf".*\b({TEXT})"))
    found = {}
    for network, prefix in (("diffusion", "lora_unet_"), ("clip", "lora_te_text_model_")):
        for path, module in oracles[network].named_modules():
            if hasattr(module, "lora_A"):
                path = path.removeprefix("text_model.").replace(".", "_")
                found[prefix + path] = module.lora_A["default"].weight, module.lora_B["default"].weight
    return found


@pytest.mark.parametrize("networks", [["diffusion"], ["diffusion", "clip"]])
def test_gradients_equal_pefts(folder, checkpoint, oracles, networks):  # noqa: F811
    """Of one step, for all linear and convolution layers, with the same weights, pictures, timesteps and noise."""
    lesson = make_lesson(folder, checkpoint)
    stage = lora.LoraStage(lesson, networks, rank=4, alpha=2.0, conv_rank=2, prompts=["a cat"])
    theirs = add_peft(oracles, rank=4, alpha=2.0, conv_rank=2)
    ours = {name: (change.down, change.up) for changes in stage.modules.values() for name, change in changes.items()}
    assert ours.keys() == {name for name in theirs if "clip" in networks or name.startswith("lora_unet")}
    generator = torch.Generator().manual_seed(0)
    for name, pair in theirs.items():
        for k, half in enumerate(pair):
            half.copy_(torch.randn(half.shape, generator=generator) / half[0].numel() ** 0.5)
            if name not in ours:
                half.zero_()
                continue
            ours[name][k].copy_(half.view_as(ours[name][k]))

    with torch.enable_grad():
        loss = stage.loss(0, 3, torch.Generator().manual_seed(7))
        loss.backward()

        generator = torch.Generator().manual_seed(7)
        rows = torch.randint(3, (3,), generator=generator).tolist()
        timesteps = torch.randint(0, 1000, (3,), generator=generator)
        latents = torch.cat([oracle.vae_oracle(load_file(checkpoint)).encode(pixels(lesson, row)).latent_dist.mean
                             for row in rows]).detach() * 0.18215
        noise = torch.randn(latents.shape, generator=generator)
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        ids = lesson.tokenizer([lesson.examples[row].caption for row in rows], padding="max_length", max_length=77,
                               return_tensors="pt").input_ids
        context = oracles["clip"](ids.masked_fill(ids == lesson.tokenizer.pad_token_id, 49407)).last_hidden_state
        predicted = oracles["diffusion"](scheduler.add_noise(latents, noise, timesteps), timesteps, context).sample
        expected = torch.nn.functional.mse_loss(predicted, noise)
        expected.backward()

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    largest = 0
    for name, halves in ours.items():
        for half, other in zip(halves, theirs[name]):
            torch.testing.assert_close(half.grad, other.grad.view_as(half), atol=1e-5, rtol=1e-4, msg=name)
            largest = max(largest, half.grad.abs().max())
    assert largest > 0.1


def pixels(lesson, row):
    return to_tensor(open_image(lesson.examples[row].picture), 64, 64)


def test_a_new_lora_changes_nothing_and_a_trained_one_what_it_adds(folder, checkpoint):  # noqa: F811
    lesson = make_lesson(folder, checkpoint)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), get_time_embedding(torch.tensor([3, 700]), 32)
    before = lesson.unet(*inputs)
    changes = lora.add_low_rank("diffusion", lesson.unet, rank=2, alpha=1, conv_rank=2)
    assert torch.equal(lesson.unet(*inputs), before)
    torch.nn.init.ones_(changes["lora_unet_mid_block_attentions_0_proj_in"].up)
    assert not torch.equal(lesson.unet(*inputs), before)


def test_training_lowers_the_loss_and_the_model_is_as_it_was(folder, checkpoint, tmp_path):  # noqa: F811
    lesson = make_lesson(folder, checkpoint)
    before = {name: weight.clone() for name, weight in lesson.unet.state_dict().items()}
    stage = lora.LoraStage(lesson, ["diffusion"], rank=4, alpha=4, conv_rank=0, prompts=["a cat"])
    stage.report = lambda: ("", None)

    def mean_loss():
        return sum(stage.loss(0, 2, torch.Generator().manual_seed(-k)).item() for k in range(1, 5)) / 4

    untrained = mean_loss()
    loop.train("lora", stage, loop.Settings(steps=12, batch=2, learning_rate=2e-2, ema=0.9, warmup=1), tmp_path)
    assert mean_loss() < 0.9 * untrained
    after = lesson.unet.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_file_is_read_by_add_lora_and_by_diffusers_alike(teach, models, oracles):  # noqa: F811
    path = teach(lora, "--networks", "unet", "text", "--rank", "4", "--alpha", "2", "--conv-rank", "2",
                 "--learning-rate", "0.03")
    own = copy.deepcopy({"clip": models["clip"], "diffusion": models["diffusion"]})
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=oracles["clip"], tokenizer=None, unet=oracles["diffusion"],
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.load_lora_weights(path)
    tokens, latents = torch.tensor([[49406, 320, 1125, 49407]]), torch.randn(1, 4, 8, 8)
    plain = own["clip"](tokens)
    add_lora(own, path)
    context = own["clip"](tokens)
    assert (context - plain).abs().max() > 1e-3
    torch.testing.assert_close(context, oracles["clip"](tokens).last_hidden_state, atol=1e-5, rtol=0)
    eps = own["diffusion"](latents, context, get_time_embedding(500, 32))
    torch.testing.assert_close(eps, oracles["diffusion"](latents, 500, context).sample, atol=1e-5, rtol=0)
    assert (eps - models["diffusion"](latents, context, get_time_embedding(500, 32))).abs().max() > 1e-3


def test_the_file_holds_what_was_trained_with_kohyas_names_and_metadata(teach, folder, checkpoint):  # noqa: F811
    path = teach(lora, "--rank", "4", "--alpha", "2", "--conv-rank", "2", "--learning-rate", "0.01")
    weights, metadata = load_file(path), safe_open(path, "pt").metadata()
    assert all(re.fullmatch(r"lora_unet_\w+\.(alpha|lora_(down|up)\.weight)", name) for name in weights)
    proj, conv = "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_mid_block_resnets_0_conv1"
    assert weights[f"{proj}.lora_down.weight"].shape == (4, 32, 1, 1)
    assert weights[f"{conv}.lora_down.weight"].shape == (2, 64, 3, 3) and weights[f"{conv}.alpha"] == 1
    assert {weight.dtype for name, weight in weights.items() if "alpha" not in name} == {torch.float16}
    expected = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_network_alpha": "2.0",
                "ss_output_name": "mine", "ss_network_module": "networks.lora", "ss_max_train_steps": "4"}
    assert metadata.items() >= expected.items()
    assert json.loads(metadata["ss_tag_frequency"]) == {"pictures": {"a cat": 1, "a dog": 1, "a owl": 1}}


def test_a_picture_during_training_is_that_of_the_finished_file(folder, checkpoint, models, monkeypatch):  # noqa: F811
    monkeypatch.setattr(teaching, "generate", lambda *inputs, **settings: generate(
        *inputs, **settings | {"n_inference_steps": 2}))
    lesson = make_lesson(folder, checkpoint)
    stage = lora.LoraStage(lesson, ["diffusion"], rank=4, alpha=4, conv_rank=2, prompts=["a cat", "a dog"])
    for change in stage.modules["diffusion"].values():
        change.up.normal_(std=0.05)
        change.up.copy_(change.up.half())
        change.down.copy_(change.down.half())
    prompts, sheet = stage.report()
    assert prompts == "a cat; a dog" and sheet.size == (128, 64)
    lesson.models["diffusion"] = copy.deepcopy(models["diffusion"])
    save_file(lora.to_kohya(stage.modules), folder / "x.safetensors")
    with lora_for_a_while(lesson.models, folder / "x.safetensors"):
        images = lesson.draw(["a cat", "a dog"])
    assert np.abs(np.asarray(sheet).astype(int) - np.asarray(loop.sheet(images, 2))).max() <= 1
    assert np.abs(images.astype(int) - lesson.draw(["a cat", "a dog"])).max() > 20  # without it
