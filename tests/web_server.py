"""What the tests of the web page and its API share: a studio of tiny networks, with something of everything in its
data folder, and a server in a thread."""

import io
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from PIL import Image
from safetensors.torch import save_file

import oracle
from extensions.controlnet import ControlNet
from extensions.studio import Studio
from extensions.web import bind
from model_converter import standard_names

LORA = "lora_unet_mid_block_attentions_0_proj_in"


def fill_data(folder):
    """Writes a checkpoint "tiny", a LoRA "style", an embedding "frog" and a ControlNet "edges" for it."""
    for name in ("loras/below", "embeddings", "controlnets"):
        (folder / name).mkdir(parents=True)
    oracle.write_checkpoint(folder / "tiny.safetensors")
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 4)))
    save_file({f"{LORA}.lora_down.weight": down, f"{LORA}.lora_up.weight": up},
              folder / "loras" / "below" / "style.safetensors", {"ss_output_name": "my style"})
    save_file({"emb_params": torch.randn(2, 32, generator=generator)}, folder / "embeddings" / "frog.safetensors")
    network = oracle.randomize(ControlNet(oracle.TINY["diffusion"], (8, 16, 24, 32)), seed=3)
    prefix = "model.diffusion_model."
    weights = {}
    for name, weight in network.state_dict().items():
        theirs = standard_names("diffusion", name)
        for part, chunk in zip(theirs, weight.chunk(len(theirs))):
            weights[f"control_model.{part.removeprefix(prefix)}"] = chunk.contiguous()
    save_file(weights, folder / "controlnets" / "edges.safetensors")
    return folder


def tiny_studio(folder, **settings):
    return Studio(data=folder, dtype="float32", device="cpu", **settings)


@contextmanager
def gate(studio):
    """Holds each call of the UNet until it is let through: yields (let(n), an Event that is set when one waits)."""
    studio.load(studio.checkpoint, [], [])  # so that no other networks take its place
    passes, at_gate = threading.Semaphore(0), threading.Event()

    def wait(*_):
        at_gate.set()
        assert passes.acquire(timeout=20)

    hook = studio.loaded[0]["diffusion"].register_forward_pre_hook(wait)
    try:
        yield passes, at_gate
    finally:
        hook.remove()
        passes.release(100_000)


@contextmanager
def serving(app):
    """Serves an app from a thread; yields its URL."""
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def box_mask(size=(64, 64), box=(16, 16, 40, 48)):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask
