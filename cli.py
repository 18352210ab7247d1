"""Draws pictures from the command line.

    python cli.py "a red apple" --steps 25 --cfg-scale 4
"""

import argparse
import gc
import hashlib
import math
import secrets
import signal
import sys
import warnings
from pathlib import Path

# What is drawn with if neither the command line nor the picture of --like says so.
DEFAULTS = {"uncond_prompt": "", "strength": 0.8, "n_inference_steps": 50, "sampler_name": "ddpm", "clip_skip": 1,
            "cache_interval": 1}


def main():
    try:
        arguments = parse_arguments()  # before the imports of what draws, which take seconds
        # What only tells must never cost a picture: a console may lack letters, or somebody to read them.
        if sys.stdout:
            sys.stdout.reconfigure(errors="backslashreplace")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
        if arguments.words:
            tell_words(arguments)
        else:
            draw(arguments)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draws a picture from a prompt with Stable Diffusion 1.x.")
    add = parser.add_argument_group("what to draw").add_argument
    add("prompt", nargs="?", help="what to draw, in the web UIs' grammar: (word:1.3), [word], [before:after:0.5]")
    add("--uncond-prompt", help="what to stay away from (nothing)")
    add("--plain-prompt", action="store_true", default=None, help="take prompts to the letter, brackets and all")
    add("--like", metavar="PICTURE", help="draw with the settings in this picture's file; options beside it win")
    add("--input-image", help="a picture to start from, instead of noise alone")
    add("--strength", type=float, help="how much of the input picture to replace, in (0, 1] (0.8; with a mask 1)")
    add("--resize", choices=["crop", "pad", "stretch"], help="how the input picture gets the size (crop)")
    add("--mask", metavar="IMAGE", help="draw only what is white in this picture of the input picture's size anew")
    add("--outpaint", type=int, nargs=4, metavar=("L", "T", "R", "B"),
        help="draw so many pixels more to the left, at the top, to the right, at the bottom of the input picture")
    add("--control", nargs=2, action="append", default=[], metavar=("FILE", "IMAGE[:SCALE]"),
        help="lead the picture with a ControlNet; once for each")
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="change the model with a LoRA, a file or a name in data/loras/; once for each")
    add("--embedding", action="append", default=[], metavar="FILE[:NAME]",
        help="a word that prompts may use, beside those in data/embeddings/; once for each")
    add("--height", type=int, help="pixels, a multiple of 8 (what the checkpoint was made for)")
    add("--width", type=int, help="pixels, a multiple of 8 (what the checkpoint was made for)")
    add("--count", type=int, default=1, help="pictures to draw, with seeds one apart (%(default)s)")
    add("--seed", type=int, help="the same seed draws the same picture (a random one, which is printed)")
    add = parser.add_argument_group("how to draw").add_argument
    add("--steps", type=int, dest="n_inference_steps", help="denoising steps, 1 to 1000 (50)")
    add("--sampler", dest="sampler_name",
        help="ddpm, ddim, plms, euler, euler_a, heun, lms, dpmpp_2m, dpmpp_2m_sde, lcm, tcd or ddim_trailing (ddpm)")
    add("--schedule", choices=["karras"], help="noise levels as Karras et al. space them, for euler to dpmpp_2m_sde")
    add("--cfg-scale", type=float, help="guidance scale: how closely to follow the prompt (the checkpoint's own, 7.5)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="use guidance only between these noise levels sigma, of 0.03 to 14.6 (everywhere)")
    add("--clip-skip", type=int, help="encode the prompt with this layer of the text encoder, from the last, 1, on (1)")
    add("--cache-interval", type=int, help="compute the deep layers in every n-th step only (1)")
    add("--tile-size", type=int, help="decode in tiles of so many pixels, to save memory (at once)")
    add = parser.add_argument_group("with what").add_argument
    add("--checkpoint", help="a .ckpt or .safetensors file of SD 1.x, or a diffusers folder (the newest in data/)")
    add("--vae", help="a file or folder of another autoencoder")
    add("--tiny-vae", metavar="FILE", help="decode with a TAESD file: many times as fast, less fine")
    add("--ema", action="store_true", default=None, dest="use_ema", help="the moving average of the weights")
    add("--prediction", choices=["epsilon", "v"], help="what the UNet predicts, if the file does not say so (epsilon)")
    add("--device", help="cpu, cuda or mps (the fastest there is)")
    add("--dtype", help="auto, float32, float16 or bfloat16 (auto)")
    add("--compile", action="store_true", help="on CUDA, compile the networks first: pays over many pictures")
    add("--words", action="store_true", help="list the words that the model in the box knows, and stop")
    add = parser.add_argument_group("where to").add_argument
    add("--output", help="the file to write, a .png (output.png, or the next free name)")
    add("--overwrite", action="store_true", help="replace the output file if it exists")
    arguments = parser.parse_args()
    check(arguments)
    return arguments


def check(arguments):
    """Raises ValueError, in one line, for mistakes that show before anything is imported."""

    def require(condition, what):
        if not condition:
            raise ValueError(what)

    def within(name, low, high=math.inf, unit=1):
        value = getattr(arguments, name.replace("-", "_").replace("steps", "n_inference_steps"))
        fits = value is None or low <= value <= high and math.isfinite(value) and (unit == 1 or value % unit == 0)
        kind = f"a multiple of {unit}" if unit > 1 else "a number"
        require(fits, f"--{name} is {value}; give {kind} from {low} {'on' if high == math.inf else f'to {high}'}")

    for text in (arguments.prompt, arguments.uncond_prompt):
        is_whole = text is None or not any("\ud800" <= letter <= "\udfff" for letter in text)
        require(is_whole, f"the prompt {text!r:.80} cannot be decoded; give it in this terminal's encoding")
    require(arguments.prompt is not None or arguments.like or arguments.words,
            'no prompt: say what to draw, as in python cli.py "a red apple"')
    within("steps", 1, 1000)
    within("count", 1)
    within("cache-interval", 1)
    within("clip-skip", 1)
    within("height", 8, unit=8)
    within("width", 8, unit=8)
    within("tile-size", 64, unit=32)
    within("cfg-scale", -1000, 1000)
    within("seed", 0, 2**63 - arguments.count)
    require(arguments.strength is None or 0 < arguments.strength <= 1,
            f"--strength is {arguments.strength}; it must lie in (0, 1]")
    if arguments.plain_prompt:
        require(not arguments.embedding and arguments.clip_skip is None,
                "--plain-prompt takes prompts to the letter; leave out --embedding and --clip-skip, or it")
    for name in ("strength", "resize", "mask", "outpaint"):
        if getattr(arguments, name) is not None:
            require(arguments.input_image, f"--{name} needs a picture: name it with --input-image")
    require(not (arguments.mask and arguments.outpaint), "--mask and --outpaint are given; one picture, one of them")
    require(not arguments.outpaint or min(arguments.outpaint) >= 0,
            f"--outpaint is {arguments.outpaint}; give four numbers of pixels, from 0 on")
    low, high = arguments.guidance_interval or (0, 0)
    require(0 <= low <= high, f"--guidance-interval is {low:g} {high:g}; give two noise levels, the lower one first")
    require(arguments.output is None or arguments.output.lower().endswith(".png"),
            f"--output is {arguments.output!r}; pictures are written as PNG: give a name that ends in .png")


def say(text):
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # nobody reads on
        sys.stdout = None


def tell_words(arguments):
    import model_loader
    from checkpoint_file import read_checkpoint

    checkpoint = arguments.checkpoint or model_loader.find_checkpoint()
    words = read_checkpoint(checkpoint, mapped=True)[1].get("words")
    if not words:
        raise ValueError(f"{checkpoint} does not say which words it knows; the model in the box does")
    say(words)


def draw(arguments):
    """Draws `--count` pictures, and writes each to a file of its own."""
    gc.disable()  # imports and networks are made to stay; to look for garbage among them takes a tenth of a short run
    import model_loader
    from extensions.emphasis import plain_text
    from pipeline import tell_unknown_words

    settings = read_settings(arguments)
    paths = choose_paths(arguments)
    with reserve_all(paths, arguments.overwrite) as savers:
        checkpoint = arguments.checkpoint or model_loader.find_checkpoint()
        device = arguments.device or model_loader.best_device()
        models, embeddings = load(checkpoint, device, settings["dtype"], arguments, settings)
        gc.freeze()
        gc.enable()
        config = models["diffusion"].config
        if settings["cfg_scale"] is None:
            settings["cfg_scale"] = config.cfg_scale
        dtype = str(next(models["diffusion"].parameters()).dtype).removeprefix("torch.")
        weights = "averaged weights (EMA)" if settings["use_ema"] else "plain weights"
        say(f"checkpoint {checkpoint}, {weights}, device {device} ({dtype}), seed {settings['seed']}")
        text = settings["prompt"] if settings["plain_prompt"] else plain_text(settings["untagged_prompt"], embeddings)
        if told := tell_unknown_words(text, models["clip"].config.words):
            say(told)
        for k, save in enumerate(savers):
            seed = settings["seed"] + k
            try:
                image = draw_one(models, embeddings, arguments, settings, seed)
            except FloatingPointError as error:
                if dtype == "float32":
                    raise
                say(f"{error}: once more, in float32")
                dtype = "float32"
                models, embeddings = load(checkpoint, device, dtype, arguments, settings)
                image = draw_one(models, embeddings, arguments, settings, seed)
            told = describe(arguments, settings | {"seed": seed, "dtype": dtype, "model": Path(checkpoint).stem})
            say(f"wrote {save(image, told)}")


def choose_paths(arguments):
    """Returns the files to write: what --output says, numbered if there are several, or the next free names."""
    from itertools import islice

    from new_file import numbered

    if arguments.output is None:
        return list(islice((path for path in numbered(Path("output.png"))
                            if arguments.overwrite or not path.exists()), arguments.count))
    output = Path(arguments.output)
    if arguments.count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{k + 1}") for k in range(arguments.count)]


def reserve_all(paths, overwrite):
    """Makes the temporary files of all pictures before the first is drawn: a context of functions that save."""
    from contextlib import ExitStack, contextmanager

    from images import reserve

    @contextmanager
    def reserved():
        with ExitStack() as stack:
            try:
                yield [stack.enter_context(reserve(path, overwrite)) for path in paths]
            except FileExistsError as error:
                raise FileExistsError(f"{error}: name another with --output, or replace it with --overwrite") from None

    return reserved()


def read_settings(arguments):
    """Returns what to draw and how: what the command line says, then the picture of --like, then DEFAULTS."""
    from images import read_parameters
    from samplers import SAMPLERS, TAKE_KARRAS

    names = ("prompt", "uncond_prompt", "strength", "n_inference_steps", "sampler_name", "schedule", "cfg_scale",
             "seed", "height", "width", "clip_skip", "cache_interval", "tile_size", "guidance_interval", "use_ema",
             "prediction", "dtype", "plain_prompt")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    like = read_parameters(arguments.like) if arguments.like else {}
    if like.get("schedule", "").lower() in ("automatic", "uniform", "normal"):
        del like["schedule"]
    settings = DEFAULTS | {name: None for name in names if name not in DEFAULTS} | like | given
    if settings["schedule"]:
        settings["schedule"] = settings["schedule"].lower()
    settings["dtype"] = settings["dtype"] or "auto"
    if settings["seed"] is None:
        settings["seed"] = secrets.randbelow(2**32)

    if settings["sampler_name"] not in SAMPLERS:
        raise ValueError(f"--sampler is {settings['sampler_name']!r}; known are {', '.join(SAMPLERS)}")
    if settings["schedule"] == "karras" and settings["sampler_name"] not in TAKE_KARRAS:
        raise ValueError(f"--schedule is karras, which --sampler {settings['sampler_name']} does not take; euler does")
    if settings["schedule"] not in (None, "karras"):
        raise ValueError(f"{arguments.like} has the schedule {settings['schedule']!r}, which there is not here; give "
                         f"--schedule karras, or a picture that was drawn otherwise")
    left = [name for name in like if name not in (*names, "loras", "model", "Version", "input_image_hash", "mask_hash")]
    left += ["input picture (name it with --input-image)"] * ("input_image_hash" in like and not arguments.input_image)
    if left:
        say(f"of the settings in {arguments.like} these are not followed: {', '.join(left)}")
    if "model" in like:
        say(f"{arguments.like} was drawn with the model {like['model']}")
    return settings


def load(checkpoint, device, dtype, arguments, settings):
    """Returns the models with all that the command line hangs on them, and the embeddings, {name: vectors}."""
    import model_loader
    from extensions.assemble import load_with
    from extensions.textual_inversion import find_embeddings, load_embedding

    models, controlnets, of_loras = load_with(
        checkpoint, device, dtype, find_loras(arguments, settings), [file for file, _ in arguments.control],
        use_ema=bool(settings["use_ema"]), compile=arguments.compile, vae=arguments.vae,
        prediction=settings["prediction"])

    embeddings = find_embeddings(model_loader.ROOT / "data" / "embeddings")
    for text in arguments.embedding:
        path, _, name = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
        found, vectors = load_embedding(path)
        embeddings[name or found] = vectors
    embeddings |= of_loras
    if controlnets:
        from extensions.controlnet import Controlled

        pictures = [split_scale(text) for _, text in arguments.control]
        models["diffusion"] = Controlled(models["diffusion"], [
            (controlnet, image, scale) for controlnet, (image, scale) in zip(controlnets, pictures)])
    if settings["cache_interval"] != 1:
        from extensions.deep_cache import DeepCache

        models["diffusion"] = DeepCache(models["diffusion"], settings["cache_interval"])
    if arguments.tiny_vae:
        from extensions.tiny_vae import load_tiny_decoder

        models["decoder"] = load_tiny_decoder(arguments.tiny_vae, device, dtype)
    if settings["tile_size"]:
        from extensions.tiled import TiledDecoder, TiledEncoder

        models["decoder"] = TiledDecoder(models["decoder"], settings["tile_size"])
        models["encoder"] = TiledEncoder(models["encoder"], settings["tile_size"])
    return models, embeddings


def find_loras(arguments, settings):
    """Returns [(path, scale in the UNet, in the text encoder)] of --lora and the prompt's tags, which are taken out."""
    from extensions.lora import find_lora, parse_tags

    loras = [(find_lora(name), scale, scale) for name, scale in map(split_scale, arguments.lora)]
    if not settings["plain_prompt"]:
        settings["untagged_prompt"], tags = parse_tags(settings["prompt"])
        loras += [(find_lora(name), unet_scale, text_scale) for name, unet_scale, text_scale in tags]
    return loras


def split_scale(text):
    """"style.safetensors:0.6" -> ("style.safetensors", 0.6); 1 if there is no scale"""
    name, _, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if name else (text, 1.0)
    except ValueError:  # a colon of the name
        return text, 1.0


def draw_one(models, embeddings, arguments, settings, seed):
    from extensions.emphasis import encode_weighted
    from images import fit, native_size, open_image
    from pipeline import generate, own_schedule
    from samplers import SAMPLERS

    options = {name: settings[name] for name in ("n_inference_steps", "height", "width")}
    options |= {"models": models, "seed": seed, "cfg_scale": guidance(settings)}
    if settings["schedule"] == "karras":
        schedule = own_schedule(models["diffusion"].config)
        options["sampler"] = SAMPLERS[settings["sampler_name"]](use_karras_sigmas=True, **schedule)
    else:
        options["sampler_name"] = settings["sampler_name"]
    prompt, uncond_prompt = settings["prompt"], settings["uncond_prompt"]
    if settings["plain_prompt"]:
        warnings.filterwarnings("ignore", "the prompt holds")  # that it is taken to the letter is asked for
        options |= {"prompt": prompt, "uncond_prompt": uncond_prompt}
    else:
        from model_loader import default_tokenizer

        options["prompt"] = None
        options["context"] = encode_weighted([settings["untagged_prompt"]], [uncond_prompt], models["clip"],
                                             default_tokenizer(), embeddings, settings["clip_skip"])
    if not arguments.input_image:
        return generate(**options)
    image = open_image(arguments.input_image)
    if arguments.resize:
        height, width = native_size(image, models["diffusion"].config.sample_size)
        image = fit(image, settings["height"] or height, settings["width"] or width, arguments.resize)
    if not arguments.mask and not arguments.outpaint:
        return generate(input_image=image, strength=settings["strength"], **options)
    from extensions.inpaint import inpaint, outpaint

    options |= {"input_image": image, "strength": 1.0 if arguments.strength is None else arguments.strength}
    if arguments.mask:
        return inpaint(mask=open_image(arguments.mask), **options)
    return outpaint(**options, **dict(zip(("left", "top", "right", "bottom"), arguments.outpaint)))


def guidance(settings):
    """Returns the guidance scale: a number, or with --guidance-interval a function of sigma."""
    if not settings["guidance_interval"]:
        return settings["cfg_scale"]
    low, high = settings["guidance_interval"]
    return lambda sigma: settings["cfg_scale"] if low <= sigma <= high else 1.0


def describe(arguments, settings):
    """Returns all that changes the picture, for the text in its file."""
    settings = {name: value for name, value in settings.items() if name not in ("untagged_prompt", "loras", "height",
                                                                                "width", "plain_prompt")}
    settings["schedule"] = settings["schedule"] and settings["schedule"].capitalize()
    settings["clip_skip"] = settings["clip_skip"] if settings["clip_skip"] > 1 else None
    settings["cache_interval"] = settings["cache_interval"] if settings["cache_interval"] > 1 else None
    settings["use_ema"] = settings["use_ema"] or None
    settings["loras"] = [text if ":" in text else f"{text}:1" for text in arguments.lora]
    settings["strength"] = settings["strength"] if arguments.input_image else None
    settings["vae"] = arguments.vae and Path(arguments.vae).stem
    settings["Tiny VAE"] = arguments.tiny_vae and Path(arguments.tiny_vae).stem
    for name, path in [("input_image_hash", arguments.input_image), ("mask_hash", arguments.mask)]:
        settings[name] = path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:10]
    settings["Control"] = "; ".join(f"{Path(file).name} {image}" for file, image in arguments.control) or None
    settings["Embeddings"] = "; ".join(arguments.embedding) or None
    settings["Outpaint"] = arguments.outpaint and " ".join(map(str, arguments.outpaint))
    settings["Plain prompt"] = arguments.plain_prompt
    return settings


if __name__ == "__main__":
    main()
