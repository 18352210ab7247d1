"""Inpainting and outpainting: a part of a picture is drawn anew, or more of it round it; the rest comes back as it was.

    inpaint("a cat on a bench", "bench.png", "mask.png")
    outpaint("a bench in a park", "bench.png", left=128, right=128)

After each step of a common model, what stays is put back with that step's noise (RePaint, arXiv 2201.09865, eq. 8).
A model made for it, with 9 channels, sees mask and masked picture beside the noisy latents (runwayml/stable-diffusion,
LatentInpaintDiffusion). Noise is drawn in the order of diffusers' pipeline.
"""

import inspect
from dataclasses import replace
from math import sqrt

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn

import model_loader
from arguments import check_arguments, is_whole
from ddpm import draw_noise
from images import as_image, fit, native_size, open_image, to_tensor
from pipeline import count_pictures, device_of, generate, on_device, plan, seed_generators, to_network
from samplers import SAMPLERS


@torch.no_grad()
def inpaint(prompt, input_image, mask, strength: float = 1.0, blur: int = 0, only_masked: bool = False,
            padding: int = 32, fill: str = "original", **of_generate) -> np.ndarray:
    """Draws the masked part of a picture anew; all other pixels come back byte for byte.

    Args:
        prompt, input_image, strength: as for `generate`.
        mask: a picture of the same size, white where it is drawn anew (if parts of it are transparent: where it is
            not); an array or tensor may also be bool, or uint8 of 0 and 1.
        blur: over how many pixels inside the mask the new passes into the old.
        only_masked: whether to draw the mask and its surroundings alone, enlarged.
        padding: pixels of surroundings on each side.
        fill: what the masked part starts from: "original", what was there (with strength 1 nothing but noise); "fill",
            the colours round it; "noise" or "nothing", in the latents.
        of_generate: what else `generate` takes, but latents. height and width are those at which the picture is drawn,
            before it gets its own size again; without them it is drawn at the area that the model was made for.

    Returns:
        uint8 (h, w, 3) in the picture's size; for a list of n prompts (n, h, w, 3).

    Raises:
        As `generate`; ValueError for a mask of another size.
    """
    bound = inspect.signature(generate).bind(prompt, strength=strength, **of_generate)
    bound.apply_defaults()
    given = bound.arguments
    prompts, _ = check_arguments(**{name: given[name] for name in inspect.signature(check_arguments).parameters})
    fill = check_inpainting(blur, padding, fill, given["latents"])
    image = open_image(input_image)
    mask = open_mask(mask, image.size)
    models = given["models"] = load_models(given["models"], given["device"])
    sampler = given["sampler"] = plan(given["sampler"] or SAMPLERS[given["sampler_name"]](), given["n_inference_steps"],
                                      strength)
    n_pictures = count_pictures(prompts, given["context"], None, len(sampler.timesteps), given["do_cfg"])
    if given["seed"] is not None or sampler.generator is None:
        sampler.generator = seed_generators(given["seed"], n_pictures)

    # All of the picture or a part of it is drawn, in the size that suits the model.
    box = find_box(mask, padding, given["height"], given["width"]) if only_masked else (0, 0, *image.size)
    part, part_mask = image.crop(box), mask.crop(box)
    height, width = native_size(part, models["diffusion"].config.sample_size)
    height, width = given["height"] or height, given["width"] or width
    part, part_mask = fit(part, height, width, "stretch"), fit(part_mask, height, width, "stretch")
    drawn = generate(**given | prepare(part, part_mask, fill, n_pictures, given))  # (height, width, 3), or n of these

    alpha, pictures = feather(mask, blur), []
    for one in drawn.reshape(-1, height, width, 3):
        new = image.copy()
        new.paste(fit(Image.fromarray(one), box[3] - box[1], box[2] - box[0], "stretch"), box[:2])
        pictures.append(np.asarray(Image.composite(new, image, alpha)))
    return np.stack(pictures).reshape(*drawn.shape[:-3], image.height, image.width, 3)


def prepare(image: Image.Image, mask: Image.Image, fill: str, n_pictures: int, given: dict) -> dict:
    """Returns the arguments of `generate`, beside those given to it, that draw the masked part of a picture."""
    models, sampler, callback = given["models"], given["sampler"], given["callback"]
    unet = models["diffusion"]
    device = torch.device(given["device"]) if given["device"] else device_of(unet)
    pixels = to_tensor(image, image.height, image.width).to(device)  # (1, 3, height, width) in [-1, 1]
    hidden = torch.from_numpy(np.asarray(mask) > 127).to(device)[None, None]  # (1, 1, height, width)
    cells = hidden[:, :, ::8, ::8]  # (1, 1, height / 8, width / 8): the first pixel counts, as in the original

    def draw() -> Tensor:
        return draw_noise(sampler.generator, (n_pictures, 4, *cells.shape[2:])).to(device)

    def encode(pixels: Tensor) -> Tensor:
        with on_device(models["encoder"], device, given["idle_device"]) as encoder:
            return encoder(*to_network(encoder, device, pixels, draw())).float()

    from_noise, is_made_for_it = given["strength"] == 1 and fill == "original", unet.config.in_channels == 9
    picture = None
    if not (from_noise and is_made_for_it):
        filled = fill_from_around(image, mask) if fill == "fill" else image
        picture = encode(to_tensor(filled, image.height, image.width))
    noise = draw()
    if is_made_for_it:
        beside = cells.float().expand(n_pictures, -1, -1, -1), encode(pixels * ~hidden)  # mid grey under the mask
        unet = Inpainting(unet, torch.cat(beside, dim=1))
    else:
        draw()  # diffusers encodes the masked picture for every model
    if fill in ("noise", "nothing"):
        picture = torch.where(cells, draw() if fill == "noise" else 0.0, picture)

    def keep_the_rest(step: int, timestep: float, latents: Tensor) -> Tensor:
        latents = torch.where(cells, latents, add_noise(picture, noise, sampler.levels[step + 1]))
        returned = callback(step, timestep, latents) if callback else None
        return latents if returned is None else returned

    return {"latents": noise if from_noise else add_noise(picture, noise, sampler.levels[0]),
            "models": {**models, "diffusion": unet}, "callback": callback if is_made_for_it else keep_the_rest,
            "seed": None, "height": None, "width": None}  # the noise goes on from what was drawn here


def outpaint(prompt, input_image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0,
             **of_generate) -> np.ndarray:
    """Draws so many pixels more on each side of a picture; its own come back byte for byte.

    Args:
        of_generate: what else `inpaint` takes. Unless told otherwise, the new parts start from the colours at the
            picture's edge ("fill"), and the picture is drawn at the area that the model was made for, the rest
            beside it.

    Returns:
        uint8 (top + h + bottom, left + w + right, 3); for a list of n prompts (n, …).

    Raises:
        As `inpaint`.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if not all(is_whole(n) and n >= 0 for n in sides.values()) or not any(sides.values()):
        raise ValueError(f"the sides are {sides}; give whole numbers of pixels, one of them above 0")
    image = open_image(input_image)
    canvas = ImageOps.expand(image, (left, top, right, bottom))
    mask = ImageOps.expand(Image.new("L", image.size, 0), (left, top, right, bottom), fill=255)
    models = load_models(of_generate.get("models"), of_generate.get("device"))
    scale = sqrt(canvas.width * canvas.height / (image.width * image.height))
    height, width = native_size(canvas, models["diffusion"].config.sample_size * scale)
    settings = {"fill": "fill", "height": height, "width": width} | of_generate | {"models": models}
    return inpaint(prompt, canvas, mask, **settings)


class Inpainting(nn.Module):
    """A UNet of 9 channels that is called like one of 4: beside the latents it sees what to draw and what is there.

    Args:
        diffusion: the UNet.
        beside: (pictures, 5, h / 8, w / 8), the mask (1: drawn anew), then the latents of the picture with mid grey
            under the mask.
    """

    def __init__(self, diffusion: nn.Module, beside: Tensor):
        super().__init__()
        self.diffusion, self.beside = diffusion, beside
        self.config = replace(diffusion.config, in_channels=4)

    def for_run(self, sampler) -> "Inpainting":
        return Inpainting(self.diffusion.for_run(sampler), self.beside) if hasattr(self.diffusion, "for_run") else self

    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor) -> Tensor:
        return self.diffusion(torch.cat([latents, self.beside.to(latents)], dim=1), context, time_embedding)


def load_models(models, device):
    return models or model_loader.default_models(str(device or model_loader.best_device()))


def check_inpainting(blur, padding, fill, latents):
    """Returns fill without web UIs' "latent"; raises ValueError, in one line, for what `inpaint` cannot do."""
    for name, value in [("blur", blur), ("padding", padding)]:
        if not (is_whole(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; give a whole number of pixels, from 0")
    if str(fill).removeprefix("latent ") not in ("original", "fill", "noise", "nothing"):
        raise ValueError(f"fill is {fill!r}; give original, fill, noise or nothing")
    if latents is not None:
        raise ValueError("latents cannot be given; they are made of the picture")
    return fill.removeprefix("latent ")


def open_mask(mask, size: tuple[int, int]) -> Image.Image:
    """Returns a mask in grey, white where the picture is drawn anew."""
    if isinstance(mask, Tensor):
        mask = mask.detach().float().cpu().numpy() if mask.is_floating_point() else mask.cpu().numpy()
    if isinstance(mask, np.ndarray) and mask.dtype in (bool, np.uint8) and mask.max(initial=0) <= 1:
        mask = mask * np.uint8(255)
    name, mask = as_image(mask, "mask")
    if mask.has_transparency_data:
        alpha = ImageOps.exif_transpose(mask).convert("RGBA").getchannel("A")
        mask = alpha if alpha.getextrema()[0] < 255 else mask
    mask = open_image(mask, name).convert("L")
    if mask.size != size:
        raise ValueError(f"{name} is {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}; give a mask "
                         f"of its size")
    return mask


def find_box(mask: Image.Image, padding: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a mask and its surroundings, in the proportions of height and width."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, right = max(left - padding, 0), min(right + padding, mask.width)
    top, bottom = max(top - padding, 0), min(bottom + padding, mask.height)
    if height and width:
        left, right = widen(left, right, (bottom - top) * width / height, mask.width)
        top, bottom = widen(top, bottom, (right - left) * height / width, mask.height)
    return left, top, right, bottom


def widen(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """Returns a span of about this length round another one, from 0 to a limit."""
    more = max(int(length - (high - low)), 0)
    length = high - low + more
    low = max(min(low - more // 2, limit - length), 0)
    return low, min(low + length, limit)


def fill_from_around(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns a picture whose masked part has the colours round it, the blurrier the farther in."""
    known = image.copy()
    known.putalpha(ImageOps.invert(mask))
    weighted = known.convert("RGBa")
    average = weighted.resize((1, 1), Image.Resampling.BOX).convert("RGBA").convert("RGB")
    filled = average.resize(image.size).convert("RGBA")
    for radius in (64, 16, 4):
        filled.alpha_composite(weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    filled.alpha_composite(known)
    return filled.convert("RGB")


def feather(mask: Image.Image, blur: int) -> Image.Image:
    """Returns a mask that rises from its edge inwards, over so many pixels."""
    total = np.asarray(mask, np.float32)
    for _ in range(blur):
        mask = mask.filter(ImageFilter.MinFilter(3))  # one pixel smaller
        total = total + np.asarray(mask)
    return Image.fromarray((total / (blur + 1)).round().astype(np.uint8))


def add_noise(picture: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    return sqrt(alpha_bar) * picture + sqrt(1 - alpha_bar) * noise
