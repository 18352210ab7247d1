"""What the benchmarks share: a random SD 1.5 checkpoint of full size, interleaved timing, and tables in Markdown."""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from model_converter import NETWORKS, to_standard_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS, CACHE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "cache"


def random_checkpoint(suffix=".safetensors", dtype=torch.float16):
    """Returns the path of an SD 1.5 checkpoint with random weights, 2 GiB in float16; written on first use.

    Matrices are scaled by their fan-in and gains are near one, so that activations stay near one.
    """
    from safetensors.torch import save_file

    path = CACHE / f"random-{str(dtype).removeprefix('torch.')}{suffix}"
    if path.exists():
        return path
    CACHE.mkdir(exist_ok=True)
    with torch.device("meta"):
        shapes = to_standard_weights({name: network().state_dict() for name, network in NETWORKS.items()})
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, like in shapes.items():
        weight = torch.randn(like.shape, generator=generator)
        weight = weight / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight * 0.1 + name.endswith("weight")
        weights[name] = weight.to(dtype)
    temporary = path.with_suffix(".tmp")
    if suffix == ".safetensors":
        save_file(weights, temporary)
    else:
        torch.save({"state_dict": weights}, temporary)
    os.replace(temporary, path)
    return path


def interleave(candidates, rounds):
    """Times {name: function} in turn, `rounds` times after one that is not counted.

    Returns {name: [seconds, ...]}. In turn, because the speed of a shared machine drifts: only ratios mean something.
    """
    times = {name: [] for name in candidates}
    for round in range(rounds + 1):
        for name, function in candidates.items():
            began = time.perf_counter()
            function()
            seconds = time.perf_counter() - began
            print(f"round {round} {name}: {seconds:.2f} s" + " (warm-up)" * (round == 0), flush=True)
            if round:
                times[name].append(seconds)
    return times


def ratio(times, name, peer):
    """Returns the median over rounds of name's time divided by the peer's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[peer]))


def matrix_rate(dtype, size=2048):
    """Returns the GFLOP/s of a matrix product, the best of 30: what a network could reach at most."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = min(timed(lambda: a @ b) for _ in range(30))
    return 2 * size**3 / best / 1e9


def count_flop(network, *shapes):
    """Returns the FLOP of a network of SD 1.5's size for float inputs of these shapes, without computing anything.

    Convolutions and products, those within attention included.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network()(*(torch.empty(shape) for shape in shapes))
    return counter.get_total_flops()


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def table(header, rows):
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine(*packages):
    """Returns a line that says what was measured on, and which versions of which packages."""
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; {versions}"


def processor():
    """Returns the kind of processor as part of a file's name, such as "amd-avx512_bf16": who made it, and the widest of
    the instructions that decide which way to compute is the fastest."""
    maker = next((line.split()[-1] for line in open("/proc/cpuinfo") if line.startswith("vendor_id")), "unknown")
    has = {"amx": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    widest = next((name for name, is_there in has.items() if is_there), torch.backends.cpu.get_cpu_capability().lower())
    return f"{dict(AuthenticAMD='amd', GenuineIntel='intel').get(maker, maker)}-{widest}"


def write(name, text):
    """Prints a result and writes it to benchmarks/results/."""
    replace(name, lambda path: path.write_text(text + "\n"))
    print(text)


def replace(name, save):
    """Writes a file in benchmarks/results/ by save(path), whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    save(RESULTS / f".{name}")
    os.replace(RESULTS / f".{name}", RESULTS / name)


def diffusers_config():
    """Returns a folder with SD 1.5's configs as diffusers wants them, as no model hub is asked; written on first use.

    The folder says what `from_single_file` would fetch; the weights come from the checkpoint.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder = CACHE / "diffusers"
    if (folder / "model_index.json").exists():
        return folder
    with torch.device("meta"):  # the configs alone are wanted
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).save_config(folder / "unet")
        AutoencoderKL(
            sample_size=512, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2).save_config(folder / "vae")
    CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768, bos_token_id=49406,
        eos_token_id=49407, pad_token_id=1).save_pretrained(folder / "text_encoder")
    data = ROOT / "data"
    tokenizer = CLIPTokenizer(str(data / "vocab.json"), str(data / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    # DDIM, where the release has PNDM: that evaluates the UNet once more than it has steps
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                  set_alpha_to_one=False, steps_offset=1).save_config(folder / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"]}
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))  # last: it says that the folder is whole
    return folder


def diffusers_pipeline(path, dtype):
    """Returns diffusers' pipeline for a checkpoint, its progress bars off."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(diffusers_config()), local_files_only=True, safety_checker=None, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def watch_memory(function):
    """Runs a function and returns (its result, {"seconds", "cpu", "grown", "anonymous", "resident"}).

    Memory in MiB; `cpu` is the seconds of all threads.

    `anonymous` is the peak, while it ran, of what this process itself takes, and `grown` that less what it took before;
    the rest of `resident`, the peak since the process began, is files mapped into memory, such as the checkpoint, which
    the system can drop and read again. Reads /proc, so Linux only.
    """

    def sample():
        while not done.wait(0.003):
            peak[0] = max(peak[0], resident_memory("RssAnon"))

    before = resident_memory("RssAnon")
    peak, done = [before], threading.Event()
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    began, began_cpu = time.perf_counter(), time.process_time()
    result = function()
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    done.set()
    watcher.join()
    anonymous = max(peak[0], resident_memory("RssAnon"))
    return result, {"seconds": seconds, "cpu": cpu, "grown": anonymous - before, "anonymous": anonymous,
                    "resident": resident_memory("VmHWM")}


def resident_memory(field):
    """Returns a field of /proc/self/status in MiB, such as RssAnon (now) or VmHWM (the peak)."""
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields[field].split()[0]) / 1024


def in_child(module, *arguments):
    """Runs a benchmark in a process of its own, offline, and returns the dict that it prints as its last line.

    module: as `python -m` takes it, "benchmarks.load". The dict gets "process", the seconds of the whole process.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1]) | {"process": time.perf_counter() - began}


def median(rows, name):
    """Returns the median over runs of one of their numbers."""
    return statistics.median(row[name] for row in rows)


def peer_versions():
    """As `machine`, of what diffusers' pipeline is made of; accelerate is not required, but changes how it loads."""
    text = machine("safetensors", "diffusers", "transformers", *["accelerate"] * bool(find_spec("accelerate")))
    return text if find_spec("accelerate") else f"{text}; accelerate is not installed"
