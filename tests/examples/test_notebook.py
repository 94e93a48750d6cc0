"""The notebook runs as it stands, and says what is true."""

from __future__ import annotations

from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(o.get("text", "") for o in outputs)
    assert "bottleneck  stride" in texts
    assert "inside the true lesion: True" in texts
    pages = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert len(pages) == 1
    assert "lesion" in pages[0]
    results = [o["data"]["text/plain"] for o in outputs if o.output_type == "execute_result"]
    inside = eval(next(text for text in results if text.startswith("{")))
    assert inside["hires_cam"] > inside["random"]
    scan = nib.load(next((tmp_path / "notebook").glob("*scan*.nii.gz")))
    cam = nib.load(tmp_path / "notebook" / "lesion.nii.gz")
    assert np.array_equal(cam.affine, scan.affine)
    assert (tmp_path / "notebook" / "slicer" / "case.mrb").is_file()
