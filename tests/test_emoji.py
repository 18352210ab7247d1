"""The data pipeline of training/emoji.py, on three drawings of our own whose pixels are known in closed form."""
import json
import random
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


def test_composite_is_the_over_operator(drawings):
    rgba = torch.stack([pixels(drawings, "red square"), pixels(drawings, "opal disc")])
    alpha = rgba[1, 64, 64, 3].item() / 255
    out = emoji.composite(rgba, torch.tensor([[0, 0, 0], [130, 205, 250]], dtype=torch.uint8))
    assert out.shape == (2, 3, 128, 128) and out.dtype == torch.float32
    assert torch.equal(out[0, :, 64, 64], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(out[0, :, 0, 0], torch.tensor([-1.0, -1.0, -1.0]))
    over = [(1 - alpha) * 130, (1 - alpha) * 205, alpha * 255 + (1 - alpha) * 250]
    assert torch.allclose(out[1, :, 64, 64], torch.tensor(over) / 127.5 - 1, atol=1e-6)
    assert torch.allclose(out[1, :, 0, 0], torch.tensor([130, 205, 250]) / 127.5 - 1, atol=1e-6)


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
    with pytest.raises(FileNotFoundError, match="python training/emoji.py"):
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


def test_captions_in_all_wordings():
    assert emoji.wordings("octopus") == ["octopus", "an octopus", "octopus emoji"]
    assert emoji.wordings("octopus", "noto") == [
        "octopus", "an octopus", "octopus emoji", "octopus, noto style", "octopus emoji, noto style",
        "a noto style emoji of an octopus"]
    assert emoji.wordings("unicorn", colour="orange")[1] == "a unicorn on an orange background"
    assert emoji.wordings("cherries", "emojione", "sky blue")[-1] == \
        "an emojione style emoji of cherries on a sky blue background"
    assert emoji.wordings("hourglass")[1] == "an hourglass" and emoji.wordings("fire")[1] == "fire"


def test_caption_draws_from_every_wording_and_repeats_with_the_seed():
    draw = lambda seed: [emoji.caption(rng, "pizza", "flat", "red") for rng in [random.Random(seed)] for _ in range(99)]
    assert draw(1) == draw(1) != draw(2)
    assert set(draw(1)) == set(emoji.wordings("pizza", "flat", "red"))


def test_no_two_concepts_styles_or_colours_share_a_caption():
    concepts = [c.name for c in emoji.read_concepts()]
    texts = [text for c in concepts for text in set(emoji.wordings(c, None, "red"))]
    assert len(concepts) == len(set(concepts)) and len(texts) == len(set(texts))


def test_nearest_colour_is_unambiguous():
    colours = torch.tensor(list(emoji.COLOURS.values())).double()
    distance = torch.cdist(colours, colours) + 1e3 * torch.eye(len(colours))
    assert distance.min() >= 100


def all_pairs(n_concepts=40, styles=tuple(emoji.STYLES)):
    """Drawings without pixels: every style of many concepts."""
    concept, style = torch.meshgrid(torch.arange(n_concepts), torch.arange(len(styles)), indexing="ij")
    return emoji.Drawings(torch.zeros(concept.numel(), 1, 1, 4, dtype=torch.uint8), concept.flatten(), style.flatten(),
                          [c.name for c in emoji.read_concepts()][:n_concepts], list(styles))


def test_held_out_choice_is_fixed_even_and_keeps_three_styles():
    held_out = emoji.choose_held_out(all_pairs())
    assert held_out == emoji.choose_held_out(all_pairs())
    pairs = {tuple(pair) for pair in held_out["styles"]}
    assert 0.04 < len(pairs) / (40 * 7) <= 0.055
    assert len(held_out["colours"]) == round(0.05 * 40 * 10) and all(c != "white" for _, c in held_out["colours"])
    for concept, style in pairs:
        assert style not in emoji.TWINS or (concept, emoji.TWINS[style]) in pairs
    scarce = emoji.choose_held_out(all_pairs(styles=["noto", "flat", "fluent", "blob"]))["styles"]
    assert scarce and not {"flat", "fluent"} & {style for _, style in scarce}    # without the twins only two were left


def test_trained_and_held_out_pairs_are_disjoint_and_complete():
    drawings = all_pairs(100, list(emoji.STYLES)[:6])
    trained, held_out = emoji.trained_pairs(drawings).tolist(), emoji.held_out_pairs(drawings).tolist()
    assert sorted(trained + held_out) == list(range(600)) and 20 <= len(held_out) <= 40
    names = {(drawings.concepts[drawings.concept[r]], drawings.styles[drawings.style[r]]) for r in held_out}
    style_pairs, colour_pairs = emoji.read_held_out()
    assert names <= style_pairs
    assert drawings.concept[trained].bincount().min() >= 3
    allowed = emoji.trained_colours(drawings)
    colours = list(emoji.COLOURS)
    assert allowed.shape == (100, 11) and allowed[:, colours.index("white")].all()
    refused = {(drawings.concepts[c], colours[k]) for c, k in (~allowed).nonzero().tolist()}
    assert refused == {pair for pair in colour_pairs if pair[0] in drawings.concepts} and 40 <= len(refused) <= 60


def test_held_out_file_names_only_what_exists():
    style_pairs, colour_pairs = emoji.read_held_out()
    concepts = {c.name for c in emoji.read_concepts()}
    assert {c for c, _ in style_pairs | colour_pairs} <= concepts
    assert {s for _, s in style_pairs} <= set(emoji.STYLES) and {c for _, c in colour_pairs} <= set(emoji.COLOURS)
    for concept, style in style_pairs:
        assert style not in emoji.TWINS or (concept, emoji.TWINS[style]) in style_pairs
