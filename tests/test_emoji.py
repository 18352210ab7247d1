"""The data pipeline of training/emoji.py, on three drawings of our own whose pixels are known in closed form."""
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from training import emoji

ICONS = Path(__file__).parent / "fixtures" / "icons"


def fixture_sets():
    """Set "coded" knows code points; "named" must be matched by name; "own" is fxemoji, with names of its own."""
    icons, chars = (json.loads((ICONS / f"{name}.json").read_text()) for name in ("icons", "chars"))
    bodies = icons["icons"]
    own = icons | {"prefix": "fxemoji", "aliases": {},
                   "icons": {"squarered": bodies["red-square"], "bluedisc": bodies["blue-disc"],
                             "uprightbar": bodies["green-bar"]}}
    return {"coded": (icons, chars), "named": (icons, {}), "own": (own, {})}


@pytest.fixture(scope="module")
def drawings():
    return emoji.render_drawings(fixture_sets(), emoji.read_concepts(ICONS / "concepts.txt"))


def pixels(drawings, concept, style="coded"):
    row = (drawings.concept == drawings.concepts.index(concept)) & (drawings.style == drawings.styles.index(style))
    return drawings.rgba[row][0]


def test_concepts_are_read_with_code_point_article_and_own_name():
    assert emoji.read_concepts(ICONS / "concepts.txt") == [
        ("1f7e5", "a ", "red square", "squarered"), ("1f535", "an ", "opal disc", ""), ("1f4ca", "", "bars", "-")]


def test_icons_are_matched_by_code_point_then_by_name(drawings):
    pairs = {(drawings.concepts[c], drawings.styles[s]) for c, s in zip(drawings.concept, drawings.style)}
    everything = {(concept, style) for concept in drawings.concepts for style in drawings.styles}
    assert pairs == everything - {("bars", "own")}
    for style in ("named", "own"):
        assert torch.equal(pixels(drawings, "red square", style), pixels(drawings, "red square"))
        assert torch.equal(pixels(drawings, "opal disc", style), pixels(drawings, "opal disc"))


def test_code_point_wins_over_name():
    concept = emoji.Concept("1f535", "a ", "disc", "")
    icons, _ = fixture_sets()["coded"]
    assert emoji.find_icon(concept, icons, {"1f535": "green-bar"}, {"blue-disc"}) == "green-bar"
    assert emoji.find_icon(concept, icons, {}, {"blue-disc"}) == "blue-disc"
    assert emoji.find_icon(concept, icons, {}, {"pink-disc"}) is None


def test_square_fills_all_but_the_margin(drawings):
    expected = torch.zeros(128, 128, 4, dtype=torch.uint8)
    expected[4:124, 4:124] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    assert torch.equal(pixels(drawings, "red square"), expected)


def test_tall_icon_is_centred_and_keeps_its_proportions(drawings):
    """8 by 32 units from x = 2 on: 30 by 120 pixels in the middle."""
    expected = torch.zeros(128, 128, 4, dtype=torch.uint8)
    expected[4:124, 49:79] = torch.tensor([0, 255, 0, 255], dtype=torch.uint8)
    assert torch.equal(pixels(drawings, "bars"), expected)


def test_disc_has_straight_alpha_and_the_area_of_a_circle(drawings):
    disc = pixels(drawings, "opal disc")
    assert abs(disc[64, 64].int() - torch.tensor([0, 0, 255, 128])).max() <= 1    # blue stays 255: not premultiplied
    area = disc[..., 3].double().sum() / 127.5
    assert abs(area - np.pi * 60**2) < 0.005 * np.pi * 60**2


def test_rendering_twice_gives_the_same_file_and_the_file_gives_the_drawings_back(drawings, tmp_path):
    again = emoji.render_drawings(fixture_sets(), emoji.read_concepts(ICONS / "concepts.txt"))
    for name, made in (("one", drawings), ("two", again)):
        emoji.save_drawings(made, tmp_path / f"{name}.npz", "recipe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "two.npz"]    # no temporary file stays
    one, two = (emoji.load_drawings(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for field in ("rgba", "concept", "style"):
        assert torch.equal(getattr(one, field), getattr(two, field))
        assert torch.equal(getattr(one, field), getattr(drawings, field))
    assert (one.concepts, one.styles) == (drawings.concepts, drawings.styles)


def test_load_takes_a_subset_and_renumbers_the_styles(drawings, tmp_path):
    emoji.save_drawings(drawings, tmp_path / "d.npz", "recipe")
    some = emoji.load_drawings(tmp_path / "d.npz", n_concepts=2, styles=["own", "coded"])
    assert some.concepts == ["red square", "opal disc"] and some.styles == ["own", "coded"]
    assert sorted(zip(some.concept.tolist(), some.style.tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert torch.equal(pixels(some, "opal disc", "own"), pixels(drawings, "opal disc", "own"))
    with pytest.raises(ValueError, match="unknown style 'cubist'.*coded, named, own"):
        emoji.load_drawings(tmp_path / "d.npz", styles=["cubist"])
    with pytest.raises(ValueError, match="n_concepts is 4.*3 concepts"):
        emoji.load_drawings(tmp_path / "d.npz", n_concepts=4)
    with pytest.raises(FileNotFoundError, match="python -m training.emoji"):
        emoji.load_drawings(tmp_path / "none.npz")


def test_cache_is_made_once_and_again_when_the_concepts_change(tmp_path, monkeypatch):
    calls = []

    def read_icons(tarball):
        calls.append(tarball)
        return fixture_sets()["coded"]

    listed = tmp_path / "concepts.txt"
    listed.write_text((ICONS / "concepts.txt").read_text())
    monkeypatch.setattr(emoji, "CACHE", tmp_path)
    monkeypatch.setattr(emoji, "DRAWINGS", tmp_path / "emoji-128.npz")
    monkeypatch.setattr(emoji, "STYLES", {"coded": ("fixture", "1.0.0")})
    monkeypatch.setattr(emoji, "fetch", lambda *package: package)
    monkeypatch.setattr(emoji, "read_icons", read_icons)
    read_concepts = emoji.read_concepts
    monkeypatch.setattr(emoji, "read_concepts", lambda: read_concepts(listed))
    emoji.make_cache()
    emoji.make_cache()
    assert len(calls) == 1
    listed.write_text("🔵 a blue disc\n")
    emoji.make_cache()
    assert len(calls) == 2 and emoji.load_drawings(tmp_path / "emoji-128.npz").concepts == ["blue disc"]


def test_a_fetched_package_is_read_without_npm_and_a_missing_one_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    tarball = tmp_path / "iconify-json-fixture-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as tar:
        for name in ("icons.json", "chars.json"):
            tar.add(ICONS / name, f"package/{name}")
    assert emoji.read_icons(emoji.fetch("fixture", "1.0.0", tmp_path)) == fixture_sets()["coded"]
    with pytest.raises(RuntimeError, match="install Node.js.*iconify-json-fixture-2.0.0.tgz"):
        emoji.fetch("fixture", "2.0.0", tmp_path)
    assert list(tmp_path.iterdir()) == [tarball]


def test_nearest_colour_is_unambiguous():
    colours = torch.tensor(list(emoji.COLOURS.values())).double()
    distance = torch.cdist(colours, colours) + 1e3 * torch.eye(len(colours))
    assert distance.min() >= 100


def test_held_out_file_names_what_exists_and_twins_together():
    held_out = emoji.read_held_out()
    concepts = [c.name for c in emoji.read_concepts()]
    assert len(concepts) == len(set(concepts)) and 80 <= len(held_out) <= 120
    assert {c for c, _ in held_out} <= set(concepts) and {s for _, s in held_out} <= set(emoji.STYLES)
    for concept, style in held_out:
        assert style not in emoji.TWINS or (concept, emoji.TWINS[style]) in held_out
