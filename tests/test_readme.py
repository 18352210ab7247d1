"""What the README prints works as printed, and what it says of the files is so.

`python -m tests.test_readme` writes the lengths of the files into it anew.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import cli
import model_loader

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LISTED = re.compile(r"^( +)([\w/]+\.py)( +)(\d+)(?=   \S)", flags=re.MULTILINE)  # a file and its length


@pytest.fixture
def tiny_model(checkpoint, monkeypatch):
    """The tiny checkpoint in place of the one in data/, on the CPU, and the folder of the test as the current one."""
    preload = model_loader.preload_models_from_standard_weights
    monkeypatch.setattr(model_loader, "find_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(model_loader, "best_device", lambda: "cpu")
    monkeypatch.setattr(model_loader, "preload_models_from_standard_weights",
                        lambda path, device, *more, **options: preload(checkpoint, "cpu", *more, **options))
    model_loader.default_models.cache_clear()
    yield
    model_loader.default_models.cache_clear()


def test_python_blocks_run(tiny_model, monkeypatch, tmp_path):
    """One after another, as in one session: each leaves one more picture."""
    monkeypatch.chdir(tmp_path)
    namespace, drawn = {}, set()
    for block in BLOCKS:
        exec(block.replace('device="cuda"', 'device="cpu"'), namespace)
        picture, = set(tmp_path.glob("*.png")) - drawn
        assert Image.open(picture).size == (64, 64), block
        drawn.add(picture)


def test_commands_run_one_after_another(tiny_model, monkeypatch, tmp_path):
    """From top to bottom, in one folder: each writes a picture under the next free name, and takes none away."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "photo.jpg")
    commands = re.findall(r"^    \.venv/bin/python (cli\.py .*)$", TEXT, flags=re.MULTILINE)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        cli.main()
    names = ["output.png", *(f"output-{k}.png" for k in range(2, len(commands) + 1))]
    assert len(names) > 3 and sorted(names) == sorted(path.name for path in tmp_path.glob("*.png"))


def test_a_script_in_another_folder_runs(checkpoint, tmp_path):
    """By the line that the README prints, with the first block as the script, cut to one step of the tiny model."""
    folder = "path/to/this/folder"
    command, = re.findall(rf"^ +(PYTHONPATH={folder} .* apple\.py)$", TEXT, flags=re.MULTILINE)
    command = command.replace(f"{folder}/.venv/bin/python", sys.executable).replace(folder, str(ROOT))
    tiny = f'models=model_loader.preload_models_from_standard_weights({str(checkpoint)!r}, "cpu")'
    script = BLOCKS[0].replace("seed=42", f"seed=42, n_inference_steps=1, {tiny}")
    (tmp_path / "apple.py").write_text(f"import model_loader\n{script}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)
    assert Image.open(tmp_path / "apple.png").size == (64, 64)


def test_files_it_names_exist():
    listed = [name for _, name, _, _ in LISTED.findall(TEXT)]
    assert len(listed) > 10
    for name in listed + re.findall(r"\]\(([\w/.-]+)\)", TEXT) + re.findall(r"`(extensions/\w+\.py)`", TEXT):
        assert (ROOT / name).exists(), name


def test_options_it_names_exist():
    files = [ROOT / "cli.py", *ROOT.glob("extensions/*.py"), *ROOT.glob("training/*.py")]
    options = {option for file in files for option in re.findall(r'(?:add\(|name=)"(--[a-z-]+)"', file.read_text())}
    assert set(re.findall(r"(?<!\S)[`(]*(--[a-z][a-z-]+)", TEXT)) - {"--help", "--index-url"} <= options


def test_files_are_as_long_as_it_says():
    for _, name, _, length in LISTED.findall(TEXT):
        assert abs(count_lines(name) - int(length)) <= 10 + count_lines(name) / 5, "run python -m tests.test_readme"


def test_every_module_of_the_core_is_listed():
    listed = {name for _, name, _, _ in LISTED.findall(TEXT)}
    assert {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("cpu/*.py")]} == listed


def count_lines(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def with_lengths(text):
    """Returns the README with the lengths of the files as they are, rounded to tens."""
    def listed(match):
        indent, name, space, length = match.groups()
        new = str(max(round(count_lines(name), -1), 10))
        return f"{indent}{name}{space[: len(space) + len(length) - len(new)]}{new}"
    return LISTED.sub(listed, text)


if __name__ == "__main__":
    README.write_text(with_lengths(TEXT), encoding="utf-8")
