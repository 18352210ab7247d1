"""One thread for networks as small as the embedded one.

The layers of such a network take microseconds. Between two of them, threads that share the work wait for each other in
a busy loop; where another process has one of the cores, they wait for as long as the system lets that process run. On
two cores with ten other processes, 25 steps of the embedded model took 315 s in two threads, and 50 s in one.
"""

import threading

import torch
from torch import nn

from cpu.packed import Packed

SMALL = 2**24  # weights of a network: the embedded UNet has 2**23; of SD 1.5's the encoder, its smallest, has 2**25
FEW = 4  # rows of a batch: with more, the work between two waits is worth sharing

outside = threading.local()  # .numbers: of threads outside each call that is under way in this thread


def use_one_thread(network: nn.Module) -> nn.Module:
    """Has a small network compute few rows, without gradients, in one thread; the caller's number stays as it was.

    Returns the network; large ones as they are.
    """
    packed = [layer.packed_weight for layer in network.modules() if isinstance(layer, Packed)]  # are no parameters
    if sum(weight.numel() for weight in [*network.parameters(), *packed]) <= SMALL:
        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end, always_call=True)
    return network


def begin(network, inputs):
    outside.numbers = [*getattr(outside, "numbers", []), torch.get_num_threads()]
    if len(inputs[0]) <= FEW and not torch.is_grad_enabled():
        torch.set_num_threads(1)


def end(network, inputs, output):
    *outside.numbers, number = outside.numbers
    torch.set_num_threads(number)
