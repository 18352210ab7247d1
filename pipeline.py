"""Text to image and image to image with SD 1.x: `generate()`."""

import math
import numbers
import secrets
import warnings

import torch
from tqdm import tqdm

import model_loader
from ddpm import draw_noise
from images import open_image, to_tensor, to_uint8
from samplers import SAMPLERS


@torch.no_grad()
def generate(prompt, uncond_prompt="", input_image=None, strength=0.8, do_cfg=True, cfg_scale=7.5, sampler_name="ddpm",
             n_inference_steps=50, models=None, seed=None, device=None, idle_device=None, tokenizer=None, height=None,
             width=None, sampler=None, callback=None, guidance_interval=None, cache_interval=1, tile_size=None):
    """Draws a picture from a prompt, or from a prompt and a picture.

    Latent Diffusion Models (arXiv 2112.10752) with classifier-free guidance (arXiv 2207.12598); from a picture as in
    SDEdit (arXiv 2108.01073).

    Args:
        prompt: what to draw; a list of prompts draws one picture for each, in one batch.
        uncond_prompt: what guidance moves away from; one for all, or a list as long as the prompts'.
        input_image: a PIL image, an array (uint8, uint16 or float in [0, 1]; (h, w) or (h, w, 1, 3 or 4)) or a path;
            resized to height and width.
        strength: how much of the input image to replace, in (0, 1]: 1 keeps next to nothing of it.
        do_cfg: whether to use guidance; without it, cfg_scale and uncond_prompt have no effect.
        cfg_scale: guidance scale; 1 is none, higher follows the prompt more closely.
        sampler_name: a name in `samplers.SAMPLERS`.
        n_inference_steps: denoising steps, 1 to 1000.
        models: what `model_loader.preload_models_from_standard_weights` returns; None loads the best checkpoint in
            data/, once a process.
        seed: a whole number; the same seed gives the same picture on every device, and picture k of a list is the one
            that seed + k gives alone. None draws a random one.
        device: where to compute; None is where the models are, or the fastest device if they are yet to be loaded.
        idle_device: where each network is put once it has served; None leaves it.
        tokenizer: what `model_loader.load_tokenizer` returns; None loads it, once a process.
        height, width: pixels, multiples of 8; None is the size that the checkpoint was made for.
        sampler: a sampler object to use instead of sampler_name; its generator is set to the pictures' own.
        callback: called after each step as callback(step, timestep, latents), steps counted from 0.
        guidance_interval: (low, high), the noise levels sigma = sqrt((1 - ᾱ) / ᾱ) between which guidance is used, out of
            0.03 to 14.6; beyond them a step does half the work (arXiv 2404.07724). None is everywhere.
        cache_interval: compute the deep layers of the UNet in every n-th step only, and reuse what they found in those
            between (DeepCache, arXiv 2312.00858). 1 computes them always.
        tile_size: decode in tiles of so many pixels a side, a multiple of 32, to save memory; None decodes at once.

    Returns:
        A uint8 array (height, width, 3); for a list of n prompts (n, height, width, 3).

    Raises:
        ValueError: an argument is out of range, or the tokenizer is not the text encoder's.
        FileNotFoundError: there is no such image, or no checkpoint in data/.
        FloatingPointError: the networks returned NaN or infinity.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    uncond_prompts = [uncond_prompt] * len(prompts) if isinstance(uncond_prompt, str) else list(uncond_prompt)
    check_arguments(prompts, uncond_prompts, strength, cfg_scale, sampler_name, n_inference_steps, seed, height, width)
    check_savings(guidance_interval, cache_interval, tile_size)
    image = None if input_image is None else open_image(input_image)

    if models is None:
        models = model_loader.default_models(str(device or model_loader.best_device()))
    if tokenizer is None:
        tokenizer = model_loader.default_tokenizer()
    for name in ["clip", "diffusion", "decoder"] + ["encoder"] * (image is not None):
        if name not in models:
            raise ValueError(f"models has no {name!r}, but {list(models)}; give what "
                             f"model_loader.preload_models_from_standard_weights returns")
    clip, diffusion = models["clip"], models["diffusion"]
    model_loader.check_tokenizer(tokenizer, clip.config.n_vocab)
    if diffusion.config.in_channels != 4:
        raise ValueError(f"this checkpoint's UNet takes {diffusion.config.in_channels} channels (an inpainting model "
                         f"takes 9); generate() needs one that takes 4")
    device = model_loader.check_device(device) if device else next(diffusion.parameters()).device
    dtype = next(diffusion.parameters()).dtype
    height, width = height or diffusion.config.sample_size, width or diffusion.config.sample_size

    def serve(network, *inputs):
        """Runs a network on the device and puts it away."""
        dtype = next(network.parameters()).dtype
        output = network.to(device)(*(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs))
        if idle_device:
            network.to(idle_device)
        return output

    texts = prompts + uncond_prompts if do_cfg else prompts
    context = serve(clip, tokenize(texts, tokenizer, clip.config.n_tokens)).to(dtype)  # (texts, 77, 768)

    # One generator a picture, always on the CPU: a seed means the same picture on every device and in every batch.
    seed = secrets.randbelow(2**32) if seed is None else seed
    generators = [torch.Generator().manual_seed(int(seed) + k) for k in range(len(prompts))]
    if sampler is None:
        sampler = SAMPLERS[sampler_name](generators)
    sampler.generator = generators
    sampler.set_inference_timesteps(int(n_inference_steps))

    latents_shape = (len(prompts), 4, height // 8, width // 8)
    latents = draw_noise(generators, latents_shape).to(device)
    if image is not None:
        sampler.set_strength(strength)
        latents = serve(models["encoder"], to_tensor(image, height, width), latents).float()
        latents = sampler.add_noise(latents, sampler.timesteps[0])

    diffusion.to(device)
    are_finite = []
    cache, was_guided = [], None
    for step, timestep in enumerate(tqdm(sampler.timesteps, desc="denoising", unit="step")):
        time_embedding = get_time_embedding(timestep, diffusion.config.channels[0])
        time_embedding = time_embedding.to(device, dtype, non_blocking=True)
        is_guided = do_cfg and (guidance_interval is None or is_within(guidance_interval, sampler.alpha_bar(timestep)))
        if step % cache_interval == 0 or is_guided != was_guided:
            cache.clear()
        was_guided = is_guided
        model_output = diffusion(latents.to(dtype), context if is_guided else context[: len(prompts)], time_embedding,
                                 cache if cache_interval > 1 else None).float()
        if is_guided:
            cond, uncond = model_output.chunk(2)
            model_output = uncond + cfg_scale * (cond - uncond)
        latents = sampler.step(timestep, latents, model_output)
        are_finite.append(latents.isfinite().all())
        if device.type == "cpu" and not are_finite[-1]:  # elsewhere, looking would wait for the device at each step
            break
        if callback:
            callback(step, timestep, latents)
    check_finite(are_finite, dtype)
    if idle_device:
        diffusion.to(idle_device)

    if tile_size:
        decoder = models["decoder"].to(device)
        images = decoder.decode_tiled(latents.to(next(decoder.parameters()).dtype), tile_size)
        if idle_device:
            decoder.to(idle_device)
    else:
        images = serve(models["decoder"], latents)
    if not images.isfinite().all():
        raise FloatingPointError(f"the decoder returned NaN or infinite pixels in {dtype}; try dtype float32")
    images = to_uint8(images)
    return images[0] if isinstance(prompt, str) else images


def get_time_embedding(timestep, width=320):
    """Returns the sinusoidal embedding of timesteps, cosines first (ldm/modules/diffusionmodules/util.py).

    Args:
        timestep: a number in [0, 1000), or a tensor of them (batch,).
        width: channels of the embedding: those of the UNet's first level.

    Returns:
        (1 or batch, width) float32
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1).cpu() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def tokenize(texts, tokenizer, n_tokens=77):
    """Returns token ids (texts, n_tokens) int64, padded with the end token; warns of what did not fit."""
    rows = []
    for text, ids in zip(texts, tokenizer(texts, verbose=False).input_ids):
        end = ids[-1]
        if len(ids) > n_tokens:
            dropped = tokenizer.decode(ids[n_tokens - 1 : -1])
            warnings.warn(f"the prompt has {len(ids)} tokens, the text encoder takes {n_tokens}: dropped {dropped!r}",
                          stacklevel=3)
        ids = ids[:-1][: n_tokens - 1]
        rows.append(ids + [end] * (n_tokens - len(ids)))
    return torch.tensor(rows)


def check_finite(are_finite, dtype):
    """Raises if the latents were not finite after a step; `are_finite` has a boolean tensor a step."""
    are_finite = torch.stack(are_finite).tolist()
    if not all(are_finite):
        raise FloatingPointError(f"the latents hold NaN or infinity after step {are_finite.index(False)} (from 0), in "
                                 f"{dtype}; try dtype float32, or a lower cfg_scale")


def check_arguments(prompts, uncond_prompts, strength, cfg_scale, sampler_name, n_inference_steps, seed, height, width):
    """Raises ValueError, in one line, for the first argument of `generate` that is out of range."""

    def require(condition, what):
        if not condition:
            raise ValueError(what)

    for name, texts in [("prompt", prompts), ("uncond_prompt", uncond_prompts)]:
        require(texts, f"{name} is an empty list; give at least one text")
        are_texts = all(isinstance(text, str) for text in texts)
        require(are_texts, f"{name} is {texts!r:.80}; give a text or a list of texts")
    require(len(prompts) == len(uncond_prompts), f"there are {len(prompts)} prompts but {len(uncond_prompts)} "
            f"uncond_prompts; give one for all, or as many as prompts")
    require(is_number(strength) and 0 < strength <= 1, f"strength is {strength!r}; it must lie in (0, 1]")
    require(is_number(cfg_scale) and math.isfinite(cfg_scale),
            f"cfg_scale is {cfg_scale!r}; give a finite number, such as 7.5")
    require(sampler_name in SAMPLERS, f"sampler_name is {sampler_name!r}; known are {', '.join(SAMPLERS)}")
    require(is_whole(n_inference_steps) and 1 <= n_inference_steps <= 1000,
            f"n_inference_steps is {n_inference_steps!r}; give a whole number from 1 to 1000")
    require(seed is None or is_whole(seed) and 0 <= seed < 2**63,
            f"seed is {seed!r}; give a whole number from 0 to 2**63 - 1")
    for name, size in [("height", height), ("width", width)]:
        require(size is None or is_whole(size) and size > 0 and size % 8 == 0,
                f"{name} is {size!r}; give a positive multiple of 8")


def check_savings(guidance_interval, cache_interval, tile_size):
    """Raises ValueError, in one line, for the first argument of `generate` that saves work and is out of range."""
    if guidance_interval is not None:
        try:
            low, high = guidance_interval
        except (TypeError, ValueError):
            low = high = None
        if not (is_number(low) and is_number(high) and 0 <= low <= high):
            raise ValueError(f"guidance_interval is {guidance_interval!r}; give two noise levels (low, high), such as "
                             f"(0.3, 5.0), or None")
    if not (is_whole(cache_interval) and cache_interval >= 1):
        raise ValueError(f"cache_interval is {cache_interval!r}; give a whole number from 1 (no caching)")
    if tile_size is not None and not (is_whole(tile_size) and tile_size >= 64 and tile_size % 32 == 0):
        raise ValueError(f"tile_size is {tile_size!r}; give a multiple of 32 from 64, or None")


def is_within(interval, alpha_bar):
    """Whether the noise level sigma of this ᾱ lies in the interval (low, high)."""
    low, high = interval
    return low <= math.sqrt((1 - alpha_bar) / alpha_bar) <= high


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
