"""Folders of pictures with captions, and what the three commands that teach have in common."""

import copy
import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model_loader
import oracle
from diffusion import DiffusionConfig, get_time_embedding
from training import controlnet, loop, lora, pictures, teaching, textual_inversion

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions in text files, and their control pictures."""
    path = tmp_path / "pictures"
    (path / "control").mkdir(parents=True)
    for k, name in enumerate(["cat", "dog", "owl"]):
        oracle.picture((64 + 16 * k, 64), seed=k).save(path / f"{name}.png")
        oracle.picture((64 + 16 * k, 64), seed=k + 9).save(path / "control" / f"{name}.png")
        (path / f"{name}.txt").write_text(f"a {name}\n")
    return path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "RUNS", tmp_path / "runs")

    def draw(lesson, prompts=None, models=None, context=()):  # pictures are another's test
        return np.zeros((len(prompts or context[::2]), lesson.size, lesson.size, 3), np.uint8)

    monkeypatch.setattr(teaching.Lesson, "draw", draw)
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def loaded(models, tokenizer, checkpoint, monkeypatch):
    """Copies of the tiny checkpoint's networks, which is faster than to load it each time."""
    load = teaching.load_frozen
    monkeypatch.setattr(teaching, "load_frozen", lambda path: {
        name: network.requires_grad_(False) for name, network in copy.deepcopy(models).items()
    } if path == checkpoint else load(path))
    monkeypatch.setattr(model_loader, "load_tokenizer", lambda: tokenizer)


@pytest.fixture
def teach(folder, runs, checkpoint, tmp_path):
    """Runs a command on the three pictures with the tiny checkpoint; returns the path of the result."""
    def teach(command, *options, name="mine"):
        named = {lora: ["--name", name], controlnet: ["--name", name],
                 textual_inversion: ["--token", name, "--init", "cat"]}[command]
        command.main([str(folder), *named, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"),
                      "--device", "cpu", "--steps", "4", "--batch", "2", *options])
        return tmp_path / "out" / f"{name.strip('<>')}.safetensors"
    return teach


def make_lesson(folder, checkpoint, **options):
    """The tiny checkpoint and the three pictures, as a command would have them."""
    arguments = {"checkpoint": checkpoint, "resolution": None, "device": "cpu", "dtype": None, "snr_gamma": None,
                 "gradient_checkpointing": False, "sample_cfg_scale": None, **options}
    return teaching.Lesson(SimpleNamespace(**arguments), pictures.read_folder(folder, controls=True))


# ---- folders


def test_text_files_and_metadata_say_the_same(folder):
    by_text = pictures.read_folder(folder, controls=True)
    assert [(example.picture.name, example.caption) for example in by_text] == [
        ("cat.png", "a cat"), ("dog.png", "a dog"), ("owl.png", "a owl")]
    assert [example.control for example in by_text] == [folder / "control" / f"{n}.png" for n in ("cat", "dog", "owl")]
    rows = [{"file_name": f"{name}.png", "text": f"a {name}", "conditioning_image": f"control/{name}.png"}
            for name in ("owl", "cat", "dog")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pictures.read_folder(folder, controls=True) == by_text


def test_one_caption_for_those_that_have_none(folder):
    (folder / "dog.txt").unlink()
    assert [e.caption for e in pictures.read_folder(folder, "a pet")] == ["a cat", "a pet", "a owl"]
    assert [e.caption for e in pictures.read_folder(folder, needs_captions=False)] == ["a cat", "", "a owl"]


def spoil(action):
    return {
        "no folder": lambda folder: folder.rename(folder.with_name("other")),
        "no pictures": lambda folder: [path.unlink() for path in folder.glob("*.png")],
        "unreadable": lambda folder: (folder / "dog.png").write_bytes(b"\x89PNG\r\n\x1a\nno"),
        "empty caption": lambda folder: (folder / "dog.txt").write_text(" \n"),
        "no caption": lambda folder: (folder / "dog.txt").unlink(),
        "no text": lambda folder: (folder / "dog.txt").write_bytes(b"\xff\xfe\xfa"),
        "no control": lambda folder: (folder / "control" / "dog.png").unlink(),
        "other control": lambda folder: oracle.picture((64, 72)).save(folder / "control" / "dog.png"),
        "metadata": lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": 3}'),
        "metadata names nothing": lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "x.png"}'),
        "metadata, empty caption": lambda folder: (folder / "metadata.jsonl").write_text(
            '{"file_name": "cat.png", "text": ""}'),
    }[action]


@pytest.mark.parametrize("action, words", [
    ("no folder", "no such folder"), ("no pictures", "has no pictures"), ("unreadable", "dog.png: not a picture"),
    ("empty caption", "dog.png: its caption is empty"), ("no caption", "dog.png: has no caption"),
    ("no text", "dog.txt: is no text in UTF-8"), ("no control", "dog.png: has no control picture"),
    ("other control", "must have the same proportions"), ("metadata", "line 1"),
    ("metadata names nothing", "x.png: has no caption|no such image"),
    ("metadata, empty caption", "cat.png: its caption is empty")])
def test_bad_folders_are_refused_in_one_line_before_anything_is_loaded(teach, folder, monkeypatch, runs, action, words):
    monkeypatch.setattr(teaching, "Lesson", None)
    spoil(action)(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        teach(controlnet)
    assert "\n" not in str(error.value) and not runs.exists()


@pytest.mark.parametrize("command, options, words", [
    (lora, ["--resolution", "60"], "--resolution is 60; give a multiple of 8"),
    (lora, ["--resolution", "-8"], "--resolution is -8"),
    (lora, ["--steps", "0"], "--steps is 0"),
    (lora, ["--rank", "0"], "--rank is 0"),
    (lora, ["--alpha", "-1"], "--alpha is -1.0"),
    (lora, ["--learning-rate", "nan"], "--learning-rate is nan"),
    (lora, ["--conv-rank", "-1"], "--conv-rank is -1"),
    (lora, ["--conv-rank", "4", "--networks", "text"], "--conv-rank is 4"),
    (lora, ["--caption", " "], "caption for all pictures is empty"),
    (lora, ["--caption", "a pet"], "every picture has a caption"),
    (lora, ["--name", "a/b"], "the name is 'a/b'"),
    (lora, ["--sample-prompt", ""], "--sample-prompt is empty"),
    (lora, ["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (lora, ["--device", "tpu"], "device is 'tpu'"),
    (controlnet, ["--empty-prompts", "1.5"], "--empty-prompts is 1.5"),
    (controlnet, ["--copy-from", "nowhere.ckpt"], "nowhere.ckpt: no such file"),
    (textual_inversion, ["--token", "two words"], "--token is 'two words'"),
    (textual_inversion, ["--vectors", "0"], "--vectors is 0"),
])
def test_bad_options_are_refused_before_anything_is_loaded(teach, runs, monkeypatch, command, options, words):
    monkeypatch.setattr(teaching, "Lesson", None)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        teach(command, *options)
    assert "\n" not in str(error.value) and not runs.exists()


@pytest.mark.parametrize("command", [lora, textual_inversion, controlnet])
def test_a_result_that_exists_is_refused_and_kept(teach, tmp_path, monkeypatch, command):
    monkeypatch.setattr(teaching, "Lesson", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already; give another name"):
        teach(command)
    assert (tmp_path / "out" / "mine.safetensors").read_bytes() == b"precious"


def test_the_command_ends_in_one_line(folder):
    command = [sys.executable, "-m", "training.lora", str(folder), "--name", "x", "--resolution", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: --resolution is 100; give a multiple of 8, such as 512\n"


def test_models_that_take_more_than_latents_are_refused(monkeypatch):
    unet = SimpleNamespace(config=DiffusionConfig(in_channels=9))
    monkeypatch.setattr(model_loader, "preload_models_from_standard_weights", lambda *_: {"diffusion": unet})
    with pytest.raises(ValueError, match="an inpainting model, which is not taught here"):
        teaching.load_frozen("inpainting.ckpt")


# ---- runs


@pytest.mark.parametrize("command", [lora, textual_inversion, controlnet])
def test_a_run_that_ctrl_c_stopped_ends_as_one_that_was_not(teach, folder, runs, monkeypatch, command):
    if command is textual_inversion:  # or the captions would have to have each name in them
        [path.unlink() for path in folder.glob("*.txt")]
    whole = load_file(teach(command, name="whole"))
    plain_loss, calls = loop.NoiseLoss.__call__, []

    def interrupted_loss(self, *inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain_loss(self, *inputs)

    monkeypatch.setattr(loop.NoiseLoss, "__call__", interrupted_loss)
    with pytest.raises(KeyboardInterrupt):
        teach(command, name="stopped")
    kind, = (path.name.removesuffix("-stopped") for path in runs.glob("*-stopped"))
    run = runs / f"{kind}-stopped"
    assert torch.load(run / f"{kind}.pt")["step"] == 3
    with pytest.raises(ValueError, match=r"was begun with batch 2, and now batch is 3"):
        teach(command, "--batch", "3", name="stopped")
    torch.manual_seed(123)
    resumed = load_file(teach(command, name="stopped"))
    assert len(calls) == 5  # one of them was stopped
    assert all(torch.equal(weight, resumed["stopped" if name == "whole" else name]) for name, weight in whole.items())
    assert [row["step"] for row in csv.DictReader(open(run / f"{kind}.csv"))] == ["0", "1", "2", "3"]
    assert (run / f"{kind}-000004.png").exists()


def test_ctrl_c_waits_until_weights_are_whole():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with loop.undivided():
            loop.signal.raise_signal(loop.signal.SIGINT)
            done.append(True)
    assert done


def test_batches_that_add_up_are_a_larger_batch():
    """Two batches of two have the gradient of the mean of their losses."""
    weight = torch.nn.Parameter(torch.ones(3))

    def loss(step, batch, generator):
        return (weight * torch.randn(batch, 3, generator=generator)).square().mean()

    settings = loop.Settings(steps=1, batch=2, learning_rate=1, accumulate=2)
    with torch.enable_grad():
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        total = loop.add_gradients(SimpleNamespace(loss=loss), 0, 5, settings, scaler)
        added, weight.grad = weight.grad, None
        x = torch.cat([torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (10, 11)])
        expected = (weight * x).square().mean()
        expected.backward()
    torch.testing.assert_close(added, weight.grad)
    assert total == pytest.approx(expected.item())


def test_a_loss_that_is_none_stops_the_run_before_it_spoils_the_weights(teach, monkeypatch, runs):
    plain_loss = loop.NoiseLoss.__call__
    monkeypatch.setattr(loop.NoiseLoss, "__call__", lambda *inputs: plain_loss(*inputs) * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan in step 0; give a lower learning rate"):
        teach(lora)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_about_the_same(teach, dtype):
    plain, half = (load_file(teach(lora, *options, "--learning-rate", "0.01", name=name))
                   for name, options in [("plain", []), ("half", ["--dtype", dtype])])
    ups = [name for name in plain if name.endswith("up.weight")]
    a, b = (torch.cat([weights[name].float().flatten() for name in ups]) for weights in (plain, half))
    assert torch.cosine_similarity(a, b, dim=0) > 0.9


@pytest.mark.parametrize("command", [lora, controlnet])
def test_gradient_checkpointing_changes_nothing(teach, command):
    plain, recomputed = (load_file(teach(command, *options, name=name)) for name, options in
                         [("plain", []), ("recomputed", ["--gradient-checkpointing"])])
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_latents_and_contexts_are_computed_once(teach, monkeypatch):
    calls = {"encoder": 0, "clip": 0}
    load = teaching.load_frozen

    def counted(path):
        models = load(path)
        for name in calls:
            models[name].register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        return models

    monkeypatch.setattr(teaching, "load_frozen", counted)
    teach(lora)
    assert calls == {"encoder": 3, "clip": 1}


# ---- the loss


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("snr_gamma, snr_floor", [(None, 0.0), (5, 0.0), (5, 0.1)])
def test_the_loss_is_that_of_diffusers_training_scripts(prediction, snr_gamma, snr_floor):
    """The floor is ours: errors of the clean latents weigh as if the signal were never weaker."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(5, 4, 8, 8, generator=generator)
    config = DiffusionConfig(channels=(32,), prediction=prediction)
    seen = []

    def unet(noisy, context, time_embedding):
        seen.append((noisy, time_embedding))
        return 0.9 * noisy

    loss = loop.NoiseLoss(config, snr_gamma, snr_floor)(unet, latents, None, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.randint(0, 1000, (5,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    errors = (0.9 * noisy - target).square().mean(dim=(1, 2, 3))
    weights = torch.ones(5)
    if snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, snr_gamma * torch.ones(5)], dim=1).min(dim=1)[0].clamp(min=snr_floor)
        weights = weights / snr if prediction == "epsilon" else weights / (snr + 1)
        weights = weights / weights.mean()
    torch.testing.assert_close(loss, (errors * weights).mean())
    torch.testing.assert_close(seen[0][0], noisy)
    torch.testing.assert_close(seen[0][1], get_time_embedding(timesteps, 32))
