"""DeepCache (arXiv 2312.00858): compute the deep layers of the UNet in every n-th step only.

    models["diffusion"] = DeepCache(models["diffusion"], interval=3)

From one step to the next the deep layers of the UNet change little (section 3.2 there). A step between two whole ones takes
what they found from the last whole one, and computes the outermost blocks alone. benchmarks/results/savings.md has what it
saves, and what it costs in quality.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

N_OUTER = 2  # blocks at either end that every step computes


class DeepCache(nn.Module):
    """A UNet that is called like `diffusion.Diffusion`, whose deep layers rest in all but every n-th step.

    Args:
        diffusion: the UNet itself.
        interval: a whole number from 1 (no caching): how many steps what the deep layers found is good for.

    Raises:
        ValueError: the interval is no such number, or diffusion is no `Diffusion`.
    """

    def __init__(self, diffusion: nn.Module, interval: int):
        super().__init__()
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval is {interval!r}; give a whole number from 1 (no caching)")
        if not hasattr(diffusion, "encode"):
            raise ValueError(f"diffusion is a {type(diffusion).__name__}; give the UNet itself, a diffusion.Diffusion")
        self.diffusion, self.interval = diffusion, interval
        self.config = diffusion.config
        self.n_calls = None  # outside of a run nothing is kept

    def for_run(self, sampler) -> "DeepCache":
        """Returns a copy for one run, which alone has the cache."""
        run = copy.copy(self)
        run.n_calls, run.deep = 0, None
        return run

    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor) -> Tensor:
        """As `diffusion.Diffusion.forward`."""
        if self.n_calls is None:
            return self.diffusion(latents, context, time_embedding)
        unet = self.diffusion
        time = unet.time_embedding(time_embedding)
        # Where guidance begins or ends there are other rows.
        is_whole = self.n_calls % self.interval == 0 or len(self.deep) != len(context)
        self.n_calls += 1
        x, skips = unet.encode(latents, context, time, unet.encoders if is_whole else unet.encoders[:N_OUTER])
        if is_whole:
            x = unet.bottleneck(x, context, time)
            self.deep = unet.decode(x, skips, context, time, unet.decoders[:-N_OUTER])
        x = unet.decode(self.deep, skips, context, time, unet.decoders[-N_OUTER:])
        return unet.conv_out(F.silu(unet.norm_out(x)))
