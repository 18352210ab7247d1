import math
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import images
import model_loader
import oracle
import pipeline
from clip import CLIP
from diffusion import Diffusion
from oracle import picture
from pipeline import denoise, encode_prompts, generate, get_time_embedding
from samplers import SAMPLERS


@pytest.fixture(scope="session")
def diffusers_parts(weights, tokenizer):
    return dict(vae=oracle.vae_oracle(weights), text_encoder=oracle.clip_oracle(weights), tokenizer=tokenizer,
                unet=oracle.unet_oracle(weights), safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)


SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
SCHEDULERS = {"ddim": DDIMScheduler(**SCHEDULE, set_alpha_to_one=False), "ddpm": DDPMScheduler(**SCHEDULE)}


# ---- the same function as diffusers' pipelines


@pytest.mark.parametrize("sampler_name", ["ddim", "ddpm"])
@pytest.mark.parametrize("height, width", [(64, 64), (40, 72)])
def test_text_to_image_equals_diffusers(draw, diffusers_parts, sampler_name, height, width):
    pipe = StableDiffusionPipeline(scheduler=SCHEDULERS[sampler_name], **diffusers_parts)
    pipe.set_progress_bar_config(disable=True)
    prompts, negative = ["a cat", "two dogs on a red boat"], ["blurry", ""]
    expected = pipe(prompts, negative_prompt=negative, height=height, width=width, num_inference_steps=5,
                    guidance_scale=4.0, output_type="np",
                    generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)]).images
    images = draw(prompts, uncond_prompt=negative, height=height, width=width, n_inference_steps=5, cfg_scale=4.0,
                  sampler_name=sampler_name)
    assert images.shape == (2, height, width, 3) and images.dtype == np.uint8 and images.std() > 20
    assert np.abs(images / 255 - expected).max() <= 0.51 / 255  # half a grey level is what rounding costs


@pytest.mark.parametrize("zero_snr, rescale", [(False, 0.0), (False, 0.7), (True, 0.7)])
def test_v_prediction_equals_diffusers(models, tokenizer, diffusers_parts, zero_snr, rescale):
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type="v_prediction",
                              rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing" if zero_snr else "leading")
    pipe = StableDiffusionPipeline(scheduler=scheduler, **diffusers_parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a cat", height=64, width=64, num_inference_steps=5, guidance_scale=4.0, guidance_rescale=rescale,
                    output_type="np", generator=torch.Generator().manual_seed(7)).images[0]
    unet = Diffusion(replace(models["diffusion"].config, prediction="v", zero_terminal_snr=zero_snr,
                             guidance_rescale=rescale))
    unet.load_state_dict(models["diffusion"].state_dict())
    image = generate("a cat", models={**models, "diffusion": unet}, tokenizer=tokenizer, n_inference_steps=5,
                     cfg_scale=4.0, sampler_name="ddim", seed=7)
    assert np.abs(image / 255 - expected).max() <= (0.51 if not zero_snr else 1.01) / 255


def test_a_checkpoint_has_its_own_guidance_scale(draw, models, tokenizer):
    unet = Diffusion(replace(models["diffusion"].config, cfg_scale=3.0))
    unet.load_state_dict(models["diffusion"].state_dict())
    image = generate("a cat", models={**models, "diffusion": unet}, tokenizer=tokenizer, n_inference_steps=2, seed=7,
                     sampler_name="ddim")
    assert np.array_equal(image, draw(cfg_scale=3.0)) and np.array_equal(draw(), draw(cfg_scale=7.5))


@pytest.mark.parametrize("prompt, syntax", [("a (red:1.3) apple", "("), ("[cat:dog:0.5]", "["), ("a BREAK b", "BREAK"),
                                            ("a <lora:x:1>", "<lora:x:1>")])
def test_syntax_that_is_taken_to_the_letter_is_told(draw, prompt, syntax):
    with pytest.warns(UserWarning, match=f"the prompt holds {re.escape(repr(syntax))}.*emphasis.py") as caught:
        draw(prompt, n_inference_steps=1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw("a cat, sitting: on a > b", n_inference_steps=1)


def test_four_threads_draw_what_one_draws(models, tokenizer):
    def draw_alone(seed):
        return generate(f"cat {seed}", models=models, tokenizer=tokenizer, seed=seed, n_inference_steps=1,
                        sampler_name="ddim", progress=False)

    expected = [draw_alone(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(draw_alone, range(40)))
    assert all(np.array_equal(image, as_alone) for image, as_alone in zip(drawn, expected))


def test_words_that_a_checkpoint_does_not_know_are_named(draw, models, tokenizer):
    clip = CLIP(replace(models["clip"].config, words=("a", "cat", "red")))
    clip.load_state_dict(models["clip"].state_dict())
    known = {**models, "clip": clip}
    with pytest.warns(UserWarning, match="does not know: futuristic, mars; it draws 'a red cat'") as caught:
        image = generate("a futuristic red Cat, Mars", models=known, tokenizer=tokenizer, seed=7, n_inference_steps=1)
    assert caught[0].filename == __file__ and image.shape == (64, 64, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate("A red cat.", models=known, tokenizer=tokenizer, seed=7, n_inference_steps=1)
        draw("a futuristic cat")


def test_without_guidance_equals_diffusers(draw, diffusers_parts):
    pipe = StableDiffusionPipeline(scheduler=SCHEDULERS["ddim"], **diffusers_parts)
    expected = pipe("a cat", height=64, width=64, num_inference_steps=3, guidance_scale=1.0, output_type="np",
                    generator=torch.Generator().manual_seed(7)).images[0]
    assert np.abs(draw(n_inference_steps=3, do_cfg=False) / 255 - expected).max() <= 0.51 / 255


@pytest.mark.parametrize("sampler_name", ["ddim", "ddpm"])
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_diffusers(draw, diffusers_parts, sampler_name, strength):
    pipe = StableDiffusionImg2ImgPipeline(scheduler=SCHEDULERS[sampler_name], **diffusers_parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a cat", image=picture(), strength=strength, num_inference_steps=10, guidance_scale=3.0,
                    output_type="np", generator=torch.Generator().manual_seed(7)).images[0]
    image = draw(input_image=picture(), strength=strength, n_inference_steps=10, cfg_scale=3.0,
                 sampler_name=sampler_name)
    assert np.abs(image / 255 - expected).max() <= 0.51 / 255


def test_time_embedding_closed_form():
    embedding = get_time_embedding(torch.tensor([0, 981]), 320)
    assert embedding.shape == (2, 320) and get_time_embedding(5).shape == (1, 320)
    for i in (0, 1, 80, 159):
        angle = 981 * 10000 ** (-i / 160)
        assert embedding[1, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[1, 160 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)
    assert torch.equal(embedding[0], torch.cat([torch.ones(160), torch.zeros(160)]))


# ---- seeds


@pytest.mark.parametrize("settings", [dict(sampler_name="ddpm"), dict(input_image=picture(), sampler_name="euler_a")])
def test_a_row_of_a_batch_is_its_seed_alone(draw, settings):
    batch = draw(["a cat", "a dog", "a cat"], seed=7, **settings)
    alone = draw("a dog", seed=8, **settings)
    assert np.abs(batch[1].astype(int) - alone).max() <= 1
    assert np.abs(batch[0].astype(int) - batch[2]).max() > 10


def test_the_same_seed_draws_the_same_picture(draw):
    assert np.array_equal(draw(seed=3), draw(seed=3))
    assert not np.array_equal(draw(seed=3), draw(seed=4))
    assert not np.array_equal(draw(seed=None), draw(seed=None))


def test_numpy_numbers_are_numbers(draw):
    given = dict(seed=np.int64(7), n_inference_steps=np.int32(2), height=np.int64(64), strength=np.float32(0.5))
    assert np.array_equal(draw(**given), draw())


def test_a_configured_sampler_is_used(draw):
    sampler = SAMPLERS["ddim"](None, eta=1.0, timestep_spacing="trailing")
    seen = []
    image = draw(sampler=sampler, n_inference_steps=4, callback=lambda step, timestep, latents: seen.append(timestep))
    assert seen == [999, 749, 499, 249]
    assert np.array_equal(image, draw(sampler=sampler, n_inference_steps=4))
    assert not np.array_equal(image, draw(sampler=sampler, n_inference_steps=4, seed=8))


# ---- input images


def test_the_input_image_is_resized(draw):
    assert draw(input_image=picture((50, 90)), strength=0.5, height=40, width=24).shape == (40, 24, 3)


# ---- what the caller sees


def test_the_defaults_are_those_of_the_original(models, tokenizer):
    """As the README says them: of stable-diffusion's scripts, 50 steps, a guidance of 7.5 and a strength of 0.8."""
    seen = []

    def callback(step, timestep, latents):
        seen.append(timestep)

    given = {"models": models, "tokenizer": tokenizer, "seed": 7, "input_image": picture()}
    image = generate("a cat", **given, callback=callback)
    assert (len(seen), seen[0], seen[-1]) == (40, 781, 1)  # 0.8 of 50 steps: diffusers' timesteps of DDPM, from 1
    expected = generate("a cat", "", strength=0.8, do_cfg=True, cfg_scale=7.5, sampler_name="ddpm",
                        n_inference_steps=50, height=64, width=64, progress=False, **given)
    assert np.array_equal(image, expected)


def test_default_size_is_the_checkpoints(draw):
    assert draw(n_inference_steps=1).shape == (64, 64, 3)
    assert draw(["a", "b"], n_inference_steps=1, width=24).shape == (2, 64, 24, 3)


def test_callback_sees_each_step(draw):
    seen = []
    draw(n_inference_steps=3, callback=lambda step, timestep, latents: seen.append((step, timestep, latents.shape)))
    assert seen == [(0, 667, (1, 4, 8, 8)), (1, 334, (1, 4, 8, 8)), (2, 1, (1, 4, 8, 8))]


def test_long_prompts_warn_of_what_is_dropped(draw):
    with pytest.warns(UserWarning, match="takes 77.*'xylophone zebra'"):
        long = draw("cat " * 75 + "xylophone zebra", n_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(draw("cat " * 75, n_inference_steps=1), long)


def test_tokens_are_padded_with_the_end_token(tokenizer):
    tokens = pipeline.tokenize(["a cat", ""], tokenizer)
    assert tokens.tolist() == [[49406, 320, 2368] + [49407] * 74, [49406] + [49407] * 76]


def test_idle_device_is_where_networks_end(models, tokenizer):
    moved = []
    spies = {name: Spy(model, name, moved) for name, model in models.items()}
    generate("a cat", models=spies, tokenizer=tokenizer, input_image=picture(), n_inference_steps=1, strength=1.0,
             sampler_name="ddim", device="cpu", idle_device="meta")
    assert moved == [("clip", "cpu"), ("clip", "meta"), ("encoder", "cpu"), ("encoder", "meta"), ("diffusion", "cpu"),
                     ("diffusion", "meta"), ("decoder", "cpu"), ("decoder", "meta")]


class Spy:
    """A network that notes where it is sent, and stays where it is."""

    def __init__(self, network, name, moved):
        self.network, self.name, self.moved = network, name, moved
        self.config, self.parameters = network.config, network.parameters

    def to(self, device):
        self.moved.append((self.name, str(device)))
        return self

    def __call__(self, *inputs):
        return self.network(*inputs)


# ---- seams


def test_a_context_stands_for_prompts(draw, models, tokenizer):
    context = encode_prompts(["a cat"], ["blurry"], models["clip"], tokenizer)
    assert context.shape == (2, 77, 32)
    expected = draw("a cat", uncond_prompt="blurry")
    assert np.array_equal(draw(None, context=context), expected)
    assert np.array_equal(draw("something else", context=context), expected)
    unguided = encode_prompts(["a cat"], [], models["clip"], tokenizer)
    assert np.array_equal(draw(None, context=unguided, do_cfg=False), draw("a cat", do_cfg=False))
    two = encode_prompts(["a cat", "a dog"], ["", ""], models["clip"], tokenizer)
    assert np.array_equal(draw(None, context=two), draw(["a cat", "a dog"]))
    assert draw(None, context=torch.cat([context, context], dim=1)).shape == (64, 64, 3)  # 154 tokens


def test_a_context_may_change_from_step_to_step(draw, models, tokenizer, diffusers_parts):
    """Against a loop over diffusers' UNet."""
    cat, dog = (encode_prompts([name], [""], models["clip"], tokenizer) for name in ("a cat", "a dog"))
    seen = []

    def context(step, n_steps):
        seen.append((step, n_steps))
        return cat if step < 2 else dog

    scheduler, unet = SCHEDULERS["ddim"], diffusers_parts["unet"]
    scheduler.set_timesteps(4)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    for step, timestep in enumerate(scheduler.timesteps):
        cond, uncond = unet(torch.cat([latents] * 2), timestep, cat if step < 2 else dog).sample.chunk(2)
        latents = scheduler.step(uncond + 7.5 * (cond - uncond), timestep, latents).prev_sample
    expected = images.to_uint8(diffusers_parts["vae"].decode(latents / 0.18215).sample)[0]
    result = draw("", context=context, n_inference_steps=4)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert abs(result.astype(int) - expected.astype(int)).max() <= 1
    assert draw(None, context=context, n_inference_steps=4).shape == (64, 64, 3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_latents_stand_for_a_picture(draw, models, strength):
    settings = dict(strength=strength, n_inference_steps=10, sampler_name="ddim")
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn((1, 4, 8, 8), generator=generator)
    encoded = models["encoder"](images.to_tensor(picture(), 64, 64), noise)
    sampler = SAMPLERS["ddim"](generator)
    sampler.set_inference_timesteps(10)
    sampler.set_strength(strength)
    latents = sampler.add_noise(encoded, sampler.timesteps[0])
    assert np.array_equal(draw(latents=latents, **settings), draw(input_image=picture(), **settings))


def test_noise_as_latents_is_text_to_image(draw):
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    assert np.array_equal(draw(latents=noise, strength=1.0), draw())


def test_a_callback_may_return_latents(draw, models):
    given = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    image = draw(callback=lambda step, timestep, latents: given if step == 1 else None)
    assert np.array_equal(image, images.to_uint8(models["decoder"](given))[0])


def test_a_callback_can_know_how_many_calls_there_will_be(draw):
    sampler, seen = SAMPLERS["heun"](), []
    draw(sampler=sampler, n_inference_steps=3, callback=lambda step, *_: seen.append((step, len(sampler.timesteps))))
    assert seen == [(step, 5) for step in range(5)]


def test_denoise_is_the_loop_of_generate(draw, models, tokenizer):
    context = encode_prompts(["a cat"], [""], models["clip"], tokenizer)
    sampler = SAMPLERS["ddim"]()
    sampler.set_inference_timesteps(3)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    clean = denoise(models["diffusion"], sampler, latents, context, 4.0)
    assert np.array_equal(images.to_uint8(models["decoder"](clean))[0], draw(n_inference_steps=3, cfg_scale=4.0))
    unguided = denoise(models["diffusion"], sampler, latents, context[:1])
    assert np.array_equal(images.to_uint8(models["decoder"](unguided))[0], draw(n_inference_steps=3, do_cfg=False))
    with pytest.raises(ValueError, match="context has 3 rows for 1 pictures; give 1, or with guidance 2"):
        denoise(models["diffusion"], sampler, latents, context[[0, 0, 0]])


class Counted(torch.nn.Module):
    """A UNet in a wrapper that counts the runs, and the calls of each."""

    def __init__(self, diffusion, runs):
        super().__init__()
        self.diffusion, self.config, self.runs, self.calls = diffusion, diffusion.config, runs, []

    def for_run(self, sampler):
        run = Counted(self.diffusion, self.runs)
        self.runs.append((sampler.timesteps, run.calls))
        return run

    def forward(self, latents, context, time_embedding):
        self.calls.append(len(context))
        return self.diffusion(latents, context, time_embedding)


def test_a_wrapper_sees_one_run_a_call(draw, models, tokenizer):
    counted = Counted(models["diffusion"], [])

    def draw_counted(seed):
        return generate("a cat", models={**models, "diffusion": counted}, tokenizer=tokenizer, seed=seed,
                        n_inference_steps=3, sampler_name="ddim", progress=False)

    expected = [draw(seed=seed, n_inference_steps=3) for seed in range(2)]
    drawn = {}
    threads = [threading.Thread(target=lambda seed=seed: drawn.update({seed: draw_counted(seed)})) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(drawn[seed], expected[seed]) for seed in range(2))
    assert counted.runs == [([667, 334, 1], [2, 2, 2])] * 2 and counted.calls == []


def test_unguided_steps_are_half_the_work(models, tokenizer):
    counted = Counted(models["diffusion"], [])
    generate("a cat", models={**models, "diffusion": counted}, tokenizer=tokenizer, seed=1, n_inference_steps=3,
             sampler_name="ddim", cfg_scale=lambda sigma: 5.0 if sigma < 2 else 1)
    assert counted.runs[0][1] == [1, 2, 2]


def test_networks_are_put_away_when_a_picture_is_cancelled(models, tokenizer):
    moved = []
    spies = {name: Spy(model, name, moved) for name, model in models.items()}

    def cancel(step, timestep, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate("a cat", models=spies, tokenizer=tokenizer, device="cpu", idle_device="meta", callback=cancel)
    assert moved[-1] == ("diffusion", "meta")


def test_a_samplers_own_generator_is_used(draw):
    def seeded():
        return SAMPLERS["euler_a"](torch.Generator().manual_seed(5))

    def image(sampler):
        return draw(sampler=sampler, seed=None)

    assert np.array_equal(image(seeded()), image(seeded()))
    assert np.array_equal(image(seeded()), draw(sampler_name="euler_a", seed=5))
    assert np.array_equal(draw(sampler=seeded(), seed=7), draw(sampler_name="euler_a", seed=7))


def test_a_bar_that_cannot_be_written_costs_no_picture(draw, monkeypatch):
    class Gone:
        def write(self, *text):
            raise OSError("the other end is no more")

        flush = write

    expected = draw()
    for stream in (None, Gone()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert np.array_equal(draw(), expected)


def test_another_default_device_changes_nothing(draw):
    expected = draw(input_image=picture(), strength=1.0, sampler_name="dpmpp_2m")
    torch.set_default_device("meta")
    try:
        assert np.array_equal(draw(input_image=picture(), strength=1.0, sampler_name="dpmpp_2m"), expected)
    finally:
        torch.set_default_device(None)


# ---- mistakes


@pytest.mark.parametrize("settings, message", [
    (dict(prompt=[]), r"prompt is an empty list"),
    (dict(prompt=["a", 3]), r"prompt is \['a', 3\]"),
    (dict(prompt=["a", "b"], uncond_prompt=["c"]), r"2 prompts but 1 uncond_prompts"),
    (dict(strength=0), r"strength is 0; .*\(0, 1\]"),
    (dict(strength=1.5), r"strength is 1.5"),
    (dict(strength="much"), r"strength is 'much'"),
    (dict(cfg_scale=math.nan), r"cfg_scale is nan"),
    (dict(cfg_scale=math.inf), r"cfg_scale is inf"),
    (dict(sampler="ddim"), r"sampler is 'ddim'; .*sampler_name"),
    (dict(sampler_name=[]), r"sampler_name is \[\]; known are"),
    (dict(prompt=None), r"prompt is None; give a text"),
    (dict(prompt=5), r"prompt is 5; give a text"),
    (dict(prompt="\ud800"), r"half a letter"),
    (dict(idle_device="attic"), r"device is 'attic'"),
    (dict(latents=torch.zeros(4, 8, 8)), r"latents is .*give a tensor"),
    (dict(latents=torch.zeros(1, 4, 8, 8), height=128),
     r"height and width are 128 and None, the latents are for 64 and 64"),
    (dict(latents=torch.zeros(1, 4, 8, 8), input_image=picture()), r"latents and input_image are given"),
    (dict(latents=torch.zeros(2, 4, 8, 8)), r"1 prompts for 2 latents"),
    (dict(sampler_name="magic"), r"sampler_name is 'magic'; known are ddpm, ddim, plms"),
    (dict(n_inference_steps=0), r"n_inference_steps is 0: .*1 to 1000"),
    (dict(n_inference_steps=1001), r"n_inference_steps is 1001"),
    (dict(n_inference_steps=2.5), r"n_inference_steps is 2.5"),
    (dict(seed=-1), r"seed is -1"),
    (dict(n_inference_steps=True), r"n_inference_steps is True"),
    (dict(device="abacus"), r"device is 'abacus'; give cpu, cuda or mps"),
    (dict(height=65), r"height is 65; .*multiple of 8"),
    (dict(width=0), r"width is 0"),
    (dict(input_image=np.zeros((3, 8, 9), np.uint8)), r"shape \(3, 8, 9\); allowed"),
    (dict(input_image=np.full((8, 8), 7.0)), r"floats must lie in \[0, 1\]"),
    (dict(input_image=np.zeros((8, 8), np.int64)), r"dtype int64; allowed"),
    (dict(input_image=picture(), strength=0.1, n_inference_steps=5), r"strength 0.1"),
])
def test_bad_arguments_get_one_line(draw, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip", "encoder", "diffusion", "decoder"])
def test_a_missing_model_is_named(models, tokenizer, name):
    some = {key: model for key, model in models.items() if key != name}
    with pytest.raises(ValueError, match=f"models has no '{name}'.*preload_models_from_standard_weights"):
        generate("a cat", models=some, tokenizer=tokenizer, input_image=picture())


def test_a_foreign_tokenizer_is_refused(models):
    from transformers import CLIPTokenizer
    two_tokens = CLIPTokenizer()
    with pytest.raises(ValueError, match="load_tokenizer"):
        generate("a cat", models=models, tokenizer=two_tokens)


@pytest.mark.parametrize("network, message", [("diffusion", r"after step 0 .*float32"),
                                              ("decoder", r"decoder .*float32")])
def test_non_finite_values_raise(models, tokenizer, network, message):
    broken = oracle.randomize(type(models[network])(models[network].config))
    broken.conv_out.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=message):
        generate("a cat", models={**models, network: broken}, tokenizer=tokenizer, n_inference_steps=3)


def test_an_inpainting_unet_is_refused(models, tokenizer):
    unet = type(models["diffusion"])(replace(oracle.TINY["diffusion"], in_channels=9))
    with pytest.raises(ValueError, match="takes 9 channels"):
        generate("a cat", models={**models, "diffusion": unet}, tokenizer=tokenizer)


# ---- fewer and cheaper steps


@pytest.mark.parametrize("interval", [(0, 100), (50, 60), (0.5, 3.0)])
def test_guidance_interval_is_guidance_in_some_steps(draw, diffusers_parts, tokenizer, interval):
    """Against a loop over diffusers' UNet and scheduler."""
    scheduler, unet = SCHEDULERS["ddim"], diffusers_parts["unet"]
    scheduler.set_timesteps(10)
    encode = lambda text: diffusers_parts["text_encoder"](pipeline.tokenize([text], tokenizer)).last_hidden_state
    cond, uncond = encode("a cat"), encode("")
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps:
        eps = unet(latents, timestep, cond).sample
        alpha_bar = scheduler.alphas_cumprod[timestep]
        if interval[0] <= ((1 - alpha_bar) / alpha_bar) ** 0.5 <= interval[1]:
            without = unet(latents, timestep, uncond).sample
            eps = without + 5.0 * (eps - without)
        latents = scheduler.step(eps, timestep, latents).prev_sample
    expected = images.to_uint8(diffusers_parts["vae"].decode(latents / 0.18215).sample)[0]
    result = draw(cfg_scale=lambda sigma: 5.0 if interval[0] <= sigma <= interval[1] else 1, n_inference_steps=10)
    assert abs(result.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_draws_what_the_cpu_draws(checkpoint, tokenizer, compile):
    settings = dict(tokenizer=tokenizer, seed=1, n_inference_steps=3, sampler_name="euler_a")
    load = model_loader.preload_models_from_standard_weights
    on_cpu = generate("a cat", models=load(checkpoint, "cpu", "float32"), **settings)
    models = load(checkpoint, "cuda", "float32", compile=compile)
    for _ in range(2):  # a CUDA graph is recorded first, then replayed
        on_cuda = generate("a cat", models=models, **settings)
        assert np.abs(on_cuda.astype(int) - on_cpu).max() <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_cuda_is_not_waited_for_between_steps(checkpoint, tokenizer, sampler_name):
    def watch(step, timestep, latents):  # the first step may still set things up
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")

    models = model_loader.preload_models_from_standard_weights(checkpoint, "cuda", "float16")
    try:
        generate("a cat", models=models, tokenizer=tokenizer, seed=1, n_inference_steps=5, sampler_name=sampler_name,
                 callback=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
