"""samplers.py against diffusers' schedulers, call by call, and against the exact solution for Gaussian data."""

import math
import re
from pathlib import Path

import diffusers
import pytest
import torch

import ddpm
import samplers
from ddpm import DDPMSampler, get_alphas_cumprod
from samplers import SAMPLERS, TAKE_KARRAS

SD15 = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
REFERENCES = {
    "ddpm": (diffusers.DDPMScheduler, dict(clip_sample=False)),
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False)),
    "ddim_trailing": (diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False)),
    "plms": (diffusers.PNDMScheduler, dict(skip_prk_steps=True, set_alpha_to_one=False)),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++", solver_order=2)),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++", solver_order=2)),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
SIGMA_SCALE = ("euler", "euler_a", "heun", "lms")               # whose diffusers latents are x_0 + σ ε
STOCHASTIC = ("ddpm", "ddim", "ddim_trailing", "euler_a", "dpmpp_2m_sde", "lcm", "tcd")
IN_ORDER = ("plms", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 4, 3, 5)
ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")    # diffusers' own


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def predict_noise(x, t):
    """A stand-in for the UNet: non-linear in x, and different at each timestep."""
    return torch.tanh(0.7 * x) + 0.3 * math.sin(float(t))


def make(name, generator=None, **settings):
    return SAMPLERS[name](generator, **settings)


def run(sampler, latents):
    """The latents that the model is called with, and those at the end."""
    trajectory = []
    for t in sampler.timesteps:
        trajectory.append(latents)
        latents = sampler.step(t, latents, predict_noise(latents, t))
    return trajectory + [latents]


def sample(sampler, n, pictures=None, strength=None, shape=SHAPE, dtype=torch.float32):
    """As the pipeline does it: from noise, or from pictures where a strength is given."""
    sampler.set_inference_timesteps(n)
    if strength is None:
        return run(sampler, ddpm.draw_noise(sampler.generator, shape, dtype=dtype))
    sampler.set_strength(strength)
    return run(sampler, sampler.add_noise(pictures, sampler.timesteps[0]))


def sample_reference(name, scheduler, generator, n, pictures=None, strength=None, **step_settings):
    """sample() through diffusers, in the order of its pipelines. Returns the timesteps as well."""
    scheduler.set_timesteps(n)
    first = 0 if strength is None else n - min(int(n * strength), n)
    timesteps = scheduler.timesteps[first * scheduler.order:]
    if name == "plms" and first == 1:   # the repeated call would be the first, not the second
        timesteps = torch.cat([timesteps[:1], timesteps[2:3], timesteps[2:]])
    if name == "lms" and first:         # likewise: as if the run began here, with as little history as any
        scheduler.timesteps, scheduler.sigmas, first = timesteps, scheduler.sigmas[first:], 0
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * scheduler.order)

    noise = torch.randn(SHAPE, generator=generator)
    if strength is not None:
        latents = scheduler.add_noise(pictures, noise, timesteps[:1])
    elif name in SIGMA_SCALE:
        latents = noise * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    else:
        latents = noise

    trajectory = []
    for t in timesteps:
        x = scheduler.scale_model_input(latents, t)
        trajectory.append(x)
        more = dict(generator=generator) if name in STOCHASTIC else {}
        latents = scheduler.step(predict_noise(x, t), t, latents, **step_settings, **more).prev_sample
        if name == "plms" and first > 1 and t == timesteps[0]:
            scheduler.counter = 2       # or it would correct this step in the next call, which is another step's
    return trajectory + [latents], timesteps.tolist()


def compare(name, n, strength=None, eta=None, tolerance=1e-5, **both):
    """Asserts that the latents of all calls agree, relative to the largest of each call.

    diffusers takes eta with each step, ours when the sampler is made.
    """
    kind, reference_settings = REFERENCES[name]
    pictures = torch.randn(SHAPE, generator=seeded(0))
    scheduler = kind(**SD15, **reference_settings, **both)
    eta = {} if eta is None else {"eta": eta}
    expected, timesteps = sample_reference(name, scheduler, seeded(1), n, pictures, strength, **eta)
    sampler = make(name, seeded(1), **both, **eta)
    trajectory = sample(sampler, n, pictures, strength)
    assert sampler.timesteps == pytest.approx(timesteps, abs=2e-3)
    assert len(trajectory) == len(expected)
    for x, y in zip(trajectory, expected):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("n", (1, 2, 5, 20, 50))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_is_that_of_diffusers(name, spacing, n):
    for strength in (None, 0.3, 0.75, 1.0):
        if int(n * (strength or 1.0)) > 0:
            compare(name, n, strength, timestep_spacing=spacing)


# diffusers finds the timesteps of Karras sigmas through float32 logarithms, up to 2e-3 off, and sin(t) shows it.
@pytest.mark.parametrize("n", (1, 2, 5, 20, 50))
@pytest.mark.parametrize("name", ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde"))
def test_karras_trajectory_is_that_of_diffusers(name, n):
    for spacing in SPACINGS:
        for strength in (None, 0.75):
            if int(n * (strength or 1.0)) > 0:
                compare(name, n, strength, tolerance=1e-4, use_karras_sigmas=True, timestep_spacing=spacing)


@pytest.mark.parametrize("name", SAMPLERS)
def test_those_that_take_karras_levels_are_listed(name):
    if name in TAKE_KARRAS:
        assert SAMPLERS[name](use_karras_sigmas=True).use_karras_sigmas
    else:
        with pytest.raises(TypeError, match="use_karras_sigmas"):
            SAMPLERS[name](use_karras_sigmas=True)


def test_euler_ancestral_takes_the_karras_levels_of_euler():
    """diffusers gives its euler_a no Karras sigmas, k-diffusion does; the levels are those of Euler then."""
    reference = diffusers.EulerAncestralDiscreteScheduler(**SD15)
    euler = diffusers.EulerDiscreteScheduler(**SD15, timestep_spacing="trailing", use_karras_sigmas=True)
    euler.set_timesteps(20)
    set_timesteps = reference.set_timesteps

    def set_karras(n):
        set_timesteps(n)
        reference.timesteps, reference.sigmas = euler.timesteps, euler.sigmas

    reference.set_timesteps = set_karras
    expected, _ = sample_reference("euler_a", reference, seeded(1), 20)
    ours = sample(make("euler_a", seeded(1), timestep_spacing="trailing", use_karras_sigmas=True), 20)
    for x, y in zip(ours, expected, strict=True):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.parametrize("eta", (0.3, 1.0))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_eta_is_that_of_diffusers(spacing, eta):
    for n in (1, 5, 50):
        compare("ddim", n, eta=eta, timestep_spacing=spacing)


@pytest.mark.parametrize("name", ("ddim", "plms"))
def test_settings_of_the_ends(name):
    kind, settings = REFERENCES[name]
    scheduler = kind(**{**SD15, **settings, "steps_offset": 0, "set_alpha_to_one": True})
    expected, _ = sample_reference(name, scheduler, seeded(1), 20)
    ours = sample(make(name, seeded(1), steps_offset=0, set_alpha_to_one=True), 20)
    assert (ours[-1] - expected[-1]).abs().max() <= 1e-5 * expected[-1].abs().max()


def test_ddim_with_eta_1_at_1000_steps_is_ddpm():
    ddim, ddpm_sampler = make("ddim", eta=1.0, set_alpha_to_one=True), make("ddpm")
    ddim.set_inference_timesteps(1000)
    ddpm_sampler.set_inference_timesteps(1000)
    assert ddim.timesteps == ddpm_sampler.timesteps == list(range(999, -1, -1))
    for ours, theirs in zip(ddim.coefficients, ddpm_sampler.coefficients, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_lcm_takes_its_own_number_of_distilled_steps():
    scheduler = diffusers.LCMScheduler(**SD15, original_inference_steps=100, timestep_scaling=5.0)
    expected, timesteps = sample_reference("lcm", scheduler, seeded(1), 8)
    sampler = make("lcm", seeded(1), original_inference_steps=100, timestep_scaling=5.0)
    ours = sample(sampler, 8)
    assert sampler.timesteps == timesteps
    assert (ours[-1] - expected[-1]).abs().max() <= 1e-5 * expected[-1].abs().max()


@pytest.mark.parametrize("eta", (0.0, 0.6, 1.0))
def test_tcd_with_eta_is_that_of_diffusers(eta):
    for n in (1, 4, 8, 50):
        for strength in (None, 0.5):
            if int(n * (strength or 1.0)) > 0:
                compare("tcd", n, strength, eta=eta)


def test_tcd_without_noise_is_ddim_to_the_first_trained_level():
    tcd = make("tcd", eta=0.0)
    tcd.set_inference_timesteps(50)
    assert tcd.timesteps == list(range(999, 0, -20))
    ddim = make("ddim", timestep_spacing="trailing")
    ddim.set_inference_timesteps(50)
    for ours, theirs in zip(tcd.coefficients, ddim.coefficients, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_tcd_takes_its_own_number_of_distilled_steps():
    scheduler = diffusers.TCDScheduler(**SD15, original_inference_steps=100)
    expected, timesteps = sample_reference("tcd", scheduler, seeded(1), 8)
    sampler = make("tcd", seeded(1), original_inference_steps=100)
    ours = sample(sampler, 8)
    assert sampler.timesteps == timesteps
    assert (ours[-1] - expected[-1]).abs().max() <= 1e-5 * expected[-1].abs().max()


def test_trailing_ddim_starts_where_hyper_sd_was_distilled():
    scheduler = diffusers.DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    for n in (2, 4, 8):
        expected, timesteps = sample_reference("ddim_trailing", scheduler, seeded(1), n)
        sampler = make("ddim_trailing", seeded(1))
        ours = sample(sampler, n)
        assert sampler.timesteps == timesteps and (n != 4 or timesteps == [999, 749, 499, 249])
        for x, y in zip(ours, expected, strict=True):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_1_starts_at_the_noise_level_of_text_to_image(name):
    sampler = make(name, seeded(0))
    sampler.set_inference_timesteps(20)
    from_noise = sampler.timesteps
    sampler.set_strength(0.5)
    sampler.set_strength(1.0)
    assert sampler.timesteps == from_noise
    noisy = sampler.add_noise(torch.zeros(1, 4, 128, 128), sampler.timesteps[0])
    alpha_bar = get_alphas_cumprod()[round(sampler.timesteps[0])]
    assert noisy.std().item() == pytest.approx(math.sqrt(1 - alpha_bar), rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_level_of_every_timestep(name):
    """Whether it is listed once or twice, at the start or later, as inpainting asks for."""
    sampler = make(name, timestep_spacing="trailing")
    sampler.set_inference_timesteps(20)
    for strength in (1.0, 0.4):
        sampler.set_strength(strength)
        for t in [*sampler.timesteps, 0, 123, 999]:
            assert sampler.alpha_bar(t) == pytest.approx(get_alphas_cumprod()[round(t)], rel=1e-12)


def test_any_number_of_steps_can_be_planned():
    for name in SAMPLERS:
        for spacing in SPACINGS:
            for n in (1, 2, 3, 7, 333, 999, 1000) if name not in ("lcm", "tcd") else (1, 3, 33, 50):
                sampler = make(name, timestep_spacing=spacing)
                sampler.set_inference_timesteps(n)
                assert len(sampler.timesteps) == {"heun": 2 * n - 1, "plms": n + (n > 1)}.get(name, n)
                assert 0 <= min(sampler.timesteps) and max(sampler.timesteps) <= 999
                numbers = torch.tensor([number for row in sampler.coefficients for number in flat(row)])
                assert numbers.isfinite().all() and numbers.abs().max() < 300


def flat(row):
    for entry in row:
        yield from entry if isinstance(entry, list) else [entry]


# Order of accuracy. For data N(0, s²) the ideal ε is linear in x, and the exact solutions are known in closed form.

DATA_STD = 0.5


def variance(t):
    """Of x_t."""
    alpha_bar = get_alphas_cumprod()[round(t)]
    return alpha_bar * DATA_STD**2 + 1 - alpha_bar


def error_at_499(name, n, monkeypatch, **settings):
    """How far latents, that set out at 999 with the exact distribution, are off at 499.

    The samplers without noise multiply them by a number, to be compared with the ODE's solution. The others add noise,
    so it is the variance that counts: row 0 carries what the start is multiplied by, row k what the k-th noise is.
    """
    rows = n + 2
    noises = []

    def one_hot(generator, shape, device, dtype):
        noises.append(torch.zeros(shape, dtype=dtype))
        noises[-1][len(noises)] = 1
        return noises[-1]

    monkeypatch.setattr(ddpm, "draw_noise", one_hot)
    monkeypatch.setattr(samplers, "draw_noise", one_hot)
    sampler = make(name, timestep_spacing="trailing", **settings)
    sampler.set_inference_timesteps(n)
    x = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
    x[0] = 1
    last_call_at_499 = len(sampler.timesteps) - 1 - sampler.timesteps[::-1].index(499)
    for t in sampler.timesteps[:last_call_at_499]:
        eps = math.sqrt(1 - get_alphas_cumprod()[round(t)]) / variance(t) * x
        x = sampler.step(t, x, eps)
    if noises:
        return abs(x[0].item() ** 2 * variance(999) + (x[1:] ** 2).sum().item() - variance(499))
    return abs(x[0].item() - math.sqrt(variance(499) / variance(999)))


@pytest.mark.parametrize("name, order, settings", (
    ("ddpm", 1, {}), ("ddim", 1, {}), ("ddim", 1, dict(eta=1.0)), ("euler", 1, {}), ("euler_a", 1, {}),
    ("plms", 2, {}), ("heun", 2, {}), ("dpmpp_2m", 2, {}), ("dpmpp_2m_sde", 2, {}),
))
def test_order_of_accuracy(name, order, settings, monkeypatch):
    coarse, fine = (error_at_499(name, n, monkeypatch, **settings) for n in (100, 200))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert fine < (2e-3 if order == 1 else 5e-5)


def test_lms_beats_second_order_until_its_start_shows(monkeypatch):
    """Its first step is Euler's, whose error of order 2 remains in the end; the fourth order shows in coarser steps."""
    errors = [error_at_499("lms", n, monkeypatch) for n in (10, 20, 40, 100)]
    assert math.log(errors[0] / errors[-1]) / math.log(10) > 2.8
    assert errors[-1] < 5e-6


@pytest.mark.parametrize("spacing", SPACINGS)
def test_lms_integrates_cubics_exactly(spacing):
    """Where ε is a cubic in σ, whatever x, all steps from the fourth on add its integral to x / sqrt(ᾱ)."""
    sampler = make("lms", timestep_spacing=spacing)
    sampler.set_inference_timesteps(12)
    sigmas = sampler.get_sigmas()
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for i, t in enumerate(sampler.timesteps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        before = x.item() * math.sqrt(1 + sigma**2)
        x = sampler.step(t, x, torch.full_like(x, 2 - 3 * sigma + sigma**2 - 0.2 * sigma**3))
        integral = sum(c / (k + 1) * (sigma_next ** (k + 1) - sigma ** (k + 1)) for k, c in enumerate((2, -3, 1, -0.2)))
        added = x.item() * math.sqrt(1 + sigma_next**2) - before
        assert (added == pytest.approx(integral, rel=1e-9, abs=1e-9)) == (i >= 3)


# The promises: half precision, rows, no state left behind, and the device left alone.

@pytest.mark.parametrize("dtype, tolerance", ((torch.float16, 0.01), (torch.bfloat16, 0.1)))
@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_neither_overflows_nor_drifts(name, dtype, tolerance):
    for n in (1, 2, 20):
        exact = sample(make(name, seeded(3), timestep_spacing="trailing"), n)
        half = sample(make(name, seeded(3), timestep_spacing="trailing"), n, dtype=dtype)
        for x, y in zip(half, exact, strict=True):
            assert x.dtype == dtype
            assert (x.float() - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_of_a_batch_equals_the_same_seed_alone(name):
    settings = dict(eta=1.0) if name == "ddim" else {}
    pictures = torch.randn(SHAPE, generator=seeded(0))
    for strength in (None, 0.6):
        batch = sample(make(name, [seeded(5), seeded(6)], **settings), 10, pictures, strength)
        alone = sample(make(name, seeded(6), **settings), 10, pictures[1:], strength, shape=(1, *SHAPE[1:]))
        assert torch.equal(batch[-1][1:], alone[-1])


@pytest.mark.parametrize("settings", ({}, dict(use_karras_sigmas=True)))
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_can_be_used_again(name, settings):
    if settings and not issubclass(SAMPLERS[name], samplers.EulerSampler):
        settings = {}
    sampler = make(name, seeded(1), **settings)
    first = sample(sampler, 12)
    start = first[0]

    sampler.generator = seeded(2)
    noisy = run(sampler, start)                                         # again, as it stands
    sampler.generator = seeded(2)
    for t in sampler.timesteps[:7]:                                     # given up half-way ...
        sampler.step(t, 3 * start, start)
    sampler.generator = seeded(2)
    assert torch.equal(run(sampler, start)[-1], noisy[-1])              # ... and started over
    for t in sampler.timesteps[:7]:
        sampler.step(t, 3 * start, start)
    sampler.generator = seeded(1)
    for x, y in zip(sample(sampler, 12), first, strict=True):           # planned afresh
        assert torch.equal(x, y)
    pictures = torch.randn(SHAPE, generator=seeded(0))
    sampler.generator = seeded(1)
    used = sample(sampler, 12, pictures, 0.5)
    assert torch.equal(used[-1], sample(make(name, seeded(1), **settings), 12, pictures, 0.5)[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_reads_nothing_back_from_the_device(name):
    """Tensors on the meta device have no values to read."""
    sampler = make(name, seeded(0))
    sampler.set_inference_timesteps(6)
    assert all(type(number) in (float, int) for row in sampler.coefficients for number in flat(row))
    latents = torch.empty(SHAPE, dtype=torch.float16, device="meta")
    for t in sampler.timesteps:
        latents = sampler.step(t, latents, torch.empty_like(latents))
        assert (latents.shape, latents.dtype, latents.device.type) == (SHAPE, torch.float16, "meta")


@pytest.mark.parametrize("name", IN_ORDER)
def test_steps_that_build_on_each_other_must_come_in_turn(name):
    sampler = make(name)
    sampler.set_inference_timesteps(10)
    x = torch.zeros(SHAPE)
    sampler.step(sampler.timesteps[0], x, x)
    with pytest.raises(ValueError, match=f"out of turn: {sampler.timesteps[1]} is next, or {sampler.timesteps[0]}"):
        sampler.step(sampler.timesteps[5], x, x)


def test_other_steps_come_whenever_they_are_wanted():
    x = torch.randn(SHAPE, generator=seeded(0))
    for name in set(SAMPLERS) - set(IN_ORDER):
        sampler = make(name, seeded(1))
        sampler.set_inference_timesteps(10)
        t = sampler.timesteps[6]
        alone = sampler.step(t, x, x)
        sampler.generator = seeded(1)
        sampler.step(sampler.timesteps[8], x, x)
        sampler.generator = seeded(1)
        assert torch.equal(sampler.step(t, x, x), alone)


@pytest.mark.parametrize("call, says", (
    (lambda: make("ddim", eta=1.5), "eta is 1.5: give a number from 0"),
    (lambda: make("ddim", eta=-0.1), "eta is -0.1"),
    (lambda: make("heun", timestep_spacing="log"), "'log': choose 'leading', 'trailing' or 'linspace'"),
    (lambda: make("lcm", original_inference_steps=0), "original_inference_steps is 0: give a whole number from 1"),
    (lambda: make("tcd", eta=1.5), "eta is 1.5: give a number from 0"),
    (lambda: make("tcd").set_inference_timesteps(51), "num_inference_steps is 51: TCD takes 1 to 50"),
    (lambda: make("lcm").set_inference_timesteps(51), "num_inference_steps is 51: LCM takes 1 to 50"),
    (lambda: make("plms").set_inference_timesteps(1001), "num_inference_steps is 1001: give a whole number from 1"),
    (lambda: make("dpmpp_2m").step(1, None, None), "timestep 1 is not planned: call set_inference_timesteps"),
    (lambda: make("lms").step(1, None, None), "timestep 1 is not planned"),
    (lambda: make("euler").add_noise(torch.zeros(SHAPE), 17.25), "timestep 17.25 is not in sampler.timesteps"),
))
def test_bad_input_gets_one_line(call, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_sampler_of_ones_own():
    """The one that the README prints: Euler's method in four lines, which must equal ours."""
    code, = re.findall(r"^class MySampler.*?\n\n", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    names = {"DDPMSampler": DDPMSampler}
    exec(code, names)
    MySampler = names["MySampler"]

    pictures = torch.randn(SHAPE, generator=seeded(0))
    for strength in (None, 0.5):
        mine = sample(MySampler(seeded(1)), 10, pictures, strength)
        ours = sample(make("euler", seeded(1), timestep_spacing="leading"), 10, pictures, strength)
        torch.testing.assert_close(mine[-1], ours[-1], rtol=1e-5, atol=1e-5)
