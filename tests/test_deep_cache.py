import threading

import numpy as np
import pytest
import torch

import oracle
from extensions.deep_cache import DeepCache
from pipeline import generate, get_time_embedding
from samplers import DDIMSampler


def test_a_cache_stands_for_the_deep_layers(models, weights):
    """In the oracle, what enters its second to last layer is replaced by what entered it at the first call."""
    unet = oracle.unet_oracle(weights)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn((2, 2, 4, 16, 16), generator=generator)
    context = torch.randn((2, 77, 32), generator=generator)
    deep = []

    def keep_or_replace(block, inputs):
        hidden, *rest = inputs
        width = models["diffusion"].config.channels[0]  # what comes from below; the rest is the skip connection
        deep.append(hidden[:, :-width])
        return torch.cat([deep[0], hidden[:, -width:]], dim=1), *rest

    unet.up_blocks[-1].resnets[1].register_forward_pre_hook(keep_or_replace)
    run = DeepCache(models["diffusion"], 2).for_run(DDIMSampler())
    for latents, timestep in [(first, 700), (second, 650)]:
        expected = unet(latents, timestep, context).sample
        result = run(latents, context, get_time_embedding(timestep, 32))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    plain = models["diffusion"](second, context, get_time_embedding(650, 32))
    assert (result - plain).abs().max() > 0.01
    assert torch.equal(DeepCache(models["diffusion"], 2)(second, context, get_time_embedding(650, 32)), plain)


def test_the_deep_layers_rest(models):
    calls = []
    hook = models["diffusion"].bottleneck.register_forward_hook(lambda *_: calls.append(1))
    settings = dict(models=models, seed=7, sampler_name="ddim")
    exact = generate("a cat", n_inference_steps=7, **settings)
    settings["models"] = {**models, "diffusion": DeepCache(models["diffusion"], 3)}
    cached = generate("a cat", n_inference_steps=7, **settings)
    assert len(calls) == 7 + 3
    assert 0 < abs(exact.astype(int) - cached.astype(int)).mean() < 20
    assert np.array_equal(cached, generate("a cat", n_inference_steps=7, **settings))  # nothing is left of a run
    calls.clear()
    settings["models"]["diffusion"].interval = 6
    generate("a cat", n_inference_steps=6, cfg_scale=lambda sigma: 5.0 if sigma < 3 else 1, **settings)
    hook.remove()
    assert len(calls) == 2  # what guidance needs is twice as many rows: computed anew where it begins


def test_two_threads_share_nothing(models):
    shared = {**models, "diffusion": DeepCache(models["diffusion"], 3)}

    def draw(seed):
        return generate("a cat", models=shared, seed=seed, n_inference_steps=5, sampler_name="ddim", progress=False)

    expected, drawn = [draw(0), draw(1)], {}
    threads = [threading.Thread(target=lambda seed=seed: drawn.update({seed: draw(seed)})) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(drawn[seed], expected[seed]) for seed in (0, 1))


@pytest.mark.parametrize("interval", [0, 1.5, True])
def test_intervals_that_do_not_work(models, interval):
    with pytest.raises(ValueError, match=f"interval is {interval}; give a whole number from 1"):
        DeepCache(models["diffusion"], interval)


def test_what_is_no_unet(models):
    with pytest.raises(ValueError, match="diffusion is a DeepCache; give the UNet itself"):
        DeepCache(DeepCache(models["diffusion"], 2), 2)
