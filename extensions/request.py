"""What may be asked of a `studio.Studio`: the fields of a request, their limits, one line for what cannot be done."""

import io
from dataclasses import dataclass, field

from PIL import Image

from arguments import is_number, is_whole
from extensions.emphasis import check_texts
from extensions.inpaint import check_inpainting, open_mask
from extensions.lora import parse_tags
from images import open_image
from pipeline import plan
from samplers import SAMPLERS, TAKE_KARRAS

UPLOADS = ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP"]  # what is opened of what strangers send


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    pixels: int = 2**21  # of a drawn picture
    steps: int = 150
    count: int = 16  # pictures a request
    prompt: int = 4000  # letters
    controls: int = 4
    loras: int = 16
    upload: int = 2**24  # bytes of an uploaded picture
    upload_pixels: int = 2**24  # of an uploaded picture, or of one that outpainting makes
    waiting: int = 8  # requests


@dataclass
class Request:
    """What is asked for. Names of files are those that the lists of a `Studio` have; None is the model's own choice.

    Pictures are PIL images; `open_upload` makes them of bytes. height and width are as `generate` has them: left out,
    they are the model's own, or its area in the proportions of the input picture.
    """

    prompt: str = ""  # in the web UIs' grammar, with tags <lora:NAME:SCALE>; embeddings by their names
    negative_prompt: str = ""
    sampler: str = "dpmpp_2m"  # a name in samplers.SAMPLERS
    schedule: str | None = None  # or "karras", for the samplers in TAKE_KARRAS
    eta: float | None = None  # DDIM's
    steps: int = 25
    cfg_scale: float | None = None
    seed: int | None = None  # of the first picture; the others' follow. None draws a random one
    width: int | None = None
    height: int | None = None
    count: int = 1
    checkpoint: str | None = None  # None is Studio.checkpoint
    clip_skip: int = 1

    input_image: Image.Image | None = None
    strength: float | None = None  # in (0, 1]; None is 0.8, and 1 with a mask or outpainting
    resize: str = "crop"  # how the input picture and those of ControlNets get the size: "crop", "pad", "stretch"
    mask: Image.Image | None = None  # of the input picture's size, white where it is drawn anew
    blur: int = 0  # with a mask: as `inpaint` has these
    fill: str | None = None  # "original", "fill", "noise", "nothing"; None is "original", for outpainting "fill"
    only_masked: bool = False
    padding: int = 32
    outpaint: tuple[int, int, int, int] | None = None  # pixels more at the left, top, right and bottom
    controls: list[tuple[str, Image.Image, float]] = field(default_factory=list)  # name, control image, scale
    control_start: float = 0.0  # the part of the steps in which ControlNets act
    control_end: float = 1.0
    words: bool = False  # whether to keep what each word of the prompt looked at, in Picture.words

    def is_partial(self) -> bool:
        """Returns whether a part of the input picture stays as it is."""
        return self.mask is not None or self.outpaint is not None

    def used_strength(self) -> float:
        """Returns how much of the input picture is replaced, in (0, 1]."""
        return self.strength or (1.0 if self.input_image is None or self.is_partial() else 0.8)


def check(request: Request, studio) -> list[tuple[str, float, float]]:
    """Returns the LoRAs that the prompt names, [(name in the list, scale in the UNet, scale in the text encoder)].

    Raises ValueError, in one line, for what cannot be done by this `Studio`.
    """
    limits = studio.limits

    def require(condition, what):
        if not condition:
            raise ValueError(what)

    def within(name, low, high):
        value = getattr(request, name)
        require(is_whole(value) and low <= value <= high,
                f"{name} is {value!r:.40}; give a whole number from {low} to {high}")

    def within_real(name, low, high):
        value = getattr(request, name)
        require(value is None or is_number(value) and low <= value <= high,
                f"{name} is {value!r:.40}; give a number from {low:g} to {high:g}")

    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        require(isinstance(text, str), f"{name} is {text!r:.40}; give a text")
        require(len(text) <= limits.prompt, f"{name} has {len(text)} letters; give at most {limits.prompt}")
        require(not any("\ud800" <= letter <= "\udfff" for letter in text), f"{name} has half a letter (a lone "
                f"surrogate); give whole text")
    prompt, tags = parse_tags(request.prompt)
    check_texts([prompt], [request.negative_prompt])
    require(len(tags) <= limits.loras, f"the prompt has {len(tags)} LoRAs; give at most {limits.loras}")
    for name, *scales in tags:
        require(all(abs(scale) <= 100 for scale in scales), f"the LoRA {name!r:.80} has the scale {scales[0]}; give "
                f"a number such as 0.8")
    loras = [(studio.find("loras", name), *scales) for name, *scales in tags]

    require(request.sampler in SAMPLERS, f"the sampler is {request.sampler!r:.80}; known are {', '.join(SAMPLERS)}")
    require(request.schedule in (None, "karras"), f"the schedule is {request.schedule!r:.80}; give karras or none")
    require(request.schedule is None or request.sampler in TAKE_KARRAS, f"the schedule is karras, which the sampler "
            f"{request.sampler} does not take; {', '.join(TAKE_KARRAS)} do")
    require(request.eta is None or request.sampler == "ddim", f"eta is {request.eta!r:.40}, which the sampler "
            f"{request.sampler} does not take; ddim does")
    within_real("eta", 0, 1)
    within("steps", 1, limits.steps)
    within("count", 1, limits.count)
    within("clip_skip", 1, 12)
    within_real("cfg_scale", -1000, 1000)
    require(request.seed is None or is_whole(request.seed) and 0 <= request.seed <= 2**63 - request.count,
            f"the seed is {request.seed!r:.40}; give a whole number from 0 to 2**63 - 1")
    check_size(request, limits, studio.sample_size)
    check_pictures(request, limits, require)
    within_real("control_start", 0, 1)
    within_real("control_end", 0, 1)
    require(len(request.controls) <= limits.controls, f"there are {len(request.controls)} ControlNets; give at most "
            f"{limits.controls}")
    request.controls = [(studio.find("controlnets", name), image, scale) for name, image, scale in request.controls]
    require(not request.controls or request.control_start < request.control_end, f"ControlNets are to act from "
            f"{request.control_start} to {request.control_end} of the steps; give the smaller number first")
    count_steps(request)
    return loras


def check_size(request, limits, native):
    """Raises ValueError unless a picture of the size that is asked for may be drawn."""
    for name in ("height", "width"):
        size = getattr(request, name)
        if size is not None and not (is_whole(size) and size > 0 and size % 8 == 0):
            raise ValueError(f"{name} is {size!r:.40}; give a positive multiple of 8, or leave it out")
    height, width = request.height or native, request.width or native
    if height * width > limits.pixels:
        raise ValueError(f"the picture is to have {width}x{height} pixels; give a width and height of at most "
                         f"{limits.pixels} pixels together")


def check_pictures(request, limits, require):
    """Raises ValueError, by require(condition, line), for what cannot be done with the pictures of a request."""
    image, mask, sides = request.input_image, request.mask, request.outpaint
    pictures = [("input_image", image), ("mask", mask), *(("control", control) for _, control, _ in request.controls)]
    for name, picture in pictures:
        require(picture is None or isinstance(picture, Image.Image), f"{name} is {type(picture).__name__}; give a PIL "
                f"image")
        if picture is not None:
            check_upload_size(name, picture, limits)
    for _, _, scale in request.controls:
        require(is_number(scale) and abs(scale) <= 100, f"a ControlNet has the scale {scale!r:.40}; give a number such "
                f"as 1.0")
    require(request.resize in ("crop", "pad", "stretch"),
            f"resize is {request.resize!r:.40}; give crop, pad or stretch")
    require(request.strength is None or is_number(request.strength) and 0 < request.strength <= 1,
            f"strength is {request.strength!r:.40}; it must lie in (0, 1]")
    check_inpainting(request.blur, request.padding, request.fill or "original", None)
    require(request.blur <= 64 and request.padding <= 4096, f"blur and padding are {request.blur} and "
            f"{request.padding}; give at most 64 and 4096")
    if image is None:
        given = [name for name in ("mask", "outpaint", "strength") if getattr(request, name) is not None]
        require(not given, f"there is no input picture for {' and '.join(given)}; give one, or leave these out")
        return
    require(mask is None or sides is None, "a mask and sides to outpaint are given; one picture, one of them")
    if mask is not None:
        open_mask(mask, open_image(image).size)
    if sides is not None:
        require(len(sides) == 4 and all(is_whole(n) and n >= 0 for n in sides) and any(sides),
                f"outpaint is {sides!r:.60}; give four numbers of pixels (left, top, right, bottom), one above 0")
        left, top, right, bottom = sides
        size = (image.width + left + right) * (image.height + top + bottom)
        require(size <= limits.upload_pixels and size <= 4 * image.width * image.height, f"outpainting makes a picture "
                f"of {size} pixels out of {image.width * image.height}; at most four times as many are drawn at once")


def check_upload_size(name, picture, limits):
    if picture.width * picture.height > limits.upload_pixels:
        raise ValueError(f"{name} is {picture.width}x{picture.height} pixels; give one of at most "
                         f"{limits.upload_pixels} pixels")


def open_upload(data: bytes, name: str = "input_image", limits: Limits = Limits()) -> Image.Image:
    """Returns the picture in the bytes of a stranger's file, with its settings in `info`; nothing is unpacked before
    its size is known to be within the limits.

    Raises:
        ValueError: it is no picture, damaged, or too large.
    """
    if len(data) > limits.upload:
        raise ValueError(f"{name} has {len(data)} bytes; give a picture file of at most {limits.upload}")
    try:
        picture = Image.open(io.BytesIO(data), formats=UPLOADS)
    except Exception as error:  # Pillow raises anything of a hostile file
        raise ValueError(f"{name}: not a picture that can be read ({type(error).__name__}); give a PNG or JPEG file"
                         ) from None
    check_upload_size(name, picture, limits)
    try:
        picture.load()
    except Exception as error:
        raise ValueError(f"{name}: a damaged picture ({type(error).__name__}); give a whole one") from None
    return picture


def count_steps(request):
    """Returns how often `generate` will call its callback for a picture."""
    return len(plan(SAMPLERS[request.sampler](), request.steps, request.used_strength()).timesteps)
