"""Trains the embedded model in the three stages in which the original was made, each on top of the one before:

    python training/emoji.py              # the drawings (see there)
    python training/train.py clip         # the text encoder, contrastively against a small image tower (2103.00020)
    python training/train.py vae          # the autoencoder
    python training/train.py diffusion    # the UNet, on the latents of the one and the contexts of the other
    python training/train.py export       # data/emoji.safetensors, in the layout of SD 1.x
    python training/train.py restore      # the other way: training/runs/ from data/emoji.safetensors, to train on

Everything a stage needs to go on lies in training/runs/STAGE.pt, written now and then: kill it at any moment and run
the same command again. More --steps than last time train on. Batches depend on the step's number alone, so a run that
was interrupted ends with the same weights as one that was not.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clip import CLIP, CLIPConfig
from ddpm import DDPMSampler
from decoder import DecoderConfig, VAE_Decoder
from diffusion import Diffusion, DiffusionConfig
from encoder import LATENT_SCALE, EncoderConfig, VAE_Encoder
from images import to_uint8
from model_converter import to_standard_weights
from model_loader import load_tokenizer, preload_models_from_standard_weights
from pipeline import generate, get_time_embedding, tokenize
from training import emoji

RUNS = ROOT / "training" / "runs"
MODEL = ROOT / "data" / "emoji.safetensors"

CLIP_CONFIG = CLIPConfig(d_embed=64, d_mlp=256, n_layers=3, n_heads=4)
ENCODER_CONFIG = EncoderConfig(channels=(32, 64, 96, 128), n_blocks=1, n_groups=8)
DECODER_CONFIG = DecoderConfig(channels=(32, 64, 96, 128), n_blocks=2, n_groups=8)
DIFFUSION_CONFIG = DiffusionConfig(channels=(64, 128, 160), attends=(False, True, True), n_blocks=1, n_heads=4,
                                   d_context=64, n_groups=16, sample_size=128)


@dataclass(frozen=True)
class Settings:
    """How a stage is trained: AdamW, a warm-up, a constant learning rate, and a decay to zero over the last part."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.25  # of the steps
    ema: float = 0.999
    weight_decay: float = 0.01
    save_every: int = 500


SETTINGS = {
    "clip": Settings(steps=800, batch=128, learning_rate=1e-3, ema=0.99),
    "vae": Settings(steps=7000, batch=8, learning_rate=1e-3, decay=0.4),
    "diffusion": Settings(steps=12000, batch=32, learning_rate=1e-3, ema=0.999),
}
N_CONCEPTS, STYLES = 150, ["noto", "flat", "twemoji", "emojione"]


# ---- the drawings, as batches


class Batches:
    """Draws trained (drawing, background colour, caption) triples; step number in, batch out."""

    def __init__(self, drawings):
        self.drawings = drawings
        self.rows = emoji.trained_pairs(drawings).tolist()
        self.colours = list(emoji.COLOURS)
        self.palette = torch.tensor(list(emoji.COLOURS.values()))
        allowed = emoji.trained_colours(drawings)
        self.allowed = [[k for k in range(len(self.colours)) if row[k]] for row in allowed]
        self.tokenizer = load_tokenizer()

    def draw(self, step, batch):
        """Returns drawings' rows (batch,), colour ids (batch,) and captions, half of them on unnamed white."""
        rng = random.Random(step)
        rows = [rng.choice(self.rows) for _ in range(batch)]
        colours, captions = [], []
        for row in rows:
            concept, style = self.drawings.concept[row].item(), self.drawings.style[row].item()
            named = rng.random() < 0.5
            colour = rng.choice(self.allowed[concept]) if named else 0
            colours.append(colour)
            captions.append(emoji.caption(rng, self.drawings.concepts[concept], self.drawings.styles[style],
                                          self.colours[colour] if named else None))
        return torch.tensor(rows), torch.tensor(colours), captions

    def images(self, rows, colours):
        """(batch, 3, 128, 128) in [-1, 1]"""
        return emoji.composite(self.drawings.rgba[rows], self.palette[colours])


# ---- stage 1: the text encoder


class ImageTower(nn.Module):
    """Pictures (batch, 3, 128, 128) to features (batch, 128); lives in training alone."""

    def __init__(self, widths=(32, 64, 128, 256), d_features=128):
        super().__init__()
        layers, width = [], 3
        for channels in widths:
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.SiLU()]
            width = channels
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(width, d_features)

    def forward(self, images):
        return self.project(self.layers(F.avg_pool2d(images, 2)).mean(dim=(2, 3)))


class ClipStage:
    """Captions and drawings that belong together get features that point the same way (CLIP, 2103.00020, figure 3)."""

    def __init__(self, batches):
        self.batches = batches
        text = CLIP(CLIP_CONFIG)
        nn.init.normal_(text.token_embedding.weight, std=0.02)
        nn.init.normal_(text.position_embedding.weight, std=0.01)
        self.modules = nn.ModuleDict({
            "text": text,
            "project": nn.Linear(CLIP_CONFIG.d_embed, 128),
            "image": ImageTower(),
        })
        self.modules.temperature = nn.Parameter(torch.tensor(2.66))  # log of 1 / 0.07

    def features(self, images, captions):
        """Unit vectors (batch, 128) of pictures and of captions."""
        tokens = tokenize(captions, self.batches.tokenizer)
        end = (tokens == tokens.max()).int().argmax(dim=1)  # the first end token has seen the whole caption
        hidden = self.modules["text"](tokens[:, : end.max() + 1])
        text = self.modules["project"](hidden[torch.arange(len(tokens)), end])
        return F.normalize(self.modules["image"](images), dim=-1), F.normalize(text, dim=-1)

    def loss(self, step, batch, generator):
        rows, colours, captions = self.batches.draw(step, batch)
        image, text = self.features(self.batches.images(rows, colours), captions)
        logits = self.modules.temperature.exp() * image.float() @ text.float().T
        target = torch.arange(batch)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def report(self):
        """How often a drawing's own caption is the nearest among those of 128 drawings."""
        rows, colours, captions = self.batches.draw(-1, 128)
        image, text = self.features(self.batches.images(rows, colours), captions)
        return f"retrieval {(image @ text.T).argmax(1).eq(torch.arange(128)).float().mean():.3f}", None


# ---- stage 2: the autoencoder


class VaeStage:
    """Pictures through four numbers a patch of 8x8 pixels and back."""

    def __init__(self, batches):
        self.batches = batches
        self.modules = nn.ModuleDict({"encoder": VAE_Encoder(ENCODER_CONFIG), "decoder": VAE_Decoder(DECODER_CONFIG)})
        zero_residuals(self.modules)
        wire_colours(self.modules["encoder"], self.modules["decoder"])

    def loss(self, step, batch, generator):
        rng = random.Random(step)
        rows = torch.tensor([rng.randrange(len(self.batches.drawings.rgba)) for _ in range(batch)])
        # Backgrounds of any colour: large plain areas teach the latents all three colour axes.
        colours = (torch.rand(batch, 3, generator=generator) * 1.2 * 255).clamp(max=255)
        images = emoji.composite(self.batches.drawings.rgba[rows], colours)
        if step % 4 == 3:  # now and then whole pictures, for the statistics of the group norms
            images = images[: batch // 4]
        else:
            top, left = (8 * rng.randrange(9) for _ in range(2))
            images = images[:, :, top : top + 64, left : left + 64]
        mean, log_variance = (part.float() for part in self.modules["encoder"].moments(images))
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        decoded = self.modules["decoder"](latents * LATENT_SCALE).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return (F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 0.5 * edge_loss(decoded, images)
                + F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8)) + 1e-5 * kl)

    def report(self):
        """PSNR on 64 drawings, and a sheet of them above their reconstructions."""
        rows = torch.linspace(0, len(self.batches.drawings.rgba) - 1, 64).long()
        images = self.batches.images(rows, torch.arange(64) % len(self.batches.colours))
        decoded = torch.cat([self.reconstruct(part) for part in images.split(16)])
        mse = (decoded - images).square().mean(dim=(1, 2, 3))
        return f"PSNR {(10 * (4 / mse).log10()).mean():.2f} dB", sheet(to_uint8(torch.cat([images, decoded])), 16)

    def reconstruct(self, images):
        latents = self.modules["encoder"](images, torch.zeros(len(images), 4, 16, 16))
        return self.modules["decoder"](latents).float().clamp(-1, 1)


@torch.no_grad()
def wire_colours(encoder, decoder):
    """Starts the autoencoder as one that keeps the mean colour of each 8x8 patch, in three of its four latents.

    From a random start, group norms hide plain colours so well that one of three colour axes is found late or never.
    Channels 4k to 4k + 3 of the residual stream carry colour k, its negative, and the constants 4 and -4, which make
    the group norm at the end a fixed scaling; silu(x) - silu(-x) = x then undoes the last non-linearity.
    """
    wires = torch.arange(12)

    def identity(conv, taps):
        """The wired channels go through, weighted by taps (3, 3) or (1, 1)."""
        conv.weight[wires] = 0
        conv.weight[wires, wires] = taps
        conv.bias[wires] = 0

    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    patch = torch.zeros(3, 3)
    patch[:2, :2] = 0.25
    for network in (encoder, decoder):
        network.conv_in.weight[wires] = 0
        network.conv_in.bias[wires] = torch.tensor([0.0, 0.0, 4.0, -4.0]).repeat(3)
        for name, module in network.named_modules():
            if name.endswith("downsample.conv"):
                identity(module, patch)
            if name.endswith("upsample.conv"):
                identity(module, centre)
            if name.endswith("skip") and isinstance(module, nn.Conv2d):
                identity(module, torch.ones(1, 1))
        for k in range(3):
            network.conv_in.weight[4 * k : 4 * k + 2, k, 1, 1] = torch.tensor([1.0, -1.0])
            network.conv_out.weight[k] = 0
            network.conv_out.weight[k, 4 * k : 4 * k + 2, 1, 1] = torch.tensor([2.9, -2.9])
            network.conv_out.bias[k] = 0
    encoder.quant_conv.weight[:4] = torch.eye(8)[:4, :, None, None]
    encoder.quant_conv.bias[:4] = 0
    encoder.quant_conv.weight[4:] *= 0.1
    encoder.quant_conv.bias[4:] = -6  # start with little noise, or nothing comes through
    decoder.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    decoder.post_quant_conv.bias.zero_()


def edge_loss(decoded, images):
    """L1 on the differences between neighbouring pixels: what makes edges crisp."""
    return sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))


# ---- stage 3: the UNet


class DiffusionStage:
    """Predicts the noise in latents (DDPM, 2006.11239, eq. 14), weighted by min-SNR (2303.09556)."""

    def __init__(self, batches):
        self.batches = batches
        diffusion = Diffusion(DIFFUSION_CONFIG)
        zero_residuals(diffusion)
        self.modules = nn.ModuleDict({"diffusion": diffusion})
        self.models = {"clip": load_stage("clip", batches)["text"], **folded_vae(load_stage("vae", batches), batches)}
        self.latents = self.encode_drawings()  # (drawings, colours, 4, 16, 16)
        self.alphas_cumprod = torch.tensor(DDPMSampler(None).alphas_cumprod, dtype=torch.float32)

    def encode_drawings(self):
        """The latents' means for each drawing on each colour, computed once and kept beside the autoencoder."""
        path = RUNS / "latents.pt"
        key = [float(next(self.models["encoder"].parameters()).sum()), len(self.batches.drawings.rgba)]
        if path.exists() and (kept := torch.load(path))["key"] == key:
            return kept["latents"]
        n, n_colours = len(self.batches.drawings.rgba), len(self.batches.colours)
        latents = torch.empty(n, n_colours, 4, 16, 16)
        with torch.no_grad(), autocast():
            for row in trange(n, desc="latents"):
                images = self.batches.images(torch.full((n_colours,), row), torch.arange(n_colours))
                latents[row] = self.models["encoder"](images, torch.zeros(n_colours, 4, 16, 16))
        save(path, {"key": key, "latents": latents})
        return latents

    def loss(self, step, batch, generator):
        rows, colours, captions = self.batches.draw(step, batch)
        dropped = torch.rand(batch, generator=generator) < 0.1
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)]
        with torch.no_grad():
            context = self.models["clip"](tokenize(captions, self.batches.tokenizer))
        latents = self.latents[rows, colours]
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        eps = torch.randn(latents.shape, generator=generator)
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * eps
        time_embedding = get_time_embedding(timesteps, DIFFUSION_CONFIG.channels[0])
        predicted = self.modules["diffusion"](noisy, context, time_embedding)
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        weight = snr.clamp(max=5) / snr
        return (weight * (predicted.float() - eps).square().mean(dim=(1, 2, 3))).mean() / weight.mean()

    def report(self):
        """A sheet of pictures: 32 prompts spread over the trained pairs, every fourth on a named colour."""
        prompts = []
        for k, position in enumerate(torch.linspace(0, len(self.batches.rows) - 1, 32).long()):
            row = self.batches.rows[position]
            concept = self.batches.drawings.concepts[self.batches.drawings.concept[row]]
            style = self.batches.drawings.styles[self.batches.drawings.style[row]]
            colour = self.batches.colours[k // 4 % len(self.batches.colours)] if k % 4 == 3 else None
            prompts.append(emoji.wordings(concept, style, colour)[3])
        models = {**self.models, "diffusion": self.modules["diffusion"]}
        images = generate(prompts, models=models, tokenizer=self.batches.tokenizer, seed=42, sampler_name="ddim",
                          n_inference_steps=20, cfg_scale=4.0)
        return "; ".join(prompts[:8]), sheet(images, 8)


STAGES = {"clip": ClipStage, "vae": VaeStage, "diffusion": DiffusionStage}


def zero_residuals(network):
    """Makes every block start as the identity: what it adds to its input begins as nothing (1901.09321)."""
    for name, module in network.named_modules():
        if name.endswith(("conv_2", "attention.out_proj", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


# ---- the loop


def train(name, settings, batches, runs):
    """Runs one stage from where its checkpoint left off to settings.steps, and returns its modules with EMA weights."""
    torch.manual_seed(0)
    stage = STAGES[name](batches)
    stage.modules.train()
    weights = dict(stage.modules.named_parameters())
    ema = {key: weight.detach().clone() for key, weight in weights.items()}
    optimizer = make_optimizer(stage.modules, settings)
    runs.mkdir(parents=True, exist_ok=True)
    path, start = runs / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path)
        stage.modules.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
    log = Log(runs / f"{name}.csv", start)

    progress = trange(start, settings.steps, initial=start, total=settings.steps, desc=name, unit="step")
    for step in progress:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(step)
        with autocast():
            loss = stage.loss(step, settings.batch, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [weight.detach() for weight in weights.values()], 1 - decay)

        samples = settings.batch / (time.perf_counter() - began)
        progress.set_postfix(loss=f"{loss.item():.4f}", samples=f"{samples:.0f}/s")
        log.write(step, loss.item(), samples)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            save(path, {"step": step + 1, "weights": stage.modules.state_dict(), "ema": ema,
                        "optimizer": optimizer.state_dict()})
            log.flush()
        if (step + 1) % (4 * settings.save_every) == 0 or step + 1 == settings.steps:
            report(stage, ema, f"{name} {step + 1}", runs / f"{name}-{step + 1:06}.png", progress)
    stage.modules.load_state_dict(ema, strict=False)
    return stage.modules.eval()


def make_optimizer(modules, settings):
    return torch.optim.AdamW(modules.parameters(), betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True)


def learning_rate(step, settings):
    warm = min(1.0, (step + 1) / settings.warmup)
    left = (settings.steps - step) / (settings.decay * settings.steps)
    return settings.learning_rate * warm * min(1.0, left)


def report(stage, ema, title, path, progress):
    """Prints what the stage says of itself with its EMA weights, and keeps its sheet of pictures."""
    plain = {key: weight.clone() for key, weight in stage.modules.state_dict().items()}
    stage.modules.load_state_dict(ema, strict=False)
    with torch.no_grad(), contextlib.redirect_stderr(open(os.devnull, "w")):
        text, picture = stage.report()
    stage.modules.load_state_dict(plain)
    progress.write(f"{title}: {text}")
    if picture:
        picture.save(path)


class Log:
    """A CSV file with a row a step; rows beyond the checkpoint that a run goes on from are dropped."""

    def __init__(self, path, start):
        rows = list(csv.reader(open(path)))[1:] if path.exists() else []
        rows = [row for row in rows if int(row[0]) < start]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([["step", "loss", "samples_per_second"], *rows])
        self.flush()  # or a kill before the next checkpoint would lose them

    def write(self, step, loss, samples):
        self.writer.writerow([step, f"{loss:.5f}", f"{samples:.1f}"])

    def flush(self):
        self.file.flush()


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def save(path, state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def sheet(images, columns):
    """(n, h, w, 3) uint8 pictures as one, row by row."""
    n, h, w, _ = images.shape
    rows = images.reshape(n // columns, columns, h, w, 3)
    return Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * w, 3))


# ---- the result


def load_stage(name, batches):
    """Returns a finished stage's modules with their EMA weights."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run `python training/train.py {name}` first")
    modules = STAGES[name](batches).modules
    modules.load_state_dict(torch.load(path)["ema"], strict=False)
    return modules.eval().requires_grad_(False)


def folded_vae(modules, batches):
    """Returns encoder and decoder, changed so that each latent channel has mean 0 and deviation 1 over the drawings.

    SD's constant 0.18215 stays in the code: the true shift and scale go into quant_conv and post_quant_conv.
    """
    encoder, decoder = modules["encoder"], modules["decoder"]
    rows = torch.arange(0, len(batches.drawings.rgba), 3)
    images = batches.images(rows, torch.where(rows % 2 == 0, 0, rows % len(batches.colours)))
    with torch.no_grad():
        latents = torch.cat([encoder.moments(part)[0] for part in images.split(16)])
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * LATENT_SCALE
        conv = encoder.quant_conv  # mean' = (mean - shift) / scale; the noise shrinks with it
        conv.weight[:4] /= std[:, None, None, None]
        conv.bias[:4] = (conv.bias[:4] - mean) / std
        conv.bias[4:] -= 2 * std.log()
        conv = decoder.post_quant_conv  # takes scale * latents + shift
        conv.bias += conv.weight[:, :, 0, 0] @ mean
        conv.weight *= std[None, :, None, None]
    return {"encoder": encoder, "decoder": decoder}


def export(batches, path=MODEL):
    """Writes the finished model in the layout of SD 1.x, float16, with what shapes cannot tell in the metadata."""
    models = {"clip": load_stage("clip", batches)["text"], **folded_vae(load_stage("vae", batches), batches),
              "diffusion": load_stage("diffusion", batches)["diffusion"]}
    weights = {name: weight.half() for name, weight in
               to_standard_weights({network: module.state_dict() for network, module in models.items()}).items()}
    steps = torch.load(RUNS / "diffusion.pt")["step"]
    metadata = {
        "clip_heads": CLIP_CONFIG.n_heads, "unet_heads": DIFFUSION_CONFIG.n_heads,
        "unet_groups": DIFFUSION_CONFIG.n_groups, "vae_groups": ENCODER_CONFIG.n_groups,
        "sample_size": DIFFUSION_CONFIG.sample_size,
        "training": f"from scratch by training/train.py; UNet {steps} steps of {SETTINGS['diffusion'].batch} on "
                    f"{len(batches.rows)} drawings of {len(batches.drawings.concepts)} concepts",
        "concepts": json.dumps(batches.drawings.concepts), "styles": json.dumps(batches.drawings.styles),
        "licence": "drawings: noto Apache-2.0, twemoji and emojione CC-BY-4.0, "
                   "fluent-emoji-flat (flat) MIT; see data/README.md",
    }
    temporary = path.with_suffix(".tmp")
    save_file(weights, temporary, {key: str(value) for key, value in metadata.items()})
    os.replace(temporary, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")


def restore(batches, path=MODEL):
    """Writes training/runs/ from an exported model, as if each stage had just ended; the optimizers start afresh.

    What is not exported, the image tower, starts at random.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    if kept := [name for name in STAGES if (RUNS / f"{name}.pt").exists()]:
        raise ValueError(f"{RUNS} has runs already ({', '.join(kept)}); move them away first")
    models = preload_models_from_standard_weights(path, "cpu", "float32")
    models["text"] = models.pop("clip")
    for name, stage in STAGES.items():
        modules = stage(batches).modules
        for part in modules.keys() & models.keys():
            modules[part].load_state_dict(models[part].state_dict())
        save(RUNS / f"{name}.pt", {"step": SETTINGS[name].steps, "weights": modules.state_dict(),
                                   "ema": {key: weight.detach() for key, weight in modules.named_parameters()},
                                   "optimizer": make_optimizer(modules, SETTINGS[name]).state_dict()})


def main():
    parser = argparse.ArgumentParser(description="Trains the embedded model; see the top of this file.")
    parser.add_argument("stage", choices=[*STAGES, "export", "restore"])
    parser.add_argument("--steps", type=int, help="train up to this step in all (default: the stage's own number)")
    arguments = parser.parse_args()
    batches = Batches(emoji.load_drawings(n_concepts=N_CONCEPTS, styles=STYLES))
    if arguments.stage in ("export", "restore"):
        return {"export": export, "restore": restore}[arguments.stage](batches)
    settings = SETTINGS[arguments.stage]
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    train(arguments.stage, settings, batches, RUNS)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
