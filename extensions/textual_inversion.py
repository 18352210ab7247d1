"""Textual inversion (arXiv 2208.01618): vectors that stand for a word in the text encoder, learned from pictures.

    name, vectors = load_embedding("data/embeddings/easynegative.safetensors")
    context = encode_weighted("a red apple", name, models["clip"], tokenizer, {name: vectors})
    image = generate(context=context, models=models)

Read are the files of AUTOMATIC1111's web UI (.pt, and pictures with an embedding in them), of diffusers
(learned_embeds.bin and .safetensors) and of kohya's scripts.
"""

import base64
import json
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint_file import CheckpointError, read_checkpoint
from extensions.library import walk

PICTURES = (".png", ".webp")
FILES = (".pt", ".bin", ".safetensors", *PICTURES)
NO_NAMES = ("*", "emb_params", "clip_l")  # what the vectors are called where the file's own name is meant
MOST_BYTES = 2**26  # of an embedding in a picture, unpacked; one vector takes about 20,000


def load_embedding(path: str | os.PathLike) -> tuple[str, Tensor]:
    """Reads an embedding.

    Args:
        path: a .pt, .bin or .safetensors file, or a .png or .webp picture that holds one.

    Returns:
        (name, vectors (n, 768) float32). The name is the one in a picture or in diffusers' files, otherwise the file's.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no embedding for SD 1.x, or it is broken or hostile.
    """
    path = Path(path)
    is_picture = path.suffix.lower() in PICTURES
    entries = read_picture(path) if is_picture else read_checkpoint(path)[0]
    if "clip_g" in entries:
        raise CheckpointError(f"{path}: found an embedding for SDXL (clip_g); expected one for SD 1.x")
    tensors = entries.get("string_to_param", entries)  # the web UI's have it among other things
    if not isinstance(tensors, dict) or len(tensors) != 1:
        found = [repr(key)[:40] for key in tensors] if isinstance(tensors, dict) else [type(tensors).__name__]
        raise CheckpointError(f"{path}: found {len(found)} entries ({', '.join(found[:3])}); expected an embedding, "
                              f"which is one tensor")
    (token, vectors), = tensors.items()
    stored = entries.get("name") if is_picture else None if tensors is not entries or token in NO_NAMES else token
    return stored if isinstance(stored, str) else path.stem, check_vectors(vectors, path)


def find_embeddings(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Returns {name: vectors} of all embeddings in a folder and below, links followed, by the files' names and by their
    own.

    Pictures beside a file of their name are its previews. What cannot be used is left out, with a warning.
    """
    paths = sorted(path for path in walk(folder) if path.suffix.lower() in FILES)
    stems = {path.with_suffix("") for path in paths if path.suffix.lower() not in PICTURES}
    found = {}
    for path in paths:
        if path.suffix.lower() in PICTURES and (".preview" in path.suffixes or path.with_suffix("") in stems):
            continue
        try:
            name, vectors = load_embedding(path)
        except (CheckpointError, OSError) as error:
            warnings.warn(f"left out {error}", stacklevel=2)
            continue
        found.setdefault(path.stem, vectors)
        found.setdefault(name, vectors)
    return found


def check_vectors(vectors, path):
    """Returns (n, d) float32. Raises CheckpointError for what is no embedding of SD 1.x."""
    is_tensor = isinstance(vectors, Tensor)
    if not is_tensor or not vectors.is_floating_point() or vectors.ndim not in (1, 2) or 0 in vectors.shape:
        found = f"{vectors.dtype} {tuple(vectors.shape)}" if is_tensor else type(vectors).__name__
        raise CheckpointError(f"{path}: found {found} in the place of the vectors; expected floats (n, 768)")
    vectors = torch.atleast_2d(vectors.detach()).float()
    for width, model in [(1024, "SD 2"), (1280, "SDXL")]:
        if vectors.shape[1] == width:
            raise CheckpointError(f"{path}: found an embedding for {model} ({width}); expected one for SD 1.x (768)")
    if not vectors.isfinite().all():
        raise CheckpointError(f"{path}: found NaN or infinity in the vectors; expected numbers")
    return vectors


def read_picture(path):
    """Returns the dict of an embedding that the web UI put into a picture, as text or into the pixels of two strips."""
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            image.load()  # text can come after the pixels
            text = image.info.get("sd-ti-embedding")
            content = base64.b64decode(text) if text else read_strips(np.asarray(image.convert("RGB")))
        entries = json.loads(content, object_hook=to_tensor)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such picture; give the path of an embedding") from None
    except Exception as error:  # whatever a broken or hostile file makes the parsers stumble over
        raise CheckpointError(f"{path}: found no embedding in this picture, or a broken one ({type(error).__name__}: "
                              f"{str(error)[:80]!r}); expected one that the web UI saved") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: found a {type(entries).__name__} in this picture; expected an embedding")
    return entries


def to_tensor(entry):
    return torch.tensor(entry["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in entry else entry


def read_strips(pixels):
    """Returns the JSON that the low bits of pixels (h, w, 3) hold.

    On the left is the low half of each byte, on the right the high half; black columns part them from the picture.
    """
    lit = (pixels > 0).all(axis=2)
    rows, columns = lit.any(axis=1).nonzero()[0], lit.any(axis=0).nonzero()[0]
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = (nibbles.sum(axis=(0, 2)) == 0).nonzero()[0]
    low, high = (descramble(strip) for strip in (nibbles[:, : black[0]], nibbles[:, black[-1] + 1 :]))
    unpacker = zlib.decompressobj()
    content = unpacker.decompress((high << 4 | low).tobytes(), MOST_BYTES)  # after it, the same bytes fill the strips
    if not unpacker.eof:
        raise ValueError("it is too long or cut off")
    return content


def descramble(strip):
    """Takes away the pseudo-random nibbles under a strip: x ← 1664525 x + 1013904223 mod 2³², x mod 255."""
    powers = np.full(strip.size, 1664525, dtype=np.uint32)
    powers[:1] = 1
    numbers = np.uint32(1013904223) * powers.cumprod(dtype=np.uint32).cumsum(dtype=np.uint32)
    return strip ^ (numbers % 255 & 0x0F).astype(np.uint8).reshape(strip.shape)
