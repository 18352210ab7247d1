import pytest
import torch

import oracle


@pytest.mark.parametrize("height, width", [(8, 8), (1, 1), (5, 9)])
def test_equals_diffusers(models, weights, height, width):
    latents = torch.randn((2, 4, height, width), generator=torch.Generator().manual_seed(0))
    expected = oracle.vae_oracle(weights).decode(latents / 0.18215).sample
    assert expected.std() > 0.2
    torch.testing.assert_close(models["decoder"](latents), expected, atol=1e-5, rtol=0)


def test_norms_are_those_of_diffusers(models, weights):
    assert oracle.norms(models["decoder"]) == oracle.norms(oracle.vae_oracle(weights).decoder)


def test_latents_may_come_in_float32(models):
    """As `generate` hands them to a callback, whatever the decoder's dtype is."""
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    half = type(models["decoder"])(models["decoder"].config).double()
    half.load_state_dict(models["decoder"].state_dict())
    torch.testing.assert_close(half(latents).float(), models["decoder"](latents), atol=1e-5, rtol=0)
