"""What lies around the library: environment, notebooks, Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from forensics_lib.utils.files import project_root

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
            assert all(kind & {"image/png", "image/jpeg", "text/html", "text/markdown"} for kind in kinds)
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
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^{target}\s+\S", shown, re.MULTILINE) for target in phony)


MESSY = "a  b's $HOME checkout"  # of a folder's name: everything that a shell may take apart
NOTES = """#!/bin/sh
printf '%s\\n' "--" "$FORENSICS_HOME" "$@" >> "$NOTED"
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The Makefile in a folder with blanks, among folders that a torn path would name; Python only notes its words."""
    root = tmp_path / MESSY
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "forensics_lib").mkdir()
    shutil.copy(ROOT / "Makefile", root)
    (root / "forensics_lib" / "__main__.py").touch()
    (root / "pyproject.toml").touch()
    for name in ("python", "jupyter", "ruff"):
        (root / ".venv" / "bin" / name).write_text(NOTES)
        (root / ".venv" / "bin" / name).chmod(0o755)
    (root / ".venv" / ".ready").touch()
    for neighbour in ("a", "b's", "b", "checkout", "outputs"):
        (tmp_path / neighbour / "outputs" / ".test").mkdir(parents=True)
        (root / neighbour).mkdir()
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    monkeypatch.delenv("FORENSICS_HOME", raising=False)
    return root


def words_to_python(root: Path, *arguments: str) -> list[list[str]]:
    """Every call of Python by one make command: ``FORENSICS_HOME``, then its arguments."""
    noted = root.parent / "noted"
    noted.unlink(missing_ok=True)
    subprocess.run(["make", "-C", str(root), *arguments], check=True, capture_output=True)
    return [call.splitlines() for call in noted.read_text().split("--\n")[1:]] if noted.is_file() else []


def folders(root: Path) -> set[Path]:
    return {path for path in root.parent.rglob("*") if path.is_dir() and MESSY not in path.parts}


def test_make_deletes_nothing_outside_its_folder(checkout):
    before = folders(checkout)
    (checkout / "outputs" / ".test").mkdir()
    (checkout / "outputs" / ".test" / "old").touch()
    (checkout / "outputs" / "kept").touch()
    _, nbval = words_to_python(checkout, "test")
    assert nbval[0] == f"{checkout}/outputs/.test"
    assert not (checkout / "outputs" / ".test" / "old").exists() and (checkout / "outputs" / "kept").exists()
    for target in ("clean", "clean-env"):
        words_to_python(checkout, target)
    assert folders(checkout) == before
    assert not (checkout / "outputs").exists() and not (checkout / ".venv").exists()


def test_make_elsewhere_does_nothing(tmp_path):
    (tmp_path / "outputs").mkdir()
    made = subprocess.run(["make", "-f", str(ROOT / "Makefile"), "clean"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode and "make -C" in made.stderr
    assert (tmp_path / "outputs").is_dir()


AWKWARD = ["tasks=[A, B] team=007", "/my  data/it's", 'a "b" $c', "x;touch gone", "$(touch gone)", "`touch gone`", "*", "a\\b"]


@pytest.mark.parametrize("value", AWKWARD)
def test_what_make_is_given_arrives_as_it_is(checkout, value):
    given = value.replace("$", "$$")  # which make itself asks for
    for target, command in (("run", "run"), ("check-data", "check-data")):
        [words] = words_to_python(checkout, target, f"PARAMS={given}", f"DATA={given}", f"SET={given}")
        expected = ["-m", "forensics_lib", command, "--params", value, "--data", value, "--set", value]
        assert words[1:] == expected
    for target in ("run-constrained", "run-open"):
        [words] = words_to_python(checkout, target, f"DATA={given}", f"FROM={given}")
        assert words[-4:] == ["--data", value, "--from", value]
    [words] = words_to_python(checkout, "reproduce", f"RUN={given}")
    assert words[-1] == value
    assert not list(checkout.rglob("gone"))


def test_lists_that_make_is_given_are_quoted_word_by_word(checkout):
    [words] = words_to_python(checkout, "compare", "RUNS=one two* $$(touch gone)")
    assert words[-4:] == ["one", "two*", "$(touch", "gone)"]
    [words] = words_to_python(checkout, "lock", "TORCH=torch>=2.9,<3 torchvision")
    assert words[-2:] == ["torch>=2.9,<3", "torchvision"]
    assert not [path for path in checkout.iterdir() if path.name.startswith(("=", "3"))]


def test_without_settings_make_passes_none(checkout):
    assert [words[1:] for words in words_to_python(checkout, "check-data")] == [
        ["-m", "forensics_lib", "check-data", "--params", "params/constrained.yaml"]
    ]


def test_another_python_may_lie_in_a_folder_with_blanks(checkout, tmp_path):
    python = tmp_path / "my  python" / "python3"
    python.parent.mkdir()
    python.write_text(NOTES)
    python.chmod(0o755)
    (checkout / ".venv" / ".ready").unlink()
    calls = words_to_python(checkout, "setup", f"PYTHON={python}")
    assert ["-m", "venv", ".venv"] in [words[1:] for words in calls]


def test_all_notebooks_open_on_the_run_that_the_first_command_makes():
    """``make run-constrained``, then ``make lab``: one run."""
    makefile = (ROOT / "Makefile").read_text()
    [params] = re.findall(r"^run-constrained:.*\n.*PIPELINE,([\w/.]+)\)", makefile, re.MULTILINE)
    defaults = {re.search(r'params_file: str = "(.*?)"', path.read_text().replace('\\"', '"'))[1] for path in NOTEBOOKS}
    assert defaults == {params}
    command, environment = [sys.executable, "-m", "forensics_lib", "infer", "--help"], os.environ | {"PYTHONPATH": str(ROOT)}
    help_text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert f"(default: {params})" in " ".join(help_text.split())
