import argparse
import array
import collections
import contextlib
import datetime
import functools
import io
import itertools
import logging
import operator
import os
import pathlib
import pickle
import pickletools
import re
import resource
import string
import struct
import subprocess
import sys
import tarfile
import time
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint_file
from checkpoint_file import CheckpointError, read_checkpoint
from model_converter import load_from_standard_weights, to_standard_weights
from unpickler import Unknown, Unpickler

UNET = "model.diffusion_model."


def assert_holds(loaded, weights):
    ours = to_standard_weights(loaded)
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name].reshape(ours[name].shape)) for name in ours)


def test_a_pickle_within_the_bytes_of_a_checkpoint_stays_bytes(written, tiny, weights, tmp_path):
    inner = pickle.dumps(Attack(os.system, f"touch {tmp_path / 'executed'}"))
    assert_holds(load_from_standard_weights(written({"state_dict": weights, "callbacks": inner})), weights)
    assert not (tmp_path / "executed").exists()


class AttributeDict(dict):
    pass


class ListConfig:
    """As omegaconf's: a state of its own and items like a list's."""

    def __init__(self):
        self.content = [self, float, ModelCheckpoint]

    def __reduce__(self):
        return ListConfig, (), {"_content": self.content, "_parent": None}, iter([1, 2]), iter([("a", 1)])

    def append(self, item):
        pass

    def __setitem__(self, key, value):
        pass


class ModelCheckpoint:
    def __init__(self):
        self.best = torch.tensor(1.0)
        self.folder = pathlib.PurePosixPath("/logs")


def test_a_checkpoint_with_lightning_classes_loads(written, tiny, weights, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    for kind in (ModelCheckpoint, AttributeDict, ListConfig):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    checkpoint = {
        "state_dict": collections.OrderedDict(weights), "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)},
                      "it": ModelCheckpoint()},
        "config": ListConfig(),
        "hyper_parameters": AttributeDict(lr=1e-4, size=torch.Size([3]), dtype=torch.float16,
                                          device=torch.device("cpu")),
        "loops": collections.defaultdict(list, a=[1]), "seen": {1, 2}, "frozen": frozenset([3]), "z": 1 + 2j,
        "score": np.float64(0.5), "kind": np.dtype("float32"), "array": np.arange(3), "bytes": b"abc",
        "arguments": argparse.Namespace(a=1), "slice": slice(1, 2), "parameter": torch.nn.Parameter(torch.zeros(2)),
    }
    for legacy in (False, True):
        path = written(checkpoint, _use_new_zipfile_serialization=not legacy)
        with monkeypatch.context() as context:
            for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
                context.delitem(sys.modules, name)
            assert_holds(load_from_standard_weights(path), weights)


class Attack:
    """Runs a command when it is unpickled by an ordinary unpickler."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(marker):
    command = f"touch {marker}"
    return {
        "os.system": Attack(os.system, command),
        "subprocess.Popen": Attack(subprocess.Popen, ["touch", str(marker)]),
        "eval": Attack(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Attack(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Attack(getattr, "", "join"),
        "__import__": Attack(__import__, "this"),
        "open": Attack(io.open, str(marker), "w"),
        "pickle.loads": Attack(pickle.loads, pickle.dumps(Attack(os.system, command))),
        "runpy": Attack(__import__("runpy").run_path, str(marker)),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["inside the weights", "beside the weights", "instead of the weights"])
@pytest.mark.parametrize("name", attacks("x"))
def test_hostile_pickles_are_refused_and_nothing_runs(written, tmp_path, name, place, legacy):
    marker = tmp_path / "executed"
    attack = attacks(marker)[name]
    key, weights = f"{UNET}out.0.bias", {f"{UNET}out.0.weight": torch.zeros(32)}
    checkpoint = {"inside the weights": {"state_dict": {**weights, key: attack}},
                  "beside the weights": {"state_dict": weights, "callbacks": [attack]},
                  "instead of the weights": attack}[place]
    path = written(checkpoint, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="nothing was executed") as caught:
        load_from_standard_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not marker.exists()


def raw_pickle(path, opcodes):
    """A zip checkpoint around hand-written pickle opcodes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", opcodes)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


def raw_legacy(path, opcodes):
    """Writes opcodes as the checkpoint in a file of the format before PyTorch 1.6, which lists no storages."""
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in header) + opcodes + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("opcodes", [
    b"cposix\nsystem\n(X\x09\x00\x00\x00touch ran\ntR.",  # GLOBAL, REDUCE
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",  # STACK_GLOBAL
    b"(X\x09\x00\x00\x00touch ranios\nsystem\n.",  # INST
    b"(cos\nsystem\nX\x09\x00\x00\x00touch rano.",  # OBJ
    b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",  # as Python 2 names it
    b"cnt\nsystem\n(X\x09\x00\x00\x00touch rantR.",
    b"\x80\x04\x8c\x05torch\x8c\x1dserialization.os.system.__call__\x93\x8c\x09touch ran\x85R.",  # a dotted name
    b"\x80\x04\x8c\x0bcollections\x8c\x19OrderedDict.fromkeys.__s.\x93\x85R.",
    b"\x80\x02\x82\x01.",  # EXT1
    b"Pnonsense\n.",  # a persistent id of odd shape
    b"\x80\x02(X\x07\x00\x00\x00storagetQ.",
    b"\x80\x04\x8c\x05os.\na\x8c\x03a\nb\x93.",  # line breaks in a name
    b"", b".", b"\x80\x02N.", b"garbage",
])
def test_hand_written_pickles_raise_one_error_and_call_nothing(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    path = raw_pickle(tmp_path / "model.ckpt", opcodes)
    with pytest.raises(CheckpointError) as caught:
        load_from_standard_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_hand_written_pickle_is_read_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="found no weights"):
        load_from_standard_weights(raw_pickle(tmp_path / "model.ckpt", b"\x80\x02}."))


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def test_a_pickle_cannot_set_attributes_of_what_it_is_given(tmp_path):
    """BUILD sets them, `__defaults__` of torch's own functions, too; an OrderedDict's could hide its methods."""
    path = raw_pickle(tmp_path / "model.ckpt", b"\x80\x02" + REBUILD + b"(}}" + text("__defaults__") + b"K\x01\x85stb.")
    with pytest.raises(CheckpointError, match="a pickled function"):
        load_from_standard_weights(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    path = raw_pickle(path, b"\x80\x02ccollections\nOrderedDict\n)R}" + text("get") + REBUILD + b"sb.")
    with pytest.raises(CheckpointError, match="found no weights"):
        load_from_standard_weights(path)


def test_a_legacy_file_cannot_make_torch_write_a_patch(tmp_path):
    """torch.load writes NAME.patch if a class asks for it by `dump_patches` and its source differs from the file's."""
    name = str(tmp_path / "written")
    opcodes = (b"\x80\x02" + REBUILD + b"(}" + text("dump_patches") + b"\x88s}" + text("__name__") + text(name) + b"stb"
               + b"0(" + text("module") + REBUILD + text("source.py") + text("some other source") + b"tQ.")
    path = raw_legacy(tmp_path / "model.ckpt", opcodes)
    with pytest.raises(CheckpointError):
        load_from_standard_weights(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
    assert torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"


def test_a_tar_archive_is_not_unpacked(tmp_path):
    """torch.load unpacks it, hard links and modes included: this one would make another file readable to all."""
    victim, path = tmp_path / "victim", tmp_path / "model.ckpt"
    victim.touch(mode=0o600)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as file:
        file.addfile(tarfile.TarInfo("\x80first"))  # begins as a pickle does
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(victim), 0o666
        link.uid, link.gid = os.getuid(), os.getgid()
        file.addfile(link)
    with pytest.raises(CheckpointError, match="model.ckpt: found a tar archive"):
        load_from_standard_weights(path)
    assert victim.stat().st_mode & 0o777 == 0o600


def test_a_tensor_that_fakes_its_size(written, weights):
    key = f"{UNET}time_embed.0.weight"
    path = written({**weights, key: torch.zeros(1).expand(10**9, 10**9)})
    with pytest.raises(CheckpointError, match=f"{key}' has shape .1000000000, 1000000000., of which the file holds"):
        load_from_standard_weights(path)


@pytest.mark.parametrize("module, name", [
    ("torch", "load"), ("torch", "compile"), ("torch", "onnx"), ("torch", "serialization.os.system"),
    ("torch", "float32.__class__"), ("torch._utils", "os.system"), ("torch.hub", "load"), ("torch.jit", "load"),
    ("torch.serialization", "load"), ("numpy", "load"), ("collections", "namedtuple"), ("evil", "FloatStorage"),
    ("evil", "OrderedDict"), ("torchx", "_rebuild_tensor"),
])
def test_no_other_name_is_looked_up(monkeypatch, module, name):
    monkeypatch.setattr(torch, "__getattr__", lambda name: pytest.fail("torch imports submodules here"))
    before = set(sys.modules)
    found = Unpickler(b"").find(module, name)
    assert isinstance(found, Unknown) and found.name == f"{module}.{name}"
    assert set(sys.modules) == before


@pytest.fixture
def torchscript(tmp_path):
    """The path of an archive of the kind for which torch.load turns to torch.jit.load, whatever it was asked."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        for name, content in [("data.pkl", b"\x80\x02}."), ("constants.pkl", b"\x80\x02)."), ("version", "3\n")]:
            file.writestr(f"model/{name}", content)
    return tmp_path / "model.pt"


def test_torchscript_is_refused(torchscript):
    with pytest.raises(CheckpointError, match="model.pt: found a TorchScript program"):
        load_from_standard_weights(torchscript)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4265380512\n"


@pytest.mark.parametrize("content, message", [
    (b"", "an empty file"),
    (b"hello, world\n", r"begins with b'hello, world"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    (LFS.encode(), "a Git LFS pointer"),
    (struct.pack("<Q", 1 << 62) + b"{}", "a broken or truncated safetensors file"),
    (struct.pack("<Q", 2) + b"{}", "no weights"),
    (struct.pack("<Q", 57) + b'{"a\\nb":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}', "invalid offset"),
    (b"PK\x03\x04" + b"\0" * 100, "a broken or truncated PyTorch file"),
    (b"\x80\x02garbage", "a broken or truncated PyTorch file"),
])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_from_standard_weights(tmp_path / name)
    assert name in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_files(written, checkpoint, weights, tmp_path, kind, share):
    path = checkpoint if kind == "safetensors" else written(weights, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="cut.ckpt: found a broken or truncated") as caught:
        load_from_standard_weights(tmp_path / "cut.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, message", [([1, 2], "a pickled list"),
                                              ({"state_dict": [1]}, "a list as 'state_dict'")])
def test_pickles_of_other_things(written, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(written(content))


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt: no such checkpoint"):
        load_from_standard_weights(tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_from_standard_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_released_tensor_is_out_of_memory_and_can_be_read_again(name, tmp_path):
    path, expected = tmp_path / name, torch.randn(4, 2**18)
    (save_file if name.endswith("safetensors") else torch.save)({"a": expected, "b": expected + 1}, path)
    weights, _ = read_checkpoint(path, mapped=True)
    mapped = checkpoint_file.find_mapped()
    assert torch.equal(weights["a"], expected) and torch.equal(weights["b"], expected + 1)
    before = resident(path)
    checkpoint_file.release(weights["a"], mapped)
    if Path("/proc").exists():  # Linux: else there is nothing to let go of
        assert before - resident(path) >= expected.nbytes - 2 * 65536
    assert torch.equal(weights["a"], expected) and torch.equal(weights["b"], expected + 1)


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    if not Path("/proc").exists():
        return 0
    lines = Path("/proc/self/smaps").read_text().splitlines()
    sizes = [lines[k + 1 : k + 12] for k, line in enumerate(lines) if line.endswith(str(path))]
    return 1024 * sum(int(line.split()[1]) for part in sizes for line in part if line.startswith("Rss:"))


def test_memory_that_no_file_is_mapped_to_is_left_alone():
    weight = torch.ones(2**16)
    for mapped in ([], checkpoint_file.find_mapped(), [(0, 4096)]):
        checkpoint_file.release(weight, mapped)
        assert weight.sum() == 2**16



# ---- what is read once does not hang on the file


@pytest.mark.parametrize("read", [lambda path: read_checkpoint(path)[0], load_from_standard_weights])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_writing_to_a_file_that_was_read_changes_nothing(checkpoint, written, tiny, weights, tmp_path, read, kind):
    path = written(weights, "model", _use_new_zipfile_serialization=kind == "zip")
    if kind == "safetensors":
        path.write_bytes(checkpoint.read_bytes())
    loaded = read(path)
    flat = {name: weight for entry, part in loaded.items()
            for name, weight in (part.items() if isinstance(part, dict) else [(entry, part)])}
    before = {name: weight.clone() for name, weight in flat.items()}
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\x7f" * size)
    assert all(torch.equal(weight, before[name]) for name, weight in flat.items())
    with open(path, "wb"):  # cut to nothing: a page that is still mapped would end the process
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in flat.items())


def test_mapped_tensors_lie_in_the_file(written):
    weights, _ = read_checkpoint(written({"a": torch.ones(2**20)}), mapped=True)
    address = weights["a"].data_ptr()
    assert any(low <= address < high for low, high in checkpoint_file.find_mapped()) == Path("/proc").exists()
    weights, _ = read_checkpoint(written({"a": torch.ones(2**20)}))
    assert not any(low <= weights["a"].data_ptr() < high for low, high in checkpoint_file.find_mapped())


# ---- small files that would take all memory, or the process


@pytest.mark.parametrize("opcodes", [
    b"\x80\x02}r\xff\xff\xff\x3fX\x01\x00\x00\x00aNs.",  # LONG_BINPUT, index 2**30: Python's own makes a table of 8 GB
    b"\x80\x02}p99999999999999999999\n.",
    b"\x80\x02}" + b"N" + 300_000 * b"\x85" + b"Ns.",  # as a key: hashing it overflows the stack
    b"\x80\x02}X\x01\x00\x00\x00a" + 100_000 * b"cx\nY\n" + b")" + 100_000 * b"R" + b"s.",
    b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(100_000))
    + b"u.",  # keys of one hash
    b"\x80\x02" + 3_000_000 * b"}" + b".",
    b"\x80\x02ccollections\nOrderedDict\nq\x00](" + 100_000 * b"X\x01\x00\x00\x00aN\x86" + b"eq\x010"
    + 10_000 * b"h\x00h\x01\x85R" + b".",  # a list that is copied 10,000 times
])
def test_bombs(tmp_path, opcodes):
    path, start = raw_pickle(tmp_path / "model.ckpt", opcodes), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CheckpointError):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KB
    assert time.process_time() - start < 30


def test_numpy_arrays_that_share_a_text(tmp_path):
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b\x87R(K\x01J\x00\x00"
             b"\x10\x00\x85"
             b"cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
             b"\xffK\x00tb\x89h\x07tb")
    rebuilt = (b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n(" + array + b"ctorch\nuint8\n" + text("cpu")
               + b"\x89tR")
    opcodes = (b"\x80\x02c_codecs\nencode\n" + text("a" * 2**20) + text("latin1") + b"\x86Rq\x070]("
               + 100 * rebuilt + b"e.")
    with pytest.raises(CheckpointError, match="of which the file holds but a part"):
        read_checkpoint(raw_pickle(tmp_path / "model.ckpt", opcodes))


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_compressed_entries_are_refused(written, tmp_path, name):
    with (zipfile.ZipFile(written({"a": torch.zeros(2**20)})) as old,
          zipfile.ZipFile(tmp_path / "packed.ckpt", "w") as new):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED if entry.endswith(name) else zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match=f"packed.ckpt: found '{name}' compressed"):
        read_checkpoint(tmp_path / "packed.ckpt")


@pytest.mark.parametrize("more, n", [("other/data.pkl", 2), ("", 0)])
def test_an_archive_has_one_pickle(written, tmp_path, more, n):
    with (zipfile.ZipFile(written({"a": torch.zeros(2)})) as old,
          zipfile.ZipFile(tmp_path / "several.ckpt", "w") as new):
        for entry in old.namelist():
            new.writestr(entry if more else entry.replace("data.pkl", "data.txt"), old.read(entry))
        if more:
            new.writestr(more, old.read(next(name for name in old.namelist() if name.endswith("data.pkl"))))
    with pytest.raises(CheckpointError, match=f"several.ckpt: found a zip archive with {n} files 'data.pkl'"):
        read_checkpoint(tmp_path / "several.ckpt")


def test_items_of_a_tensor_cannot_be_set(tmp_path):
    tensor = REBUILD + b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
    tensor += b"K\x00K\x02\x85K\x01\x85\x89NtR"
    for end in (b"K\x00K\x01s.", b"(K\x00K\x01u.", b"Na.", b"(Ne."):
        path = raw_pickle(tmp_path / "model.ckpt", b"\x80\x02" + tensor + end)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("archive/data/0", bytes(8))
        with pytest.raises(CheckpointError, match="a Tensor; expected a (dict|list)"):
            read_checkpoint(path)


@pytest.mark.parametrize("numbers, message", [
    ((0, 3, 1), "'a' has shape .3,., of which the file holds but a part"), ((1, 2, 1), "holds but a part"),
    ((0, 2, 2), "holds but a part"), ((-1, 2, 1), "impossible"), ((0, 2**50, 0), "impossible"),
    ((0, 2**39, 0), "holds but a part"),
])
def test_a_tensor_beyond_its_storage(tmp_path, numbers, message):
    offset, size, stride = (b"\x8a\x08" + struct.pack("<q", number) for number in numbers)
    opcodes = (b"\x80\x02}" + text("a") + REBUILD + b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
               + text("cpu") + b"K\x02tQ" + offset + size + b"\x85" + stride + b"\x85\x89NtRs.")
    path = raw_pickle(tmp_path / "model.ckpt", opcodes)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_legacy_file_without_one_of_its_storages(written):
    path = written({"a": torch.ones(4), "b": torch.ones(4)}, _use_new_zipfile_serialization=False)
    with open(path, "rb") as file:
        for _ in range(4):
            collections.deque(pickletools.genops(file), 0)
        start = file.tell()
        listed = pickle.load(file)
        rest = file.read()
    assert len(listed) == 2
    path.write_bytes(path.read_bytes()[:start] + pickle.dumps(listed[:1], 2) + rest)
    with pytest.raises(CheckpointError, match="without some of the weights"):
        read_checkpoint(path)


@pytest.mark.parametrize("counts", [[2**33], [20, 20], [20, 1]])
def test_a_legacy_file_that_is_shorter_than_its_storages(tmp_path, counts):
    """Nothing is allocated for bytes that the file cannot hold, in one storage or in all of them together."""
    tensors = b"".join(text(str(k)) + REBUILD + b"((" + text("storage") + b"ctorch\nDoubleStorage\n" + text(str(k))
                       + text("cpu") + b"\x8a\x08" + struct.pack("<q", count) + b"NtQK\x00K\x01\x85K\x01\x85\x89NtR"
                       for k, count in enumerate(counts))
    path = raw_legacy(tmp_path / "model.ckpt", b"\x80\x02}(" + tensors + b"u.")
    with pytest.raises(CheckpointError, match="shorter than the weights" if sum(counts) > 30 else "without some"):
        read_checkpoint(path)


# ---- honest files


class ByFunction:
    """Pickled as a call of a function of PyTorch's."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def marked(tensor):
    tensor.is_frozen = True
    return tensor


EXPECTED = torch.arange(6.0).reshape(2, 3)
BY_NUMPY = torch._utils._rebuild_device_tensor_from_numpy
WRITTEN = {
    "a parameter": lambda: torch.nn.Parameter(EXPECTED.clone()),
    "a buffer": lambda: torch.nn.Buffer(EXPECTED.clone()),
    "with an attribute": lambda: marked(EXPECTED.clone()),
    "a parameter with an attribute": lambda: marked(torch.nn.Parameter(EXPECTED.clone())),
    "transposed": lambda: EXPECTED.T.contiguous().T,
    "a part": lambda: torch.cat([EXPECTED, EXPECTED])[2:],
    "from mps": lambda: ByFunction(BY_NUMPY, EXPECTED.numpy(), torch.float32, "mps:0", False),
    "from mps, columns first": lambda: ByFunction(BY_NUMPY, np.asfortranarray(EXPECTED.numpy()), torch.float32, "mps:0",
                                                  False),
    "from directml": lambda: ByFunction(BY_NUMPY, EXPECTED.numpy(), torch.float32, "privateuseone:0", True),
    "from xla": lambda: ByFunction(torch._utils._rebuild_device_tensor_from_cpu_tensor, EXPECTED.clone(), torch.float32,
                                   "xla:0", False),
    "by the oldest function": lambda: ByFunction(torch._utils._rebuild_tensor, EXPECTED.clone()._typed_storage(), 0,
                                                 (2, 3), (3, 1)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_tensors_as_pytorch_writes_them(written, name, legacy, protocol):
    path = written({"state_dict": {"a": WRITTEN[name](), "b": EXPECTED}}, pickle_protocol=protocol,
                   _use_new_zipfile_serialization=not legacy)
    loaded, _ = read_checkpoint(path)
    assert torch.equal(loaded["a"], EXPECTED) and torch.equal(loaded["b"], EXPECTED)
    assert type(loaded["a"]) is torch.Tensor and loaded["a"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
                                   torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_every_dtype(written, tmp_path, dtype, kind):
    tensor = torch.arange(7).to(dtype)
    path = written({"a": tensor, "b": torch.ones(3)}, _use_new_zipfile_serialization=kind == "zip")
    if kind == "safetensors":
        save_file({"a": tensor, "b": torch.ones(3)}, path)
    for mapped in (False, True):
        loaded = read_checkpoint(path, mapped)[0]["a"]
        assert loaded.dtype == dtype and torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_model_in_eight_bits(written, tiny, weights, tmp_path, dtype, kind):
    stored = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}
    path = written(stored)
    if kind == "safetensors":
        save_file(stored, path)
    for wanted in (torch.float32, torch.float16, torch.bfloat16):
        loaded = load_from_standard_weights(path, dtype=wanted)
        assert {weight.dtype for part in loaded.values() for weight in part.values()} == {wanted}
        assert_holds({network: {name: weight.float() for name, weight in part.items()}
                      for network, part in loaded.items()},
                     {name: weight.float() for name, weight in stored.items()})
    kept = load_from_standard_weights(path)
    assert {weight.dtype for part in kept.values() for weight in part.values()} == {dtype}


def test_expanded_biases(written, tiny, weights):
    zero = torch.zeros(1)
    expanded = {name: zero.expand(weight.shape) if name.endswith("bias") else weight
                for name, weight in weights.items()}
    assert_holds(load_from_standard_weights(written(expanded)),
                 {name: weight.clone() for name, weight in expanded.items()})


class StateDict(collections.OrderedDict):
    pass


HARMLESS = {
    "re": re.compile(r"\w+"), "logging": logging.getLogger("train"), "itertools": itertools.count(3),
    "functools": functools.partial(int, base=2), "_io": io.BytesIO(b"preview"),
    "collections": collections.Counter("aab"),
    "deque": collections.deque([1, 2]), "enumerate": enumerate([1]), "an error": ValueError("stopped"),
    "datetime": datetime.datetime(2022, 9, 1), "struct_time": time.localtime(), "operator": operator.itemgetter(0),
    "uuid": uuid.uuid4(), "range": range(3), "string": string.Template("$a"), "array": array.array("i", [1]),
    "warnings": UserWarning("x"), "generator": torch.Generator().get_state(), "pathlib": pathlib.PurePosixPath("/a"),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_objects_beside_the_weights(written, weights, legacy):
    checkpoint = {"state_dict": StateDict(weights), "hyper_parameters": HARMLESS, "best": StateDict(a=1)}
    loaded, _ = read_checkpoint(written(checkpoint, _use_new_zipfile_serialization=not legacy))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_an_ordered_dict_as_python_2_wrote_it(tmp_path):
    opcodes = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R."
    assert read_checkpoint(raw_pickle(tmp_path / "model.ckpt", opcodes)) == ({"a": 1, "b": 2}, {})


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, torch.nn.ParameterDict])
def test_an_embedding(written, suffix, wrap):
    vectors = torch.randn(2, 768)
    path = written({"string_to_token": {"*": 265}, "string_to_param": wrap({"*": vectors}), "name": "cat", "step": 10,
                    "sd_checkpoint": None}, f"embedding{suffix}")
    loaded, metadata = read_checkpoint(path)
    assert metadata == {} and loaded["name"] == "cat" and list(loaded["string_to_param"]) == ["*"]
    assert torch.equal(loaded["string_to_param"]["*"], vectors)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("mapped", [False, True])
def test_names_that_are_not_utf_8(written, tmp_path, kind, mapped):
    path = written({"a": EXPECTED}, _use_new_zipfile_serialization=kind == "zip")
    if kind == "safetensors":
        save_file({"a": EXPECTED}, path)
    path = path.rename(tmp_path / os.fsdecode(b"m\xf6del\n.ckpt"))
    for _ in range(2):  # the second time, such a file is mapped
        loaded, _ = read_checkpoint(path, mapped)
        checkpoint_file.release(loaded["a"], checkpoint_file.find_mapped())
        assert torch.equal(loaded["a"], EXPECTED)


def test_storages_that_are_not_aligned_and_in_the_other_byte_order(tmp_path, written):
    for shift in range(4):
        with (zipfile.ZipFile(written({"a": EXPECTED})) as old, zipfile.ZipFile(tmp_path / "new.ckpt", "w") as new):
            new.writestr("x" * (shift + 1), "")
            for name in old.namelist():
                content = b"big" if name.endswith("byteorder") else old.read(name)
                new.writestr(name, EXPECTED.numpy().byteswap().tobytes() if name.endswith("data/0") else content)
        for mapped in (False, True):
            assert torch.equal(read_checkpoint(tmp_path / "new.ckpt", mapped)[0]["a"], EXPECTED)


# ---- what a message says


@pytest.mark.parametrize("content, message", [
    (torch.nn.Linear(2, 2),
     "a pickled 'torch.nn.modules.linear.Linear' object; expected its weights alone, as torch.save"),
    ({"state_dict": torch.nn.Linear(2, 2)},
     "a 'torch.nn.modules.linear.Linear' object as 'state_dict'; expected its wei"),
    ([torch.ones(2)], "a pickled list"), (torch.ones(2), "a pickled Tensor"), ({"state_dict": None}, "a NoneType as"),
])
@pytest.mark.parametrize("legacy", [False, True])
def test_other_things_than_weights_are_named(written, content, message, legacy):
    with pytest.raises(CheckpointError, match=f"model.ckpt: found {re.escape(message)}"):
        read_checkpoint(written(content, _use_new_zipfile_serialization=not legacy))


def test_a_weight_that_float16_cannot_hold(written, tiny, weights):
    key = f"{UNET}out.0.bias"
    path = written({**weights, key: torch.full((32,), 70000.0)})
    message = f"{key} holds 70000, which torch.float16 cannot hold; load it as float32"
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(path, dtype=torch.float16)
    assert load_from_standard_weights(path, dtype=torch.float32)["diffusion"]["norm_out.bias"][0] == 70000


def test_a_short_run_of_the_fuzzer():
    script = Path(__file__).with_name("fuzz_checkpoint.py")
    run = subprocess.run([sys.executable, script, "200", "--seed", "7"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
