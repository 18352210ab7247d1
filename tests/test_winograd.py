"""Winograd's convolutions against direct ones in float64, and against the exactness of PyTorch's own in float32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from cpu import winograd


def layer(n_in, n_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, 3, 3, generator=generator) / (9 * n_in) ** 0.5
    return weight, torch.randn(n_out, generator=generator)


def picture(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


def rms(x):
    return x.square().mean().sqrt()


@pytest.mark.parametrize("shape", [(1, 64, 32, 32), (2, 64, 8, 12), (3, 32, 1, 1), (1, 32, 7, 9), (1, 96, 66, 130)])
@pytest.mark.parametrize("tiles", [1, 128, 10**6])
def test_the_result_is_as_exact_as_pytorchs(shape, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    x, (weight, bias) = picture(*shape), layer(shape[1], 48)
    expected = exact(x, weight, bias)
    error = winograd.convolve(x, weight, bias) - expected
    assert rms(error) < max(1.5 * rms(F.conv2d(x, weight, bias, padding=1) - expected), 1e-6 * expected.std())
    assert error.abs().max() < 2e-5 * expected.std()


def test_any_layout_of_the_picture_is_read_and_left_as_it_was():
    weight, bias = layer(32, 32)
    wide = picture(1, 64, 24, 40)
    for x in (wide[:, ::2], wide.to(memory_format=torch.channels_last)[:, 3:35, ::2], wide[:, :32].transpose(2, 3)):
        before = x.clone()
        result = winograd.convolve(x, weight, bias)
        torch.testing.assert_close(result.double(), exact(x, weight, bias), atol=2e-5, rtol=0)
        assert torch.equal(x, before) and result.is_contiguous(memory_format=torch.channels_last)


def test_an_outlier_costs_its_tile_no_more_than_its_own_rounding():
    """Within a tile values are mixed: errors are 1e-6 of the largest number there, and stay in its 6x6 pixels."""
    x, (weight, bias) = picture(1, 32, 16, 16), layer(32, 32)
    x[0, 5, 8, 8] = 1e6
    error = (winograd.convolve(x, weight, bias) - exact(x, weight, bias)).abs().amax((0, 1))
    assert error.max() < 2e-6 * 1e6
    error[4:12, 4:12] = 0
    assert error.max() < 2e-5


def test_what_is_not_finite_is_told_and_stays_in_its_tiles():
    x, (weight, bias) = picture(1, 32, 24, 24), layer(32, 32)
    x[0, 0, 9, 9] = float("nan")
    is_finite = winograd.convolve(x, weight, bias).isfinite().all(1)[0]
    assert not is_finite[8:11, 8:11].any()
    is_finite[8:12, 8:12] = True
    assert is_finite.all()


def test_threads_do_not_share_memory():
    """Layers of several sizes at once: each could overwrite the transformed weights of another."""
    layers = [layer(32, 32 * (1 + k % 3), seed=k) for k in range(12)]
    x = picture(1, 32, 24, 24)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda weights: [winograd.convolve(x, *weights) for _ in range(20)], layers))
    for weights, of_layer in zip(layers, results):
        for result in of_layer:
            torch.testing.assert_close(result.double(), exact(x, *weights), atol=2e-5, rtol=0)
    assert len(winograd.spare) <= 4


def test_inference_mode_is_no_different():
    x, (weight, bias) = picture(1, 64, 32, 32), layer(64, 64)
    winograd.spare.clear()
    winograd.matrices.cache_clear()
    with torch.inference_mode():
        first = winograd.convolve(x, weight, bias)
    assert torch.equal(winograd.convolve(x, weight, bias), first)


def test_autocast_leaves_it_in_float32():
    x, (weight, bias) = picture(1, 64, 32, 32), layer(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        result = winograd.convolve(x, weight, bias)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact(x, weight, bias), atol=2e-5, rtol=0)
