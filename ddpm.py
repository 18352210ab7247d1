"""The noise schedule, and DDPM, which walks it back one Gaussian at a time (Ho et al. 2020, arXiv 2006.11239).

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε         t = 0 … 999, from almost clean to almost pure noise         (eq. 4)

The paper counts t from 1, code counts from 0. `alphas_cumprod[t]` is ᾱ_t; latents have this scale in every sampler.
"""

from itertools import pairwise
from math import ceil, sqrt
from numbers import Integral, Real

import numpy as np
import torch


def get_alphas_cumprod(num_training_steps=1000, beta_start=0.00085, beta_end=0.0120):
    """ᾱ_t, a float64 array (num_training_steps,), for the β of Stable Diffusion's training: sqrt(β) is linear in t."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_training_steps) ** 2
    return np.cumprod(1.0 - betas)


def rescale_alphas_cumprod(alphas_cumprod):
    """The schedule stretched so that its last timestep is noise alone: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.

    But the last ᾱ is 2⁻²⁴ and not 0, where no ε could say what x_0 is, as in diffusers' samplers that work on σ.
    """
    roots = np.sqrt(alphas_cumprod)
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    rescaled[-1] = 2.0**-24
    return rescaled


def eps_from_v(v, latents, alpha_bar):
    """The noise ε that a predicted velocity v implies: Salimans & Ho 2022 (arXiv 2202.00512), appendix D.

    v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0, and latents (of the same shape) = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε.
    """
    return sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * latents


def rescale_guidance(guided, cond, guidance_rescale):
    """Guided predictions with their spread brought back towards that of the prompt's alone: Lin et al. 2023
    (arXiv 2305.08891), section 3.4. Without it, guidance overexposes pictures of a zero_terminal_snr model.

    guided, cond: (batch, 4, h, w), what the model predicts (v, if it predicts that) with guidance, and for the prompts.
    guidance_rescale: 0 (none) to 1; the paper finds 0.7 best.
    """
    dims = tuple(range(1, cond.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


def space_timesteps(n, num_training_steps, timestep_spacing, steps_offset, most_whole=50):
    """n timesteps, high to low, as a float64 array (n,); "linspace" gives fractional ones.

    Table 2 of Lin et al. 2023 (arXiv 2305.08891), in the form that diffusers gave it, which counts from 0. But where
    "leading" steps of a whole number of timesteps would leave out the noisiest (501 steps of one each: the upper half),
    and there are more than most_whole, they are not all of one length.
    """
    i = np.arange(n)
    if timestep_spacing == "leading":
        stride = max(num_training_steps // n, 1)
        if n > most_whole and num_training_steps - 1 - ((n - 1) * stride + steps_offset) > stride:
            stride = num_training_steps / n
        timesteps = np.floor(i[::-1] * stride) + steps_offset
    elif timestep_spacing == "trailing":
        timesteps = np.arange(num_training_steps, 0, -num_training_steps / n)[:n].round() - 1      # [:n]: 0 may slip in
    else:
        timesteps = np.linspace(0, num_training_steps - 1, n)[::-1]
    # The offset must not lead beyond the last trained timestep (leading, 1000 steps), nor onto any timestep twice.
    return np.minimum(timesteps, num_training_steps - 1 - i)


def draw_noise(generator, shape, device="cpu", dtype=torch.float32):
    """Standard normal noise (batch, 4, h, w), the same numbers for a seed on every device and in every dtype.

    It is drawn on the CPU in float32, then moved and cast.
    generator: one CPU torch.Generator for the whole batch, or a list of them, one a row: then row k depends on
    generator k alone, so that a picture does not change with the batch that it is drawn in.
    """
    if not isinstance(generator, (list, tuple)):
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return noise.to(device, dtype, non_blocking=True)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} rows of latents: pass one a row, or a single one")
    rows = [torch.randn(1, *shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in generator]
    return torch.cat(rows).to(device, dtype, non_blocking=True)


class DDPMSampler:
    """DDPM, and the frame of all other samplers, which differ from it in their schedule or their step.

        sampler = DDPMSampler(generator)
        sampler.set_inference_timesteps(50)
        for t in sampler.timesteps:
            latents = sampler.step(t, latents, predict_noise(latents, t))

    starts from noise N(0, 1). To start from a picture, call set_strength(s) before the loop, and begin with
    add_noise(latents, sampler.timesteps[0]).

    generator: where noise comes from, see draw_noise.
    timestep_spacing: "leading", "trailing" or "linspace".
    steps_offset: added to all timesteps of "leading" spacing; SD 1.5's published scheduler has 1.
    rescale_zero_terminal_snr: whether the schedule ends in noise alone, see rescale_alphas_cumprod; "trailing" spacing
    starts there.

    Samplers that build a step on those before it (in_order) want their timesteps in turn, though a run may be dropped
    and started over at any time; the others take a timestep whenever it comes. Whatever cannot be right (a setting, a
    timestep that is not planned, a number of generators) raises ValueError.

    A sampler whose step is linear, x_prev = c_x x + c_eps ε + c_noise z with z ~ N(0, 1), need only say what the three
    floats of each step are (get_coefficients). They are worked out in float64 before the loop; inside it the tensors
    keep the latents' dtype, and no value is read back from the device.
    """

    name, label = "ddpm", "DDPM"  # as `samplers.SAMPLERS` and web UIs call it
    in_order = False

    def __init__(self, generator=None, num_training_steps=1000, beta_start=0.00085, beta_end=0.0120,
                 timestep_spacing="leading", steps_offset=1, rescale_zero_terminal_snr=False):
        if timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing is {timestep_spacing!r}: choose 'leading', 'trailing' or 'linspace'")
        if not isinstance(steps_offset, int) or steps_offset < 0:
            raise ValueError(f"steps_offset is {steps_offset!r}: give a whole number from 0 on (SD 1.5 has 1)")
        self.generator = generator
        self.num_training_steps = num_training_steps
        self.timestep_spacing = timestep_spacing
        self.steps_offset = steps_offset
        self.alphas_cumprod = get_alphas_cumprod(num_training_steps, beta_start, beta_end)
        if rescale_zero_terminal_snr:
            self.alphas_cumprod = rescale_alphas_cumprod(self.alphas_cumprod)
        self.num_inference_steps = None
        self.timesteps, self.coefficients = [], []

    def set_inference_timesteps(self, num_inference_steps=50):
        """Plan a run of so many steps (1 to num_training_steps) from pure noise. Undoes set_strength."""
        n, most = num_inference_steps, self.num_training_steps
        if not isinstance(n, Integral) or isinstance(n, bool) or not 1 <= n <= most:
            raise ValueError(f"num_inference_steps is {n!r}: give a whole number from 1 to {most}")
        self.num_inference_steps = int(n)
        self.set_strength(1.0)

    def set_strength(self, strength=1.0):
        """Plan to skip the noisiest steps: of n steps the last int(n * strength) remain. 0 < strength <= 1.

        Call it after set_inference_timesteps; 1.0 is the whole run. As diffusers' image-to-image pipeline counts them.
        """
        n = self.num_inference_steps
        if n is None:
            raise ValueError("set_strength needs the number of steps: call set_inference_timesteps first")
        if not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength is {strength!r}: give a number above 0 (hardly any change) up to 1 (all new)")
        if int(n * strength) == 0:
            least = ceil(1e4 / n) / 1e4
            raise ValueError(f"strength {strength} leaves none of {n} steps: use {least:g} or more, or more steps")
        first = n - int(n * strength)
        timesteps, levels = self.get_schedule()
        self.timesteps, self.levels = timesteps[first:], levels[first:]
        self.coefficients = self.get_coefficients()
        self.position = 0                                       # of the next step in self.timesteps

    def get_schedule(self):
        """All timesteps (n ints), and ᾱ at each of them and at the end (n + 1 floats), whatever the strength."""
        timesteps = space_timesteps(
            self.num_inference_steps, self.num_training_steps, self.timestep_spacing, self.steps_offset)
        timesteps = timesteps.round().astype(int)
        return timesteps.tolist(), self.alphas_cumprod[timesteps].tolist() + [1.0]

    def get_coefficients(self):
        """(c_x, c_eps, c_noise) of each step: the mean of eq. 11 with the variance β̃ of eq. 7.

        With n < 1000 steps, β is that of the long step from one timestep to the next. β̃ is 0 in the last step.
        """
        coefficients = []
        for alpha_bar, alpha_bar_prev in pairwise(self.levels):
            alpha = alpha_bar / alpha_bar_prev
            beta = 1 - alpha
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
            coefficients.append((1 / sqrt(alpha), -beta / sqrt(alpha * (1 - alpha_bar)), sqrt(variance)))
        return coefficients

    def add_noise(self, latents, timestep):
        """x_t (eq. 4) for clean latents x_0 (batch, 4, h, w), with fresh noise: the same shape, dtype and device.

        timestep: a number, or one a row (a list, array or tensor), as training has it.
        """
        timesteps = np.asarray(timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep).reshape(-1)
        if len(timesteps) not in (1, len(latents)):
            raise ValueError(f"there are {len(timesteps)} timesteps for {len(latents)} rows of latents; give one, or "
                             f"one a row")
        alpha_bar = torch.tensor([self.alpha_bar(t) for t in timesteps.tolist()], dtype=torch.float64, device="cpu")
        signal, noise_level = (x.sqrt().to(latents.device, latents.dtype).view(-1, 1, 1, 1) for x in
                               (alpha_bar, 1 - alpha_bar))
        noise = draw_noise(self.generator, latents.shape, latents.device, latents.dtype)
        return signal * latents + noise_level * noise

    def alpha_bar(self, timestep):
        """ᾱ at a timestep of the schedule, which may lie between two trained ones, or else at any trained one."""
        if timestep in self.timesteps:
            return self.levels[self.timesteps.index(timestep)]
        if timestep in range(self.num_training_steps):
            return float(self.alphas_cumprod[int(timestep)])
        raise ValueError(f"timestep {timestep} is not in sampler.timesteps, nor in 0 to {self.num_training_steps - 1}")

    def index(self, timestep):
        """Where in self.timesteps this step is. One that is listed twice is the second only right after the first."""
        if timestep not in self.timesteps:
            raise ValueError(f"timestep {timestep} is not planned: call set_inference_timesteps, use sampler.timesteps")
        i = self.position
        if self.timesteps[i] != timestep:
            i = self.timesteps.index(timestep)
            if self.in_order and i > 0:
                raise ValueError(f"timestep {timestep} is out of turn: {self.timesteps[self.position]} is next, or "
                                 f"{self.timesteps[0]} to start over")
        self.position = (i + 1) % len(self.timesteps)
        return i

    def step(self, timestep, latents, model_output):
        """One step towards the picture.

        timestep: one of self.timesteps.
        latents: (batch, 4, h, w) at this timestep's noise level.
        model_output: the noise ε predicted in them, of the same shape.
        Returns the latents for the next timestep, or after the last one the finished ones.
        """
        c_x, c_eps, c_noise = self.coefficients[self.index(timestep)]
        latents = c_x * latents + c_eps * model_output
        if c_noise == 0:
            return latents
        return latents + c_noise * draw_noise(self.generator, latents.shape, latents.device, latents.dtype)
