"""Text to image and image to image with SD 1.x: `generate()`, and its parts, each of which can be called alone."""

import copy
import math
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import model_loader
from arguments import check_arguments, check_models
from ddpm import DDPMSampler, draw_noise, eps_from_v, rescale_guidance
from diffusion import get_guidance_embedding, get_time_embedding
from images import native_size, open_image, to_tensor, to_uint8
from samplers import SAMPLERS

SYNTAX = re.compile(r"[(\[]|\bBREAK\b|<\w+:[^>]+>")  # what web UIs read in prompts: emphasis, editing, tags

Context = Tensor | Callable[[int, int], Tensor]
Scale = float | Callable[[float], float]


@torch.no_grad()
def generate(prompt: str | list[str] | None = None, uncond_prompt: str | list[str] = "", input_image=None,
             strength: float = 0.8, do_cfg: bool = True, cfg_scale: Scale | None = None, sampler_name: str = "ddpm",
             n_inference_steps: int = 50, models: dict[str, nn.Module] | None = None, seed: int | None = None,
             device=None, idle_device=None, tokenizer=None, height: int | None = None, width: int | None = None,
             sampler: DDPMSampler | None = None, context: Context | None = None, latents: Tensor | None = None,
             callback: Callable | None = None, progress: bool = True) -> np.ndarray:
    """Draws a picture from a prompt, or from a prompt and a picture.

    Latent Diffusion Models (arXiv 2112.10752) with classifier-free guidance (arXiv 2207.12598); from a picture as in
    SDEdit (arXiv 2108.01073).

    Args:
        prompt: what to draw; a list of prompts draws one picture for each, in one batch.
        uncond_prompt: what guidance moves away from; one for all, or a list as long as the prompts'.
        input_image: a picture to start from, anything that `images.open_image` takes.
        strength: how much of the input image to replace, in (0, 1]: 1 keeps next to nothing of it.
        do_cfg: whether to use guidance; without it, cfg_scale and uncond_prompt have no effect.
        cfg_scale: guidance scale, as for `denoise`; None is the checkpoint's own, 7.5 for SD 1.5.
        sampler_name: a name in `samplers.SAMPLERS`.
        n_inference_steps: denoising steps, 1 to 1000.
        models: what `model_loader.preload_models_from_standard_weights` returns, or modules that are called like these
            and have their `config`; None loads the best checkpoint in data/, once a process.
        seed: a whole number; the same seed gives the same picture on every device, and picture k of a list is the one
            that seed + k gives alone. None draws a random one, or leaves it to the sampler's generator if it has one.
        device: where to compute; None is where the UNet is, or the fastest device if it is yet to be loaded.
        idle_device: where each network is put once it has served; None leaves it.
        tokenizer: what `model_loader.load_tokenizer` returns; None loads it, once a process.
        height, width: pixels, multiples of 8; None is the size that the checkpoint was made for, or its area in the
            proportions of the input image. An image of other proportions is cropped to fit; `images.fit` pads.
        sampler: a sampler object to use instead of sampler_name. It is copied; its `timesteps` are set to this call's.
        context: what `encode_prompts` returns, to be used instead of prompts, with any number of tokens; or a function
            context(step, n_steps), of a step's number from 0 and the number of steps, which returns it.
        latents: (pictures, 4, height / 8, width / 8) to start from, noised to the first timestep that strength leaves;
            pure noise wants strength 1.
        callback: as for `denoise`.
        progress: whether to show a bar.

    Returns:
        A uint8 array (height, width, 3); for a list of n prompts, or for n > 1 pictures, (n, height, width, 3).

    Raises:
        ValueError: an argument is out of range, or the tokenizer is not the text encoder's.
        FileNotFoundError: there is no such image, or no checkpoint in data/.
        FloatingPointError: the networks returned NaN or infinity.
    """
    prompts, uncond_prompts = check_arguments(prompt, uncond_prompt, input_image, strength, cfg_scale, sampler_name,
                                              seed, device, idle_device, height, width, sampler, context, latents)
    strength = 1.0 if input_image is None and latents is None else strength
    planned = plan(sampler or SAMPLERS[sampler_name](), n_inference_steps, strength)
    image = None if input_image is None else open_image(input_image)
    models = models or model_loader.default_models(str(device or model_loader.best_device()))
    clip, unet, decoder = check_models(models, image is not None)
    device = torch.device(device) if device else device_of(unet)
    if sampler is None and (schedule := own_schedule(unet.config)):
        planned = plan(SAMPLERS[sampler_name](**schedule), n_inference_steps, strength)

    # The prompts become a context: (pictures, tokens, d), with guidance followed by as many to stay away from.
    if context is None:
        with on_device(clip, device, idle_device):
            context = encode_prompts(prompts, uncond_prompts if do_cfg else [], clip,
                                     tokenizer or model_loader.default_tokenizer())
    n_pictures = count_pictures(prompts, context, latents, len(planned.timesteps), do_cfg)

    # The loop starts from noise, or from the picture's latents with as much noise as strength leaves to remove.
    if seed is not None or planned.generator is None:
        planned.generator = seed_generators(seed, n_pictures)
    if latents is None:
        height, width = choose_size(height, width, unet.config.sample_size, image)
        latents = draw_noise(planned.generator, (n_pictures, 4, height // 8, width // 8))
        if image is not None:
            pixels = to_tensor(image, height, width)  # (1, 3, height, width)
            with on_device(models["encoder"], device, idle_device) as encoder:
                latents = encoder(*to_network(encoder, device, pixels, latents)).float()
            latents = planned.add_noise(latents, planned.timesteps[0])

    with on_device(unet, device, idle_device):
        latents = denoise(unet, planned, latents.to(device), context,
                          unet.config.cfg_scale if cfg_scale is None else cfg_scale, callback, progress)
    with on_device(decoder, device, idle_device):
        images = decoder(*to_network(decoder, device, latents))  # (pictures, 3, height, width) in [-1, 1]
    if not images.isfinite().all():
        raise FloatingPointError(f"the decoder returned NaN or infinite pixels in {images.dtype}; try dtype float32")
    images = to_uint8(images)
    return images[0] if len(images) == 1 and not isinstance(prompt, (list, tuple)) else images


def denoise(diffusion: nn.Module, sampler: DDPMSampler, latents: Tensor, context: Context, cfg_scale: Scale = 7.5,
            callback: Callable | None = None, progress: bool = True) -> Tensor:
    """Walks latents back to a picture's, one timestep after the other.

    Guided where the context has twice the latents' rows: ε = ε_uncond + cfg_scale (ε_cond - ε_uncond), eq. 6 of
    arXiv 2207.12598 with cfg_scale = 1 + w.

    Args:
        diffusion: a `diffusion.Diffusion`, or what is called like one. If it has `for_run(sampler)`, what that returns
            is called instead: there lives what belongs to one run alone.
        sampler: planned, by `set_inference_timesteps` and `set_strength`.
        latents: (pictures, 4, h / 8, w / 8) float32 at the noise level of sampler.timesteps[0].
        context: (pictures or 2 * pictures, tokens, d), or a function of step and number of steps that returns it.
        cfg_scale: the guidance scale, or a function that returns it for a noise level sigma = sqrt((1 - ᾱ) / ᾱ),
            of 0.03 to 14.6; where it is 1, a step is unguided and half the work.
        callback: called after each step as callback(step, timestep, latents), steps counted from 0; returns None, or
            latents to go on with. There will be len(sampler.timesteps) calls.
        progress: whether to show a bar.

    Returns:
        (pictures, 4, h / 8, w / 8) float32, clean.
    """
    if hasattr(diffusion, "for_run"):
        diffusion = diffusion.for_run(sampler)
    n_steps = len(sampler.timesteps)
    for step, timestep in enumerate(show_progress(sampler.timesteps, progress)):
        step_context = context(step, n_steps) if callable(context) else context
        scale = cfg_scale(sigma_at(sampler, timestep)) if callable(cfg_scale) else cfg_scale
        eps = predict_noise(diffusion, sampler, latents, timestep, step_context, scale)
        latents = sampler.step(timestep, latents, eps)
        if callback:
            returned = callback(step, timestep, latents)
            latents = latents if returned is None else returned
        check_finite(latents, step, n_steps)
    return latents


def predict_noise(diffusion: nn.Module, sampler: DDPMSampler, latents: Tensor, timestep: float, context: Tensor,
                  cfg_scale: float) -> Tensor:
    """Returns the predicted noise ε, guided if the context has twice the latents' rows, in float32 as the latents."""
    n_pictures, config = len(latents), diffusion.config
    if len(context) not in (n_pictures, 2 * n_pictures):
        raise ValueError(f"context has {len(context)} rows for {n_pictures} pictures; give {n_pictures}, or with "
                         f"guidance {2 * n_pictures}")
    embedding = get_time_embedding(timestep, config.channels[0])
    if config.d_guidance:  # a model that was distilled with guidance is told its scale
        embedding = torch.cat([embedding, get_guidance_embedding(cfg_scale, config.d_guidance)], dim=1)
    if config.d_guidance or cfg_scale == 1:
        context = context[:n_pictures]

    output = diffusion(*to_network(diffusion, latents.device, latents, context, embedding)).float()
    if len(context) > n_pictures:
        cond, uncond = output.chunk(2)
        output = uncond + float(cfg_scale) * (cond - uncond)
        if config.guidance_rescale:
            output = rescale_guidance(output, cond, config.guidance_rescale)
    return eps_from_v(output, latents, sampler.alpha_bar(timestep)) if config.prediction == "v" else output


def encode_prompts(prompts: list[str], uncond_prompts: list[str], clip: nn.Module, tokenizer) -> Tensor:
    """Returns the context of some prompts, followed by that of what guidance is to stay away from.

    Args:
        prompts: one a picture.
        uncond_prompts: as many, or none to draw without guidance.
        clip: the text encoder.
        tokenizer: what `model_loader.load_tokenizer` returns.

    Returns:
        (len(prompts) + len(uncond_prompts), 77, 768) on the text encoder's device, in its dtype.
    """
    model_loader.check_tokenizer(tokenizer, clip.config.n_vocab)
    for text in [*prompts, *uncond_prompts]:
        if syntax := SYNTAX.search(text):
            warn(f"the prompt holds {syntax[0]!r}, which is taken to the letter here; encode_weighted in "
                 f"extensions/emphasis.py reads it as web UIs do")
    for text in prompts:
        if unknown := tell_unknown_words(text, clip.config.words):
            warn(unknown)
    tokens = tokenize([*prompts, *uncond_prompts], tokenizer, clip.config.n_tokens)
    return clip(tokens.to(device_of(clip)))


def tokenize(texts: Sequence[str], tokenizer, n_tokens: int = 77) -> Tensor:
    """Returns token ids (texts, n_tokens) int64, padded with the end token; warns of what did not fit."""
    rows = []
    for text, ids in zip(texts, tokenizer(list(texts), verbose=False).input_ids):
        end = ids[-1]
        if len(ids) > n_tokens:
            dropped = tokenizer.decode(ids[n_tokens - 1 : -1])
            warn(f"the prompt {text[:40]!r} has {len(ids)} tokens, the text encoder takes {n_tokens}: "
                 f"dropped {dropped!r}")
        ids = ids[:-1][: n_tokens - 1]
        rows.append(ids + [end] * (n_tokens - len(ids)))
    return torch.tensor(rows, device="cpu")


def tell_unknown_words(text: str, words: Sequence[str]) -> str:
    """Returns one line that names the words of a prompt that the model was not trained on; nothing if it knows all, or
    if its checkpoint does not say which words it knows."""
    asked = list(dict.fromkeys(split_words(text)))
    unknown = [word for word in asked if word not in words]
    if not words or not unknown:
        return ""
    known = [word for word in asked if word in words]
    rest = f"it draws {' '.join(known)!r}" if known else "it draws something"
    return f"the model in the box does not know: {', '.join(unknown)}; {rest}"


def split_words(text: str) -> list[str]:
    """Returns the words and numbers of a text in lower case, as `CLIPConfig.words` has them."""
    return re.findall(r"[^\W_]+", text.lower())


# ---- devices


@contextmanager
def on_device(network: nn.Module, device: torch.device, idle_device) -> Iterator[nn.Module]:
    """Has a network on the device within a `with` block, and on idle_device, if there is one, after it."""
    try:
        yield network.to(device)
    finally:
        if idle_device:
            network.to(idle_device)


def to_network(network: nn.Module, device: torch.device, *inputs: Tensor) -> list[Tensor]:
    """Returns floating point tensors on the device in the network's dtype; float32 if it has no weights of its own."""
    dtype = next((weight.dtype for weight in network.parameters()), torch.float32)
    return [x.to(device, dtype, non_blocking=True) for x in inputs]


def device_of(network: nn.Module) -> torch.device:
    """Returns where a network's weights are; the CPU if it has none of its own."""
    return next((weight.device for weight in network.parameters()), torch.device("cpu"))


# ---- what a call needs before it can begin


def plan(sampler: DDPMSampler, n_steps: int, strength: float) -> DDPMSampler:
    """Returns a copy of the sampler, planned for this run, so that one sampler can serve several calls at a time."""
    planned = copy.copy(sampler)
    try:
        planned.set_inference_timesteps(n_steps)
    except ValueError as error:  # in the words of `generate`
        raise ValueError(str(error).replace("num_inference_steps", "n_inference_steps")) from None
    planned.set_strength(strength)
    sampler.timesteps = planned.timesteps  # for a callback that wants to know how many there will be
    return planned


def own_schedule(config) -> dict:
    """Returns what a sampler has to be told of the noise schedule that a UNet, by its config, was trained with."""
    return {"rescale_zero_terminal_snr": True, "timestep_spacing": "trailing"} if config.zero_terminal_snr else {}


def seed_generators(seed: int | None, n_pictures: int) -> list[torch.Generator]:
    """One generator a picture, always on the CPU: a seed means the same picture on every device and in every batch."""
    seed = secrets.randbelow(2**32) if seed is None else int(seed)
    return [torch.Generator("cpu").manual_seed(seed + k) for k in range(n_pictures)]


def sigma_at(sampler: DDPMSampler, timestep: float) -> float:
    alpha_bar = sampler.alpha_bar(timestep)
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def choose_size(height: int | None, width: int | None, native: int, image) -> tuple[int, int]:
    """Returns height and width in pixels: what is asked for, else the checkpoint's own, in the image's proportions."""
    if image is not None and height is None and width is None:
        return native_size(image, native)
    return int(height or native), int(width or native)


def count_pictures(prompts: list[str], context: Context, latents: Tensor | None, n_steps: int, do_cfg: bool) -> int:
    """Returns how many pictures are asked for, by the latents, the prompts, or the rows of the context."""
    if latents is not None:
        return len(latents)
    if prompts:
        return len(prompts)
    n_rows = len(context(0, n_steps) if callable(context) else context)
    return n_rows // 2 if do_cfg else n_rows


def show_progress(timesteps: list, progress: bool) -> Iterator:
    """Yields the timesteps under tqdm's bar, and without it where it cannot be written: no picture is lost for a closed
    terminal."""
    bar = None
    cannot_write = suppress(OSError, ValueError, AttributeError)
    with cannot_write:
        bar = tqdm(total=len(timesteps), desc="denoising", unit="step", disable=not progress or sys.stderr is None)
    try:
        for timestep in timesteps:
            yield timestep
            with cannot_write:
                bar.update()
    finally:
        with cannot_write:
            bar.close()


def check_finite(latents: Tensor, step: int, n_steps: int) -> None:
    """Raises FloatingPointError for NaN and infinity. On a GPU only the last step is looked at, which has them if one
    before it had: looking waits for the GPU."""
    if (latents.device.type == "cpu" or step == n_steps - 1) and not latents.isfinite().all():
        raise FloatingPointError(f"the latents hold NaN or infinity after step {step} (from 0); try dtype float32, or "
                                 f"a lower cfg_scale")


def warn(message: str) -> None:
    """Warns, and points at the line that called into this file."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_code.co_filename.startswith((__file__, torch.__path__[0])):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
