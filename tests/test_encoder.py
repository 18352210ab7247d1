import pytest
import torch

import oracle
from encoder import VAE_Encoder


@pytest.mark.parametrize("height, width", [(64, 64), (8, 8), (40, 72)])
def test_equals_diffusers(models, weights, height, width):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((2, 3, height, width), generator=generator) * 2 - 1
    noise = torch.randn((2, 4, height // 8, width // 8), generator=generator)
    distribution = oracle.vae_oracle(weights).encode(images).latent_dist
    expected = (distribution.mean + distribution.std * noise) * 0.18215
    assert distribution.mean.std() > 0.2 and distribution.std.std() > 0.05
    torch.testing.assert_close(models["encoder"](images, noise), expected, atol=1e-5, rtol=0)


def test_norms_are_those_of_diffusers(models, weights):
    assert oracle.norms(models["encoder"]) == oracle.norms(oracle.vae_oracle(weights).encoder)


@pytest.mark.parametrize("log_variance, clamped", [(100.0, 20.0), (-100.0, -30.0)])
def test_log_variance_is_clamped(log_variance, clamped):
    encoder = VAE_Encoder(oracle.TINY["encoder"])
    encoder.quant_conv.weight.zero_()
    encoder.quant_conv.bias[:4] = 0
    encoder.quant_conv.bias[4:] = log_variance
    noise = torch.ones(1, 4, 1, 1)
    expected = torch.full((1, 4, 1, 1), torch.tensor(clamped / 2, dtype=torch.float64).exp().item() * 0.18215)
    torch.testing.assert_close(encoder(torch.zeros(1, 3, 8, 8), noise), expected)
