"""A stranger's file of weights in, names and tensors out. Nothing in it is ever executed: see `unpickler.py`."""

import bisect
import ctypes
import math
import mmap
import struct
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

from unpickler import CheckpointError, Unknown, Unpickler, describe


def read_checkpoint(path, mapped=False):
    """Reads all that a file holds: a checkpoint, a VAE, a LoRA, an embedding, a ControlNet.

    Args:
        path: a safetensors file, or one that `torch.save` wrote (.ckpt, .pt, .pth, .bin); its content tells which.
        mapped: leave the tensors in a memory map of the file where that can be done, for a caller who copies one
            after the other and calls `release`: what is not copied changes, or ends the process, with the file.

    Returns:
        (dict of the entries whose names are texts, a "state_dict" unwrapped; the safetensors metadata or {}). Values
        are tensors and what a pickle may hold besides: numbers, texts, lists, dicts, `Unknown`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is of another kind, broken or hostile.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .ckpt or .safetensors file of SD 1.x")
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder; expected one .ckpt or .safetensors file in the SD 1.x layout")
    with open(path, "rb") as file:
        head = file.read(512)
        kind = "safetensors" if head[8:9] == b"{" else "PyTorch"
        try:
            if kind == "safetensors":
                return read_safetensors(path, file, mapped)
            return unwrap(read_pickle(file, head, mapped)), {}
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # whatever a broken or hostile file makes the parsers stumble over
            reason = str(error).strip().partition("\n")[0][:200]
            raise CheckpointError(f"{path}: found a broken or truncated {kind} file ({type(error).__name__}: "
                                  f"{reason!r}); expected a whole one: download it again") from None


def read_safetensors(path, file, mapped):
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError:  # which the library refuses
        name = f"/dev/fd/{file.fileno()}"
    with safe_open(name, framework="pt") as tensors:
        weights = {key: tensors.get_tensor(key) for key in tensors.keys()}
        return {key: weight if mapped else weight.clone() for key, weight in weights.items()}, tensors.metadata() or {}


def read_pickle(file, head, mapped):
    found = "an empty file" if not head else f"a file that begins with {head[:24]!r}"
    if head[257:262] == b"ustar":
        found = "a tar archive"
    elif head.startswith(b"PK\x03\x04"):
        return read_zip(file, mapped)
    elif head.startswith(b"\x80"):
        return read_legacy(file)
    elif head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer instead of the weights it points to (`git lfs pull` fetches them)"
    elif head.lstrip().startswith(b"<"):
        found = "a web page, as a failed download leaves it"
    raise CheckpointError(f"found {found}; expected a PyTorch or safetensors checkpoint")


def read_zip(file, mapped):
    """Reads what torch.save writes since PyTorch 1.6: a zip archive of one pickle, and of one entry a storage."""
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"found a zip archive with {len(pickles)} files 'data.pkl'; expected a PyTorch file")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.namelist():
        raise CheckpointError("found a TorchScript program; expected weights alone")
    content, data = map_file(file)
    storages = {}

    def place(name):
        entry = archive.getinfo(folder + name)
        if entry.compress_type or entry.compress_size != entry.file_size:
            raise CheckpointError(f"found {name!r} compressed; expected a PyTorch file, which never is")
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
        return slice(start, start + entry.file_size)

    def load_storage(kind, dtype, key, location, count):
        if key not in storages:
            where = place(f"data/{key}")
            storages[key] = data[where]
            if not mapped or swapped or where.start % 16:  # tensors must be aligned; PyTorch does so, to 64
                storages[key] = data[where].clone()
            if swapped:
                storages[key].untyped_storage().byteswap(dtype)
        return storages[key][: count * dtype.itemsize].view(dtype)

    swapped = f"{folder}byteorder" in archive.namelist() and content[place("byteorder")].decode() != sys.byteorder
    content.seek(place("data.pkl").start)
    return Unpickler(content, load_storage).run()


def read_legacy(file):
    """Reads what torch.save wrote before PyTorch 1.6: five pickles, and the storages that the last one lists."""
    content, data = map_file(file)
    storages = {}

    def load_storage(kind, dtype, key, location=None, count=None, view=None):
        if kind == "module":  # a class, with its source
            return dtype
        if key not in storages:
            if count * dtype.itemsize + sum(map(len, storages.values())) > len(data):
                raise CheckpointError("found a broken or truncated PyTorch file, shorter than the weights it speaks "
                                      "of; expected a whole one: download it again")
            storages[key] = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        _, start, count = view or (key, 0, count)
        return storages[key].view(dtype)[start : start + count]

    if Unpickler(content).run() != 0x1950A86A20F9469CFC6C:  # of the format
        raise CheckpointError("found a pickle that torch.save did not write; expected a PyTorch checkpoint")
    Unpickler(content).run(), Unpickler(content).run()  # its version, the system
    checkpoint = Unpickler(content, load_storage).run()
    listed = Unpickler(content).run()
    for key in listed:
        start = content.tell() + 8  # after the length
        storages[key].copy_(data[start : start + len(storages[key])])
        content.seek(start + len(storages[key]))
    if set(storages) - set(listed):
        raise CheckpointError("found a broken PyTorch file, without some of the weights that it speaks of; expected a "
                              "whole one: download it again")
    return checkpoint


def unwrap(checkpoint):
    """Returns the dict of weights in what a pickle holds."""
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    found = f"a pickled {describe(weights)}" if weights is checkpoint else f"a {describe(weights)} as 'state_dict'"
    if isinstance(weights, Unknown) and not weights:
        raise CheckpointError(f"found {found}; expected its weights alone, as torch.save(model.state_dict(), path) "
                              f"writes them")
    if not isinstance(weights, dict):
        raise CheckpointError(f"found {found}; expected a dict of weights by name")
    return weights


# ---- memory maps


def map_file(file):
    """Returns a file's memory map, and its bytes as a tensor in it."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return content, torch.frombuffer(content, dtype=torch.uint8)


def find_mapped():
    """Returns the addresses (first, end) at which files are mapped into memory, in order; none where there is no
    /proc."""
    try:
        with open("/proc/self/maps", "rb") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    return [tuple(int(address, 16) for address in line[0].split(b"-")) for line in lines
            if len(line) == 6 and line[5].startswith(b"/")]


def release(tensor, mapped):
    """Lets go of the pages of mapped files that hold a tensor, or the files count as memory in use until all is read.
    They would be read again if they were asked for."""
    page, address = mmap.PAGESIZE, tensor.data_ptr()
    first, end = -(-address // page) * page, (address + tensor.nbytes) // page * page
    file = bisect.bisect_right(mapped, (first, math.inf)) - 1  # the last one that begins before the tensor
    if first < end and file >= 0 and end <= mapped[file][1]:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
