import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

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


class Data:
    """A data folder in which each file is newer than the one before."""

    def __init__(self, folder):
        self.folder, self.time = folder, 10**9

    def put(self, weights, name):
        path = self.folder / name
        (save_file if name.endswith("safetensors") else torch.save)(weights, path)
        self.touch(path)

    def touch(self, path):
        self.time += 100
        os.utime(path, (self.time, self.time))

    @property
    def found(self):
        return find_checkpoint(self.folder).name


def test_the_newest_whole_model_is_found_and_the_embedded_one_last(tmp_path, weights):
    data = Data(tmp_path)
    with pytest.raises(FileNotFoundError, match="put v1-5-pruned-emaonly.safetensors"):
        find_checkpoint(tmp_path)
    data.put(weights, "anything.safetensors")
    data.put(weights, "emoji.safetensors")
    assert data.found == "anything.safetensors"
    data.put({"state_dict": weights, "epoch": 1}, "newer.ckpt")
    assert data.found == "newer.ckpt"
    data.touch(tmp_path / "anything.safetensors")
    assert data.found == "anything.safetensors"
    for name in ("anything.safetensors", "newer.ckpt"):
        (tmp_path / name).unlink()
    assert data.found == "emoji.safetensors"


def test_what_is_no_whole_model_of_sd_1_is_passed_over(tmp_path, weights):
    data = Data(tmp_path)
    data.put(weights, "model.safetensors")
    vae = {name: weight for name, weight in weights.items() if name.startswith("first_stage_model.")}
    one = torch.zeros(2, 2)
    data.put(vae, "vae.safetensors")
    data.put({name.removeprefix("first_stage_model."): weight for name, weight in vae.items()}, "bare-vae.pt")
    data.put({"control_model.input_blocks.0.0.weight": one}, "control.ckpt")
    data.put({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": one}, "lora.safetensors")
    data.put({"string_to_param": {"*": one}}, "embedding.pt")
    data.put({**weights, "conditioner.embedders.0.x": one}, "sdxl.safetensors")
    data.put({**weights, "cond_stage_model.model.ln_final.bias": one}, "sd2.safetensors")
    data.put({name: weight for name, weight in weights.items() if "diffusion_model" in name}, "unet.safetensors")
    (tmp_path / "notes.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "loras").mkdir()
    assert data.found == "model.safetensors"
    (tmp_path / "download.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="passed over: .*download.safetensors: found a broken or truncated"):
        assert data.found == "model.safetensors"


def test_inpainting_models_come_after_those_that_generate_takes(tmp_path, weights):
    data = Data(tmp_path)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    data.put(weights, "emoji.safetensors")
    data.put({**weights, first: torch.zeros(32, 9, 3, 3)}, "inpainting.safetensors")
    assert data.found == "inpainting.safetensors"
    data.put(weights, "drawing.safetensors")
    data.touch(tmp_path / "inpainting.safetensors")
    assert data.found == "drawing.safetensors"


def test_a_diffusers_folder_is_found(tmp_path, models, weights):
    data = Data(tmp_path)
    data.put(weights, "model.safetensors")
    model_loader.save_folder(models, tmp_path / "tiny")
    data.touch(tmp_path / "tiny")
    assert data.found == "tiny"
    (tmp_path / "tiny/vae").rename(tmp_path / "tiny/another")
    assert data.found == "model.safetensors"


def test_four_threads_load_the_default_model_once(checkpoint, monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append(args)
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(model_loader, "find_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(model_loader, "preload_models_from_standard_weights", load)
    monkeypatch.setattr(model_loader, "load_tokenizer", load)
    for function, arguments in [(model_loader.default_models, ("cpu",)), (model_loader.default_tokenizer, ())]:
        function.cache_clear()
        calls.clear()
        with ThreadPoolExecutor(4) as pool:
            results = {future.result() for future in [pool.submit(function, *arguments) for _ in range(4)]}
        assert len(results) == len(calls) == 1
        function.cache_clear()


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


@pytest.mark.parametrize("file, change", [
    ("merges.txt", lambda text: text[: len(text) // 2]), ("merges.txt", lambda text: text.replace("\nth e</w>", "", 1)),
    ("vocab.json", lambda text: text.replace('"cat</w>": 2368', '"cat</w>": 1929').replace('"dog</w>": 1929',
                                                                                        '"dog</w>": 2368')),
    ("vocab.json", lambda text: text[: len(text) // 2]), ("vocab.json", lambda text: "[]"),
])
def test_cut_and_edited_tokenizer_files_are_named(tmp_path, file, change):
    for name in ("vocab.json", "merges.txt"):
        text = (model_loader.ROOT / "data" / name).read_text("utf-8")
        changed = change(text) if name == file else text.replace("\n", "\r\n")  # as git writes text on Windows
        assert (changed != text) == (name == file or "\n" in text)
        (tmp_path / name).write_bytes(changed.encode())
    with pytest.raises(ValueError, match=f"{file} is not CLIP's, or was cut off or edited"):
        model_loader.load_tokenizer(tmp_path)


def test_checking_a_tokenizer_leaves_it_as_it_is():
    tokenizer = model_loader.load_tokenizer()
    model_loader.check_tokenizer(tokenizer, 49408)
    assert tokenizer.backend_tokenizer.padding is None and tokenizer.backend_tokenizer.truncation is None
    tokenizer.add_tokens(["<cat-toy>", "<my-style>"])
    model_loader.check_tokenizer(tokenizer, 49410)
    with pytest.raises(ValueError, match="has 49410 tokens, the text encoder 49408"):
        model_loader.check_tokenizer(tokenizer, 49408)
