"""Every sampler but DDPM. The table at the end has the names that generate(sampler_name=...) takes.

All take and return latents in DDPM's scale, x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε, and start from noise N(0, 1). The methods
of Karras et al. (2022, EDM, arXiv 2206.00364) are written for another scale, x / sqrt(ᾱ) = x_0 + σ ε, where

    σ = sqrt((1 - ᾱ) / ᾱ)        ᾱ = 1 / (1 + σ²)        and the ODE to solve is dx/dσ = ε                (EDM, eq. 1)

So here x comes in times sqrt(1 + σ²) of this level, and the result goes out over the same of the next level. Both
factors are part of the coefficients: the latents never grow to the size of σ, where half precision is coarse.

Settings have diffusers' names, and trajectories are diffusers' own, as SD 1.5 is published and compared in its terms.
k-diffusion takes the same steps between the same levels, but differs in two points:

- Its levels: evenly spaced timesteps from the last trained one to the first, with log σ interpolated between trained
  ones. Its Karras sigmas span that whole range. Here, timestep_spacing decides.
- Its noise for dpmpp_2m_sde comes from one Brownian path, so that more steps refine the same picture. Here each step
  draws fresh noise, as euler_a and DDPM do.

Every class is a DDPMSampler with another schedule or another step: ᾱ, noise, strength and the spacing of timesteps come
from how the model was trained, and are the same for all methods.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log, sqrt

import numpy as np
from numpy.polynomial import Polynomial
from torch import Generator, Tensor

from ddpm import DDPMSampler, draw_noise, space_timesteps

Generators = Generator | Sequence[Generator] | None  # one for all rows of the latents, or one a row
Schedule = tuple[list[float], list[float]]  # timesteps, and ᾱ at each of them and at the end


class DDIMSampler(DDPMSampler):
    """DDIM (Song et al. 2021, arXiv 2010.02502): deterministic unless eta > 0.

    Args:
        generator: as for DDPMSampler.
        eta: how much of DDPM's noise each step adds, from 0 to 1. With eta 1 and 1000 steps it is DDPM.
        set_alpha_to_one: whether the last step ends at ᾱ = 1, clean latents. False ends it at the first trained level,
            as SD 1.5's published scheduler and the original code do.
        **schedule: as for DDPMSampler; so below.

    Steps are 1000 // n timesteps long, as in diffusers. The timesteps of "linspace" spacing are a little further apart,
    so with it the latents are noisier than the model is told: prefer another spacing.

    Raises:
        ValueError: eta is out of range.
    """

    name, label = "ddim", "DDIM"

    def __init__(self, generator: Generators = None, *, eta: float = 0.0, set_alpha_to_one: bool = False, **schedule):
        super().__init__(generator, **schedule)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta!r}: give a number from 0 (no noise) to 1 (as much as DDPM)")
        self.eta = eta
        self.final_alpha_bar = 1.0 if set_alpha_to_one else float(self.alphas_cumprod[0])

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps, c_noise) of each step: eq. 12 with x_0 = (x - sqrt(1 - ᾱ) ε) / sqrt(ᾱ), and σ(η) of eq. 16."""
        coefficients = []
        for t, alpha_bar_prev in zip(self.timesteps, alpha_bars_below(self, self.timesteps)):
            alpha_bar = self.alpha_bar(t)
            std = self.eta * sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
            c_x = sqrt(alpha_bar_prev / alpha_bar)
            coefficients.append((c_x, sqrt(1 - alpha_bar_prev - std**2) - c_x * sqrt(1 - alpha_bar), std))
        return coefficients


class DDIMTrailingSampler(DDIMSampler):
    """DDIM from the last trained timestep on, for models made for few steps of it, with cfg_scale 1.

    Hyper-SD's LoRAs for 2, 4 and 8 steps (arXiv 2404.13686) are. Four steps are at 999, 749, 499 and 249.
    """

    name, label = "ddim_trailing", "DDIM trailing"

    def __init__(self, generator: Generators = None, *, timestep_spacing: str = "trailing", **settings):
        super().__init__(generator, timestep_spacing=timestep_spacing, **settings)


class PLMSSampler(DDPMSampler):
    """PLMS, the method that SD 1.5 was published with (Liu et al. 2022, PNDM, arXiv 2202.09778).

    Each step extrapolates the last four predictions of the noise (eq. 12). The first step has only one, so it is taken
    twice: the second time with the mean of the predictions at its two ends, as the paper's S-PNDM starts. That is why
    the second timestep is listed twice, and n steps call the model n + 1 times.

    With strength < 1, a run has as many calls as in diffusers, which skips as many of the n + 1 calls as other samplers
    skip of their n steps. From two skipped steps on, the run therefore begins one step earlier than theirs, and takes
    no step twice: its first step uses one prediction, its second two, and so on. diffusers corrects the first step of
    such a run, too, although no timestep is listed twice, and is one step behind from then on; that is not followed.

    Steps are 1000 // n timesteps long, as in DDIMSampler: prefer another spacing than "linspace".

    Args: as DDIMSampler's, without eta.
    """

    name, label = "plms", "PLMS"

    # Of the newest prediction, the one before it, and so on: Adams-Bashforth of orders 1 to 4 (eq. 12).
    WEIGHTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    in_order = True
    repeats = False  # whether the first step is taken twice

    def __init__(self, generator: Generators = None, *, set_alpha_to_one: bool = False, **schedule):
        super().__init__(generator, **schedule)
        self.final_alpha_bar = 1.0 if set_alpha_to_one else float(self.alphas_cumprod[0])

    def set_strength(self, strength: float = 1.0) -> None:
        super().set_strength(strength)
        timesteps, levels = self.get_schedule()
        first = len(timesteps) - len(self.timesteps)
        self.repeats = first < 2
        if self.repeats:
            self.timesteps[1:1] = self.timesteps[1:2]
            self.levels[1:1] = self.levels[1:2]
        else:
            self.timesteps, self.levels = timesteps[first - 1:], levels[first - 1:]
        self.coefficients = self.get_coefficients()

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps) of each call: eq. 11, which is DDIM's step."""
        starts = list(self.timesteps)
        if self.repeats and len(starts) > 1:  # the second call takes the first step again
            stride = self.num_training_steps // self.num_inference_steps
            starts[1] = starts[0] if self.timestep_spacing == "leading" else starts[1] + stride
        coefficients = []
        for t, alpha_bar_prev in zip(starts, alpha_bars_below(self, starts)):
            alpha_bar = self.alpha_bar(t)
            c_x = sqrt(alpha_bar_prev / alpha_bar)
            coefficients.append((c_x, sqrt(1 - alpha_bar_prev) - c_x * sqrt(1 - alpha_bar)))
        return coefficients

    def step(self, timestep: float, latents: Tensor, model_output: Tensor) -> Tensor:
        """As DDPMSampler.step."""
        i = self.index(timestep)
        c_x, c_eps = self.coefficients[i]
        if i == 0:
            self.history, self.start = [model_output], latents
        elif i == 1 and self.repeats:
            return c_x * self.start + c_eps / 2 * (self.history[0] + model_output)
        else:
            self.history = [model_output, *self.history[:3]]
        return c_x * latents + c_eps * weighted_sum(self.WEIGHTS[len(self.history) - 1], self.history)


class EulerSampler(DDPMSampler):
    """Euler's method on dx/dσ = ε (EDM, algorithm 1 without its second-order correction).

    Args:
        generator: as for DDPMSampler.
        use_karras_sigmas: whether to space σ by EDM's eq. 5, between the highest and the lowest σ of timestep_spacing.
        timestep_spacing: as for DDPMSampler, but "linspace" by default, here and in the samplers below that are defined
            on σ. It starts at the last trained timestep, where diffusers and k-diffusion start these methods, too.
        **schedule: as for DDPMSampler.

    "linspace" spacing and Karras sigmas give fractional timesteps, which the model's time embedding takes as they are.
    """

    name, label = "euler", "Euler"

    def __init__(self, generator: Generators = None, *, use_karras_sigmas: bool = False,
                 timestep_spacing: str = "linspace", **schedule):
        super().__init__(generator, timestep_spacing=timestep_spacing, **schedule)
        self.use_karras_sigmas = use_karras_sigmas
        self.training_sigmas = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def get_schedule(self) -> Schedule:
        timesteps = space_timesteps(
            self.num_inference_steps, self.num_training_steps, self.timestep_spacing, self.steps_offset)
        sigmas = np.interp(timesteps, np.arange(self.num_training_steps), self.training_sigmas)
        if self.use_karras_sigmas:
            sigmas = space_karras_sigmas(self.num_inference_steps, sigmas[0], sigmas[-1])
            timesteps = self.timesteps_at(sigmas)
        return timesteps.tolist(), (1 / (1 + sigmas**2)).tolist() + [1.0]

    def timesteps_at(self, sigmas: np.ndarray) -> np.ndarray:
        """Returns fractional timesteps at which log σ, interpolated between the trained ones, is that of sigmas."""
        return np.interp(np.log(sigmas), np.log(self.training_sigmas), np.arange(self.num_training_steps))

    def get_sigmas(self) -> list[float]:
        """Returns σ at each step and at the end, where it is 0."""
        return [sqrt((1 - alpha_bar) / alpha_bar) for alpha_bar in self.levels]

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps, 0) of each step: x + (σ_next - σ) ε, in the scale of σ."""
        coefficients = []
        for sigma, sigma_next in pairwise(self.get_sigmas()):
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, (sigma_next - sigma) / scale, 0.0))
        return coefficients


class EulerAncestralSampler(EulerSampler):
    """k-diffusion's "Euler a": Euler's method to a level below the next one, then fresh noise up to it.

    The noise has the standard deviation σ_up of DDPM's posterior: between the same levels, this is DDPM's step.
    """

    name, label = "euler_a", "Euler a"

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps, c_noise): x + (σ_down - σ) ε + σ_up z in the scale of σ, with σ_down² + σ_up² = σ_next²."""
        coefficients = []
        for sigma, sigma_next in pairwise(self.get_sigmas()):
            sigma_up = sigma_next * sqrt(sigma**2 - sigma_next**2) / sigma
            sigma_down = sqrt(sigma_next**2 - sigma_up**2)
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, (sigma_down - sigma) / scale, sigma_up / scale))
        return coefficients


class HeunSampler(EulerSampler):
    """Heun's method (EDM, algorithm 1): Euler's step, then the same step again with the mean of the ε at its two ends.

    n steps call the model 2n - 1 times. Every timestep but the first is listed twice: the first call corrects the step
    that led there, the second begins the next step. The last step, to σ = 0, is Euler's: at its end there is no noise
    to predict.
    """

    name, label = "heun", "Heun"

    in_order = True

    def set_strength(self, strength: float = 1.0) -> None:
        super().set_strength(strength)
        self.timesteps = self.timesteps[:1] + [t for t in self.timesteps[1:] for _ in range(2)]
        self.levels = self.levels[:1] + [alpha_bar for alpha_bar in self.levels[1:] for _ in range(2)]

    def step(self, timestep: float, latents: Tensor, model_output: Tensor) -> Tensor:
        """As DDPMSampler.step."""
        i = self.index(timestep)
        c_x, c_eps, _ = self.coefficients[i // 2]
        if i % 2 == 0:
            self.start, self.start_eps = latents, model_output
            return c_x * latents + c_eps * model_output
        return c_x * self.start + c_eps / 2 * (self.start_eps + model_output)


class LMSSampler(EulerSampler):
    """Linear multistep on dx/dσ = ε (k-diffusion's "LMS"): Adams-Bashforth of order 4 for steps of any length.

    Each step lays a cubic in σ through the last four ε and integrates it exactly. The first three steps have fewer ε,
    and take a polynomial of lower degree. So does a run that strength lets begin in the middle; diffusers gives its
    first steps the weights of a cubic, although they have fewer than four ε, and is not followed there.
    """

    name, label = "lms", "LMS"

    in_order = True

    def get_coefficients(self) -> list[tuple]:
        """(c_x, weights) of each step; the weights are for the newest ε, the one before it, and so on."""
        sigmas = self.get_sigmas()
        coefficients = []
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            # σ is counted from this step's, so that the polynomials' numbers stay small.
            nodes = [past - sigma for past in sigmas[max(i - 3, 0):i + 1][::-1]]
            integrals = [integrate_lagrange(nodes, j, sigma_next - sigma) for j in range(len(nodes))]
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, [integral / scale for integral in integrals]))
        return coefficients

    def step(self, timestep: float, latents: Tensor, model_output: Tensor) -> Tensor:
        """As DDPMSampler.step."""
        i = self.index(timestep)
        self.history = [model_output, *self.history[:3]] if i > 0 else [model_output]
        c_x, weights = self.coefficients[i]
        return c_x * latents + weighted_sum(weights, self.history)


class DPMpp2MSampler(EulerSampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): a multistep method on the predicted x_0.

    The first step, and the last one, to σ = 0, are of first order: they are DDIM's.

    Timesteps are whole numbers. With "leading" and "linspace" spacing, n + 1 are spaced, and all but the lowest used.

    Args: as EulerSampler's, but use_karras_sigmas spaces σ between those of the last trained timestep and the first,
        and rounds the timesteps, so that some at the end may be equal.
    """

    name, label = "dpmpp_2m", "DPM++ 2M"

    in_order = True
    stochastic = False

    def get_schedule(self) -> Schedule:
        n = self.num_inference_steps
        if self.use_karras_sigmas:
            sigmas = space_karras_sigmas(n, self.training_sigmas[-1], self.training_sigmas[0])
            timesteps = self.timesteps_at(sigmas).round().astype(int)
        else:
            points = n if self.timestep_spacing == "trailing" else n + 1
            timesteps = space_timesteps(
                points, self.num_training_steps, self.timestep_spacing, self.steps_offset, most_whole=51)
            timesteps = timesteps[:n].round().astype(int)
            sigmas = self.training_sigmas[timesteps]
        return timesteps.tolist(), (1 / (1 + sigmas**2)).tolist() + [1.0]

    def get_coefficients(self) -> list[tuple]:
        """(a_x, a_eps, c_x, c_new, c_old, c_noise) of each step; the first two make x_0 of x and ε.

        The paper's λ = log(α/σ) is -log σ in our terms, so e^-h = σ_next / σ. The SDE has e^-2h in its place.
        """
        sigmas = self.get_sigmas()
        coefficients = []
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            alpha, alpha_next = 1 / sqrt(1 + sigma**2), 1 / sqrt(1 + sigma_next**2)
            decay = (sigma_next / sigma) ** (2 if self.stochastic else 1)
            half_r = 0.0                                                        # 1 / (2 r), with r = h_prev / h
            if i > 0 and sigma_next > 0:
                half_r = log(sigma / sigma_next) / log(sigmas[i - 1] / sigma) / 2
            c_x, c_x0 = alpha_next / alpha * decay, alpha_next * (1 - decay)
            c_noise = alpha_next * sigma_next * sqrt(1 - decay) if self.stochastic else 0.0
            coefficients.append((1 / alpha, -sigma, c_x, c_x0 * (1 + half_r), -c_x0 * half_r, c_noise))
        return coefficients

    def step(self, timestep: float, latents: Tensor, model_output: Tensor) -> Tensor:
        """As DDPMSampler.step."""
        a_x, a_eps, c_x, c_new, c_old, c_noise = self.coefficients[self.index(timestep)]
        x0 = a_x * latents + a_eps * model_output
        latents = c_x * latents + c_new * x0
        if c_old != 0:
            latents = latents + c_old * self.previous_x0
        self.previous_x0 = x0
        if c_noise == 0:
            return latents
        return latents + c_noise * draw_noise(self.generator, latents.shape, latents.device, latents.dtype)


class DPMpp2MSDESampler(DPMpp2MSampler):
    """SDE-DPM-Solver++(2M) (same paper): the same method for the diffusion SDE. Each step but the last adds noise."""

    name, label = "dpmpp_2m_sde", "DPM++ 2M SDE"

    stochastic = True


class LCMSampler(DDPMSampler):
    """Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3), for models made for it.

    Each step jumps to a clean picture, and back to the next, lower noise level. Four steps are enough, with cfg_scale 1
    to 2.

    Args:
        generator: as for DDPMSampler.
        original_inference_steps: how many timesteps the model was distilled at. The n steps, at most as many, are
            picked from these, so timestep_spacing and steps_offset have no effect.
        timestep_scaling: how fast c_skip falls, and c_out rises, as t rises from 0.
        **schedule: as for DDPMSampler.

    Raises:
        ValueError: original_inference_steps is out of range.
    """

    name, label = "lcm", "LCM"

    SIGMA_DATA = 0.5

    def __init__(self, generator: Generators = None, *, original_inference_steps: int = 50,
                 timestep_scaling: float = 10.0, **schedule):
        super().__init__(generator, **schedule)
        original, most = original_inference_steps, self.num_training_steps
        if not isinstance(original, int) or not 1 <= original <= most:
            raise ValueError(f"original_inference_steps is {original!r}: give a whole number from 1 to {most}, say 50")
        self.original_inference_steps = original_inference_steps
        self.timestep_scaling = timestep_scaling

    def get_schedule(self) -> Schedule:
        n, original = self.num_inference_steps, self.original_inference_steps
        if n > original:
            raise ValueError(f"num_inference_steps is {n}: {self.label} takes 1 to {original} "
                             f"(original_inference_steps)")
        picked = np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)
        timesteps = np.arange(original, 0, -1)[picked] * (self.num_training_steps // original) - 1
        return timesteps.tolist(), self.alphas_cumprod[timesteps].tolist() + [1.0]

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps, c_noise): sqrt(ᾱ_prev) f + sqrt(1 - ᾱ_prev) z, with f = c_skip x + c_out x_0 (eq. 9)."""
        coefficients = []
        for t, (alpha_bar, alpha_bar_prev) in zip(self.timesteps, pairwise(self.levels)):
            scaled_t = self.timestep_scaling * t
            c_skip = self.SIGMA_DATA**2 / (scaled_t**2 + self.SIGMA_DATA**2)
            c_out = scaled_t / sqrt(scaled_t**2 + self.SIGMA_DATA**2)
            c_x = c_skip + c_out / sqrt(alpha_bar)
            c_eps = -c_out * sqrt((1 - alpha_bar) / alpha_bar)
            coefficients.append((sqrt(alpha_bar_prev) * c_x, sqrt(alpha_bar_prev) * c_eps, sqrt(1 - alpha_bar_prev)))
        return coefficients


class TCDSampler(LCMSampler):
    """Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159,
    algorithm 4), for models made for it, with cfg_scale 1.

    Each step jumps to a level s below the next one, as DDIM does, and from there back up to it with fresh noise. The
    last one ends at the first trained level, as in diffusers.

    Args:
        generator: as for DDPMSampler.
        eta: the paper's γ: s = (1 - eta) t_next. 0 adds no noise, 1 jumps to the lowest level; more steps want more.
        original_inference_steps, **schedule: as for LCMSampler.

    Raises:
        ValueError: eta or original_inference_steps is out of range.
    """

    name, label = "tcd", "TCD"

    def __init__(self, generator: Generators = None, *, eta: float = 0.3, original_inference_steps: int = 50,
                 **schedule):
        super().__init__(generator, original_inference_steps=original_inference_steps, **schedule)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta!r}: give a number from 0 (no noise) to 1 (the most)")
        self.eta = eta

    def get_coefficients(self) -> list[tuple]:
        """(c_x, c_eps, c_noise): DDIM's step to ᾱ_s, times sqrt(ᾱ_next / ᾱ_s), and noise that makes up for it."""
        coefficients = []
        for t, t_next in pairwise([*self.timesteps, 0]):
            alpha_bar, alpha_bar_next, alpha_bar_s = (
                float(self.alphas_cumprod[i]) for i in (t, t_next, int((1 - self.eta) * t_next)))
            c_x = sqrt(alpha_bar_s / alpha_bar)
            c_eps = sqrt(1 - alpha_bar_s) - c_x * sqrt(1 - alpha_bar)
            back = sqrt(alpha_bar_next / alpha_bar_s)
            coefficients.append((back * c_x, back * c_eps, sqrt(1 - alpha_bar_next / alpha_bar_s)))
        return coefficients


def alpha_bars_below(sampler: DDIMSampler | PLMSSampler, timesteps: Sequence[int]) -> list[float]:
    """Returns ᾱ where the steps of DDIM and PLMS from these timesteps end: at the next timestep of "leading" spacing,
    else 1000 // n timesteps lower, as in diffusers."""
    every, stride = sampler.get_schedule()[0], sampler.num_training_steps // sampler.num_inference_steps
    following = dict(zip(every, every[1:]))
    below = [following.get(t, -1) if sampler.timestep_spacing == "leading" else t - stride for t in timesteps]
    return [sampler.alpha_bar(t) if t >= 0 else sampler.final_alpha_bar for t in below]


def space_karras_sigmas(n: int, sigma_max: float, sigma_min: float, rho: float = 7) -> np.ndarray:
    """Returns n noise levels from sigma_max down, evenly spaced in σ^(1/ρ) (EDM, eq. 5), as a float64 array (n,)."""
    i = np.linspace(0, 1, n)
    return (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def integrate_lagrange(nodes: list[float], j: int, end: float) -> float:
    """Returns the integral from 0 to `end` of the polynomial that is 1 at nodes[j] and 0 at the other nodes."""
    others = nodes[:j] + nodes[j + 1:]
    polynomial = Polynomial.fromroots(others) if others else Polynomial([1.0])
    return float(polynomial.integ()(end) / polynomial(nodes[j]))


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Returns the weighted sum of as many tensors as weights, all (batch, 4, h, w)."""
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


SAMPLERS = {sampler.name: sampler for sampler in (
    DDPMSampler, DDIMSampler, PLMSSampler, EulerSampler, EulerAncestralSampler, HeunSampler, LMSSampler, DPMpp2MSampler,
    DPMpp2MSDESampler, LCMSampler, TCDSampler, DDIMTrailingSampler)}
TAKE_KARRAS = [name for name, sampler in SAMPLERS.items() if issubclass(sampler, EulerSampler)]  # use_karras_sigmas
