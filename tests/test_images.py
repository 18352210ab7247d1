import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_png
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from sd_parsers import ParserManager

import images
import new_file
from images import fit, native_size, open_image, read_parameters, reserve, save_picture
from infotext import format_parameters, parse_parameters

ROOT = Path(__file__).parent.parent


def picture(size=(64, 64), seed=0):
    """A smooth coloured RGB picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def pixels(given):
    return np.asarray(open_image(given))


# ---- pictures in


def test_every_kind_of_input_image_means_the_same(tmp_path):
    rgb = picture((24, 16))
    rgb.save(tmp_path / "rgb.png")
    expected = np.asarray(rgb)
    turned = rgb.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to see me upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    as_float = torch.from_numpy(expected / 255)
    for given in [rgb, str(tmp_path / "rgb.png"), tmp_path / "turned.png", expected, expected / 255,
                  io.BytesIO((tmp_path / "rgb.png").read_bytes()), (tmp_path / "rgb.png").open("rb"),
                  expected.astype(np.uint16) * 257, np.dstack([expected, np.full((16, 24), 255, np.uint8)]),
                  np.asfortranarray(expected), torch.from_numpy(expected.copy()), as_float.float().requires_grad_()]:
        assert np.array_equal(pixels(given), expected)
    coarse = pixels(as_float.bfloat16())
    assert np.abs(coarse.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", "avif bmp gif ico jpg jp2 png ppm qoi tga tiff webp".split())
def test_raster_formats_are_read(tmp_path, suffix):
    image = Image.new("RGB", (32, 32), (200, 40, 90))
    image.save(tmp_path / f"a.{suffix}")
    assert np.abs(pixels(tmp_path / f"a.{suffix}").astype(int) - np.asarray(image)).max() <= 6


def test_transparency_becomes_white():
    expected = np.full((8, 8, 3), 255, np.uint8)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    for image in [clear, palette, Image.new("LA", (8, 8), (0, 0))]:
        assert np.array_equal(pixels(image), expected)
    half = pixels(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert np.array_equal(half, np.full((8, 8, 3), 127, np.uint8))


def test_grey_and_deep_pictures(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    expected = np.repeat(ramp[:, :, None], 3, axis=2)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    for given in [Image.fromarray(ramp), ramp, ramp[:, :, None], tmp_path / "deep.png", tmp_path / "float.tiff",
                  Image.fromarray(ramp.astype(np.int32) * 257), Image.fromarray(ramp.astype(np.uint16) * 257),
                  Image.fromarray(ramp.astype(np.int32)), Image.fromarray(ramp.astype(np.float32) / 255),
                  Image.fromarray(ramp).convert("F"), Image.fromarray(ramp).convert("I"),
                  Image.frombytes("I;16B", (8, 8), (ramp.astype(">u2") * 257).tobytes())]:
        assert np.array_equal(pixels(given), expected)
    assert pixels(Image.new("1", (8, 8), 1)).min() == 255
    assert pixels(Image.new("CMYK", (8, 8), 0)).min() == 255
    assert pixels(np.full((2, 2), 385, np.uint16))[0, 0, 0] == 1  # 385 / 257 = 1.498
    assert pixels(np.full((2, 2), 386, np.uint16))[0, 0, 0] == 2


def adobe_rgb():
    """The bytes of an ICC profile with Adobe RGB's primaries and gamma, grey (0.5, 0.5, 0.5) left where it is."""
    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    tags = {b"desc": b"desc\0\0\0\0\0\0\0\5test\0" + bytes(79), b"cprt": b"text\0\0\0\0test\0",
            b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    for name, xyz in {b"r": (0.60974, 0.31111, 0.01947), b"g": (0.20528, 0.62567, 0.06087),
                      b"b": (0.14919, 0.06322, 0.74457)}.items():
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*xyz)
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563)
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4xI12s", 128 + len(table) + len(body), 0x02100000, b"mntrRGB XYZ ")
    return (header + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


# (140, 190, 100) in Adobe RGB is this in sRGB, by the matrices of both (computed apart from the library)
ADOBE_GREEN, AS_SRGB = (140, 190, 100), (113, 191, 93)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_converted_to_srgb(tmp_path, mode):
    flat = Image.new("RGB", (8, 8), ADOBE_GREEN)
    flat = flat.quantize() if mode == "P" else flat.convert(mode)
    flat.save(tmp_path / "a.png", icc_profile=adobe_rgb())
    for given in [tmp_path / "a.png", Image.open(tmp_path / "a.png")]:
        assert np.abs(pixels(given)[0, 0].astype(int) - AS_SRGB).max() <= 1
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    flat.save(tmp_path / "b.png", icc_profile=srgb)
    assert np.array_equal(pixels(tmp_path / "b.png"), np.asarray(flat.convert("RGB")))


def test_unusable_profiles_warn_and_name_the_file(tmp_path):
    for name, profile, mode in [("junk.png", b"junk", "RGB"), ("grey.png", adobe_rgb(), "L")]:
        Image.new(mode, (8, 8), "red").save(tmp_path / name, icc_profile=profile)
        with pytest.warns(UserWarning, match=f"{name}: its colour profile cannot be used"):
            assert np.array_equal(pixels(tmp_path / name), np.asarray(Image.new(mode, (8, 8), "red").convert("RGB")))


def test_large_texts_and_profiles_are_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("parameters", "a cat", zip=True)
    profile = adobe_rgb() + bytes(3_000_000)  # bytes that no tag speaks of
    Image.new("RGB", (8, 8), ADOBE_GREEN).save(tmp_path / "a.png", pnginfo=info,
                                              icc_profile=struct.pack(">I", len(profile)) + profile[4:])
    assert np.abs(pixels(tmp_path / "a.png")[0, 0].astype(int) - AS_SRGB).max() <= 1
    assert read_parameters(tmp_path / "a.png")["prompt"] == "a cat"


def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert Image.open(tmp_path / "a.png").format == "EPS"
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="a.png: not a picture that can be read"):
        open_image(tmp_path / "a.png")


def damaged(folder):
    """Yields paths of pictures that cannot be read."""
    def write(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    def saved(format, **settings):
        file = io.BytesIO()
        picture().save(file, format, **settings)
        return file.getvalue()

    yield write("text.png", b"hello")
    yield write("empty.png", b"")
    yield folder
    for format in ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF"]:
        data = saved(format)
        yield write(f"cut.{format.lower()}", data[:len(data) * 2 // 3])
    chunks = fuzz_png.split(saved("PNG"))
    yield write("chunk.png", fuzz_png.join(chunks).replace(b"IDAT", b"ID\xffT", 1))
    yield write("exif.png", saved("PNG", exif=b"Exif\0\0garbage"))
    yield write("exif.webp", saved("WEBP", exif=b"Exif\0\0garbage"))
    huge = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    yield write("bomb.png", fuzz_png.join([(b"IHDR", huge), *chunks[1:]]))


def test_damaged_files_get_one_line_with_their_path(tmp_path):
    for path in damaged(tmp_path):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            pytest.fail(f"{path} was read: {open_image(path)}")
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such image"):
        open_image("nowhere.png")


def test_a_small_file_of_very_many_pixels_is_refused(tmp_path):
    Image.new("1", (8200, 8192)).save(tmp_path / "wide.png")
    assert (tmp_path / "wide.png").stat().st_size < 100_000
    for read in (open_image, images.read_parameters):
        with pytest.raises(ValueError, match=r"wide.png.* 8200x8192 pixels; at most 67,108,864"):
            read(tmp_path / "wide.png")


@pytest.mark.parametrize("given, message", [
    ([picture(), picture()], "input_image is a list of 2; give one picture"),
    (np.zeros((3, 8, 9), np.uint8), r"input_image has shape \(3, 8, 9\); allowed"),
    (torch.zeros(1, 3, 8, 8), r"input_image has shape \(1, 3, 8, 8\)"),
    (np.zeros((0, 8, 3), np.uint8), r"input_image has shape \(0, 8, 3\)"),
    (np.full((8, 8), 7.0), r"floats must lie in \[0, 1\]"),
    (np.full((8, 8), np.nan), r"floats must lie in \[0, 1\]"),
    (np.zeros((8, 8), np.int64), "dtype int64; allowed"),
    (Image.new("RGB", (0, 8)), "input_image is 0x8 pixels"),
    (Image.fromarray(np.full((8, 8), -1, np.int32)), "values from -1 to -1"),
    (Image.fromarray(np.full((8, 8), 70000, np.int32)), "values from 70000"),
    (Image.fromarray(np.full((8, 8), 256, np.float32)), "values from"),
    (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "values from"),
    (3, r"input_image has shape \(\)"),
])
def test_what_is_no_picture_gets_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_image(given)
    assert "\n" not in str(caught.value)


def test_a_picture_given_is_left_as_it_was():
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes()
    assert open_image(image).size == (64, 64) and image.tobytes() == before and image.getexif()[0x0112] == 6


def test_damaged_pictures_by_the_hundred():
    n_read, longest, growth = fuzz_png.run(80, seed=1)
    assert 0 < n_read < 80 and longest < 10 and growth < 1000


# ---- sizes


def test_fit():
    image = Image.fromarray(np.repeat(np.arange(0, 200, dtype=np.uint8)[None, :], 100, axis=0)).convert("RGB")
    crop, pad, stretch = (np.asarray(fit(image, 50, 50, how))[..., 0] for how in ("crop", "pad", "stretch"))
    assert crop.shape == pad.shape == stretch.shape == (50, 50)
    assert abs(int(crop[25, 0]) - 50) <= 2 and abs(int(crop[25, 49]) - 149) <= 2  # the middle half
    assert abs(int(stretch[25, 0]) - 2) <= 2 and abs(int(stretch[25, 49]) - 197) <= 2
    assert (pad[:12] == 0).all() and (pad[-12:] == 0).all() and np.abs(pad[20].astype(int) - stretch[20]).max() <= 1
    assert np.array_equal(np.asarray(fit(picture(), 64, 64)), np.asarray(picture()))
    with pytest.raises(ValueError, match="how is 'squeeze'; give crop, pad or stretch"):
        fit(image, 8, 8, "squeeze")


def test_resizing_is_lanczos():
    image = picture((90, 50))
    expected = np.asarray(image.resize((45, 25), Image.Resampling.LANCZOS), np.float32)
    tensor = images.to_tensor(image, 25, 45)
    assert tensor.shape == (1, 3, 25, 45) and tensor.dtype == torch.float32
    assert np.abs((tensor[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() < 1e-4


@pytest.mark.parametrize("size, side, expected", [((512, 512), 512, (512, 512)), ((1024, 512), 512, (360, 728)),
                                                  ((300, 400), 512, (592, 440)), ((4000, 1), 64, (8, 4048))])
def test_native_size_keeps_proportions(size, side, expected):
    assert native_size(Image.new("1", size), side) == expected  # (height, width)


def test_to_uint8_is_in_c_order():
    values = torch.linspace(-1.1, 1.1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    array = images.to_uint8(values)
    assert array.shape == (2, 4, 5, 3) and array.flags["C_CONTIGUOUS"] and array[0].flags["C_CONTIGUOUS"]
    assert array[1, 2, 3, 0] == round((values[1, 0, 2, 3].item() / 2 + 0.5) * 255)
    assert array.min() == 0 and array.max() == 255


# ---- pictures out

IMAGE = np.asarray(picture((24, 16)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    assert save_picture(IMAGE, tmp_path / "a.png", "a prompt: café, 猫") == tmp_path / "a.png"
    assert Image.open(tmp_path / "a.png").text["parameters"] == "a prompt: café, 猫"
    assert np.array_equal(pixels(tmp_path / "a.png"), IMAGE)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match="a.png: exists already"):
        save_picture(IMAGE + 1, tmp_path / "a.png")

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_picture(IMAGE + 1, tmp_path / "a.png", overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before and names(tmp_path) == ["a.png"]
    assert save_picture(IMAGE + 1, tmp_path / "a.png", overwrite=True) == tmp_path / "a.png"
    assert np.array_equal(pixels(tmp_path / "a.png"), IMAGE + 1) and names(tmp_path) == ["a.png"]


def test_a_new_picture_may_be_read_by_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o027)
    try:
        assert save_picture(IMAGE, tmp_path / "a.png").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)


@pytest.mark.parametrize("name, error, message", [
    ("a.jpg", ValueError, "a.jpg: pictures are written as PNG"),
    ("nowhere/a.png", FileNotFoundError, "no folder .*nowhere; make it first"),
    ("folder.png", IsADirectoryError, "folder.png: is a folder"),
    ("there.png", FileExistsError, "there.png: exists already"),
    ("dangling.png", FileExistsError, "dangling.png: exists already"),
    ("a" * 300 + ".png", OSError, r"a.png: cannot be written \(File name too long\)"),
])
def test_what_forbids_writing_shows_before_the_drawing(tmp_path, name, error, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "there.png").touch()
    (tmp_path / "dangling.png").symlink_to("nothing")
    before = names(tmp_path)
    with pytest.raises(error, match=message), reserve(tmp_path / name):
        pytest.fail("drawn")
    assert names(tmp_path) == before


def test_a_read_only_place_shows_before_the_drawing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(PermissionError, match=r"a.png: cannot be written \(Permission denied\); name"):
        with reserve(tmp_path / "a.png"):
            pytest.fail("drawn")


def no_links(*_):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("link", [os.link, no_links])
def test_a_name_that_is_taken_meanwhile_costs_no_picture(tmp_path, monkeypatch, link):
    monkeypatch.setattr(new_file.os, "link", link)
    for name in ["a.png", "b" * 251 + ".png"]:
        with reserve(tmp_path / name) as save:
            (tmp_path / name).write_text("another's")
            written = save(IMAGE)
            again = save(IMAGE + 1)
        assert (tmp_path / name).read_text() == "another's"
        assert np.array_equal(pixels(written), IMAGE) and np.array_equal(pixels(again), IMAGE + 1)
    with reserve(tmp_path / "c.png", overwrite=True) as save:
        (tmp_path / "c.png").mkdir()
        assert save(IMAGE) == tmp_path / "c-2.png"
    assert [name for name in names(tmp_path) if len(name) < 20] == ["a-2.png", "a-3.png", "a.png", "c-2.png", "c.png"]
    assert len(names(tmp_path)) == 8


def test_a_folder_that_is_gone_meanwhile_costs_no_picture(tmp_path):
    (tmp_path / "out").mkdir()
    with reserve(tmp_path / "out" / "a.png") as save:
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
        assert np.array_equal(pixels(save(IMAGE)), IMAGE)


@pytest.mark.parametrize("link", [os.link, no_links])
def test_many_at_once_lose_none(tmp_path, monkeypatch, link):
    monkeypatch.setattr(new_file.os, "link", link)

    def write(k):
        with reserve(tmp_path / "a.png") as save:
            barrier.wait()
            return save(np.full((8, 8, 3), k, np.uint8))

    import threading
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(8)))
    assert sorted(int(pixels(path)[0, 0, 0]) for path in written) == list(range(8)) and len(names(tmp_path)) == 8


def test_sigterm_leaves_no_temporary_file(tmp_path):
    code = ("import signal, sys, time; from new_file import new_file\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "with new_file(sys.argv[1]): print('drawing', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.png"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"drawing\n" and len(names(tmp_path)) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and names(tmp_path) == []


# ---- the text in a picture

SETTINGS = dict(prompt="a red apple, (shiny:1.2)\n<lora:fruit:0.8>", uncond_prompt="blurry", n_inference_steps=20,
                sampler_name="dpmpp_2m", schedule="Karras", cfg_scale=7.5, seed=2**63 - 1, height=16, width=24,
                model="v1-5", model_hash="6ce0161689", strength=0.5, clip_skip=2, guidance_interval=(0.3, 5.0),
                cache_interval=3, tile_size=512, dtype="float16", use_ema=False, input_image_hash="0" * 32,
                loras=["fruit:0.8"])
TEXT = """a red apple, (shiny:1.2)
<lora:fruit:0.8>
Negative prompt: blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 9223372036854775807, Size: 24x16, \
Model hash: 6ce0161689, Model: v1-5, Denoising strength: 0.5, Clip skip: 2, Init image hash: """ + "0" * 32


def test_settings_come_back(tmp_path):
    text = format_parameters(dict(reversed(SETTINGS.items())))
    assert text.startswith(TEXT) and parse_parameters(text) == SETTINGS
    given = {**SETTINGS, "height": None, "width": None, "vae": None}
    assert read_parameters(save_picture(IMAGE, tmp_path / "a.png", given)) == SETTINGS
    labels = {"Prompt": "a cat", "Negative prompt": "b", "Steps": 3, "Sampler": "Euler a", "CFG scale": 2, "Odd": True}
    assert read_parameters(save_picture(IMAGE, tmp_path / "b.png", labels)) == dict(
        prompt="a cat", uncond_prompt="b", n_inference_steps=3, sampler_name="euler_a", cfg_scale=2.0, Odd="True",
        height=16, width=24)


def test_loras_stand_in_the_prompt():
    text = format_parameters({**SETTINGS, "loras": ["fruit:0.8", "light"]})
    assert text.split("\n")[1] == "<lora:fruit:0.8> <lora:light>"
    assert parse_parameters(text)["loras"] == ["fruit:0.8", "light"]


def web_ui_fields(text):
    """The settings as web UIs read them: their pattern, and JSON where a value is quoted."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    found = pattern.findall(text.strip().split("\n")[-1])
    return {name: json.loads(value) if value[:1] == '"' else value for name, value in found}


@pytest.mark.parametrize("name", ["a, Seed: 1", 'a", Seed: 1, b: "', "a\\", 'a"b', "a: b", " a", "a\nSeed: 1",
                                  "a\u2028b",
                                  ""])
def test_a_file_name_forges_no_setting(tmp_path, name):
    path = save_picture(IMAGE, tmp_path / "a.png", {**SETTINGS, "model": name, "seed": 5, "vae": name})
    assert read_parameters(path) == {**SETTINGS, "model": name, "seed": 5, "vae": name}
    fields = web_ui_fields(Image.open(path).text["parameters"])
    assert fields["Seed"] == "5" and fields["Model"] == fields["VAE"] == name
    assert ParserManager().parse(path).samplers[0].parameters["seed"] == "5"


def test_a_file_name_that_is_no_unicode_costs_no_picture(tmp_path):
    path = save_picture(IMAGE, tmp_path / "a.png", {"prompt": "a cat", "model": os.fsdecode(b"caf\xe9")})
    assert read_parameters(path)["model"] == "caf?"


def test_any_prompt_comes_back():
    rng = random.Random(0)
    parts = ["a", " ", "\n", ",", ":", '"', "\\", "Negative prompt:", "Steps: 1, Sampler: DDIM, Seed: 5", "\r\n", "猫"]
    for _ in range(500):
        some = ["".join(rng.choices(parts, k=rng.randrange(8))) for _ in range(4)]
        given = dict(zip(["prompt", "uncond_prompt", "model", "Odd thing"], some), height=8, width=8)
        assert parse_parameters(format_parameters(given)) == given


def test_other_programs_read_our_text(tmp_path):
    found = ParserManager().parse(save_picture(IMAGE, tmp_path / "a.png", {**SETTINGS, "prompt": "an apple, red"}))
    sampler = found.samplers[0]
    assert [prompt.value for prompt in found.prompts] == ["an apple, red <lora:fruit:0.8>"]
    assert [prompt.value for prompt in found.negative_prompts] == ["blurry"]
    assert sampler.name == "DPM++ 2M" and sampler.model.name == "v1-5" and sampler.model.hash == "6ce0161689"
    assert sampler.parameters == {"steps": "20", "scheduler": "Karras", "cfg_scale": "7.5", "seed": str(2**63 - 1)}


WEB_UI = """masterpiece, best (quality:1.2)
second line <lora:foo:0.8> <lora:bar:te=0.5:unet=1>
Negative prompt: bad
more bad
Steps: 20, Sampler: %s, CFG scale: 7, Seed: 123, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, \
Denoising strength: 0.4, Clip skip: 2, ENSD: 31337, Hires prompt: "a, b: \\"c\\"\\nd", \
Lora hashes: "foo: 0123456789ab, bar: 44", Version: v1.10.1"""


@pytest.mark.parametrize("sampler, expected", [
    ("DPM++ 2M SDE Karras", ("dpmpp_2m_sde", "Karras")),
    ("DPM++ 2M SDE Heun SGM Uniform", ("DPM++ 2M SDE Heun", "SGM Uniform")),
    ("Euler a, Schedule type: Beta", ("euler_a", "Beta")),
    ("DDIM", ("ddim", None)),
])
def test_files_of_web_uis_are_read(tmp_path, sampler, expected):
    text = WEB_UI % sampler
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    image = picture()
    for suffix in ["jpg", "webp", "avif"]:
        image.save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    image.save(tmp_path / "a.gif", comment=text.encode())
    save_picture(image, tmp_path / "a.png", text)
    chunks = fuzz_png.split((tmp_path / "a.png").read_bytes())
    late = [chunk for chunk in chunks if chunk[0] != b"tEXt"]
    late.insert(-1, (b"tEXt", b"parameters\0" + text.encode("latin-1")))
    (tmp_path / "late.png").write_bytes(fuzz_png.join(late))
    for path in tmp_path.iterdir():
        found = read_parameters(path)
        assert (found.pop("sampler_name"), found.pop("schedule", None)) == expected, path
        assert found == {
            "prompt": "\n".join(text.split("\n")[:2]), "uncond_prompt": "bad\nmore bad", "n_inference_steps": 20,
            "cfg_scale": 7.0, "seed": 123, "width": 512, "height": 768, "model_hash": "6ce0161689", "model": "v1-5",
            "strength": 0.4, "clip_skip": 2, "ENSD": "31337", "Hires prompt": 'a, b: "c"\nd',
            "Lora hashes": "foo: 0123456789ab, bar: 44", "Version": "v1.10.1",
            "loras": ["foo:0.8", "bar:te=0.5:unet=1"]}


def test_text_that_is_odd_or_missing(tmp_path):
    assert parse_parameters("a cat\nred, blue") == {"prompt": "a cat\nred, blue", "uncond_prompt": ""}
    odd = parse_parameters("a\nSteps: many, Sampler: DDIM, Seed: " + "9" * 5000 + ", Size: 8x, EMA: perhaps")
    assert odd["n_inference_steps"] == "many" and odd["size"] == "8x" and odd["use_ema"] == "perhaps"
    assert odd["seed"] == "9" * 5000
    for hostile in ["ab " * 100_000, " " * 300_000, 'ab:"' * 60_000, "<lora:" * 50_000, "\\" * 300_000,
                    'ab:"\\,' * 20_000]:
        parse_parameters(hostile)
        parse_parameters("Steps: 1, Seed: 2, Odd: 3, " + hostile)
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: has no settings in it"):
        read_parameters(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_parameters("nowhere.png")
