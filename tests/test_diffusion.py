import pytest
import torch

import oracle
from diffusion import Diffusion
from model_converter import convert, infer_configs
from pipeline import get_time_embedding


def assert_equals_oracle(model, unet, height, width, timesteps, batch=2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((batch, model.config.in_channels, height, width), generator=generator)
    context = torch.randn((batch, 77, model.config.d_context), generator=generator)
    expected = unet(latents, timesteps, context).sample
    time_embedding = get_time_embedding(timesteps, model.config.channels[0])
    assert 0.2 < expected.std() < 5
    torch.testing.assert_close(model(latents, context, time_embedding), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width", [(16, 16), (13, 15), (8, 24), (1, 1), (5, 2)])
@pytest.mark.parametrize("timestep", [0, 501, 999])
def test_equals_diffusers(models, weights, height, width, timestep):
    assert_equals_oracle(models["diffusion"], oracle.unet_oracle(weights), height, width, torch.tensor([timestep]))


def test_a_timestep_for_each_row(models, weights):
    assert_equals_oracle(models["diffusion"], oracle.unet_oracle(weights), 8, 8, torch.tensor([3, 700]))


def test_norms_are_those_of_diffusers(models, weights):
    assert oracle.norms(models["diffusion"]) == oracle.norms(oracle.unet_oracle(weights))


@pytest.mark.parametrize("changes", [
    dict(channels=(32,), attends=(True,)),
    dict(channels=(16, 32, 48, 64), attends=(False, True, True, True), n_blocks=1),
    dict(n_blocks=3, in_channels=9, d_context=20, n_heads=2, n_groups=16),
])
def test_other_sizes_equal_diffusers(changes):
    config = oracle.replace(oracle.TINY["diffusion"], **changes)
    configs = {**oracle.TINY, "diffusion": config}
    weights = oracle.random_weights(configs)
    metadata = {**oracle.METADATA, "unet_heads": str(config.n_heads), "unet_groups": str(config.n_groups)}
    assert infer_configs(weights, metadata)["diffusion"] == config
    model = Diffusion(config)
    model.load_state_dict(convert("diffusion", model, dict(weights), "cpu", None))
    assert_equals_oracle(model, oracle.unet_oracle(weights, config), 8, 8, torch.tensor([10]))


@pytest.mark.parametrize("rows, contexts", [(1, 2), (2, 4), (3, 3)])
def test_latents_given_once_for_all_contexts(models, weights, rows, contexts):
    """As guidance does: the oracle gets the repeated latents."""
    unet = oracle.unet_oracle(weights)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((rows, 4, 9, 11), generator=generator)
    context = torch.randn((contexts, 77, 32), generator=generator)
    expected = unet(latents.repeat(contexts // rows, 1, 1, 1), 501, context).sample
    result = models["diffusion"](latents, context, get_time_embedding(501, 32))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
