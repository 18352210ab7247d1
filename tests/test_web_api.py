"""The HTTP APIs, by the clients that people have: webuiapi and openai unmodified, and the requests of others as they
send them."""

import base64
import io
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import requests
import webuiapi
from PIL import Image
from web_server import box_mask, gate, png, tiny_studio, until

from extensions.inpaint import inpaint
from extensions.lora import lora
from extensions.studio import Limits
from oracle import picture
from pipeline import generate
from samplers import SAMPLERS, DPMpp2MSampler

IMAGE = picture((64, 64))
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def studio(data):
    studio = tiny_studio(data, limits=Limits(waiting=1, upload=2**20))
    yield studio
    studio.close()


@pytest.fixture
def client(url):
    where = urlsplit(url)
    return webuiapi.WebUIApi(host=where.hostname, port=where.port, sampler="Euler", steps=2)


@pytest.fixture(scope="module")
def expected(networks, tokenizer):
    def expected(prompt="a cat", **settings):
        plain = {"sampler_name": "euler", "n_inference_steps": 2, "seed": 5, "models": networks, "cfg_scale": 7.0,
                 "tokenizer": tokenizer, "progress": False}
        return generate(prompt, **plain | settings)
    return expected


def b64(image):
    return base64.b64encode(png(image)).decode()


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def post(url, path, **body):
    return requests.post(f"{url}{path}", json=body, timeout=30)


# ---- webuiapi


def test_webuiapi_draws_from_text(client, expected):
    result = client.txt2img(prompt="a cat", cfg_scale=7, **SMALL)
    assert np.array_equal(result.image, expected())
    assert "Seed: 5, Size: 64x64" in result.image.info["parameters"] == result.info["infotexts"][0]
    assert result.info["all_seeds"] == [5] and result.info["sampler_name"] == "Euler"
    assert result.parameters["steps"] == 2 and result.parameters["cfg_scale"] == 7


def test_webuiapi_draws_several(client, expected):
    result = client.txt2img(prompt="a cat", batch_size=2, n_iter=1, **SMALL)
    assert result.info["all_seeds"] == [5, 6] and np.array_equal(result.images[1], expected(seed=6))


def test_webuiapi_draws_from_a_picture(client, expected):
    result = client.img2img(images=[IMAGE], prompt="a cat", denoising_strength=0.5, cfg_scale=7, **SMALL)
    assert np.array_equal(result.image, expected(input_image=IMAGE, strength=0.5))
    assert result.parameters["init_images"] is None


def test_webuiapi_inpaints(client, networks):
    result = client.img2img(images=[IMAGE], mask_image=box_mask(), prompt="a cat", denoising_strength=1.0, mask_blur=2,
                            inpainting_fill=1, inpaint_full_res=False, cfg_scale=7, **SMALL)
    theirs = inpaint("a cat", IMAGE, box_mask(), blur=2, sampler_name="euler", n_inference_steps=2, seed=5,
                     cfg_scale=7.0, models=networks, progress=False)
    assert np.array_equal(result.image, theirs)


def test_webuiapi_uses_loras_and_controlnets(client, networks, expected, data):
    with lora(networks, data / "loras" / "below" / "style.safetensors", 0.5):
        changed = expected()
    result = client.txt2img(prompt="a cat<lora:style:0.5>", cfg_scale=7, **SMALL)
    assert np.array_equal(result.image, changed) and client.get_loras()[0]["name"] == "style"
    unit = webuiapi.ControlNetUnit(image=IMAGE, model="edges [0123abcd]", weight=0.5)
    led = client.txt2img(prompt="a cat", cfg_scale=7, controlnet_units=[unit], **SMALL)
    assert "Control: \"edges" in led.info["infotexts"][0] and not np.array_equal(led.image, expected())


def test_webuiapi_sees_what_there_is(client):
    assert client.util_get_model_names() == ["tiny.safetensors"]
    assert client.util_get_current_model() == "tiny.safetensors"
    client.util_set_model("tiny")
    assert "Euler a" in client.util_get_sampler_names()
    assert client.get_embeddings()["loaded"]["frog"] == {"step": None, "sd_checkpoint": None, "shape": 32,
                                                         "sd_checkpoint_name": None, "vectors": 2}
    assert client.get_progress()["progress"] == 0 and client.get_schedulers()[2]["label"] == "Karras"
    image = client.txt2img(prompt="a cat, (blue:1.2)", **SMALL).image
    found = client.png_info(image).info
    assert found == image.info["parameters"]


# ---- other clients, as they send it


def test_open_webui(url):
    """It reads options and models, switches by sending all options back, and draws; its Basic header may be empty."""
    headers = {"Authorization": "Basic Og=="}
    options = requests.get(f"{url}/sdapi/v1/options", headers=headers, timeout=30).json()
    models = requests.get(f"{url}/sdapi/v1/sd-models", headers=headers, timeout=30).json()
    options["sd_model_checkpoint"] = models[0]["title"]
    assert requests.post(f"{url}/sdapi/v1/options", json=options, headers=headers, timeout=30).json() is None
    body = {"prompt": "a cat", "batch_size": 1, "width": 64, "height": 64, "steps": 2, "negative_prompt": "dog"}
    answer = requests.post(f"{url}/sdapi/v1/txt2img", json=body, headers=headers, timeout=30).json()
    assert opened(answer["images"][0]).size == (64, 64) and json.loads(answer["info"])["steps"] == 2


def test_sillytavern(url, expected):
    names = "options", "samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae", "progress"
    get = {name: requests.get(f"{url}/sdapi/v1/{name}", timeout=30).json() for name in names}
    assert get["upscalers"][0]["name"] == "None" and get["progress"]["state"]["job_count"] == 0
    assert requests.post(f"{url}/sdapi/v1/options", timeout=30,
                         json={"sd_model_checkpoint": get["sd-models"][0]["title"]}).status_code == 200
    body = {"url": "http://127.0.0.1:7860", "auth": "", "prompt": "a cat", "negative_prompt": "",
            "sampler_name": "Euler", "scheduler": "Uniform",
            "steps": 2, "scale": 7, "cfg_scale": 7, "width": 64, "height": 64, "seed": 5,
            "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5,
            "hr_additional_steps": 0, "denoising_strength": 0.7, "clip_skip": 1, "save_images": True,
            "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
            "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False}
    answer = requests.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=30).json()
    assert np.array_equal(opened(answer["images"][0]), expected())


def test_koboldai_lite(url, expected):
    """Zeros in the samplers' fields, and floats for whole numbers; "Euler a" without its noise is Euler."""
    body = {"prompt": "a cat", "negative_prompt": "", "seed": 5, "steps": 2, "cfg_scale": 7, "width": 64, "height": 64,
            "sampler_name": "Euler a", "batch_size": 1, "n_iter": 1, "subseed_strength": 0, "do_not_save_samples": True,
            "do_not_save_grid": True, "enable_hr": False, "eta": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0,
            "s_noise": 1, "override_settings": {"sd_model_checkpoint": "tiny.safetensors", "eta_noise_seed_delta": 0,
                                  "CLIP_stop_at_last_layers": 1.0, "ddim_eta": 0}}
    assert np.array_equal(opened(post(url, "/sdapi/v1/txt2img", **body).json()["images"][0]), expected())
    body |= {"init_images": [f"data:image/png;base64,{b64(IMAGE)}"], "denoising_strength": 0.6, "steps": 4}
    theirs = expected(input_image=IMAGE, strength=0.6, n_inference_steps=4)
    assert np.array_equal(opened(post(url, "/sdapi/v1/img2img", **body).json()["images"][0]), theirs)
    assert requests.get(f"{url}/sdapi/v1/options", timeout=30).json()["samples_format"]


def test_openai(url, networks, tokenizer, studio):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny.safetensors"]
    answer = client.images.generate(model="gpt-image-1", prompt="a cat", n=2, size="auto")
    images = [opened(one.b64_json) for one in answer.data]
    assert [image.size for image in images] == [(64, 64)] * 2
    seed = int(images[0].info["parameters"].split("Seed: ")[1].split(",")[0])
    theirs = generate("a cat", models=networks, tokenizer=tokenizer, sampler=DPMpp2MSampler(), seed=seed,
                      n_inference_steps=25, progress=False)
    assert np.array_equal(images[0], theirs)
    assert opened(client.images.generate(model="x", prompt="a", size="72x64").data[0].b64_json).size == (72, 64)
    for settings in ({"size": "70x64"}, {"size": "huge"}, {"n": 1000}, {"response_format": "url"},
                     {"background": "transparent"}, {"output_format": "webp"}):
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(**{"model": "x", "prompt": "a cat"} | settings)
        field = {"size": "size|width", "n": "count"}.get(*settings, *settings)
        assert any(word in raised.value.body["message"] for word in field.split("|"))
    assert post(url, "/v1/images/generations").json()["error"]["message"].startswith("prompt")


# ---- fields


def test_defaults_are_those_of_the_web_ui_but_for_sizes(url):
    answer = post(url, "/sdapi/v1/txt2img", steps=1, prompt=None, seed=None, unknown={"a": 1}).json()
    image, info = opened(answer["images"][0]), json.loads(answer["info"])
    assert image.size == (64, 64) and info["sampler_name"] == "Euler" and 0 <= info["seed"] < 2**32
    assert "data:" not in answer["images"][0] and "unknown" not in answer["parameters"]
    assert post(url, "/sdapi/v1/txt2img", send_images=False, steps=1).json()["images"] == []


@pytest.mark.parametrize("body, drawn", [
    ({"sampler_name": "DPM++ 2M Karras"}, DPMpp2MSampler(use_karras_sigmas=True)),
    ({"sampler_name": "DPM++ 2M", "scheduler": "automatic"}, DPMpp2MSampler(use_karras_sigmas=True)),
    ({"sampler_name": "dpm++ 2m", "scheduler": "uniform"}, DPMpp2MSampler()),
    ({"sampler_name": "", "sampler_index": "DDIM", "eta": 1.0}, SAMPLERS["ddim"](eta=1.0)),
    ({"sampler_name": "k_euler_a", "eta": 1}, SAMPLERS["euler_a"]()),
])
def test_samplers_and_schedules(url, expected, body, drawn):
    answer = post(url, "/sdapi/v1/txt2img", prompt="a cat", cfg_scale=7, **SMALL | {"steps": 3} | body)
    assert np.array_equal(opened(answer.json()["images"][0]), expected(sampler=drawn, n_inference_steps=3))


@pytest.mark.parametrize("field, value", [
    ("sampler_name", "UniPC"), ("scheduler", "beta"), ("enable_hr", True), ("restore_faces", True), ("tiling", True),
    ("styles", ["a"]), ("subseed_strength", 0.5), ("script_name", "x/y/z plot"), ("refiner_checkpoint", "x"),
    ("s_churn", 1), ("steps", 100_000), ("steps", "many"), ("n_iter", 1000), ("width", 4), ("width", 10**9),
    ("cfg_scale", "NaN"), ("seed", -2), ("seed", 2**70), ("prompt", 5), ("prompt", "<lora:nothing:1>"),
    ("prompt", "<lora:../loras/style:1>"), ("alwayson_scripts", {"ADetailer": {"args": []}}),
    ("alwayson_scripts", {"ControlNet": {"args": [{"model": "nothing", "image": "x"}]}}),
    ("alwayson_scripts", {"ControlNet": {"args": [3]}}), ("alwayson_scripts", {"ControlNet": 5}),
    ("alwayson_scripts", [5]), ("override_settings", {"sd_model_checkpoint": "nothing"}),
    ("override_settings", {"sd_model_checkpoint": "/etc/passwd"}), ("override_settings", {"sd_vae": "x.safetensors"}),
    ("override_settings", {"CLIP_stop_at_last_layers": 99}), ("override_settings", {"CLIP_stop_at_last_layers": [2]}),
    ("disable_extra_networks", True), ("eta", 0.5), ("s_noise", 0.5),
])
def test_what_cannot_be_honoured_is_named(url, field, value):
    answer = post(url, "/sdapi/v1/txt2img", **SMALL | {"sampler_name": "Euler a"} | {field: value})
    assert answer.status_code == 422
    told = answer.json()["detail"]
    named = {"sampler_name": "sampler", "n_iter": "count", "override_settings": next(iter(value), "") if isinstance(
        value, dict) else "", "alwayson_scripts": "alwayson|ControlNet"}.get(field, field)
    if field == "prompt" and isinstance(value, str):
        named = "lora"
    if named == "sd_model_checkpoint":
        named = value[named]
    assert any(word in told for word in named.split("|")), told
    assert "Traceback" not in answer.text and "\n" not in told


@pytest.mark.parametrize("body, status, named", [
    ({}, 404, "init_images"), ({"init_images": []}, 404, "init_images"), ({"init_images": ["!"]}, 422, "init_images"),
    ({"init_images": ["http://127.0.0.1/a.png"]}, 422, "init_images"), ({"init_images": ["/etc/passwd"]}, 422, "init_"),
    ({"init_images": [b64(IMAGE)] * 2}, 422, "init_images"),
    ({"init_images": [b64(IMAGE)], "resize_mode": 3}, 422, "resize_mode"),
    ({"init_images": [b64(IMAGE)], "denoising_strength": 0}, 422, "strength"),
    ({"init_images": [b64(IMAGE)], "mask": b64(box_mask((8, 8)))}, 422, "mask"),
    ({"init_images": [b64(IMAGE)], "mask": b64(box_mask()), "inpainting_fill": 9}, 422, "inpainting_fill"),
    ({"init_images": [b64(IMAGE)], "mask": b64(box_mask()), "mask_blur": 999}, 422, "blur"),
    ({"init_images": [b64(IMAGE)], "initial_noise_multiplier": 0.5}, 422, "initial_noise_multiplier"),
    ({"init_images": ["A" * 2**21]}, 422, "too large"),
])
def test_pictures_that_cannot_be_used(url, body, status, named):
    answer = post(url, "/sdapi/v1/img2img", **SMALL | body)
    assert answer.status_code == status and named in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"[" * 100_000, b'{"steps": NaN}', b"\xff\xfe", b'"\\ud800"',
                                  b'{"prompt": "\\ud800"}', b'{"seed": 1e400}'])
def test_bad_bodies(url, body):
    for path in ("/sdapi/v1/txt2img", "/sdapi/v1/options", "/v1/images/generations"):
        answer = requests.post(f"{url}{path}", data=body, headers={"Content-Type": "application/json"}, timeout=30)
        if path.endswith("options") and answer.status_code == 200:  # fields that it does not know
            assert answer.json() is None
            continue
        assert 400 <= answer.status_code < 500 and "Traceback" not in answer.text
        assert ("message" in answer.json()["error"]) if path.startswith("/v1") else answer.json()["detail"]


def test_a_mask_may_be_inverted_and_of_the_answers_size(url):
    body = SMALL | {"init_images": [b64(picture((96, 64)))], "mask": b64(box_mask((96, 64), (0, 0, 48, 64))),
                    "inpaint_full_res": False, "resize_mode": 0, "mask_blur": 0, "denoising_strength": 0.9}
    there = np.asarray(picture((96, 64)).resize((64, 64), Image.Resampling.LANCZOS))
    for invert, kept in ((0, np.s_[:, 36:]), (1, np.s_[:, :28])):
        image = opened(post(url, "/sdapi/v1/img2img", **body, inpainting_mask_invert=invert).json()["images"][0])
        assert image.size == (64, 64) and np.array_equal(np.asarray(image)[kept], there[kept])


def test_png_info_of_a_picture_without_settings(url):
    assert post(url, "/sdapi/v1/png-info", image=b64(IMAGE)).json() == {"info": "", "items": {}, "parameters": {}}
    assert post(url, "/sdapi/v1/png-info", image="AAAA").status_code == 422


def test_unknown_paths_are_json(url):
    assert requests.get(f"{url}/sdapi/v1/nothing", timeout=30).json()["detail"]
    assert requests.get(f"{url}/v1/nothing", timeout=30).json()["error"]["message"]
    assert requests.get(f"{url}/sdapi/v1/txt2img", timeout=30).status_code in (404, 405)


# ---- while it draws


def in_thread(function, *arguments, **settings):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **settings)), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return results[0]

    return result


def test_progress_then_interrupt_answers_with_what_there_is(url, studio):
    with gate(studio) as (passes, at_gate):
        result = in_thread(post, url, "/sdapi/v1/txt2img", **SMALL | {"steps": 20})
        assert at_gate.wait(20)
        passes.release(3)
        until(lambda: studio.current.step == 3)
        progress = requests.get(f"{url}/sdapi/v1/progress", timeout=30).json()
        assert progress["progress"] == 3 / 20 and progress["state"]["sampling_step"] == 3
        assert opened(progress["current_image"]).size == (64, 64)
        skipped = requests.get(f"{url}/sdapi/v1/progress?skip_current_image=true", timeout=30).json()
        assert skipped["current_image"] is None
        assert requests.post(f"{url}/sdapi/v1/interrupt", timeout=30).json() == {}
        passes.release()
        answer = result()
    assert answer.status_code == 200 and opened(answer.json()["images"][0]).size == (64, 64)


def test_beyond_the_queue_is_429(url, studio):
    with gate(studio) as (passes, at_gate):
        first = in_thread(post, url, "/sdapi/v1/txt2img", **SMALL)
        assert at_gate.wait(20)
        second = in_thread(post, url, "/sdapi/v1/txt2img", **SMALL)
        until(lambda: studio.waiting)
        assert post(url, "/sdapi/v1/txt2img", **SMALL).status_code == 429
        third = post(url, "/v1/images/generations", prompt="a cat")
        assert third.status_code == 429 and "waiting" in third.json()["error"]["message"]
        passes.release(100)
        assert (first().status_code, second().status_code) == (200, 200)


def test_a_client_that_leaves_is_not_drawn_for(url, studio):
    where = urlsplit(url)
    body = json.dumps(SMALL | {"steps": 100}).encode()
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with gate(studio) as (passes, at_gate):
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert at_gate.wait(20)
            job = studio.current
        until(lambda: job.is_cancelled)
        passes.release()
        until(lambda: studio.current is None)
    assert job.pictures == [] and job.step <= 1


def test_each_of_many_gets_its_own(url, studio, expected):
    """Eight clients at a time, who come again when the queue is full."""
    pictures = {seed: expected(seed=seed) for seed in range(8)}

    def ask(seed):
        while (answer := post(url, "/sdapi/v1/txt2img", prompt="a cat", cfg_scale=7, **SMALL | {"seed": seed})
               ).status_code == 429:
            time.sleep(0.05)
        return answer.json()

    results = {seed: in_thread(ask, seed) for seed in pictures}
    for seed, result in results.items():
        assert np.array_equal(opened(result()["images"][0]), pictures[seed])
