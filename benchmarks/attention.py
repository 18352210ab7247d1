"""Attention on the CPU in bfloat16: how long do our blocks take next to PyTorch's, how exact are they, how much memory?

    python -m benchmarks.attention [--rounds 10]

The self-attentions of SD 1.5's UNet, one picture: 4096 tokens at 512x512 pixels with 8 heads of 40, 1024 with heads of 80,
and 9216 and 16384 at 768x768 and 1024x1024; random numbers of deviation 1, and of 3, which makes for peaked weights. Error:
root mean square, against float32. Memory: what the process grows by at its peak, in sizes of the result.

Writes benchmarks/results/attention.md. Reads /proc, so Linux only.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks import measure
from cpu.attention import attend_in_blocks

CASES = [(1024, 80, 1), (4096, 40, 1), (4096, 40, 3), (9216, 40, 1), (16384, 40, 1)]  # tokens, d_head, deviation of q
N_HEADS = 8


def row(tokens, d_head, scale, rounds, rate):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, N_HEADS, tokens, d_head, generator=generator) for _ in range(3))
    q, k, v = (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()
    candidates = {"ours": lambda: attend_in_blocks(q, k, v), "torch": lambda: F.scaled_dot_product_attention(q, k, v)}
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    errors = {name: (run().float() - exact).square().mean().sqrt() for name, run in candidates.items()}
    growth = {name: measure.watch_memory(run)[1]["grown"] * 2**20 / q.nbytes for name, run in candidates.items()}
    times = measure.interleave(candidates, rounds)
    speed = {name: 4 * N_HEADS * tokens**2 * d_head / measure.statistics.median(times[name]) / 1e9 for name in times}
    return [f"{tokens} tokens, heads of {d_head}, deviation {scale}",
            *(f"{1000 * measure.statistics.median(times[name]):.0f}" for name in candidates),
            f"{measure.ratio(times, 'torch', 'ours'):.2f}",
            *(f"{speed[name]:.0f} ({speed[name] / rate:.0%})" for name in candidates),
            f"{errors['ours'] / errors['torch']:.1f}", *(f"{growth[name]:.1f}" for name in candidates)]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    rate = measure.matrix_rate(torch.bfloat16)
    header = ["", "ours, ms", "torch, ms", "times as fast", "ours, GFLOP/s (of the matrix rate)", "torch, GFLOP/s",
              "error, ours / torch", "memory, ours", "torch"]
    measure.write("attention.md", f"""\
{measure.table(header, [row(*case, rounds, rate) for case in CASES])}

Medians of {rounds} rounds, interleaved. A matrix product of 2048 cubed in bfloat16 reached {rate:.0f} GFLOP/s.
{measure.machine()}""")


if __name__ == "__main__":
    main()
