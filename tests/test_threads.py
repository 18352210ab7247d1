import copy
import pickle

import pytest
import torch

from cpu.packed import pack
from cpu.threads import FEW, use_one_thread
from model_converter import NETWORKS
from model_loader import ROOT, preload_models_from_standard_weights


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Seen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers, self.weight = [], torch.nn.Parameter(torch.zeros(3))

    def forward(self, x, fail=False):
        self.numbers.append(torch.get_num_threads())
        if fail:
            raise RuntimeError("no")
        return x


def test_few_rows_take_one_thread_and_the_callers_number_stays():
    network = use_one_thread(Seen())
    network(torch.zeros(FEW, 3))
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3), fail=True)
    assert torch.get_num_threads() == 2
    network(torch.zeros(FEW + 1, 3))
    with torch.enable_grad():
        network(torch.zeros(1, 3))
    assert network.numbers == [1, 1, 2, 2] and torch.get_num_threads() == 2


def test_calls_within_calls():
    network = use_one_thread(torch.nn.Sequential(use_one_thread(Seen()), use_one_thread(Seen())))
    network(torch.zeros(1, 3))
    assert [layer.numbers for layer in network] == [[1], [1]] and torch.get_num_threads() == 2


@pytest.mark.parametrize("network", NETWORKS)
def test_the_networks_of_sd_keep_all_threads(network):
    with torch.device("meta"):
        assert not use_one_thread(NETWORKS[network]())._forward_pre_hooks


def test_packed_weights_count():
    layer = torch.nn.Linear(2**12, 2**12 + 1)
    assert not use_one_thread(layer)._forward_pre_hooks
    assert not use_one_thread(torch.nn.Sequential(pack(layer)))._forward_pre_hooks
    assert use_one_thread(torch.nn.Sequential(pack(torch.nn.Linear(16, 16))))._forward_pre_hooks


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_in_the_box_is_small(packed):
    models = preload_models_from_standard_weights(ROOT / "data" / "emoji.safetensors", "cpu", "float32", pack=packed)
    assert all(model._forward_pre_hooks for model in models.values())


def test_such_networks_can_be_copied_and_pickled():
    network = use_one_thread(torch.nn.Linear(3, 3))
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(again(torch.ones(1, 3)), network(torch.ones(1, 3)))
