import pytest
import torch

import oracle
from clip import CLIP, CLIPConfig


@pytest.mark.parametrize("n_tokens", [1, 7, 77])
def test_equals_transformers(models, weights, n_tokens):
    tokens = torch.randint(0, 49408, (3, n_tokens), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 49407
    expected = oracle.clip_oracle(weights)(tokens).last_hidden_state
    assert expected.std() > 0.5
    torch.testing.assert_close(models["clip"](tokens), expected, atol=1e-5, rtol=0)


def test_norms_are_those_of_transformers(models, weights):
    assert oracle.norms(models["clip"]) == oracle.norms(oracle.clip_oracle(weights))


def test_a_token_does_not_see_later_ones(models):
    tokens = torch.full((1, 77), 5)
    other = tokens.clone()
    other[0, 40] = 6
    before, after = models["clip"](tokens), models["clip"](other)
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] - after[:, 40:]).abs().amax(-1).min() > 1e-4


def test_defaults_are_sd15():
    with torch.device("meta"):
        clip = CLIP()
    assert sum(p.numel() for p in clip.parameters()) == 123_060_480  # transformers' count for ViT-L/14's text half
    assert clip.config == CLIPConfig(49408, 77, 768, 3072, 12, 12)
