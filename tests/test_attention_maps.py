import math
from functools import partial

import numpy as np
import pytest
import torch

from attention import CrossAttention
from diffusion import Diffusion
from extensions.attention_maps import get_probabilities, merge_words, overlay, record_attention
from extensions.deep_cache import DeepCache
from pipeline import generate, get_time_embedding

PROMPT = "a red xylophone"  # the last word takes three tokens


@pytest.fixture
def draw(draw):
    return partial(draw, PROMPT, height=64, width=96)


def find_hooks(module):
    return [hook for m in module.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_probabilities_equal_a_softmax_by_hand():
    attention = CrossAttention(n_heads=2, d_embed=4, d_cross=3)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 5, 4, generator=generator), torch.randn(1, 6, 3, generator=generator)
    probabilities = get_probabilities(attention, x, context)
    assert probabilities.shape == (1, 2, 5, 6)
    for head in range(2):  # head k owns channels 2k and 2k + 1 of queries and keys
        channels = slice(2 * head, 2 * head + 2)
        for i in range(5):
            q = attention.q_proj.weight[channels].double() @ x[0, i].double()
            scores = [q @ (attention.k_proj.weight[channels].double() @ token.double()) / math.sqrt(2)
                      for token in context[0]]
            weights = [math.exp(score) for score in scores]
            expected = [weight / sum(weights) for weight in weights]
            assert probabilities[0, head, i].tolist() == pytest.approx(expected, abs=1e-6)


def test_probabilities_are_those_that_the_layer_uses():
    """Values that spell out the tokens' numbers make the layer return its own probabilities."""
    attention = CrossAttention(n_heads=1, d_embed=6, d_cross=6)
    attention.v_proj.weight.copy_(torch.eye(6))
    attention.out_proj.weight.copy_(torch.eye(6))
    attention.out_proj.bias.zero_()
    x, context = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1)), 3 * torch.eye(6)[None]
    torch.testing.assert_close(get_probabilities(attention, x, context)[:, 0], attention(x, context) / 3)


def test_maps_are_the_mean_of_the_layers_at_the_size_of_the_latents(models):
    """Against the probabilities of each layer alone, its inputs caught by other means, enlarged by hand."""
    generator = torch.Generator().manual_seed(2)
    latents, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 9, 32, generator=generator)
    calls, layers = [], [layer for layer in models["diffusion"].modules() if isinstance(layer, CrossAttention)]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, *inputs))) for layer in layers]
    with record_attention(models["diffusion"], row=1) as attention:
        models["diffusion"](latents, context, get_time_embedding(500, 32))
    for hook in hooks:
        hook.remove()

    sizes = {8 * 12: (8, 12), 4 * 6: (4, 6), 2 * 3: (2, 3)}
    assert len(calls) == len(layers) and {x.shape[1] for _, x, _ in calls} == set(sizes)
    expected = 0
    for layer, x, layer_context in calls:
        layer_maps = get_probabilities(layer, x, layer_context)[1].mean(0).T.reshape(9, *sizes[x.shape[1]])
        expected = expected + torch.stack([enlarge(layer_map, 8, 12) for layer_map in layer_maps]) / len(calls)
    torch.testing.assert_close(attention.maps(), expected)


def enlarge(layer_map, height, width):
    """Bilinear interpolation of a map, pixel centres aligned, edges repeated, one pixel at a time."""
    h, w = layer_map.shape
    out = torch.empty(height, width)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            upper = layer_map[top, left] * (1 - x + left) + layer_map[top, right] * (x - left)
            lower = layer_map[bottom, left] * (1 - x + left) + layer_map[bottom, right] * (x - left)
            out[i, j] = upper * (1 - y + top) + lower * (y - top)
    return out


def test_each_pixel_spreads_one_over_the_tokens(models, draw):
    with record_attention(models["diffusion"]) as attention:
        draw()
    maps = attention.maps()
    assert maps.shape == (77, 8, 12) and maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.std() > 0
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(8, 12))


def test_row_0_is_the_prompt_and_not_what_guidance_moves_away_from(models, draw):
    """With cfg_scale near 1 the guided picture is the unguided one, so the prompt's maps must be, too."""
    with record_attention(models["diffusion"]) as unguided:
        draw(do_cfg=False)
    with record_attention(models["diffusion"]) as guided:
        draw(uncond_prompt="blurry", cfg_scale=1.000001)
    torch.testing.assert_close(guided.maps(), unguided.maps(), rtol=1e-3, atol=1e-5)
    with record_attention(models["diffusion"], row=1) as uncond:
        draw(uncond_prompt="blurry", cfg_scale=1.000001)
    assert (uncond.maps() - guided.maps()).abs().max() > 1e-3


def test_the_picture_stays_the_same_and_no_hook_is_left(models, draw):
    before = draw()
    with record_attention(models["diffusion"]):
        during = draw()
        assert find_hooks(models["diffusion"])
    assert not find_hooks(models["diffusion"])
    assert np.array_equal(before, during) and np.array_equal(before, draw())


def test_no_hook_is_left_after_an_error(models):
    with pytest.raises(RuntimeError, match="stop"), record_attention(models["diffusion"]):
        raise RuntimeError("stop")
    assert not find_hooks(models["diffusion"])


def test_mistakes_are_named(models, draw):
    with record_attention(models["diffusion"]) as attention:
        pass
    with pytest.raises(ValueError, match="no attention was recorded"):
        attention.maps()
    with pytest.raises(ValueError, match="row is 2, but the UNet was given 2 rows"):
        with record_attention(models["diffusion"], row=2):
            draw()


def test_words_add_up_their_tokens(tokenizer):
    maps = torch.arange(77.0)[:, None, None].expand(77, 2, 2)  # the map of token k is k
    words = merge_words(maps, PROMPT, tokenizer)
    assert [(word, heat[0, 0].item()) for word, heat in words] == [("a", 1), ("red", 2), ("xylophone", 3 + 4 + 5)]
    assert [word for word, _ in merge_words(maps, "café ☕", tokenizer)] == ["café", "☕"]
    assert len(merge_words(maps, "cat " * 100, tokenizer)) == 75


def test_overlay_is_yellow_at_the_top_of_the_map_and_dark_at_its_foot():
    image = np.full((16, 24, 3), 100, np.uint8)
    heat = torch.zeros(2, 3)
    heat[0, 2] = 0.01  # only the range of the map counts, not its size
    out = overlay(image, heat)
    assert out.shape == image.shape and out.dtype == np.uint8
    assert out[0, -1].tolist() == [40 + 153, 40 + 153, 40 + 46] and out[-1, 0].tolist() == [40, 40, 40]
    assert np.array_equal(overlay(image, torch.full((2, 3), 0.5)), np.full_like(image, 40))  # flat: nothing stands out


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_unet_is_recorded(models, draw, tokenizer, how):
    with record_attention(models["diffusion"]) as expected:
        draw()
    unet = Diffusion(models["diffusion"].config)
    unet.load_state_dict(models["diffusion"].state_dict())
    compiled = torch.compile(unet, backend="eager") if how == "wrapped" else unet
    if how == "in place":
        unet.compile(backend="eager")
    with record_attention(compiled) as record:
        generate(PROMPT, height=64, width=96, models={**models, "diffusion": compiled}, tokenizer=tokenizer,
                 n_inference_steps=2, sampler_name="ddim", seed=7)
    torch.testing.assert_close(record.maps(), expected.maps())


def test_a_unet_in_a_wrapper_is_recorded(models, draw, tokenizer):
    with record_attention(models["diffusion"]) as expected:
        draw()
    wrapper = DeepCache(models["diffusion"], 1)
    for recorded in (wrapper, models["diffusion"]):
        with record_attention(recorded) as record:
            generate(PROMPT, height=64, width=96, models={**models, "diffusion": wrapper}, tokenizer=tokenizer,
                     n_inference_steps=2, sampler_name="ddim", seed=7)
        torch.testing.assert_close(record.maps(), expected.maps())
