"""What lies around the library: environment, notebooks, Makefile."""

import re
import subprocess
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from forensics_lib.files import project_root

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
CONDA_NAMES = {"torch": "pytorch"}


def test_environment_file_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    split = [re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in wanted]
    expected = {CONDA_NAMES.get(name, name) + bounds for name, bounds in split} | {f"python{project['requires-python']}"}
    listed = {line for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(line, str)}
    assert listed - {"pip", "make"} == expected


def test_lock_file_agrees_with_pyproject():
    """Every dependency is pinned with a hash, at a version that pyproject.toml allows."""
    lines = [line for line in (ROOT / ".ci" / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pinned = {}
    for line in lines:
        name, version = re.fullmatch(r"([a-z0-9._-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups()
        pinned[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, wanted


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nbval_really_compares_at_least_three_cells(path):
    compared = [
        cell
        for cell in nbformat.read(path, 4).cells
        if "nbval-check-output" in cell.metadata.get("tags", []) and cell.execution_count is not None and cell.outputs
    ]
    assert len(compared) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_small_pictures_and_no_long_cells(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    pictures = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [] if "nbval-check-output" in cell.metadata.get("tags", []) else cell.outputs
            kinds = [set(output.get("data", {})) for output in kept]
            assert all(kind & {"image/png", "image/jpeg", "text/html"} for kind in kinds)
            pictures += sum(bool(kind & {"image/png", "image/jpeg"}) for kind in kinds)
            assert len(cell.source.splitlines()) <= 8
            assert not re.search(r"^\s*(class|def|while) ", cell.source, re.MULTILINE)
    assert pictures
    assert str(ROOT) not in path.read_text()
    assert path.stat().st_size < 1_500_000


def test_five_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_explore", "02_train_taskA", "03_train_taskB", "04_infer", "05_submit"]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert all(re.search(rf"^{target}\s+\S", shown, re.MULTILINE) for target in phony)
