"""Execute the notebooks on the sample and keep the outputs of the cells that nbval compares; strip all others.

Names of notebooks as arguments execute those alone.

nbval takes a cell without an execution count for one that was never run and compares nothing, so counts are kept.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHECKED = "nbval-check-output"


def refresh(path: Path) -> None:
    """Execute one notebook in place and strip it."""
    print(f"executing {path.name}", flush=True)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code" and CHECKED in cell.metadata.get("tags", []):
            cell.metadata["keep_output"] = True  # what nbstripout leaves alone
    nbformat.write(notebook, path)
    strip = [sys.executable, "-m", "nbstripout", "--keep-count", "--keep-id", str(path)]
    subprocess.run(strip, check=True)  # noqa: S603 (fixed arguments)


if __name__ == "__main__":
    os.environ["FORENSICS_HEADLESS"] = "1"
    for path in sorted(NOTEBOOKS.glob("0*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            refresh(path)
