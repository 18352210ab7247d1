import sys

import pytest
import torch

import model_loader
import oracle
from model_loader import find_checkpoint, preload_models_from_standard_weights


def test_modules_are_ready(checkpoint, weights):
    models = preload_models_from_standard_weights(checkpoint, "cpu", "float32")
    assert list(models) == ["clip", "encoder", "decoder", "diffusion"]
    assert {name: model.config for name, model in models.items()} == oracle.TINY
    for model in models.values():
        assert not model.training
        assert {(weight.dtype, weight.device.type) for weight in model.parameters()} == {(torch.float32, "cpu")}
    assert torch.equal(models["diffusion"].conv_out.bias, weights["model.diffusion_model.out.2.bias"])


@pytest.mark.parametrize("dtype, expected", [("float16", torch.float16), ("bfloat16", torch.bfloat16),
                                             (torch.float16, torch.float16), ("float32", torch.float32)])
def test_dtype(checkpoint, dtype, expected):
    models = preload_models_from_standard_weights(checkpoint, "cpu", dtype)
    assert {weight.dtype for model in models.values() for weight in model.parameters()} == {expected}


@pytest.mark.parametrize("avx512_bf16, amx, device, expected", [
    (True, False, "cpu", torch.bfloat16), (False, True, "cpu", torch.bfloat16), (False, False, "cpu", torch.float32),
    (True, True, "cuda", torch.float16), (True, True, "mps", torch.float32)])
def test_auto_dtype(monkeypatch, avx512_bf16, amx, device, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert model_loader.resolve_dtype("auto", torch.device(device)) == expected


def test_bad_device_and_dtype_get_one_line(checkpoint):
    for device, dtype, message in [("abacus", "auto", "device is 'abacus'; give cpu, cuda or mps"),
                                   ("xpu", "auto", "does not find on this machine; it has: cpu"),
                                   ("cpu", "int8", "dtype is 'int8'; give auto, float32, float16, bfloat16"),
                                   ("cpu", torch.int8, "dtype is torch.int8")]:
        with pytest.raises(ValueError, match=message):
            preload_models_from_standard_weights(checkpoint, device, dtype)


def test_no_weight_is_drawn_at_random(checkpoint):
    before = torch.random.get_rng_state()
    preload_models_from_standard_weights(checkpoint, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_parameters_lie_in_the_mapped_file(checkpoint):
    models = preload_models_from_standard_weights(checkpoint, "cpu", "float32")
    lines = [line.split() for line in open("/proc/self/maps") if str(checkpoint) in line]
    spans = [[int(x, 16) for x in line[0].split("-")] for line in lines]
    for model in models.values():
        copied = {name for name, weight in model.named_parameters()
                  if not any(low <= weight.data_ptr() < high for low, high in spans)}
        assert copied == {name for name, _ in model.named_parameters() if "in_proj" in name}


def test_find_checkpoint_prefers_ema_then_pruned_then_embedded(tmp_path):
    with pytest.raises(FileNotFoundError, match="put v1-5-pruned-emaonly.safetensors"):
        find_checkpoint(tmp_path)
    for name in ["emoji.safetensors", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt",
                 "v1-5-pruned-emaonly.safetensors"]:
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path).name == name


def test_default_models_are_loaded_once(checkpoint, monkeypatch):
    monkeypatch.setattr(model_loader, "find_checkpoint", lambda: checkpoint)
    model_loader.default_models.cache_clear()
    assert model_loader.default_models("cpu") is model_loader.default_models("cpu")
    model_loader.default_models.cache_clear()
    assert model_loader.default_tokenizer() is model_loader.default_tokenizer()


@pytest.mark.cuda
def test_on_cuda(checkpoint):
    models = preload_models_from_standard_weights(checkpoint, "cuda")
    assert {(weight.dtype, weight.device.type) for model in models.values() for weight in model.parameters()} == {
        (torch.float16, "cuda")}


def test_compiling_is_refused_on_the_cpu(checkpoint):
    with pytest.raises(ValueError, match="compile=True needs CUDA, not cpu"):
        preload_models_from_standard_weights(checkpoint, "cpu", compile=True)


def test_small_checkpoints_are_not_packed(checkpoint, tmp_path):
    large = tmp_path / "large.safetensors"
    with open(large, "wb") as file:
        file.truncate(2**28 + 1)
    assert not model_loader.pays_to_pack(checkpoint, "cpu", "float32")
    assert model_loader.pays_to_pack(large, "cpu", "float32") == model_loader.can_pack("cpu", "float32")
    assert not model_loader.pays_to_pack(large, "cpu", "float16")
    assert not model_loader.pays_to_pack(tmp_path / "none", "cpu", "float32")


@pytest.mark.mps
def test_on_mps(checkpoint):
    models = preload_models_from_standard_weights(checkpoint, "mps")
    assert {(weight.dtype, weight.device.type) for model in models.values() for weight in model.parameters()} == {
        (torch.float32, "mps")}
