"""Folders of pictures with captions, as training takes them.

A picture `x.png` has its caption in `x.txt`, or in a line of `metadata.jsonl`, as Hugging Face's imagefolder has it:

    {"file_name": "x.png", "text": "a red apple"}

A control picture of `x.png` is `control/x.png` (or .jpg, …), or is named in that line by "conditioning_image".
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from images import open_image, to_tensor
from pipeline import device_of, to_network

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
METADATA = "metadata.jsonl"


class Example(NamedTuple):
    picture: Path
    caption: str
    control: Path | None = None


def read_folder(folder, caption: str | None = None, needs_captions: bool = True,
                controls: bool = False) -> list[Example]:
    """Reads what there is to learn from, and opens each picture once to see that it can be.

    Args:
        caption: for pictures that have none of their own.
        needs_captions: whether a picture without a caption is an error; otherwise its caption is "".
        controls: whether each picture has to have a control picture.

    Returns:
        A list of examples, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, or a picture that is named is not in it.
        ValueError: it has no pictures, one of them cannot be read, or a caption is empty or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one with pictures")
    if caption is not None and not caption.strip():
        raise ValueError("the caption for all pictures is empty; say what they show")
    metadata = folder / METADATA
    listed = read_metadata(metadata) if metadata.is_file() else read_texts(folder)
    if not listed:
        raise ValueError(f"{folder}: has no pictures; put some there ({', '.join(SUFFIXES)})")
    if caption is not None and all(text is not None for _, text, _ in listed):
        raise ValueError(f"{folder}: every picture has a caption of its own; leave the caption for all out")

    examples = []
    for picture, text, control in listed:
        text = caption if text is None else text
        if text is None and needs_captions:
            raise ValueError(f"{picture}: has no caption; write it into {picture.with_suffix('.txt').name}, or give "
                             f"one for all: --caption")
        if text is not None and not text.strip():
            raise ValueError(f"{picture}: its caption is empty; say what it shows, or take the picture away")
        width, height = open_image(picture).size
        if controls:
            control = control or find_control(picture)
            other = open_image(control).size
            if width * other[1] != height * other[0]:
                raise ValueError(f"{control}: has {other[0]}x{other[1]} pixels, {picture.name} {width}x{height}; they "
                                 f"must have the same proportions")
        examples.append(Example(picture, (text or "").strip(), control))
    return examples


def read_texts(folder):
    """Returns [(picture, caption or None, None)] of a folder with a text file beside each picture."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    texts = [picture.with_suffix(".txt") for picture in pictures]
    return [(picture, read_text(text) if text.is_file() else None, None) for picture, text in zip(pictures, texts)]


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no text in UTF-8; save it as that") from None


def read_metadata(path):
    """Returns [(picture, caption or None, control picture or None)] of the lines of a metadata.jsonl."""
    listed = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            names = [row["file_name"], row.get("text"), row.get("conditioning_image")]
        except (ValueError, LookupError, AttributeError, TypeError):
            names = [None]
        if not isinstance(names[0], str) or not all(isinstance(name, (str, type(None))) for name in names):
            raise ValueError(f'{path}: line {number} is {line[:60]!r}; give lines such as '
                             f'{{"file_name": "x.png", "text": "a red apple"}}')
        picture, text, control = names
        listed.append((path.parent / picture, text, control and path.parent / control))
    return sorted(listed, key=lambda row: row[0])


def find_control(picture):
    folder = picture.parent / "control"
    found = [folder / (picture.stem + suffix) for suffix in SUFFIXES]
    control = next((path for path in found if path.is_file()), None)
    if control is None:
        raise FileNotFoundError(f"{picture}: has no control picture; expected {folder / picture.name}")
    return control


@torch.no_grad()
def encode_pictures(examples: list[Example], encoder, size: int) -> torch.Tensor:
    """Returns the latents of pictures, cropped and scaled to size x size pixels: the means that the encoder finds,
    (n, 4, size / 8, size / 8) float32 on the encoder's device."""
    latents = []
    for example in tqdm(examples, desc="pictures to latents", unit="picture", leave=False):
        pixels = to_tensor(open_image(example.picture), size, size)
        noise = torch.zeros(1, 4, size // 8, size // 8)
        latents.append(encoder(*to_network(encoder, device_of(encoder), pixels, noise)).float())
    return torch.cat(latents)
