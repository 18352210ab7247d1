"""The engine behind the web page and the HTTP API: requests in, pictures out, one at a time. It knows nothing of HTTP.

    studio = Studio()
    job = studio.submit(Request("a red rocket", steps=20, seed=5))
    while not job.wait(0.5):
        print(job.step, "of", job.n_steps, "steps,", job.seconds_left, "s left")
    job.raise_error()
    job.pictures[0].image.show()

What is in data/ goes by name alone: no path of a request's reaches the disk.
"""

import functools
import hashlib
import io
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import model_loader
from ddpm import eps_from_v
from extensions.assemble import load_with
from extensions.attention_maps import record_attention
from extensions.emphasis import encode_weighted, plain_text
from extensions.inpaint import inpaint, outpaint
from extensions.library import is_model, named, stamp, trained_name, walk
from extensions.lora import parse_tags
from extensions.previews import make_preview, show_words, why_no_words
from extensions.request import Limits, Request, check, count_steps, open_upload
from extensions.textual_inversion import find_embeddings
from images import fit, open_image, write_png
from infotext import format_parameters
from model_loader import ROOT
from new_file import new_file, numbered
from pipeline import choose_size, generate, own_schedule, tell_unknown_words
from samplers import SAMPLERS

__all__ = ["Busy", "Job", "Limits", "Picture", "Request", "Studio", "open_upload"]


@functools.lru_cache(maxsize=1)
def read_embeddings(folder, files):
    return find_embeddings(folder)


class Busy(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """Ends a picture that nobody wants any more, from within its callback."""


@dataclass
class Picture:
    """A picture that was drawn."""

    image: Image.Image
    seed: int
    parameters: str  # prompt and settings, in the form of `infotext`
    path: Path | None = None  # where it was kept, in the studio's output folder
    words: list[tuple[str, Image.Image]] = field(default_factory=list)  # word, where it was looked at, over the picture

    def png(self) -> bytes:
        """Returns the PNG file, with its settings in it."""
        file = io.BytesIO()
        write_png(self.image, file, self.parameters)
        return file.getvalue()


class Job:
    """A request on its way. All fields may be read at any time, from any thread.

    state: "waiting", "loading", "drawing" or "done".
    step, n_steps: how many steps of the network are done, of all pictures together, and how many there are.
    pictures: [Picture] so far.
    notes: lines to tell, such as which words the model does not know.
    error: the exception that ended it, or None: a ValueError or OSError says in one line what to do otherwise.
    seed: of the first picture.
    is_cancelled: whether somebody cancelled it.
    """

    def __init__(self, request: Request, studio: "Studio", steps_a_picture: int, checkpoint: str, loras: list):
        self.request, self.studio, self.checkpoint, self.loras = request, studio, checkpoint, loras
        self.seed = secrets.randbelow(2**32) if request.seed is None else int(request.seed)
        self.steps_a_picture = steps_a_picture
        self.state, self.step, self.n_steps = "waiting", 0, steps_a_picture * request.count
        self.pictures, self.notes, self.error = [], [], None
        self.is_cancelled, self.is_wanted = False, True
        self.latents, self.to_preview, self.began = None, None, None
        self.created = time.time()
        self.done, self.lock, self.when_done = threading.Event(), threading.Lock(), []

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is done, or so many seconds; returns whether it is done."""
        return self.done.wait(timeout)

    def raise_error(self) -> None:
        """Raises what ended it, if something did."""
        if self.error:
            raise self.error

    def call_when_done(self, function: Callable[[], None]) -> None:
        """Has a function called once it is done, by the thread that draws; at once if it is."""
        with self.lock:
            if not self.done.is_set():
                self.when_done.append(function)
                return
        function()

    def cancel(self, keep: bool = True) -> None:
        """Ends it at the next step of the network. What is drawn by then is in `pictures`.

        Args:
            keep: whether the unfinished picture is decoded as it is and kept, too.
        """
        self.is_wanted, self.is_cancelled = self.is_wanted and keep, True
        self.studio.drop(self)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest of it will take, by the steps done so far; None where that is not known yet."""
        if self.state == "done":
            return 0.0
        if not self.step or self.began is None:
            return None
        return (time.monotonic() - self.began) / self.step * (self.n_steps - self.step)

    @property
    def ahead(self) -> int:
        """How many requests are drawn before this one."""
        return self.studio.count_ahead(self)

    def preview(self) -> Image.Image | None:
        """Returns the picture that is being drawn, in full size, as its latents promise it so far; None before the
        first step and when all is done."""
        latents, to_preview = self.latents, self.to_preview
        return None if latents is None else to_preview(latents)

    def after_step(self, step, timestep, latents):
        """The callback of `generate`. Once cancelled, the latents are those of the picture so far."""
        if not self.is_wanted:
            raise Stopped
        if self.is_cancelled:
            return self.latents
        self.step += 1
        return None

    def finish(self):
        with self.lock:
            self.state, self.latents = "done", None
            self.done.set()
        for function in self.when_done:
            function()


class Watched(nn.Module):
    """A UNet that tells its job how the picture looks so far: the x_0 that each predicted noise implies. Once the job
    is cancelled it computes nothing more, so that this picture can be decoded at once."""

    def __init__(self, diffusion: nn.Module, job: Job, cfg_scale: float, sampler=None):
        super().__init__()
        self.diffusion, self.config = diffusion, diffusion.config
        self.job, self.cfg_scale, self.sampler, self.calls = job, cfg_scale, sampler, count()

    def for_run(self, sampler) -> "Watched":
        inner = self.diffusion.for_run(sampler) if hasattr(self.diffusion, "for_run") else self.diffusion
        return Watched(inner, self.job, self.cfg_scale, sampler)

    def forward(self, latents, context, time_embedding):
        if not self.job.is_wanted:
            raise Stopped
        if self.job.is_cancelled and self.job.latents is not None:
            return latents.new_zeros(len(context), self.config.out_channels, *latents.shape[2:])
        output = self.diffusion(latents, context, time_embedding)
        cond, uncond = output[: len(latents)].float(), output[-len(latents) :].float()
        x, alpha_bar = latents[:, :4].float(), self.sampler.alpha_bar(self.sampler.timesteps[next(self.calls)])
        guided = uncond + self.cfg_scale * (cond - uncond)
        eps = eps_from_v(guided, x, alpha_bar) if self.config.prediction == "v" else guided
        self.job.latents = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        return output


class Studio:
    """Models, kept between requests; a bounded queue; and the one thread that draws.

    Args:
        checkpoint: a file or diffusers folder of the owner's; None is the newest in data.
        dtype: as for `model_loader.preload_models_from_standard_weights`.
        output: the folder in which every picture is kept, made if it is not there; None keeps none.
        data: where checkpoints are, with loras/, embeddings/ and controlnets/ in it.
        limits: what a request may ask for.
        device: where to draw; None is the fastest there is.

    checkpoint: the name of what draws where a request names none; may be set.
    sample_size: pixels a side of the pictures that the loaded model was made for.
    current: the Job that is being drawn, or None.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be loaded. OSError: the folder cannot be made.
    """

    def __init__(self, checkpoint=None, dtype="auto", output=None, data=ROOT / "data", limits: Limits = Limits(),
                 device=None):
        self.data, self.dtype, self.limits = Path(data), dtype, limits
        self.device = device or model_loader.best_device()
        self.own = Path(checkpoint) if checkpoint else model_loader.find_checkpoint(self.data)
        self.checkpoint = self.own.name
        self.output = Path(output) if output else None
        if self.output:
            self.output.mkdir(parents=True, exist_ok=True)
        self.loaded_key, self.loaded = None, None
        self.load(self.checkpoint, [], [])
        model_loader.default_tokenizer()  # now, and not while the first one waits
        self.condition, self.waiting, self.current, self.is_closed = threading.Condition(), deque(), None, False
        self.worker = threading.Thread(target=self.work, name="studio", daemon=True)
        self.worker.start()

    # ---- what is in data/, by name

    def checkpoints(self) -> dict[str, Path]:
        """Returns {name: path} of the models that can draw; the name is the file's or folder's."""
        paths = [*sorted(self.data.glob("*")), self.own]
        return {path.name: path for path in paths if path == self.own or is_model(path)}

    def loras(self) -> dict[str, Path]:
        """Returns {name: path} of what is in data/loras/ and below; the name is the file's without its suffix."""
        return named(self.data / "loras", ("adapter_config.json", "pytorch_lora_weights.safetensors"))

    def controlnets(self) -> dict[str, Path]:
        """Returns {name: path} of what is in data/controlnets/ and below."""
        return named(self.data / "controlnets", ("config.json",))

    def embeddings(self) -> dict[str, torch.Tensor]:
        """Returns {name: vectors (n, d)} of what is in data/embeddings/ and below."""
        files = tuple((path, *stamp(path)) for path in walk(self.data / "embeddings"))
        return read_embeddings(self.data / "embeddings", files)

    def find(self, kind: str, name: str) -> str:
        """Returns the name in a list of what a request means by one: the name, the same without its suffix, or with a
        hash in brackets behind it.

        Args:
            kind: "checkpoints", "loras" or "controlnets".

        Raises:
            ValueError: there is none; the line names those there are.
        """
        there = getattr(self, kind)()
        plain = str(name).rsplit(" [", 1)[0] if str(name).endswith("]") else str(name)
        for key, path in there.items():
            if plain in (key, path.name, path.stem if path.is_file() else key):
                return key
        if kind == "loras":
            for key, path in there.items():
                if trained_name(path, *stamp(path)) == plain:
                    return key
        some = ", ".join(list(there)[:10]) or "none"
        raise ValueError(f"there is no {kind.removesuffix('s')} {name!r:.80}; there are: {some}")

    # ---- requests

    def submit(self, request: Request) -> Job:
        """Checks a request and has it drawn when its turn comes.

        Raises:
            ValueError: in one line, what cannot be done.
            Busy: too many wait.
        """
        checkpoint = self.find("checkpoints", request.checkpoint or self.checkpoint)
        loras = check(request, self)
        job = Job(request, self, count_steps(request), checkpoint, loras)
        with self.condition:
            if self.is_closed:
                raise Busy("the server is being stopped")
            if len(self.waiting) >= self.limits.waiting:
                raise Busy(f"{len(self.waiting)} requests are waiting already; try again later")
            self.waiting.append(job)
            self.condition.notify()
        return job

    def drop(self, job):
        """Takes a cancelled job out of the queue, if it is there yet."""
        with self.condition:
            if job not in self.waiting:
                return
            self.waiting.remove(job)
        job.finish()

    def count_ahead(self, job):
        with self.condition:
            if job not in self.waiting:
                return 0
            return self.waiting.index(job) + (self.current is not None)

    def close(self) -> None:
        """Cancels all jobs, and ends the thread at the next step."""
        with self.condition:
            self.is_closed = True
            jobs = [*self.waiting, *filter(None, [self.current])]
            self.condition.notify()
        for job in jobs:
            job.cancel(keep=False)

    # ---- the thread that draws

    def work(self):
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.waiting or self.is_closed)
                if self.is_closed:
                    return
                job = self.current = self.waiting.popleft()
            try:
                self.draw(job)
            except Stopped:
                pass
            except Exception as error:
                job.error = self.without_paths(error)
            self.current = None
            job.finish()
            del job  # its pictures are its owner's to keep

    def without_paths(self, error):
        """Returns an error of the same kind whose line tells nothing of the folders on this machine."""
        if not isinstance(error, (ValueError, OSError)):
            return error
        text = str(error)
        for folder in {self.data, self.data.resolve(), self.own.parent, self.own.parent.resolve()}:
            text = text.replace(f"{folder}{os.sep}", "")
        return ValueError(text)

    def load(self, checkpoint, loras, controls, dtype=None):
        """Returns (models, ControlNets, embeddings), anew if anything else was asked for the last time."""
        dtype = dtype or self.dtype
        path = self.checkpoints()[checkpoint]
        paths = [(self.loras()[name], unet_scale, text_scale) for name, unet_scale, text_scale in loras]
        control_paths = [self.controlnets()[name] for name in controls]
        files = [path, *(lora[0] for lora in paths), *control_paths]
        key = (paths, control_paths, dtype, [(file, *stamp(file)) for file in files])
        if key != self.loaded_key:
            self.loaded_key = self.loaded = self.to_preview = None  # before the next takes as much memory
            self.loaded = load_with(path, self.device, dtype, paths, control_paths)
            self.to_preview = make_preview(self.loaded[0], self.data)
            self.sample_size = self.loaded[0]["diffusion"].config.sample_size
            self.loaded_key = key
        return self.loaded

    def draw(self, job):
        if job.is_cancelled:
            return
        request, dtype = job.request, None
        job.state = "loading"
        for k in range(request.count):
            job.step = k * job.steps_a_picture
            try:
                picture = self.draw_one(job, job.seed + k, dtype)
            except FloatingPointError as error:
                dtype = "float32"
                if next(self.loaded[0]["diffusion"].parameters()).dtype == torch.float32:
                    raise ValueError(f"{error}, in float32 as well") from None
                job.notes.append(f"{error}: once more, in float32")
                job.step = k * job.steps_a_picture
                picture = self.draw_one(job, job.seed + k, dtype)
            job.latents = None
            if self.output:
                picture.path = keep(picture, self.output)
            job.pictures.append(picture)
            if job.is_cancelled:
                return

    def draw_one(self, job, seed, dtype):
        request = job.request
        models, controlnets, of_loras = self.load(job.checkpoint, job.loras, [name for name, *_ in request.controls],
                                                  dtype)
        job.to_preview, job.state = self.to_preview, "drawing"
        clip, config = models["clip"], models["diffusion"].config
        embeddings, tokenizer = self.embeddings() | of_loras, model_loader.default_tokenizer()
        prompt = parse_tags(request.prompt)[0]
        if not job.pictures:
            unknown = tell_unknown_words(plain_text(prompt, embeddings), clip.config.words)
            job.notes += [unknown] * bool(unknown)
        job.began = job.began or time.monotonic()

        image = None if request.input_image is None else open_image(request.input_image)
        diffusion = models["diffusion"]
        if controlnets:
            from extensions.controlnet import Controlled

            size = choose_size(request.height, request.width, config.sample_size, image)
            pictures = [fit(open_image(control), *size, request.resize) for _, control, _ in request.controls]
            scales = [scale for *_, scale in request.controls]
            diffusion = Controlled(diffusion, list(zip(controlnets, pictures, scales)), request.control_start,
                                   request.control_end)
        diffusion = Watched(diffusion, job, config.cfg_scale if request.cfg_scale is None else request.cfg_scale)
        options = {
            "prompt": None, "models": models | {"diffusion": diffusion}, "seed": seed, "cfg_scale": request.cfg_scale,
            "n_inference_steps": request.steps, "height": request.height, "width": request.width, "progress": False,
            "context": encode_weighted([prompt], [request.negative_prompt], clip, tokenizer, embeddings,
                                       request.clip_skip),
            "callback": job.after_step, **choose_sampler(request, config)}
        with record_attention(diffusion) if request.words else nullcontext() as record:
            pixels = draw_pixels(request, image, options, config)
        drawn = Image.fromarray(pixels)
        parameters = describe(job, seed, drawn, models, config)
        words = []
        if request.words and (why := why_no_words(request, prompt)):
            job.notes += [why] * (why not in job.notes)
        elif request.words:
            words = show_words(pixels, record.maps(), prompt, clip, tokenizer, embeddings)
        return Picture(drawn, seed, parameters, words=words)


# ---- drawing


def draw_pixels(request, image, options, config):
    """Returns (height, width, 3) uint8: text to image, image to image, inpainting or outpainting."""
    if image is None:
        return generate(**options)
    options["strength"] = request.used_strength()
    if not request.is_partial():
        size = choose_size(request.height, request.width, config.sample_size, image)
        return generate(input_image=fit(image, *size, request.resize), **options)
    options |= {"input_image": image, "blur": request.blur}
    if request.outpaint is not None:
        sides = dict(zip(("left", "top", "right", "bottom"), request.outpaint))
        sizes = {name: options.pop(name) for name in ("height", "width")}
        given = {name: size for name, size in sizes.items() if size}
        return outpaint(**options, **sides, **given, **({"fill": request.fill} if request.fill else {}))
    return inpaint(mask=request.mask, fill=request.fill or "original", only_masked=request.only_masked,
                   padding=request.padding, **options)


def choose_sampler(request, config):
    """Returns the arguments of `generate` that say how to sample."""
    settings = {"use_karras_sigmas": True} if request.schedule == "karras" else {}
    if request.eta is not None:
        settings["eta"] = request.eta
    if not settings:  # by name, so that a checkpoint's own noise schedule is obeyed
        return {"sampler_name": request.sampler}
    return {"sampler": SAMPLERS[request.sampler](**settings, **own_schedule(config))}


def describe(job, seed, drawn, models, config):
    """Returns all that changes the picture, as the text for its file."""
    request = job.request
    settings = {
        "prompt": request.prompt, "uncond_prompt": request.negative_prompt, "n_inference_steps": request.steps,
        "sampler_name": request.sampler, "schedule": request.schedule and request.schedule.capitalize(),
        "eta": request.eta, "seed": seed, "width": drawn.width, "height": drawn.height,
        "cfg_scale": config.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        "model": Path(job.checkpoint).stem, "clip_skip": request.clip_skip if request.clip_skip > 1 else None,
        "dtype": str(next(models["diffusion"].parameters()).dtype).removeprefix("torch.")}
    if request.input_image is not None:
        settings |= {"strength": request.used_strength(), "input_image_hash": hash_of(request.input_image)}
        settings |= {"Resize": request.resize} if request.resize != "crop" else {}
    if request.mask is not None:
        settings |= {"mask_hash": hash_of(request.mask), "blur": request.blur, "fill": request.fill or "original",
                     "padding": request.padding if request.only_masked else None,
                     "Only masked": True if request.only_masked else None}
    if request.outpaint is not None:
        settings["Outpaint"] = " ".join(map(str, request.outpaint))
    if request.controls:
        settings["Control"] = "; ".join(f"{name} {hash_of(image)}:{scale:g}" for name, image, scale in request.controls)
        settings["Control steps"] = f"{request.control_start:g} to {request.control_end:g}"
    if job.is_cancelled:
        done = job.step - len(job.pictures) * job.steps_a_picture
        settings["Stopped"] = f"after {done} of {job.steps_a_picture} steps" if done < job.steps_a_picture else None
    return format_parameters(settings)


def hash_of(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:10]


def keep(picture, folder):
    """Writes a picture into a folder, under the next free name; returns its path."""
    first = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{picture.seed}.png"
    path = next(path for path in numbered(first) if not path.exists())
    with new_file(path) as (temporary, publish):
        temporary.write_bytes(picture.png())
        return publish()
