import pytest
import torch

import oracle
from model_loader import find_checkpoint, preload_models_from_standard_weights


@pytest.mark.parametrize("height, width", [(8, 8), (1, 1), (5, 9)])
def test_equals_diffusers(models, weights, height, width):
    latents = torch.randn((2, 4, height, width), generator=torch.Generator().manual_seed(0))
    expected = oracle.vae_oracle(weights).decode(latents / 0.18215).sample
    assert expected.std() > 0.2
    torch.testing.assert_close(models["decoder"](latents), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tiles_that_cover_all_are_the_whole(models):
    latents = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models["decoder"].decode_tiled(latents, 96), models["decoder"](latents))


@pytest.mark.parametrize("height, width", [(40, 40), (16, 37), (33, 8)])
@torch.no_grad()
def test_tiles_leave_no_seams(models, height, width, monkeypatch):
    """Group norms see a tile at a time; without them, tiles are the whole picture up to what convolutions see beyond."""
    decoder = models["decoder"]
    latents = torch.randn((1, 4, height, width), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x / 2)
    whole, tiled = decoder(latents), decoder.decode_tiled(latents, 128)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()


@torch.no_grad()
def test_tiles_of_real_pictures_differ_by_less_than_a_grey_level():
    models = preload_models_from_standard_weights(find_checkpoint(), "cpu", "float32")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    images = torch.stack([(6 * x + y).sin(), (5 * y).cos() * x, torch.where(x * x + y * y < 0.5, y, -x)])[None]
    latents = models["encoder"](images, torch.zeros(1, 4, 32, 32))
    whole, tiled = (image.clamp(-1, 1) * 127.5 for image in
                    (models["decoder"](latents), models["decoder"].decode_tiled(latents, 192)))
    assert (tiled - whole).abs().mean() < 1
