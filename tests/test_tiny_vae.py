"""TAESD against diffusers' AutoencoderTiny."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from checkpoint_file import CheckpointError
from extensions.tiny_vae import load_tiny_decoder, load_tiny_encoder
from pipeline import generate


@pytest.fixture(scope="module")
def oracle_tiny():
    torch.manual_seed(0)
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()


def original(model, half):
    """The weights as the original files name them."""
    weights = getattr(model, half).layers.state_dict()
    shift = half == "decoder"  # its first layer, without weights, clamps
    return {f"{int(name.split('.')[0]) + shift}.{name.partition('.')[2]}": weight for name, weight in weights.items()}


@pytest.fixture(scope="module", params=["original .pth", "original .safetensors", "diffusers", "diffusers, one half",
                                        "taesd_ prefix"])
def files(request, oracle_tiny, tmp_path_factory):
    """(path of the encoder's file, path of the decoder's)"""
    folder, paths = tmp_path_factory.mktemp("taesd"), []
    for half in ("encoder", "decoder"):
        path = folder / f"taesd_{half}.safetensors"
        if request.param == "original .pth":
            path = path.with_suffix(".pth")
            torch.save(original(oracle_tiny, half), path)
        elif request.param == "original .safetensors":
            save_file(original(oracle_tiny, half), path)
        elif request.param == "taesd_ prefix":
            save_file({f"taesd_{half}.{name}": weight for name, weight in original(oracle_tiny, half).items()}, path)
        elif request.param == "diffusers":
            oracle_tiny.save_pretrained(folder)
            path = folder / "diffusion_pytorch_model.safetensors"
        else:
            save_file({f"{half}.layers.{name}": weight for name, weight in
                       getattr(oracle_tiny, half).layers.state_dict().items()}, path)
        paths.append(path)
    return paths


def test_it_is_diffusers_autoencoder(files, oracle_tiny):
    encoder, decoder = load_tiny_encoder(files[0], "cpu", "float32"), load_tiny_decoder(files[1], "cpu", "float32")
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = encoder(images, torch.randn(2, 4, 5, 3))
    assert torch.allclose(encoded, oracle_tiny.encode(images).latents, atol=1e-6)
    for latents in (encoded, 5 * torch.randn(2, 4, 5, 3)):
        assert torch.allclose(decoder(latents), oracle_tiny.decode(latents).sample, atol=1e-5)
    assert not encoder.training and not decoder.training
    assert encoder.config.latent_channels == decoder.config.latent_channels == 4


def test_half_precision(files, oracle_tiny):
    decoder = load_tiny_decoder(files[1], "cpu", "bfloat16")
    assert {weight.dtype for weight in decoder.parameters()} == {torch.bfloat16}
    assert decoder(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).shape == (1, 3, 16, 16)


def test_the_full_size_has_the_published_number_of_weights(tmp_path):
    full = AutoencoderTiny()
    for half, load, count in [("encoder", load_tiny_encoder, 1_222_532), ("decoder", load_tiny_decoder, 1_222_531)]:
        save_file(original(full, half), tmp_path / "full.safetensors")
        assert sum(weight.numel() for weight in load(tmp_path / "full.safetensors", "cpu").parameters()) == count


def test_generate_draws_with_it(models, oracle_tiny, tmp_path):
    oracle_tiny.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tiny = {**models, "decoder": load_tiny_decoder(path, "cpu", "float32"),
            "encoder": load_tiny_encoder(path, "cpu", "float32")}
    image = generate("a cat", models=tiny, n_inference_steps=2, seed=1)
    assert image.shape == (64, 64, 3)
    again = generate("a cat", input_image=image, models=tiny, n_inference_steps=4, strength=0.5, seed=1)
    assert again.shape == (64, 64, 3) and not np.array_equal(image, again)


@pytest.mark.parametrize("change, message", [
    (lambda weights: {"fc.weight": torch.zeros(2)}, "found 'fc.weight'; expected the decoder of a TAESD file"),
    (lambda weights: {}, "found no weights"),
    (lambda weights: {name: weight for name, weight in weights.items() if name != "9.conv.2.bias"},
     "layer 8.conv.2.bias has shape none: it is missing"),
    (lambda weights: {**weights, "99.weight": torch.zeros(2)}, "98.weight has shape .2,.; expected no such layer"),
    (lambda weights: {**weights, "1.bias": torch.zeros(7)}, r"layer 0.bias has shape \(7,\); expected \(8,\)"),
    (lambda weights: {**weights, "1.bias": torch.full((8,), float("nan"))}, "0.bias holds NaN"),
    (lambda weights: {**weights, "1.weight": torch.zeros(8, 16, 3, 3)}, "takes 16 channels; expected 4"),
    (lambda weights: {**weights, "1.weight": torch.zeros(8)}, "first layer is not a convolution"),
])
def test_other_files(oracle_tiny, tmp_path, change, message):
    path = tmp_path / "taesd.safetensors"
    save_file(change(original(oracle_tiny, "decoder")), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tiny_decoder(path, "cpu")
    assert "taesd.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_the_wrong_half(oracle_tiny, tmp_path):
    save_file(original(oracle_tiny, "encoder"), tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="takes 3 channels; expected 4"):
        load_tiny_decoder(tmp_path / "encoder.safetensors", "cpu")
    with pytest.raises(FileNotFoundError):
        load_tiny_decoder(tmp_path / "none.safetensors", "cpu")
