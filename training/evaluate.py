"""How good is the embedded model? Deterministic: fixed prompts, fixed seeds, float32.

    python -m training.train judge        # the second judge, once
    python -m training.evaluate [--checkpoint data/emoji.safetensors] [--prompts 24]

Writes training/results/evaluation.md and sheets of pictures beside it. A picture is judged by the real rendering that
is nearest to it (L2), among those of *all* combinations of its kind, so that chance is known:

- `colour`: every thing in every colour and style, cut to what is on white and scaled alike, tells the thing; of its
  renderings, the one with the most similar shares of dark, middle and bright red, green and blue tells the colour.
- `position`: the same for the thing; the middle of what is on white is nearest to one of the nine places.
- `count`: two, three or four of every thing in every style, as whole pictures.
- `pair`: left and right, or top and bottom, are each nearest to one of all things; the split that fits better counts.
- `background`: every thing in every style, on every plain colour and in every place.

Beside it stands what a classifier sees that was trained on real renderings alone (`judge.py`), and what both see in
other real renderings of the same scenes: no model can be judged better than that. Intervals are Wilson's, 95%.
"""

import argparse
import math
import os
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from tqdm import tqdm

import model_loader
from pipeline import generate
from training import scenes
from training.judge import see, to_images
from training.probe import probe
from training.train import MODEL, ROOT, STORE, draw_scenes, load_grammar, load_stage, read_store

RESULTS = ROOT / "training" / "results"
STEPS, BATCH = 15, 20
KINDS = ("colour", "position", "count", "pair", "background")


def draw(prompts, models, tokenizer, cfg_scale, **settings):
    """Returns a uint8 picture (n, 128, 128, 3) for each prompt; picture k has seed k."""
    settings = {"sampler_name": "dpmpp_2m", "n_inference_steps": STEPS, "cfg_scale": cfg_scale, **settings}
    pictures = [generate(prompts[k : k + BATCH], models=models, tokenizer=tokenizer, seed=k, **settings)
                for k in tqdm(range(0, len(prompts), BATCH), desc="drawing", unit="batch", mininterval=10)]
    return np.concatenate(pictures)


def wilson(hits, n):
    """The 95% interval of a share (Wilson 1927)."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def small(pictures):
    """uint8 (n, h, w, 3) -> float (n, 3 * 32 * 32): what pictures are compared by"""
    images = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(images, 32).flatten(1)


def not_white(picture):
    """Where a picture (h, w, 3) differs from white -> (h, w)"""
    return np.abs(255 - picture.astype(int)).max(axis=2) > 40


def box(picture):
    """(left, top, right, bottom) of what differs from white, the whole picture where nothing does."""
    mask = Image.fromarray(not_white(picture).astype(np.uint8))
    return mask.getbbox() or (0, 0, *mask.size)


def palette(pictures):
    """Ten quantiles of the red, green and blue of what is on white -> (n, 30), the same however a thing is turned."""
    found = []
    for picture in pictures:
        pixels = picture[not_white(picture)]
        pixels = pixels if len(pixels) else picture.reshape(-1, 3)
        found.append(np.quantile(pixels, np.linspace(0.05, 0.95, 10), axis=0))
    return torch.tensor(np.stack(found)).flatten(1).float() / 255


def cut(pictures):
    """What is on white, scaled to 32x32 -> (n, 3 * 32 * 32)"""
    parts = [Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX, box(picture)) for picture in pictures]
    return small(np.stack([np.asarray(part) for part in parts]))


class Judge:
    """Knows the real renderings of all combinations of a kind; they are drawn when a kind is first asked for."""

    def __init__(self, grammar):
        self.grammar = grammar
        self.known = {}

    def renderings(self, kind):
        """Returns answers, a list of tuples such as (thing, colour), and the features (n, 3072) of their renderings."""
        if kind not in self.known:
            rng, n = random.Random(0), len(self.grammar.world)
            options = {
                "thing": [("whole", None, "white")],
                "colour": [("whole", colour, "white") for colour in (None, *scenes.OBJECT_COLOURS)],
                "count": [(count, None, "white") for count in scenes.COUNTS],
                "background": [("whole", None, background) for background in self.grammar.backgrounds],
            }[kind]
            drawn = []
            for thing in range(n):
                for style in self.grammar.all_styles[thing]:
                    for layout, colour, background in options:
                        scene = scenes.Scene((thing,), (colour,), layout, background, style)
                        if layout in scenes.COUNTS and not self.grammar.world[thing].plural:
                            continue
                        answer = {"thing": (thing,), "colour": (thing, colour), "count": (thing, layout),
                                  "background": (thing, background)}[kind]
                        times = 4 if kind == "background" else 2  # whole pictures are not cut, so more must be known
                        drawn += [(answer, self.grammar.draw(rng, scene)) for _ in range(times)]
            pictures = np.stack([picture for _, picture in drawn])
            features = cut(pictures) if kind in ("thing", "colour") else small(pictures)
            self.known[kind] = [answer for answer, _ in drawn], features
            if kind == "colour":
                self.palettes = palette(pictures)
        return self.known[kind]

    def nearest(self, kind, features):
        """The answer of the nearest rendering for each row of features, and its distance."""
        answers, known = self.renderings(kind)
        distance, row = torch.cdist(features, known).min(dim=1)
        return [answers[k] for k in row.tolist()], distance

    def see(self, kind, pictures):
        """What is in the pictures, as `answer` gives it for scenes."""
        if kind == "pair":
            return self.see_pairs(pictures)
        if kind == "colour":
            return self.see_colours(pictures)
        if kind != "position":
            return self.nearest(kind, small(pictures))[0]
        middles = torch.tensor([((b[0] + b[2]) / 256, (b[1] + b[3]) / 256) for b in map(box, pictures)])
        places = torch.tensor(list(scenes.POSITIONS.values()))
        where = [list(scenes.POSITIONS)[k] for k in torch.cdist(middles, places).argmin(dim=1).tolist()]
        return [(thing, place) for (thing,), place in zip(self.nearest("thing", cut(pictures))[0], where)]

    def see_colours(self, pictures):
        """(thing, colour): of the renderings of the thing that the nearest one shows, the one with the same palette."""
        answers, _ = self.renderings("colour")
        things = torch.tensor([thing for thing, _ in self.nearest("colour", cut(pictures))[0]])
        distance = torch.cdist(palette(pictures), self.palettes)
        distance[things[:, None] != torch.tensor([thing for thing, _ in answers])] = math.inf
        return [answers[row] for row in distance.argmin(dim=1).tolist()]

    def see_pairs(self, pictures):
        """(thing, thing, axis): left and right, or top and bottom."""
        half = pictures.shape[1] // 2
        seen = []
        for first, second in [(pictures[:, :, :half], pictures[:, :, half:]), (pictures[:, :half], pictures[:, half:])]:
            (a, distance_a), (b, distance_b) = (self.nearest("thing", cut(part)) for part in (first, second))
            seen.append((a, b, distance_a + distance_b))
        (left, right, across), (top, bottom, down) = seen
        return [(left[k] + right[k] + ("across",)) if across[k] < down[k] else (top[k] + bottom[k] + ("down",))
                for k in range(len(pictures))]


def answer(kind, scene):
    """What the judge should see in a scene."""
    if kind == "pair":
        swapped = scene.layout in ("right of", "below")
        things = scene.things[::-1] if swapped else scene.things
        return (*things, "across" if scene.layout in ("left of", "right of") else "down")
    return scene.things[0], {"colour": scene.colours[0], "background": scene.background}.get(kind, scene.layout)


def plain(scene, kind):
    """The scene with nothing but what its kind is about, so that the judge knows all that is left."""
    colours = scene.colours if kind == "colour" else (None,) * len(scene.things)
    return replace(scene, colours=colours, background=scene.background if kind == "background" else "white",
                   layout="whole" if kind in ("colour", "background") else scene.layout, names_style=False, big=False)


def held_out_scenes(grammar, kind, n):
    """A plain scene of each of n held-out combinations, or of as many as there are; always the same ones."""
    return [plain(scene, kind) for scene in grammar.held_out_scenes(random.Random(kind), kind, n)]


def table_row(name, hits, *shares):
    """hits: booleans, a prompt each; shares: of other judges, for columns of their own"""
    low, high = wilson(sum(hits), len(hits))
    return (f"| {name} | {len(hits)} | {np.mean(hits):.0%} | {low:.0%} to {high:.0%} |"
            + "".join(f" {np.mean(share):.0%} |" for share in shares))


def questions(kind):
    """What is asked of the pictures of a kind: {row of the table: function of (what is seen, what is right)}."""
    if kind == "pair":
        return {"pair, both things, in any order": lambda seen, right: sorted(seen[:2]) == sorted(right[:2]),
                "pair, each in its place": lambda seen, right: seen == right}
    return {f"thing × {kind}, the thing": lambda seen, right: seen[0] == right[0],
            f"thing × {kind}, both": lambda seen, right: seen == right}


HEAD = """\
| prompts | right | 95% interval | real renderings | by the classifier | real renderings, by the classifier |
|---|---|---|---|---|---|---|"""


def evaluate(models, tokenizer, grammar, n, cfg_scale):
    """Returns the Markdown of all tables."""
    nearest, classifier, rng = Judge(grammar), load_stage("judge", grammar)["judge"], random.Random(0)
    judges = nearest.see, partial(see, classifier, grammar)
    lines, wordings = [f"| held-out combinations {HEAD}"], [f"| the same in held-out wordings {HEAD}"]
    shown, drawn = [], []
    for kind in KINDS:
        chosen = held_out_scenes(grammar, kind, n)
        right = [answer(kind, scene) for scene in chosen]
        real = np.stack([grammar.draw(rng, scene) for scene in chosen])
        seen_in_real = [judge(kind, real) for judge in judges]
        for table, wording in ((lines, scenes.TRAINED), (wordings, scenes.HELD_OUT)):
            prompts = [grammar.caption(rng, scene, wording) for scene in chosen]
            pictures = draw(prompts, models, tokenizer, cfg_scale)
            all_seen = [seen for judge, in_real in zip(judges, seen_in_real)
                        for seen in (judge(kind, pictures), in_real)]
            for row, is_right in questions(kind).items():
                table.append(table_row(row, *([is_right(a, b) for a, b in zip(seen, right)] for seen in all_seen)))
            if wording == scenes.TRAINED:
                shown += list(zip(pictures, prompts))[:12]
                drawn.append(pictures)
    save_sheet("held-out.jpg", shown, 12)

    plain_scenes = [scenes.Scene((thing,), (None,)) for thing in range(len(grammar.world))]
    prompts = [f"{scenes.article(t.singular) if t.plural else ''}{t.singular}" for t in grammar.world]
    pictures = draw(prompts, models, tokenizer, cfg_scale)
    real = np.stack([grammar.draw(rng, scene) for scene in plain_scenes])
    hits = [[thing == scene.things[0] for (thing, _), scene in zip(judge("position", found), plain_scenes)]
            for judge in judges for found in (pictures, real)]
    lines.append(table_row("every thing, plain", *hits))
    save_sheet("things.jpg", list(zip(pictures, prompts)), 14)
    lines.append(style_row(models, tokenizer, grammar, cfg_scale))

    newcomers = scenes.NEWCOMERS.read_text().splitlines()
    save_sheet("newcomers.jpg", list(zip(draw(newcomers, models, tokenizer, cfg_scale), newcomers)), 10)
    told = ", ".join(f"{name} {share:.1%}" for name, share in probe(grammar, models["clip"], tokenizer).items())
    return "\n".join([*lines, "", *wordings, "", *more(models, tokenizer, grammar, nearest, cfg_scale, n), "",
                      from_training(np.concatenate(drawn), models, grammar), "",
                      f"Read out of the context by linear probes, on held-out combinations: {told}."])


def style_row(models, tokenizer, grammar, cfg_scale):
    """Drawings that no step has seen, by their style's name: is the nearest of all drawings the right one?"""
    pairs = [(thing, style) for thing, styles in enumerate(grammar.all_styles)
             for style in styles if style not in grammar.styles[thing]]
    prompts = [f"{scenes.article(grammar.world[t].singular)}{grammar.world[t].singular}, {style} style"
               for t, style in pairs]
    pictures = draw(prompts, models, tokenizer, cfg_scale)
    rng = random.Random(0)
    known = [(t, s) for t, styles in enumerate(grammar.all_styles) for s in styles]
    features = cut(np.stack([grammar.draw(rng, scenes.Scene((t,), (None,), style=s)) for t, s in known]))
    nearest = torch.cdist(cut(pictures), features).argmin(dim=1).tolist()
    hits = [known[k] == pair for k, pair in zip(nearest, pairs)]
    return table_row("held-out style of a known thing", hits) + " | | |"


def from_training(pictures, models, grammar):
    """A line on how far pictures are from the nearest of the scenes that were trained on."""
    stored = read_store(STORE)[1].float().flatten(1)
    rng = random.Random(-4)
    fresh = np.stack([grammar.draw(rng, grammar.scene(rng)) for _ in range(len(pictures))])
    far = [torch.cdist(torch.cat([models["encoder"](part, torch.zeros(len(part), 4, 16, 16)).flatten(1)
                                  for part in to_images(torch.tensor(found)).split(BATCH)]), stored).min(dim=1).values
           for found in (pictures, fresh)]
    return (f"Copies: the {len(pictures)} pictures of held-out combinations are {far[0].mean():.1f} from the nearest "
            f"of {len(stored)} trained scenes on average, at least {far[0].min():.1f} (L2 of latents); fresh real "
            f"scenes {far[1].mean():.1f}, at least {far[1].min():.1f}.")


def more(models, tokenizer, grammar, judge, cfg_scale, n):
    """Lines on guidance, image to image, variety and the autoencoder."""
    rng = random.Random(1)
    chosen = held_out_scenes(grammar, "colour", n)[:16]
    prompts = [grammar.caption(rng, scene) for scene in chosen]
    lines = ["| cfg_scale | thing × colour, both | mean deviation of the border from white, grey levels |",
             "|---|---|---|"]
    for scale in (1.0, 2.0, 4.0, 7.5):
        pictures = draw(prompts, models, tokenizer, scale)
        right = np.mean([a == answer("colour", s) for a, s in zip(judge.see("colour", pictures), chosen)])
        border = np.concatenate([pictures[:, :2].reshape(-1), pictures[:, -2:].reshape(-1)]).astype(float)
        lines.append(f"| {scale:g} | {right:.0%} | {np.abs(255 - border).mean():.1f} |")

    lines += ["", "| strength | PSNR to the autoencoder's round trip, dB | the new prompt's thing |", "|---|---|---|"]
    things = random.Random(2).sample(range(len(grammar.world)), 8)
    inputs = [grammar.draw(random.Random(k), scenes.Scene((thing,), (None,))) for k, thing in enumerate(things)]
    images = to_images(torch.from_numpy(np.stack(inputs)))
    trip = round_trip(images, models)
    for strength in (0.2, 0.5, 0.8):
        pictures = np.stack([draw([grammar.world[things[k - 1]].singular], models, tokenizer, cfg_scale,
                                  input_image=picture, strength=strength)[0] for k, picture in enumerate(inputs)])
        error = ((to_images(torch.from_numpy(pictures)) - trip) ** 2).mean(dim=(1, 2, 3))
        seen = judge.nearest("thing", cut(pictures))[0]
        right = np.mean([a == (things[k - 1],) for k, a in enumerate(seen)])
        lines.append(f"| {strength} | {(10 * (4 / error).log10()).mean():.1f} | {right:.0%} |")

    pictures = small(draw(["a cat", "a car", "a tree", "a star"] * 8, models, tokenizer, cfg_scale))
    pairs = [torch.pdist(pictures[k::4]).mean().item() for k in range(4)]
    real = []
    for name in ("cat", "car", "tree", "star"):
        thing = [t.singular for t in grammar.world].index(name)
        drawn = [grammar.draw(rng, scenes.Scene((thing,), (None,), style=rng.choice(grammar.styles[thing])))
                 for _ in range(8)]
        real.append(torch.pdist(small(np.stack(drawn))).mean().item())
    images = draw_scenes(grammar, random.Random(-3), 100)
    error = ((round_trip(images, models) - images) ** 2).mean(dim=(1, 2, 3))
    colours = torch.tensor(list(scenes.emoji.COLOURS.values()))[:, :, None, None].expand(-1, -1, 128, 128) / 127.5 - 1
    deviation = (round_trip(colours, models) - colours).abs().mean(dim=(1, 2, 3)) * 127.5
    psnr = (10 * (4 / error).log10()).mean()
    variety = (f"Variety: eight seeds of a prompt are {np.mean(pairs):.2f} apart on average (L2 at 32x32), "
               f"eight real scenes {np.mean(real):.2f}.")
    autoencoder = (f"Autoencoder: PSNR {psnr:.2f} dB on 100 fresh scenes; plain colours come back within "
                   f"{deviation.max():.1f} grey levels on average, white within {deviation[0]:.1f}.")
    return [*lines, "", variety, "", autoencoder]


def round_trip(images, models):
    """Images in [-1, 1], encoded to the mean, decoded and rounded to 8 bits."""
    decoded = [models["decoder"](models["encoder"](part, torch.zeros(len(part), 4, 16, 16)))
               for part in images.split(BATCH)]
    return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def write(name, save):
    """Writes a file in results/, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    save(RESULTS / f".{name}")
    os.replace(RESULTS / f".{name}", RESULTS / name)


def save_sheet(name, shown, columns, side=112):
    """Pictures above their prompts."""
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 38)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (picture, prompt) in enumerate(shown):
        x, y = k % columns * (side + 4), k // columns * (side + 38)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        lines = [""]
        for word in prompt.split():
            lines = [*lines, word] if len(lines[-1] + word) > 22 else [*lines[:-1], f"{lines[-1]} {word}".strip()]
        pen.text((x + 1, y + side), "\n".join(lines[:3]), fill="black", font_size=9, spacing=1)
    write(name, lambda path: sheet.save(path, format="JPEG", quality=82))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=24, help="of each kind of held-out combination, at most")
    parser.add_argument("--cfg-scale", type=float, help="(the model's own)")
    arguments = parser.parse_args()
    models = model_loader.preload_models_from_standard_weights(arguments.checkpoint, "cpu", "float32")
    cfg_scale = models["diffusion"].config.cfg_scale if arguments.cfg_scale is None else arguments.cfg_scale
    tables = evaluate(models, model_loader.load_tokenizer(), load_grammar(), arguments.prompts, cfg_scale)
    text = (f"# `{arguments.checkpoint.name}`, {arguments.checkpoint.stat().st_size / 1e6:.1f} MB\n\n"
            f"By `python -m training.evaluate`: dpmpp_2m, {STEPS} steps, seeds from 0, cfg_scale "
            f"{cfg_scale:g} where none is named.\nHow a picture is judged stands at the top of "
            f"`training/evaluate.py`.\n\n{tables}\n")
    write("evaluation.md", lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
