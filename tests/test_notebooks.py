"""Every notebook runs from its first cell to its last, in a fresh kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = (
    "01_first_passes.ipynb",
    "02_undo_and_history.ipynb",
    "03_bisect_a_broken_pass.ipynb",
    "04_write_your_own_pass.ipynb",
    "05_sparse_training.ipynb",
    "06_block_sparse.ipynb",
    "07_graph_pruning.ipynb",
)


def test_every_notebook_is_listed():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_outputs_that_are_kept_are_clean(name):
    """A code host shows them: they are there, and hold no warning, error or path of the machine they were made on."""
    cells = [cell for cell in nbformat.read(FOLDER / name, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "site-packages" not in str(outputs)


LONG = NOTEBOOKS[4:]  # `make test` runs the first four


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NOTEBOOKS], ids=lambda n: n
)
def test_notebook_runs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    assert counts, f"{name} has no code"
