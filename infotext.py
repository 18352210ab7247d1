"""The settings of a picture as text, in the form that Stable Diffusion web UIs write into their files and read back.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 5, Size: 512x512, Model: "a, b"
"""

import json
import re

from samplers import SAMPLERS

# What `generate` and the command line call a setting, what web UIs call it, and how to read it.
FIELDS = {
    "n_inference_steps": ("Steps", int),
    "sampler_name": ("Sampler", str),
    "schedule": ("Schedule type", str),
    "cfg_scale": ("CFG scale", float),
    "seed": ("Seed", int),
    "size": ("Size", str),
    "model_hash": ("Model hash", str),
    "model": ("Model", str),
    "vae_hash": ("VAE hash", str),
    "vae": ("VAE", str),
    "strength": ("Denoising strength", float),
    "clip_skip": ("Clip skip", int),
    "input_image_hash": ("Init image hash", str),
    "mask_hash": ("Mask hash", str),
    "blur": ("Mask blur", float),
    "fill": ("Masked content", str),
    "padding": ("Masked area padding", int),
    "eta": ("Eta", float),
    "prediction": ("Prediction type", str),
    "guidance_interval": ("Guidance interval", lambda text: tuple(float(x) for x in text.strip("()[]").split(","))),
    "cache_interval": ("Cache interval", int),
    "tile_size": ("Tile size", int),
    "dtype": ("Dtype", str),
    "use_ema": ("EMA", lambda text: {"True": True, "False": False}[text]),
    "prompt": ("Prompt", str),
    "uncond_prompt": ("Negative prompt", str),
}
NAMES = {label: name for name, (label, _) in FIELDS.items()}
SCHEDULES = ["Automatic", "SGM Uniform", "Uniform", "Karras", "Exponential", "Polyexponential", "KL Optimal",
             "Align Your Steps", "Simple", "Normal", "DDIM", "Beta"]  # once the end of a sampler's name
FIELD = re.compile(r'(?<![\w\s\-/])\s*(\w[\w \-/]{1,80}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LORA = re.compile(r"<lora:([^<>]{1,300})>")


def format_parameters(settings: dict) -> str:
    """Returns settings as web UIs' text, from which `parse_parameters` makes the same settings again.

    Args:
        settings: by the names in FIELDS or web UIs' labels; None is left out. Beside these:
            height, width: pixels.
            loras: what stands in the tags <lora:…>, such as ["detail:0.8"]; tags that the prompt lacks are added to it.
            Any other name is written as it is, its value as text.
    """
    settings = {NAMES.get(name, str(name)): value for name, value in settings.items() if value is not None}
    prompt, uncond_prompt = str(settings.pop("prompt", "")), str(settings.pop("uncond_prompt", ""))
    for lora in settings.pop("loras", []):
        prompt += f" <lora:{lora}>" * (lora not in LORA.findall(prompt))
    if {"width", "height"} <= settings.keys():
        settings["size"] = f"{settings.pop('width')}x{settings.pop('height')}"
    if settings.get("sampler_name") in SAMPLERS:
        settings["sampler_name"] = SAMPLERS[settings["sampler_name"]].label
    names = sorted(settings, key=lambda name: list(FIELDS).index(name) if name in FIELDS else len(FIELDS))
    labels = [FIELDS[name][0] if name in FIELDS else re.sub(r"[^\w \-/]+", " ", name) for name in names]
    fields = [f"{label}: {quote(str(settings[name]))}" for label, name in zip(labels, names)]

    lines = [prompt] + [f"Negative prompt: {uncond_prompt}"] * bool(uncond_prompt)
    text = "\n".join([*lines, ", ".join(fields)])
    again = parse_parameters(text)
    if (again["prompt"], again["uncond_prompt"]) == (prompt, uncond_prompt):
        return text
    # A prompt that this form mistakes for something else: once more among the fields, which count.
    fields += [f"Prompt: {quote(prompt)}", f"Negative prompt: {quote(uncond_prompt)}"]
    return "\n".join([*lines, ", ".join(fields)])


def parse_parameters(text: str) -> dict:
    """Returns the settings in a text of ours or a web UI's.

    Returns:
        prompt and uncond_prompt; and where the text has them, the other names in FIELDS, height and width (pixels), and
        loras (what stands in the prompt's tags <lora:…>, such as ["detail:0.8"]; the prompt keeps the tags). A sampler
        that is not ours has its label for a name. Other settings keep their label, and their value is text.
    """
    *lines, last = text.replace("\r\n", "\n").rstrip().split("\n")
    fields = FIELD.findall(last)
    if len(fields) < 3:  # web UIs' rule: a line of the prompt
        lines, fields = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    uncond_prompt = "\n".join(lines[start:]).removeprefix("Negative prompt:").removeprefix(" ")
    settings = {"prompt": "\n".join(lines[:start]), "uncond_prompt": uncond_prompt}
    for label, value in fields:
        name = NAMES.get(label, label)
        settings[name] = unquote(value.strip())
        try:
            settings[name] = FIELDS[name][1](settings[name])
        except (KeyError, ValueError):
            pass  # not one of ours, or not as we write it: left as text, for its user to refuse

    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get("size", ""))
    if size:
        settings |= {"width": int(size[1]), "height": int(size[2])}
        del settings["size"]
    if "sampler_name" in settings:
        label, schedule = split_schedule(settings["sampler_name"])
        ours = {sampler.label: name for name, sampler in SAMPLERS.items()}
        settings = schedule | settings | {"sampler_name": ours.get(label, label)}
    loras = LORA.findall(settings["prompt"])
    return settings | {"loras": loras} if loras else settings


def split_schedule(label):
    """'DPM++ 2M Karras', as web UIs once wrote it -> 'DPM++ 2M', {'schedule': 'Karras'}"""
    for schedule in SCHEDULES:
        if label.endswith(f" {schedule}"):
            return label.removesuffix(f" {schedule}"), {"schedule": schedule}
    return label, {}


def quote(value):
    """Returns a value as it is, or as a JSON string where it holds what could end it."""
    if value and value.isprintable() and value == value.strip() and not set(value) & set(',:"\\'):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    if {",", ":"} <= set(quoted):  # readers that cut at each comma must not take it for another setting
        quoted = quoted.replace(",", "\\u002c").replace(":", "\\u003a")
    return quoted


def unquote(value):
    if value.startswith('"') and value.endswith('"'):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value
