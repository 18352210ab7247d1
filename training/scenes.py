"""The world that the embedded model learns: scenes with a grammar, composed from the drawings of `emoji.py`.

    python -m training.scenes            # a sheet of scenes with their captions: training/cache/scenes.png

A scene is one to four drawings: whole, small at a place, several of a kind, or two in a relation; recoloured or not, on
a plain colour or in a simple place. Every drawing is mirrored, turned, scaled and moved a little, and every caption is
one of many wordings. What is held out follows from `is_held_out`, a rule that needs no list.
"""

import hashlib
import random
import re
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from training import emoji

HERE = Path(__file__).parent
WORLD = HERE / "world.txt"
NEWCOMERS = HERE / "newcomers.txt"
STYLES = ["noto", "flat", "twemoji", "emojione"]
SIZE = emoji.SIZE

OBJECT_COLOURS = {
    "red": (220, 30, 30), "orange": (250, 130, 0), "yellow": (255, 215, 40), "green": (40, 160, 60),
    "blue": (30, 80, 220), "purple": (130, 40, 185), "pink": (255, 130, 190), "brown": (130, 75, 40),
    "black": (35, 35, 40), "grey": (140, 140, 145), "white": (240, 240, 242),
}
THING_COLOURS = [None, *OBJECT_COLOURS]  # None: as it is drawn
OTHER_SPELLINGS = {"grey": ["grey", "gray"], "purple": ["purple", "violet"], "sky blue": ["sky blue", "light blue"]}
# name: column and row of the middle of a small object, in shares of the side
POSITIONS = {
    "top left": (0.23, 0.23), "top": (0.5, 0.23), "top right": (0.77, 0.23), "left": (0.23, 0.5), "middle": (0.5, 0.5),
    "right": (0.77, 0.5), "bottom left": (0.23, 0.77), "bottom": (0.5, 0.77), "bottom right": (0.77, 0.77),
}
COUNTS = {2: ["two", "2"], 3: ["three", "3"], 4: ["four", "4"]}
# middles of several of a kind
GROUPS = {
    2: [(0.27, 0.5), (0.73, 0.5)],
    3: [(0.5, 0.27), (0.27, 0.73), (0.73, 0.73)],
    4: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
}
# relation of the first to the second: the middles of both
RELATIONS = {
    "left of": ((0.27, 0.5), (0.73, 0.5)), "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)), "below": ((0.5, 0.73), (0.5, 0.27)),
}

# ---- wordings: the first list is trained on, the second one held out

PLACES = {
    "sky": (["in the sky", "in the blue sky", "flying in the sky", "in the air"], ["up in the air"]),
    "grass": (["on the grass", "in a meadow", "on a green meadow", "on the lawn", "in the garden", "in a field"],
              ["in the grass", "on a green field"]),
    "beach": (["on the beach", "on the sand", "on a sandy beach", "in the desert"], ["on the sandy desert"]),
    "sea": (["in the sea", "in the ocean", "under water", "in the water"], ["under the sea", "in the blue ocean"]),
    "night": (["at night", "in the night", "in the dark", "in the moonlight", "under the night sky"],
              ["in the dark night"]),
    "space": (["in space", "in outer space", "among the stars"], ["in dark space"]),
    "snow": (["in the snow", "on the snow", "in winter", "in a snowy field"], ["on a snowy field"]),
    "forest": (["in the forest", "in a forest", "in the woods"], ["in the green woods"]),
    "sunset": (["at sunset", "during sunset", "in the sunset", "in front of a sunset"], ["under the sunset sky"]),
}
PLAIN = (["on {a_colour} background", "on {colour} background", "with {a_colour} background", "on {colour}",
          "against {a_colour} background", ", {colour} background"],
         ["in front of {a_colour} background", "and {a_colour} background"])
FRAMES = (["{x}", "{a_x}", "{a_x}", "the {x}", "{x} emoji", "{a_x} emoji", "a photo of {a_x}", "a picture of {a_x}",
           "an emoji of {a_x}", "a drawing of {a_x}", "an icon of {a_x}", "photo of {a_x}", "picture of {a_x}",
           "{x} icon"],
          ["a drawing of the {x}", "icon of {a_x}", "{x} picture", "an emoji photo of {a_x}"])
WHERE = {
    "top left": (["in the top left corner", "at the top left", "in the upper left"], ["in the upper left corner"]),
    "top": (["at the top", "at the top of the picture", "on the upper side"], ["in the upper middle"]),
    "top right": (["in the top right corner", "at the top right", "in the upper right"], ["in the upper right corner"]),
    "left": (["on the left", "on the left side", "at the left"], ["on the left of the picture"]),
    "middle": (["", "in the middle", "in the center"], ["in the middle of the picture"]),
    "right": (["on the right", "on the right side", "at the right"], ["on the right of the picture"]),
    "bottom left": (["in the bottom left corner", "at the bottom left", "in the lower left"],
                    ["in the lower left corner"]),
    "bottom": (["at the bottom", "at the bottom of the picture", "on the lower side"], ["in the lower middle"]),
    "bottom right": (["in the bottom right corner", "at the bottom right", "in the lower right"],
                     ["in the lower right corner"]),
}
PAIRS = {
    "left of": (["{a} to the left of {b}", "{a} left of {b}", "{a} on the left of {b}",
                 "{a} on the left and {b} on the right", "{a} and {b}", "{a} and {b}",
                 "{a} next to {b}", "{a} beside {b}", "{a} with {b}", "{a} and {b} side by side",
                 "{a} with {b} on the right", "left {a}, right {b}"],
                ["on the left {a}, on the right {b}", "{a} at the left side of {b}"]),
    "right of": (["{a} to the right of {b}", "{a} right of {b}", "{a} on the right of {b}",
                  "{a} on the right and {b} on the left", "{a} to the right of {b}", "{a} with {b} on the left",
                  "right {a}, left {b}"],
                 ["on the right {a}, on the left {b}", "{a} at the right side of {b}"]),
    "above": (["{a} above {b}", "{a} over {b}", "{a} on top of {b}", "{a} at the top and {b} at the bottom",
               "{a} with {b} below", "top {a}, bottom {b}"],
              ["at the top {a}, at the bottom {b}", "{a} above and {b} below"]),
    "below": (["{a} below {b}", "{a} under {b}", "{a} beneath {b}", "{a} at the bottom and {b} at the top",
               "{a} with {b} above", "bottom {a}, top {b}"],
              ["at the bottom {a}, at the top {b}", "{a} below and {b} above"]),
}
STYLE = (["{text}, {style} style", "{text} in {style} style", "{style} style {text}", "{text}, {style}"],
         ["{text} in the style of {style}"])
SMALL, BIG, NICE = ["small", "tiny", "little"], ["big", "large", "huge"], ["cute", "nice", "beautiful"]
TRAINED, HELD_OUT = 0, 1


@dataclass(frozen=True)
class Thing:
    drawing: str              # the concept of `emoji.py`
    singular: str
    plural: str               # "" where it cannot be counted
    synonyms: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What is to be seen. `layout` is "whole", one of POSITIONS, COUNTS or RELATIONS."""

    things: tuple[int, ...]                    # indices into the world, one or two
    colours: tuple[str | None, ...]            # of the things; None: as they are drawn
    layout: str | int = "whole"
    background: str = "white"                  # a colour of `emoji.COLOURS` or one of PLACES
    style: str = "noto"                        # whose drawings are used
    names_style: bool = False                  # whether the caption says so
    big: bool = False


def read_world(path=WORLD) -> list[Thing]:
    """The things, from lines such as `cat face | cat | cats | kitty, kitten`; # starts a comment."""
    world = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            drawing, singular, plural, synonyms = (part.strip() for part in line.split("|"))
            world.append(Thing(drawing, singular, "" if plural == "-" else plural,
                               tuple(filter(None, map(str.strip, synonyms.split(","))))))
    return world


# ---- held out


SHARES = {"colour": 12, "position": 15, "count": 15, "pair": 15, "background": 12}  # in percent


def is_held_out(kind: str, *names) -> bool:
    """Whether no training step may see a combination, such as ("colour", "apple", "blue") or ("pair", "cat", "dog").

    The first four bytes of SHA-256 of the text "colour:apple:blue", as a number, below the kind's share of 2**32. The
    names of a pair are sorted. Styles are held out by the list `held_out.json` instead.
    """
    names = sorted(names) if kind == "pair" else names
    digest = hashlib.sha256(":".join([kind, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:4], "big") * 100 < SHARES[kind] * 2**32


def facts(scene: Scene, world: list[Thing]) -> list[tuple]:
    """The combinations that a scene shows, as `is_held_out` takes them."""
    names = [world[thing].singular for thing in scene.things]
    out = [("colour", name, colour) for name, colour in zip(names, scene.colours) if colour]
    if scene.background != "white":
        out += [("background", name, scene.background) for name in names]
    if scene.layout in POSITIONS:
        out.append(("position", *names, scene.layout))
    if scene.layout in COUNTS:
        out.append(("count", *names, scene.layout))
    if scene.layout in RELATIONS:
        out.append(("pair", *names))
    return out


def middles(scene: Scene) -> list[tuple[int, tuple[float, float]]]:
    """What is where: [(index into the scene's things, middle in shares of the side)]"""
    if scene.layout in RELATIONS:
        return list(enumerate(RELATIONS[scene.layout]))
    if scene.layout in COUNTS:
        return [(0, middle) for middle in GROUPS[scene.layout]]
    if scene.layout in POSITIONS:
        return [(0, POSITIONS[scene.layout])]
    return [(0, (0.5, 0.58 if scene.background in PLACES else 0.5))]


class Grammar:
    """Draws scenes at random, their captions and their pictures."""

    def __init__(self, drawings: emoji.Drawings, world: list[Thing] | None = None):
        self.drawings = drawings
        self.world = read_world() if world is None else world
        self.row = {(drawings.concepts[c], drawings.styles[s]): row
                    for row, (c, s) in enumerate(zip(drawings.concept.tolist(), drawings.style.tolist()))}
        held_out = emoji.read_held_out()
        self.all_styles = [[s for s in drawings.styles if (thing.drawing, s) in self.row] for thing in self.world]
        self.styles = [[s for s in styles if (thing.drawing, s) not in held_out]
                       for thing, styles in zip(self.world, self.all_styles)]
        self.backgrounds = [*emoji.COLOURS, *PLACES]
        self.newcomers = {line.strip().lower() for line in NEWCOMERS.read_text().splitlines()}

    # -- what is to be seen

    def scene(self, rng: random.Random) -> Scene:
        """A scene of which nothing is held out."""
        while True:
            scene = self.any_scene(rng)
            if self.is_drawable(scene) and not any(is_held_out(*fact) for fact in facts(scene, self.world)):
                return scene

    def held_out_scenes(self, rng: random.Random, kind: str, n: int) -> list[Scene]:
        """A scene of each of n held-out combinations of a kind, or of as many as a long search meets (there are 27
        counts); nothing else in a scene is held out."""
        found = {}
        for _ in range(5000 * n):
            scene = self.any_scene(rng)
            held_out = [fact for fact in facts(scene, self.world) if is_held_out(*fact)]
            others = sum(fact[0] not in (kind, held_out[0][0]) for fact in facts(scene, self.world)) if held_out else 1
            if self.is_drawable(scene) and [fact[0] for fact in held_out] == [kind] and not others:
                found.setdefault(held_out[0], replace(scene, names_style=False, big=False))
            if len(found) == n:
                break
        return list(found.values())

    def words(self) -> list[str]:
        """Every word of the trained captions, sorted; digits included."""
        texts = [name for thing in self.world for name in (thing.singular, thing.plural, *thing.synonyms)]
        texts += [text for part in (*PLACES.values(), PLAIN, FRAMES, *WHERE.values(), *PAIRS.values(), STYLE)
                  for text in part[TRAINED]]
        texts += [*OBJECT_COLOURS, *emoji.COLOURS, *chain(*OTHER_SPELLINGS.values()), *chain(*COUNTS.values())]
        texts += [*SMALL, *BIG, *NICE, *self.drawings.styles, "a", "an"]
        return sorted(set(re.findall(r"[a-z0-9'-]+", re.sub(r"{\w+}", " ", " ".join(texts)))))

    def any_scene(self, rng):
        kind = rng.choices(["whole", "position", "count", "pair"], [24, 14, 12, 50])[0]
        things = tuple(rng.sample(range(len(self.world)), 2 if kind == "pair" else 1))
        layout = {"whole": "whole", "position": rng.choice(list(POSITIONS)), "count": rng.choice(list(COUNTS)),
                  "pair": rng.choice(list(RELATIONS))}[kind]
        coloured = {"whole": 0.4, "position": 0.2, "count": 0.25, "pair": 0.25}[kind]
        colours = tuple(rng.choice(list(OBJECT_COLOURS)) if rng.random() < coloured else None for _ in things)
        background = "white"
        if rng.random() < {"whole": 0.4, "position": 0.15, "count": 0.15, "pair": 0.15}[kind]:
            background = rng.choice(list(PLACES) if rng.random() < 0.55 else list(emoji.COLOURS))
        styles = [s for s in self.drawings.styles if all(s in self.styles[thing] for thing in things)] or [""]
        style = rng.choice(styles if kind == "whole" else styles[:1])  # small things in one style are learnt sooner
        return Scene(things, colours, layout, background, style, names_style=kind == "whole" and rng.random() < 0.25,
                     big=kind == "whole" and rng.random() < 0.12)

    def is_drawable(self, scene):
        """Neither things that cannot be counted, nor things of the colour of what is behind them, nor without style."""
        behind = {"night": "black", "space": "black", "snow": "white", "grass": "green", "forest": "green"}
        behind = behind.get(scene.background, scene.background)
        countable = scene.layout not in COUNTS or self.world[scene.things[0]].plural
        return bool(scene.style and countable and behind not in scene.colours)

    # -- in words

    def noun(self, rng, scene, k, size="", plural=False):
        """A thing of a scene as (text, article with its space): ("small red apple", "a ")."""
        thing = self.world[scene.things[k]]
        name = thing.plural if plural else thing.singular
        if thing.synonyms and not plural and rng.random() < 0.3:
            name = rng.choice([s for s in thing.synonyms if not scene.colours[k] or s.split()[0] not in OBJECT_COLOURS]
                              or [name])
        adjectives = [size]
        if not size and rng.random() < 0.05:
            adjectives = [rng.choice(NICE)]
        if colour := scene.colours[k]:
            adjectives.append(rng.choice(OTHER_SPELLINGS.get(colour, [colour])))
        text = " ".join(filter(None, [*adjectives, name]))
        if plural or (not thing.plural and " of " not in name and name not in ("poop", "earth", "planet", "fish")):
            return text, ""
        return text, article(text)

    def caption(self, rng: random.Random, scene: Scene, wording: int = TRAINED) -> str:
        """One of many wordings of a scene, never a newcomer's prompt; with `wording=HELD_OUT`, one never trained on."""
        while True:
            text = self.any_caption(rng, scene, wording)
            if text not in self.newcomers:
                return text

    def any_caption(self, rng, scene, wording):
        # In a held-out wording one part is new, the one that says most; the others are as trained.
        pick = {part: lambda texts: rng.choice(texts[TRAINED]) for part in ("frame", "layout", "background")}
        if wording == HELD_OUT:
            part = ("layout" if scene.layout in POSITIONS or scene.layout in RELATIONS else
                    "background" if scene.background != "white" else "frame")
            pick[part] = lambda texts: rng.choice(texts[HELD_OUT])
        if scene.layout in RELATIONS:
            (x, a), (y, b) = self.noun(rng, scene, 0), self.noun(rng, scene, 1)
            bare = rng.random() < 0.2
            text = pick["layout"](PAIRS[scene.layout]).format(a=x if bare else a + x, b=y if bare else b + y)
            if rng.random() < 0.15:
                text = rng.choice(["a photo of ", "a picture of ", "an emoji of ", "a drawing of "]) + text
        else:
            size = rng.choice(BIG) if scene.big else ""
            if scene.layout in POSITIONS and (scene.layout == "middle" or rng.random() < 0.7):
                size = rng.choice(SMALL)
            x, a = self.noun(rng, scene, 0, size, plural=scene.layout in COUNTS)
            if scene.layout in COUNTS:
                x, a = f"{rng.choice(COUNTS[scene.layout])} {x}", ""
            text = pick["frame"](FRAMES).format(x=x, a_x=a + x)
            if scene.layout in POSITIONS:
                text = f"{text} {pick['layout'](WHERE[scene.layout])}".strip()
        if scene.background in PLACES:
            text = f"{text} {pick['background'](PLACES[scene.background])}"
        elif scene.background != "white" or "white" in scene.colours or rng.random() < 0.03:
            colour = rng.choice(OTHER_SPELLINGS.get(scene.background, [scene.background]))
            text = f"{text} {pick['background'](PLAIN)}".replace(" ,", ",")
            text = text.format(colour=colour, a_colour=article(colour) + colour)
        if scene.names_style:
            text = rng.choice(STYLE[TRAINED]).format(text=text, style=scene.style)
        return text

    # -- as a picture

    def draw(self, rng: random.Random, scene: Scene) -> np.ndarray:
        """(128, 128, 3) uint8."""
        picture = draw_background(rng, scene.background)
        size = 0.44 if scene.layout in RELATIONS else 0.42 if scene.layout in COUNTS else 0.38
        if scene.layout == "whole":
            size = (0.97 if scene.big else rng.uniform(0.78, 0.93)) * (0.8 if scene.background in PLACES else 1)
        flip = rng.random() < 0.5
        for k, (x, y) in middles(scene):
            rgba = self.drawings.rgba[self.row[self.world[scene.things[k]].drawing, scene.style]].numpy()
            if scene.colours[k]:
                rgba = recolour(rgba, OBJECT_COLOURS[scene.colours[k]])
            paste(rng, picture, rgba, x, y, size * rng.uniform(0.93, 1.05), flip)
        return np.asarray(picture)


def article(text: str) -> str:
    """The article with its space."""
    if text.startswith(("a ", "an ", "the ")):
        return ""
    return "an " if text[0] in "aeiou" and not text.startswith("unicorn") else "a "


# ---- pictures


def recolour(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Gives a drawing one colour and keeps its light and shade.

    The median brightness of its pixels becomes the colour; darker pixels go to black, brighter ones to white.
    """
    light = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    median = np.clip(np.median(light[rgba[..., 3] > rgba[..., 3].max() / 2]), 0.15, 0.9)
    colour = np.array(colour, dtype=np.float32)
    dark = np.clip(light / median, 0, 1)[..., None]
    bright = np.clip((light - median) / (1 - median), 0, 1)[..., None]
    rgb = colour * dark + (255 - colour) * 0.85 * bright
    return np.concatenate([rgb.round().astype(np.uint8), rgba[..., 3:]], axis=-1)


def paste(rng, picture, rgba, x, y, size, flip):
    """Puts a drawing on the picture, its middle near (x, y), in shares of the side; turned and moved a little."""
    image = Image.fromarray(rgba, "RGBA").convert("RGBa")  # colours times alpha, as they must be to be blended
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.gauss(0, 4), Image.Resampling.BICUBIC)
    side = round(size * SIZE)
    image = image.resize((side, side), Image.Resampling.BOX if side < 64 else Image.Resampling.BICUBIC, reducing_gap=2)
    image = image.convert("RGBA")
    left, top = (round(centre * SIZE - side / 2 + rng.gauss(0, 1.5)) for centre in (x, y))
    picture.paste(image, (left, top), image)


def draw_background(rng: random.Random, name: str) -> Image.Image:
    """A plain colour, or a simple place, drawn at twice the size."""
    if name not in PLACES:
        return Image.new("RGB", (SIZE, SIZE), emoji.COLOURS[name])
    n = 2 * SIZE
    top, bottom = {
        "sky": ((90, 175, 245), (190, 230, 255)), "grass": ((140, 205, 250), (215, 240, 255)),
        "beach": ((110, 195, 250), (205, 238, 255)), "sea": ((50, 150, 215), (10, 60, 130)),
        "night": ((10, 15, 60), (45, 55, 120)), "space": ((5, 5, 20), (20, 10, 40)),
        "snow": ((175, 205, 235), (225, 238, 250)), "forest": ((150, 215, 200), (205, 235, 190)),
        "sunset": ((110, 60, 140), (255, 165, 60)),
    }[name]
    shade = np.linspace(0, 1, n)[:, None, None]
    rows = np.array(top) * (1 - shade) + np.array(bottom) * shade
    picture = Image.fromarray(np.broadcast_to(rows, (n, n, 3)).round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    def blob(x, y, r, fill, stretch=1.0):
        draw.ellipse((x - r * stretch, y - r, x + r * stretch, y + r), fill=fill)

    horizon = n * rng.uniform(0.58, 0.7)
    if name == "sky":
        for _ in range(4):
            x, y = rng.uniform(0, n), rng.uniform(0, n)
            for k in (-1, 0, 1):
                blob(x + 18 * k, y - (6 if k == 0 else 0), 14, (250, 253, 255), 1.3)
    if name in ("grass", "beach", "snow"):
        ground = {"grass": (95, 185, 70), "beach": (240, 210, 140), "snow": (248, 250, 255)}[name]
        if name == "beach":
            draw.rectangle((0, horizon - 26, n, n), fill=(45, 140, 205))
        blob(n * rng.uniform(0.3, 0.7), horizon + 2 * n, 2 * n, ground, 1.2)
    if name == "grass":
        for _ in range(25):
            x, y = rng.uniform(0, n), rng.uniform(horizon + 14, n)
            draw.line((x, y, x + rng.uniform(-4, 4), y - 12), fill=(60, 150, 45), width=3)
    if name == "snow":
        for _ in range(30):
            blob(rng.uniform(0, n), rng.uniform(0, horizon), 4, (255, 255, 255))
    if name == "sea":
        for _ in range(12):
            blob(rng.uniform(0, n), rng.uniform(0, n), rng.uniform(3, 8), (150, 215, 245))
        blob(n / 2, 3.4 * n, 2.5 * n, (215, 195, 140))
    if name in ("night", "space"):
        for _ in range(26):
            blob(rng.uniform(0, n), rng.uniform(0, n if name == "space" else horizon), rng.uniform(1.5, 3.5),
                 (255, 255, 230))
    if name == "night":
        x = n * rng.choice([0.15, 0.85])
        blob(x, n * 0.15, 24, (255, 240, 180))
        blob(x + 10, n * 0.13, 21, top)
        blob(n * rng.uniform(0.3, 0.7), horizon + 2 * n, 2 * n, (20, 35, 40), 1.2)
    if name == "forest":
        for x in np.arange(-0.05, 1.1, 0.13) * n:
            x, peak, green = x + rng.uniform(-8, 8), n * rng.uniform(0.05, 0.25), rng.randrange(80, 115)
            draw.polygon((x, peak, x - 30, horizon + 20, x + 30, horizon + 20), fill=(25, green, 60))
        draw.rectangle((0, horizon, n, n), fill=(105, 150, 70))
    if name == "sunset":
        blob(n * rng.uniform(0.3, 0.7), horizon, 42, (255, 225, 120))
        draw.rectangle((0, horizon, n, n), fill=(70, 45, 95))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def main():
    grammar = Grammar(emoji.load_drawings(styles=STYLES))
    rng = random.Random(0)
    sheet = Image.new("RGB", (8 * (SIZE + 8), 10 * (SIZE + 40)), "white")
    draw = ImageDraw.Draw(sheet)
    for k in range(80):
        scene = grammar.scene(rng)
        x, y = k % 8 * (SIZE + 8), k // 8 * (SIZE + 40)
        sheet.paste(Image.fromarray(grammar.draw(rng, scene)), (x, y))
        words, lines = grammar.caption(rng, scene).split(), [""]
        for word in words:
            lines = [*lines, word] if len(lines[-1] + word) > 21 else [*lines[:-1], f"{lines[-1]} {word}".strip()]
        draw.text((x, y + SIZE), "\n".join(lines), fill="black", font_size=10)
    sheet.save(emoji.CACHE / "scenes.png")
    print(f"wrote {emoji.CACHE / 'scenes.png'}")


if __name__ == "__main__":
    main()
