"""A picture, from command to file: how long does it take, and how much memory, next to diffusers and others?

    python -m benchmarks.picture [--rounds 3] [--only-small] [--only ours diffusers openvino stable-diffusion.cpp]
                                 [--ways "4 LCM steps" "4 LCM steps, tiny VAE"]

First the command with the embedded model, 20 steps, and `--help`, each in a fresh process: wall and CPU seconds (of all
threads). Aims: a picture in 1.5 s of wall time on two cores, the help in 0.3 s of CPU time.

Then pictures of 512x512 pixels from one random checkpoint of full size, in bfloat16 where the processor computes in it
and else in float32, each in a process of its own that imports, loads, draws and writes a file: 20 guided steps of DDIM;
4 unguided steps of LCM; the same with the tiny VAE. Peers: diffusers; diffusers with its UNet through OpenVINO (as
`benchmarks.unet_step` converts it, which is not counted); stable-diffusion.cpp, where `stable_diffusion_cpp` is
installed. All take turns, after one picture each in the last of the ways, which reads the files from disk and is not
counted. Peak memory is resident memory, files that are mapped included.

Writes benchmarks/results/picture-PROCESSOR.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import measure

PROMPT = "a futuristic city on Mars during sunset"
COMMAND = ["a red apple", "--steps", "20", "--sampler", "dpmpp_2m", "--cfg-scale", "4", "--checkpoint",
           "data/emoji.safetensors", "--overwrite"]
WAYS = {"20 guided steps": (20, 7.5, False), "4 LCM steps": (4, 1.0, False), "4 LCM steps, tiny VAE": (4, 1.0, True)}


def run(*arguments):
    """Runs cli.py and returns (wall, CPU) seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "cli.py", *arguments], cwd=measure.ROOT, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command_times(rounds):
    """Returns rows of the first table: the command with the embedded model, and its help."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        picture = [*COMMAND, "--output", Path(folder) / "apple.png"]
        for what, arguments in [("a picture, 20 steps", picture), ("--help", ["--help"])]:
            run(*arguments)  # not counted: it reads the files from disk
            walls, cpus = zip(*[run(*arguments) for _ in range(rounds)])
            rows.append([what, f"{sorted(walls)[rounds // 2]:.2f}", f"{sorted(cpus)[rounds // 2]:.2f}"])
            print(*rows[-1], flush=True)
    return rows


# ---- full size: each function draws one picture and writes it to a file


def tiny_vae():
    """Returns the path of a TAESD with random weights, as diffusers writes it; written on first use."""
    folder = measure.CACHE / "tiny-vae"
    if not (folder / "config.json").exists():
        from diffusers import AutoencoderTiny  # ours draws without waiting for this

        torch.manual_seed(0)
        AutoencoderTiny().save_pretrained(folder)
    return folder


def dtype():
    import model_loader

    return model_loader.resolve_dtype("auto", torch.device("cpu"))


def draw_ours(path, steps, cfg_scale, tiny, file):
    import model_loader
    from images import save_picture
    from pipeline import generate

    pack = model_loader.pays_to_pack(path, "cpu")
    models = model_loader.preload_models_from_standard_weights(path, "cpu", pack=pack)
    if tiny:
        from extensions.tiny_vae import load_tiny_decoder

        models["decoder"] = load_tiny_decoder(tiny_vae() / "diffusion_pytorch_model.safetensors", "cpu")
    image = generate(PROMPT, models=models, sampler_name="ddim" if steps == 20 else "lcm", n_inference_steps=steps,
                     cfg_scale=cfg_scale, seed=42, progress=False)
    save_picture(image, file)


def draw_diffusers(path, steps, cfg_scale, tiny, file, change=lambda pipeline: None):
    from diffusers import AutoencoderTiny, LCMScheduler

    pipeline = measure.diffusers_pipeline(path, dtype())
    if steps != 20:
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if tiny:
        pipeline.vae = AutoencoderTiny.from_pretrained(tiny_vae(), torch_dtype=dtype())
    change(pipeline)
    image = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=cfg_scale,
                     generator=torch.Generator().manual_seed(42)).images[0]
    image.save(file)


def draw_openvino(path, steps, cfg_scale, tiny, file):
    import openvino

    def change(pipeline):
        hint = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype()]
        settings = {"INFERENCE_PRECISION_HINT": hint}
        unet = openvino.Core().compile_model(measure.CACHE / "openvino-unet.xml", "CPU", settings)
        pipeline.unet.forward = lambda latents, timestep, encoder_hidden_states, **_: (torch.from_numpy(
            unet([x.float().numpy() for x in (latents, timestep, encoder_hidden_states)])[0]).to(dtype()),)

    draw_diffusers(path, steps, cfg_scale, tiny, file, change)


def draw_cpp(path, steps, cfg_scale, tiny, file):
    from stable_diffusion_cpp import StableDiffusion

    taesd = str(tiny_vae() / "diffusion_pytorch_model.safetensors") if tiny else ""
    model = StableDiffusion(model_path=str(path), taesd_path=taesd, n_threads=os.cpu_count())
    model.generate_image(prompt=PROMPT, width=512, height=512, cfg_scale=cfg_scale, sample_steps=steps, seed=42,
                         sample_method="ddim_trailing" if steps == 20 else "lcm")[0].save(file)


PEERS = {"ours": draw_ours, "diffusers": draw_diffusers, "openvino": draw_openvino, "stable-diffusion.cpp": draw_cpp}


def draw_in_child(name, way):
    """Draws one picture in this process, and prints its peak memory for `measure.in_child`."""
    steps, cfg_scale, tiny = WAYS[way]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        PEERS[name](measure.random_checkpoint(), steps, cfg_scale, tiny, Path(folder) / "picture.png")
    print(json.dumps({"resident": measure.resident_memory("VmHWM")}))


def full_size_rows(rounds, names, ways):
    """Returns rows: way, name, seconds from command to file, MiB, ours / this, and this way's share of the first's."""
    measure.random_checkpoint(), measure.diffusers_config(), tiny_vae()
    for name in names:
        measure.in_child("benchmarks.picture", "--child", name, ways[-1])
    rows, first = [], {}
    for way in ways:
        results = {name: [] for name in names}
        for round in range(rounds):
            for name in names:
                results[name].append(measure.in_child("benchmarks.picture", "--child", name, way))
                print(f"round {round} {way}, {name}: {results[name][-1]['process']:.1f} s", flush=True)
        for name in names:
            seconds = measure.median(results[name], "process")
            times = {key: [row["process"] for row in results[key]] for key in ("ours", name)}
            share = first.setdefault(name, seconds) / seconds
            rows.append([way, name, f"{seconds:.1f}", f"{measure.median(results[name], 'resident'):.0f}",
                         f"{measure.ratio(times, 'ours', name):.2f}", f"1/{share:.1f}"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PEERS), help="beside ours (all that are installed)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--only-small", action="store_true", help="the command alone, without the full size")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.child:
        return draw_in_child(*arguments.child)
    text = measure.table(["python cli.py, embedded model", "wall, s", "CPU, s"], command_times(arguments.rounds))
    if not arguments.only_small:
        needs = {"openvino": "openvino", "stable-diffusion.cpp": "stable_diffusion_cpp"}
        names = [name for name in PEERS if name == "ours" or name in (arguments.only or PEERS)]
        names = [name for name in names if name not in needs or arguments.only or find_spec(needs[name])]
        if "openvino" in names and not (measure.CACHE / "openvino-unet.xml").exists():
            sys.exit("error: the UNet is not converted for OpenVINO; run python -m benchmarks.unet_step first")
        header = ["512x512", "", "command to file, s", "peak resident, MiB", "ours / this",
                  f"of its {arguments.ways[0]}"]
        rows = full_size_rows(arguments.rounds, names, arguments.ways)
        text += f"\n\n{measure.table(header, rows)}\n\nIn {str(dtype()).removeprefix('torch.')}."
    measure.write(f"picture-{measure.processor()}.md",
                  f"{text}\n\nMedians of {arguments.rounds} rounds. {measure.peer_versions()}")


if __name__ == "__main__":
    main()
