"""What the commands that teach a model something share: options, checks, models, and what is computed once."""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save

import model_loader
from model_loader import DTYPES, ROOT, best_device, check_device
from new_file import new_file
from pipeline import encode_prompts, generate
from training import loop, pictures

RUNS = ROOT / "training" / "runs"
SAMPLES = 4  # pictures on a sheet where no prompts are named

# What may change between a run and its continuation.
FREE = ("steps", "save_every", "sample_every", "sample_prompt", "sample_cfg_scale", "output", "run", "device")


def make_parser(description, output, steps, learning_rate, name="--name"):
    """Returns a parser with the options that all of the commands have."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="pictures with captions: x.png and x.txt, or metadata.jsonl")
    add(name, required=True, dest="name", metavar="NAME", help="what it is to be called")
    add("--checkpoint", type=Path, help="the model: a file of SD 1.x or a diffusers folder (the newest in data/)")
    add("--output", type=Path, default=ROOT / "data" / output, metavar="FOLDER",
        help=f"where the result goes (data/{output})")
    add("--resolution", type=int, metavar="PIXELS", help="a side, a multiple of 8 (what the model was made for)")
    add("--steps", type=int, default=steps, help="in all: a run goes on where it was stopped (%(default)s)")
    add("--batch", type=int, default=4, help="pictures at a time (%(default)s)")
    add("--accumulate", type=int, default=1, help="batches a step (%(default)s)")
    add("--learning-rate", type=float, default=learning_rate, help="(%(default)s)")
    add("--snr-gamma", type=float, help="bounds the weight of little noise, as min-SNR has it; 5 is usual")
    add("--device", help="cpu, cuda or mps (the fastest there is)")
    add("--dtype", choices=DTYPES, help="to compute in (on CUDA bfloat16, or float16 where it has none; else float32)")
    add("--gradient-checkpointing", action="store_true", help="take a third more time and much less memory")
    add("--sample-every", type=int, default=100, metavar="STEPS", help="how often to draw a sheet (%(default)s)")
    add("--sample-prompt", action="append", metavar="TEXT", help="what to draw on it (captions); may be repeated")
    add("--sample-cfg-scale", type=float, metavar="SCALE", help="how closely to follow prompts on it (the model's own)")
    add("--run", type=Path, metavar="FOLDER", help="where log, sheets and what it takes to go on lie (training/runs/…)")
    add("--save-every", type=int, default=100, metavar="STEPS", help="how often to save the run (%(default)s)")
    return parser


def check(arguments):
    """Raises ValueError or FileNotFoundError for options that cannot be right."""
    for option, value in vars(arguments).items():
        flag = f"--{option.replace('_', '-')}"
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and option != "conv_rank":
            raise ValueError(f"{flag} is {value}; give a number from 1 on")
        if isinstance(value, float) and not 0 < value < math.inf and option != "empty_prompts":
            raise ValueError(f"{flag} is {value}; give a number above 0")
    if arguments.resolution and arguments.resolution % 8:
        raise ValueError(f"--resolution is {arguments.resolution}; give a multiple of 8, such as 512")
    if arguments.checkpoint and not arguments.checkpoint.exists():
        raise FileNotFoundError(f"{arguments.checkpoint}: no such file or folder; name a model of SD 1.x")
    if not all(prompt.strip() for prompt in arguments.sample_prompt or []):
        raise ValueError("--sample-prompt is empty; say what to draw")
    check_device(arguments.device or "cpu")


def begin(kind, arguments, stem):
    """Returns the path of the result, and the folder of the run, in which it goes on if it was stopped.

    Raises:
        FileExistsError: there is such a result.
        ValueError: no file can have this name, or a run with other options goes by it.
    """
    if not re.fullmatch(r"\w[\w.-]*", stem):
        raise ValueError(f"the name is {stem!r}; give one of letters, digits, '_', '-' and '.'")
    result, run = arguments.output / f"{stem}.safetensors", arguments.run or RUNS / f"{kind}-{stem}"
    if result.exists():
        raise FileExistsError(f"{result}: exists already; give another name, or move it away")
    options = {key: str(value) for key, value in vars(arguments).items() if key not in FREE}
    options["folder"] = str(arguments.folder.resolve())
    known = run / "options.json"
    if known.exists() and (run / f"{kind}.pt").exists():
        before = json.loads(known.read_text(encoding="utf-8"))
        changed = [key for key in before | options if before.get(key) != options.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(f"{run}: was begun with {key} {before.get(key)}, and now {key} is {options.get(key)}; "
                             f"repeat its options to go on, give another name, or move it away")
    result.parent.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(options, indent=1), encoding="utf-8")
    return result, run


class Lesson:
    """What stays the same while something is learnt: the models, and what they make of the pictures.

    Args:
        arguments: of the command line.
        examples: what `pictures.read_folder` returns.
    """

    def __init__(self, arguments, examples):
        self.device = check_device(arguments.device or best_device())
        self.dtype = DTYPES.get(arguments.dtype, torch.float32)
        if arguments.dtype is None and self.device.type == "cuda":
            self.dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self.examples, self.cfg_scale = examples, arguments.sample_cfg_scale
        self.path = arguments.checkpoint or model_loader.find_checkpoint()
        self.tokenizer = model_loader.load_tokenizer()
        self.models = load_frozen(self.path)
        self.unet, self.clip = self.models["diffusion"], self.models["clip"]
        self.size = arguments.resolution or self.unet.config.sample_size
        self.noise_loss = loop.NoiseLoss(self.unet.config, arguments.snr_gamma)
        self.latents = pictures.encode_pictures(examples, self.models["encoder"].to(self.device), self.size)
        self.models["encoder"].to("cpu")
        for name in ("clip", "diffusion", "decoder"):
            self.models[name].to(self.device, self.dtype)
        if arguments.gradient_checkpointing:
            loop.checkpoint_gradients(self.unet)

    @torch.no_grad()
    def encode(self, captions):
        """The context of each caption, (captions, 77, d); the same ones are encoded once."""
        unique = sorted(set(captions))
        contexts = encode_prompts(unique, [], self.clip, self.tokenizer)
        return contexts[[unique.index(caption) for caption in captions]]

    def pick(self, batch, generator):
        """Numbers of examples, at random."""
        return torch.randint(len(self.examples), (batch,), generator=generator).tolist()

    def sample_prompts(self, arguments):
        captions = dict.fromkeys(example.caption for example in self.examples)
        return arguments.sample_prompt or list(captions)[:SAMPLES]

    def draw(self, prompts=None, models=None, **settings):
        """Pictures (n, size, size, 3) uint8, of the same seeds each time."""
        return generate(prompts, models=models or self.models, tokenizer=self.tokenizer, seed=42, device=self.device,
                        sampler_name="dpmpp_2m", n_inference_steps=20, height=self.size, width=self.size,
                        cfg_scale=self.cfg_scale, progress=False, **settings).reshape(-1, self.size, self.size, 3)

    def settings(self, arguments):
        return loop.Settings(
            steps=arguments.steps, batch=arguments.batch, learning_rate=arguments.learning_rate,
            warmup=min(20, arguments.steps), ema=0.98, save_every=arguments.save_every,
            report_every=arguments.sample_every, accumulate=arguments.accumulate, device=self.device.type,
            dtype=self.dtype)


def load_frozen(path):
    """Returns the networks of a model, on the CPU in float32, without gradients."""
    models = model_loader.preload_models_from_standard_weights(path, "cpu", "float32")
    config = models["diffusion"].config
    if config.in_channels != 4 or config.d_guidance:
        kind = "made for LCM" if config.d_guidance else "an inpainting model"
        raise ValueError(f"{path}: is {kind}, which is not taught here; teach the model that it was made from")
    for network in models.values():
        network.requires_grad_(False)
    return models


def write(path, tensors, metadata):
    """Writes a safetensors file, whole or not at all, and says so."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_file(path) as (temporary, publish):
        temporary.write_bytes(save(tensors, {key: str(value) for key, value in metadata.items()}))
        path = publish()
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")
    return path


def run(main):
    """Calls a command's main(), and ends the program with one line where it cannot go on."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped and saved; the same command goes on from there")
