"""Pictures in and out: files, arrays and tensors; the settings of a picture in its PNG file."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from infotext import format_parameters, parse_parameters
from new_file import new_file

# Pixels alone: Pillow starts Ghostscript for an EPS file, whatever its name.
FORMATS = ["AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP", "TGA"]

MAX_PIXELS = 2**26  # 8192 x 8192; a file of 200 kB may hold more than a hundred million, and take gigabytes

# Pillow reads no PNG file with a text or a colour profile beyond 1 MB; this is its bound for all texts of a file.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


# ---- pictures in


def open_image(image, name: str = "input_image") -> Image.Image:
    """Returns a picture as it is seen: upright, its colour profile converted to sRGB, transparency on white.

    Args:
        image: a path or an open binary file; a PIL image; an array or tensor, (h, w) or (h, w, 1, 3 or 4), uint8,
            uint16 or floats in [0, 1].
        name: what errors call it, unless it is a file.

    Returns:
        A PIL image in RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or damaged, or a file with more than 67 million pixels.
    """
    name, image = as_image(image, name)
    with one_line(name):
        image = ImageOps.exif_transpose(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        rgb = convert_to_srgb(image, name)
        if not alpha:
            return rgb
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        return white


def as_image(image, name="input_image"):
    """Returns the name and the PIL image, of any mode, of what `open_image` takes."""
    if isinstance(image, (str, os.PathLike, io.IOBase)):
        return load_file(image, name)
    if isinstance(image, (list, tuple)):
        raise ValueError(f"{name} is a {type(image).__name__} of {len(image)}; give one picture: a path, a PIL image, "
                         f"an array or a tensor")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, Image.Image):
        image = array_to_image(np.asarray(image), name)
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width}x{image.height} pixels; give a picture that has some")
    return name, image


def read_parameters(path) -> dict:
    """Returns the settings in a picture's file, our own or a web UI's; see `infotext.parse_parameters` for their names.

    Args, Raises: as `read_text`.
    """
    return parse_parameters(read_text(path))


def read_text(path) -> str:
    """Returns the text of the settings in a picture's file.

    Args:
        path: a PNG file with a text chunk `parameters`; a JPEG, WebP or AVIF file with it in EXIF's UserComment; a GIF
            file with it in its comment.

    Raises:
        FileNotFoundError, ValueError: as `open_image`; or the file has no such text.
    """
    name, image = load_file(path)
    with one_line(name):
        text = (image.info.get("parameters") or image.getexif().get_ifd(0x8769).get(0x9286)
                or image.format == "GIF" and image.info.get("comment"))
    if isinstance(text, bytes):
        text = text.removeprefix(b"ASCII\0\0\0")
        is_utf_16 = text.startswith(b"UNICODE\0")
        text = text[8:].decode("utf-16-be", "replace") if is_utf_16 else text.decode("utf-8", "replace")
    if not text:
        raise ValueError(f"{name}: has no settings in it (a text named 'parameters', as we and web UIs write)")
    return text


def load_file(file, name="input_image"):
    """Returns the name of a file, given by path or open, and the PIL image in it, as it is stored."""
    is_path = isinstance(file, (str, os.PathLike))
    name = os.fspath(file) if is_path else getattr(file, "name", name)
    if is_path and not os.path.isfile(file):
        raise FileNotFoundError(f"{name}: no such image; give the path of a picture file")
    with one_line(name), Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
        image.load()
        return name, image


@contextmanager
def one_line(name):
    """Turns whatever Pillow raises of a damaged picture, which may be anything, into one line with its name."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: not a picture that can be read ({reason}); give a PNG or JPEG file") from None


def convert_to_srgb(image, name):
    """Returns a PIL image of any mode in RGB, its colours those that its profile says."""
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        values = np.asarray(image)  # in [0, 1], or as Pillow makes them of 8 bits
        image = array_to_image(values / 255 if values.max() > 1 else values, name)
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"it has values from {values.min()} to {values.max()}; they must lie in [0, 65535]")
        is_8_bit = image.mode == "I" and values.max() <= 255
        image = array_to_image(values.astype(np.uint8 if is_8_bit else np.uint16), name)
    if profile:
        mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image.convert(mode), profile, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            warnings.warn(f"{name}: its colour profile cannot be used ({error}); taken as sRGB", stacklevel=4)
    return image.convert("RGB")


def array_to_image(array, name):
    """Returns a uint8, uint16 or float [0, 1] array, (h, w) or (h, w, 1, 3 or 4), as a PIL image."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; allowed are (h, w), (h, w, 1), (h, w, 3) and (h, w, 4)")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name} has values from {array.min()} to {array.max()}; floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}; allowed are uint8, uint16 and floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def native_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Returns the height and width, in multiples of 8, that have an image's proportions and the area of side²."""
    scale = side / (image.width * image.height) ** 0.5
    return tuple(max(8, round(length * scale / 8) * 8) for length in (image.height, image.width))


def fit(image: Image.Image, height: int, width: int, how: str = "crop") -> Image.Image:
    """Returns an image in another size, in pixels.

    Args:
        how: "crop" cuts off what is too long, "pad" puts black beside what is too short, both evenly on either side and
            with the image's proportions; "stretch" changes these.
    """
    functions = {"crop": ImageOps.fit, "pad": ImageOps.pad, "stretch": Image.Image.resize}
    if how not in functions:
        raise ValueError(f"how is {how!r}; give crop, pad or stretch")
    return functions[how](image, (width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """PIL RGB image, cropped to the size's proportions -> (1, 3, height, width) float32 in [-1, 1]"""
    pixels = np.asarray(fit(image, height, width), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


# ---- pictures out


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(batch, 3, h, w) in [-1, 1] -> (batch, h, w, 3) uint8 array in C order"""
    images = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_picture(image, path, parameters: str | dict = "", overwrite: bool = False) -> Path:
    """Writes a picture as a PNG file with its settings, whole or not at all.

    Args:
        image: an array (h, w, 3), such as `generate` returns, or a PIL image.
        path: a name that ends in .png.
        parameters: the text chunk `parameters`, or settings for `format_parameters`, to which the size is added.
        overwrite: whether to replace a file of that name.

    Returns:
        The path written: where another file took the name meanwhile, the next free one beside it.

    Raises:
        FileExistsError: there is such a file already.
        OSError: nothing can be written there.
        ValueError: the name does not end in .png, or the image is none.
    """
    with reserve(path, overwrite) as save:
        return save(image, parameters)


@contextmanager
def reserve(path, overwrite: bool = False) -> Iterator[Callable]:
    """Makes the temporary file of a picture, so that whatever forbids writing it shows before it is drawn.

        with reserve("apple.png") as save:
            written = save(generate("a red apple", seed=1), {"prompt": "a red apple", "seed": 1})

    Arguments and errors are those of `save_picture`; so is what save(image, parameters) takes and returns.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    with new_file(path, overwrite) as (temporary, publish):

        def save(image, parameters: str | dict = "") -> Path:
            image = image if isinstance(image, Image.Image) else array_to_image(np.asarray(image), "image")
            if isinstance(parameters, dict):
                parameters = format_parameters(parameters | {"width": image.width, "height": image.height})
            path.parent.mkdir(parents=True, exist_ok=True)  # it may have gone since
            write_png(image, temporary, parameters)
            return publish()

        yield save


def write_png(image: Image.Image, file, parameters: str) -> None:
    """Writes a PNG file, to a path or an open binary file, with a text chunk `parameters`."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters.encode(errors="replace").decode())  # a file's name may be no Unicode
    image.save(file, format="PNG", pnginfo=info)
