"""What the owner has put into data/, by name: files in a folder and below, links followed."""

import functools
import os
from pathlib import Path

import model_loader
from checkpoint_file import CheckpointError, read_checkpoint

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def walk(folder):
    """Yields the files in a folder and below, links followed, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, file) for file in sorted(files))


def named(folder, marks):
    """Returns {name: path} of the weights in a folder and below; a folder with one of these files in it counts as one,
    under its own name."""
    found = {}
    for path in walk(folder):
        if path.name in marks and path.parent != folder:
            found[path.parent.name] = path.parent
    inside = set(found.values())
    for path in walk(folder):
        if path.suffix.lower() in WEIGHTS and not inside & set(path.parents):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def stamp(path):
    """Returns what changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def is_model(path):
    if path.suffix in (".safetensors", ".ckpt", ".pt") and path.is_file() or (path / "unet").is_dir():
        return count_channels(path, *stamp(path)) > 0
    return False


@functools.lru_cache(maxsize=1000)
def count_channels(path, *stamp):
    return model_loader.count_channels(path)


@functools.lru_cache(maxsize=1000)
def trained_name(path, *stamp):
    """Returns what a LoRA was called by who trained it, or nothing."""
    if path.suffix != ".safetensors":
        return ""
    try:
        return read_checkpoint(path, mapped=True)[1].get("ss_output_name", "")
    except (CheckpointError, OSError):
        return ""
