"""Packed networks against plain ones, which the other tests hold to diffusers."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import model_loader
import oracle
from cpu import packed
from cpu.packed import PackedUpsample, pack
from diffusion import Upsample
from model_converter import NETWORKS, to_standard_weights
from pipeline import generate, get_time_embedding


@pytest.fixture(params=[False, True], ids=["arranged", "avx2"], autouse=True)
def of_either_kind_of_processor(request, monkeypatch):
    """What is chosen for AVX2 alone computes on others, too, and the other way round."""
    monkeypatch.setattr(packed, "AVX2_ALONE", request.param)


def inputs(network, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    return {"clip": lambda: (torch.arange(2 * 77).reshape(2, 77),),
            "encoder": lambda: (draw(2, 3, 32, 40), draw(2, 4, 4, 5)),
            "decoder": lambda: (draw(2, 4, 4, 5),),
            "diffusion": lambda: (draw(2, 4, 8, 12), draw(2, 77, 32), draw(1, 32))}[network]()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_packed_network_is_the_plain_one(network):
    module = oracle.randomize(NETWORKS[network](oracle.TINY[network])).eval()
    arguments = inputs(network)
    expected = module(*arguments)
    module = pack(module)
    plain = torch.nn.Conv2d if packed.AVX2_ALONE else (torch.nn.Linear, torch.nn.Conv2d)
    assert not any(isinstance(layer, plain) for layer in module.modules())
    torch.testing.assert_close(module(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_a_packed_unet_takes_odd_sizes():
    module = oracle.randomize(NETWORKS["diffusion"](oracle.TINY["diffusion"])).eval()
    arguments = (torch.randn(1, 4, 7, 9), torch.randn(2, 77, 32), torch.randn(1, 32))
    expected = module(*arguments)
    torch.testing.assert_close(pack(module)(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_group_norms_of_large_pictures_are_exact():
    """PyTorch's in channels_last are 3e-4 off here, by adding up 2**16 numbers one after another."""
    norm = oracle.randomize(torch.nn.GroupNorm(2, 8))
    x = torch.randn(2, 8, 512, 256, generator=torch.Generator().manual_seed(0)) + 4
    x[1] *= torch.linspace(1, 2, 512).view(512, 1)  # rows and pictures differ
    groups = x.double().view(2, 2, -1)
    expected = ((groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + norm.eps).sqrt())
    expected = expected.view_as(x) * norm.weight.view(8, 1, 1) + norm.bias.view(8, 1, 1)
    result = pack(norm)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.bf16
def test_bfloat16_is_no_further_from_float32_than_unpacked():
    for network in NETWORKS:
        exact = oracle.randomize(NETWORKS[network](oracle.TINY[network])).eval()
        arguments = inputs(network)
        expected = exact(*arguments)
        half = [x.bfloat16() if x.is_floating_point() else x for x in arguments]
        plain = exact.bfloat16()(*half)
        result = pack(exact)(*half)
        error, plain_error = ((x.float() - expected).square().mean().sqrt() for x in (result, plain))
        assert error <= 1.15 * plain_error, network


@pytest.mark.bf16
def test_bfloat16_is_no_further_from_float32_than_diffusers():
    """With 1024 tokens, so that attention goes in blocks; both scatter by some percent from one set of weights to the
    next."""
    errors = []
    for seed in range(4):
        unet = oracle.randomize(NETWORKS["diffusion"](oracle.TINY["diffusion"]), seed).eval()
        theirs = oracle.unet_oracle(to_standard_weights({"diffusion": unet.state_dict()}))
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(2, 4, 32, 32, generator=generator).bfloat16()
        context = torch.randn(2, 77, 32, generator=generator).bfloat16()
        exact = theirs(latents.float(), torch.tensor(500), context.float()).sample
        diffusers = theirs.bfloat16()(latents, torch.tensor(500), context).sample
        ours = pack(unet.bfloat16())(latents, context, get_time_embedding(500, 32).bfloat16())
        errors.append([(result.float() - exact).square().mean().sqrt() for result in (ours, diffusers)])
    ours, diffusers = torch.tensor(errors).mean(dim=0)
    assert ours <= 1.02 * diffusers


def test_the_upsampling_in_four_phases_is_exact():
    """In float64-like exactness: small whole numbers, so that any difference would show."""
    layer = Upsample(16)
    layer.conv.weight.copy_(torch.randint(-3, 4, layer.conv.weight.shape))
    layer.conv.bias.copy_(torch.arange(16))
    x = torch.randint(-5, 6, (2, 16, 3, 4)).float()
    assert torch.equal(PackedUpsample(layer)(x), layer(x, (6, 8)))


def test_a_packed_checkpoint_draws_the_same_picture(tmp_path):
    oracle.write_checkpoint(tmp_path / "tiny.safetensors")
    pictures = [generate("a cat", n_inference_steps=3, seed=1, sampler_name="ddim", models=
                         model_loader.preload_models_from_standard_weights(tmp_path / "tiny.safetensors", "cpu",
                                                                           "float32", pack=pack)).astype(int)
                for pack in (False, True)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_convolutions_take_pictures_of_changing_size():
    """Each kind of layer is among them: with AVX2 alone, 1281 x 1000 pairs of channels take an unfolded one."""
    wide = (1281, 1000) if packed.AVX2_ALONE else (81, 100)
    for n_in, n_out, kernel, stride in [(*wide, 3, 1), (*wide, 3, 2), (40, 50, 3, 2), (40, 50, 3, 1), (4, 40, 3, 1),
                                        (40, 3, 2, 1)]:
        conv = oracle.randomize(torch.nn.Conv2d(n_in, n_out, kernel, stride, padding=1))
        layer = packed.pack_convolution(conv.weight, conv.bias, conv.stride, conv.padding)
        without_bias = packed.pack_convolution(conv.weight, None, conv.stride, conv.padding)
        for shape in [(2, n_in, 8, 12), (1, n_in, 8, 12), (1, n_in, 5, 3), (2, n_in, 8, 12)]:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride, padding=1)
            tolerance = {"atol": 5e-5 * expected.std().item(), "rtol": 0}
            torch.testing.assert_close(layer(x).double(), expected, **tolerance)
            torch.testing.assert_close((without_bias(x) + conv.bias[:, None, None]).double(), expected, **tolerance)


def test_packed_weights_cannot_be_moved_or_converted():
    module = pack(NETWORKS["decoder"](oracle.TINY["decoder"]))
    module.to("cpu", torch.float32)
    with pytest.raises(ValueError, match="pack=False"):
        module.to(torch.bfloat16)
    with pytest.raises(ValueError, match="stay on the CPU"):
        module.to("meta")


def test_packing_is_refused_for_float16(tmp_path):
    oracle.write_checkpoint(tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="pack=True needs the CPU"):
        model_loader.preload_models_from_standard_weights(tmp_path / "tiny.safetensors", "cpu", "float16", pack=True)


def test_packed_weights_cannot_be_saved_or_copied():
    for action in (torch.nn.Module.state_dict, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="neither saved nor copied; load the checkpoint with pack=False"):
            action(pack(NETWORKS["decoder"](oracle.TINY["decoder"])))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_packed_network_computes_within_autocast(network):
    module = pack(oracle.randomize(NETWORKS[network](oracle.TINY[network])).eval())
    expected = module(*inputs(network))
    with torch.autocast("cpu", torch.bfloat16):
        result = module(*inputs(network))
    assert (result.float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("network", ["encoder", "decoder", "diffusion"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_what_a_hook_was_shown_is_never_overwritten(network, is_packed):
    module = oracle.randomize(NETWORKS[network](oracle.TINY[network])).eval()
    module = pack(module) if is_packed else module
    seen = []

    def keep(layer, inputs, output):
        tensors = [x for x in (*inputs, output) if isinstance(x, torch.Tensor)]
        seen.extend((x, x.clone()) for x in tensors)

    for layer in module.modules():
        layer.register_forward_hook(keep)
    module(*inputs(network))
    assert len(seen) > 50 and all(torch.equal(x, as_it_was) for x, as_it_was in seen)
