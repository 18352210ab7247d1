import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model_converter
import oracle
from clip import CLIPConfig
from decoder import DecoderConfig
from diffusion import DiffusionConfig
from encoder import EncoderConfig
from model_converter import (NETWORKS, CheckpointError, ema_name, infer_configs, load_from_standard_weights,
                             standard_names, to_standard_weights)

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


def assert_same(loaded, weights, atol=0.0):
    """The loaded state dicts hold these weights by standard name, and nothing else."""
    ours = to_standard_weights(loaded)
    assert ours.keys() == weights.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].float(), weights[name].float().reshape(ours[name].shape), atol=atol, rtol=0)


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


class AttributeDict(dict):
    pass


class ModelCheckpoint:
    def __init__(self):
        self.best = torch.tensor(1.0)
        self.folder = pathlib.PurePosixPath("/logs")


def test_a_checkpoint_with_lightning_classes_loads(written, tiny, weights, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name, parent in [("pytorch_lightning", None), ("pytorch_lightning.callbacks", None), (module.__name__, None)]:
        monkeypatch.setitem(sys.modules, name, module)
    for kind in (ModelCheckpoint, AttributeDict):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    checkpoint = {
        "state_dict": collections.OrderedDict(weights), "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)}, "it": ModelCheckpoint()},
        "hyper_parameters": AttributeDict(lr=1e-4, size=torch.Size([3]), dtype=torch.float16, device=torch.device("cpu")),
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


def test_weights_are_mapped_and_not_copied(checkpoint):
    loaded = load_from_standard_weights(checkpoint)
    maps = [line.split() for line in open("/proc/self/maps") if str(checkpoint) in line] if sys.platform == "linux" else []
    for low, high in (map(lambda x: int(x, 16), line[0].split("-")) for line in maps[:1]):
        in_file = [name for name, weight in loaded["diffusion"].items() if low <= weight.data_ptr() < high]
        fused = [name for name in loaded["diffusion"] if "in_proj" in name]
        assert set(in_file) == set(loaded["diffusion"]) - set(fused)


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
def test_hostile_pickles_are_refused_and_nothing_runs(written, tiny, weights, tmp_path, name, place, legacy):
    marker = tmp_path / "executed"
    attack = attacks(marker)[name]
    key = f"{UNET}out.0.bias"
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
    b"", b".", b"\x80\x02N.", b"garbage",
])
def test_hand_written_pickles_raise_one_error_and_call_nothing(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    path = raw_pickle(tmp_path / "model.ckpt", opcodes)
    with pytest.raises(CheckpointError) as caught:
        load_from_standard_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module, name", [
    ("torch.hub", "load"), ("torch", "load"), ("torch.serialization", "load"), ("torch", "compile"),
    ("torch", "serialization.os.system"), ("torch", "float32.__class__"), ("numpy", "load"), ("torch._utils", "os.system"),
    ("collections", "namedtuple"), ("pip", "main"), ("torch.jit", "load"), ("evil", "FloatStorage"),
])
def test_no_other_name_is_looked_up(module, name):
    unpickler = model_converter.RestrictedUnpickler(io.BytesIO(b""))
    assert unpickler.find_class(module, name) is model_converter.Placeholder


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="model.pt: found a TorchScript program"):
        load_from_standard_weights(tmp_path / "model.pt")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4265380512\n"


@pytest.mark.parametrize("content, message", [
    (b"", "an empty file"),
    (b"hello, world\n", r"begins with b'hello, world"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    (LFS.encode(), "a Git LFS pointer"),
    (struct.pack("<Q", 1 << 62) + b"{}", "a broken or truncated safetensors file"),
    (struct.pack("<Q", 2) + b"{}", "no weights"),
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
    return {**{name: weight for name, weight in weights.items() if name != key}, **({} if value is None else {key: value})}


@pytest.mark.parametrize("key, value, message", [
    ("first_stage_model.decoder.conv_in.bias", None, "is missing; expected a tensor of shape"),
    (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", None, "is missing"),
    ("first_stage_model.post_quant_conv.weight", None, "is missing"),
    (f"{UNET}time_embed.0.weight", torch.zeros(3, 3), r"has shape \(3, 3\); expected \(128, 32\)"),
    (f"{UNET}out.0.bias", torch.full((32,), float("nan")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.full((32,), float("inf")), "holds NaN or infinite values"),
    (f"{UNET}out.0.bias", torch.zeros(32, dtype=torch.int64), "is torch.int64; expected a tensor of floating point"),
    (f"{UNET}label_emb.0.0.weight", torch.zeros(4), "does not have"),
])
def test_broken_weights_name_the_key(tmp_path, weights, key, value, message):
    save_file(spoiled(weights, key, value), tmp_path / "broken.safetensors", oracle.METADATA)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_from_standard_weights(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


def test_an_object_in_place_of_a_tensor_names_the_key(written, tiny, weights):
    key = f"{UNET}out.0.bias"
    with pytest.raises(CheckpointError, match=f"{key} is Placeholder; expected a tensor"):
        load_from_standard_weights(written(spoiled(weights, key, argparse.Namespace(a=1))))


@pytest.mark.parametrize("content, message", [([1, 2], "a pickled list"), ({"state_dict": [1]}, "a list as 'state_dict'")])
def test_pickles_of_other_things(written, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_from_standard_weights(written(content))


@pytest.mark.parametrize("changes, message", [
    ({"unet_heads": "x"}, "unet_heads is 'x'; expected a positive whole number"),
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
