"""The web page: a prompt, a button, and the picture while it is drawn. `build_page` is mounted at / by `web.py`.

Gradio makes the page, `studio.py` draws. Nothing that it shows comes from elsewhere: no fonts, scripts or analytics.
"""

import base64
import html
import io
import os
import re
import secrets
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read whenever Gradio would report

import gradio as gr
from fastapi import HTTPException
from PIL import Image, ImageChops

from extensions.request import Request, open_upload
from extensions.studio import Busy, Studio
from images import open_image, read_text
from infotext import parse_parameters
from samplers import SAMPLERS, TAKE_KARRAS

KEPT = 60  # pictures in a tab's gallery
FILLS = [("what is there now", "original"), ("the colours around it", "fill"), ("noise", "noise"), ("grey", "nothing")]
SIDES = ("left", "top", "right", "bottom")
EMPTY = "<p>The picture will be here.</p>"
STEM = re.compile(r"[^\W_]+")

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .app { padding: 14px clamp(8px, 2vw, 24px) 40px !important; max-width: none !important; }
.gradio-container main { padding: 0 !important; max-width: none !important; }
#title { font-size: 1.15rem; font-weight: 650; margin: 0; }
#title span { font-weight: 400; opacity: .6; font-size: .85rem; margin-left: .5em; white-space: nowrap; }
#studio { display: grid; gap: 16px 22px; align-items: start;
    grid-template: "ask picture" auto "settings picture" 1fr / minmax(0, 1fr) minmax(0, 1fr); }
#ask { grid-area: ask; } #show { grid-area: picture; } #settings { grid-area: settings; }
#ask, #show, #settings { min-width: 0; gap: 10px; }
#prompt textarea { font-size: 1.05rem; }
#draw, #stop { font-size: 1.1rem; min-height: 52px; }
.html-container { padding: 0 !important; }
.stage { position: relative; display: grid; place-items: center; overflow: hidden; width: 100%; box-sizing: border-box;
    aspect-ratio: 1; max-height: 580px; border-radius: var(--block-radius);
    background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.stage img { width: 100%; height: 100%; object-fit: contain; min-height: 0; margin: 0; }
.stage p { margin: 0; padding: 1.5em; text-align: center; color: var(--body-text-color-subdued); }
.stage .bar { position: absolute; left: 0; bottom: 0; height: 5px; background: var(--color-accent); }
.status { min-height: 1.5em; margin: 0 2px; color: var(--body-text-color-subdued); }
.status.note { color: var(--body-text-color); }
.status.error { color: var(--error-text-color, #b91c1c); font-weight: 550; }
.words { display: flex; flex-wrap: wrap; gap: 8px; }
.words figure { margin: 0; width: 84px; }
.words img { width: 100%; border-radius: 8px; display: block; margin: 0; }
.words figcaption { font-size: .8rem; text-align: center; overflow-wrap: anywhere; }
.words h3 { width: 100%; font-size: .9rem; font-weight: 600; margin: 0; }
#actions { gap: 8px; flex-wrap: nowrap; } #actions > * { min-width: 0; flex: 1 1 0; padding-inline: 2px; }
#gallery, #gallery .grid-wrap { min-height: 0; padding: 0; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important; gap: 8px; }
@media (max-width: 840px) {
    #studio { grid-template: "ask" "picture" "settings" / minmax(0, 1fr); }
    .words figure { width: 76px; }
}
"""

# What `gradio.mount_gradio_app` is to be told beside the page: how it looks, and what stays off.
LOOK = {
    "theme": gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", spacing_size="sm", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"]).set(
            block_title_background_fill="none", block_label_background_fill="*background_fill_primary",
            body_background_fill="*neutral_50", block_label_text_color="*body_text_color_subdued",
            block_title_text_color="*body_text_color", block_title_text_color_dark="*body_text_color",
            block_title_text_weight="550", block_title_padding="0"),
    "css": CSS, "footer_links": [], "run_history": False, "show_error": False, "ssr_mode": False,
    "enable_monitoring": False, "pwa": False, "mcp_server": False}
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}


@cache
def temporary_folder() -> tempfile.TemporaryDirectory:
    """Returns the folder, which only this user may read, where uploads and shown pictures lie until the server ends.
    """
    folder = tempfile.TemporaryDirectory(prefix="web-page-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return folder


def build_page(studio: Studio) -> gr.Blocks:
    """Returns the page, to be mounted with the arguments in LOOK."""
    temporary_folder()
    # Gradio fetches what callers give the address of, and serves it as if it were the page's own.
    gr.processing_utils.async_ssrf_protected_get = gr.routes.secure_url_stream_response = refuse_address
    jobs = {}  # session: the Job that its tab waits for
    with gr.Blocks(title="Stable Diffusion", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        page.has_launched = True  # or Gradio, being mounted, opens whatever path a caller says it has uploaded
        gr.HTML(f"<h1 id=title>Stable Diffusion<span>{escape(studio.checkpoint)}</span></h1>")
        history, shown = gr.State([]), gr.State(None)
        with gr.Row(elem_id="studio"):
            with gr.Column(elem_id="ask"):
                fields = build_prompt()
                draw = gr.Button("Draw", variant="primary", size="lg", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", visible=False)
            with gr.Column(elem_id="show"):
                show = build_show()
            with gr.Column(elem_id="settings"):
                tabs, of_tabs = build_tabs(studio)
                of_settings, dropped = build_settings(studio)
                fields |= of_tabs | of_settings

        def draw_picture(request: gr.Request, which, history, shown, *values):
            """Has one request drawn, and yields what changes on the page meanwhile."""
            if request.session_hash in jobs:
                gr.Warning("A picture is being drawn already; stop it first.")
                return
            values = dict(zip(fields, values))
            buttons = [show[name] for name in ("again", "next", "edit")]
            yield {draw: gr.update(visible=False), stop: gr.update(visible=True),
                   **show_progress(show, None), **dict.fromkeys(buttons, gr.update(interactive=False))}
            job, line, kind = None, "", ""
            try:
                values["editor"] = read_editor(fields["editor"], values["editor"], studio.limits)
                job = jobs[request.session_hash] = studio.submit(to_request(values, studio, which, shown))
                while not job.wait(0.3):
                    yield show_progress(show, job)
                job.raise_error()
                line, kind = "; ".join(job.notes), "note"
            except (ValueError, OSError, Busy, ImportError) as error:
                line, kind = str(error), "error"
            except Exception:
                traceback.print_exc(file=sys.stderr)
                line, kind = "something went wrong in the server; its console says what", "error"
            finally:
                jobs.pop(request.session_hash, None)
                if job and not job.wait(0):  # the tab is gone
                    job.cancel(keep=False)
            if job and job.is_cancelled:
                line = "; ".join(["stopped"] + [line] * bool(line))
            new = [keep_for_show(picture, values["prompt"]) for picture in job.pictures] if job else []
            history = [*reversed(new), *history][:KEPT]
            shown = new[-1] if new else shown
            yield {draw: gr.update(visible=True), stop: gr.update(visible=False),
                   **dict.fromkeys(buttons, gr.update(interactive=shown is not None)),
                   **show_picture(show, shown), show["status"]: status(line, kind), show["history"]: history,
                   show["shown"]: shown,
                   show["gallery"]: gr.update(value=[entry["path"] for entry in history], visible=bool(history))}

        show |= {"history": history, "shown": shown}
        inputs = [history, shown, *fields.values()]
        outputs = [draw, stop, *show.values()]
        for triggers, which in [([draw.click, fields["prompt"].submit, fields["negative_prompt"].submit], "new"),
                                ([show["again"].click], "again"), ([show["next"].click], "next")]:
            gr.on(triggers, draw_picture, [gr.State(which), *inputs], outputs, concurrency_limit=None, preprocess=False,
                  **HIDDEN)

        def cancel(request: gr.Request):
            if job := jobs.get(request.session_hash):
                job.cancel()

        def forget(request: gr.Request):
            if job := jobs.get(request.session_hash):
                job.cancel(keep=False)

        stop.click(cancel, queue=False, **HIDDEN)
        page.unload(forget)

        def select(history, event: gr.SelectData):
            entry = history[event.index]
            return {shown: entry, **show_picture(show, entry)}

        show["gallery"].select(select, history, [*show.values()], **HIDDEN)
        pictures = [fields[name] for name in ("image", "editor", "canvas")]
        show["edit"].click(lambda shown: [shown["path"]] * 3 + ["image", gr.update(selected="image")], shown,
                           [*pictures, fields["mode"], tabs], **HIDDEN)
        add_uploads(studio, fields)
        add_settings_again(studio, fields, tabs, dropped, show["status"])
        page.load(lambda: list_files(studio), None, [fields[name] for name in ("checkpoint", "lora", "embedding",
                                                                               "control")], **HIDDEN)
    return page


async def refuse_address(*_):
    raise HTTPException(403, "files come by upload, from no address")


# ---- the parts of the page: each returns its components by name


def build_prompt():
    return {
        "prompt": gr.Textbox(label="Prompt", lines=2, max_lines=8, elem_id="prompt",
                             placeholder="What to draw, such as: a star above a red car"),
        "negative_prompt": gr.Textbox(label="Negative prompt", lines=1, max_lines=4, elem_id="negative",
                                      placeholder="What to stay away from")}


def build_show():
    show = {"stage": gr.HTML(stage(EMPTY), elem_id="stage"), "status": gr.HTML(status(""), elem_id="status")}
    with gr.Row(elem_id="actions"):
        show["download"] = gr.DownloadButton("Download", interactive=False, elem_id="download", size="md")
        for name, label in [("again", "Again"), ("next", "Next"), ("edit", "Edit")]:
            show[name] = gr.Button(label, interactive=False, elem_id=name, size="md")
    show["words"] = gr.HTML("", elem_id="words")
    show["gallery"] = gr.Gallery(label="Pictures of this tab", show_label=False, container=False, columns=6, buttons=[],
                                 height="auto", object_fit="cover", allow_preview=False, interactive=False,
                                 visible=False, elem_id="gallery")
    show["text"] = gr.Textbox(label="Settings, as they stand in the file", lines=3, interactive=False, buttons=["copy"],
                              elem_id="text", visible=False)
    return show


def build_tabs(studio):
    """What the picture is drawn from. The name of the tab is in the field `mode`."""
    fields = {"mode": gr.Textbox("text", visible=False)}
    with gr.Tabs() as tabs:
        with gr.Tab("Text", id="text") as text:
            gr.Markdown("From words alone: `(red:1.3)` gives a word weight, `[cat:dog:0.5]` changes halfway, "
                        "`<lora:NAME:0.8>` adds a LoRA. Shift+Enter draws.")
        with gr.Tab("Picture", id="image") as image:
            fields["image"] = upload("A picture to start from", "image")
            with gr.Row():
                fields["strength"] = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength: how much is replaced",
                                               elem_id="strength")
                fields["resize"] = gr.Dropdown([("crop it", "crop"), ("pad it", "pad"), ("stretch it", "stretch")],
                                               value="crop", label="If its proportions differ")
        with gr.Tab("Inpaint", id="inpaint") as inpaint:
            fields["editor"] = gr.ImageEditor(
                label="Paint over what is to be drawn anew", type="pil", image_mode="RGBA", format="png", layers=False,
                sources=("upload", "clipboard"), transforms=(), buttons=[], canvas_size=(512, 512), height=460,
                brush=gr.Brush(default_size="auto", colors=["#ff3d9aff"], color_mode="fixed"), elem_id="editor")
            with gr.Row():
                fields["mask_strength"] = gr.Slider(0.05, 1, 1, step=0.05, label="Strength")
                fields["mask_fill"] = gr.Dropdown(FILLS, value="original", label="Start from")
            with gr.Row():
                fields["mask_blur"] = gr.Slider(0, 64, 4, step=1, label="Soft edge (pixels)", elem_id="mask_blur")
                fields["padding"] = gr.Slider(0, 256, 32, step=8, label="Around it (pixels)")
            fields["only_masked"] = gr.Checkbox(False, label="Only the painted part and its surroundings, in full size")
        with gr.Tab("Outpaint", id="outpaint") as outpaint:
            gr.Markdown("So many pixels more on each side:")
            fields["canvas"] = upload("A picture to go on from", "canvas")
            for pair in (SIDES[:2], SIDES[2:]):
                with gr.Row():
                    for side in pair:
                        fields[side] = gr.Slider(0, 512, 0, step=8, label=side.capitalize(), elem_id=side)
            with gr.Row():
                fields["outpaint_strength"] = gr.Slider(0.05, 1, 1, step=0.05, label="Strength")
                fields["outpaint_fill"] = gr.Dropdown(FILLS, value="fill", label="Start from")
                fields["outpaint_blur"] = gr.Slider(0, 64, 0, step=1, label="Soft edge (pixels)")
    for tab, name in [(text, "text"), (image, "image"), (inpaint, "inpaint"), (outpaint, "outpaint")]:
        tab.select(None, None, fields["mode"], js=f"() => '{name}'", **HIDDEN)
    return tabs, fields


def build_settings(studio):
    """Returns also where a file is dropped to have its settings back."""
    fields, limits = {}, studio.limits
    samplers = [(sampler.label, name) for name, sampler in SAMPLERS.items()]
    samplers += [(f"{SAMPLERS[name].label} Karras", f"{name} karras") for name in TAKE_KARRAS]
    with gr.Row():
        fields["sampler"] = gr.Dropdown(sorted(samplers), value="dpmpp_2m", label="Sampler", elem_id="sampler")
        fields["steps"] = gr.Slider(1, limits.steps, 20, step=1, label="Steps", elem_id="steps")
    with gr.Row():
        fields["cfg_scale"] = number("Guidance", "guidance")
        fields["seed"] = number("Seed", "seed", "random")
    with gr.Row():
        fields["width"] = number("Width", "width")
        fields["height"] = number("Height", "height")
        fields["count"] = gr.Dropdown(list(range(1, limits.count + 1)), value=1, label="Pictures", min_width=100,
                                      elem_id="count")
    with gr.Accordion("Model, LoRAs, embeddings", open=False):
        fields["checkpoint"] = gr.Dropdown(label="Checkpoint", elem_id="checkpoint")
        with gr.Row():
            fields["lora"] = gr.Dropdown(label="Add a LoRA to the prompt", elem_id="lora")
            fields["embedding"] = gr.Dropdown(label="Add an embedding to the prompt", elem_id="embedding")
        gr.Markdown("What lies in `data/`, `data/loras/` and `data/embeddings/`, as of when this page was opened.")
    with gr.Accordion("ControlNet", open=False):
        fields["control"] = gr.Dropdown(label="ControlNet", info="what lies in data/controlnets/", elem_id="control")
        fields["control_image"] = upload("The picture that leads", "control-image")
        fields["canny"] = gr.Checkbox(False, label="Take the edges of it first (canny)")
        with gr.Row():
            fields["control_scale"] = gr.Slider(0, 2, 1, step=0.05, label="Scale", min_width=110)
            fields["control_start"] = gr.Slider(0, 1, 0, step=0.05, label="Starts at", min_width=110)
            fields["control_end"] = gr.Slider(0, 1, 1, step=0.05, label="Ends at", min_width=110)
    with gr.Accordion("Settings from a picture", open=False):
        dropped = gr.File(label="Drop a picture from here or from a web UI",
                          file_types=["image"], height=120, elem_id="dropped")
    with gr.Accordion("More", open=False):
        fields["words"] = gr.Checkbox(True, label="Show what each word looked at")
        with gr.Row():
            fields["clip_skip"] = gr.Slider(1, 12, 1, step=1, label="Clip skip")
            fields["eta"] = number("Eta, of the sampler DDIM", "eta", "0")
    return fields, dropped


def number(label, elem_id, placeholder="the model's"):
    """A field for a number or nothing. It is a text, as numbers in browsers are inexact from 2**53 on."""
    return gr.Textbox("", label=label, placeholder=placeholder, max_lines=1, min_width=100, elem_id=elem_id)


def upload(label, elem_id):
    """A place for a picture. None of the events that read it has Gradio open the file: `open_upload` does."""
    return gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[],
                    format="png", height=260, elem_id=elem_id)


def add_uploads(studio, fields):
    """Has uploads looked at when they come, and the pickers write into the prompt."""
    def look(value):
        try:
            read_upload(value, "the upload", studio.limits)
        except ValueError as error:
            gr.Warning(escape(error))
            return None
        return gr.skip()

    for name in ("image", "canvas", "control_image"):
        fields[name].upload(look, fields[name], fields[name], preprocess=False, **HIDDEN)

    # In the browser: an answer from the server would overwrite what was typed or picked on the way.
    add = "(name, prompt) => [name ? `${prompt.trimEnd()} FORM`.trimStart() : prompt, null]"
    for name, form in [("lora", "<lora:${name}:1>"), ("embedding", "${name}")]:
        fields[name].input(None, [fields[name], fields["prompt"]], [fields["prompt"], fields[name]],
                           js=add.replace("FORM", form), **HIDDEN)


def add_settings_again(studio, fields, tabs, dropped, where):
    """Has the settings in a dropped file put into the fields."""
    names = [name for name in fields if name not in ("image", "editor", "canvas", "control", "control_image", "lora",
                                                     "embedding", "words")]
    defaults = {name: fields[name].value for name in names}

    def read(file):
        try:
            values, left = read_settings(read_file(file), studio)
        except ValueError as error:
            return {dropped: None, where: status(error, "error")}
        values = defaults | {"checkpoint": studio.checkpoint} | values
        line = "The settings are back." + f" Not followed: {'; '.join(left)}." * bool(left)
        return {**{fields[name]: values[name] for name in names}, tabs: gr.update(selected=values["mode"]),
                dropped: None, where: status(line, "note")}

    dropped.upload(read, dropped, [*(fields[name] for name in names), tabs, dropped, where], preprocess=False, **HIDDEN)


def list_files(studio):
    """Returns the pickers' choices, as data/ has them now."""
    loras, embeddings, controls = map(list, (studio.loras(), studio.embeddings(), studio.controlnets()))
    return [gr.update(choices=list(studio.checkpoints()), value=studio.checkpoint),
            *(gr.update(choices=names, value=None, interactive=bool(names)) for names in (loras, embeddings)),
            gr.update(choices=[("none", ""), *controls], value="", interactive=bool(controls))]


# ---- from the fields to a Request, and from a file to the fields


def to_request(values: dict, studio: Studio, which: str = "new", shown: dict | None = None) -> Request:
    """Returns what the fields ask for.

    Args:
        values: {name: value} of the page's fields.
        which: "new" for the seed in the field; "again" for that of the picture shown, "next" for the one after it.

    Raises:
        ValueError: in one line, which field cannot be understood.
    """
    sampler, _, schedule = values["sampler"].partition(" ")
    request = Request(
        prompt=values["prompt"], negative_prompt=values["negative_prompt"], sampler=sampler, schedule=schedule or None,
        steps=values["steps"], count=values["count"], checkpoint=values["checkpoint"], clip_skip=values["clip_skip"],
        words=values["words"], **{name: read_number(name, values[name], float) for name in ("cfg_scale", "eta")},
        **{name: read_number(name, values[name], int) for name in ("seed", "width", "height")})
    if which != "new":
        request.seed = shown["seed"] + (which == "next")
    if values["control"]:
        image = read_upload(values["control_image"], "the ControlNet's picture", studio.limits)
        if image is None:
            raise ValueError("the ControlNet has no picture that leads; give it one, or choose none")
        if values["canny"]:
            from extensions.controlnet import canny

            image = Image.fromarray(canny(image))
        request.controls = [(values["control"], image, values["control_scale"])]
        request.control_start, request.control_end = values["control_start"], values["control_end"]
    {"text": lambda *_: None, "image": from_image, "inpaint": from_editor, "outpaint": from_canvas}[values["mode"]](
        request, values, studio.limits)
    return request


def from_image(request, values, limits):
    request.input_image = wanted(read_upload(values["image"], "the picture", limits))
    request.strength, request.resize = values["strength"], values["resize"]


def from_editor(request, values, limits):
    background, layers = values["editor"]
    mask = Image.new("L", wanted(background).size)
    for layer in layers:
        mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A").resize(mask.size))
    request.input_image, request.mask = background, mask.point(lambda alpha: 255 * (alpha > 0))
    if not mask.getbbox():
        raise ValueError("nothing is painted over; paint with the brush over what is to be drawn anew")
    request.strength, request.fill, request.blur = values["mask_strength"], values["mask_fill"], values["mask_blur"]
    request.only_masked, request.padding = values["only_masked"], values["padding"]


def from_canvas(request, values, limits):
    request.input_image = wanted(read_upload(values["canvas"], "the picture", limits))
    request.outpaint = tuple(values[side] for side in SIDES)
    request.strength, request.fill = values["outpaint_strength"], values["outpaint_fill"]
    request.blur = values["outpaint_blur"]


def wanted(image):
    if image is None:
        raise ValueError("there is no picture to start from; drop one into the tab, or choose the tab Text")
    return image


def read_upload(file, name, limits):
    """Returns the PIL image in an uploaded file, RGB; None if there is none."""
    return open_image(open_upload(read_file(file), name, limits), name) if file else None


def read_file(file):
    """Returns the bytes of an uploaded file. Gradio has checked where it lies, unless the caller calls it no file."""
    path = Path(file["path"]).resolve()
    if not path.is_relative_to(Path(temporary_folder().name).resolve()):
        raise ValueError("the file was not uploaded to this page; choose it again")
    return path.read_bytes()


def read_editor(editor, value, limits):
    """Returns the picture in the editor, RGB or None, and what was painted over it: layers with transparency.

    The browser sends them before the event, to where Gradio keeps them as bytes; what the server itself put there is a
    file. Gradio would open either without our limits.
    """
    value = editor.blob_storage.pop(value["id"], None) if value and value.get("id") else value
    if not value:
        return None, []
    get = value.get if isinstance(value, dict) else vars(value).get

    def read(part):
        data = part if isinstance(part, bytes) else read_file(part)
        return open_upload(data, "the picture in the editor", limits)

    background = get("background")
    return background and open_image(read(background)), [read(layer) for layer in get("layers") or [] if layer]


def read_number(name, text, kind):
    """Returns the number in a field, or None for nothing."""
    text = (text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        example = "42" if kind is int else "7.5"
        raise ValueError(f"{name} is {text!r:.40}; give a number such as {example}, or nothing") from None


def read_settings(data: bytes, studio: Studio) -> tuple[dict, list[str]]:
    """Returns the fields' values that the settings in a picture's file stand for, and what could not be followed.

    Raises:
        ValueError: in one line, that it is no picture, or has no settings.
    """
    open_upload(data, "the file", studio.limits)
    file = io.BytesIO(data)
    file.name = "the file"
    given = parse_parameters(read_text(file)[: 10 * studio.limits.prompt])
    mode = "outpaint" if "Outpaint" in given else "inpaint" if "mask_hash" in given else "image"
    mode = mode if "input_image_hash" in given or "strength" in given else "text"
    values, left = {"mode": mode}, []

    # Fields that mean the same whatever the picture was drawn from, then those of the tab.
    same = {"prompt": "prompt", "uncond_prompt": "negative_prompt", "n_inference_steps": "steps", "eta": "eta",
            "cfg_scale": "cfg_scale", "seed": "seed", "width": "width", "height": "height", "clip_skip": "clip_skip"}
    same |= {"image": {"strength": "strength", "Resize": "resize"},
             "inpaint": {"strength": "mask_strength", "blur": "mask_blur", "fill": "mask_fill", "padding": "padding"},
             "outpaint": {"strength": "outpaint_strength", "blur": "outpaint_blur", "fill": "outpaint_fill"},
             "text": {}}[mode]
    for name, field in same.items():
        if name in given:
            values[field] = given.pop(name)
    values |= {name: str(values[name]) for name in ("seed", "cfg_scale", "width", "height", "eta") if name in values}
    sampler, schedule = given.pop("sampler_name", "dpmpp_2m"), given.pop("schedule", "").lower()
    if sampler not in SAMPLERS:
        left.append(f"the sampler {sampler}")
    elif schedule == "karras" and sampler in TAKE_KARRAS:
        values["sampler"] = f"{sampler} karras"
    else:
        values["sampler"] = sampler
        left += [f"the schedule {schedule}"] * (schedule not in ("", "automatic", "uniform", "normal"))
    if "model" in given:
        try:
            values["checkpoint"] = studio.find("checkpoints", given.pop("model"))
        except ValueError as error:
            left.append(str(error))
    if mode == "outpaint":
        values |= dict(zip(SIDES, map(int, re.findall(r"\d+", given.pop("Outpaint")))))
        for name in ("width", "height"):  # of the whole, which its own size and the sides make
            values.pop(name, None)
    values["only_masked"] = given.pop("Only masked", None) == "True"
    left += ["the input picture, which must be given again"] * (mode != "text")
    unseen = ("loras", "input_image_hash", "mask_hash", "dtype", "model_hash", "Version", "Lora hashes", "TI hashes")
    return values, left + [f"{name}: {value}"[:80] for name, value in given.items() if name not in unseen]


# ---- pictures on the page


def escape(text):
    """Returns text for a place in HTML, and in a template of Gradio's, which it cannot leave."""
    return html.escape(str(text)).replace("{", "&#123;").replace("$", "&#36;").replace("`", "&#96;")


def stage(inner):
    return f'<div class="stage">{inner}</div>'


def status(line, kind=""):
    return f'<div class="status {kind}" role="status">{escape(line)}</div>'


def show_progress(show, job):
    """Returns the updates that show a job on its way: the picture so far, a bar, and the time left."""
    if job is None or job.state in ("waiting", "loading"):
        ahead = job.ahead if job else 0
        line = f"{ahead} before this one" if ahead else job.state if job else "waiting"
        return {show["stage"]: stage("<p>…</p>"), show["status"]: status(line)}
    preview, left = job.preview(), job.seconds_left
    inner = f'<img alt="the picture so far" src="{to_url(preview, "JPEG")}">' if preview else "<p>…</p>"
    inner += f'<div class="bar" style="width: {100 * job.step / job.n_steps:.1f}%"></div>'
    line = f"step {job.step} of {job.n_steps}" + (f", {tell_time(left)} left" if left is not None else "")
    return {show["stage"]: stage(inner), show["status"]: status("stopping" if job.is_cancelled else line)}


def tell_time(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def to_url(image, kind):
    file = io.BytesIO()
    image.convert("RGB").save(file, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def keep_for_show(picture, prompt):
    """Writes a picture, with its settings, to where the page can show it until the server ends; returns its entry in
    the history."""
    folder = Path(temporary_folder().name, secrets.token_hex(16))
    folder.mkdir()
    path = folder / f"{'-'.join(STEM.findall(prompt))[:60] or 'picture'}-{picture.seed}.png"
    path.write_bytes(picture.png())
    return {"path": str(path), "seed": picture.seed, "text": picture.parameters, "words": show_words(picture)}


def show_words(picture):
    """Returns what each word looked at, as HTML."""
    figures = []
    for word, image in picture.words:
        image.thumbnail((160, 160))
        figures.append(f'<figure><img alt="" src="{to_url(image, "JPEG")}"><figcaption>{escape(word)}</figcaption>'
                       f"</figure>")
    return f'<div class="words"><h3>What each word looked at</h3>{"".join(figures)}</div>' if figures else ""


def show_picture(show, entry):
    """Returns the updates that show an entry of the history."""
    if entry is None:
        return {show["stage"]: stage(EMPTY)}
    url = base64.b64encode(Path(entry["path"]).read_bytes()).decode()
    return {show["stage"]: stage(f'<img alt="the picture" src="data:image/png;base64,{url}">'),
            show["download"]: gr.update(value=entry["path"], interactive=True), show["words"]: entry["words"],
            show["text"]: gr.update(value=entry["text"], visible=True)}
