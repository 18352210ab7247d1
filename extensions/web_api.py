"""The HTTP APIs that image tools speak: that of Stable Diffusion web UIs (AUTOMATIC1111's, v1.10, /sdapi/v1/) and
OpenAI's (/v1/images/generations).

A field that these servers know and that cannot be honoured here is answered with a 4xx that names it; fields that they
do not know are ignored, as they do.
"""

import asyncio
import base64
import binascii
import io
import json
import time
from contextlib import suppress

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from extensions.inpaint import open_mask
from extensions.request import Request, check_size, open_upload
from extensions.studio import Busy, Job, Studio
from images import fit, open_image, read_text
from infotext import FIELDS, parse_parameters, split_schedule
from samplers import SAMPLERS, TAKE_KARRAS

SCHEDULES = {"automatic": "Automatic", "uniform": "Uniform", "karras": "Karras"}
AUTOMATICALLY_KARRAS = ("dpmpp_2m", "dpmpp_2m_sde")  # what the web UIs' "Automatic" means for these
FILLS = ["fill", "original", "noise", "nothing"]
RESIZES = ["stretch", "crop", "pad"]


class TextToImage(BaseModel):
    """The fields of /sdapi/v1/txt2img, with the web UI's defaults; sizes and guidance left out are the model's own."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str | None = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = "Euler"
    scheduler: str | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    steps: int | None = 50
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    denoising_strength: float | None = 0.75
    override_settings: dict | None = {}
    override_settings_restore_afterwards: bool | None = True
    alwayson_scripts: dict | list | None = {}
    send_images: bool | None = True
    save_images: bool | None = False

    # What is known and not done here: see NEUTRAL.
    styles: list[str] | None = []
    subseed: int | None = -1
    subseed_strength: float | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    restore_faces: bool | None = False
    tiling: bool | None = False
    enable_hr: bool | None = False
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = False
    script_name: str | None = None
    s_churn: float | None = 0
    s_noise: float | None = 1
    s_min_uncond: float | None = 0
    firstpass_image: str | None = None
    infotext: str | None = None


class ImageToImage(TextToImage):
    """The fields of /sdapi/v1/img2img beside those."""

    init_images: list[str] | None = None
    resize_mode: int | None = 0
    mask: str | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = 4
    mask_blur_y: int | None = 4
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | None = 0
    include_init_images: bool | None = False
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None


# Fields of the web UIs that nothing here honours, and the values that ask for nothing.
NEUTRAL = {
    "styles": ([],), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1),
    "restore_faces": (False,), "tiling": (False,), "enable_hr": (False,), "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,), "script_name": ("", "None"), "s_churn": (0,), "s_min_uncond": (0,),
    "firstpass_image": ("",), "infotext": ("",), "initial_noise_multiplier": (1,), "latent_mask": ("",)}


class ImageGeneration(BaseModel):
    """The fields of /v1/images/generations."""

    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = "auto"
    response_format: str | None = "b64_json"
    output_format: str | None = "png"
    background: str | None = "auto"
    quality: str | None = "auto"
    style: str | None = None
    stream: bool | None = False
    partial_images: int | None = 0


# The values of these fields that are honoured, where any others are refused.
OPENAI_ALLOWED = {"response_format": ("b64_json",), "output_format": ("png",), "background": ("auto", "opaque"),
                  "quality": ("auto", "standard"), "style": (), "stream": (False,), "partial_images": (0,)}


class Picture(BaseModel):
    """The body of /sdapi/v1/png-info."""

    image: str


def add_routes(app: FastAPI, studio: Studio) -> None:
    """Adds both APIs to an app."""
    options = {"CLIP_stop_at_last_layers": 1}
    add_errors(app)

    # ---- the web UIs': drawing

    @app.post("/sdapi/v1/txt2img")
    async def txt2img(body: TextToImage, http: HttpRequest):
        return await respond(to_request, body, http)

    @app.post("/sdapi/v1/img2img")
    async def img2img(body: ImageToImage, http: HttpRequest):
        if not body.init_images:
            raise HTTPException(404, "init_images is missing; give the picture to start from, in base64")
        return await respond(with_picture, body, http)

    async def respond(make_request, body, http):
        job = await draw(studio, http, make_request, body, studio, options)
        if body.override_settings_restore_afterwards is False:
            await run_in_threadpool(set_options, body.override_settings or {})
        return await run_in_threadpool(answer, body, job)

    @app.get("/sdapi/v1/progress")
    async def progress(skip_current_image: bool = False):
        job = studio.current
        image = None if skip_current_image or not job else await run_in_threadpool(job.preview)
        return tell_progress(job, image)

    @app.post("/sdapi/v1/interrupt")
    async def interrupt():
        if job := studio.current:
            job.cancel()
        return {}

    @app.post("/sdapi/v1/png-info")
    async def png_info(body: Picture):
        return await run_in_threadpool(read_info, body.image, studio.limits)

    # ---- the web UIs': what there is

    @app.get("/sdapi/v1/options")
    async def get_options():
        return options | {"sd_model_checkpoint": studio.checkpoint, "sd_checkpoint_hash": None, "sd_vae": "Automatic",
                          "samples_format": "png", "eta_noise_seed_delta": 0}

    @app.post("/sdapi/v1/options")
    def set_options(body: dict):
        given = read_overrides(body, studio)
        studio.checkpoint = given.get("checkpoint", studio.checkpoint)
        options["CLIP_stop_at_last_layers"] = given.get("clip_skip", options["CLIP_stop_at_last_layers"])

    @app.get("/sdapi/v1/sd-models")
    def sd_models():
        return [{"title": name, "model_name": path.stem, "hash": None, "sha256": None, "filename": name, "config": None}
                for name, path in studio.checkpoints().items()]

    @app.get("/sdapi/v1/samplers")
    async def samplers():
        return [{"name": sampler.label, "aliases": [name, f"k_{name}"], "options": {}}
                for name, sampler in SAMPLERS.items()]

    @app.get("/sdapi/v1/schedulers")
    async def schedulers():
        return [{"name": name, "label": label, "aliases": None, "default_rho": 7.0 if name == "karras" else -1.0,
                 "need_inner_model": name == "uniform"} for name, label in SCHEDULES.items()]

    @app.get("/sdapi/v1/loras")
    def loras():
        return [{"name": name, "alias": name, "path": path.name, "metadata": {}}
                for name, path in studio.loras().items()]

    @app.get("/sdapi/v1/embeddings")
    def embeddings():
        return {"loaded": {name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None,
                                  "shape": vectors.shape[-1], "vectors": len(vectors)}
                           for name, vectors in studio.embeddings().items()}, "skipped": {}}

    @app.get("/sdapi/v1/scripts")
    async def scripts():
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @app.get("/sdapi/v1/upscalers")
    async def upscalers():
        return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}]

    for name in ("latent-upscale-modes", "sd-vae", "prompt-styles", "hypernetworks", "face-restorers"):
        app.get(f"/sdapi/v1/{name}")(nothing)
    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings"):
        app.post(f"/sdapi/v1/{name}")(refreshed)

    @app.get("/controlnet/model_list")
    def controlnet_models():
        return {"model_list": list(studio.controlnets())}

    @app.get("/controlnet/module_list")
    async def controlnet_modules():
        return {"module_list": ["none", "canny"]}

    # ---- OpenAI's

    @app.post("/v1/images/generations")
    async def generations(body: ImageGeneration, http: HttpRequest):
        job = await draw(studio, http, from_openai, body, studio)
        images = await run_in_threadpool(lambda: [encode(picture.png()) for picture in job.pictures])
        return {"created": int(job.created), "data": [{"b64_json": image} for image in images],
                "background": "opaque", "output_format": "png"}

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": int(path.stat().st_mtime),
                                            "owned_by": "local"} for name, path in studio.checkpoints().items()]}

    for api in ("sdapi", "controlnet", "v1"):  # before the page, which would answer with itself
        app.api_route(f"/{api}/{{path:path}}", methods=["GET", "POST"], include_in_schema=False)(missing)


async def nothing() -> list:
    """There is none of it here."""
    return []


async def missing(path: str):
    raise HTTPException(404, f"there is no {path!r:.80} here")


async def refreshed() -> None:
    """Nothing to do: the lists are read anew whenever they are asked for."""


# ---- drawing for a client


async def draw(studio: Studio, http: HttpRequest, make_request, *arguments) -> Job:
    """Has a picture drawn and waits for it; once the client is gone, it is cancelled."""
    job = await run_in_threadpool(lambda: studio.submit(make_request(*arguments)))
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def tell():
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    job.call_when_done(tell)
    try:
        while not done.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.2)
            if not done.is_set() and await http.is_disconnected():
                job.cancel(keep=False)
    except asyncio.CancelledError:
        job.cancel(keep=False)
        raise
    if studio.is_closed and not job.pictures:
        raise HTTPException(503, "the server is being stopped")
    job.raise_error()
    return job


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(text: str, name: str, limits) -> bytes:
    """Returns the file in base64 text or a data URL."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > limits.upload * 4 / 3 + 1000:
        raise ValueError(f"{name} is too large; give a picture file of at most {limits.upload} bytes")
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is {text[:40]!r}, which is not base64; give the picture's file in base64") from None


def decode_picture(text: str, name: str, limits) -> Image.Image:
    return open_upload(decode(text, name, limits), name, limits)


# ---- from the web UIs' fields to a Request


def to_request(body: TextToImage, studio: Studio, options: dict) -> Request:
    """Returns what /sdapi/v1/txt2img asks for. Raises ValueError that names a field which cannot be honoured."""
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise ValueError(f"{name} is {value!r:.80}, which is not supported here; leave it out")
    sampler, schedule = find_sampler(body.sampler_name or body.sampler_index or "Euler", body.scheduler)
    sampler, eta = apply_eta(sampler, body.eta)
    if sampler in ("euler_a", "dpmpp_2m_sde") and body.s_noise not in (None, 1):
        raise ValueError(f"s_noise is {body.s_noise}, which is not supported here; leave it out")
    overrides = read_overrides(body.override_settings or {}, studio)
    clip_skip = overrides.get("clip_skip", options["CLIP_stop_at_last_layers"])
    request = Request(
        prompt=body.prompt or "", negative_prompt=body.negative_prompt or "", sampler=sampler, schedule=schedule,
        eta=eta, steps=50 if body.steps is None else body.steps, cfg_scale=body.cfg_scale,
        seed=None if body.seed in (None, -1) else body.seed, width=body.width, height=body.height,
        count=(1 if body.batch_size is None else body.batch_size) * (1 if body.n_iter is None else body.n_iter),
        checkpoint=overrides.get("checkpoint"), clip_skip=clip_skip)
    read_scripts(body.alwayson_scripts or {}, request, studio.limits)
    return request


def find_sampler(name: str, scheduler: str | None) -> tuple[str, str | None]:
    """Returns our names of a sampler and a schedule, which may stand at the end of the sampler's name."""
    known = {sampler.label.lower(): ours for ours, sampler in SAMPLERS.items()}
    known |= {alias: ours for ours in SAMPLERS for alias in (ours, f"k_{ours}")}
    label, given = (name, {}) if name.lower() in known else split_schedule(name)
    if label.lower() not in known:
        labels = ", ".join(sampler.label for sampler in SAMPLERS.values())
        raise ValueError(f"there is no sampler {name!r:.80}; there are: {labels}")
    sampler = known[label.lower()]
    schedule = (scheduler or "automatic").lower()
    schedule = given.get("schedule", "automatic").lower() if schedule == "automatic" else schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no scheduler {schedule!r:.80}; there are: {', '.join(SCHEDULES.values())}")
    is_karras = schedule == "karras" or schedule == "automatic" and sampler in AUTOMATICALLY_KARRAS
    if is_karras and sampler not in TAKE_KARRAS:
        raise ValueError(f"the scheduler Karras does not go with the sampler {name!r:.80}; leave it out")
    return sampler, "karras" if is_karras else None


def apply_eta(sampler: str, eta: float | None) -> tuple[str, float | None]:
    """Returns sampler and DDIM's eta: an ancestral sampler with eta 0 is the one without noise."""
    without_noise = {"euler_a": "euler", "dpmpp_2m_sde": "dpmpp_2m"}
    if eta is None or sampler == "ddim":
        return sampler, eta
    if sampler in without_noise and eta not in (0, 1):
        raise ValueError(f"eta is {eta}, which the sampler {SAMPLERS[sampler].label} takes as 0 or 1 only")
    return (without_noise[sampler] if sampler in without_noise and eta == 0 else sampler), None


def read_overrides(settings: dict, studio: Studio) -> dict:
    """Returns checkpoint and clip_skip, as far as the web UIs' options name them; what these know and cannot be had
    here raises ValueError."""
    overrides = {}
    if name := settings.get("sd_model_checkpoint"):
        overrides["checkpoint"] = studio.find("checkpoints", str(name))
    clip_skip = settings.get("CLIP_stop_at_last_layers")
    if clip_skip is not None:
        if not isinstance(clip_skip, (int, float)) or clip_skip not in range(1, 13):
            raise ValueError(f"CLIP_stop_at_last_layers is {clip_skip!r:.40}; give a whole number from 1 to 12")
        overrides["clip_skip"] = int(clip_skip)
    neutral = {"sd_vae": ("Automatic", "None", ""), "samples_format": ("png",), "eta_noise_seed_delta": (0,)}
    for name, values in neutral.items():
        if settings.get(name) is not None and settings[name] not in values:
            raise ValueError(f"{name} is {settings[name]!r:.80}, which is not supported here; there is {values[0]!r}")
    return overrides


def with_picture(body: ImageToImage, studio: Studio, options: dict) -> Request:
    """Returns what /sdapi/v1/img2img asks for."""
    request = to_request(body, studio, options)
    if len(body.init_images) > 1:
        raise ValueError(f"init_images has {len(body.init_images)} pictures; give one a request")
    if body.resize_mode not in (None, 0, 1, 2):
        raise ValueError(f"resize_mode is {body.resize_mode}; give 0 (stretch), 1 (crop) or 2 (pad)")
    request.resize = RESIZES[body.resize_mode or 0]
    request.input_image = open_image(decode_picture(body.init_images[0], "init_images", studio.limits), "init_images")
    request.strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    if not body.mask:
        return request

    if body.inpainting_fill not in (None, 0, 1, 2, 3):
        raise ValueError(f"inpainting_fill is {body.inpainting_fill}; give 0 (fill), 1 (original), 2 (latent noise) or "
                         f"3 (latent nothing)")
    if body.mask_blur is None and body.mask_blur_x != body.mask_blur_y:
        raise ValueError(f"mask_blur_x and mask_blur_y are {body.mask_blur_x} and {body.mask_blur_y}, which is not "
                         f"supported here; give mask_blur")
    mask = decode_picture(body.mask, "mask", studio.limits)
    mask = open_mask(mask, ImageOps.exif_transpose(mask).size)  # in grey
    request.mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    request.fill = FILLS[body.inpainting_fill or 0]
    blur = body.mask_blur if body.mask_blur is not None else body.mask_blur_x
    request.blur = 4 if blur is None else blur
    request.only_masked, request.padding = body.inpaint_full_res is not False, body.inpaint_full_res_padding or 0
    if not request.only_masked and request.height and request.width:  # then the answer has this size
        check_size(request, studio.limits, studio.sample_size)
        size = request.height, request.width
        request.input_image, request.mask = (fit(one, *size, request.resize) for one in
                                             (request.input_image, request.mask))
    return request


class Unit(BaseModel):
    """A unit of the ControlNet extension: a picture that leads."""

    model_config = ConfigDict(allow_inf_nan=False)

    enabled: bool = True
    model: str | None = ""
    image: str | dict | None = None
    input_image: str | None = None
    weight: float = 1.0
    module: str | None = "none"
    processor_res: int = 512
    pixel_perfect: bool = False
    threshold_a: float = 100
    threshold_b: float = 200
    resize_mode: int | str = 1
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    mask: str | None = None
    control_mode: int | str | None = 0


UNIT_RESIZES = {"just resize": "stretch", "0": "stretch", "crop and resize": "crop", "1": "crop",
                "resize and fill": "pad", "2": "pad"}


def read_scripts(scripts: dict | list, request: Request, limits) -> None:
    """Adds to a request the ControlNets that `alwayson_scripts` asks for; raises ValueError for other scripts."""
    if scripts and not isinstance(scripts, dict):
        raise ValueError("alwayson_scripts is a list; give an object, by the scripts' names")
    for name, script in dict(scripts).items():
        if name.lower() != "controlnet":
            raise ValueError(f"alwayson_scripts has {name!r:.80}, which is not supported here; ControlNet is")
        try:
            units = [Unit.model_validate(unit) for unit in script["args"]]
        except (ValidationError, TypeError, LookupError) as error:
            reason = tell_fields(error.errors()) if isinstance(error, ValidationError) else "no list of units"
            raise ValueError(f"alwayson_scripts.ControlNet.args: {reason}") from None
        units = [unit for unit in units if unit.enabled]
        for field in ("resize_mode", "guidance_start", "guidance_end"):
            if len({getattr(unit, field) for unit in units}) > 1:
                raise ValueError(f"the units of ControlNet differ in {field}; give the same to all")
        for unit in units[: limits.controls + 1]:  # of which one too many is told of
            request.controls.append((unit.model or "", read_control(unit, limits), unit.weight))
            request.control_start, request.control_end = unit.guidance_start, unit.guidance_end
            request.resize = UNIT_RESIZES[str(unit.resize_mode).lower()]


def read_control(unit: Unit, limits) -> Image.Image:
    """Returns the control image of a unit, its edges if it asks for "canny"."""
    if unit.mask or unit.control_mode not in (None, 0, "Balanced"):
        raise ValueError("ControlNet's mask, and control_mode other than Balanced, are not supported here")
    if str(unit.resize_mode).lower() not in UNIT_RESIZES:
        raise ValueError(f"ControlNet's resize_mode is {unit.resize_mode!r:.40}; give Just Resize, Crop and Resize or "
                         f"Resize and Fill")
    text = unit.image.get("image") if isinstance(unit.image, dict) else unit.image or unit.input_image
    if not isinstance(text, str) or not text:
        raise ValueError("ControlNet's image is missing; give it in base64")
    image = open_image(decode_picture(text, "ControlNet's image", limits), "ControlNet's image")
    module = (unit.module or "none").lower()
    if module == "none":
        return image
    if module != "canny":
        raise ValueError(f"ControlNet's module is {module!r:.40}; there are: none, canny")
    from extensions.controlnet import canny

    if unit.processor_res > 0 and not unit.pixel_perfect:
        scale = min(unit.processor_res, 2048) / min(image.size)
        image = image.resize([max(round(length * scale), 1) for length in image.size], Image.Resampling.LANCZOS)
    return Image.fromarray(canny(image, unit.threshold_a, unit.threshold_b))


# ---- from a Job to the web UIs' answers


def answer(body: TextToImage, job: Job) -> dict:
    """Returns what /sdapi/v1/txt2img answers."""
    echo = body.model_dump()
    if not getattr(body, "include_init_images", False):
        echo |= {name: None for name in ("init_images", "mask") if name in echo}
    images = [encode(picture.png()) for picture in job.pictures] if body.send_images is not False else []
    return {"images": images, "parameters": echo, "info": json.dumps(tell_info(job))}


def tell_info(job):
    request, pictures, n = job.request, job.pictures, len(job.pictures)
    first = pictures[0].image if pictures else None
    return {
        "prompt": request.prompt, "all_prompts": [request.prompt] * n, "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * n, "seed": job.seed,
        "all_seeds": [picture.seed for picture in pictures], "subseed": -1, "all_subseeds": [-1] * n,
        "subseed_strength": 0, "width": first and first.width, "height": first and first.height,
        "sampler_name": SAMPLERS[request.sampler].label, "cfg_scale": request.cfg_scale, "steps": request.steps,
        "batch_size": n, "restore_faces": False, "face_restoration_model": None, "sd_model_name": job.checkpoint,
        "sd_model_hash": None, "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1,
        "seed_resize_from_h": -1, "denoising_strength": request.strength, "extra_generation_params": {},
        "index_of_first_image": 0, "infotexts": [picture.parameters for picture in pictures], "styles": [],
        "job_timestamp": timestamp(job), "clip_skip": request.clip_skip, "is_using_inpainting_conditioning": False,
        "version": None, "notes": job.notes}


def timestamp(job):
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


def tell_progress(job: Job | None, image: Image.Image | None) -> dict:
    state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
             "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    if not job:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    done, left = divmod(job.step, job.steps_a_picture)
    state |= {"interrupted": job.is_cancelled, "job": job.state, "job_count": job.request.count,
              "job_timestamp": timestamp(job), "job_no": done, "sampling_step": left,
              "sampling_steps": job.steps_a_picture}
    file = io.BytesIO()
    if image:
        image.save(file, format="PNG")
    return {"progress": min(max(job.step / job.n_steps, 0.01), 1.0), "eta_relative": job.seconds_left or 0.0,
            "state": state, "current_image": encode(file.getvalue()) if image else None,
            "textinfo": "; ".join(job.notes) or None}


def read_info(text: str, limits) -> dict:
    """Returns the settings in a picture, as /sdapi/v1/png-info does."""
    data = decode(text, "image", limits)
    picture = open_upload(data, "image", limits)
    items = {name: value[:10_000] for name, value in picture.info.items() if isinstance(value, str)}
    items.pop("parameters", None)
    try:
        info = read_text(io.BytesIO(data))[: 10 * limits.prompt]
    except ValueError:  # there are none
        return {"info": "", "items": items, "parameters": {}}
    labels = {name: label for name, (label, _) in FIELDS.items()}
    labels |= {"prompt": "Prompt", "uncond_prompt": "Negative prompt", "width": "Size-1", "height": "Size-2"}
    parameters = {labels.get(name, name): value for name, value in parse_parameters(info).items()}
    return {"info": info, "items": items, "parameters": parameters}


# ---- OpenAI's


def from_openai(body: ImageGeneration, studio: Studio) -> Request:
    """Returns what /v1/images/generations asks for; a model of no name in data/ is whichever draws."""
    for name, allowed in OPENAI_ALLOWED.items():
        value = getattr(body, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r:.40}, which is not supported here; leave it out")
    width, height = read_size(body.size)
    names = studio.checkpoints()
    return Request(prompt=body.prompt, checkpoint=body.model if body.model in names else None,
                   count=1 if body.n is None else body.n, width=width, height=height)


def read_size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "auto", ""):
        return None, None
    width, x, height = size.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(size) < 12):
        raise ValueError(f"size is {size!r:.40}; give one such as 512x512, or auto")
    return int(width), int(height)


# ---- errors


def error_body(path: str, status: int, message: str) -> dict:
    """Returns an error as the API under this path has it."""
    if path.startswith("/v1/"):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        return {"error": {"message": message, "type": kind if status < 500 else "server_error", "param": None,
                          "code": None}}
    return {"error": "HTTPException", "detail": message, "body": "", "errors": message}


def tell_fields(errors: list[dict]) -> str:
    """Returns pydantic's errors in one line."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in errors[:5])


def add_errors(app: FastAPI) -> None:
    """Has whatever goes wrong answered with JSON in one line, without tracebacks."""

    def respond(http, status, message, headers=None):
        return JSONResponse(error_body(http.url.path, status, message), status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def of_http(http, error):
        return respond(http, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_fields(http, error):
        fields = [one | {"loc": one["loc"][1:]} for one in error.errors()]
        return respond(http, 400 if http.url.path.startswith("/v1/") else 422, tell_fields(fields))

    @app.exception_handler(Busy)
    async def of_queue(http, error):
        return respond(http, 429, str(error), {"Retry-After": "5"})

    @app.exception_handler(ValueError)
    async def of_values(http, error):
        return respond(http, 400 if http.url.path.startswith("/v1/") else 422, str(error))

    @app.exception_handler(Exception)
    async def of_anything(http, error):
        return respond(http, 500, "something went wrong in the server; its console says what")
