"""Distillation to a LoRA for four steps, on the tiny networks: what it writes, its teacher and its function."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import oracle
from extensions.lora import add_lora
from model_loader import preload_models_from_standard_weights
from samplers import LCMSampler
from training import lcm, train
from training.lora import to_kohya


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A tiny checkpoint that names its concepts and styles."""
    path = tmp_path_factory.mktemp("named") / "tiny.safetensors"
    oracle.write_checkpoint(path, metadata=oracle.METADATA | {"concepts": '["cat", "dog"]', "styles": '["noto"]'})
    return path


@pytest.fixture
def stage(named, monkeypatch):
    monkeypatch.setattr(lcm, "GUIDED_STEPS", 2)
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    yield lcm.LcmStage(named, cfg_scale=3.0, n_latents=2)
    torch.set_grad_enabled(False)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in [(2, 4, 8, 8), (2, 77, 32), (1, 32)]]


def change_all(stage):
    for change in stage.modules["diffusion"].values():
        torch.nn.init.normal_(change.up, std=0.02)


@torch.no_grad()
def test_the_file_changes_a_model_as_training_did(stage, named, tmp_path):
    change_all(stage)
    save_file(to_kohya(stage.modules), tmp_path / "lcm.safetensors")
    models = preload_models_from_standard_weights(named, "cpu", "float32")
    plain = models["diffusion"](*inputs())
    add_lora(models, tmp_path / "lcm.safetensors")
    trained = stage.unet(*inputs())
    assert (trained - plain).abs().max() > 0.05
    torch.testing.assert_close(models["diffusion"](*inputs()), trained, rtol=0, atol=5e-3)  # float16's rounding


@torch.no_grad()
def test_the_teacher_is_the_checkpoint(stage, named):
    change_all(stage)
    original = preload_models_from_standard_weights(named, "cpu", "float32")["diffusion"](*inputs())
    assert torch.equal(stage.teacher(*inputs()), original)
    assert not torch.equal(stage.unet(*inputs()), original)


@torch.no_grad()
def test_it_learns_the_function_that_the_sampler_draws_with(stage):
    """A single step of the sampler ends in f, whatever noise level it begins at."""
    latents, context, _ = inputs()
    for n, t in [(1, 999), (50, 19)]:  # of 50 steps the last one
        sampler = LCMSampler()
        sampler.set_inference_timesteps(n)
        assert sampler.timesteps[-1] == t
        eps = stage.predict(latents, context, torch.tensor([t, t]))
        torch.testing.assert_close(stage.see(latents, context, torch.tensor([t, t])), sampler.step(t, latents, eps),
                                   rtol=1e-4, atol=1e-4)


def test_a_network_that_is_consistent_has_no_loss(stage, monkeypatch):
    """Where ε is what leads to one picture from anywhere, guided DDIM stays on that path, and f sees that picture."""
    stage.prepare()
    picture = torch.full((1, 4, 8, 8), 0.3)

    def predict(latents, context, timesteps, unet=None):
        return (latents - stage.signal(timesteps) * picture) / stage.noise(timesteps)

    monkeypatch.setattr(stage, "predict", predict)
    monkeypatch.setattr(stage.sampler, "timestep_scaling", 1e6)  # or f is bound to its input at the lowest level
    assert stage.loss(0, 8, torch.Generator().manual_seed(0)).abs() < 1e-3


def test_training_changes_the_lora_alone(stage, monkeypatch, tmp_path):
    monkeypatch.setitem(train.STAGES, "lcm", lambda grammar: stage)
    networks = nn.ModuleDict({"unet": stage.unet, "teacher": stage.teacher, "lora": stage.modules})
    before = {name: weight.clone() for name, weight in networks.named_parameters()}
    train.train("lcm", replace(lcm.SETTINGS, steps=2, batch=2, warmup=1, report_every=2), None, tmp_path)
    changed = {name for name, weight in networks.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith("lora.")}
    assert (tmp_path / "lcm-000002.png").exists()


def test_a_checkpoint_without_names_is_refused(checkpoint):
    with pytest.raises(ValueError, match="does not name its concepts and styles"):
        lcm.LcmStage(checkpoint, 3.0, 4)


def test_the_table_has_all_ways_to_draw(stage, named, tmp_path):
    save_file(to_kohya(stage.modules), tmp_path / "lcm.safetensors")
    *_, guided, _, plain, distilled = lcm.evaluate(named, tmp_path / "lcm.safetensors", 3.0, 2).splitlines()
    assert guided.startswith("| 2 guided steps of dpmpp_2m | 0.0 |")
    assert plain.split("|")[2:] == distilled.split("|")[2:]  # a LoRA that was not trained changes nothing
