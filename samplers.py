"""Every sampler beside DDPM, under the names that generate(sampler_name=...) takes: the table is at the end.

All take and return latents in DDPM's scale, x = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε, and start from plain N(0, 1). The methods
defined on sigmas (Karras et al. 2022, EDM, arXiv 2206.00364) live in another scale, x / sqrt(ᾱ) = x_0 + σ ε, where

    σ = sqrt((1 - ᾱ) / ᾱ)        ᾱ = 1 / (1 + σ²)        and the ODE to solve is dx/dσ = ε                (EDM, eq. 1)

Their coefficients are therefore the paper's with sqrt(1 + σ²) of this level divided out and that of the next put in.
Multiplying the two scales into one float keeps half precision safe: the latents never take on the size of σ.

Settings have the names that diffusers gives them, and its trajectories are the reference. It differs from k-diffusion
by design in the levels (k-diffusion takes evenly spaced timesteps from the last trained to the first and interpolates
log σ there, and Karras sigmas over that whole range; here, as timestep_spacing says) and in the noise of dpmpp_2m_sde
(drawn afresh in each step; k-diffusion cuts it from one Brownian path, so that more steps refine the same picture).
diffusers was followed because SD 1.5 is published and compared in its terms, and fresh noise is what euler_a and DDPM
have, too. Between equal levels the steps of both agree.

Every class is a DDPMSampler with another schedule or another step, because what they share (ᾱ, noise, strength, the
spacing of timesteps) is what the model was trained with, and not a matter of the method.
"""

from itertools import pairwise
from math import log, sqrt

import numpy as np
from numpy.polynomial import Polynomial

from ddpm import DDPMSampler, draw_noise, space_timesteps


class DDIMSampler(DDPMSampler):
    """DDIM (Song et al. 2021, arXiv 2010.02502): one step at a time, deterministic unless eta > 0.

    eta: 0 to 1, the share of DDPM's noise; with 1, and 1000 steps, it is DDPM.
    set_alpha_to_one: whether the last step ends at ᾱ = 1, clean latents, or at the first trained level, as SD 1.5's
    published scheduler and the original code have it.
    **schedule: as for DDPMSampler; so below.

    Steps are 1000 // n timesteps long, as in diffusers. With "linspace" spacing, whose timesteps are a little further
    apart, the latents are therefore noisier than the model is told: better take another spacing.
    """

    name, label = "ddim", "DDIM"

    def __init__(self, generator=None, *, eta=0.0, set_alpha_to_one=False, **schedule):
        super().__init__(generator, **schedule)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta!r}: give a number from 0 (no noise) to 1 (as much as DDPM)")
        self.eta = eta
        self.final_alpha_bar = 1.0 if set_alpha_to_one else float(self.alphas_cumprod[0])

    def get_coefficients(self):
        """c_x and c_eps from eq. 12 with x_0 = (x - sqrt(1 - ᾱ) ε) / sqrt(ᾱ) filled in; c_noise is eq. 16's σ(η)."""
        stride = self.num_training_steps // self.num_inference_steps
        coefficients = []
        for t in self.timesteps:
            alpha_bar = self.alpha_bar(t)
            alpha_bar_prev = self.alpha_bar(t - stride) if t >= stride else self.final_alpha_bar
            std = self.eta * sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
            c_x = sqrt(alpha_bar_prev / alpha_bar)
            coefficients.append((c_x, sqrt(1 - alpha_bar_prev - std**2) - c_x * sqrt(1 - alpha_bar), std))
        return coefficients


class PLMSSampler(DDPMSampler):
    """PLMS, the method that SD 1.5 was published with: PNDM's linear multistep (Liu et al. 2022, arXiv 2202.09778).

    n steps call the model n + 1 times: the first step is taken again with the mean of the noise at its two ends (Heun's
    rule, as the paper's S-PNDM starts), so the second timestep is listed twice. Then the last four predictions are
    extrapolated.

    With strength < 1 the calls are those that diffusers makes, which cuts the list of calls, not of steps: one step
    more than other samplers take, from the timestep before. It then corrects a first step that was not listed twice,
    and falls a step behind; here such a run starts with as many predictions as it has, and no step is repeated. Steps
    are 1000 // n timesteps long, with the same caution about "linspace" as in DDIMSampler.
    """

    name, label = "plms", "PLMS"

    # Of the newest prediction, the one before, ...: Adams-Bashforth of orders 1 to 4 (eq. 12).
    WEIGHTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    in_order = True
    repeats = False  # whether the list of calls that strength leaves has the repeated one

    def __init__(self, generator=None, *, set_alpha_to_one=False, **schedule):
        super().__init__(generator, **schedule)
        self.final_alpha_bar = 1.0 if set_alpha_to_one else float(self.alphas_cumprod[0])

    def set_strength(self, strength=1.0):
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

    def get_coefficients(self):
        """(c_x, c_eps) of each call: the transfer part, eq. 11, which is DDIM's step."""
        stride = self.num_training_steps // self.num_inference_steps
        starts = list(self.timesteps)
        if self.repeats:
            starts[1:2] = [t + stride for t in starts[1:2]]  # the second call takes the first step again
        coefficients = []
        for t in starts:
            alpha_bar = self.alpha_bar(t)
            alpha_bar_prev = self.alpha_bar(t - stride) if t >= stride else self.final_alpha_bar
            c_x = sqrt(alpha_bar_prev / alpha_bar)
            coefficients.append((c_x, sqrt(1 - alpha_bar_prev) - c_x * sqrt(1 - alpha_bar)))
        return coefficients

    def step(self, timestep, latents, model_output):
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

    use_karras_sigmas: space σ as EDM's eq. 5 does, between the highest and the lowest σ of timestep_spacing.
    timestep_spacing: as for DDPMSampler, but "linspace" unless told otherwise, here and in the samplers below that are
    defined on σ: diffusers and k-diffusion start these at the last trained timestep, too.
    "linspace" spacing and Karras sigmas give fractional timesteps, which the model's time embedding takes as they are.
    """

    name, label = "euler", "Euler"

    def __init__(self, generator=None, *, use_karras_sigmas=False, timestep_spacing="linspace", **schedule):
        super().__init__(generator, timestep_spacing=timestep_spacing, **schedule)
        self.use_karras_sigmas = use_karras_sigmas
        self.training_sigmas = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def get_schedule(self):
        timesteps = space_timesteps(
            self.num_inference_steps, self.num_training_steps, self.timestep_spacing, self.steps_offset)
        sigmas = np.interp(timesteps, np.arange(self.num_training_steps), self.training_sigmas)
        if self.use_karras_sigmas:
            sigmas = space_karras_sigmas(self.num_inference_steps, sigmas[0], sigmas[-1])
            timesteps = self.timesteps_at(sigmas)
        return timesteps.tolist(), (1 / (1 + sigmas**2)).tolist() + [1.0]

    def timesteps_at(self, sigmas):
        """Fractional timesteps whose log σ, interpolated between the trained ones, is that of `sigmas`."""
        return np.interp(np.log(sigmas), np.log(self.training_sigmas), np.arange(self.num_training_steps))

    def get_sigmas(self):
        """σ at each step and at the end, where it is 0."""
        return [sqrt((1 - alpha_bar) / alpha_bar) for alpha_bar in self.levels]

    def get_coefficients(self):
        """Of x + (σ_next - σ) ε, in the scale of σ."""
        coefficients = []
        for sigma, sigma_next in pairwise(self.get_sigmas()):
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, (sigma_next - sigma) / scale, 0.0))
        return coefficients


class EulerAncestralSampler(EulerSampler):
    """Euler's method down to a lower σ than wanted, then fresh noise up to it (k-diffusion's "Euler a").

    σ_up is the standard deviation of DDPM's posterior: between equal levels this is DDPM's step.
    """

    name, label = "euler_a", "Euler a"

    def get_coefficients(self):
        """Of x + (σ_down - σ) ε + σ_up z, in the scale of σ, where σ_down² + σ_up² = σ_next²."""
        coefficients = []
        for sigma, sigma_next in pairwise(self.get_sigmas()):
            sigma_up = sigma_next * sqrt(sigma**2 - sigma_next**2) / sigma
            sigma_down = sqrt(sigma_next**2 - sigma_up**2)
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, (sigma_down - sigma) / scale, sigma_up / scale))
        return coefficients


class HeunSampler(EulerSampler):
    """Heun's method (EDM, algorithm 1): Euler's step, taken again with the mean ε of its two ends.

    n steps call the model 2n - 1 times, so every timestep but the first is listed twice: once to correct the step that
    led there, once to leave. The last step, to σ = 0, is Euler's, since no ε is to be had there.
    """

    name, label = "heun", "Heun"

    in_order = True

    def set_strength(self, strength=1.0):
        super().set_strength(strength)
        self.timesteps = self.timesteps[:1] + [t for t in self.timesteps[1:] for _ in range(2)]
        self.levels = self.levels[:1] + [alpha_bar for alpha_bar in self.levels[1:] for _ in range(2)]

    def step(self, timestep, latents, model_output):
        """As DDPMSampler.step."""
        i = self.index(timestep)
        c_x, c_eps, _ = self.coefficients[i // 2]
        if i % 2 == 0:
            self.start, self.start_eps = latents, model_output
            return c_x * latents + c_eps * model_output
        return c_x * self.start + c_eps / 2 * (self.start_eps + model_output)


class LMSSampler(EulerSampler):
    """Linear multistep on dx/dσ = ε (k-diffusion's "LMS"): Adams-Bashforth of order 4 for uneven steps.

    The cubic through the last four ε, as a function of σ, is integrated exactly; the first steps have fewer to go by.
    diffusers, whose run in the middle starts with the weights of a cubic but a single ε, was not followed there.
    """

    name, label = "lms", "LMS"

    in_order = True

    def get_coefficients(self):
        """(c_x, weights) of each step, the weights for the newest ε, the one before, and so on."""
        sigmas = self.get_sigmas()
        coefficients = []
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            # Distances from this σ keep the polynomials small.
            nodes = [past - sigma for past in sigmas[max(i - 3, 0):i + 1][::-1]]
            integrals = [integrate_lagrange(nodes, j, sigma_next - sigma) for j in range(len(nodes))]
            scale = sqrt(1 + sigma_next**2)
            coefficients.append((sqrt(1 + sigma**2) / scale, [integral / scale for integral in integrals]))
        return coefficients

    def step(self, timestep, latents, model_output):
        """As DDPMSampler.step."""
        i = self.index(timestep)
        self.history = [model_output, *self.history[:3]] if i > 0 else [model_output]
        c_x, weights = self.coefficients[i]
        return c_x * latents + weighted_sum(weights, self.history)


class DPMpp2MSampler(EulerSampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): a multistep method on the predicted x_0.

    Its first step, and the last, to σ = 0, are of first order (which is DDIM's step).

    Its timesteps are whole, and with "leading" and "linspace" spacing n of n + 1 are taken, without the lowest.
    use_karras_sigmas: as EulerSampler's, but between the σ of the last trained timestep and the first, with timesteps
    rounded, so that some at the end may be equal.
    """

    name, label = "dpmpp_2m", "DPM++ 2M"

    in_order = True
    stochastic = False

    def get_schedule(self):
        n = self.num_inference_steps
        if self.use_karras_sigmas:
            sigmas = space_karras_sigmas(n, self.training_sigmas[-1], self.training_sigmas[0])
            timesteps = self.timesteps_at(sigmas).round().astype(int)
        else:
            points = n if self.timestep_spacing == "trailing" else n + 1
            timesteps = space_timesteps(points, self.num_training_steps, self.timestep_spacing, self.steps_offset)
            timesteps = timesteps[:n].round().astype(int)
            sigmas = self.training_sigmas[timesteps]
        return timesteps.tolist(), (1 / (1 + sigmas**2)).tolist() + [1.0]

    def get_coefficients(self):
        """(a_x, a_eps), which give x_0, and (c_x, c_new, c_old, c_noise) of each step.

        The paper's λ = log(α/σ) is -log σ here, so e^-h = σ_next / σ. The SDE's solution has e^-2h in its place.
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

    def step(self, timestep, latents, model_output):
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
    """SDE-DPM-Solver++(2M) (same paper): DPMpp2MSampler on the diffusion SDE, so each step but the last adds noise."""

    name, label = "dpmpp_2m_sde", "DPM++ 2M SDE"

    stochastic = True


class LCMSampler(DDPMSampler):
    """Multistep latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3), for models made for it.

    Each step jumps to a clean picture and back to the next, lower noise level. Four steps do, with cfg_scale 1 to 2.
    original_inference_steps: the timesteps that the model was distilled at; n steps, at most as many, are picked from
    these, so timestep_spacing and steps_offset do not apply.
    timestep_scaling: how fast the boundary condition c_skip, c_out lets go of the latents as t rises from 0.
    """

    name, label = "lcm", "LCM"

    SIGMA_DATA = 0.5

    def __init__(self, generator=None, *, original_inference_steps=50, timestep_scaling=10.0, **schedule):
        super().__init__(generator, **schedule)
        original, most = original_inference_steps, self.num_training_steps
        if not isinstance(original, int) or not 1 <= original <= most:
            raise ValueError(f"original_inference_steps is {original!r}: give a whole number from 1 to {most}, say 50")
        self.original_inference_steps = original_inference_steps
        self.timestep_scaling = timestep_scaling

    def get_schedule(self):
        n, original = self.num_inference_steps, self.original_inference_steps
        if n > original:
            raise ValueError(f"num_inference_steps is {n}: LCM takes 1 to {original} (original_inference_steps)")
        picked = np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)
        timesteps = np.arange(original, 0, -1)[picked] * (self.num_training_steps // original) - 1
        return timesteps.tolist(), self.alphas_cumprod[timesteps].tolist() + [1.0]

    def get_coefficients(self):
        """Of x_prev = sqrt(ᾱ_prev) f + sqrt(1 - ᾱ_prev) z, with f = c_skip x + c_out x_0 (eq. 9)."""
        coefficients = []
        for t, (alpha_bar, alpha_bar_prev) in zip(self.timesteps, pairwise(self.levels)):
            scaled_t = self.timestep_scaling * t
            c_skip = self.SIGMA_DATA**2 / (scaled_t**2 + self.SIGMA_DATA**2)
            c_out = scaled_t / sqrt(scaled_t**2 + self.SIGMA_DATA**2)
            c_x = c_skip + c_out / sqrt(alpha_bar)
            c_eps = -c_out * sqrt((1 - alpha_bar) / alpha_bar)
            coefficients.append((sqrt(alpha_bar_prev) * c_x, sqrt(alpha_bar_prev) * c_eps, sqrt(1 - alpha_bar_prev)))
        return coefficients


def space_karras_sigmas(n, sigma_max, sigma_min, rho=7):
    """n noise levels from sigma_max down, evenly spaced in σ^(1/ρ): EDM, eq. 5. float64 array (n,)."""
    i = np.linspace(0, 1, n)
    return (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def integrate_lagrange(nodes, j, end):
    """The integral from 0 to `end` of the polynomial that is 1 at nodes[j] and 0 at the others."""
    others = nodes[:j] + nodes[j + 1:]
    polynomial = Polynomial.fromroots(others) if others else Polynomial([1.0])
    return float(polynomial.integ()(end) / polynomial(nodes[j]))


def weighted_sum(weights, tensors):
    """Of as many tensors as weights, all (batch, 4, h, w)."""
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


SAMPLERS = {sampler.name: sampler for sampler in (
    DDPMSampler, DDIMSampler, PLMSSampler, EulerSampler, EulerAncestralSampler, HeunSampler, LMSSampler, DPMpp2MSampler,
    DPMpp2MSDESampler, LCMSampler)}
