import pytest
import torch

from extensions.tiled import TiledDecoder, TiledEncoder
from model_loader import ROOT, preload_models_from_standard_weights
from pipeline import generate


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_tile_that_covers_all_is_the_whole(models):
    latents, images = draw(2, 4, 8, 12), draw(2, 3, 64, 96)
    assert torch.equal(TiledDecoder(models["decoder"], 96)(latents), models["decoder"](latents))
    noise = draw(2, 4, 8, 12)
    assert torch.equal(TiledEncoder(models["encoder"], 96)(images, noise), models["encoder"](images, noise))


@pytest.mark.parametrize("height, width", [(40, 40), (16, 37), (33, 8)])
def test_tiles_leave_no_seams(models, height, width, monkeypatch):
    """Group norms see a tile at a time; without them, tiles are the whole up to what convolutions see beyond."""
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x / 2)
    latents = draw(1, 4, height, width)
    whole, tiled = models["decoder"](latents), TiledDecoder(models["decoder"], 128)(latents)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()
    images, noise = draw(1, 3, 8 * height, 8 * width), torch.zeros_like(latents)
    whole, tiled = models["encoder"](images, noise), TiledEncoder(models["encoder"], 128)(images, noise)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


def test_tiles_of_real_pictures_differ_by_less_than_a_grey_level():
    models = preload_models_from_standard_weights(ROOT / "data" / "emoji.safetensors", "cpu", "float32")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    images = torch.stack([(6 * x + y).sin(), (5 * y).cos() * x, torch.where(x * x + y * y < 0.5, y, -x)])[None]
    latents = models["encoder"](images, torch.zeros(1, 4, 32, 32))
    whole, tiled = (image.clamp(-1, 1) * 127.5 for image in
                    (models["decoder"](latents), TiledDecoder(models["decoder"], 192)(latents)))
    assert (tiled - whole).abs().mean() < 1


def test_generate_takes_them(models):
    tiled = {**models, "decoder": TiledDecoder(models["decoder"], 64), "encoder": TiledEncoder(models["encoder"], 64)}
    whole, pieces = (generate("a cat", models=these, seed=1, n_inference_steps=1, height=128, width=64, sampler_name="ddim")
                     for these in (models, tiled))
    assert pieces.shape == whole.shape and (pieces != whole).any()


@pytest.mark.parametrize("tile_size", [100, 32, 64.0, True])
def test_tile_sizes_that_do_not_work(models, tile_size):
    for wrapper, network in [(TiledDecoder, "decoder"), (TiledEncoder, "encoder")]:
        with pytest.raises(ValueError, match=f"tile_size is {tile_size}; give a multiple of 32"):
            wrapper(models[network], tile_size)
