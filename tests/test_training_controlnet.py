"""ControlNets that we train: how they start, whom they lead, and who reads them."""

import copy

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file
from test_training_pictures import folder, loaded, make_lesson, runs, teach  # noqa: F401  (fixtures)

import oracle
from diffusion import get_time_embedding
from extensions.controlnet import ControlNet, load_controlnet
from training import controlnet, loop


def empty_oracle(unet):
    """diffusers' ControlNet of a UNet's sizes."""
    config = oracle.TINY["diffusion"]
    return ControlNetModel(
        in_channels=4, block_out_channels=config.channels, layers_per_block=config.n_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attends),
        cross_attention_dim=config.d_context, attention_head_dim=config.n_heads, norm_num_groups=config.n_groups)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator),
            torch.rand(2, 3, 64, 64, generator=generator))


def test_it_starts_as_diffusers_does_from_a_unet(models, weights):
    """The copy, its zero convolutions, and a hint that is zero, too; nothing is added at first."""
    ours = controlnet.copy_unet(models["diffusion"])
    theirs = ControlNetModel.from_unet(oracle.unet_oracle(weights))
    latents, context, pixels = inputs()
    hint = ours.input_hint_block(pixels)
    assert torch.equal(hint, torch.zeros(2, 32, 8, 8))
    controls = ours(latents, context, get_time_embedding(500, 32), hint)
    assert all(torch.equal(control, torch.zeros_like(control)) for control in controls)

    for conv in [*(layer[0] for layer in ours.zero_convs), ours.middle_block_out[0]]:  # let the copies be seen
        torch.nn.init.dirac_(conv.weight)
    for conv in [*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]:
        torch.nn.init.dirac_(conv.weight)
    down, mid = theirs(latents, torch.tensor(500), context, controlnet_cond=pixels, return_dict=False)
    for ours_k, theirs_k in zip(ours(latents, context, get_time_embedding(500, 32), hint), [*down, mid], strict=True):
        torch.testing.assert_close(ours_k, theirs_k, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_diffusers_recipe(folder, checkpoint, weights):  # noqa: F811
    """Of the zero convolutions and of all else, from a state in which nothing is zero."""
    lesson = make_lesson(folder, checkpoint)
    ours = oracle.randomize(ControlNet(lesson.unet.config, hint_channels=(16, 32, 96, 256)), seed=4)
    stage = controlnet.ControlStage(lesson, ours, empty=0.0)
    theirs = empty_oracle(lesson.unet)
    layout = {name: weight.float() for name, weight in controlnet.to_lllyasviel(ours, torch.float32).items()}
    ours.load_state_dict({name: weight.half().float() if weight.ndim == 1 else weight
                          for name, weight in ours.state_dict().items()})  # as in the file
    theirs.load_state_dict(convert_controlnet_checkpoint(layout, theirs.config))
    unet = oracle.unet_oracle(weights).requires_grad_(False)
    with torch.enable_grad():
        loss = stage.loss(0, 2, torch.Generator().manual_seed(7))
        loss.backward()

        generator = torch.Generator().manual_seed(7)
        rows = torch.randint(3, (2,), generator=generator).tolist()
        torch.rand(2, generator=generator)  # whose caption is left out
        timesteps = torch.randint(0, 1000, (2,), generator=generator)
        latents = lesson.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        alpha_bar = lesson.noise_loss.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        context = stage.contexts[rows]
        down, mid = theirs(noisy, timesteps, context, controlnet_cond=stage.controls[rows], return_dict=False)
        predicted = unet(noisy, timesteps, context, down_block_additional_residuals=down,
                         mid_block_additional_residual=mid).sample
        expected = torch.nn.functional.mse_loss(predicted, noise)
        expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for mine, other in [(ours.input_hint_block[0], theirs.controlnet_cond_embedding.conv_in),
                        (ours.zero_convs[3][0], theirs.controlnet_down_blocks[3]),
                        (ours.middle_block_out[0], theirs.controlnet_mid_block),
                        (ours.encoders[1][0].conv_1, theirs.down_blocks[0].resnets[0].conv1)]:
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-3)


def test_the_unet_is_left_alone_and_the_control_is_followed(folder, checkpoint, tmp_path):  # noqa: F811
    lesson = make_lesson(folder, checkpoint)
    before = copy.deepcopy(lesson.unet.state_dict())
    stage = controlnet.ControlStage(lesson, controlnet.copy_unet(lesson.unet), empty=0.5)
    stage.report = lambda: ("", None)
    untrained = sum(stage.loss(0, 2, torch.Generator().manual_seed(-k)).item() for k in range(1, 4))
    loop.train("controlnet", stage, loop.Settings(steps=8, batch=2, learning_rate=3e-3, ema=0.5, warmup=1), tmp_path)
    assert sum(stage.loss(0, 2, torch.Generator().manual_seed(-k)).item() for k in range(1, 4)) < untrained
    assert all(torch.equal(weight, before[name]) for name, weight in lesson.unet.state_dict().items())
    latents, context, pixels = inputs()
    net = stage.modules["controlnet"]
    ends = [net(latents, context, get_time_embedding(500, 32), net.input_hint_block(hint))[-1]
            for hint in (pixels, 1 - pixels)]
    assert (ends[0] - ends[1]).abs().max() > 0


def test_captions_are_left_out_in_the_share_asked_for(folder, checkpoint, monkeypatch):  # noqa: F811
    lesson = make_lesson(folder, checkpoint)
    stage = controlnet.ControlStage(lesson, controlnet.copy_unet(lesson.unet), empty=0.3)
    seen = []
    lesson.noise_loss = lambda unet, latents, context, generator: seen.append(context)
    stage.loss(0, 400, torch.Generator().manual_seed(0))
    share = (seen[0] == stage.no_context).all(dim=(1, 2)).float().mean()
    assert 0.2 < share < 0.4


@pytest.mark.parametrize("options, n_bytes", [([], 2), (["--float8"], 1)])
def test_the_file_is_read_by_load_controlnet_and_by_diffusers(teach, models, options, n_bytes):  # noqa: F811
    path = teach(controlnet, *options, "--learning-rate", "0.01")
    weights = load_file(path)
    assert {"control_model.zero_convs.0.0.weight", "control_model.input_hint_block.14.bias",
            "control_model.middle_block_out.0.weight"} <= weights.keys()
    assert weights["control_model.input_blocks.1.1.proj_in.weight"].shape == (32, 32, 1, 1)
    assert weights["control_model.input_blocks.0.0.weight"].dtype.itemsize == n_bytes
    ours = load_controlnet(path, "cpu", "float32")
    theirs = empty_oracle(models["diffusion"])
    theirs.load_state_dict(convert_controlnet_checkpoint({k: v.float() for k, v in weights.items()}, theirs.config))
    latents, context, pixels = inputs()
    down, mid = theirs.eval()(latents, torch.tensor(500), context, controlnet_cond=pixels, return_dict=False)
    controls = ours(latents, context, get_time_embedding(500, 32), ours.input_hint_block(pixels))
    for control, expected in zip(controls, [*down, mid], strict=True):
        torch.testing.assert_close(control, expected, atol=1e-5, rtol=1e-4)
    assert max(control.abs().max() for control in controls) > 1e-3


def test_it_can_start_as_another_models_unet(teach, tmp_path):  # noqa: F811
    other = oracle.write_checkpoint(tmp_path / "other.safetensors", seed=20)
    path = teach(controlnet, "--copy-from", str(tmp_path / "other.safetensors"), "--learning-rate", "1e-7")
    name = "input_blocks.1.0.in_layers.2.weight"
    torch.testing.assert_close(load_file(path)[f"control_model.{name}"].float(),
                               other[f"model.diffusion_model.{name}"], atol=1e-3, rtol=1e-3)
