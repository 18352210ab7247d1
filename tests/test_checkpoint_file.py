import argparse
import collections
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint_file
from checkpoint_file import CheckpointError, read_checkpoint
from model_converter import load_from_standard_weights, to_standard_weights
from unpickler import MAX_STEPS, Unknown, Unpickler

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
    for name, parent in [("pytorch_lightning", None), ("pytorch_lightning.callbacks", None), (module.__name__, None)]:
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
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in header) + opcodes + pickle.dumps([], 2))
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
    checkpoint_file.release(weight, [])
    assert weight.sum() == 2**16

