"""Draws pictures from the command line.

    python cli.py "a red apple" --steps 25 --cfg-scale 4
"""

import argparse
import sys


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draws a picture from a prompt with Stable Diffusion 1.x.")
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("--uncond-prompt", default="", help="what to stay away from (default: nothing)")
    add("--input-image", help="a picture to start from, instead of noise alone")
    add("--strength", type=float, default=0.8, help="how much of the input picture to replace, in (0, 1] (%(default)s)")
    add("--cfg-scale", type=float, default=7.5, help="guidance scale: how closely to follow the prompt (%(default)s)")
    add("--steps", type=int, default=50, help="denoising steps, 1 to 1000 (%(default)s)")
    add("--sampler", default="ddpm", help="ddpm, ddim, plms, euler, euler_a, heun, lms, dpmpp_2m, dpmpp_2m_sde or lcm "
                                          "(%(default)s)")
    add("--seed", type=int, help="the same seed draws the same picture (default: a random one, which is printed)")
    add("--height", type=int, help="pixels, a multiple of 8 (default: what the checkpoint was made for)")
    add("--width", type=int, help="pixels, a multiple of 8 (default: what the checkpoint was made for)")
    add("--count", type=int, default=1, help="pictures to draw, with seeds one apart (%(default)s)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="use guidance only between these noise levels sigma, of 0.03 to 14.6 (default: everywhere)")
    add("--cache-interval", type=int, default=1, help="compute the deep layers in every n-th step only (%(default)s)")
    add("--tile-size", type=int, help="decode in tiles of so many pixels, to save memory (default: at once)")
    add("--checkpoint", help="a .ckpt or .safetensors file of SD 1.x (default: the best one in data/)")
    add("--device", help="cpu, cuda or mps (default: the fastest there is)")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (%(default)s)")
    add("--compile", action="store_true", help="on CUDA, compile the networks first: pays over many pictures")
    add("--output", default="output.png", help="the file to write, a .png (%(default)s)")
    add("--overwrite", action="store_true", help="replace the output file if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()  # before the imports below, which take seconds: --help and mistakes answer at once

import secrets
from pathlib import Path

import model_loader
from images import save_picture
from pipeline import generate
from samplers import SAMPLERS


def main(arguments):
    """The command line: draws `--count` pictures and writes each to a file of its own."""
    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output is {str(output)!r}; pictures are written as PNG: give a name that ends in .png")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {str(output)!r}, but there is no folder {output.parent}; make it first")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}; give a whole number from 1")
    paths = [output]
    if arguments.count > 1:
        paths = [output.with_stem(f"{output.stem}-{k + 1}") for k in range(arguments.count)]
    for path in paths:
        if path.exists() and not arguments.overwrite:
            raise FileExistsError(f"{path} exists already; name another with --output, or replace it with --overwrite")
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    settings = dict(uncond_prompt=arguments.uncond_prompt, input_image=arguments.input_image,
                    strength=arguments.strength, cfg_scale=arguments.cfg_scale, sampler_name=arguments.sampler,
                    n_inference_steps=arguments.steps, height=arguments.height, width=arguments.width)

    checkpoint = arguments.checkpoint or model_loader.find_checkpoint()
    device = arguments.device or model_loader.best_device()
    pack = model_loader.pays_to_pack(checkpoint, device, arguments.dtype)
    models = model_loader.preload_models_from_standard_weights(checkpoint, device, arguments.dtype, pack=pack,
                                                               compile=arguments.compile)
    dtype = next(models["diffusion"].parameters()).dtype
    print(f"checkpoint {checkpoint}, device {device} ({str(dtype).removeprefix('torch.')}), seed {seed}")
    models = with_savings(models, arguments)
    cfg_scale = guidance(arguments)
    for k, path in enumerate(paths):
        image = generate(arguments.prompt, models=models, seed=seed + k, device=device, **settings | {"cfg_scale": cfg_scale})
        parameters = describe(arguments.prompt, image, seed + k, checkpoint, settings)
        save_picture(image, path, parameters, arguments.overwrite)
        print(f"wrote {path}")


def with_savings(models, arguments):
    """Returns the models, wrapped in what `--cache-interval` and `--tile-size` ask for."""
    models = dict(models)
    if arguments.cache_interval != 1:
        from extensions.deep_cache import DeepCache
        models["diffusion"] = DeepCache(models["diffusion"], arguments.cache_interval)
    if arguments.tile_size is not None:
        from extensions.tiled import TiledDecoder, TiledEncoder
        models["decoder"] = TiledDecoder(models["decoder"], arguments.tile_size)
        models["encoder"] = TiledEncoder(models["encoder"], arguments.tile_size)
    return models


def guidance(arguments):
    """Returns the guidance scale: a number, or with `--guidance-interval` a function of sigma."""
    if arguments.guidance_interval is None:
        return arguments.cfg_scale
    low, high = arguments.guidance_interval
    if not 0 <= low <= high:
        raise ValueError(f"--guidance-interval is {low:g} {high:g}; give two noise levels, the lower one first")
    return lambda sigma: arguments.cfg_scale if low <= sigma <= high else 1.0


def describe(prompt, image, seed, checkpoint, settings):
    """Returns prompt, settings and seed in the text form that Stable Diffusion web UIs read back from a PNG file."""
    fields = {
        "Steps": settings["n_inference_steps"],
        "Sampler": SAMPLERS[settings["sampler_name"]].label,
        "CFG scale": settings["cfg_scale"],
        "Seed": seed,
        "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Model": Path(checkpoint).stem,
    }
    if settings["input_image"]:
        fields["Denoising strength"] = settings["strength"]
    lines = [prompt]
    if settings["uncond_prompt"]:
        lines.append(f"Negative prompt: {settings['uncond_prompt']}")
    return "\n".join(lines + [", ".join(f"{name}: {value}" for name, value in fields.items())])


if __name__ == "__main__":
    try:
        main(arguments)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
