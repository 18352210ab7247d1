"""What the tests share: one tiny random checkpoint, its modules, and the rules for tests that need certain hardware."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, whose networks are as small

import pytest
import torch

import model_converter
import oracle
from cpu.attention import onednn_computes
from model_converter import read_networks
from model_loader import load_tokenizer, preload_models_from_standard_weights
from pipeline import generate

# Begun first, since one of them begun last would leave the other processes idle for a minute.
LONG = ["test_web_page.py", "test_batch.py", "test_export.py", "test_notebook.py", "test_lesson.py", "test_readme.py"]


@pytest.fixture(autouse=True, scope="session")
def no_gradients():
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # the networks here are so small that threads would wait for each other


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The path of a tiny random checkpoint; `oracle.TINY` has its configs."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    oracle.write_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def weights():
    """The weights in that checkpoint, by standard name."""
    return oracle.random_weights()


@pytest.fixture(scope="session")
def models(checkpoint):
    """The four networks of that checkpoint, on the CPU in float32."""
    modules = read_networks(checkpoint, dtype=torch.float32)
    return {network: module.eval() for network, module in modules.items()}


@pytest.fixture
def written(tmp_path):
    """Writes a dict of weights as a pickled checkpoint and returns its path."""
    def write(checkpoint, name="model.ckpt", **settings):
        torch.save(checkpoint, tmp_path / name, **settings)
        return tmp_path / name
    return write


@pytest.fixture
def tiny(monkeypatch):
    """Pickles cannot say how many heads there are: let the tiny ones be the default."""
    infer = model_converter.infer_configs
    monkeypatch.setattr(model_converter, "infer_configs", lambda weights, metadata: infer(weights, oracle.METADATA))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def draw(models, tokenizer):
    """generate() with the tiny networks and two steps: 64x64 pixels."""
    def draw(prompt="a cat", **settings):
        settings = {"n_inference_steps": 2, "sampler_name": "ddim", "seed": 7, **settings}
        return generate(prompt, models=models, tokenizer=tokenizer, **settings)
    return draw


# ---- for what draws through the studio; imported here alone, as other tests need no server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with something of everything, all of it tiny."""
    from web_server import fill_data

    return fill_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def networks(data):
    """The four networks of the checkpoint in it."""
    return preload_models_from_standard_weights(data / "tiny.safetensors", "cpu", "float32")


@pytest.fixture(scope="module")
def studio(data):
    from web_server import tiny_studio

    studio = tiny_studio(data)
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def url(studio):
    """The address of a server with the API of that studio, without the page."""
    from web_server import serving

    from extensions.web import create_app

    with serving(create_app(studio, page=False)) as url:
        yield url


def pytest_collection_modifyitems(items):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "bf16": onednn_computes(torch.bfloat16)}
    for item in items:
        for hardware, is_here in available.items():
            if item.get_closest_marker(hardware) and not is_here:
                item.add_marker(pytest.mark.skip(reason=f"no {hardware} on this machine"))
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
