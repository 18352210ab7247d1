"""Models that predict v, and schedules that end in noise alone: what files say of themselves, and the arithmetic."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.torch import save_file

import oracle
from checkpoint_file import CheckpointError
from ddpm import DDPMSampler, eps_from_v, get_alphas_cumprod, rescale_alphas_cumprod, rescale_guidance
from diffusion import TimeEmbedding
from model_converter import infer_configs
from model_loader import preload_models_from_standard_weights
from samplers import SAMPLERS

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SHAPE = (2, 4, 6, 5)


# ---- the arithmetic


def test_the_rescaled_schedule_is_that_of_diffusers():
    ours = rescale_alphas_cumprod(get_alphas_cumprod())
    euler = diffusers.EulerDiscreteScheduler(**SD15, rescale_betas_zero_snr=True)
    assert np.allclose(ours, euler.alphas_cumprod.numpy(), rtol=3e-4, atol=1e-7)
    assert ours[-1] == float(euler.alphas_cumprod[-1]) == 2.0**-24
    assert ours[0] == pytest.approx(get_alphas_cumprod()[0], rel=1e-12) and ours[-2] == pytest.approx(1.97e-7, rel=0.01)


def test_eps_and_x0_from_v():
    x0, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha_bar in (0.999, 0.3, 1e-4):
        latents = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
        v = math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0
        assert torch.allclose(eps_from_v(v, latents, alpha_bar), eps, atol=1e-12)


def test_rescaled_guidance_is_that_of_diffusers():
    guided, cond = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
    for phi in (0.0, 0.7, 1.0):
        assert torch.allclose(rescale_guidance(guided, cond, phi), rescale_noise_cfg(guided, cond, phi), atol=1e-6)


def predict_v(x, t):
    """A stand-in for the UNet."""
    return torch.tanh(x) * 0.7 + 0.1 * math.sin(float(t)) - 0.4


THEIRS = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"lower_order_final": True, "euler_at_final": True,
                                                         "final_sigmas_type": "zero"}, {}),
}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("n", [4, 20])
def test_v_prediction_draws_what_diffusers_draws(name, zero_snr, n):
    kind, theirs_only, ours_only = THEIRS[name]
    theirs = kind(**SD15, **theirs_only, prediction_type="v_prediction", timestep_spacing="trailing",
                  rescale_betas_zero_snr=zero_snr)
    theirs.set_timesteps(n)
    ours = SAMPLERS[name](None, timestep_spacing="trailing", rescale_zero_terminal_snr=zero_snr, **ours_only)
    ours.set_inference_timesteps(n)
    assert [round(t) for t in ours.timesteps] == [round(float(t)) for t in theirs.timesteps]
    assert ours.timesteps[0] == 999
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    x = start
    for t in ours.timesteps:
        x = ours.step(t, x, eps_from_v(predict_v(x, t), x, ours.alpha_bar(t)))
    y = start
    if name == "euler":
        y = start * (float(theirs.sigmas[0]) ** 2 + 1) ** 0.5  # with "trailing" spacing, diffusers leaves out the 1
    for t in theirs.timesteps:
        y = theirs.step(predict_v(theirs.scale_model_input(y, t), t), t, y).prev_sample
    # With ᾱ = 2⁻²⁴ the first ε, rounded to float32, says to 3e-4 what x_0 is; DDIM's ᾱ is 0 there in diffusers.
    tolerance = 1e-3 if zero_snr else 2e-5
    assert torch.allclose(x, y, atol=tolerance), (x - y).abs().max()
    assert (x - y).abs().mean() < tolerance / 5


def test_samplers_know_the_schedule_by_one_setting():
    for kind in SAMPLERS.values():
        sampler = kind(None, rescale_zero_terminal_snr=True)
        sampler.set_inference_timesteps(10)
        assert sampler.alphas_cumprod[-1] == 2.0**-24
        assert all(math.isfinite(x) for row in sampler.coefficients for x in row if isinstance(x, float))
    assert DDPMSampler(None).alphas_cumprod[-1] == pytest.approx(0.00466, rel=1e-3)


def test_the_embedded_guidance_scale_is_that_of_diffusers():
    theirs = diffusers.models.embeddings.TimestepEmbedding(32, 128, cond_proj_dim=6)
    ours = TimeEmbedding(32, 6)
    ours.load_state_dict(theirs.state_dict())
    time, guidance = torch.randn(1, 32), torch.randn(1, 6)
    assert torch.allclose(ours(torch.cat([time, guidance], 1)), theirs(time, guidance), atol=1e-6)
    assert TimeEmbedding(32).cond_proj is None


# ---- what files say


MARKS = {
    "v_pred": ({"v_pred": torch.empty(0)}, {}, ""),
    "v_pred and ztsnr": ({"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, {}, ""),
    "modelspec v": ({}, {"modelspec.prediction_type": "v"}, ""),
    "modelspec epsilon": ({"v_pred": torch.empty(0)}, {"modelspec.prediction_type": "epsilon"}, ""),
    "kohya": ({}, {"ss_base_model_version": "sd_v1_v", "ss_zero_terminal_snr": "True"}, ""),
    "kohya epsilon": ({}, {"ss_base_model_version": "sd_v1", "ss_zero_terminal_snr": "False"}, ""),
    "yaml": ({}, {}, 'model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: "v"\n'),
    "yaml without quotes": ({}, {}, "model:\n  params:\n    parameterization: v  # as trained\n"),
    "yaml comment": ({}, {}, "model:\n  params:\n    # parameterization: v\n"),
    "yaml before metadata": ({}, {"modelspec.prediction_type": "v"}, "params:\n  parameterization: eps\n"),
    "nothing": ({}, {}, ""),
}
EXPECTED = {"v_pred": ("v", False), "v_pred and ztsnr": ("v", True), "modelspec v": ("v", False), "kohya": ("v", True),
            "yaml": ("v", False), "yaml without quotes": ("v", False)}


@pytest.mark.parametrize("mark", MARKS)
def test_what_a_file_says_is_obeyed_and_can_be_overridden(weights, tmp_path, mark):
    tensors, metadata, yaml = MARKS[mark]
    path = tmp_path / "model.safetensors"
    save_file({**weights, **tensors}, path, {**oracle.METADATA, **metadata})
    if yaml:
        (tmp_path / "model.yaml").write_text(yaml)
    config = preload_models_from_standard_weights(path, "cpu")["diffusion"].config
    assert (config.prediction, config.zero_terminal_snr) == EXPECTED.get(mark, ("epsilon", False))
    if mark in ("v_pred", "nothing"):
        for prediction in ("epsilon", "v"):
            models = preload_models_from_standard_weights(path, "cpu", prediction=prediction)
            assert models["diffusion"].config.prediction == prediction


def test_predictions_that_there_are_not(weights, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights, path, {**oracle.METADATA, "modelspec.prediction_type": "x0"})
    with pytest.raises(CheckpointError, match="model.safetensors: the model predicts 'x0'; expected"):
        preload_models_from_standard_weights(path, "cpu")
    with pytest.raises(ValueError, match="prediction is 'noise'; give 'epsilon', 'v' or None"):
        preload_models_from_standard_weights(path, "cpu", prediction="noise")


def test_guidance_scale_words_and_the_rest_are_read_from_metadata(weights):
    told = {**oracle.METADATA, "cfg_scale": "3.5", "words": "fox owl", "guidance_rescale": "0.7"}
    configs = infer_configs(weights, told)
    assert configs["clip"] == replace(oracle.TINY["clip"], words=("fox", "owl"))
    assert configs["diffusion"] == replace(oracle.TINY["diffusion"], cfg_scale=3.5, guidance_rescale=0.7)
    assert infer_configs(weights, oracle.METADATA) == oracle.TINY
    assert oracle.TINY["diffusion"].cfg_scale == 7.5 and oracle.TINY["clip"].words == ()
    for value in ("nan", "inf", "-1", "1e3", "x", ""):
        with pytest.raises(CheckpointError, match="cfg_scale is "):
            infer_configs(weights, {**told, "cfg_scale": value})


@pytest.mark.parametrize("name", ["time_embedding.cond_proj", "time_embed.cond_proj"])
def test_a_model_that_is_told_the_guidance_scale(weights, tmp_path, name):
    weight = torch.randn(32, 6)
    weights = {**weights, f"model.diffusion_model.{name}.weight": weight}
    save_file(weights, tmp_path / "lcm.safetensors", oracle.METADATA)
    diffusion = preload_models_from_standard_weights(tmp_path / "lcm.safetensors", "cpu", "float32")["diffusion"]
    assert diffusion.config.d_guidance == 6
    assert torch.equal(diffusion.time_embedding.cond_proj.weight, weight)
    time, guidance = torch.randn(1, 32), torch.randn(1, 6)
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    told = diffusion(latents, context, torch.cat([time, guidance], 1))
    assert told.shape == latents.shape
    assert not torch.allclose(told, diffusion(latents, context, torch.cat([time, 0 * guidance], 1)))
