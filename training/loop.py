"""The loop that everything here is trained by, and the loss of all that predicts noise.

A stage is any object with `modules`, an `nn.ModuleDict` of what is trained; `loss(step, batch, generator)`, which must
depend on its arguments alone, so that a run that was interrupted ends with the weights of one that was not; `report()`,
which returns a line and a picture, or None, and is called with the EMA weights in place; and, if its modules are not to
learn at one pace, `learning_rates`, {name of a module: share of the stage's}.
"""

import contextlib
import csv
import functools
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from itertools import chain

import torch
from PIL import Image, ImageDraw
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm import trange

from ddpm import get_alphas_cumprod, rescale_alphas_cumprod
from diffusion import get_time_embedding


@dataclass(frozen=True)
class Settings:
    """How a stage is trained: AdamW, a warm-up, a constant learning rate, and a decay to zero over the last part."""

    steps: int
    batch: int  # of each process
    learning_rate: float
    warmup: int = 100
    decay: float = 0.4  # of the steps
    ema: float = 0.999
    weight_decay: float = 0.01
    save_every: int = 200
    report_every: int = 1000
    accumulate: int = 1  # batches a step
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # what is computed in (autocast); the weights that are trained stay float32


class NoiseLoss:
    """Mean squared error of a prediction from noisy latents (DDPM, arXiv 2006.11239, eq. 14).

    Args:
        config: a UNet's, which says what it predicts: the noise or, "v", the velocity (arXiv 2202.00512, appendix D).
        snr_gamma: bounds the weight of little noise (min-SNR, arXiv 2303.09556); None is the plain mean.
        snr_floor: raises that of much noise: errors of the clean latents weigh as if the SNR were never lower. What
            goes where is decided there, and with errors of the noise alone it hardly counts.
    """

    def __init__(self, config, snr_gamma: float | None = None, snr_floor: float = 0.0):
        alphas_cumprod = get_alphas_cumprod()
        if config.zero_terminal_snr:
            alphas_cumprod = rescale_alphas_cumprod(alphas_cumprod)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.config, self.snr_gamma, self.snr_floor = config, snr_gamma, snr_floor

    def __call__(self, unet, latents, context, generator):
        """The loss, a scalar, with timesteps and noise from a CPU generator.

        Args:
            unet: is called like a `Diffusion`.
            latents: (batch, 4, h, w) float32, clean, of unit scale.
            context: (batch, tokens, d).
        """
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        eps = torch.randn(latents.shape, generator=generator).to(latents.device)
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None].to(latents.device)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * eps
        target = eps
        if self.config.prediction == "v":
            target = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * latents
        time_embedding = get_time_embedding(timesteps, self.config.channels[0]).to(latents.device)
        errors = (unet(noisy, context, time_embedding).float() - target).square().mean(dim=(1, 2, 3))
        if self.snr_gamma is None:
            return errors.mean()
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        weight = snr.clamp(self.snr_floor, self.snr_gamma) / (snr + (self.config.prediction == "v"))
        return (weight * errors).mean() / weight.mean()


@torch.enable_grad()
def train(name, stage, settings, folder):
    """Runs a stage from where its checkpoint left off to settings.steps, and returns its modules with EMA weights.

    Ctrl-C raises KeyboardInterrupt, after what has been learnt is saved.

    Args:
        name: of the files that are written to `folder`: NAME.pt (all that is needed to go on), NAME.csv (a row a step)
            and its loss as a chart, NAME-loss.png; NAME-reports.csv and NAME-STEP.png (what the stage reports).
    """
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    stage.modules.train()
    weights = dict(stage.modules.named_parameters())
    ema = {key: weight.detach().clone() for key, weight in weights.items()}
    optimizer = make_optimizer(stage, settings)
    scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == torch.float16)
    folder.mkdir(parents=True, exist_ok=True)
    path, start = folder / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location=settings.device)
        stage.modules.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        ema, start = state["ema"], state["step"]
    log = Log(folder / f"{name}.csv", start) if rank == 0 else None
    done = start

    def save_all():
        state = {"step": done, "weights": stage.modules.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        save(path, {**state, "scaler": scaler.state_dict()} if scaler.is_enabled() else state)
        log.flush()

    progress = trange(start, settings.steps, initial=start, total=settings.steps, desc=name, unit="step",
                      disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 10)
    try:
        for step in progress:
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = add_gradients(stage, step, step * processes + rank, settings, scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings) * group["share"]
            with undivided():
                scaler.step(optimizer)
                scaler.update()
                if processes > 1 and step % 8 == 7:
                    average(weights.values())
                decay = min(settings.ema, (1 + step) / (10 + step))
                if rank == 0:
                    torch._foreach_lerp_(list(ema.values()), [w.detach() for w in weights.values()], 1 - decay)
                done = step + 1
            if rank > 0:
                continue
            samples = processes * settings.accumulate * settings.batch / (time.perf_counter() - began)
            progress.set_postfix(loss=f"{loss:.4f}", samples=f"{samples:.0f}/s", refresh=False)
            log.write(step, loss, samples)
            if done % settings.save_every == 0 or done == settings.steps:
                save_all()
            if done % settings.report_every == 0 or done == settings.steps:
                text = report(stage, ema, folder / f"{name}-{done:06}.png")
                progress.write(f"{name} {done}: {text}")
                log.report(done, text)
    except KeyboardInterrupt:
        if rank == 0 and done > start:
            save_all()
        raise
    finally:
        progress.close()
    stage.modules.load_state_dict(ema, strict=False)
    return stage.modules.eval()


def add_gradients(stage, step, number, settings, scaler):
    """Adds the gradients of one step to the weights, and returns its loss, the mean over its batches."""
    total = 0.0
    for k in range(settings.accumulate):
        generator = torch.Generator().manual_seed(number * settings.accumulate + k)
        with torch.autocast(torch.device(settings.device).type, settings.dtype,
                            enabled=settings.dtype != torch.float32):
            loss = stage.loss(step, settings.batch, generator) / settings.accumulate
        scaler.scale(loss).backward()
        total += loss.item()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total} in step {step}; give a lower learning rate, or train in float32")
    return total


@contextlib.contextmanager
def undivided():
    """Lets Ctrl-C wait until a block, which leaves the weights half changed, is done."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C is not for this one
        yield
        return
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


@torch.no_grad()
def average(weights):
    """The mean over all processes, in one message: local SGD (1805.09767), in which no process waits at every step."""
    weights = list(weights)
    message = torch.cat([weight.flatten() for weight in weights])
    distributed.all_reduce(message)
    message /= distributed.get_world_size()
    for weight, part in zip(weights, message.split([weight.numel() for weight in weights])):
        weight.copy_(part.view_as(weight))


def make_optimizer(stage, settings):
    shares = getattr(stage, "learning_rates", {})
    groups = [{"params": list(module.parameters()), "share": shares.get(name, 1.0)}
              for name, module in stage.modules.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True)


def learning_rate(step, settings):
    warm = min(1.0, (step + 1) / settings.warmup)
    left = (settings.steps - step) / (settings.decay * settings.steps)
    return settings.learning_rate * warm * min(1.0, left)


def report(stage, ema, path):
    """Returns what the stage says of itself with its EMA weights, and keeps its sheet of pictures."""
    plain = {key: weight.clone() for key, weight in stage.modules.state_dict().items()}
    stage.modules.load_state_dict(ema, strict=False)
    try:
        with torch.no_grad(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            text, picture = stage.report()
    finally:
        stage.modules.load_state_dict(plain)
    if picture:
        picture.save(path)
    return text


class Log:
    """A row a step in NAME.csv, and what a stage says of itself in NAME-reports.csv and NAME-loss.png.

    Rows beyond the checkpoint that a run goes on from, at step `start`, are dropped.
    """

    def __init__(self, path, start):
        self.path = path
        rows, self.file, self.writer = cut_back(path, ["step", "loss", "samples_per_second"], start)
        self.losses = [float(loss) for _, loss, _ in rows]
        reports = path.with_name(f"{path.stem}-reports.csv")  # by the number of steps done
        _, self.reports_file, self.reports = cut_back(reports, ["steps", "report"], start + 1)

    def write(self, step, loss, samples):
        self.losses.append(loss)
        self.writer.writerow([step, f"{loss:.5f}", f"{samples:.1f}"])

    def report(self, steps, text):
        self.reports.writerow([steps, text])
        self.reports_file.flush()
        chart(self.losses).save(self.path.with_name(f"{self.path.stem}-loss.png"))

    def flush(self):
        self.file.flush()


def cut_back(path, header, end):
    """Opens a CSV file to add rows to; returns its rows of the steps before `end`, which stay, the file, its writer."""
    rows = list(csv.reader(open(path)))[1:] if path.exists() else []
    rows = [row for row in rows if int(row[0]) < end]
    file = open(path, "w", newline="")
    writer = csv.writer(file)
    writer.writerows([header, *rows])
    file.flush()  # or a kill before the next checkpoint would lose them
    return rows, file, writer


def chart(losses, width=640, height=200):
    """A picture of the losses of all steps: means over a hundredth of the run each, from 0 at the bottom."""
    part = math.ceil(len(losses) / 100)
    means = [sum(some) / len(some) for some in (losses[k : k + part] for k in range(0, len(losses), part))]
    top = max(*means, 1e-9)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    points = [((width - 1) * (k + 0.5) / len(means), (height - 1) * (1 - mean / top)) for k, mean in enumerate(means)]
    pen.line(points, "steelblue", width=2)
    pen.text((width - 4, 4), f"loss of {len(losses)} steps: {means[0]:.4f} to {means[-1]:.4f}", "black", anchor="rt")
    return picture


def save(path, state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def sheet(images, columns):
    """(n, h, w, 3) uint8 pictures as one, row by row."""
    n, h, w, _ = images.shape
    rows = images.reshape(n // columns, columns, h, w, 3)
    return Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * w, 3))


def checkpoint_gradients(unet):
    """Has the blocks of a UNet or ControlNet compute anew in the backward pass what they would have to keep for it."""
    for block in chain(unet.encoders, [unet.bottleneck], getattr(unet, "decoders", [])):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
