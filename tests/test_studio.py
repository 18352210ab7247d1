"""The engine behind the web page: the library's pictures, one at a time, within limits, by name alone."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from web_server import box_mask, fill_data, gate, png, tiny_studio, until

import extensions.studio as studio_module
from extensions.controlnet import Controlled, load_controlnet
from extensions.emphasis import encode_weighted
from extensions.inpaint import inpaint, outpaint
from extensions.lora import lora
from extensions.studio import Busy, Limits, Request, Studio, open_upload
from extensions.textual_inversion import find_embeddings
from images import fit, read_parameters
from model_loader import ROOT
from oracle import picture
from pipeline import generate
from samplers import EulerSampler

QUICK = {"sampler": "ddim", "steps": 2, "seed": 5}
IMAGE = picture((64, 64))


def draw(studio, prompt="a cat", **settings):
    job = studio.submit(Request(prompt, **QUICK | settings))
    assert job.wait(30)
    job.raise_error()
    return job


def pixels(job):
    return np.asarray(job.pictures[0].image)


# ---- the same pictures as the library's


@pytest.mark.parametrize("ours, theirs", [
    ({}, {}), ({"cfg_scale": 3.0, "width": 72, "height": 40}, {"cfg_scale": 3.0, "width": 72, "height": 40}),
    ({"sampler": "euler", "schedule": "karras"}, {"sampler": EulerSampler(use_karras_sigmas=True)}),
    ({"input_image": IMAGE, "strength": 0.5}, {"input_image": IMAGE, "strength": 0.5}),
    ({"sampler": "heun", "steps": 3}, {"sampler_name": "heun", "n_inference_steps": 3}),
])
def test_pictures_are_those_of_generate(studio, networks, tokenizer, ours, theirs):
    job = draw(studio, **ours)
    plain = {"sampler_name": "ddim", "n_inference_steps": 2, "seed": 5, "models": networks, "tokenizer": tokenizer}
    assert np.array_equal(pixels(job), generate("a cat", **plain | theirs))
    assert job.step == job.n_steps


def test_prompts_have_the_web_uis_grammar(studio, networks, tokenizer, data):
    prompt = "a (red:1.3) frog [cat:dog:0.5]"
    embeddings = find_embeddings(data / "embeddings")
    context = encode_weighted(prompt, "bad", networks["clip"], tokenizer, embeddings, 2)
    expected = generate(context=context, sampler_name="ddim", n_inference_steps=2, seed=5, models=networks)
    assert np.array_equal(pixels(draw(studio, prompt, negative_prompt="bad", clip_skip=2)), expected)


@pytest.mark.parametrize("settings", [{}, {"only_masked": True, "padding": 4}, {"fill": "fill", "strength": 0.6},
                                      {"blur": 3}])
def test_inpainting(studio, networks, settings):
    mask = box_mask()
    expected = inpaint("a cat", IMAGE, mask, sampler_name="ddim", n_inference_steps=2, seed=5, models=networks,
                       **settings)
    assert np.array_equal(pixels(draw(studio, input_image=IMAGE, mask=mask, **settings)), expected)


def test_outpainting(studio, networks):
    expected = outpaint("a cat", IMAGE, left=16, bottom=8, sampler_name="ddim", n_inference_steps=2, seed=5,
                        models=networks)
    assert np.array_equal(pixels(draw(studio, input_image=IMAGE, outpaint=(16, 0, 0, 8))), expected)


def test_controlnets(studio, networks, data):
    image = picture((80, 64), seed=2)
    network = load_controlnet(data / "controlnets" / "edges.safetensors", "cpu", "float32", base=networks)
    controlled = Controlled(networks["diffusion"], [(network, fit(image, 64, 64), 0.7)], 0, 0.5)
    expected = generate("a cat", sampler_name="ddim", n_inference_steps=2, seed=5,
                        models=networks | {"diffusion": controlled})
    job = draw(studio, controls=[("edges", image, 0.7)], control_end=0.5)
    assert np.array_equal(pixels(job), expected)
    assert not np.array_equal(expected, pixels(draw(studio)))


@pytest.mark.parametrize("name", ["style", "my style", "style.safetensors"])
def test_loras_come_and_go_bit_for_bit(studio, networks, data, name):
    before = pixels(draw(studio))
    with lora(networks, data / "loras" / "below" / "style.safetensors", 0.5):
        expected = generate("a cat", sampler_name="ddim", n_inference_steps=2, seed=5, models=networks)
    assert np.array_equal(pixels(draw(studio, f"a cat<lora:{name}:0.5>")), expected)
    assert np.array_equal(pixels(draw(studio)), before)
    assert not np.array_equal(before, expected)


def test_each_picture_of_several_has_a_seed_of_its_own(studio):
    job = draw(studio, count=2)
    assert [one.seed for one in job.pictures] == [5, 6]
    assert np.array_equal(job.pictures[1].image, draw(studio, seed=6).pictures[0].image)


def test_a_file_carries_what_draws_it_again(studio):
    job = draw(studio, "a (cat:1.2), <lora:style:0.3>", negative_prompt="dog: a, b", sampler="euler",
               schedule="karras", cfg_scale=3.5, width=72, height=64, seed=None)
    told = read_parameters(io.BytesIO(job.pictures[0].png()))
    again = draw(studio, told["prompt"], negative_prompt=told["uncond_prompt"], sampler=told["sampler_name"],
                 schedule=told["schedule"].lower(), cfg_scale=told["cfg_scale"], width=told["width"],
                 height=told["height"], seed=told["seed"], steps=told["n_inference_steps"])
    assert np.array_equal(pixels(again), pixels(job))
    assert told["model"] == "tiny"


def test_pictures_are_kept_in_the_output_folder_alone(data, tmp_path):
    studio = tiny_studio(data, output=tmp_path / "kept")
    job = draw(studio, count=2)
    kept = [one.path for one in job.pictures]
    assert sorted((tmp_path / "kept").iterdir()) == sorted(kept) and len(kept) == 2
    assert kept[0].read_bytes() == job.pictures[0].png()
    studio.close()


# ---- what one sees meanwhile


def test_a_preview_resembles_the_picture():
    """The linear map of the model in the box, against its own decoder, on a drawing that the map was not fitted to."""
    studio = Studio(ROOT / "data" / "emoji.safetensors", "float32", device="cpu")
    job = draw(studio, "red apple emoji, noto style on a sky blue background", steps=3, sampler="ddim", cfg_scale=4.0)
    image = fit(job.pictures[0].image, 128, 128)
    encoder = studio.loaded[0]["encoder"]
    latents = encoder(torch.from_numpy(np.array(image) / 127.5 - 1).float().permute(2, 0, 1)[None],
                      torch.zeros(1, 4, 16, 16))
    preview = studio.to_preview(latents)
    small, exact = (np.asarray(fit(one, 16, 16)).reshape(-1).astype(float) for one in (preview, image))
    assert preview.size == (128, 128)
    assert np.corrcoef(small, exact)[0, 1] > 0.9
    studio.close()


def test_words_that_the_model_does_not_know_are_told(studio, monkeypatch):
    studio.load(studio.checkpoint, [], [])  # so that no other text encoder takes its place
    clip = studio.loaded[0]["clip"]
    monkeypatch.setattr(clip, "config", replace(clip.config, words=("a", "cat")))
    assert draw(studio, "a (cat:1.2)").notes == []
    told, = draw(studio, "a [(bulldozer:1.2):cat:1]").notes
    assert told == "the model in the box does not know: bulldozer; it draws 'a cat'"


def test_progress_and_preview(studio):
    with gate(studio) as (passes, at_gate):
        job = studio.submit(Request("a cat", **QUICK | {"steps": 4}))
        assert at_gate.wait(20) and job.preview() is None and job.seconds_left is None
        passes.release()
        until(lambda: job.step == 1)
        assert (job.state, job.n_steps, job.preview().size, studio.current) == ("drawing", 4, (64, 64), job)
        assert job.seconds_left > 0
    assert job.wait(20) and job.preview() is None and job.seconds_left == 0 and studio.current is None


def test_what_words_looked_at(studio):
    job = draw(studio, "a (red:1.3) bulldozer, frog", words=True)
    assert [word for word, _ in job.pictures[0].words] == ["a", "red", "bulldozer", "frog"]
    assert all(image.size == (64, 64) for _, image in job.pictures[0].words)
    job = draw(studio, "a [cat:dog:0.5]", words=True)
    assert job.pictures[0].words == [] and "changes from step to step" in job.notes[0]


# ---- ending early


@pytest.mark.parametrize("settings", [{}, {"input_image": IMAGE, "mask": box_mask()}, {"sampler": "heun"},
                                      {"cfg_scale": 1.0}, {"input_image": IMAGE, "outpaint": (8, 0, 0, 0)}])
def test_cancelling_leaves_what_there_is(studio, settings):
    with gate(studio) as (passes, at_gate):
        job = studio.submit(Request("a cat", **QUICK | {"steps": 10, "count": 2} | settings))
        passes.release(3)
        until(lambda: job.step == 3)
        job.cancel()
        passes.release()  # the step under way
        assert job.wait(20)
    job.raise_error()
    assert len(job.pictures) == 1 and "Stopped: after" in job.pictures[0].parameters and job.step <= 4


def test_cancelling_without_keeping_leaves_nothing(studio):
    with gate(studio) as (passes, at_gate):
        job = studio.submit(Request("a cat", **QUICK | {"steps": 10}))
        assert at_gate.wait(20)
        job.cancel(keep=False)
        passes.release()
        assert job.wait(20)
    assert job.pictures == [] and job.error is None and job.step == 0


def test_so_many_wait_and_no_more(data):
    studio = tiny_studio(data, limits=Limits(waiting=2))
    with gate(studio) as (passes, at_gate):
        first = studio.submit(Request("a cat", **QUICK))
        assert at_gate.wait(20)
        waiting = [studio.submit(Request("a cat", **QUICK)) for _ in range(2)]
        assert [job.ahead for job in (first, *waiting)] == [0, 1, 2]
        with pytest.raises(Busy, match="2 requests are waiting"):
            studio.submit(Request("a cat", **QUICK))
        waiting[0].cancel()
        assert waiting[0].wait(0) and waiting[1].ahead == 1
        studio.submit(Request("a cat", **QUICK)).cancel()
    assert waiting[1].wait(20) and waiting[1].pictures
    studio.close()


def test_closing_ends_everything(data):
    studio = tiny_studio(data)
    with gate(studio) as (passes, at_gate):
        jobs = [studio.submit(Request("a cat", **QUICK)) for _ in range(2)]
        assert at_gate.wait(20)
        studio.close()
        passes.release()
        assert all(job.wait(20) for job in jobs)
    studio.worker.join(20)
    assert not studio.worker.is_alive()
    with pytest.raises(Busy):
        studio.submit(Request("a cat", **QUICK))


# ---- what is refused


@pytest.mark.parametrize("settings, named", [
    ({"sampler": "foo"}, "foo"), ({"schedule": "beta"}, "beta"), ({"schedule": "karras"}, "ddim does not take"),
    ({"sampler": "euler", "eta": 0.5}, "eta"), ({"steps": 0}, "steps"), ({"steps": 10_000}, "steps"),
    ({"steps": 2.5}, "steps"), ({"count": 99}, "count"), ({"seed": -3}, "seed"), ({"width": 60}, "width"),
    ({"width": 8192, "height": 8192}, "8192x8192"), ({"cfg_scale": float("nan")}, "cfg_scale"),
    ({"clip_skip": 0}, "clip_skip"), ({"strength": 0.5}, "strength"), ({"mask": box_mask()}, "mask"),
    ({"input_image": IMAGE, "mask": box_mask((8, 8), (0, 0, 4, 4))}, "8x8"),
    ({"input_image": IMAGE, "mask": box_mask(), "blur": 1000}, "blur"),
    ({"input_image": IMAGE, "strength": 0.1}, "strength"), ({"input_image": IMAGE, "resize": "x"}, "resize"),
    ({"input_image": IMAGE, "outpaint": (1000, 0, 0, 0)}, "outpaint"),
    ({"input_image": "photo.png"}, "input_image"), ({"controls": [("x", IMAGE, 1.0)]}, "controlnet 'x'"),
    ({"controls": [("edges", IMAGE, "a")]}, "scale"), ({"checkpoint": "foo"}, "foo"),
    ({"prompt": "a" * 9999}, "prompt"), ({"prompt": "a AND b"}, "AND"), ({"prompt": "(a:1.2.3)"}, "1.2.3"),
    ({"prompt": "<lora:nothing:1>"}, "nothing"), ({"prompt": "<hypernet:a:1>"}, "hypernet"),
    ({"prompt": "\ud800"}, "prompt"), ({"prompt": "<lora:style:1e99>"}, "style"),
])
def test_what_cannot_be_done_is_named_at_once(studio, settings, named):
    with pytest.raises(ValueError, match=named) as raised:
        studio.submit(Request(**{"prompt": "a cat"} | QUICK | settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "{folder}/secret.safetensors", "loras/below/style", "..",
                                  "below/style", "", "\0", "C:\\secret"])
def test_files_go_by_name_alone(studio, data, name):
    (data.parent / "secret.safetensors").write_bytes((data / "loras/below/style.safetensors").read_bytes())
    for kind in ("checkpoints", "loras", "controlnets"):
        with pytest.raises(ValueError, match="there is no"):
            studio.find(kind, name.format(folder=data.parent))


def test_links_of_the_owner_are_followed(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.safetensors").write_bytes((data / "loras/below/style.safetensors").read_bytes())
    folder = fill_data(tmp_path / "data")
    (folder / "loras" / "more").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "model.safetensors").symlink_to(data / "tiny.safetensors")
    studio = tiny_studio(folder)
    assert set(studio.loras()) == {"style", "linked"}
    assert set(studio.checkpoints()) == {"tiny.safetensors", "model.safetensors"}
    studio.close()


def test_a_broken_file_ends_its_own_request_alone(studio, data):
    save_file({"lora_unet_nowhere.lora_down.weight": torch.zeros(4, 4)}, data / "loras" / "broken.safetensors")
    job = studio.submit(Request("a cat <lora:broken:1>", **QUICK))
    assert job.wait(20) and isinstance(job.error, ValueError)
    assert "broken.safetensors" in str(job.error) and str(data) not in str(job.error)
    assert draw(studio).pictures


def test_numbers_that_overflow_are_drawn_in_float32(data, monkeypatch):
    monkeypatch.setattr(studio_module, "make_preview", lambda *_: None)  # slow in bfloat16 on most processors
    studio = Studio(data=data, dtype="bfloat16", device="cpu")
    dtypes = []

    def overflow(**options):
        dtypes.append(next(options["models"]["diffusion"].parameters()).dtype)
        if dtypes[-1] != torch.float32:
            raise FloatingPointError("the latents hold NaN")
        return generate(**options)

    monkeypatch.setattr(studio_module, "generate", overflow)
    job = draw(studio)
    assert dtypes == [torch.bfloat16, torch.float32] and "float32" in job.notes[0]
    assert "Dtype: float32" in job.pictures[0].parameters
    studio.close()


# ---- uploads


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(
        b"IEND", b"")


@pytest.mark.parametrize("file, named", [
    (b"", "not a picture"), (b"GIF89a", "picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture"),
    (png(IMAGE)[:300], "damaged"), (bomb(60_000, 60_000), "60000x60000|DecompressionBomb"),
    (bomb(8000, 8000), "8000x8000"), (b"\x89PNG" + bytes(2**24), "bytes"),
    (bomb(9, 9, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**25)))] * 3), "picture"),
])
def test_hostile_uploads_are_refused(file, named):
    with pytest.raises(ValueError, match=named) as raised:
        open_upload(file)
    assert len(str(raised.value)) < 200


def test_an_upload_is_opened_with_its_settings(studio):
    file = draw(studio).pictures[0].png()
    assert "Seed: 5" in open_upload(file).info["parameters"]
