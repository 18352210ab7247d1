"""Many pictures from a table of prompts, on one machine or on a cluster: Ray Data hands the work round.

    python -m extensions.batch PROMPTS OUTPUT

PROMPTS is a CSV, JSON lines or Parquet file. A row is a picture, a column an argument of `generate`; an empty cell is
an argument left out. Columns of other names are carried along. In the folder OUTPUT there will be

    manifest.parquet      a row for each row of PROMPTS, with seed, file, sha256, seconds and error
    pictures/ab/KEY.png   or, with --format webdataset, shards/KEY.tar, whose members are SHA256.png and SHA256.json
    records/              what was drawn: written before the pictures, so that a run that was killed can go on

A picture's key is the SHA-256 of all that decides it, so what is there is not drawn again, by whichever run or row.
Both paths may be URLs that fsspec knows, such as s3://bucket/folder. `batch.md` tells how it grows.
"""

import argparse
import hashlib
import json
import logging
import os
import posixpath
import sys
import time
import warnings
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import model_loader
from extensions.batch_artist import Artist, open_output, read_records, write_whole
from extensions.batch_table import (
    check_columns,
    content_hash,
    cut_batches,
    cut_shards,
    plan_rows,
    read_table,
)

FOLDERS = {"png": "pictures", "webdataset": "shards"}
SPARE_RETRIES = 3  # how often a unit of work is begun anew after its worker died
MANY_BLOCKS = 10_000  # units of work beyond which Ray gets several at a time


def main(argv=None) -> int:
    """Runs the command; returns its exit status: 0 when all rows were drawn, 1 when some have an error, 2 when nothing
    could begin, 130 when it was stopped."""
    try:
        return run(parse_arguments(argv))
    except KeyboardInterrupt:
        return say_error("stopped; the same command goes on from here", 130)
    except (ValueError, OSError, ImportError) as error:
        return say_error(f"error: {error}", 2)


def say_error(text, status):
    print(text, file=sys.stderr)
    return status


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m extensions.batch", description="Draws a table of prompts.")
    add = parser.add_argument
    add("prompts", help="a .csv, .jsonl or .parquet file: a row a picture, a column an argument of generate")
    add("output", help="the folder for pictures and manifest.parquet; what was drawn there is not drawn again")
    add("--workers", type=at_least_one, help="processes that draw (one a GPU; without any, one a core, by memory)")
    add("--batch", type=at_least_one, help="pictures drawn together (8 on a GPU, else 1)")
    add("--checkpoint", help="a .ckpt or .safetensors file, or a diffusers folder (the newest in data/)")
    add("--dtype", default="auto", choices=["auto", *model_loader.DTYPES], help="(%(default)s)")
    add("--format", default="png", choices=list(FOLDERS), help="a PNG file a row, or shards of many (%(default)s)")
    add("--shard-size", type=at_least_one, help="rows in a shard (1000)")
    add("--dry-run", action="store_true", help="check all rows, say what it will take, and draw nothing")
    add("--dashboard", action="store_true", help="start Ray's dashboard, on this machine alone")
    arguments = parser.parse_args(argv)
    if arguments.shard_size and arguments.format != "webdataset":
        parser.error("--shard-size is for --format webdataset; leave it out, or ask for that")
    return arguments


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; give a whole number from 1 on")
    return int(text)


def run(arguments):
    require_packages()
    table, faults, prompts_hash = read_table(arguments.prompts)
    check_columns(table.column_names)
    checkpoint = Path(arguments.checkpoint or model_loader.find_checkpoint()).absolute()
    model = {"checkpoint": hash_checkpoint(checkpoint), "dtype": arguments.dtype}
    keys, seeds, errors, jobs = plan_rows(table, faults, model)

    fs, root = open_output(arguments.output)
    drawn = read_records(fs, root, FOLDERS[arguments.format], merge=not arguments.dry_run)
    todo = [job for key, job in jobs.items() if key not in drawn]
    settings = {"checkpoint": str(checkpoint), "dtype": arguments.dtype, "output": fs.unstrip_protocol(root),
                "format": arguments.format, "batch": arguments.batch or (8 if torch.cuda.is_available() else 1)}
    print(f"{table.num_rows} rows: {len(errors)} that cannot be drawn, {table.num_rows - len(errors) - len(jobs)} "
          f"repeated, {len(jobs) - len(todo)} drawn already, {len(todo)} to draw", flush=True)
    if arguments.dry_run:
        for row, error in islice(errors.items(), 10):
            print(f"row {row + 1}: {error}")
        if todo:
            print(estimate(todo, settings, arguments.workers))
        return 1 if errors else 0

    fs.makedirs(root, exist_ok=True)
    failed = {}  # {key: reason}
    if todo:
        start_ray(arguments.workers, arguments.dashboard)
        settings |= choose_devices(arguments, checkpoint)
        failed = draw_all(todo, settings, arguments.shard_size or 1000, drawn)
    errors |= {row: failed[key] for row, key in enumerate(keys) if key in failed}
    write_manifest(fs, root, table, keys, seeds, errors, drawn, content_hash([prompts_hash, model, arguments.format]))
    print(f"{table.num_rows - len(errors)} rows drawn, {len(errors)} with an error: "
          f"{posixpath.join(arguments.output, 'manifest.parquet')}")
    return 1 if errors else 0


def hash_checkpoint(path):
    """Returns the SHA-256 of a checkpoint's bytes, so that another one under its name is not taken for it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint; name a file, or a diffusers folder")
    if model_loader.count_channels(path) != 4:
        raise ValueError(f"{path}: not a whole SD 1.x model that draws from prompts; name one with --checkpoint")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def require_packages():
    try:
        import fsspec  # noqa: F401
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ImportError(f"drawing many pictures needs {error.name}; install it with: {sys.executable} -m pip install "
                          f"-r extensions/requirements-batch.txt") from None


def write_manifest(fs, root, table, keys, seeds, errors, drawn, run_hash):
    """Writes manifest.parquet; one that is there from other prompts or another model gets another name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outcomes = [drawn.get(key, {}) for key in keys]
    if "seed" in table.column_names:
        table = table.drop_columns(["seed"])
    table = table.append_column("seed", pa.array(seeds, pa.int64()))
    for name, kind in [("file", pa.string()), ("sha256", pa.string()), ("seconds", pa.float64())]:
        table = table.append_column(name, pa.array([outcome.get(name) for outcome in outcomes], kind))
    table = table.append_column("error", pa.array([errors.get(row) for row in range(len(keys))], pa.string()))
    path = posixpath.join(root, "manifest.parquet")
    if fs.exists(path):
        with fs.open(path) as file:
            other = (pq.read_schema(file).metadata or {}).get(b"run", b"other").decode()
        if other != run_hash:
            fs.mv(path, posixpath.join(root, f"manifest-{other[:8]}.parquet"))
    file = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"run": run_hash}), file)
    write_whole(fs, path, file.getvalue().to_pybytes())


# ---- Ray


def start_ray(workers, dashboard):
    """Joins the cluster that RAY_ADDRESS names, or starts Ray on this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"address": "local", "num_cpus": max(workers or 1, os.cpu_count()), "include_dashboard": dashboard,
                    "object_store_memory": 2**28}
    for attempt in range(3):  # Ray gives its processes 30 s, which a busy machine may not do in
        try:
            ray.init(**options)
            return
        except Exception as error:  # it has none of its own for this
            ray.shutdown()
            if attempt == 2 or "RAY_ADDRESS" in os.environ:
                raise OSError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from None


def choose_devices(arguments, checkpoint):
    """Returns how many workers there are, and where each computes."""
    import ray

    resources = ray.cluster_resources()
    n_gpus, n_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    places = n_gpus or n_cpus
    if arguments.workers and arguments.workers > places:
        raise ValueError(f"--workers is {arguments.workers}, but Ray has {places} {'GPUs' if n_gpus else 'cores'}; "
                         f"give at most as many")
    chosen = {"workers": arguments.workers or default_workers(checkpoint, n_gpus, n_cpus, resources.get("memory", 0)),
              "device": "cuda" if n_gpus else "cpu"}
    if n_gpus and not arguments.batch:
        chosen["batch"] = 8
    return chosen


def default_workers(checkpoint, n_gpus, n_cpus, memory):
    """One a GPU; without any, one a core, as long as memory holds twice the weights and 2 GB for each."""
    if n_gpus:
        return n_gpus
    checkpoint = Path(checkpoint)
    n_bytes = sum(file.stat().st_size for file in ([checkpoint] if checkpoint.is_file() else checkpoint.rglob("*")))
    return max(1, min(n_cpus, int(memory // (2 * n_bytes + 2e9))))


def draw_all(jobs, settings, shard_size, drawn):
    """Has Ray draw all jobs. Puts outcomes into drawn as they come; returns {key: reason} of those that failed."""
    cut_units = cut_batches if settings["format"] == "png" else cut_shards
    units = cut_units(jobs, settings["batch"] if settings["format"] == "png" else shard_size)
    failed, n_warned = {}, 0
    reason = f"not drawn: the worker died {SPARE_RETRIES + 1} times at it, or at one that it was handed out with"
    with tqdm(total=len(jobs), unit="picture", desc="drawing", smoothing=0.1) as bar:
        try:
            for outcome in hand_out(units, settings):
                (failed if outcome["error"] else drawn)[outcome["key"]] = outcome["error"] or outcome
                if outcome["warning"] and (n_warned := n_warned + 1) <= 3:
                    bar.write(f"warning: {outcome['warning']}", file=sys.stderr)
                bar.update()
        except Exception as error:  # Ray's: no worker could start, or the cluster is gone
            reason = f"not drawn: {(str(error).strip() or type(error).__name__).splitlines()[-1][:300]}"
    if n_warned > 3:
        print(f"{n_warned} pictures came with a warning; the first three are above", file=sys.stderr)
    return failed | {job["key"]: reason for job in jobs if job["key"] not in drawn and job["key"] not in failed}


def hand_out(units, settings):
    """Yields outcomes as workers finish units of work. A worker that dies is started anew, and its unit with it."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "`ray_remote_args_fn`")  # deprecated, and nothing in its place sets retries
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is left out is told by draw_all
    pool = ray.data.ActorPoolStrategy(size=settings["workers"], max_tasks_in_flight_per_actor=1)
    outcomes = ray.data.from_items(
        [{"unit": json.dumps(unit)} for unit in units], override_num_blocks=min(len(units), MANY_BLOCKS),
    ).map_batches(Artist, fn_constructor_args=(settings,), batch_size=1, compute=pool,
                  num_cpus=1, num_gpus=int(settings["device"] == "cuda"),
                  ray_remote_args_fn=lambda: {"max_task_retries": SPARE_RETRIES})
    for block in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
        for unit in block["outcome"]:
            yield from json.loads(unit)


def estimate(jobs, settings, workers):
    """Returns what drawing will take, from a batch of the commonest shape in one and in three steps on this machine."""
    n_gpus = torch.cuda.device_count()
    device = "cuda" if n_gpus else "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    workers = workers or default_workers(settings["checkpoint"], n_gpus, os.cpu_count(), memory)
    batches = cut_batches(jobs, settings["batch"])
    artist = Artist(settings | {"device": device})
    sample = max(batches, key=len)
    times, size = {}, 0
    for steps in (1, 1, 3):  # the first warms up
        trial = [job | {"arguments": job["arguments"] | {"n_inference_steps": steps, "sampler_name": "ddim",
                                                         "strength": 1.0}} for job in sample]
        began = time.perf_counter()
        outcomes = artist.draw_batch(trial)
        times[steps] = time.perf_counter() - began
        size = max([size, *(outcome["size"] or 0 for outcome in outcomes)])
    step = max(times[3] - times[1], 0) / 2
    rest = max(times[1] - step, 0)
    seconds = sum(rest + step * batch[0]["arguments"]["n_inference_steps"] * batch[0]["arguments"]["strength"]
                  for batch in batches) / workers
    filled = len(batches) * settings["batch"] - len(jobs)
    return (f"{len(batches)} batches of {settings['batch']}, {filled} places in them filled up; about "
            f"{timedelta(seconds=round(seconds))} on {workers} workers with this machine's {device}, if pictures are "
            f"as large as the first; {size * len(jobs) / 1e9:.2f} GB")


if __name__ == "__main__":
    from extensions.batch import main  # not __main__'s, so that workers find Artist by its name

    sys.exit(main())
