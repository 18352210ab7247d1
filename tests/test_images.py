import numpy as np
import pytest
from PIL import Image

import images


def picture(size=(64, 64), seed=0):
    """A smooth coloured RGB picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_every_kind_of_input_image_means_the_same(tmp_path):
    rgb = picture((24, 16))
    rgb.save(tmp_path / "rgb.png")
    expected = np.asarray(rgb)
    turned = rgb.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to see me upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    for given in [rgb, str(tmp_path / "rgb.png"), tmp_path / "turned.png", expected, expected / 255,
                  expected.astype(np.uint16) * 257, np.dstack([expected, np.full((16, 24), 255, np.uint8)])]:
        assert np.array_equal(np.asarray(images.open_image(given)), expected)


def test_transparency_becomes_white(tmp_path):
    expected = np.full((8, 8, 3), 255, np.uint8)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    for image in [clear, palette, Image.new("LA", (8, 8), (0, 0))]:
        assert np.array_equal(np.asarray(images.open_image(image)), expected)
    half = np.asarray(images.open_image(Image.new("RGBA", (8, 8), (0, 0, 0, 128))))
    assert np.array_equal(half, np.full((8, 8, 3), 127, np.uint8))


def test_grey_and_16_bit_pictures(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    expected = np.repeat(ramp[:, :, None], 3, axis=2)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for given in [Image.fromarray(ramp), ramp, ramp[:, :, None], tmp_path / "deep.png",
                  Image.fromarray(ramp.astype(np.int32) * 257), Image.fromarray(ramp.astype(np.uint16) * 257)]:
        assert np.array_equal(np.asarray(images.open_image(given)), expected)
    assert np.asarray(images.open_image(Image.new("1", (8, 8), 1))).min() == 255
    assert np.asarray(images.open_image(Image.new("CMYK", (8, 8), 0))).min() == 255


def test_bad_image_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such image"):
        images.open_image("nowhere.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png: not a picture"):
        images.open_image(tmp_path / "text.png")


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image = np.zeros((8, 8, 3), np.uint8)
    images.save_picture(image, tmp_path / "a.png", "a prompt: café, 猫")
    assert Image.open(tmp_path / "a.png").text["parameters"] == "a prompt: café, 猫"
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match="a.png: exists already"):
        images.save_picture(image + 1, tmp_path / "a.png", "")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(images.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save_picture(image + 1, tmp_path / "a.png", "", overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
