"""The drawings that the embedded model learns from: emoji of seven open icon sets, rendered once into one file.

    python -m training.emoji    # fetch (npm), render (resvg), write training/cache/emoji-128.npz; a minute

A drawing keeps its transparency: `scenes.py` puts it on a background, which may be one of the plain `COLOURS`.
"""
import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
CACHE = HERE / "cache"
DRAWINGS = CACHE / "emoji-128.npz"
CONCEPTS = HERE / "concepts.txt"
HELD_OUT = HERE / "held_out.json"

SIZE = 128    # pixels a side
MARGIN = 4    # pixels left free on every side, so that the border always shows the background

# style name in captions: (icon set, version of its npm package)
STYLES = {
    "noto": ("noto", "1.2.9"),
    "flat": ("fluent-emoji-flat", "1.2.6"),
    "twemoji": ("twemoji", "1.2.5"),
    "emojione": ("emojione", "1.2.3"),
    "fluent": ("fluent-emoji", "1.2.7"),
    "blob": ("noto-v1", "1.2.5"),
    "firefox": ("fxemoji", "1.2.2"),
}
# Two drawings of these styles share their outlines: what is held out in one would be no surprise if seen in the other.
TWINS = {"flat": "fluent", "fluent": "flat"}

# Chosen so that any two are at least 100 apart in RGB: the nearest one tells which colour a border has.
COLOURS = {
    "white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "red": (220, 30, 30),
    "orange": (250, 130, 0), "yellow": (255, 230, 60), "green": (40, 160, 60), "sky blue": (130, 205, 250),
    "blue": (30, 60, 210), "purple": (130, 40, 185), "pink": (255, 150, 200),
}


class Concept(NamedTuple):
    code: str      # code point in lower-case hexadecimal: "1f34e"
    article: str   # "a ", "an " or ""
    name: str      # "red apple"
    fx_name: str   # its name in fxemoji, "" where that follows from the common name, "-" for none


class Drawings(NamedTuple):
    rgba: torch.Tensor      # (n, 128, 128, 4) uint8, straight (not premultiplied) alpha
    concept: torch.Tensor   # (n,) int64, index into concepts
    style: torch.Tensor     # (n,) int64, index into styles
    concepts: list[str]
    styles: list[str]


# ---------------------------------------------------------------------------------------------------------- rendering

def read_concepts(path=CONCEPTS) -> list[Concept]:
    """The curated list, in its order of priority. A line is `🍎 a red apple | redapple`; # starts a comment."""
    concepts = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        phrase, _, fx_name = line.partition(" | ")
        character, phrase = phrase.split(" ", 1)
        article = next((a for a in ("a ", "an ") if phrase.startswith(a)), "")
        code = f"{ord(character.rstrip(chr(0xFE0F))):x}"
        concepts.append(Concept(code, article, phrase.removeprefix(article), fx_name))
    return concepts


def fetch(icon_set: str, version: str, folder: Path) -> Path:
    """The npm package of an icon set, as a tarball in `folder`; fetched only when it is not there yet."""
    tarball = folder / f"iconify-json-{icon_set}-{version}.tgz"
    if tarball.exists():
        return tarball
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        package = f"@iconify-json/{icon_set}@{version}"
        try:
            subprocess.run(["npm", "pack", package, "--silent"], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"could not fetch {package} with `npm pack` ({error}): install Node.js and go online, "
                               f"or put {tarball.name} into {folder}") from error
        os.replace(Path(scratch, tarball.name), tarball)
    return tarball


def read_icons(tarball: Path) -> tuple[dict, dict]:
    """An icon set's `icons.json` and `chars.json` (code point → name; empty for some sets) out of its tarball."""
    with tarfile.open(tarball) as tar:
        return tuple(json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "chars"))


def find_icon(concept: Concept, icons: dict, chars: dict, common_names: set[str]) -> str | None:
    """Name of the concept's icon in a set: by code point first, then by the names other sets give that code point."""
    if concept.code in chars:
        return chars[concept.code]
    if icons["prefix"] == "fxemoji":
        common_names = {concept.fx_name or name.replace("-", "") for name in common_names}
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    return min(common_names & known, default=None)


def svg(icons: dict, name: str) -> str:
    """An icon of an `icons.json` as a whole SVG text. Aliases count as other names only: no concept is flipped."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top, width, height = (icon.get(k, icons.get(k, d)) for k, d in
                                (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
            f'height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')


def render(svg_text: str) -> np.ndarray:
    """SVG → (128, 128, 4) uint8 RGBA with straight alpha, centred, its longer side 120 pixels."""
    import resvg_py  # only rendering needs it; training reads the cache

    box = SIZE - 2 * MARGIN
    small = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg_text, width=box)))
    if small.height > box:
        small = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg_text, height=box)))
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(small.convert("RGBA"), ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    return np.asarray(canvas)


def render_drawings(sets: dict[str, tuple[dict, dict]], concepts: list[Concept]) -> Drawings:
    """Every concept in every set that has it. `sets` maps a style to its (icons.json, chars.json)."""
    rgba, concept_ids, style_ids = [], [], []
    for c, concept in enumerate(tqdm(concepts, desc="rendering", unit=" concepts")):
        common_names = {chars[concept.code] for _, chars in sets.values() if concept.code in chars}
        for s, (icons, chars) in enumerate(sets.values()):
            name = find_icon(concept, icons, chars, common_names)
            if name is None:
                continue
            rgba.append(render(svg(icons, name)))
            concept_ids.append(c)
            style_ids.append(s)
    return Drawings(torch.from_numpy(np.stack(rgba)), torch.tensor(concept_ids), torch.tensor(style_ids),
                    [c.name for c in concepts], list(sets))


def save_drawings(drawings: Drawings, path: Path, recipe: str) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, rgba=drawings.rgba.numpy(), concept=drawings.concept.numpy(),
                            style=drawings.style.numpy(), concepts=drawings.concepts, styles=drawings.styles,
                            recipe=recipe)
    os.replace(temporary, path)


def make_cache() -> None:
    """Fetch, render and write `DRAWINGS`, unless it is there and was made from the same sets and concepts."""
    concepts = read_concepts()
    recipe = json.dumps([STYLES, concepts, SIZE, MARGIN])
    if DRAWINGS.exists() and str(np.load(DRAWINGS)["recipe"]) == recipe:
        print(f"{DRAWINGS} is up to date")
        return
    CACHE.mkdir(exist_ok=True)
    sets = {style: read_icons(fetch(*package, CACHE)) for style, package in STYLES.items()}
    drawings = render_drawings(sets, concepts)
    save_drawings(drawings, DRAWINGS, recipe)
    print(f"{DRAWINGS}: {len(drawings.rgba)} drawings, {len(concepts)} concepts, {len(sets)} styles")


def load_drawings(path=DRAWINGS, n_concepts: int | None = None, styles: list[str] | None = None) -> Drawings:
    """The cached drawings, or those of the first `n_concepts` concepts and of the named styles only.

    Ids are renumbered to the lists `concepts` and `styles` of the result. Raises FileNotFoundError when nothing has
    been rendered yet and ValueError for a style or a number of concepts that the file does not have.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no drawings at {path}: run `python -m training.emoji` first")
    with np.load(path) as file:
        rgba, concept, style = (torch.from_numpy(file[k]) for k in ("rgba", "concept", "style"))
        concepts, all_styles = file["concepts"].tolist(), file["styles"].tolist()
    styles = all_styles if styles is None else list(styles)
    n_concepts = len(concepts) if n_concepts is None else n_concepts
    if not 1 <= n_concepts <= len(concepts):
        raise ValueError(f"n_concepts is {n_concepts}: {path} has {len(concepts)} concepts, give 1 to that many")
    if unknown := [s for s in styles if s not in all_styles]:
        raise ValueError(f"unknown style {unknown[0]!r}: {path} has {', '.join(all_styles)}")
    new_id = torch.tensor([styles.index(s) if s in styles else -1 for s in all_styles])
    keep = (concept < n_concepts) & (new_id[style] >= 0)
    return Drawings(rgba[keep], concept[keep], new_id[style[keep]], concepts[:n_concepts], styles)


# ----------------------------------------------------------------------------------------------------------- held out

def read_held_out(path=HELD_OUT) -> set[tuple[str, str]]:
    """The (concept, style) pairs that no training step may see, by name.

    Chosen once, about 5% of all, evenly over the list of concepts: at most one style of a concept, or two where they
    are `TWINS`, and only where at least three others stay.
    """
    return {tuple(pair) for pair in json.loads(Path(path).read_text())["styles"]}


if __name__ == "__main__":
    make_cache()
