"""Many pictures by Ray: what does the engine cost, and what is left after kills?

    python -m benchmarks.batch [--pictures 2000] [--side 128] [--steps 4] [--rounds 3]

Speed: pictures a second of extensions/batch.py with one worker, beside a plain loop over `generate` that writes PNG
files, at batches of 1, 8 and 32, in turn; each from the end of the first batch on, so that neither pays for its start.
Kills: so many pictures on two workers, once undisturbed, and once with workers (3) and the command itself (2) killed at
random moments (seed 0) and started again; then manifests and hashes are compared, and what was drawn is counted.
Planning and scheduling: the time and memory of the command for 100,000 rows, and how many units of work Ray hands out
in a second where drawing takes none. Draws with the embedded model, and writes benchmarks/results/batch.md.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image

import model_loader
from benchmarks import measure
from extensions import batch
from extensions.batch_artist import Artist
from extensions.batch_table import cut, plan_rows, read_table
from pipeline import generate

BATCHES = 1, 8, 32
N_KILLS = {"worker": 3, "command": 2}


class Idle(Artist):
    """An Artist that does nothing, to see how fast work can be handed out."""

    def __init__(self, settings):
        pass

    def draw_unit(self, jobs):
        return [{"key": job["key"]} for job in jobs]


def write_table(path, n, arguments):
    rows = ({"prompt": f"apple {k}", "height": arguments.side, "width": arguments.side, "sampler_name": "ddim",
             "n_inference_steps": arguments.steps, "seed": k} for k in range(n))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def plan_table(path):
    """Returns jobs, and seconds of computing and bytes of memory that a row takes before anything is drawn."""
    began, before = time.process_time(), psutil.Process().memory_info().rss
    table, faults, _ = read_table(str(path))
    jobs = list(plan_rows(table, faults, {"checkpoint": "", "dtype": "float32"})[3].values())
    return jobs, (time.process_time() - began) / len(jobs), (psutil.Process().memory_info().rss - before) / len(jobs)


def loop(jobs, size, models, folder):
    """Draws and writes pictures without the engine. Returns how many a second, from the second batch on."""
    for number, rows in enumerate(cut([job["arguments"] for job in jobs], size)):
        images = generate([row["prompt"] for row in rows], models=models, progress=False, seed=rows[0]["seed"],
                          **{name: rows[0][name] for name in ("height", "width", "sampler_name", "n_inference_steps")})
        for row, image in zip(rows, images):
            Image.fromarray(image).save(folder / f"{row['seed']}.png")
        if number == 0:
            began = time.perf_counter()
    return (len(jobs) - size) / (time.perf_counter() - began)


def engine(jobs, size, folder):
    """As `loop`, with the engine. Returns how many a second, and the share of the time that is not drawing."""
    settings = {"checkpoint": str(model_loader.ROOT / "data" / "emoji.safetensors"), "dtype": "float32",
                "format": "png", "output": str(folder), "batch": size, "device": "cpu", "workers": 1}
    began, outcomes = None, []
    for outcome in batch.hand_out(cut(jobs, size), settings):
        outcomes.append(outcome)
        if len(outcomes) == size:
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    return (len(jobs) - size) / seconds, 1 - sum(outcome["seconds"] for outcome in outcomes[size:]) / seconds


def measure_speed(jobs, rounds, folder):
    models = model_loader.preload_models_from_standard_weights(model_loader.ROOT / "data" / "emoji.safetensors", "cpu",
                                                               "float32")
    rows = []
    for size in BATCHES:
        ours, plain, idle = [], [], []
        for round in range(rounds):
            some = jobs[: max(3 * size, 24)]
            place = folder / f"{size}-{round}"
            place.mkdir()
            plain.append(loop(some, size, models, place))
            rate, share = engine(some, size, place / "engine")
            ours.append(rate)
            idle.append(share)
            print(f"batch {size}: loop {plain[-1]:.3f}, engine {rate:.3f} pictures a second", flush=True)
        lost = statistics.median(1 - mine / theirs for mine, theirs in zip(ours, plain))
        rows.append([size, f"{statistics.median(plain):.2f}", f"{statistics.median(ours):.2f}", f"{lost:.1%}",
                     f"{statistics.median(idle):.1%}"])
    return measure.table(["batch", "pictures a second, loop", "with the engine", "lost", "time not spent drawing"],
                         rows)


def run_command(table, output):
    return subprocess.Popen([sys.executable, "-m", "extensions.batch", str(table), str(output), "--workers", "2",
                             "--batch", "4", "--checkpoint", "data/emoji.safetensors", "--dtype", "float32"],
                            cwd=model_loader.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def count(output):
    return sum(1 for _ in output.glob("pictures/*/*.png"))


def find_worker(command, rng):
    """Returns one of the processes that draw for a command; with RAY_ADDRESS, any that draws on this machine."""
    on_cluster = "RAY_ADDRESS" in os.environ
    found = psutil.process_iter() if on_cluster else psutil.Process(command.pid).children(recursive=True)
    workers = []
    for process in found:
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                workers.append(process)
    return rng.choice(workers) if workers else None


def draw_with_kills(table, output, n):
    """Runs the command until it comes through, killing at random moments. Returns {what: kills}, seconds."""
    rng, began = random.Random(0), time.perf_counter()
    moments = sorted(rng.sample(range(1, n - n // 20), sum(N_KILLS.values())))
    victims = rng.sample([name for name, number in N_KILLS.items() for _ in range(number)], len(moments))
    killed, command = dict.fromkeys(N_KILLS, 0), run_command(table, output)
    while command.poll() is None or moments:
        time.sleep(0.05)
        if moments and count(output) >= moments[0]:
            victim = psutil.Process(command.pid) if victims[0] == "command" else find_worker(command, rng)
            if victim is None:
                continue
            victim.kill()
            killed[victims.pop(0)] += 1
            print(f"killed {victim.pid} at {moments.pop(0)} pictures", flush=True)
        if command.poll() is not None and command.poll() != 0:
            command = run_command(table, output)
    return killed, time.perf_counter() - began


def rows_of(output):
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    return [{name: row[name] for name in ("prompt", "seed", "file", "sha256", "error")} for row in rows]


def measure_kills(n, folder, arguments):
    table, whole, broken = folder / "prompts.jsonl", folder / "undisturbed", folder / "killed"
    write_table(table, n, arguments)
    began = time.perf_counter()
    if run_command(table, whole).wait():
        sys.exit("the undisturbed run failed")
    seconds = time.perf_counter() - began
    killed, disturbed = draw_with_kills(table, broken, n)
    same = rows_of(whole) == rows_of(broken)
    missing = sum(row["sha256"] is None for row in rows_of(broken))
    return (f"{n} pictures of {arguments.side} pixels in {arguments.steps} steps, batches of 4, on two workers: "
            f"{seconds:.0f} s undisturbed. With {killed['worker']} workers and {killed['command']} times the command "
            f"killed: {disturbed:.0f} s, starts included. Rows without a picture: {missing}; manifest and hashes are "
            f"{'the same' if same else '**not the same**'}; {count(broken)} pictures in the folder.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in [("pictures", 2000), ("side", 128), ("steps", 4), ("rounds", 3)]:
        parser.add_argument(f"--{name}", type=int, default=number)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        kills = measure_kills(arguments.pictures, folder, arguments)
        print(kills, flush=True)
        write_table(folder / "many.jsonl", 100_000, arguments)
        jobs, seconds, n_bytes = plan_table(folder / "many.jsonl")
        began = time.perf_counter()
        batch.start_ray(1, False)
        started = time.perf_counter() - began
        artist, batch.Artist = batch.Artist, Idle
        moments = [time.perf_counter() for _ in batch.hand_out(cut(jobs[:500], 1), {"workers": 1, "device": "cpu"})]
        batch.Artist = artist
        handed_out = (len(moments) - 1) / (moments[-1] - moments[0])
        speed = measure_speed(jobs, arguments.rounds, folder)
    measure.write("batch.md", f"""\
{speed}

{arguments.side} pixels, {arguments.steps} steps, one worker of one thread, medians of {arguments.rounds} rounds in
turn. "Lost" is against the loop of the same round; "time not spent drawing" is of the worker's, after its first batch.

{kills}

Planning a row takes {seconds * 1e6:.0f} µs of one core and {n_bytes:.0f} bytes. Ray starts in {started:.0f} s, and
hands out {handed_out:.0f} units of work a second.

{measure.machine("ray", "pyarrow")}. Other work ran beside it: {os.getloadavg()[1]:.0f} processes wanted the cores.""")


if __name__ == "__main__":
    main()
