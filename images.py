"""Pictures in and out: files, arrays and tensors; the settings of a picture in its PNG file."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError


def open_image(image):
    """Returns a PIL image, an array or the file at a path as an upright RGB PIL image; transparency becomes white."""
    if isinstance(image, (str, os.PathLike)):
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image}: no such image; give the path of a picture file")
        try:
            image = Image.open(image)
            image.load()
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{image}: not a picture that can be read ({error}); give a PNG or JPEG file") from None
    elif not isinstance(image, Image.Image):
        image = array_to_image(np.asarray(image))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def array_to_image(array):
    """Returns a uint8, uint16 or float [0, 1] array, (h, w) or (h, w, 1, 3 or 4), as a PIL image."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)) or 0 in array.shape:
        raise ValueError(f"input_image has shape {array.shape}; allowed are (h, w), (h, w, 1), (h, w, 3) and (h, w, 4)")
    if array.dtype == np.uint16:
        array = array / 65535
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"input_image has values from {array.min()} to {array.max()}; floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"input_image has dtype {array.dtype}; allowed are uint8, uint16 and floats in [0, 1]")
    return Image.fromarray(array)


def to_tensor(image, height, width):
    """PIL RGB image -> (1, 3, height, width) float32 in [-1, 1]"""
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def to_uint8(images):
    """(batch, 3, h, w) in [-1, 1] -> (batch, h, w, 3) uint8 array"""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_picture(image, path, parameters, overwrite=False):
    """Writes a uint8 array (h, w, 3) as a PNG file with a text chunk `parameters`, whole or not at all."""
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists already; name another file, or allow overwriting")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
