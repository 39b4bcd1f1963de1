"""Execute the notebooks on the sample and keep the outputs that nbval compares, small pictures, tables and sentences.

They run in a folder of their own, ``build/notebooks``, whatever lies in ``data``.  Names of notebooks as arguments execute
those alone.

nbval takes a cell without an execution count for one that was never run and compares nothing, so counts are kept.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHECKED = "nbval-check-output"
WIDTH = 900  # of a kept picture, pixels


def refresh(path: Path) -> None:
    """Execute one notebook in place and strip it."""
    print(f"executing {path.name}", flush=True)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": NOTEBOOKS}}
    NotebookClient(notebook, timeout=1200, iopub_timeout=60, kernel_name="python3", resources=place).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if CHECKED not in cell.metadata.get("tags", []):
            cell.outputs = [kept for output in cell.outputs if (kept := shown(output))]
        cell.metadata.pop("keep_output", None)
        if cell.outputs:
            cell.metadata["keep_output"] = True  # what nbstripout leaves alone
    nbformat.write(notebook, path)
    strip = [sys.executable, "-m", "nbstripout", "--keep-count", "--keep-id", str(path)]
    subprocess.run(strip, check=True)


def shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The output as it is kept: a small picture, a table, sentences; None for anything else and what names a folder of here."""
    data = output.get("data", {})
    if "image/png" in data:
        kind, content = small(base64.b64decode(data["image/png"]))
        output.data = {kind: base64.b64encode(content).decode(), "text/plain": data["text/plain"]}
        output.metadata = {}
        return output
    if "<table" in data.get("text/html", "") and str(NOTEBOOKS.parent) not in data["text/html"]:
        return output
    if data.get("text/markdown"):
        output.data = {"text/markdown": data["text/markdown"], "text/plain": data["text/plain"]}
        return output
    return None


def small(png: bytes) -> tuple[str, bytes]:
    """A picture at most ``WIDTH`` pixels wide, as PNG with a palette or as JPEG, whichever is smaller."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    files = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    picture.quantize(64, dither=Image.Dither.NONE).save(files["image/png"], "PNG", optimize=True)
    picture.save(files["image/jpeg"], "JPEG", quality=75, optimize=True)
    return min(((kind, file.getvalue()) for kind, file in files.items()), key=lambda found: len(found[1]))


if __name__ == "__main__":
    os.environ["FORENSICS_HEADLESS"] = "1"
    home = NOTEBOOKS.parent / "build" / "notebooks"
    os.environ["FORENSICS_HOME"] = str(home)
    if not sys.argv[1:]:  # a training of this name that is finished would be taken as it is, whatever code it was trained by
        shutil.rmtree(home / "outputs", ignore_errors=True)
    for path in sorted(NOTEBOOKS.glob("0*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            refresh(path)
