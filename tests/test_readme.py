"""What the README prints works as printed."""

import re
from pathlib import Path

import pytest
from PIL import Image

import model_loader

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, checkpoint, monkeypatch, tmp_path):
    """With the tiny checkpoint in place of the one in data/, on the CPU."""
    preload = model_loader.preload_models_from_standard_weights
    monkeypatch.setattr(model_loader, "find_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(model_loader, "best_device", lambda: "cpu")
    monkeypatch.setattr(model_loader, "preload_models_from_standard_weights",
                        lambda path, device, *more, **options: preload(checkpoint, "cpu", *more, **options))
    model_loader.default_models.cache_clear()
    monkeypatch.chdir(tmp_path)
    exec(block.replace('device="cuda"', 'device="cpu"'), {})
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 1 and Image.open(pictures[0]).size == (64, 64)
    model_loader.default_models.cache_clear()


def test_files_it_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"^ +(\w+\.py) ", text, flags=re.MULTILINE) + re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (ROOT / name).exists(), name
