"""training/lesson.ipynb runs from end to end, and is stored with what it shows."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "training" / "lesson.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_runs_shortened(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("STEPS", "8")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    root = NOTEBOOK.parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}}).execute()
    assert code_cells(notebook)[0].outputs[0].text.strip() == "8 steps"
    assert "of 24" in code_cells(notebook)[-1].outputs[0].text


def test_is_stored_with_the_outputs_of_a_whole_run_and_is_small():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert int(cells[0].outputs[0].text.split()[0]) >= 400
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 4
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.parametrize("word", ["CLIP", "Diffusion", "DDIMSampler", "denoise"])
def test_uses_the_librarys_own_classes(word):
    assert any(f"import {word}" in cell.source or f", {word}" in cell.source
               for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4)))
