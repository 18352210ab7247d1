import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint_file
import model_converter
import oracle
from clip import CLIPConfig
from decoder import DecoderConfig
from diffusion import DiffusionConfig
from encoder import EncoderConfig
from model_converter import (
    NETWORKS,
    CheckpointError,
    ema_name,
    infer_configs,
    load_from_standard_weights,
    standard_names,
    to_standard_weights,
)

LAYOUT = {name: tuple(shape) for name, shape in
          json.loads((Path(__file__).parent / "sd15_checkpoint_layout.json").read_text())}
UNET = "model.diffusion_model."


@pytest.fixture
def written(tmp_path):
    """Writes a dict of weights as a pickled checkpoint and returns its path."""
    def write(checkpoint, name="model.ckpt", **settings):
        torch.save(checkpoint, tmp_path / name, **settings)
        return tmp_path / name
    return write


@pytest.fixture
def tiny(monkeypatch):
    """Pickles cannot say how many heads there are: let the tiny ones be the default."""
    infer = model_converter.infer_configs
    monkeypatch.setattr(model_converter, "infer_configs", lambda weights, metadata: infer(weights, oracle.METADATA))


def assert_same(loaded, weights):
    """The loaded state dicts hold these weights by standard name, and nothing else."""
    ours = to_standard_weights(loaded)
    assert ours.keys() == weights.keys()
    for name in ours:
        assert torch.equal(ours[name].float(), weights[name].float().reshape(ours[name].shape)), name


# ---- names and sizes


def test_full_size_names_and_shapes_are_those_of_the_release():
    with torch.device("meta"):
        state_dicts = {network: NETWORKS[network]().state_dict() for network in NETWORKS}
    ours = {name: tuple(weight.shape) for name, weight in to_standard_weights(state_dicts).items()}
    assert ours == {name: shape for name, shape in LAYOUT.items() if not name.endswith("position_ids")}


def test_the_release_implies_the_default_configs():
    weights = {name: torch.empty(shape, device="meta") for name, shape in LAYOUT.items()}
    assert infer_configs(weights, {}) == {"clip": CLIPConfig(), "encoder": EncoderConfig(), "decoder": DecoderConfig(),
                                          "diffusion": DiffusionConfig()}


def test_configs_are_read_off_shapes_and_metadata(weights):
    assert infer_configs(weights, oracle.METADATA) == oracle.TINY


def test_a_fused_projection_holds_queries_keys_and_values_in_turn(weights, checkpoint):
    loaded = load_from_standard_weights(checkpoint)
    names = standard_names("diffusion", "encoders.1.1.attention_1.in_proj.weight")
    assert names == tuple(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_{x}.weight" for x in "qkv")
    fused = loaded["diffusion"]["encoders.1.1.attention_1.in_proj.weight"]
    assert torch.equal(fused, torch.cat([weights[name] for name in names]))


# ---- what is read


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_pickles(written, tiny, weights, legacy, wrapped, name):
    path = written({"state_dict": weights, "epoch": 3} if wrapped else weights, name,
                   _use_new_zipfile_serialization=not legacy)
    assert_same(load_from_standard_weights(path, "cpu"), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(written, tiny, weights, dtype, tmp_path):
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(stored, tmp_path / "model.safetensors", oracle.METADATA)
    for path in [written(stored), tmp_path / "model.safetensors"]:
        loaded = load_from_standard_weights(path)
        assert {weight.dtype for state_dict in loaded.values() for weight in state_dict.values()} == {dtype}
        assert_same(loaded, stored)
        loaded = load_from_standard_weights(path, dtype=torch.float32)
        assert {weight.dtype for state_dict in loaded.values() for weight in state_dict.values()} == {torch.float32}


def test_ema_is_taken_where_there_is_one_unless_asked_otherwise(written, tiny, weights):
    ema = {name: weight + 1 for name, weight in weights.items() if name.startswith(UNET)}
    assert ema_name(f"{UNET}input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    both = {**weights, **{ema_name(name): weight for name, weight in ema.items()},
            "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32)}
    path = written({"state_dict": both})
    assert_same(load_from_standard_weights(path), {**weights, **ema})
    assert_same(load_from_standard_weights(path, use_ema=False), weights)


def test_what_belongs_to_training_is_ignored(written, tiny, weights):
    extra = {
        "betas": torch.zeros(1000, dtype=torch.float64), "alphas_cumprod": torch.zeros(1000),
        "logvar": torch.zeros(1000), "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4, dtype=torch.int8),
        "first_stage_model.loss.perceptual_loss.net.slice1.0.bias": torch.full((4,), float("nan")),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6), "scale_factor": torch.tensor(0.18215),
    }
    checkpoint = {"state_dict": {**weights, **extra}, "epoch": 1, "global_step": 470000, "lr_schedulers": [],
                  "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3, dtype=torch.uint8)}}}],
                  "hyper_parameters": {"base_lr": 1e-4, 3: None}}
    assert_same(load_from_standard_weights(written(checkpoint)), weights)


@pytest.mark.parametrize("form", ["without", "both"])
def test_text_encoder_names_with_and_without_text_model(written, tiny, weights, form):
    renamed = {name.replace(".text_model.", "."): weight for name, weight in weights.items()}
    both = {**renamed, **weights} if form == "both" else renamed
    assert_same(load_from_standard_weights(written(both)), weights)


def test_attention_as_linear_layers_or_as_convolutions(written, tiny, weights):
    other = {name: weight[:, :, 0, 0] if "attn_1." in name and weight.ndim == 4 else weight
             for name, weight in weights.items()}
    assert sum(weight.shape != weights[name].shape for name, weight in other.items()) == 8
    assert_same(load_from_standard_weights(written(other)), weights)


def test_a_fine_tune_in_half_precision_with_keys_of_its_own(written, tiny, weights):
    half = {name: weight.half() for name, weight in weights.items()}
    extra = {"sd_merge_recipe": {"type": "webui"}, "ztsnr": torch.ones(1), "edm_vpred.sigma_max": torch.tensor(20.0),
             "cond_stage_model.transformer.text_projection.weight": torch.zeros(2, 2), "v_pred": torch.empty(0),
             7: "seven", "denoiser.sigmas": torch.zeros(1000, dtype=torch.float64), "sd_merge_models": "..."}
    assert_same(load_from_standard_weights(written({**extra, **half})), half)


def test_an_inpainting_model_has_nine_input_channels(tmp_path):
    configs = {**oracle.TINY, "diffusion": replace(oracle.TINY["diffusion"], in_channels=9)}
    weights = oracle.write_checkpoint(tmp_path / "inpainting.safetensors", configs)
    assert infer_configs(weights, oracle.METADATA) == configs
    assert_same(load_from_standard_weights(tmp_path / "inpainting.safetensors"), weights)


def test_a_pickle_within_the_bytes_of_a_checkpoint_stays_bytes(written, tiny, weights, tmp_path):
    inner = pickle.dumps(Attack(os.system, f"touch {tmp_path / 'executed'}"))
    assert_same(load_from_standard_weights(written({"state_dict": weights, "callbacks": inner})), weights)
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
            assert_same(load_from_standard_weights(path), weights)


def mapped_names(state_dict, path):
    """The names of the tensors that lie in the memory map of a file. Linux only."""
    lines = [line.split() for line in open("/proc/self/maps") if str(path) in line]
    spans = [[int(x, 16) for x in line[0].split("-")] for line in lines]
    return {name for name, weight in state_dict.items() if any(low <= weight.data_ptr() < high for low, high in spans)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_weights_are_mapped_and_not_copied(checkpoint, written, tiny, weights, kind):
    path = checkpoint if kind == "safetensors" else written(weights)
    state_dict = load_from_standard_weights(path, dtype=torch.float32)["diffusion"]
    fused = {name for name in state_dict if "in_proj" in name}
    assert fused and mapped_names(state_dict, path) == set(state_dict) - fused


# ---- what is refused


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
    ("torch.serialization", "load"), ("numpy", "load"), ("collections", "namedtuple"), ("pip", "main"),
    ("evil", "FloatStorage"),
])
def test_no_other_name_is_looked_up(monkeypatch, module, name):
    monkeypatch.setattr(torch, "__getattr__", lambda name: pytest.fail("torch imports submodules here"))
    before = set(sys.modules)
    unpickler = checkpoint_file.RestrictedUnpickler(io.BytesIO(b""))
    assert unpickler.find_class(module, name) is checkpoint_file.Placeholder
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


def test_torchscript_is_refused_where_only_torch_sees_it(torchscript):
    """Two tables of contents: Python's zipfile reads the one before the end, torch the one that the end points to."""
    data = torchscript.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    size, offset = struct.unpack("<II", data[end + 12:end + 20])
    torchscript.write_bytes(data[:end] + data[offset:end].replace(b"constants", b"harmless!") + data[end:])
    assert "model/harmless!.pkl" in zipfile.ZipFile(torchscript).namelist()
    assert size == end - offset
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


@pytest.mark.parametrize("name, message", [
    ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "an SDXL checkpoint"),
    ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "an SD 2.x checkpoint"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA file"),
    ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA file"),
    ("control_model.input_blocks.0.0.weight", "a ControlNet file"),
    ("down_blocks.0.resnets.0.conv1.weight", "a diffusers folder"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "SD 3"),
    ("fc.weight", "'fc.weight'"),
])
def test_other_models(tmp_path, name, message):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors: found .*{message}.*expected") as caught:
        load_from_standard_weights(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def spoiled(weights, key, value):
    rest = {name: weight for name, weight in weights.items() if name != key}
    return rest if value is None else {**rest, key: value}


@pytest.mark.parametrize("key, value, message", [
    ("first_stage_model.decoder.conv_in.bias", None, "is missing; expected a tensor of shape"),
    (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", None, "is missing"),
    ("first_stage_model.post_quant_conv.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", torch.zeros(3, 3), r"has shape \(3, 3\); expected \(128, 32\)"),
    (f"{UNET}out.0.bias", torch.full((32,), float("nan")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.full((32,), float("inf")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.zeros(32, dtype=torch.int64), "' is torch.int64; expected a tensor of floating point"),
    (f"{UNET}label_emb.0.0.weight", torch.zeros(4), "does not have"),
])
def test_broken_weights_name_the_key(tmp_path, weights, key, value, message):
    save_file(spoiled(weights, key, value), tmp_path / "broken.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_from_standard_weights(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


class Recorder(dict):
    """Weights that remember which of them were asked for."""

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 2, 2), (2, 2, 2, 2, 2)])
def test_sizes_are_not_read_off_a_wrong_shape(weights, shape):
    recorder = Recorder(weights)
    recorder.asked = set()
    infer_configs(recorder, oracle.METADATA)
    assert len(recorder.asked) > 15
    for key in recorder.asked:
        with pytest.raises(CheckpointError, match=re.escape(f"{key} has shape {shape}; expected")):
            infer_configs(spoiled(weights, key, torch.zeros(shape)), oracle.METADATA)


def test_an_absurd_number_in_a_name_is_one_error(tmp_path, weights):
    key = f"cond_stage_model.transformer.text_model.encoder.layers.{'9' * 5000}.mlp.fc1.weight"
    save_file({**weights, key: torch.zeros(2, 2)}, tmp_path / "model.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match="layers.2.*is missing"):
        load_from_standard_weights(tmp_path / "model.safetensors")


def test_an_object_in_place_of_a_tensor_names_the_key(written, tiny, weights):
    key = f"{UNET}out.0.bias"
    with pytest.raises(CheckpointError, match=f"{key}' is Placeholder; expected a tensor"):
        load_from_standard_weights(written(spoiled(weights, key, argparse.Namespace(a=1))))


@pytest.mark.parametrize("content, message", [([1, 2], "a pickled list"),
                                              ({"state_dict": [1]}, "a list as 'state_dict'")])
def test_pickles_of_other_things(written, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(written(content))


@pytest.mark.parametrize("changes, message", [
    ({"unet_heads": "x"}, "unet_heads is 'x'; expected a whole number from 1"),
    ({"unet_heads": "9" * 5000}, "expected a whole number from 1 to 99999"),
    ({"sample_size": "65"}, "65, which 8 .sample_size. does not divide"),
    ({"unet_heads": "0"}, "unet_heads is '0'"),
    ({"unet_heads": "5"}, "32, which 5 .unet_heads. does not divide"),
    ({"vae_groups": "32"}, "vae_groups"),
    ({"clip_heads": "7"}, "clip_heads"),
])
def test_bad_metadata(tmp_path, weights, changes, message):
    save_file(weights, tmp_path / "model.safetensors", {**oracle.METADATA, **changes})
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(tmp_path / "model.safetensors")


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt: no such checkpoint"):
        load_from_standard_weights(tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_from_standard_weights(tmp_path)


def test_all_of_float16_becomes_bfloat16_as_pytorch_does_it():
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)  # every number there is, NaNs included
    tensor = halves.repeat(40)[: 2**21 + 4].reshape(-1, 3)  # more than one block
    result = model_converter.to_dtype(tensor, torch.bfloat16)
    assert result.shape == tensor.shape
    torch.testing.assert_close(result, tensor.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_released_tensor_is_out_of_memory_and_can_be_read_again(name, tmp_path):
    path, expected = tmp_path / name, torch.randn(4, 2**18)
    (save_file if name.endswith("safetensors") else torch.save)({"a": expected, "b": expected + 1}, path)
    weights, _ = checkpoint_file.read_checkpoint(path)
    mapped = checkpoint_file.find_mapped(path)
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
