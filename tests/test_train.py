"""The training loop, on three small drawings of our own and tiny networks."""

import csv

import numpy as np
import pytest
import torch
from test_emoji import drawings  # noqa: F401  (a fixture)

import model_loader
import oracle
from model_converter import to_standard_weights
from pipeline import generate
from training import train


@pytest.fixture
def batches(drawings, monkeypatch, tmp_path):  # noqa: F811
    torch.set_grad_enabled(True)
    monkeypatch.setattr(train, "CLIP_CONFIG", oracle.replace(oracle.TINY["clip"], d_embed=16, d_mlp=32))
    for name in ("encoder", "decoder"):
        config = oracle.replace(oracle.TINY[name], channels=(16, 16, 16, 16), n_groups=4)
        monkeypatch.setattr(train, f"{name.upper()}_CONFIG", config)
    monkeypatch.setattr(train, "DIFFUSION_CONFIG", oracle.replace(
        oracle.TINY["diffusion"], channels=(16, 32), attends=(False, True), n_blocks=1, d_context=16, n_groups=4,
        sample_size=128))
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    yield train.Batches(drawings)
    torch.set_grad_enabled(False)


SETTINGS = train.Settings(steps=4, batch=4, learning_rate=1e-3, warmup=2, save_every=2)


def train_all(batches, names=("clip", "vae", "diffusion"), settings=SETTINGS):
    for name in names:
        train.train(name, settings, batches, train.RUNS)


@pytest.mark.parametrize("name", ["clip", "vae", "diffusion"])
def test_training_lowers_the_loss_on_one_batch(batches, name):
    if name == "diffusion":
        train_all(batches, ["clip", "vae"])
    torch.manual_seed(0)
    stage = train.STAGES[name](batches)
    optimizer = torch.optim.SGD(stage.modules.parameters(), lr=1e-5)

    def loss():
        return stage.loss(1, 4, torch.Generator().manual_seed(1))

    before = loss()
    before.backward()
    assert all(weight.grad is not None for weight in stage.modules.parameters())
    optimizer.step()
    with torch.no_grad():
        assert loss() < before


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(batches, tmp_path, monkeypatch):
    whole = train.train("vae", SETTINGS, batches, tmp_path / "whole").state_dict()
    plain_loss = train.VaeStage.loss

    def interrupted_loss(stage, step, batch, generator):
        if step == 3:
            raise KeyboardInterrupt
        return plain_loss(stage, step, batch, generator)

    monkeypatch.setattr(train.VaeStage, "loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt):
        train.train("vae", SETTINGS, batches, tmp_path / "killed")
    monkeypatch.setattr(train.VaeStage, "loss", plain_loss)
    torch.manual_seed(123)
    resumed = train.train("vae", SETTINGS, batches, tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = list(csv.DictReader(open(tmp_path / "killed" / "vae.csv")))
    assert [int(row["step"]) for row in log] == [0, 1, 2, 3]
    assert (tmp_path / "killed" / "vae-000004.png").exists()


def test_wired_colours_pass_from_the_start(batches):
    """Before any training, plain colours come through, and pictures as mosaics of 8x8 patches."""
    modules = train.VaeStage(batches).modules
    colours = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [0.9, -0.6, -0.4], [-0.5, 0.5, -0.2], [0.6, 0, 0.8]])
    images = colours[:, :, None, None].expand(-1, -1, 64, 64)
    with torch.no_grad():
        noise = torch.zeros(len(images), 4, 8, 8)
        decoded = modules["decoder"](modules["encoder"](images, noise))
    assert (decoded - images).abs().mean() < 0.1


def test_held_out_pairs_are_never_drawn(drawings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train.emoji, "held_out_pairs", lambda drawings, path=None: torch.tensor([1, 4]))
    allowed = torch.ones(3, 11, dtype=torch.bool)
    allowed[:, 5] = False
    monkeypatch.setattr(train.emoji, "trained_colours", lambda drawings: allowed)
    batches = train.Batches(drawings)
    rows, colours, captions = zip(*(batches.draw(step, 16) for step in range(20)))
    assert set(torch.cat(rows).tolist()) == set(range(len(drawings.rgba))) - {1, 4}
    assert set(torch.cat(colours).tolist()) == set(range(11)) - {5}
    assert not any(batches.colours[5] in caption for batch in captions for caption in batch)


def test_folding_gives_latents_unit_scale_and_changes_no_picture(batches):
    torch.manual_seed(0)
    modules = {"encoder": oracle.randomize(train.VAE_Encoder(train.ENCODER_CONFIG)),
               "decoder": oracle.randomize(train.VAE_Decoder(train.DECODER_CONFIG))}
    with torch.no_grad():
        modules["encoder"].quant_conv.bias += torch.arange(8.0)
        rows = torch.arange(0, len(batches.drawings.rgba), 3)  # what the statistics are taken over
        images = batches.images(rows, torch.where(rows % 2 == 0, 0, rows))
        noise = torch.randn(len(rows), 4, 16, 16)
        before = modules["decoder"](modules["encoder"](images, noise))
        folded = train.folded_vae(modules, batches)
        latents = folded["encoder"](images, noise)
        torch.testing.assert_close(folded["decoder"](latents), before, atol=1e-4, rtol=1e-4)
        means = folded["encoder"](images, torch.zeros_like(noise))
    assert means.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert ((means.std(dim=(0, 2, 3)) - 1).abs() < 1e-3).all()


def test_export_is_read_by_this_library_and_by_diffusers_alike(batches, tmp_path, monkeypatch):
    train_all(batches)
    path = tmp_path / "emoji.safetensors"
    train.export(batches, path)
    models = model_loader.preload_models_from_standard_weights(path, "cpu", "float32")
    assert models["diffusion"].config == train.DIFFUSION_CONFIG
    weights = to_standard_weights({name: model.state_dict() for name, model in models.items()})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 16, generator=generator)
        expected = oracle.unet_oracle(weights, train.DIFFUSION_CONFIG)(latents, torch.tensor([500]), context).sample
        embedding = train.get_time_embedding(500, 16)
        torch.testing.assert_close(models["diffusion"](latents, context, embedding), expected, atol=1e-5, rtol=0)
        expected = oracle.vae_oracle(weights, train.ENCODER_CONFIG).decode(latents / 0.18215).sample
        torch.testing.assert_close(models["decoder"](latents), expected, atol=1e-5, rtol=0)
        tokens = torch.randint(0, 49408, (1, 77), generator=generator)
        expected = oracle.clip_oracle(weights, train.CLIP_CONFIG)(tokens).last_hidden_state
        torch.testing.assert_close(models["clip"](tokens), expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(train, "RUNS", tmp_path / "restored")
    train.restore(batches, path)
    for name, part in [("clip", "text"), ("vae", "encoder"), ("vae", "decoder"), ("diffusion", "diffusion")]:
        restored = train.load_stage(name, batches)[part].state_dict()
        exported = models["clip" if part == "text" else part].state_dict()
        assert all(torch.equal(restored[key], exported[key]) for key in exported)
    train.train("diffusion", oracle.replace(SETTINGS, steps=train.SETTINGS["diffusion"].steps + 1), batches, train.RUNS)
    with pytest.raises(ValueError, match="has runs already"):
        train.restore(batches, path)
    image = generate("a red square", models=models, tokenizer=batches.tokenizer, n_inference_steps=1, seed=0)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
