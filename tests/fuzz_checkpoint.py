"""Feeds damaged and hostile files to `read_checkpoint`: each must be read or refused with a CheckpointError.

    python tests/fuzz_checkpoint.py 20000 [--seed 0]

Prints the files that did otherwise, or took more than ten seconds; fails if there are any, or if memory grew by more than
1 GB. What begins as a whole file is cut, spliced and changed byte by byte, or opcode by opcode within its pickle.
"""

import argparse
import collections
import io
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint_file import CheckpointError, read_checkpoint

INTERESTING = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


class FromMPS:
    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        function = torch._utils._rebuild_device_tensor_from_numpy
        return function, (self.tensor.numpy(), self.tensor.dtype, "mps:0", False)


def whole_files():
    """Returns the bytes of files of each kind that is read."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"block.{i}.{kind}": torch.randn(shape, generator=generator).to(dtype) for i, dtype in
               enumerate([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
               for kind, shape in [("weight", (3, 4)), ("bias", (4,))]}
    marked = torch.ones(3)
    marked.is_frozen = True
    objects = [
        {"state_dict": collections.OrderedDict(weights), "epoch": 3, "kinds": {1: torch.float16, "x": slice(2)}},
        {**weights, "tied": weights["block.0.weight"], "expanded": torch.zeros(1).expand(8), "marked": marked},
        {"string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 8)}), "string_to_token": {"*": 265}},
        {"a": FromMPS(torch.ones(2, 3)), "b": torch.nn.Buffer(torch.ones(2)), "c": [1, 2.5, "text", b"bytes", {3}]},
    ]
    files = [save({name: weight for name, weight in weights.items()}, {"unet_heads": "4"})]
    for content in objects:
        for settings in [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}]:
            file = io.BytesIO()
            torch.save(content, file, **settings)
            files.append(file.getvalue())
    return files


def damage_bytes(data, rng, others):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                data = data[:place]
            case 2:
                del data[place : place + rng.choice([1, 2, 8, 64])]
            case 3:
                size = rng.choice("BHIQ")
                number = rng.choice(INTERESTING) % 256 ** struct.calcsize(size)
                data[place : place + struct.calcsize(size)] = struct.pack(f"<{size}", number)
            case 4:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                data[place:place] = other[start : start + rng.choice([1, 8, 100])]
            case 5:
                data[place:place] = data[place : place + rng.choice([1, 8, 100])] * rng.choice([2, 50])
    return bytes(data)


def damage_pickle(pickled, rng):
    """Changes, repeats, removes or swaps whole opcodes, so that more of the pickle runs."""
    starts = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    steps = [pickled[start:end] for start, end in zip(starts, starts[1:])]
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(steps))
        match rng.randrange(6):
            case 0:
                steps[place] = rng.choice(OPCODES) + steps[place][1:]
            case 1:
                del steps[place]
                steps = steps or [b"."]
            case 2:
                steps[place:place] = [rng.choice(steps)] * rng.choice([1, 2, 1000])
            case 3:
                other = rng.randrange(len(steps))
                steps[place], steps[other] = steps[other], steps[place]
            case 4:
                steps[place] = rng.choice([b"r", b"j", b"J"]) + struct.pack("<I", rng.choice(INTERESTING) % 2**32)
            case 5:
                steps[place] = b"\x8a\x08" + struct.pack("<q", rng.choice(INTERESTING) * rng.choice([1, -1]))
    return b"".join(steps)


def with_pickle(data, rng):
    """Returns a PyTorch file with another pickle in the place of its own."""
    if not data.startswith(b"PK"):
        header = 0
        for _ in range(3):  # the number of the format, its version, the system
            header += next(place + 1 for opcode, _, place in pickletools.genops(data[header:]) if opcode.name == "STOP")
        end = header + next(place + 1 for opcode, _, place in pickletools.genops(data[header:]) if opcode.name == "STOP")
        return data[:header] + damage_pickle(data[header:end], rng) + data[end:]
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damage_pickle(content, rng) if name.endswith("data.pkl") else content)
    return result.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    files, outcomes, faults = whole_files(), collections.Counter(), 0
    pickles = [data for data in files if not data[8:9] == b"{"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        for i in range(arguments.count):
            rng = random.Random(f"{arguments.seed} {i}")
            path.unlink(missing_ok=True)
            path.write_bytes(damage_bytes(rng.choice(files), rng, files) if i % 2 else with_pickle(rng.choice(pickles), rng))
            start = time.perf_counter()
            try:
                weights, _ = read_checkpoint(path, mapped=bool(i % 3))
                sum(weight.float().sum() for weight in weights.values() if isinstance(weight, torch.Tensor))
                outcome = "read"
            except CheckpointError as error:
                outcome = "refused" if str(path) in str(error) and "\n" not in str(error) else f"message {error!r}"
            except Exception:
                outcome = traceback.format_exc()
            if time.perf_counter() - start > 10:
                outcome = "took more than ten seconds"
            if outcome not in ("read", "refused"):
                faults += 1
                print(f"file {i}: {outcome}", flush=True)
            outcomes[outcome if outcome in ("read", "refused") else "fault"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"{arguments.count} files: {dict(outcomes)}; memory grew by {grown:.2f} GB")
    sys.exit(bool(faults) or grown > 1)


if __name__ == "__main__":
    main()
