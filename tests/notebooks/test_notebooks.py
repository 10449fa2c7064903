"""Every notebook runs from top to bottom, and is checked in with the outputs that it has."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from golden_cases import FULL
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 600  # seconds for one cell
SHORTER = ("fine_tune.short_phase(steps=50)", "fine_tune.short_phase(steps=4)")  # unless everything is tested


def kinds(cell) -> list[str]:
    """What a code cell has put out: "stdout", or the richest form of each piece of data."""
    found = []
    for output in cell.outputs:
        assert output.output_type != "error", output.get("evalue")
        if output.output_type == "stream":
            found += [output.name] if output.name not in found else []
        else:
            found.append("image" if "image/png" in output.data else "text")
    return [kind for kind in found if kind != "stderr"]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_outputs_are_checked_in(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    cells = code_cells(notebook)
    kept = [kinds(cell) for cell in cells]
    assert all(
        found for cell, found in zip(cells, kept, strict=True) if "print" in cell.source or "show" in cell.source
    )
    assert any("image" in found for found in kept)
    for cell in cells:
        cell.source = cell.source if FULL else cell.source.replace(*SHORTER)
    client = NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert [kinds(cell) for cell in cells] == kept
