"""The training loop, on three small drawings of our own and tiny networks."""

import csv
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_scenes import drawings, grammar  # noqa: F401  (fixtures)

import model_loader
import oracle
from diffusion import get_time_embedding
from model_converter import to_standard_weights
from pipeline import generate
from training import loop, store, train


@pytest.fixture
def small(grammar, monkeypatch, tmp_path):  # noqa: F811
    """The grammar, with tiny networks, and all files in a folder of the test."""
    torch.set_grad_enabled(True)
    monkeypatch.setattr(train, "CLIP_CONFIG", replace(oracle.TINY["clip"], d_embed=16, d_mlp=32))
    for name in ("encoder", "decoder"):
        config = replace(oracle.TINY[name], channels=(16, 16, 16, 16), n_groups=4)
        monkeypatch.setattr(train, f"{name.upper()}_CONFIG", config)
    monkeypatch.setattr(train, "DIFFUSION_CONFIG", replace(
        oracle.TINY["diffusion"], channels=(16, 32), attends=(False, True), n_blocks=1, d_context=16, n_groups=4,
        sample_size=128))
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "STORE", tmp_path / "store")
    monkeypatch.setattr(store, "SCENES", 12)
    monkeypatch.setattr(train, "N_STATISTICS", 8)
    yield grammar
    torch.set_grad_enabled(False)


SETTINGS = train.Settings(steps=4, batch=4, learning_rate=1e-3, warmup=2, save_every=2, report_every=100)


def fill_store(grammar):  # noqa: F811
    train.STORE.mkdir(exist_ok=True)
    train.save(train.STORE / "00000.pt", store.make_shard(grammar, train.load_vae(grammar)["encoder"], 0))


def quiet(monkeypatch):
    monkeypatch.setattr(loop, "report", lambda *arguments: None)


def train_all(grammar):  # noqa: F811
    train.train("vae", SETTINGS, grammar, train.RUNS)
    fill_store(grammar)
    train.train("text", SETTINGS, grammar, train.RUNS)
    train.train("diffusion", SETTINGS, grammar, train.RUNS)
    train.train("decoder", SETTINGS, grammar, train.RUNS)


@pytest.mark.parametrize("name", train.STAGES)
def test_training_lowers_the_loss_on_one_batch(small, name, monkeypatch):
    quiet(monkeypatch)
    if name in ("diffusion", "attention", "decoder"):
        train.train("vae", SETTINGS, small, train.RUNS)
        fill_store(small)
    if name in ("diffusion", "attention"):
        train.train("text", SETTINGS, small, train.RUNS)
    if name == "attention":
        train.train("diffusion", SETTINGS, small, train.RUNS)
    torch.manual_seed(0)
    stage = train.STAGES[name](small)
    rate = 1e-2 if name == "attention" else 1e-5  # it starts with next to no influence
    optimizer = torch.optim.SGD(stage.modules.parameters(), lr=rate)

    def loss():
        torch.manual_seed(2)
        return stage.loss(1, 4, torch.Generator().manual_seed(1))

    before = loss()
    before.backward()
    assert all(weight.grad is not None for weight in stage.modules.parameters() if weight.requires_grad)
    optimizer.step()
    with torch.no_grad():
        assert loss() < before


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(small, tmp_path, monkeypatch):
    quiet(monkeypatch)
    whole = train.train("vae", SETTINGS, small, tmp_path / "whole").state_dict()
    plain_loss = train.VaeStage.loss

    def interrupted_loss(stage, step, batch, generator):
        if step == 1:
            raise KeyboardInterrupt
        return plain_loss(stage, step, batch, generator)

    monkeypatch.setattr(train.VaeStage, "loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt):
        train.train("vae", SETTINGS, small, tmp_path / "killed")
    monkeypatch.setattr(train.VaeStage, "loss", plain_loss)
    torch.manual_seed(123)
    resumed = train.train("vae", SETTINGS, small, tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = list(csv.DictReader(open(tmp_path / "killed" / "vae.csv")))
    assert [int(row["step"]) for row in log] == [0, 1, 2, 3]


def test_a_run_reports_how_it_does_on_what_is_held_out(small, monkeypatch):
    with monkeypatch.context() as patch:
        quiet(patch)
        train.train("vae", SETTINGS, small, train.RUNS)
        train.train("text", SETTINGS, small, train.RUNS)
    fill_store(small)
    # With three drawings hardly any combination is held out.
    monkeypatch.setattr(small, "held_out_scenes", lambda rng, kind, n: [small.scene(rng) for _ in range(n)])
    settings = replace(SETTINGS, report_every=2)
    train.train("diffusion", settings, small, train.RUNS)
    train.train("diffusion", replace(settings, steps=6), small, train.RUNS)  # goes on from step 4, whose report stays
    reports = list(csv.reader(open(train.RUNS / "diffusion-reports.csv")))[1:]
    assert [step for step, _ in reports] == ["2", "4", "6"]
    assert all(0.5 < float(text.removeprefix("held-out loss ")) < 2 for _, text in reports)  # of networks this young
    assert {path.name for path in train.RUNS.glob("diffusion*.png")} == {
        "diffusion-000002.png", "diffusion-000004.png", "diffusion-000006.png", "diffusion-loss.png"}


def test_the_chart_of_a_loss():
    """Twice as high at first as later: the line begins at the top, and ends half way down."""
    picture = np.asarray(loop.chart([0.2] * 500 + [0.1] * 500))
    height, width = picture.shape[:2]
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 50)
    for columns, row in [(slice(10, width // 2 - 10), 0), (slice(width // 2 + 10, width - 10), height / 2)]:
        rows = np.nonzero(blue[:, columns])[0]
        assert len(rows) and abs(rows - row).max() <= 2
    assert loop.chart([0.3]).size == (width, height)


def test_two_processes_take_the_mean_of_their_weights(monkeypatch):
    weights = [torch.nn.Parameter(torch.full((2, 3), 1.0)), torch.nn.Parameter(torch.full((4,), 2.0))]
    other = torch.cat([torch.full((6,), 3.0), torch.full((4,), 6.0)])  # what the other process sends
    monkeypatch.setattr(loop.distributed, "all_reduce", lambda message: message.add_(other))
    monkeypatch.setattr(loop.distributed, "get_world_size", lambda: 2)
    loop.average(weights)
    assert (weights[0] == 2).all() and (weights[1] == 4).all()


def test_wired_colours_pass_from_the_start(small):
    """Before any training, plain colours come through, and pictures as mosaics of 8x8 patches."""
    modules = train.VaeStage(small).modules
    colours = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [0.9, -0.6, -0.4], [-0.5, 0.5, -0.2], [0.6, 0, 0.8]])
    images = colours[:, :, None, None].expand(-1, -1, 64, 64)
    with torch.no_grad():
        noise = torch.zeros(len(images), 4, 8, 8)
        decoded = modules["decoder"](modules["encoder"](images, noise))
    assert (decoded - images).abs().mean() < 0.1


def test_folding_gives_latents_unit_scale_and_changes_no_picture(small):
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"encoder": oracle.randomize(train.VAE_Encoder(train.ENCODER_CONFIG)),
                                   "decoder": oracle.randomize(train.VAE_Decoder(train.DECODER_CONFIG))})
    images = train.draw_scenes(small, random.Random(-2), train.N_STATISTICS)
    with torch.no_grad():
        modules["encoder"].quant_conv.bias += torch.arange(8.0)
        noise = torch.randn(len(images), 4, 16, 16)
        before = modules["decoder"](modules["encoder"](images, noise))
        train.fold_scale(modules, images)
        torch.testing.assert_close(modules["decoder"](modules["encoder"](images, noise)), before, atol=1e-3, rtol=1e-3)
        means = modules["encoder"](images, torch.zeros_like(noise))
    assert means.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert ((means.std(dim=(0, 2, 3)) - 1).abs() < 1e-3).all()


def test_the_decoder_stage_leaves_the_encoder_alone(small, monkeypatch):
    quiet(monkeypatch)
    train.train("vae", SETTINGS, small, train.RUNS)
    before = train.load_vae(small)
    train.train("decoder", SETTINGS, small, train.RUNS)
    after = train.load_stage("decoder", small)
    assert list(after) == ["decoder"]
    assert not torch.equal(after["decoder"].conv_in.weight, before["decoder"].conv_in.weight)
    stage = train.DecoderStage(small)
    assert all(torch.equal(a, b) for a, b in zip(stage.encoder.parameters(), before["encoder"].parameters()))


def test_export_is_read_by_this_library_and_by_diffusers_alike(small, tmp_path, monkeypatch):
    quiet(monkeypatch)
    train_all(small)
    path = tmp_path / "emoji.safetensors"
    train.export(small, path, cfg_scale=2.5)
    models = model_loader.preload_models_from_standard_weights(path, "cpu", "float32")
    assert models["diffusion"].config == replace(train.DIFFUSION_CONFIG, cfg_scale=2.5)
    metadata = safe_open(path, "pt").metadata()
    assert metadata["cfg_scale"] == "2.5" and metadata["words"].split(" ") == small.words()
    weights = to_standard_weights({name: model.state_dict() for name, model in models.items()})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 16, generator=generator)
        expected = oracle.unet_oracle(weights, train.DIFFUSION_CONFIG)(latents, torch.tensor([500]), context).sample
        embedding = get_time_embedding(500, 16)
        torch.testing.assert_close(models["diffusion"](latents, context, embedding), expected, atol=1e-5, rtol=0)
        expected = oracle.vae_oracle(weights, train.ENCODER_CONFIG).decode(latents / 0.18215).sample
        torch.testing.assert_close(models["decoder"](latents), expected, atol=1e-5, rtol=0)
        tokens = torch.randint(0, 49408, (1, 77), generator=generator)
        expected = oracle.clip_oracle(weights, train.CLIP_CONFIG)(tokens).last_hidden_state
        torch.testing.assert_close(models["clip"](tokens), expected, atol=1e-5, rtol=0)
    tokenizer = model_loader.load_tokenizer()
    image = generate("a red square", models=models, tokenizer=tokenizer, n_inference_steps=1, seed=0)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8

    monkeypatch.setattr(train, "RUNS", tmp_path / "restored")
    train.restore(small, path)
    for name in ("vae", "text", "diffusion"):
        restored = train.load_stage(name, small)
        for part in restored.keys() & models.keys():
            exported = models[part].state_dict()
            assert all(torch.equal(weight, exported[key]) for key, weight in restored[part].state_dict().items())
    fill_store(small)
    train.train("attention", replace(SETTINGS, weight_decay=0), small, train.RUNS)
    train.export(small, tmp_path / "after.safetensors")
    before, after = load_file(path), load_file(tmp_path / "after.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn" in name or name.startswith("cond_stage_model") for name in changed)
    words = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert 0 < (before[words] != after[words]).any(dim=1).sum() < 60  # those of captions alone
    with pytest.raises(ValueError, match="has runs already"):
        train.restore(small, path)


def test_missing_files_are_named(small):
    with pytest.raises(FileNotFoundError, match="run `python -m training.train vae` first"):
        train.load_vae(small)
    with pytest.raises(FileNotFoundError, match="run `python -m training.train text` first"):
        train.DiffusionStage(small)
    with pytest.raises(FileNotFoundError, match="training.store"):
        train.read_store(train.STORE)
