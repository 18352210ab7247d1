"""The web page in a real browser: chromium, driven by playwright."""

import io
import re
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from web_server import fill_data, gate, png, serving, tiny_studio, until

from extensions.emphasis import encode_weighted
from extensions.web import create_app
from images import read_parameters, write_png
from infotext import format_parameters
from oracle import picture
from pipeline import generate

IMAGE = picture((64, 64))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def touched():
    """What this process, with the server in it, opens, connects to and asks for the address of."""
    lines = []

    def hear(event, arguments):
        if event in ("open", "socket.connect", "socket.getaddrinfo"):
            lines.append(f"{event} {arguments[1] if event == 'socket.connect' else arguments[0]}")

    sys.addaudithook(hear)
    return lines


@pytest.fixture(scope="module")
def studio(tmp_path_factory, touched):
    studio = tiny_studio(fill_data(tmp_path_factory.mktemp("data")))
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def url(studio):
    with serving(create_app(studio)) as url:
        yield url


@pytest.fixture(scope="module")
def asked():
    """The URLs that the browser asked for."""
    return []


@pytest.fixture(scope="module")
def browser(asked):
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.fail("these tests need a browser; install chromium: sudo apt-get install chromium, or your system's way")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: asked.append(request.url))
        yield context
        browser.close()


@pytest.fixture(scope="module")
def page(browser, url):
    return open_page(browser, url)


@pytest.fixture
def tab(page):
    """The page, opened once for all tests, with the fields that they change as at first."""
    page.get_by_role("tab", name="Text").click()
    fill(page, negative="", seed="", guidance="", width="", height="", steps=2)
    return page


@pytest.fixture
def submitted(studio, monkeypatch):
    """The requests that reach the engine."""
    requests, submit = [], studio.submit
    monkeypatch.setattr(studio, "submit", lambda request: requests.append(replace(request)) or submit(request))
    return requests


def open_page(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.locator("#draw").wait_for()
    return page


def field(page, name):
    number = page.locator(f"#{name} input[type=number]")
    return number if number.count() else page.locator(f"#{name} textarea, #{name} input").first


def fill(page, **values):
    for name, value in values.items():
        field(page, name).fill(str(value))


def choose(page, name, option):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def draw(page, button="draw"):
    """Has a picture drawn, and waits for it."""
    n_pictures = page.locator("#gallery img").count()
    page.locator(f"#{button}").click()
    expect(page.locator("#gallery img")).to_have_count(n_pictures + 1)
    expect(page.locator("#draw")).to_be_visible()


def download(page):
    with page.expect_download() as waiting:
        page.locator("#download").click()
    return waiting.value.path(), waiting.value.suggested_filename


def status(page):
    return page.locator("#status .status")


def give(page, name, data, file="picture.png"):
    page.locator(f"#{name} input[type=file]").set_input_files({"name": file, "mimeType": "image/png", "buffer": data})


def open_part(page, title):
    page.get_by_role("button", name=title).click()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# ---- drawing


def test_a_picture_and_its_file(tab, studio, tokenizer):
    """Typed, drawn, seen, downloaded: the file holds its settings, and the pixels that generate() makes of them."""
    fill(tab, prompt="a (red:1.3) cat", negative="blurry", seed=5, guidance=3)
    draw(tab)
    expect(tab.locator("#stage img[alt='the picture']")).to_be_visible()
    assert tab.locator("#stage img").evaluate("image => image.naturalWidth") == 64
    path, name = download(tab)
    assert name == "a-red-1-3-cat-5.png"
    settings = read_parameters(path)
    assert settings.items() >= {"prompt": "a (red:1.3) cat", "uncond_prompt": "blurry", "seed": 5, "cfg_scale": 3.0,
                                "n_inference_steps": 2, "sampler_name": "dpmpp_2m", "width": 64}.items()
    assert tab.locator("#text textarea").input_value() == Image.open(path).info["parameters"]
    models = studio.loaded[0]
    context = encode_weighted(["a (red:1.3) cat"], ["blurry"], models["clip"], tokenizer)
    expected = generate(context=context, models=models, seed=5, cfg_scale=3.0, n_inference_steps=2, height=64,
                        width=64, sampler_name="dpmpp_2m", progress=False)
    assert np.abs(pixels(path) - expected).max() <= 1
    assert tab.locator("#words figcaption").all_inner_texts() == ["a", "red", "cat"]


def test_again_next_and_the_gallery(tab):
    fill(tab, prompt="a cat")
    draw(tab)
    text = tab.locator("#text textarea")
    seed = int(re.search(r"Seed: (\d+)", text.input_value())[1])
    draw(tab, "again")
    expect(text).to_have_value(re.compile(f"Seed: {seed},"))
    fill(tab, prompt="a dog")
    draw(tab, "next")
    expect(text).to_have_value(re.compile(f"a dog\nSteps.*Seed: {seed + 1},"))
    tab.locator("#gallery .grid-container button").nth(1).click()
    expect(text).to_have_value(re.compile(f"a cat\nSteps.*Seed: {seed},"))
    assert f"Seed: {seed}," in Image.open(download(tab)[0]).info["parameters"]


def test_preview_and_stop(tab, studio):
    """While the third of ten steps waits, there is a picture of two; once stopped, it comes as it is."""
    fill(tab, prompt="a slow cat", steps=10)
    with gate(studio) as (passes, _):
        tab.locator("#draw").click()
        passes.release(2)
        expect(status(tab)).to_have_text(re.compile(r"step 2 of 10, \d+ s left"))
        preview = tab.locator("#stage img[alt='the picture so far']")
        assert preview.evaluate("image => image.naturalWidth") == 64
        tab.locator("#stop").click()
        expect(status(tab)).to_have_text("stopping")
        passes.release(1)
        expect(status(tab)).to_have_text("stopped")
    expect(tab.locator("#text textarea")).to_have_value(re.compile("Stopped: after [23] of 10 steps"))
    assert tab.locator("#draw").is_visible()


def test_two_tabs_at_once(tab, browser, url, studio):
    """One picture at a time, and each tab has its own."""
    other = open_page(browser, url)
    fill(tab, prompt="a cat", seed=1)
    fill(other, prompt="a dog", seed=2, steps=2)
    with gate(studio) as (passes, at_gate):
        tab.locator("#draw").click()
        until(at_gate.is_set)
        other.locator("#draw").click()
        expect(status(other)).to_have_text("1 before this one")
        passes.release(100)
        for page in (tab, other):
            page.locator("#draw").wait_for()
    expect(tab.locator("#text textarea")).to_have_value(re.compile("a cat\n.*Seed: 1,"))
    expect(other.locator("#text textarea")).to_have_value(re.compile("a dog\n.*Seed: 2,"))
    expect(other.locator("#gallery img")).to_have_count(1)
    other.close()


def test_a_closed_tab_is_not_drawn_for(browser, url, studio):
    page = open_page(browser, url)
    fill(page, prompt="a cat", steps=100)
    with gate(studio) as (passes, at_gate):
        page.locator("#draw").click()
        until(at_gate.is_set)
        job = studio.current
        page.close()
        until(lambda: job.is_cancelled)
        passes.release(2)
        assert job.wait(20) and not job.pictures


def test_words_that_the_model_does_not_know(tab, studio):
    clip = studio.loaded[0]["clip"]
    known, clip.config = clip.config, replace(clip.config, words=("cat",))
    try:
        fill(tab, prompt="a <b>cat</b> on Mars")
        draw(tab)
    finally:
        clip.config = known
    expect(status(tab)).to_have_text(re.compile("the model in the box does not know: a, b, on, mars; it draws 'cat'"))


# ---- from pictures


def test_a_mask_is_painted(tab, submitted):
    """What is painted over is drawn anew, and nothing else changes."""
    tab.get_by_role("tab", name="Inpaint").click()
    fill(tab, prompt="a cat", mask_blur=0)
    canvas = tab.locator("#editor canvas").first
    expect(canvas).to_be_visible()

    def is_refused():  # until the editor is ready, it takes no file, and tells nobody
        give(tab, "editor", png(IMAGE))
        tab.wait_for_timeout(300)
        tab.locator("#draw").click()
        expect(tab.locator("#status .error")).to_be_visible()
        expect(tab.locator("#draw")).to_be_visible()
        return "nothing is painted over" in status(tab).inner_text()

    until(is_refused, 60)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 30, y + 10, steps=5)
    tab.mouse.up()
    tab.wait_for_timeout(300)
    draw(tab)
    expect(tab.locator("#text textarea")).to_have_value(re.compile("Mask hash"))
    mask = np.asarray(submitted[-1].mask)
    drawn, before = pixels(download(tab)[0]), np.asarray(IMAGE).astype(int)
    assert mask.shape == (64, 64) and mask[34, 34] == 255 and mask[0, 0] == 0 and 0 < (mask > 0).mean() < 0.9
    assert (drawn[mask == 0] == before[mask == 0]).all() and (drawn[mask > 0] != before[mask > 0]).any()


def test_outpainting(tab):
    tab.get_by_role("tab", name="Outpaint").click()
    give(tab, "canvas", png(IMAGE))
    tab.locator("#canvas img").wait_for()
    fill(tab, prompt="a cat", right=16)
    draw(tab)
    drawn = pixels(download(tab)[0])
    assert drawn.shape == (64, 80, 3) and (drawn[:, :64] == np.asarray(IMAGE)).all()
    assert "Outpaint: 0 0 16 0" in tab.locator("#text textarea").input_value()


def test_a_picture_to_start_from_a_controlnet_and_pickers(tab, submitted):
    fill(tab, prompt="a cat")
    draw(tab)
    tab.locator("#edit").click()
    tab.locator("#image img").wait_for()
    drawn = np.asarray(Image.open(download(tab)[0]))
    fill(tab, strength=0.5, steps=4, width=128, height=64)
    open_part(tab, "Model, LoRAs")
    tab.route("**/queue/join*", lambda route: route.abort())  # pickers need no server, which would answer too late
    choose(tab, "lora", "style")
    choose(tab, "embedding", "frog")
    expect(field(tab, "prompt")).to_have_value("a cat <lora:style:1> frog")
    tab.unroute("**/queue/join*")
    assert field(tab, "checkpoint").input_value() == "tiny.safetensors"
    open_part(tab, "ControlNet")
    choose(tab, "control", "edges")
    give(tab, "control-image", png(IMAGE))
    tab.locator("#control-image img").wait_for()
    choose(tab, "sampler", "Euler Karras")
    draw(tab)
    expect(tab.locator("#text textarea")).to_have_value(re.compile('Control: "edges'))
    request = submitted[-1]
    assert (np.asarray(request.input_image) == drawn).all()
    assert (request.strength, request.steps, request.width, request.height) == (0.5, 4, 128, 64)
    assert (request.sampler, request.schedule, request.checkpoint) == ("euler", "karras", "tiny.safetensors")
    (name, image, scale), = request.controls
    assert (name, scale) == ("edges", 1) and (np.asarray(image) == np.asarray(IMAGE)).all()
    tab.locator("#control input").fill("none")
    tab.get_by_role("option", name="none", exact=True).click()


# ---- settings of a picture


def with_settings(**settings):
    """A PNG file with settings in it."""
    file = io.BytesIO()
    write_png(IMAGE, file, format_parameters({"prompt": "a cat", "n_inference_steps": 3, **settings}))
    return file.getvalue()


def test_settings_of_a_dropped_picture(tab):
    """Those of a downloaded file, and with them the same picture."""
    fill(tab, prompt="a {blue} $cat\nin two lines", negative="grey", seed=2**62, guidance=2.5, steps=3, width=128)
    choose(tab, "sampler", "Heun")
    draw(tab)
    path, _ = download(tab)
    fill(tab, prompt="other", negative="", seed="", guidance="", steps=2, width="")
    choose(tab, "sampler", "Euler")
    open_part(tab, "Settings from")
    give(tab, "dropped", path.read_bytes())
    expect(status(tab)).to_have_text("The settings are back.")
    values = {name: field(tab, name).input_value() for name in ("prompt", "negative", "seed", "guidance", "steps",
                                                                "width", "sampler")}
    assert values == {"prompt": "a {blue} $cat\nin two lines", "negative": "grey", "seed": str(2**62),
                      "guidance": "2.5", "steps": "3", "width": "128", "sampler": "Heun"}
    draw(tab)
    assert (pixels(download(tab)[0]) == pixels(path)).all()


def test_what_cannot_be_followed_is_told(tab):
    file = with_settings(sampler_name="UniPC", strength=0.4, input_image_hash="ab", model="dream", Hypernet="x")
    give(tab, "dropped", file)
    expect(status(tab)).to_have_text(re.compile(
        "Not followed: the sampler UniPC; there is no checkpoint 'dream'.*; the input picture.*; Hypernet: x"))
    expect(tab.get_by_role("tab", name="Picture")).to_have_attribute("aria-selected", "true")
    assert field(tab, "strength").input_value() == "0.4" and field(tab, "seed").input_value() == ""
    give(tab, "dropped", png(IMAGE))
    expect(status(tab)).to_have_text(re.compile("the file: has no settings in it"))


# ---- strangers


def bomb():
    """A PNG file of a few kilobytes that says it is 8,000 pixels wide and high."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8_000, 8_000, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
            + chunk(b"IEND", b""))


def test_hostile_uploads(tab, url):
    tab.get_by_role("tab", name="Picture").click()
    for data, line in [(b"<script>alert(1)</script>", "not a picture"), (bomb(), "8000x8000 pixels"),
                       (png(IMAGE)[:200], "damaged")]:
        give(tab, "image", data)
        expect(tab.get_by_text(re.compile(line)).first).to_be_visible()
        expect(tab.locator("#image img")).to_have_count(0)
    tab.get_by_role("tab", name="Text").click()
    draw(tab)
    expect(tab.locator("#stage img[alt='the picture']")).to_be_visible()


def test_fields_are_no_html(tab):
    attack = '<img src=x onerror="window.hacked=1">${window.hacked=1}{{7}}'
    fill(tab, prompt=attack, seed=attack)
    tab.locator("#draw").click()
    expect(status(tab)).to_have_text(re.compile("seed is '<img src=x"))
    expect(tab.locator("#draw")).to_be_visible()
    fill(tab, seed=1)
    draw(tab)
    expect(tab.locator("#text textarea")).to_have_value(re.compile(re.escape(attack)))
    assert tab.evaluate("window.hacked") is None


@pytest.mark.parametrize("path, meta", [("/etc/hostname", {"meta": {"_type": "gradio.FileData"}}),
                                        ("../../../etc/hostname", {}),
                                        ("http://192.0.2.1/hostname", {"meta": {"_type": "gradio.FileData"}})])
def test_no_path_of_a_callers_is_opened(url, path, meta, touched):
    """By what the page itself calls, without the page."""
    before = len(touched)
    answer = requests.get(f"{url}/gradio_api/file={path}", allow_redirects=False, timeout=60)
    assert answer.status_code != 200
    config = requests.get(f"{url}/config", timeout=60).json()
    parts = {part["id"]: part for part in config["components"]}
    calls = [call for call in config["dependencies"]
             if any(parts[one]["type"] in ("file", "image") for one in call["inputs"])]
    assert len(calls) == 7  # four uploads, and three ways to draw
    for call in calls:
        data = [{"path": path} | meta if parts[one]["type"] in ("file", "image") else parts[one]["props"].get("value")
                for one in call["inputs"]]
        data = ["image" if value == "text" else value for value in data]  # the tab from which it is drawn
        join = {"data": data, "fn_index": call["id"], "session_hash": "stranger"}
        requests.post(f"{url}/gradio_api/queue/join", json=join, timeout=60)
        answer = requests.get(f"{url}/gradio_api/queue/data?session_hash=stranger", timeout=60).text
        assert "process_completed" in answer and "Traceback" not in answer
    assert not [one for one in touched[before:] if "hostname" in one or "192.0.2.1" in one]


# ---- the page


def test_picture_beside_the_prompt_or_below_it(tab):
    prompt, stage, sampler = (tab.locator(f"#{name}") for name in ("prompt", "stage", "sampler"))
    top = [part.bounding_box() for part in (prompt, stage)]
    assert abs(top[0]["y"] - top[1]["y"]) < 20 and top[1]["x"] > 600
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_timeout(200)
    below = [part.bounding_box() for part in (prompt, tab.locator("#draw"), stage, sampler)]
    assert [box["y"] for box in below] == sorted(box["y"] for box in below)
    assert below[2]["y"] + below[2]["height"] < 844  # the whole picture can be seen without scrolling
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_nothing_left_this_machine(asked, touched):
    """All of the above, browser and server. The last of the tests."""
    assert len(asked) > 100
    assert {urlsplit(one).hostname for one in asked if one.startswith(("http", "ws"))} == {"127.0.0.1"}
    calls = [one for one in touched if one.startswith("socket.")]
    assert calls and not [one for one in calls if "127.0.0.1" not in one]
