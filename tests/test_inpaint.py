from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionInpaintPipeline
from PIL import Image

import oracle
from extensions.deep_cache import DeepCache
from extensions.inpaint import Inpainting, feather, fill_from_around, find_box, inpaint, open_mask, outpaint
from images import to_tensor
from model_converter import read_networks
from model_loader import load_tokenizer
from samplers import SAMPLERS, DDIMSampler

SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULERS = {
    "ddim": DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "ddpm": DDPMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1),
    "euler": EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
}


def picture(size=(64, 64), seed=0):
    """A smooth coloured RGB picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def rectangle(size=(64, 64), box=(16, 8, 45, 51)):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


@pytest.fixture(scope="module")
def kinds(checkpoint, weights, tmp_path_factory):
    """By the UNet's channels: our networks, and the parts of diffusers' pipeline."""
    configs = oracle.TINY | {"diffusion": replace(oracle.TINY["diffusion"], in_channels=9)}
    nine = tmp_path_factory.mktemp("nine") / "nine.safetensors"
    found = {}
    for channels, path, named in [(4, checkpoint, weights), (9, nine, oracle.write_checkpoint(nine, configs))]:
        parts = dict(vae=oracle.vae_oracle(named), text_encoder=oracle.clip_oracle(named), tokenizer=load_tokenizer(),
                     unet=oracle.unet_oracle(named, replace(configs["diffusion"], in_channels=channels)),
                     safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        networks = {name: network.eval() for name, network in read_networks(path, dtype=torch.float32).items()}
        found[channels] = networks, parts
    return found


def paint(kinds, channels=4, image=None, mask=None, prompt="a cat", **settings):
    settings = dict(n_inference_steps=2, sampler_name="ddim", seed=7, progress=False, cfg_scale=4.0) | settings
    image, mask = image or picture(), rectangle() if mask is None else mask
    return inpaint(prompt, image, mask, models=kinds[channels][0], **settings)


def expect(kinds, channels, sampler_name, image, mask, **settings):
    """The picture by diffusers, before anything is put back, as floats."""
    pipe = StableDiffusionInpaintPipeline(scheduler=SCHEDULERS[sampler_name], **kinds[channels][1])
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", image=image, mask_image=mask, guidance_scale=4.0, output_type="np",
                generator=torch.Generator().manual_seed(7), **settings).images[0]


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("sampler_name, strength", [("ddim", 1.0), ("ddpm", 1.0), ("ddpm", 0.6), ("euler", 0.6)])
def test_the_masked_part_equals_diffusers_and_the_rest_the_picture(kinds, channels, sampler_name, strength):
    for size in [(64, 64), (40, 72)]:
        image, mask = picture(size), rectangle(size, (13, 8, size[0] - 9, 51))
        expected = expect(kinds, channels, sampler_name, image, mask, strength=strength, num_inference_steps=5,
                          height=size[1], width=size[0])
        result = paint(kinds, channels, image, mask, sampler_name=sampler_name, strength=strength, n_inference_steps=5,
                       height=size[1], width=size[0])
        inside = np.asarray(mask) > 0
        assert np.abs(result / 255 - expected)[inside].max() <= 0.51 / 255
        assert np.array_equal(result[~inside], np.asarray(image)[~inside])
        assert np.abs(result.astype(int) - np.asarray(image))[inside].mean() > 10


def test_only_masked_draws_what_diffusers_crops(kinds):
    image, mask = picture((160, 120)), rectangle((160, 120), (80, 30, 96, 50))
    result = paint(kinds, 4, image, mask, only_masked=True, padding=14, height=64, width=64)
    pipe = StableDiffusionInpaintPipeline(scheduler=SCHEDULERS["ddim"], **kinds[4][1])
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a cat", image=image, mask_image=mask, guidance_scale=4.0, padding_mask_crop=14, height=64,
                    width=64, strength=1.0, num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0]
    inside = np.asarray(mask) > 0
    assert np.abs(result.astype(int) - np.asarray(expected))[inside].max() <= 1
    assert np.array_equal(result[~inside], np.asarray(image)[~inside])


@pytest.mark.parametrize("box, padding, size, expected", [
    ((10, 20, 30, 40), 5, (None, None), (5, 15, 35, 45)),
    ((0, 20, 30, 100), 5, (None, None), (0, 15, 35, 100)),
    ((40, 40, 60, 50), 0, (64, 64), (40, 35, 60, 55)),
    ((40, 95, 60, 100), 0, (64, 64), (40, 80, 60, 100)),
    ((0, 0, 200, 10), 0, (64, 64), (0, 0, 200, 100)),
    ((40, 40, 50, 60), 0, (64, 128), (25, 40, 65, 60)),
])
def test_the_part_that_is_drawn(box, padding, size, expected):
    assert find_box(rectangle((200, 100), box), padding, *size) == expected


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("settings", [{}, {"only_masked": True}, {"strength": 0.6, "height": 32, "width": 48},
                                      {"blur": 3}, {"fill": "fill"}, {"fill": "latent noise"}, {"fill": "nothing"}])
def test_every_other_pixel_comes_back_byte_for_byte(kinds, channels, settings):
    image, mask = picture((75, 50)), rectangle((75, 50), (30, 10, 61, 37))
    result = paint(kinds, channels, image, mask, **settings)
    inside = np.asarray(mask) > 0
    assert result.shape == (50, 75, 3) and result.dtype == np.uint8 and result.flags["C_CONTIGUOUS"]
    assert np.array_equal(result[~inside], np.asarray(image)[~inside])
    assert np.abs(result.astype(int) - np.asarray(image))[inside].mean() > 5
    two = paint(kinds, channels, image, mask, ["a dog", "a cat"], **settings | {"seed": 6})
    assert two.shape == (2, 50, 75, 3) and np.abs(two[1].astype(int) - result).max() <= 1  # a row is its seed alone


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_what_stays_is_put_back_after_each_step(kinds, sampler_name):
    seen = []

    def look(step, timestep, latents):
        seen.append(latents.clone())

    for fill in ["original", "nothing"]:
        paint(kinds, 4, sampler_name=sampler_name, strength=0.9, n_inference_steps=6, fill=fill, callback=look)
    n = len(seen) // 2
    mean, log_variance = kinds[4][0]["encoder"].moments(to_tensor(picture(), 64, 64))
    std = 0.18215 * (0.5 * log_variance).exp()
    outside = torch.ones(8, 8, dtype=bool)
    outside[1:7, 2:6] = False
    assert ((seen[n - 1] - 0.18215 * mean) / std)[..., outside].abs().max() < 5  # clean in the end
    for first, second in zip(seen[:n], seen[n:]):
        assert torch.equal(first[..., outside], second[..., outside])  # nothing of what is drawn
        assert not torch.equal(first[..., ~outside], second[..., ~outside])


def test_every_kind_of_mask_means_the_same(kinds, tmp_path):
    mask = rectangle()
    white = np.asarray(mask)
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 255), (16, 8, 45, 51))
    clear.save(tmp_path / "clear.png")
    for given in [mask, mask.convert("RGB"), mask.convert("1"), mask.convert("RGBA"), clear, tmp_path / "clear.png",
                  white, white > 0, (white > 0).astype(np.uint8), white / 255, torch.from_numpy(white > 0),
                  torch.from_numpy(white / 255).bfloat16(), white[:, :, None]]:
        assert np.array_equal(open_mask(given, (64, 64)), white)
    assert np.array_equal(paint(kinds, mask=clear), paint(kinds, mask=white > 0))


def test_an_empty_mask_leaves_the_picture(kinds):
    for settings in [{}, {"only_masked": True}]:
        assert np.array_equal(paint(kinds, mask=np.zeros((64, 64), bool), **settings), np.asarray(picture()))


def test_fill(kinds):
    """What the loop starts from, seen at a noise so low that it is all but the picture."""
    starts = {}
    for fill in ["original", "fill", "noise", "nothing"]:
        paint(kinds, fill=fill, strength=0.02, n_inference_steps=50, cfg_scale=1,
              callback=lambda step, timestep, latents, fill=fill: starts.setdefault(fill, latents.clone()))
    inside = np.s_[0, :, 2:5, 3:5]
    assert starts["nothing"][inside].abs().mean() < 0.5 < starts["noise"][inside].abs().mean()
    assert (starts["fill"] - starts["original"])[inside].abs().mean() > 0.05
    assert not np.array_equal(paint(kinds, fill="fill"), paint(kinds))  # at strength 1, too


def test_the_colours_round_it(kinds):
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    mask = rectangle((200, 100), (60, 30, 140, 70))
    hole = image.copy()
    hole.paste("lime", (60, 30, 140, 70))
    filled = np.asarray(fill_from_around(hole, mask)).astype(int)
    assert np.array_equal(filled[np.asarray(mask) == 0], np.asarray(image)[np.asarray(mask) == 0])
    assert filled[..., 1].max() <= 1  # nothing of what is hidden
    assert filled[50, 65, 0] > 200 and filled[50, 135, 2] > 200


def test_blur_rises_from_the_edge_inwards():
    soft = np.asarray(feather(rectangle((40, 20), (10, 0, 40, 20)), 4))  # it touches three sides of the picture
    assert (soft == soft[0]).all() and soft[0, :16].tolist() == [0] * 10 + [51, 102, 153, 204, 255, 255]
    assert (soft[0, 16:] == 255).all()
    assert np.array_equal(feather(rectangle(), 0), rectangle())


def test_outpainting(kinds):
    image = picture((64, 48))
    for channels in (4, 9):
        result = outpaint("a cat", image, left=9, top=8, right=16, models=kinds[channels][0], n_inference_steps=2,
                          seed=1, progress=False)
        assert result.shape == (56, 89, 3) and np.array_equal(result[8:, 9:73], np.asarray(image))
        assert (result[:, :9].std() > 5) and (result[:, 73:].std() > 5) and (result[:8].std() > 5)
    sizes = []
    outpaint("a cat", picture(), right=32, models=kinds[4][0], n_inference_steps=1, progress=False,
             callback=lambda step, timestep, latents: sizes.append(latents.shape))
    assert sizes == [(1, 4, 8, 12)]  # the picture itself at 64x64, as the model was made for
    with pytest.raises(ValueError, match="the sides are .*one of them above 0"):
        outpaint("a cat", image)
    with pytest.raises(ValueError, match="'left': -8"):
        outpaint("a cat", image, left=-8)


def test_a_cache_may_lie_in_a_model_for_inpainting(kinds):
    models = kinds[9][0]
    exact = paint(kinds, 9, n_inference_steps=6)
    cached = inpaint("a cat", picture(), rectangle(), models={**models, "diffusion": DeepCache(models["diffusion"], 3)},
                     n_inference_steps=6, sampler_name="ddim", seed=7, progress=False, cfg_scale=4.0)
    assert 0 < np.abs(exact.astype(int) - cached).mean() < 20
    plain = Inpainting(models["diffusion"], torch.zeros(1, 5, 8, 8))
    assert plain.for_run(DDIMSampler()) is plain and models["diffusion"].config.in_channels == 9


def test_a_sampler_s_own_generator_is_used(kinds):
    first, second = (paint(kinds, sampler=DDIMSampler([torch.Generator().manual_seed(3)]), seed=None) for _ in range(2))
    assert np.array_equal(first, second) and np.array_equal(first, paint(kinds, seed=3))


@pytest.mark.parametrize("settings, message", [
    (dict(mask=np.zeros((64, 32), bool)), "mask is 32x64 pixels, the picture 64x64; give a mask of its size"),
    (dict(mask=np.zeros((3, 64, 64), bool)), r"mask has shape \(3, 64, 64\)"),
    (dict(mask=[rectangle()]), "mask is a list of 1"),
    (dict(mask=np.full((64, 64), 2.0)), r"mask has values from 2.0"),
    (dict(fill="water"), "fill is 'water'; give original, fill, noise or nothing"),
    (dict(blur=-1), "blur is -1; give a whole number"),
    (dict(padding=1.5), "padding is 1.5"),
    (dict(strength=0), "strength is 0"),
    (dict(height=65), "height is 65; give a positive multiple of 8"),
    (dict(sampler_name="magic"), "sampler_name is 'magic'"),
    (dict(latents=torch.zeros(1, 4, 8, 8)), "latents cannot be given"),
    (dict(prompt=[]), "prompt is an empty list"),
])
def test_mistakes_get_one_line(kinds, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        paint(kinds, **settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_no_setting(kinds):
    with pytest.raises(TypeError, match="stength"):
        paint(kinds, stength=0.5)
