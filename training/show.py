"""What can be taught to the model in the box, shown and measured: before and after, with fixed seeds.

    python -m training.emoji                # the drawings
    python -m training.show                 # everything, an hour or two on two cores
    python -m training.show style mix       # some of it

- `style`: a LoRA of an icon set that it never saw (`ink`, Fluent's black line art), from 24 pictures
- `object`: a LoRA of a thing that it does not know (a dodo), from twelve

  both with 24 pictures beside them that the model drew itself, lest it forget (prior preservation, arXiv 2208.12242)
- `inversion`: the same thing as a textual inversion
- `edges`: a ControlNet on edges
- `mix`: the two LoRAs at scales from -1 to 2, and together

Writes data/loras/, data/embeddings/, data/controlnets/ (a result that exists is not trained again), and sections and
sheets to training/results/. A picture is judged by the real drawing nearest to it (L2 at 32x32, both cut to what is on
the plain background), among those of all concepts in all styles or in one, mirrored too, so that chance is known. Line
art has no colours: a picture counts as ink if at most a twentieth of what is drawn on it has.
"""

import argparse
import functools
import random
import re
import shutil
from contextlib import ExitStack

import cv2
import numpy as np
import torch
from PIL import Image

import model_loader
from extensions.controlnet import Controlled, canny, load_controlnet
from extensions.emphasis import encode_weighted
from extensions.lora import lora as with_lora
from extensions.textual_inversion import load_embedding
from pipeline import generate
from training import controlnet, emoji, evaluate, lora, scenes, teaching, textual_inversion

INK = ("fluent-emoji-high-contrast", "1.2.6")
DODO = "1f9a4"
FOLDERS = emoji.CACHE / "taught"
DATA = model_loader.ROOT / "data"
LEARNT = list(emoji.COLOURS)[:7]  # backgrounds that the dodo is shown on; the other four are for the test
SETTINGS = {"sampler_name": "dpmpp_2m", "n_inference_steps": 15}
LORA = ["--learning-rate", "2e-3", "--rank", "4", "--networks", "unet", "text"]
STEPS = {"style": 400, "object": 400, "inversion": 1500, "edges": 600}


class Class:
    """The model, the drawings, and the concepts whose names it knows."""

    def __init__(self, checkpoint, cfg_scale, steps, n_prompts):
        self.checkpoint = checkpoint or model_loader.find_checkpoint()
        self.models = model_loader.preload_models_from_standard_weights(self.checkpoint, "cpu", "float32")
        self.tokenizer = model_loader.load_tokenizer()
        self.cfg_scale, self.steps, self.n_prompts = cfg_scale, steps, n_prompts
        known = emoji.load_drawings()
        concepts = emoji.read_concepts()
        ink = emoji.read_icons(emoji.fetch(*INK, emoji.CACHE))
        dodo = emoji.read_icons(emoji.fetch(*emoji.STYLES["noto"], emoji.CACHE))
        new = [emoji.render(emoji.svg(ink[0], ink[1][concept.code])) for concept in concepts]
        new.append(emoji.render(emoji.svg(dodo[0], dodo[1][DODO])))
        n = len(concepts)
        self.drawings = emoji.Drawings(
            torch.cat([known.rgba, torch.from_numpy(np.stack(new))]),
            torch.cat([known.concept, torch.arange(n + 1)]),
            torch.cat([known.style, torch.full((n,), len(known.styles)), torch.tensor([known.styles.index("noto")])]),
            [*known.concepts, "dodo"], [*known.styles, "ink"])
        self.grammar = scenes.Grammar(self.drawings, [scenes.Thing(name, name, "", ()) for name in
                                                      self.drawings.concepts])
        self.names = self.find_names()
        self.features = cut_drawings(self.drawings.rgba)

    def find_names(self):
        """{concept: what the model calls it}, by its words or, for the first model, its list of concepts."""
        words = self.models["clip"].config.words
        if words:
            return {thing.drawing: thing.singular for thing in scenes.read_world()}
        return {name: name for name in self.drawings.concepts[:150]}

    def draw(self, prompts, context=None, models=None):
        """A picture for each prompt, or row of a context; picture k has seed k."""
        drawn, batch = [], evaluate.BATCH
        for k in range(0, len(prompts), batch):
            rows = {"prompt": prompts[k : k + batch]}
            if context is not None:
                conds, unconds = context.chunk(2)
                rows = {"context": torch.cat([conds[k : k + batch], unconds[k : k + batch]])}
            images = generate(**rows, models=models or self.models, tokenizer=self.tokenizer, seed=k,
                              cfg_scale=self.cfg_scale, **SETTINGS)
            drawn.append(images.reshape(-1, *images.shape[-3:]))
        return np.concatenate(drawn)

    def see(self, images, style=None):
        """[(concept, background colour)] of the nearest drawing (of a style), one a picture."""
        seen = []
        for image in images:
            distances, behind = self.compare(image)
            if style is not None:
                distances[self.drawings.style.numpy() != self.drawings.styles.index(style)] = np.inf
            colours = np.array(list(emoji.COLOURS.values()))
            colour = list(emoji.COLOURS)[((colours - behind) ** 2).sum(axis=1).argmin()]
            seen.append((self.drawings.concepts[self.drawings.concept[distances.argmin()]], colour))
        return seen

    def rank(self, images, concept):
        """The median place of a concept's nearest drawing among all drawings, from 1 on."""
        places = []
        for image in images:
            order = self.drawings.concept.numpy()[self.compare(image)[0].argsort()]
            places.append(1 + (order == self.drawings.concepts.index(concept)).argmax())
        return int(np.median(places))

    def compare(self, image):
        """Squared distances (drawings,) of a picture to all of them, mirrored or not, and the colour behind it."""
        border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)])
        behind = np.median(border, axis=0)
        different = np.abs(image - behind).max(axis=2) > 40
        box = Image.fromarray(different.astype(np.uint8)).getbbox() or (0, 0, *image.shape[1::-1])
        part = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX, box), np.float32)
        on_it = self.features[..., :3] + behind * (1 - self.features[..., 3:])
        return ((on_it - part) ** 2).sum(axis=(1, 2, 3)).reshape(2, -1).min(axis=0), behind

    def train(self, command, folder, name, part, *options):
        """Trains by the command that anybody would use, unless the result is there already."""
        output = {lora: "loras", textual_inversion: "embeddings", controlnet: "controlnets"}[command]
        path = DATA / output / f"{name}.safetensors"
        if not path.exists():
            flag = "--token" if command is textual_inversion else "--name"
            command.main([str(folder), flag, name, "--checkpoint", str(self.checkpoint), "--device", "cpu",
                          "--sample-cfg-scale", str(self.cfg_scale), "--steps", str(self.steps or STEPS[part]),
                          *options])
        return path

    def old_prompts(self):
        """Concepts in the styles that the model knows, and their prompts."""
        asked = self.known_things()[: self.n_prompts]
        return [concept for concept, _ in asked], [prompt for _, prompt in asked]

    @functools.cached_property
    def own_pictures(self):
        """24 (picture, prompt) as the model draws them, of other concepts as far as there are."""
        prompts = [prompt for _, prompt in self.known_things()[-24:]]
        return list(zip(self.draw(prompts), prompts))

    def known_things(self):
        """[(concept, its prompt in a style that the model knows)], shuffled"""
        rng = random.Random(1)
        return [(concept, f"{self.names[concept]}, {rng.choice(scenes.STYLES)} style")
                for concept in rng.sample(sorted(self.names), len(self.names))]


def cut_drawings(rgba):
    """(n, 128, 128, 4) -> (2 n, 32, 32, 4) float32, cut to what is drawn, colours times alpha; then all mirrored"""
    parts = []
    for drawing in rgba.numpy():
        image = Image.fromarray(drawing, "RGBA")
        part = np.asarray(image.convert("RGBa").resize((32, 32), Image.Resampling.BOX, image.getbbox()), np.float32)
        parts.append(np.concatenate([part[..., :3], part[..., 3:] / 255], axis=-1))
    parts = np.stack(parts)
    return np.concatenate([parts, parts[:, :, ::-1]])


def is_ink(image):
    """Whether next to nothing of what is drawn on white has a colour."""
    drawn = image.min(axis=2) < 200
    return np.mean(np.ptp(image[drawn].astype(int), axis=1) > 60) <= 0.05 if drawn.any() else False


def fill(name, pairs, controls=False):
    """Writes (picture, caption) as a folder to learn from, with their edges if asked for; returns its path."""
    folder = FOLDERS / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "control").mkdir(parents=True)
    for k, (picture, caption) in enumerate(pairs):
        Image.fromarray(picture).save(folder / f"{k:04}.png")
        (folder / f"{k:04}.txt").write_text(caption)
        if controls:
            Image.fromarray(canny(picture)).save(folder / "control" / f"{k:04}.png")
    return folder


def share(hits):
    low, high = evaluate.wilson(sum(hits), len(hits))
    return f"{np.mean(hits):.0%} ({low:.0%} to {high:.0%})"


def compare(label, before, after):
    return f"| {label} | {share(before)} | {share(after)} |"


def before_and_after(name, rows):
    """A sheet of pairs: (prompt, pictures before, pictures after), the prompt of each under it."""
    shown = [(image, f"{when}: {prompt}") for prompts, before, after in rows
             for when, images in (("before", before), ("after", after)) for image, prompt in zip(images, prompts)]
    evaluate.save_sheet(f"taught-{name}.jpg", shown, len(rows[0][0]))


def draw_with_lora(room, path, name, prompts):
    """Draws prompts and old ones without a LoRA and with it, and writes their sheet.

    Returns ((before, after) of the prompts, (before, after) of the old ones, the concepts of these).
    """
    old, old_prompts = room.old_prompts()
    before, old_before = room.draw(prompts), room.draw(old_prompts)
    with with_lora(room.models, path):
        after, old_after = room.draw(prompts), room.draw(old_prompts)
    before_and_after(name, [(prompts[:10], before[:10], after[:10]),
                            (old_prompts[:10], old_before[:10], old_after[:10])])
    return (before, after), (old_before, old_after), old


# ---- the parts: each trains, draws before and after, and returns the lines of its section


def teach_style(room):
    rng = random.Random(0)
    chosen = rng.sample(sorted(room.names), 24 + room.n_prompts)
    learnt, asked = chosen[:24], chosen[24:]
    number = {name: k for k, name in enumerate(room.drawings.concepts)}

    def picture(concept):
        return room.grammar.draw(rng, scenes.Scene((number[concept],), (None,), style="ink"))

    taught = [(picture(concept), f"{room.names[concept]}, ink style") for concept in learnt]
    folder = fill("ink", taught + room.own_pictures)
    path = room.train(lora, folder, "ink", "style", *LORA)
    prompts = [f"{room.names[concept]}, ink style" for concept in asked]
    new_drawn, old_drawn, old = draw_with_lora(room, path, "style", prompts)
    real = [np.mean([is_ink(room.grammar.draw(rng, scenes.Scene((number[concept],), (None,), style=style)))
                     for concept in asked]) for style in ("ink", "noto")]
    return [f"Learnt from {len(learnt)} drawings; asked for {len(asked)} other concepts in that style. "
            f"{path.stat().st_size / 1e6:.2f} MB. Of real drawings of these {real[0]:.0%} in ink count as ink, "
            f"{real[1]:.0%} in the style noto.", "", "| | before | after |", "|---|---|---|",
            compare("new concepts, in ink", *([is_ink(image) for image in drawn] for drawn in new_drawn)),
            compare("new concepts, the nearest drawing in ink is of this concept",
                    *([s[0] == name for s, name in zip(room.see(drawn, "ink"), asked)] for drawn in new_drawn)),
            compare("old prompts, in ink", *([is_ink(image) for image in drawn] for drawn in old_drawn)),
            compare("old prompts, the nearest drawing is of their concept",
                    *([s[0] == name for s, name in zip(room.see(drawn), old)] for drawn in old_drawn))]


def dodos(room, word):
    """Twelve (picture, caption) of the dodo, called by a word, on seven backgrounds."""
    rng, number = random.Random(0), room.drawings.concepts.index("dodo")
    return [(room.grammar.draw(rng, scenes.Scene((number,), (None,), background=colour, style="noto")),
             f"a {word} on a {colour} background" if colour != "white" else f"a {word}")
            for colour in [*LEARNT, *["white"] * 5]]


def ask_for_dodos(word, n):
    """n prompts with backgrounds that it was not shown on, and those backgrounds."""
    unseen = [colour for colour in emoji.COLOURS if colour not in LEARNT]
    colours = [unseen[k % len(unseen)] for k in range(n)]
    return [f"a {word} on a {colour} background" for colour in colours], colours


def judge_dodos(room, before, after, colours):
    seen = [room.see(drawn) for drawn in (before, after)]
    places = " | ".join(str(room.rank(drawn, "dodo")) for drawn in (before, after))
    return ["| | before | after |", "|---|---|---|",
            compare("the nearest drawing is the dodo", *([s[0] == "dodo" for s in part] for part in seen)),
            f"| median place of the dodo among {len(room.drawings.rgba):,} drawings | {places} |",
            compare("on the background asked for", *([s[1] == c for s, c in zip(part, colours)] for part in seen))]


def teach_object(room):
    folder = fill("dodo", dodos(room, "dodo") + room.own_pictures)
    path = room.train(lora, folder, "dodo", "object", *LORA)
    prompts, colours = ask_for_dodos("dodo", room.n_prompts)
    drawn, old_drawn, old = draw_with_lora(room, path, "object", prompts)
    return [f"Learnt from 12 pictures on {len(LEARNT)} backgrounds; asked for on the other four. "
            f"{path.stat().st_size / 1e6:.2f} MB.", "", *judge_dodos(room, *drawn, colours),
            compare("old prompts, the nearest drawing is of their concept",
                    *([s[0] == name for s, name in zip(room.see(images), old)] for images in old_drawn))]


def teach_inversion(room):
    folder = fill("my-dodo", dodos(room, "my-dodo"))
    path = room.train(textual_inversion, folder, "my-dodo", "inversion", "--init", "bird", "--vectors", "8",
                      "--learning-rate", "2e-2")
    name, vectors = load_embedding(path)
    prompts, colours = ask_for_dodos(name, room.n_prompts)
    birds = [prompt.replace(name, "bird") for prompt in prompts]
    before = room.draw(birds)
    context = encode_weighted(prompts, [""] * len(prompts), room.models["clip"], room.tokenizer, {name: vectors})
    after = room.draw(prompts, context)
    evaluate.save_sheet("taught-inversion.jpg", [*zip(before[:10], birds), *zip(after[:10], prompts)], 10)
    return ["Eight vectors that began as 'bird' (before: that word). Nothing else changes, so nothing is forgotten. "
            f"{path.stat().st_size:,} bytes.", "", *judge_dodos(room, before, after, colours)]


def teach_edges(room):
    rng = random.Random(0)
    numbers = [k for k, name in enumerate(room.drawings.concepts) if name in room.names]

    def example(styles):
        while True:
            scene = scenes.Scene((rng.choice(numbers),), (None,), style=rng.choice(styles))
            if scene.style in room.grammar.all_styles[scene.things[0]]:
                return room.grammar.draw(rng, scene), room.names[room.drawings.concepts[scene.things[0]]]

    folder = fill("edges", [example(scenes.STYLES) for _ in range(400)], controls=True)
    path = room.train(controlnet, folder, "edges", "edges", "--learning-rate", "1e-3", "--batch", "8", "--float8")
    network = load_controlnet(path, "cpu", "float32", base=room.models)
    tests = [example(["blob", "firefox"]) for _ in range(room.n_prompts)]
    prompts, edges = [prompt for _, prompt in tests], [canny(picture) for picture, _ in tests]
    before, after = room.draw(prompts), []
    for k in range(0, len(tests), evaluate.BATCH):
        led = Controlled(room.models["diffusion"], [(network, edges[k : k + evaluate.BATCH], 1.0)])
        after.append(room.draw(prompts[k : k + evaluate.BATCH], models=room.models | {"diffusion": led}))
    after = np.concatenate(after)
    shown = [(image, f"{label}: {prompt}") for label, images in
             (("edges", edges), ("uncontrolled", before), ("controlled", after)) for image, prompt in
             zip(images[:10], prompts)]
    evaluate.save_sheet("taught-edges.jpg", shown, 10)
    lines = [f"Learnt from 400 pictures in the four known styles; asked for edges of {len(tests)} drawings of two "
             f"sets that neither model nor ControlNet saw. {path.stat().st_size / 1e6:.2f} MB.", "",
             "| edges within 2 pixels | uncontrolled | controlled |", "|---|---|---|"]
    found = [np.mean([compare_edges(edge, image) for edge, image in zip(edges, drawn)], axis=0)
             for drawn in (before, after)]
    return [*lines, f"| precision: of the edges drawn, there in the control picture | {found[0][0]:.0%} | "
                    f"{found[1][0]:.0%} |",
            f"| recall: of the control picture's edges, drawn | {found[0][1]:.0%} | {found[1][1]:.0%} |"]


def compare_edges(edges, image):
    """(precision, recall) of a picture's edges against those asked for, within 2 pixels."""
    asked, drawn = edges[..., 0] > 0, canny(image)[..., 0] > 0
    near = [cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0 for mask in (asked, drawn)]
    return (drawn & near[0]).sum() / max(drawn.sum(), 1), (asked & near[1]).sum() / max(asked.sum(), 1)


def mix(room):
    """A sheet of the style at seven scales, and of both LoRAs at three each."""
    ink, dodo = DATA / "loras" / "ink.safetensors", DATA / "loras" / "dodo.safetensors"
    concept = room.names[sorted(room.names)[0]]

    def draw(prompt, *added):
        with ExitStack() as stack:
            for path, scale in added:
                stack.enter_context(with_lora(room.models, path, scale))
            return room.draw([prompt])[0]

    scales = [-1, -0.5, 0, 0.5, 1, 1.5, 2]
    shown = [(draw(f"{concept}, ink style", (ink, scale)), f"{concept}, ink style <lora:ink:{scale}>")
             for scale in scales]
    shown += [(draw("a dodo", (dodo, scale)), f"a dodo <lora:dodo:{scale}>") for scale in scales]
    shown += [(draw("a dodo, ink style", (dodo, 1), (ink, scale)),
               f"a dodo, ink style <lora:dodo:1> <lora:ink:{scale}>") for scale in scales]
    evaluate.save_sheet("taught-mix.jpg", shown, len(scales))
    return ["Scales from -1 to 2, of each alone and of the second beside the first at 1: taught-mix.jpg"]


PARTS = {"style": teach_style, "object": teach_object, "inversion": teach_inversion, "edges": teach_edges, "mix": mix}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART",
                        help=f"{', '.join(PARTS)} (all of them)")
    parser.add_argument("--checkpoint", help="the model (the newest in data/)")
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="of each training, instead of the part's own number")
    parser.add_argument("--prompts", type=int, default=40, help="for each figure (%(default)s)")
    arguments = parser.parse_args()
    room = Class(arguments.checkpoint, arguments.cfg_scale, arguments.steps, arguments.prompts)
    path = evaluate.RESULTS / "taught.md"
    for part in arguments.parts or PARTS:
        lines = PARTS[part](room)
        text = path.read_text() if path.exists() else ""  # read late: another part may have been taught meanwhile
        sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
        sections[part] = "\n" + "\n".join([*lines, "", f"![{part}](taught-{part}.jpg)"]) + "\n\n"
        print(part, sections[part])
        text = "# What the model in the box was taught\n\nBy `python -m training.show`, where it says how.\n\n"
        text += "".join(f"## {title}\n{sections[title]}" for title in PARTS if title in sections)
        evaluate.write("taught.md", lambda target, text=text: target.write_text(text))


if __name__ == "__main__":
    teaching.run(main)
