"""What `pipeline.generate` may be given: each mistake is told in one line, before anything is loaded."""

import math
import numbers

from torch import Tensor, nn

import model_loader
from samplers import SAMPLERS


def check_arguments(prompt, uncond_prompt, input_image, strength, cfg_scale, sampler_name, seed, device, idle_device,
                    height, width, sampler, context, latents) -> tuple[list[str], list[str]]:
    """Returns prompts and uncond_prompts as lists; raises ValueError, in one line, for what `generate` cannot do.

    Step counts and what strength makes of them are the sampler's to check.
    """

    def require(condition, what):
        if not condition:
            raise ValueError(what)

    require(prompt is not None or context is not None, "prompt is None; give a text, a list of texts, or a context")
    prompts = as_texts("prompt", [] if prompt is None else prompt, may_be_empty=context is not None)
    uncond_prompts = as_texts("uncond_prompt", [uncond_prompt] * len(prompts) if isinstance(uncond_prompt, str)
                              else uncond_prompt, may_be_empty=not prompts)
    require(len(prompts) == len(uncond_prompts) or not prompts, f"there are {len(prompts)} prompts but "
            f"{len(uncond_prompts)} uncond_prompts; give one for all, or as many as prompts")
    require(is_number(strength) and 0 < strength <= 1, f"strength is {strength!r}; it must lie in (0, 1]")
    require(cfg_scale is None or callable(cfg_scale) or is_number(cfg_scale) and math.isfinite(cfg_scale),
            f"cfg_scale is {cfg_scale!r}; give a finite number, such as 7.5, or a function of sigma")
    require(sampler is None or hasattr(sampler, "set_inference_timesteps"),
            f"sampler is {sampler!r}; give an object such as samplers.DDIMSampler(), or its name as sampler_name")
    require(isinstance(sampler_name, str) and sampler_name in SAMPLERS,
            f"sampler_name is {sampler_name!r}; known are {', '.join(SAMPLERS)}")
    require(seed is None or is_whole(seed) and 0 <= seed <= 2**63 - max(len(prompts), 1),
            f"seed is {seed!r}; give a whole number from 0 to 2**63 - 1")
    for name, size in [("height", height), ("width", width)]:
        require(size is None or is_whole(size) and size > 0 and size % 8 == 0,
                f"{name} is {size!r}; give a positive multiple of 8")
    if latents is not None:
        is_batch = isinstance(latents, Tensor) and latents.ndim == 4 and latents.shape[1] == 4
        require(is_batch, f"latents is {getattr(latents, 'shape', latents)!r:.80}; give a tensor (pictures, 4, "
                f"height / 8, width / 8)")
        require(input_image is None, "latents and input_image are given; the loop starts from one of them")
        size = tuple(8 * n for n in latents.shape[2:])
        require((height or size[0], width or size[1]) == size,
                f"height and width are {height} and {width}, the latents are for {size[0]} and {size[1]}; "
                f"leave them out")
        require(not prompts or len(prompts) == len(latents),
                f"there are {len(prompts)} prompts for {len(latents)} latents; give as many")
    for place in (device, idle_device):
        if place is not None and str(place) != "meta":
            model_loader.check_device(place)
    return prompts, uncond_prompts


def check_models(models: dict[str, nn.Module], needs_encoder: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns text encoder, UNet and decoder; raises ValueError for one that is missing or does not fit the others."""
    needed = ["clip", "diffusion", "decoder", "encoder"] if needs_encoder else ["clip", "diffusion", "decoder"]
    for name in needed:
        if name not in models:
            raise ValueError(f"models has no {name!r}, but {list(models)}; give what "
                             f"model_loader.preload_models_from_standard_weights returns")
    clip, unet, decoder = models["clip"], models["diffusion"], models["decoder"]
    if unet.config.in_channels != 4:
        raise ValueError(f"this checkpoint's UNet takes {unet.config.in_channels} channels (an inpainting model takes "
                         f"9), generate() needs one that takes 4; extensions/inpaint.py draws with the others")
    if clip.config.d_embed != unet.config.d_context:
        raise ValueError(f"the text encoder's tokens have {clip.config.d_embed} channels, the UNet takes "
                         f"{unet.config.d_context}; give networks of one checkpoint")
    return clip, unet, decoder


def as_texts(name: str, texts, may_be_empty: bool) -> list[str]:
    """Returns a text or several as a list; raises ValueError for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {texts!r:.80}; give a text or a list of texts")
    if not texts and not may_be_empty:
        raise ValueError(f"{name} is an empty list; give at least one text")
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} is {text!r:.80}, which has half a letter (a lone surrogate); give whole text")
    return list(texts)


def is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
