"""What draws for `batch.py`: one artist a worker; and how its files are written, so that a kill loses none of them."""

import hashlib
import io
import json
import os
import posixpath
import secrets
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

import model_loader
from ddpm import draw_noise
from extensions.batch_table import content_hash, cut, cut_batches, read_image
from images import open_image, to_tensor, write_png
from infotext import format_parameters
from pipeline import choose_size, device_of, generate, own_schedule, plan, to_network
from samplers import SAMPLERS


class Artist:
    """Draws units of work, a batch or a shard each. Ray makes one in every worker; it needs none."""

    def __init__(self, settings: dict):
        """settings: checkpoint, dtype, output, format, batch, device."""
        self.batch, self.format, device = settings["batch"], settings["format"], settings["device"]
        if device == "cpu":
            torch.set_num_threads(1)  # how many there are changes roundings, and so the files
        pack = model_loader.pays_to_pack(settings["checkpoint"], device, settings["dtype"])
        self.models = model_loader.preload_models_from_standard_weights(settings["checkpoint"], device,
                                                                        settings["dtype"], pack=pack)
        self.tokenizer = model_loader.default_tokenizer()
        self.fs, self.root = open_output(settings["output"])
        dtype = next(self.models["diffusion"].parameters()).dtype
        self.told = {"model": Path(settings["checkpoint"]).stem, "dtype": str(dtype).removeprefix("torch.")}

    def __call__(self, block):
        """Ray's: {"unit": JSON of lists of jobs} -> {"outcome": JSON of lists of outcomes}, one unit at a time."""
        for unit in block["unit"]:
            yield {"outcome": [json.dumps(self.draw_unit(json.loads(unit)))]}

    def draw_unit(self, jobs: list[dict]) -> list[dict]:
        """Draws and writes what is not there; returns the outcomes, {"key", "file", "sha256", "size", "seconds",
        "error", "warning"}, of all."""
        name = content_hash([job["key"] for job in jobs])[:32]
        record = posixpath.join(self.root, "records", f"{name}.jsonl")
        kept = self.kept(record)  # by a worker before this one, which died
        drawn = [outcome for batch in cut_batches([job for job in jobs if job["key"] not in kept], self.batch)
                 for outcome in self.draw_batch(batch)]
        try:
            self.write(record, list(kept.values()), [outcome for outcome in drawn if not outcome["error"]])
        except OSError as error:
            drawn = [outcome | {"error": f"cannot be written: {error}"} for outcome in drawn]
        return [*kept.values(), *({name: value for name, value in outcome.items() if name not in ("png", "job")}
                                  for outcome in drawn)]

    def kept(self, record):
        """Returns {key: outcome} of what a unit's record names and is there."""
        if not self.fs.exists(record):
            return {}
        outcomes = parse_record(self.fs.cat_file(record))
        return {outcome["key"]: outcome for outcome in outcomes
                if self.size_of(posixpath.join(self.root, outcome["file"])) == outcome["size"]}

    def size_of(self, path):
        return self.fs.size(path) if self.fs.exists(path) else None

    def draw_batch(self, jobs):
        """Returns the outcomes of a batch, with the pictures as PNG; a row that fails takes no other along."""
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                images = self.draw(jobs)
        except Exception as error:  # whatever it is, it is this row's reason, or is found to be by drawing each alone
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self.draw_batch([job])]
            reason = " ".join(str(error).split()) or type(error).__name__
            return [{"key": jobs[0]["key"], "file": None, "sha256": None, "size": None, "seconds": None,
                     "error": reason, "warning": None}]
        pngs = [self.to_png(image, job) for image, job in zip(images, jobs)]
        seconds = (time.perf_counter() - began) / len(jobs)
        warning = str(told[0].message) if told else None
        return [{"key": job["key"], "file": f"pictures/{job['key'][:2]}/{job['key']}.png",
                 "sha256": hashlib.sha256(png).hexdigest(), "size": len(png), "seconds": seconds, "error": None,
                 "warning": warning, "png": png, "job": job} for job, png in zip(jobs, pngs)]

    def draw(self, jobs):
        """Returns the pictures (n, height, width, 3) uint8 of n jobs of equal shape.

        The last is repeated until the batch is full: what is computed with a batch of another size is rounded in
        another way, and a picture must not change with its company.
        """
        rows = [job["arguments"] for job in jobs + jobs[-1:] * (self.batch - len(jobs))]
        options = {name: rows[0][name] for name in ("strength", "do_cfg", "cfg_scale", "n_inference_steps")}
        sampler = self.make_sampler(rows[0]["sampler_name"], [row["seed"] for row in rows])
        if jobs[0]["image"]:
            options["latents"] = self.encode_images(jobs, sampler, rows)
        else:
            options |= {"height": rows[0]["height"], "width": rows[0]["width"]}
        images = generate([row["prompt"] for row in rows], [row["uncond_prompt"] for row in rows], sampler=sampler,
                          models=self.models, tokenizer=self.tokenizer, progress=False, **options)
        return images[: len(jobs)]

    def make_sampler(self, name, seeds):
        """Returns what `generate` would take by that name, with each picture's own seed."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return SAMPLERS[name](generators, **own_schedule(self.models["diffusion"].config))

    def encode_images(self, jobs, sampler, rows):
        """Returns the latents of the jobs' input pictures, as noisy as the first step wants them: as in `generate`, but
        each from a picture of its own."""
        side, encoder = self.models["diffusion"].config.sample_size, self.models["encoder"]
        pixels = []
        for job, row in zip(jobs, rows):
            content = read_image(row["input_image"])
            if hashlib.sha256(content).hexdigest() != job["image"]["sha256"]:
                raise ValueError(f"{row['input_image']}: changed since the run began; run again")
            image = open_image(io.BytesIO(content), row["input_image"])
            pixels.append(to_tensor(image, *choose_size(row["height"], row["width"], side, image)))
        pixels += pixels[-1:] * (len(rows) - len(pixels))
        planned = plan(sampler, rows[0]["n_inference_steps"], rows[0]["strength"])
        noise = draw_noise(sampler.generator, (len(rows), 4, *(n // 8 for n in pixels[0].shape[2:])))
        with torch.no_grad():
            latents = encoder(*to_network(encoder, device_of(encoder), torch.cat(pixels), noise)).float()
        return planned.add_noise(latents, planned.timesteps[0])

    def to_png(self, image, job):
        """Returns a picture's file, with its settings as web UIs read them."""
        arguments = job["arguments"]
        config = self.models["diffusion"].config
        cfg_scale = config.cfg_scale if arguments["cfg_scale"] is None else arguments["cfg_scale"]
        told = {name: arguments[name] for name in ("prompt", "uncond_prompt", "n_inference_steps", "sampler_name",
                                                   "seed")} | self.told
        told |= {"cfg_scale": cfg_scale if arguments["do_cfg"] else 1.0, "Plain prompt": True,
                 "height": image.shape[0], "width": image.shape[1]}
        if job["image"]:
            told |= {"strength": arguments["strength"], "input_image_hash": job["image"]["sha256"][:10]}
        file = io.BytesIO()
        write_png(Image.fromarray(image), file, format_parameters(told))
        return file.getvalue()

    def write(self, record, kept, drawn):
        """Writes the record first, so that whatever is there of pictures can be told; then these."""
        if not drawn:
            return
        files = {outcome["file"]: outcome["png"] for outcome in drawn}
        if self.format == "webdataset":
            name = content_hash([outcome["key"] for outcome in drawn])[:32]
            shard, content = f"shards/{name}.tar", make_shard(drawn)
            files = {shard: content}
            for outcome in drawn:
                outcome |= {"file": shard, "size": len(content)}
        write_record(self.fs, record, kept + drawn)
        for file, content in files.items():
            write_whole(self.fs, posixpath.join(self.root, file), content)


def make_shard(outcomes):
    """Returns a tar file of pictures and their arguments, the same bytes whenever it is made."""
    from webdataset import TarWriter

    file = io.BytesIO()
    writer = TarWriter(file, mtime=0)
    for sha256, outcome in {outcome["sha256"]: outcome for outcome in outcomes}.items():
        writer.write({"__key__": sha256, "png": outcome["png"], "json": outcome["job"]["arguments"]})
    writer.close()
    return file.getvalue()


# ---- files


def open_output(output):
    """Returns the file system and the folder in it."""
    import fsspec

    fs, root = fsspec.url_to_fs(output)
    return fs, root.rstrip("/")


def write_whole(fs, path, content):
    """Writes a file whole or not at all. Object stores do so by themselves; on disks it gets its name when it is
    finished. Where neither holds, its size shows that it is not."""
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    if "file" not in fs.protocol:
        fs.pipe_file(path, content)
        return
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        Path(temporary).write_bytes(content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_record(fs, path, outcomes):
    names = ("key", "file", "sha256", "size", "seconds")
    lines = [json.dumps({name: outcome[name] for name in names}) for outcome in outcomes]
    write_whole(fs, path, "".join(f"{line}\n" for line in lines).encode())


def parse_record(content):
    """Returns the outcomes in a record, without a last line that was cut off."""
    outcomes = []
    for line in content.split(b"\n"):
        with suppress(ValueError, TypeError):
            outcomes.append(json.loads(line) | {"error": None, "warning": None})
    return outcomes


def read_records(fs, root, folder, merge):
    """Returns {key: outcome} of the pictures that are there in a folder, whole, by earlier runs; merges the records, of
    which each batch leaves one."""
    records = list_files(fs, posixpath.join(root, "records"))
    sizes = list_files(fs, posixpath.join(root, folder))
    drawn, outcomes = {}, {}
    for paths in cut(list(records), 10_000):
        for content in fs.cat(paths, on_error="omit").values():
            for outcome in parse_record(content):
                outcomes[outcome["key"], outcome["file"]] = outcome
                if sizes.get(posixpath.join(root, outcome["file"])) == outcome["size"]:
                    drawn[outcome["key"]] = outcome
    if merge and len(records) > 1:
        merged = posixpath.join(root, "records", f"{secrets.token_hex(16)}.jsonl")
        write_record(fs, merged, outcomes.values())
        fs.rm(list(records))
    return drawn


def list_files(fs, folder):
    """Returns {path: size} of the files in a folder and those in it, but for unfinished ones, of which old ones are
    removed."""
    sizes, folders = {}, [folder] if fs.exists(folder) else []
    while folders:
        for info in fs.ls(folders.pop(), detail=True):
            if info["type"] == "directory":
                folders.append(info["name"])
            elif not info["name"].endswith(".tmp"):
                sizes[info["name"]] = info["size"]
            elif time.time() - info.get("mtime", time.time()) > 3600:  # a younger one may be another run's
                fs.rm_file(info["name"])
    return sizes
