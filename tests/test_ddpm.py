"""ddpm.py against diffusers' DDPMScheduler, against Bayes' rule worked out by hand, and against its own promises."""

import math
import re

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm import DDPMSampler, draw_noise, get_alphas_cumprod, space_timesteps
from samplers import SAMPLERS

SD15 = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            clip_sample=False)
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 4, 5, 3)
ALPHAS_CUMPROD = DDPMScheduler(**SD15).alphas_cumprod.tolist()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def predict_noise(x, t):
    """A stand-in for the UNet: non-linear, different at each timestep, and near enough to ε that x keeps unit scale."""
    noise_level = math.sqrt(1 - ALPHAS_CUMPROD[int(t)])
    return 0.8 * noise_level * (x + 0.3 * torch.tanh(3 * x)) + 0.05 * math.sin(float(t))


def test_alphas_cumprod_are_those_of_sd15():
    ours = get_alphas_cumprod()
    assert ours.shape == (1000,) and ours.dtype == "float64"
    assert torch.allclose(torch.from_numpy(ours), DDPMScheduler(**SD15).alphas_cumprod.double(), atol=1e-6, rtol=0)
    root_betas = [math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085)) for i in range(1000)]
    for t in (0, 1, 500, 999):
        assert ours[t] == pytest.approx(math.prod(1 - root_beta**2 for root_beta in root_betas[:t + 1]), rel=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing):
    theirs = DDPMScheduler(timestep_spacing=spacing, **SD15)
    ours = DDPMSampler(None, timestep_spacing=spacing)
    for n in (1, 2, 3, 4, 7, 20, 48, 50, 333, 999):
        theirs.set_timesteps(n)
        ours.set_inference_timesteps(n)
        assert ours.timesteps == theirs.timesteps.tolist()
        assert all(type(t) is int for t in ours.timesteps)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_has_as_many_different_trained_timesteps(spacing):
    for n in range(1, 1001):
        timesteps = space_timesteps(n, 1000, spacing, steps_offset=1).round().tolist()
        assert len(timesteps) == n and timesteps[0] <= 999 and timesteps[-1] >= 0
        assert all(t > t_next for t, t_next in zip(timesteps, timesteps[1:]))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms"])
def test_pure_noise_is_what_the_first_step_expects(name):
    """From 334 to 900 steps diffusers' whole strides leave out up to the noisier half of the schedule."""
    for n in range(1, 1001, 7):
        sampler = SAMPLERS[name]()
        sampler.set_inference_timesteps(n)
        assert n <= 50 or 999 - sampler.timesteps[0] <= 1000 / n
        assert n <= 50 or sampler.alpha_bar(sampler.timesteps[0]) < 0.008


@pytest.mark.parametrize("name", ["ddim", "plms"])
@pytest.mark.parametrize("n", [60, 501, 750])
def test_steps_of_many_lengths_lead_from_each_timestep_to_the_next(name, n):
    """On x_0 = 0 alone, all noise: whatever the lengths, each step must land on the next level."""
    sampler = SAMPLERS[name]()
    sampler.set_inference_timesteps(n)
    eps = torch.randn(SHAPE, generator=seeded(0), dtype=torch.float64)
    latents = math.sqrt(1 - sampler.alpha_bar(sampler.timesteps[0])) * eps
    for i, t in enumerate(sampler.timesteps):
        latents = sampler.step(t, latents, eps)
        following = sampler.timesteps[i + 1] if i + 1 < len(sampler.timesteps) else 0
        torch.testing.assert_close(latents, math.sqrt(1 - ALPHAS_CUMPROD[following]) * eps, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_each_row_may_have_a_timestep_of_its_own(kind):
    timesteps, x0 = [1, 999], torch.randn(SHAPE, generator=seeded(0))
    noisy = DDPMScheduler(**SD15).add_noise(x0, torch.randn(SHAPE, generator=seeded(5)), torch.tensor(timesteps))
    result = DDPMSampler(seeded(5)).add_noise(x0, kind(timesteps))
    torch.testing.assert_close(result, noisy, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 timesteps for 2 rows of latents; give one, or one a row"):
        DDPMSampler(seeded(5)).add_noise(x0, kind([1, 2, 3]))


def test_steps_offset_is_settable():
    sampler = DDPMSampler(None, steps_offset=0)
    sampler.set_inference_timesteps(50)
    assert sampler.timesteps == list(range(980, -1, -20))


@pytest.mark.parametrize("strength", (0.3, 0.75, 1.0))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", (1, 2, 5, 20, 50, 999))
def test_trajectory_is_that_of_diffusers(n, spacing, strength):
    if int(n * strength) == 0:
        strength = 1.0
    pictures = torch.randn(SHAPE, generator=seeded(0))

    theirs = DDPMScheduler(timestep_spacing=spacing, **SD15)
    if n > 50:      # diffusers takes β as a small difference of float32 constants, which adds up to 8e-5 in all steps
        theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas.double(), dim=0)
    theirs.set_timesteps(n)
    timesteps = theirs.timesteps[n - int(n * strength):]
    generator = seeded(1)
    expected = [theirs.add_noise(pictures, torch.randn(SHAPE, generator=generator), timesteps[:1])]
    for t in timesteps:
        x = expected[-1]
        expected.append(theirs.step(predict_noise(x, t), t, x, generator=generator).prev_sample)

    ours = DDPMSampler(seeded(1), timestep_spacing=spacing)
    ours.set_inference_timesteps(n)
    ours.set_strength(strength)
    trajectory = [ours.add_noise(pictures, ours.timesteps[0])]
    for t in ours.timesteps:
        trajectory.append(ours.step(t, trajectory[-1], predict_noise(trajectory[-1], t)))

    assert len(trajectory) == len(expected)
    for x, y in zip(trajectory, expected):
        assert (x - y).abs().max() <= 1e-5


def test_step_is_the_posterior():
    """Bayes' rule for two Gaussians: x_prev given x_0, and x_t given x_prev. Precisions add (DDPM's eq. 6)."""
    sampler = DDPMSampler(seeded(3))
    sampler.set_inference_timesteps(10)
    x0, eps = torch.randn(2, *SHAPE, generator=seeded(0), dtype=torch.float64)
    generator = seeded(3)
    for t, t_prev in zip(sampler.timesteps, sampler.timesteps[1:]):
        alpha_bar, alpha_bar_prev = sampler.alphas_cumprod[[t, t_prev]].tolist()
        x = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
        alpha = alpha_bar / alpha_bar_prev
        precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
        mean = (math.sqrt(alpha_bar_prev) / (1 - alpha_bar_prev) * x0 + math.sqrt(alpha) / (1 - alpha) * x) / precision
        z = torch.randn(SHAPE, generator=generator).double()
        torch.testing.assert_close(sampler.step(t, x, eps), mean + z / math.sqrt(precision), rtol=0, atol=1e-10)


def test_last_step_is_the_predicted_picture_and_draws_nothing():
    generator = seeded(0)
    sampler = DDPMSampler(generator)
    sampler.set_inference_timesteps(7)
    x0, eps = torch.randn(2, *SHAPE, generator=seeded(1), dtype=torch.float64)
    t = sampler.timesteps[-1]
    alpha_bar = sampler.alpha_bar(t)
    before = generator.get_state()
    last = sampler.step(t, math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps, eps)
    torch.testing.assert_close(last, x0, rtol=0, atol=1e-12)
    assert torch.equal(generator.get_state(), before)


def test_add_noise_at_any_trained_timestep():
    sampler, theirs = DDPMSampler(seeded(5)), DDPMScheduler(**SD15)
    x0, generator = torch.randn(SHAPE, generator=seeded(0)), seeded(5)
    for t in (0, 1, 500, 999):
        noisy = theirs.add_noise(x0, torch.randn(SHAPE, generator=generator), torch.tensor([t]))
        torch.testing.assert_close(sampler.add_noise(x0, t), noisy, rtol=0, atol=1e-5)


def test_strength_leaves_the_last_steps_however_often_it_is_set():
    sampler = DDPMSampler(None)
    for n in (1, 2, 5, 20, 49, 50, 1000):
        sampler.set_inference_timesteps(n)
        everything = sampler.timesteps
        for strength in (0.3, 0.75, 0.29, 1.0, 0.999):
            steps = min(int(n * strength), n)
            if steps == 0:
                continue
            sampler.set_strength(strength)
            assert sampler.timesteps == everything[n - steps:]
            assert len(sampler.coefficients) == steps
        sampler.set_strength()
        assert sampler.timesteps == everything


def test_too_little_strength_names_the_least_that_works():
    sampler = DDPMSampler(None)
    for n in (1, 2, 3, 7, 49, 50, 98, 125, 999, 1000):
        sampler.set_inference_timesteps(n)
        with pytest.raises(ValueError, match="leaves none") as error:
            sampler.set_strength(1e-6)
        sampler.set_strength(float(re.search(r"use (\S+) or more", str(error.value))[1]))
        assert len(sampler.timesteps) == 1


def test_noise_of_a_row_is_that_of_its_generator():
    batch = draw_noise([seeded(5), seeded(6)], SHAPE)
    assert torch.equal(batch[1:], draw_noise([seeded(6)], (1, *SHAPE[1:])))
    assert torch.equal(batch[1:], draw_noise(seeded(6), (1, *SHAPE[1:])))
    assert torch.equal(draw_noise(seeded(5), SHAPE), torch.randn(SHAPE, generator=seeded(5)))


def test_noise_is_the_same_in_every_dtype():
    expected = draw_noise(seeded(5), SHAPE)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(draw_noise(seeded(5), SHAPE, dtype=dtype), expected.to(dtype))


def planned(n=10):
    sampler = DDPMSampler(seeded(0))
    sampler.set_inference_timesteps(n)
    return sampler


@pytest.mark.parametrize("call, says", (
    (lambda: DDPMSampler(None, timestep_spacing="even"), "'even': choose 'leading', 'trailing' or 'linspace'"),
    (lambda: DDPMSampler(None, steps_offset=-1), "steps_offset is -1: give a whole number"),
    (lambda: planned(0), "num_inference_steps is 0: give a whole number from 1 to 1000"),
    (lambda: planned(1001), "num_inference_steps is 1001"),
    (lambda: planned(2.5), "num_inference_steps is 2.5"),
    (lambda: DDPMSampler(None).set_strength(0.5), "call set_inference_timesteps first"),
    (lambda: planned().set_strength(0), "strength is 0: give a number above 0"),
    (lambda: planned().set_strength(1.5), "strength is 1.5"),
    (lambda: planned().set_strength(math.nan), "strength is nan"),
    (lambda: planned().set_strength(0.05), "strength 0.05 leaves none of 10 steps: use 0.1 or more"),
    (lambda: planned().step(900, torch.zeros(SHAPE), torch.zeros(SHAPE)), "timestep 900 is not planned"),
    (lambda: DDPMSampler(None).step(981, torch.zeros(SHAPE), torch.zeros(SHAPE)), "call set_inference_timesteps"),
    (lambda: planned().add_noise(torch.zeros(SHAPE), 1000), "timestep 1000 is not in"),
    (lambda: planned().add_noise(torch.zeros(SHAPE), -1), "timestep -1 is not in"),
    (lambda: draw_noise([seeded(0)], SHAPE), "1 generators for 2 rows"),
))
def test_bad_input_gets_one_line(call, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)
