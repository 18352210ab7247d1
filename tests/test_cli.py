"""The command line: what it passes on, what it writes, what it refuses, and what must not cost a picture."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cli
import images
import pipeline
from decoder import DecoderConfig
from extensions.tiny_vae import TinyDecoder
from oracle import METADATA, picture, random_weights
from pipeline import generate
from samplers import SAMPLERS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path, capsys):
    """Runs the command line on the tiny checkpoint, in this process, and returns the pictures that it wrote, by name,
    and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
        plain = ["--checkpoint", checkpoint, "--device", "cpu", "--sampler", "ddim", "--steps", 2, "--seed", 5]
        monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, [*plain, *arguments])])
        cli.main()
        written = [path for path in sorted(tmp_path.glob("*.png")) if before.get(path) != path.stat().st_mtime_ns]
        return {path.name: Image.open(path) for path in written}, capsys.readouterr().out

    return call


@pytest.fixture
def passed_on(monkeypatch):
    """What the command line calls `generate` with."""
    calls = []

    def record(*arguments, **settings):
        calls.append(settings)
        return generate(*arguments, **settings)

    monkeypatch.setattr(pipeline, "generate", record)
    return calls


def in_process(*arguments, **settings):
    command = [sys.executable, ROOT / "cli.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


# ---- what is drawn


def test_pictures_are_those_of_generate(run, models, tokenizer):
    pictures, said = run("a red apple", "--cfg-scale", 3, "--uncond-prompt", "blurry", "--count", 2, "--dtype",
                         "float32")
    expected = generate(["a red apple"] * 2, "blurry", cfg_scale=3, models=models, tokenizer=tokenizer, seed=5,
                        sampler_name="ddim", n_inference_steps=2)
    assert list(pictures) == ["output-2.png", "output.png"]
    for image, name in zip(expected, ["output.png", "output-2.png"]):
        assert np.abs(np.asarray(pictures[name]).astype(int) - image).max() <= 1
    assert pictures["output-2.png"].text["parameters"] == (
        "a red apple\nNegative prompt: blurry\n"
        "Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 6, Size: 64x64, Model: tiny, Dtype: float32")
    for told in ["tiny.safetensors, plain weights, device cpu (float32), seed 5", "wrote output-2.png"]:
        assert told in said


def test_a_tiny_vae_decodes(run, models, tokenizer, tmp_path):
    decoder = TinyDecoder(DecoderConfig(channels=(8,) * 4, n_blocks=3, n_groups=1)).eval()
    save_file(decoder.layers.state_dict(), tmp_path / "taesd_decoder.safetensors")
    pictures, _ = run("a cat", "--tiny-vae", "taesd_decoder.safetensors", "--dtype", "float32", "--cfg-scale", 1)
    expected = generate("a cat", models=models | {"decoder": decoder}, tokenizer=tokenizer, seed=5, cfg_scale=1,
                        sampler_name="ddim", n_inference_steps=2)
    assert np.abs(np.asarray(pictures["output.png"]).astype(int) - expected).max() <= 1
    assert "Tiny VAE: taesd_decoder" in pictures["output.png"].text["parameters"]


def test_the_next_free_name_is_taken(run):
    assert list(run("a cat")[0]) == ["output.png"]
    before = Path("output.png").read_bytes()
    assert list(run("a cat")[0]) == ["output-2.png"]
    assert list(run("a cat", "--count", 2)[0]) == ["output-3.png", "output-4.png"]
    assert Path("output.png").read_bytes() == before
    assert list(run("a dog", "--overwrite")[0]) == ["output.png"] and Path("output.png").read_bytes() != before


def test_each_option_reaches_the_model(run, passed_on):
    run("a cat", "--cfg-scale", 4, "--guidance-interval", 0.5, 3, "--cache-interval", 3, "--tile-size", 64, "--dtype",
        "bfloat16", "--height", 72, "--width", 40)
    settings, = passed_on
    scale = settings["cfg_scale"]
    assert [scale(sigma) for sigma in (0.4, 0.5, 3.0, 3.1)] == [1, 4, 4, 1]
    assert settings["models"]["diffusion"].interval == 3
    assert settings["models"]["decoder"].tile_size == settings["models"]["encoder"].tile_size == 64
    assert next(settings["models"]["clip"].parameters()).dtype == torch.bfloat16
    assert (settings["height"], settings["width"], settings["seed"]) == (72, 40, 5)
    read = images.read_parameters("output.png")
    for name, value in {"guidance_interval": (0.5, 3.0), "cache_interval": 3, "tile_size": 64, "dtype": "bfloat16",
                        "height": 72, "width": 40}.items():
        assert read[name] == value, name


def test_the_schedule_and_the_default_guidance(run, passed_on):
    pictures, _ = run("a cat", "--sampler", "euler", "--schedule", "karras")
    assert passed_on[0]["sampler"].use_karras_sigmas and passed_on[0]["cfg_scale"] == 7.5
    assert "Sampler: Euler, Schedule type: Karras, CFG scale: 7.5" in pictures["output.png"].text["parameters"]
    with pytest.raises(SystemExit, match="--schedule is karras, which --sampler ddim does not take"):
        run("a cat", "--schedule", "karras")


def test_a_models_own_schedule_is_obeyed_with_karras_levels_too(run, passed_on, tmp_path):
    marks = {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}
    save_file({**random_weights(), **marks}, tmp_path / "zero.safetensors", METADATA)
    run("a cat", "--checkpoint", tmp_path / "zero.safetensors", "--sampler", "euler", "--schedule", "karras")
    sampler = passed_on[0]["sampler"]
    assert sampler.alphas_cumprod[-1] < 1e-6 and sampler.timestep_spacing == "trailing"


def test_prompts_have_the_web_uis_grammar_unless_they_are_plain(run):
    same = [np.asarray(run(prompt, "--overwrite", *more)[0]["output.png"]) for prompt, more in
            [("a cat", []), ("a (cat:1.0)", []), ("a cat", ["--plain-prompt"]), ("a (cat:1.4)", []),
             ("a (cat:1.4)", ["--plain-prompt"])]]
    assert np.abs(same[0].astype(int) - same[1]).max() <= 1 and np.abs(same[0].astype(int) - same[2]).max() <= 1
    assert (same[0] != same[3]).any() and (same[3] != same[4]).any()


def test_a_lora_by_option_and_by_tag(run, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": torch.randn(4, 64), f"{name}.lora_up.weight": torch.randn(64, 4)},
              tmp_path / "style.safetensors")
    plain, by_option, by_tag = (np.asarray(run(prompt, "--overwrite", *more)[0]["output.png"]) for prompt, more in [
        ("a cat", []), ("a cat", ["--lora", "style.safetensors:0.5"]),
        (f"a cat<lora:{tmp_path}/style.safetensors:0.5>", [])])
    assert (plain != by_option).any() and np.array_equal(by_option, by_tag)
    assert images.read_parameters("output.png")["loras"] == [f"{tmp_path}/style.safetensors:0.5"]


def test_an_embedding_by_option_and_by_name(run, tmp_path):
    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "x"}, tmp_path / "thing.pt")
    plain, learned, renamed = (np.asarray(run(prompt, "--overwrite", *more)[0]["output.png"]) for prompt, more in [
        ("a thing", []), ("a thing", ["--embedding", "thing.pt"]), ("a bauble", ["--embedding", "thing.pt:bauble"])])
    assert (plain != learned).any() and np.array_equal(learned, renamed)


def test_from_a_picture_with_a_mask_and_beyond_its_edges(run):
    picture((64, 48)).save("in.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("mask.png")
    image = run("a cat", "--input-image", "in.png", "--strength", 0.5, "--output", "b.png")[0]["b.png"]
    assert image.size == (72, 56)  # its proportions, 64² pixels
    assert "Denoising strength: 0.5" in image.text["parameters"]
    assert "Init image hash: " in image.text["parameters"]
    masked = np.asarray(run("a cat", "--input-image", "in.png", "--mask", "mask.png", "--output", "c.png")[0]["c.png"])
    before = np.asarray(Image.open("in.png"))
    assert np.array_equal(masked[:, :32], before[:, :32]) and (masked[:, 32:] != before[:, 32:]).any()
    wider = run("a cat", "--input-image", "in.png", "--outpaint", 16, 0, 0, 8, "--output", "d.png")[0]["d.png"]
    wider = np.asarray(wider)
    assert wider.shape == (56, 80, 3) and np.array_equal(wider[:48, 16:], before)
    stretched = run("a cat", "--input-image", "in.png", "--resize", "stretch", "--width", 64, "--height", 64,
                    "--strength", 0.5, "--output", "e.png")[0]["e.png"]
    assert stretched.size == (64, 64)


def test_like_draws_the_same_again_and_options_win(run):
    first = run("a (cat:1.2)", "--uncond-prompt", "blurry", "--cfg-scale", 3.5, "--seed", 8, "--height", 72)[0]
    first = first["output.png"]
    again = run("--like", "output.png", "--seed", 8, "--steps", 2, "--sampler", "ddim")[0]["output-2.png"]
    assert np.array_equal(first, again) and first.text == again.text
    other = run("--like", "output.png", "--cfg-scale", 5)[0]["output-3.png"]
    assert "CFG scale: 5.0, Seed: 5, Size: 64x72" in other.text["parameters"]


def test_like_names_what_it_cannot_follow(run, tmp_path):
    text = "a cat\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 5, Size: 64x64, Hires upscale: 2, Model: other, "
    text += "Token: 1"
    images.save_picture(np.zeros((8, 8, 3), np.uint8), tmp_path / "web.png", text)
    said = run("--like", "web.png", "--output", "x.png")[1]
    assert "not followed: Hires upscale, Token" in said and "drawn with the model other" in said


def test_averaged_weights_on_request(run, tmp_path):
    weights = random_weights()
    name = "model.diffusion_model.out.2.bias"
    ema = {"model_ema." + key.removeprefix("model.").replace(".", ""): weight.clone() for key, weight in weights.items()
           if key.startswith("model.diffusion_model.")}
    ema["model_ema.diffusion_modelout2bias"] = weights[name] + 1
    save_file({**weights, **ema}, tmp_path / "both.safetensors", METADATA)
    plain, said = run("a cat", "--checkpoint", tmp_path / "both.safetensors")
    averaged, said_ema = run("a cat", "--checkpoint", tmp_path / "both.safetensors", "--ema")
    assert "plain weights" in said and "averaged weights (EMA)" in said_ema
    assert not np.array_equal(plain["output.png"], averaged["output-2.png"])
    assert "EMA: True" in averaged["output-2.png"].text["parameters"]


def test_words_that_the_model_does_not_know(run, tmp_path):
    save_file(random_weights(), tmp_path / "words.safetensors", METADATA | {"words": "a cat red", "cfg_scale": "3.0"})
    said = run("a futuristic cat on Mars", "--checkpoint", tmp_path / "words.safetensors")[1]
    assert "the model in the box does not know: futuristic, on, mars; it draws 'a cat'" in said
    assert images.read_parameters("output.png")["cfg_scale"] == 3.0
    assert run("--words", "--checkpoint", tmp_path / "words.safetensors")[1] == "a cat red\n"

    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "x"}, tmp_path / "my-bird.pt")
    more = ["--checkpoint", tmp_path / "words.safetensors", "--embedding", "my-bird.pt"]
    said = run("a (red:1.3) [cat:robot:0.5], My-Bird", *more)[1]
    assert "does not know: robot; it draws 'a red cat'" in said  # not the grammar, nor an embedding's name


def test_a_lora_brings_the_words_of_its_captions(run, tmp_path):
    save_file(random_weights(), tmp_path / "words.safetensors", METADATA | {"words": "a cat"})
    name = "lora_unet_mid_block_attentions_0_proj_in"
    weights = {f"{name}.lora_down.weight": torch.randn(4, 64), f"{name}.lora_up.weight": torch.randn(64, 4)}
    for captions, unknown in [('{"ink": {"a cat, ink style": 3, "Robot": 1}}', "mars"), ("", "ink, style, robot, mars"),
                              ("[1]", "ink, style, robot, mars"), ("{", "ink, style, robot, mars")]:
        save_file(weights, tmp_path / "style.safetensors", {"ss_tag_frequency": captions})
        said = run(f"a cat, ink style, robot on Mars <lora:{tmp_path}/style.safetensors:1>", "--checkpoint",
                   tmp_path / "words.safetensors", "--overwrite")[1]
        assert f"does not know: {unknown.replace('mars', 'on, mars')}; it draws" in said, captions


def test_half_precision_that_fails_is_drawn_again_in_float32(run, monkeypatch):
    def fail_in_bfloat16(*arguments, **settings):
        if next(settings["models"]["clip"].parameters()).dtype == torch.bfloat16:
            raise FloatingPointError("NaN")
        return generate(*arguments, **settings)

    monkeypatch.setattr(pipeline, "generate", fail_in_bfloat16)
    pictures, said = run("a cat", "--dtype", "bfloat16")
    assert "once more, in float32" in said and "Dtype: float32" in pictures["output.png"].text["parameters"]


# ---- what must not cost a picture


@pytest.mark.parametrize("stream", ["closed", "cp1252"])
def test_what_only_tells_costs_no_picture(checkpoint, tmp_path, stream):
    command = [sys.executable, ROOT / "cli.py", "x", "--checkpoint", checkpoint, "--device", "cpu", "--steps", "1",
               "--count", "2", "--output", tmp_path / "яблоко.png"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if stream == "closed":
        process.stdout.close()  # as head does once it has its line
        process.stderr.close()
        process.wait()
    else:
        process.communicate()
    assert process.returncode == 0 and len(list(tmp_path.glob("*.png"))) == 2


def test_being_told_to_stop_leaves_no_temporary_file(checkpoint, tmp_path):
    command = [sys.executable, ROOT / "cli.py", "x", "--checkpoint", checkpoint, "--device", "cpu", "--steps", "1000",
               "--output", tmp_path / "x.png"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()  # it has loaded
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143 and not list(tmp_path.iterdir())


# ---- mistakes


def test_a_picture_is_never_overwritten(run, capsys):
    run("a cat", "--output", "a.png")
    before = Path("a.png").read_bytes()
    with pytest.raises(SystemExit, match="a.png: exists already.*--overwrite"):
        run("a dog", "--output", "a.png")
    assert Path("a.png").read_bytes() == before and len(list(Path().iterdir())) == 1


@pytest.mark.parametrize("arguments, message", [
    (["x", "--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
    (["x", "--output", "picture.jpg"], "ends in .png"),
    (["x", "--output", "nowhere/picture.png"], "no folder nowhere"),
    (["x", "--device", "abacus", "--checkpoint", __file__], "device is 'abacus'"),
    (["x", "--sampler", "magic"], "--sampler is 'magic'; known are ddpm"),
    (["x", "--cache-interval", 2, "--control", "a.pth", "b.png"], "a.pth: no such"),
    (["x", "--lora", "nothing"], "nothing: no LoRA of this name"),
    (["x", "--like", __file__], "not a picture"),
    (["x <hypernet:y:1>"], "expected <lora:NAME:SCALE>"),
])
def test_mistakes_get_one_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message) as caught:
        run(*arguments)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments, message", [
    ([], "no prompt"),
    (["x", "--count", "0"], "--count is 0; give a number from 1 on"),
    (["x", "--steps", "0"], "--steps is 0; give a number from 1 to 1000"),
    (["x", "--cfg-scale", "inf"], "--cfg-scale is inf"),
    (["x", "--strength", "0.5"], "--strength needs a picture"),
    (["x", "--strength", "0", "--input-image", "a.png"], r"--strength is 0.0; it must lie in \(0, 1\]"),
    (["x", "--mask", "a.png"], "--mask needs a picture"),
    (["x", "--height", "65"], "--height is 65; give a multiple of 8"),
    (["x", "--tile-size", "100"], "--tile-size is 100; give a multiple of 32"),
    (["x", "--cache-interval", "0"], "--cache-interval is 0"),
    (["x", "--guidance-interval", "5", "1"], "--guidance-interval is 5 1"),
    (["x", "--seed", str(2**63 - 1), "--count", "2"], "--seed is"),
    (["\udcff"], "cannot be decoded"),
    (["x", "--output", "a.jpg"], "ends in .png"),
    (["x", "--plain-prompt", "--clip-skip", "2"], "--plain-prompt takes prompts to the letter"),
])
def test_mistakes_that_show_at_once_are_told_before_anything_is_imported(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
    monkeypatch.setattr(cli, "draw", None)
    with pytest.raises(SystemExit, match=message) as caught:
        cli.main()
    assert "\n" not in str(caught.value)


def test_help_and_mistakes_import_nothing_heavy():
    for arguments in (["--help"], ["x", "--steps", "0"]):
        command = [sys.executable, "-X", "importtime", ROOT / "cli.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not any(name in done.stderr for name in ["torch", "transformers", "numpy", "PIL"])
        assert "--cfg-scale" in done.stdout or "error: --steps" in done.stderr


def test_help_names_every_sampler():
    help_text = in_process("--help").stdout.replace("\n", " ")
    assert all(name in help_text for name in SAMPLERS)
    assert len({sampler.label for sampler in SAMPLERS.values()}) == len(SAMPLERS)
