"""A stranger's checkpoint file in, names and tensors out. Nothing in it is ever executed."""

import ctypes
import mmap
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """The file is not an SD 1.x checkpoint that can be loaded; the message says why and what was expected."""


def read_checkpoint(path):
    """Reads all that a file holds, memory-mapped where its format allows.

    Returns:
        (dict of all the entries, the state dict unwrapped; the safetensors metadata or {})
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .ckpt or .safetensors file of SD 1.x")
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder; expected one .ckpt or .safetensors file in the SD 1.x layout")
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        return read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return read_pickle(path, mmap=head.startswith(b"PK")), {}
    found = "an empty file" if not head else f"a file that begins with {head[:24]!r}"
    if head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer instead of the weights it points to (`git lfs pull` fetches them)"
    elif head.lstrip().startswith(b"<"):
        found = "a web page, as a failed download leaves it"
    raise CheckpointError(f"{path}: found {found}; expected a PyTorch or safetensors checkpoint")


def read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: found a broken or truncated safetensors file ({str(error)!r}); expected a "
                              f"whole one: download it again") from None


def read_pickle(path, mmap):
    try:
        # What torch.load would run (asked of its own parser: zipfile can be made to see other entries) or unpack.
        if mmap and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise CheckpointError("found a TorchScript program; expected weights alone")
        if not mmap and tarfile.is_tarfile(path):
            raise CheckpointError("found a tar archive; expected a PyTorch or safetensors checkpoint")
        checkpoint = torch.load(path, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=RESTRICTED)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # whatever a broken or hostile file makes the parsers stumble over
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: found a broken or truncated PyTorch file ({type(error).__name__}: {reason!r}); "
                              f"expected a whole one: download it again") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: found a pickled {type(checkpoint).__name__}; expected a dict of weights")
    inner = checkpoint.get("state_dict", checkpoint)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: found a {type(inner).__name__} as 'state_dict'; expected a dict of weights")
    return inner


class Placeholder:
    """Stands for an object of a class that is not rebuilt, such as a Lightning callback; takes anything, does nothing.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Placeholder()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    extend = add = append


class PlainDict(dict):
    """Stands for an OrderedDict or defaultdict; takes no attributes from a file, as they would hide its methods."""

    def __setstate__(self, state):
        pass


def sealed(function):
    """Returns the function in a shell: a pickle can set attributes (`__name__`, `__defaults__`) of all that it gets."""

    def call(*args):
        return function(*args)

    call.__setstate__ = lambda state: None
    return call


REBUILT = {
    ("torch._utils", "_rebuild_tensor"): sealed(torch._utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): sealed(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): sealed(torch._utils._rebuild_parameter),
    ("torch", "Size"): sealed(torch.Size),
    ("collections", "OrderedDict"): PlainDict,
    ("collections", "defaultdict"): sealed(lambda default_factory=None, *items: PlainDict(*items)),
}

# The parts of Python's own library whose classes an honest checkpoint may hold. Calls into any other part (os,
# subprocess, builtins.eval, ...) are what an attack looks like: the file is refused rather than read around it.
HARMLESS = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "numbers", "pathlib",
            "random", "time", "types", "typing", "uuid", "_codecs"}
HARMLESS_BUILTINS = {"set", "frozenset", "list", "dict", "tuple", "object", "slice", "range", "complex", "bytearray",
                     "bytes", "str", "int", "float", "bool", "type"}
PYTHON_2 = {"__builtin__", "commands", "copy_reg"}


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; every other class becomes a placeholder, so that nothing is imported."""

    def find_class(self, module, name):
        if (module, name) in REBUILT:
            return REBUILT[module, name]
        root = module.partition(".")[0]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):  # getattr would import submodules
            return vars(torch)[name]
        if root in ("builtins", "__builtin__") and name in HARMLESS_BUILTINS:
            return Placeholder
        if (root in sys.stdlib_module_names or root in PYTHON_2) and root not in HARMLESS:
            raise CheckpointError(f"found a pickle that calls {f'{module}.{name}'!r}, which no honest checkpoint does; "
                                  f"nothing was executed; expected tensors and plain containers: do not use this file")
        return Placeholder


RESTRICTED = types.ModuleType("restricted_pickle", "What torch.load asks of a pickle module.")
RESTRICTED.Unpickler = RestrictedUnpickler
RESTRICTED.load = lambda file, **kwargs: RestrictedUnpickler(file, **kwargs).load()


def find_mapped(path):
    """Returns the addresses (first, end) at which a file is mapped into memory; none where there is no /proc."""
    try:
        lines = [line.split(maxsplit=5) for line in open("/proc/self/maps")]
    except OSError:
        return []
    path = os.path.realpath(path)
    return [tuple(int(address, 16) for address in line[0].split("-")) for line in lines if line[5:] == [f"{path}\n"]]


def release(tensor, mapped):
    """Lets go of the pages of a mapped file that hold a tensor, or the file counts as memory in use until all is read.
    They would be read again if they were asked for."""
    page, address = mmap.PAGESIZE, tensor.data_ptr()
    first, end = -(-address // page) * page, (address + tensor.nbytes) // page * page
    if any(low <= first < end <= high for low, high in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
