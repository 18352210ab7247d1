"""Tables of prompts: read, checked row by row before anything is drawn, and made into jobs; see `batch.py`."""

import csv
import difflib
import functools
import hashlib
import inspect
import io
import json
import os
from contextlib import suppress

from arguments import check_arguments
from images import open_image
from pipeline import generate, plan
from samplers import SAMPLERS

PARAMETERS = inspect.signature(generate).parameters
COLUMNS = ("prompt", "uncond_prompt", "input_image", "strength", "do_cfg", "cfg_scale", "sampler_name",
           "n_inference_steps", "seed", "height", "width")  # what a cell of a table can say
DEFAULTS = {name: PARAMETERS[name].default for name in COLUMNS}
RESULTS = ("file", "sha256", "seconds", "error")  # with seed, what the manifest adds
ALSO_CALLED = {"steps": "n_inference_steps", "negative_prompt": "uncond_prompt", "guidance_scale": "cfg_scale",
               "cfg": "cfg_scale", "sampler": "sampler_name", "scheduler": "sampler_name", "image": "input_image",
               "denoising_strength": "strength"}  # elsewhere


def read_table(path):
    """Returns a pyarrow Table of all rows, {number of a row that cannot be read: why}, and the file's SHA-256."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = str(path).lower()
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(ending)
    kind = name.rpartition(".")[2]
    if kind not in ("csv", "jsonl", "ndjson", "json", "parquet"):
        raise ValueError(f"{path}: the name does not say what it is; give a .csv, .jsonl or .parquet file")
    try:
        with fsspec.open(path, "rb", compression=None if kind == "parquet" else "infer") as file:
            content = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; name a table of prompts") from None
    try:
        if kind == "parquet":
            table, faults = pq.read_table(pa.BufferReader(content)), {}
        else:
            text = content.decode("utf-8-sig")
            columns, faults = read_csv(text) if kind == "csv" else read_json_lines(text)
            table = pa.table({name: as_column(name, values) for name, values in columns.items()})
    except (csv.Error, UnicodeDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a whole {kind} file ({' '.join(str(error).split())})") from None
    if not table.num_rows:
        raise ValueError(f"{path}: has no rows; give a prompt at least")
    return table, faults, hashlib.sha256(content).hexdigest()


def read_csv(text):
    """Returns {name: cells} and {row: why it cannot be read}; an empty cell is None."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(lines, [])
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise ValueError(f"the column {twice.pop()!r} is there twice; give each name once")
    rows, faults = [], {}
    for cells in filter(None, lines):
        if len(cells) != len(header):
            faults[len(rows)] = f"the row has {len(cells)} cells, the header {len(header)}"
        rows.append([cell or None for cell in cells[: len(header)]] + [None] * (len(header) - len(cells)))
    return {name: list(cells) for name, cells in zip(header, zip(*rows))}, faults


def read_json_lines(text):
    """Returns {name: values} and {row: why it cannot be read}."""
    rows, faults, names = [], {}, {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except (ValueError, RecursionError):
            row, faults[len(rows)] = {}, f"not a JSON object: {line.strip()[:60]}"
        try:
            check_cells(row)  # here, as a column that mixes types becomes text
        except ValueError as error:
            faults[len(rows)] = str(error)
        names |= dict.fromkeys(row)
        rows.append(row)
    return {name: [row.get(name) for row in rows] for name in names}, faults


def as_column(name, values):
    """Returns a column as a pyarrow Array: numbers where all of an argument's cells are such, and text where types are
    mixed."""
    import pyarrow as pa

    if name in PARSERS:
        parsed = [PARSERS[name](value) for value in values]
        values = values if any(isinstance(value, str) for value in parsed) else parsed
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([value if value is None else value.encode(errors="replace").decode()
                         if isinstance(value, str) else json.dumps(value) for value in values], pa.string())


def check_columns(names):
    """Raises ValueError for a table that lacks prompts, or with a column that cannot be meant as it stands."""
    if "prompt" not in names:
        like = difflib.get_close_matches("prompt", names, 1)
        raise ValueError(f"there is no column 'prompt' but {', '.join(map(repr, names)) or 'none'}; "
                         f"{f'rename {like[0]!r}' if like else 'add one'}")
    for name in names:
        if name in COLUMNS:
            continue
        if name in RESULTS:
            raise ValueError(f"the column {name!r} has the name of one of the manifest's; rename it")
        if name in PARAMETERS:
            raise ValueError(f"the column {name!r} is an argument of generate that a table cannot give; leave it out")
        like = difflib.get_close_matches(name.lower(), COLUMNS, 1, 0.7) + [ALSO_CALLED.get(name.lower())]
        if like[0]:
            raise ValueError(f"no argument is called {name!r}: if it is {like[0]!r}, rename it so; if it is only to be "
                             f"carried along, give it a name that is less like one")


def number(value):
    """Returns a number from a cell's text, where it is one."""
    if isinstance(value, bool):
        return value
    with suppress(TypeError, ValueError, OverflowError):
        return float(value)
    return value


def whole_number(value):
    """Returns a whole number from a cell's text, or from a float, as which tables keep numbers with gaps."""
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
        value = number(value)
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return int(value) if is_whole else value


def truth(value):
    return {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower(), value)


PARSERS = {"strength": number, "cfg_scale": number, "do_cfg": truth, "n_inference_steps": whole_number,
           "seed": whole_number, "height": whole_number, "width": whole_number}


# ---- what to draw


def plan_rows(table, faults, model):
    """Checks all rows before any is drawn.

    Returns:
        keys: a row's key, None where it cannot be drawn.
        seeds: a row's seed, None where it has none that could be used.
        errors: {row: why it cannot be drawn}.
        jobs: {key: {"key", "arguments", "image"}}, one for each picture to be.
    """
    keys, seeds, errors, jobs = [], [], {}, {}
    for row, cells in enumerate(rows_of(table)):
        arguments = {name: PARSERS.get(name, lambda value: value)(cells[name]) for name in COLUMNS
                     if cells.get(name) is not None}
        try:
            if row in faults:
                raise ValueError(faults[row])
            job = plan_row(arguments, model)
        except (ValueError, OSError) as error:
            errors[row] = " ".join(str(error).split())
            seed = arguments.get("seed")
            seeds.append(seed if type(seed) is int and 0 <= seed < 2**63 else None)
            keys.append(None)
            continue
        jobs.setdefault(job["key"], job)
        seeds.append(job["arguments"]["seed"])
        keys.append(job["key"])
    return keys, seeds, errors, jobs


def rows_of(table):
    for piece in table.to_batches(max_chunksize=10_000):
        yield from piece.to_pylist()


def check_cells(row):
    """Raises ValueError unless a row's texts are texts, and all else single values."""
    for name in COLUMNS:
        value = row.get(name)
        if value is None:
            continue
        if name not in PARSERS and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r:.80}; give a text")
        if isinstance(value, (list, dict)):
            raise ValueError(f"{name} is {value!r:.80}; give one value")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name} is {value!r:.80}, which has half a letter (a lone surrogate); give whole text")


def plan_row(arguments, model):
    """Returns the job of a row; raises ValueError or OSError, in one line, if `generate` could not draw it."""
    check_cells(arguments)
    if "prompt" not in arguments:
        raise ValueError("the row has no prompt; say what to draw")
    arguments = DEFAULTS | arguments
    if arguments["input_image"] and "://" not in arguments["input_image"]:
        arguments["input_image"] = os.path.abspath(arguments["input_image"])  # workers may run in another folder
    if not isinstance(arguments["do_cfg"], bool):
        raise ValueError(f"do_cfg is {arguments['do_cfg']!r}; give true or false")
    check_arguments(device=None, idle_device=None, sampler=None, context=None, latents=None,
                    **{name: value for name, value in arguments.items() if name not in ("do_cfg", "n_inference_steps")})
    image = look_at(arguments["input_image"]) if arguments["input_image"] is not None else None
    if image is None:
        arguments["strength"] = 1.0
    check_plan(arguments["sampler_name"], arguments["n_inference_steps"], arguments["strength"])

    content = arguments | {"input_image": image and image["sha256"]}
    if arguments["seed"] is None:
        arguments["seed"] = content["seed"] = int(content_hash(content)[:8], 16)
    return {"key": content_hash([content, model])[:32], "arguments": arguments, "image": image}


@functools.lru_cache(10_000)
def check_plan(sampler_name, n_steps, strength):
    plan(SAMPLERS[sampler_name](), n_steps, strength)


@functools.lru_cache(100_000)
def look_at(path):
    """Returns the hash and the size of an input picture."""
    content = read_image(path)
    image = open_image(io.BytesIO(content), path)
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": image.size}


def read_image(path):
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"input_image is {path!r}: there is no such file") from None


def content_hash(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shape_of(job):
    """Returns what pictures must have in common to be drawn together, as text."""
    arguments = job["arguments"]
    names = ("strength", "do_cfg", "cfg_scale", "sampler_name", "n_inference_steps", "height", "width")
    return json.dumps([job["image"] and job["image"]["size"], *(arguments[name] for name in names)])


def cut(jobs, size):
    """Returns the jobs in lists of at most so many."""
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def cut_batches(jobs, size):
    """Returns the jobs in batches: those of equal shape together."""
    groups = {}
    for job in jobs:
        groups.setdefault(shape_of(job), []).append(job)
    return [batch for group in groups.values() for batch in cut(group, size)]


def cut_shards(jobs, size):
    return cut(sorted(jobs, key=shape_of), size)
