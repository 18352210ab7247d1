"""Exported networks: ONNX against onnxruntime, OpenVINO and diffusers' pipeline, programs against our own networks."""

import functools
import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from diffusers import AutoencoderTiny, OnnxStableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import oracle
from checkpoint_file import CheckpointError
from cpu.packed import pack
from diffusion import get_time_embedding
from encoder import LATENT_SCALE
from extensions import export as exporting
from extensions.export import FILES, FOLDERS, export, find_timestep, load_exported
from model_converter import NETWORKS
from pipeline import generate

# As small as SD 1.x can be: PyTorch's exporters take time for each layer, however narrow.
CONFIGS = {
    "clip": replace(oracle.TINY["clip"], n_layers=1, words=("cat", "dog")),
    "encoder": replace(oracle.TINY["encoder"], channels=(8,) * 4, n_groups=4),
    "decoder": replace(oracle.TINY["decoder"], channels=(8,) * 4, n_groups=4, n_blocks=1),
    "diffusion": replace(oracle.TINY["diffusion"], channels=(16, 32), attends=(True, False), n_blocks=1, cfg_scale=3.5),
}
# Pictures, height and width of latents, tokens, rows of context per picture; one is the size at export.
SIZES = [(1, 8, 8, 77, 2), (3, 7, 9, 100, 1), (1, 2, 3, 9, 2), (1, 1, 2, 1, 1)]


@pytest.fixture(scope="module")
def small():
    """Random networks of these sizes."""
    return {network: oracle.randomize(NETWORKS[network](config), seed).eval()
            for seed, (network, config) in enumerate(CONFIGS.items())}


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """{format: folder} of these networks; ONNX and pt2 begin with the same program, which is made once. In ONNX, what
    counts as large is the text encoder."""
    place = tmp_path_factory.mktemp("exported")
    made, make = {}, exporting.to_exported_program

    def make_once(program):
        if type(program) not in made:
            made[type(program)] = make(program)
        return made[type(program)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_exported_program", make_once)
        patch.setattr(exporting, "LARGE", 5_000_000)
        for format in FILES:
            export(small, place / format, format)
    return {format: place / format for format in FILES}


@pytest.fixture(scope="module")
def load(folders):
    return functools.cache(lambda format: load_exported(folders[format], "cpu"))


@pytest.fixture(scope="module")
def session(folders):
    """Returns a function of a network and named arrays: its outputs by onnxruntime, by name."""
    @functools.cache
    def open_session(network):
        return onnxruntime.InferenceSession(folders["onnx"] / FOLDERS[network] / "model.onnx")

    def run(network, **inputs):
        opened = open_session(network)
        return dict(zip([output.name for output in opened.get_outputs()], opened.run(None, inputs)))
    return run


def inputs_of(size, seed=0):
    """Returns (latents, context, tokens, images) for one of SIZES."""
    n, h, w, n_tokens, rows = size
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 4, h, w, generator=generator), torch.randn(n * rows, n_tokens, 32, generator=generator),
            torch.randint(49408, (n, min(n_tokens, 77)), generator=generator),
            2 * torch.rand(n, 3, 8 * h, 8 * w, generator=generator) - 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FILES)
def test_programs_are_called_like_the_networks(format, size, load, small):
    latents, context, tokens, images = inputs_of(size)
    for network, inputs in [("clip", (tokens,)), ("decoder", (latents,)), ("encoder", (images, latents)),
                            ("diffusion", (latents, context, get_time_embedding(981.37, 16)))]:
        ours, exported = small[network](*inputs), load(format)[network](*inputs)
        assert exported.shape == ours.shape and (exported - ours).abs().max() < 1e-4, network


def test_a_timestep_for_each_picture(load, small):
    latents, context, _, _ = inputs_of((3, 7, 9, 100, 1))
    embedding = get_time_embedding(torch.tensor([1.0, 500.0, 999.0]), 16)
    for format in FILES:
        difference = load(format)["diffusion"](latents, context, embedding) - small["diffusion"](
            latents, context, embedding)
        assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("width", [16, 32, 320])
def test_timesteps_are_found_to_the_last_digit(width):
    timesteps = torch.cat([torch.arange(1000.0), torch.linspace(0, 999, 7777)])
    found = find_timestep(get_time_embedding(timesteps, width))
    assert (found - timesteps).abs().max() < 2e-7 and torch.equal(found[2:1000], timesteps[2:1000])


@pytest.mark.parametrize("size", SIZES)
def test_onnx_by_the_names_of_diffusers(size, session, small):
    """As the pipeline calls it: one timestep for all, token ids in int32."""
    latents, context, tokens, images = inputs_of(size)
    latents = latents.repeat(len(context) // len(latents), 1, 1, 1)
    found = session("diffusion", sample=latents.numpy(), timestep=np.array([500], np.float32),
                    encoder_hidden_states=context.numpy())
    assert list(found) == ["out_sample"]
    expected = small["diffusion"](latents, context, get_time_embedding(500, 16))
    assert np.abs(found["out_sample"] - expected.numpy()).max() < 1e-4

    found = session("clip", input_ids=tokens.int().numpy())
    hidden = small["clip"](tokens)
    pooled = hidden[torch.arange(len(tokens)), tokens.argmax(1)]  # transformers' for CLIP, whose end token is the last
    assert list(found) == ["last_hidden_state", "pooler_output"]
    assert np.abs(found["last_hidden_state"] - hidden.numpy()).max() < 1e-4
    assert np.abs(found["pooler_output"] - pooled.numpy()).max() < 1e-4

    found = session("decoder", latent_sample=(latents / LATENT_SCALE).numpy())
    assert np.abs(found["sample"] - small["decoder"](latents).numpy()).max() < 1e-4

    found = session("encoder", sample=images.numpy())
    assert found["latent_sample"].shape == (len(images), 8, *latents.shape[2:])
    assert np.abs(found["latent_sample"] - torch.cat(small["encoder"].moments(images), 1).numpy()).max() < 1e-4


def test_onnx_files_are_valid_and_say_what_varies(folders):
    sizes = {}
    for network, place in FOLDERS.items():
        path = folders["onnx"] / place / "model.onnx"
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path).graph
        sizes[network] = {value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
                          for value in [*graph.input, *graph.output]}
    assert sizes == {
        "clip": {"input_ids": ["batch", "tokens"], "last_hidden_state": ["batch", "tokens", 32],
                 "pooler_output": ["batch", 32]},
        "diffusion": {"sample": ["batch", 4, "height", "width"], "timestep": ["timesteps"],
                      "encoder_hidden_states": ["batch", "tokens", 32], "out_sample": ["batch", 4, "height", "width"]},
        "decoder": {"latent_sample": ["batch", 4, "latent_height", "latent_width"],
                    "sample": ["batch", 3, "height", "width"]},
        "encoder": {"sample": ["batch", 3, "height", "width"],
                    "latent_sample": ["batch", 8, "latent_height", "latent_width"]},
    }


@pytest.mark.parametrize("format", FILES)
def test_generate_draws_the_same(format, load, small, tokenizer):
    models = load(format)
    assert {network: models[network].config for network in models} == CONFIGS  # words, guidance, sizes and all
    settings = {"n_inference_steps": 3, "sampler_name": "dpmpp_2m", "seed": 5, "tokenizer": tokenizer}
    for more in [{}, {"height": 40, "width": 72}, {"do_cfg": False},
                 {"input_image": oracle.picture(), "strength": 0.7}]:
        ours, exported = (generate(["cat", "dog"], models=networks, progress=False, **settings, **more).astype(int)
                          for networks in (small, models))
        assert exported.shape == ours.shape and ours.std() > 5
        assert np.abs(exported - ours).mean() < 0.01 and np.abs(exported - ours).max() <= 1, more  # both are rounded


def test_diffusers_pipeline_draws_from_the_folder(folders, small, tokenizer):
    pipeline = OnnxStableDiffusionPipeline.from_pretrained(folders["onnx"], provider="CPUExecutionProvider",
                                                           provider_options=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert pipeline.tokenizer("a fox")["input_ids"] == tokenizer("a fox")["input_ids"]
    latents = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("cat", height=40, width=72, num_inference_steps=4, guidance_scale=3.5, latents=latents.numpy(),
                      output_type="np").images[0]
    ours = generate("cat", sampler_name="ddim", n_inference_steps=4, latents=latents, strength=1.0, models=small,
                    tokenizer=tokenizer, progress=False)
    assert np.abs(255 * theirs - ours).max() <= 0.51


def test_openvino_reads_it(folders, small):
    latents, context, _, _ = inputs_of((2, 7, 9, 20, 1))
    core = openvino.Core()
    compiled = {network: core.compile_model(folders["onnx"] / place / "model.onnx", "CPU",
                                            {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
                for network, place in FOLDERS.items()}
    found = compiled["diffusion"]({"sample": latents, "timestep": np.array([500], np.float32),
                                   "encoder_hidden_states": context})["out_sample"]
    assert np.abs(found - small["diffusion"](latents, context, get_time_embedding(500, 16)).numpy()).max() < 1e-3


def test_large_weights_lie_beside_the_program(folders, small, tmp_path):
    """From 1 GiB, as an ONNX file ends at 2."""
    assert sorted(path.parent.name for path in folders["onnx"].rglob("*.data")) == ["text_encoder"]
    folder = copied(folders["onnx"], tmp_path)
    path = folder / "text_encoder" / "model.onnx.data"
    assert path.with_suffix("").stat().st_size < 100_000
    assert path.stat().st_size > 0.9 * sum(weight.nbytes for weight in small["clip"].state_dict().values())
    cut(path)
    with pytest.raises(CheckpointError, match="text_encoder/model.onnx: cannot be loaded") as caught:
        load_exported(folder)
    assert "\n" not in str(caught.value)


def test_the_tiny_vae_has_a_mean_and_next_to_no_noise(tmp_path):
    theirs = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    theirs.save_pretrained(tmp_path)
    halves = exporting.load_tiny_vae(tmp_path / "diffusion_pytorch_model.safetensors", "float32")
    encoder, decoder = (exporting.trace(wrapper(halves[network]).eval()) for network, wrapper in
                        (("encoder", exporting.Encoder), ("decoder", exporting.Decoder)))
    images, latents = 2 * torch.rand(1, 3, 24, 40) - 1, torch.randn(1, 4, 3, 5)
    mean, log_variance = encoder(images).chunk(2, dim=1)
    assert (mean * LATENT_SCALE - theirs.encode(images).latents).abs().max() < 1e-5
    assert (log_variance == -30).all()
    assert (decoder(latents / LATENT_SCALE) - theirs.decode(latents).sample).abs().max() < 1e-5


def test_the_command_merges_what_it_is_given(checkpoint, models, tmp_path, monkeypatch, capsys):
    """A LoRA in the text encoder and a tiny decoder, in TorchScript, which is the fastest to make."""
    lora = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(80, 2),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32)}
    save_file(lora, tmp_path / "style.safetensors")
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    save_file({f"decoder.layers.{name}": weight for name, weight in tiny.decoder.layers.state_dict().items()},
              tmp_path / "taesd.safetensors")
    (tmp_path / "out").mkdir()  # empty, so it may be used
    monkeypatch.setattr(sys, "argv", ["export", *map(str, [
        checkpoint, tmp_path / "out", "--format", "torchscript", "--dtype", "bfloat16", "--lora",
        f"{tmp_path / 'style.safetensors'}:0.5", "--tiny-vae", tmp_path / "taesd.safetensors"])])
    exporting.main()
    assert "expected the encoder of a TAESD file" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*out: is not empty"):
        exporting.main()
    exported = load_exported(tmp_path / "out")
    assert exported["clip"](torch.tensor([[1, 2]])).dtype == torch.bfloat16

    layer = models["clip"].layers[0].linear_1
    up, down = lora.values()
    tokens, original = torch.randint(49408, (1, 9)), layer.weight.clone()
    try:
        layer.weight += 0.5 * up @ down
        expected = models["clip"](tokens)
    finally:
        layer.weight.copy_(original)
    distance = (exported["clip"](tokens).float() - expected).square().mean().sqrt()
    assert distance < 0.02 * (models["clip"](tokens) - expected).square().mean().sqrt() + 0.02 * expected.std()
    latents = torch.randn(1, 4, 3, 5)
    assert (exported["decoder"](latents).float() - tiny.decode(latents).sample).abs().max() < 0.1
    assert exported["encoder"].config == oracle.TINY["encoder"]
    assert len(list(tmp_path.iterdir())) == 3  # nothing is left beside the folder


def test_what_is_there_is_kept(small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, error, message in [("full", FileExistsError, "is not empty"), ("file", FileExistsError, "not a folder"),
                                 ("none/new", FileNotFoundError, "no such folder")]:
        with pytest.raises(error, match=message) as caught:
            export(small, tmp_path / name, "torchscript")
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"


def test_an_export_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(program, path):
        path.write_bytes(b"half")
        raise RuntimeError("no room for\nthis")

    monkeypatch.setitem(exporting.WRITERS, "pt2", fail)
    with pytest.raises(ValueError, match="does not make models.'clip'. into pt2 .RuntimeError: no room for.; try"):
        export(small, tmp_path / "new", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(small, tmp_path):
    packed = pack(NETWORKS["decoder"](CONFIGS["decoder"]))
    half = {**small, "clip": NETWORKS["clip"](CONFIGS["clip"]).bfloat16()}
    for models, format, message in [
        (small, "tflite", "format is 'tflite'; give onnx, pt2, torchscript"),
        ({**small, "decoder": packed}, "onnx", "models.'decoder'. is packed.*load with pack=False"),
        ({**small, "diffusion": torch.nn.Identity()}, "pt2", "models.'diffusion'. is a Identity"),
        ({"clip": small["clip"]}, "pt2", "models.'diffusion'. is a NoneType"),
        (half, "onnx", "bfloat16.*give float32 or float16, or the format pt2"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(models, tmp_path / "new", format)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="onnxscript; install it with.*requirements-export.txt"):
        export(small, tmp_path / "new", "onnx")


def copied(folder, tmp_path):
    """A copy made of links, in which single files can be replaced."""
    for path in folder.rglob("*"):
        target = tmp_path / "copy" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            os.link(path, target)
    return tmp_path / "copy"


def cut(path, share=0.5):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: math.floor(share * len(content))])


@pytest.mark.parametrize("format", FILES)
def test_broken_programs(format, folders, tmp_path):
    folder = copied(folders[format], tmp_path)
    path = folder / "text_encoder" / FILES[format]  # the first to be loaded
    for share in (0.5, 0):
        cut(path, share)
        with pytest.raises(CheckpointError, match="cannot be loaded.*export it again") as caught:
            load_exported(folder)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load_exported(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda settings: "{",
    lambda settings: "[]",
    lambda settings: json.dumps({**settings, "format": "tflite"}),
    lambda settings: json.dumps({**settings, "format": []}),
    lambda settings: json.dumps({"format": "onnx", "networks": {"clip": settings["networks"]["clip"]}}),
    lambda settings: json.dumps(settings).replace("n_vocab", "n_words"),
    lambda settings: json.dumps(settings).replace("float32", "float31"),
])
def test_broken_settings(change, folders, tmp_path):
    folder = copied(folders["onnx"], tmp_path)
    settings = json.loads((folder / "networks.json").read_text())
    (folder / "networks.json").unlink()
    with pytest.raises(CheckpointError, match="networks.json: found no settings"):
        load_exported(folder)
    (folder / "networks.json").write_text(change(settings))
    with pytest.raises(CheckpointError, match="networks.json: found no settings") as caught:
        load_exported(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_and_no_device(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load_exported(tmp_path / "none")
    with pytest.raises(ValueError, match="device is"):
        load_exported(folders["onnx"], "tpu")


def test_it_is_said_that_programs_are_code():
    assert "Programs are code" in load_exported.__doc__ and "trust" in load_exported.__doc__
