"""demo.ipynb runs from end to end, and is stored with what it shows."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "demo.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(checkpoint, tmp_path_factory):
    """The notebook after a run with few steps on the tiny random checkpoint, which draws 64×64 pixels."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINT", str(checkpoint))
        patch.setenv("STEPS", "5")
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute()  # raises CellExecutionError where a cell fails
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def describe_outputs(cell):
    """What kinds of output a cell has: the streams and the media types, without repetition."""
    return {kind for output in cell.outputs for kind in ([output.name] if "name" in output else output.get("data", {}))}


def test_runs_from_end_to_end(executed):
    assert code_cells(executed)[0].outputs[0].text.rstrip().endswith("64×64 pixels, 5 steps")
    assert all(cell.outputs for cell in code_cells(executed))


def test_is_stored_with_the_outputs_of_a_whole_run_in_order(stored, executed):
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "128×128 pixels, 20 steps" in cells[0].outputs[0].text
    for cell, fresh in zip(cells, code_cells(executed), strict=True):
        kinds = describe_outputs(cell)
        assert kinds and kinds == describe_outputs(fresh) - {"stderr"}, cell.source
        assert not any(output.output_type == "error" for output in cell.outputs)


def test_stored_outputs_are_small_and_show_no_paths(stored):
    assert NOTEBOOK.stat().st_size < 1.5e6
    for cell in code_cells(stored):
        for output in cell.outputs:
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert "/home" not in text and str(NOTEBOOK.parent) not in text and "site-packages" not in text
