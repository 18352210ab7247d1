import pytest
import torch

import oracle


@pytest.mark.parametrize("height, width", [(8, 8), (1, 1), (5, 9)])
def test_equals_diffusers(models, weights, height, width):
    latents = torch.randn((2, 4, height, width), generator=torch.Generator().manual_seed(0))
    expected = oracle.vae_oracle(weights).decode(latents / 0.18215).sample
    assert expected.std() > 0.2
    torch.testing.assert_close(models["decoder"](latents), expected, atol=1e-5, rtol=0)
