"""The library's rooms stand on each other in one order, and no module takes another one's private names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from forensics_lib.utils.files import project_root

# From what users call down to what everything stands on: a room imports only from rooms to the right of it
ROOMS = (
    *("__main__", "pipeline", "reports", "training", "submission", "evaluation", "inference", "data"),
    *("run", "synthesis", "images", "models", "device", "params", "utils"),
)
LIBRARY = project_root() / "forensics_lib"


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Each module of the library that a source imports from, wherever in it, with the name that it takes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forensics_lib"):
            for alias in node.names:
                module = node.module if "." in node.module else f"{node.module}.{alias.name}"
                yield module, alias.name


def broken_rules(path: Path, source: str) -> list[str]:
    """Imports that go up, from a module at ``path`` in the library, and those of private names."""
    room = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    found = []
    for module, name in imported(source):
        if ROOMS.index(room_of(module)) < ROOMS.index(room):
            found.append(f"{room} imports {module}, which stands above it")
        if name.startswith("_"):
            found.append(f"{module}.{name} is private")
    return found


@pytest.mark.parametrize(
    "path", sorted(set(LIBRARY.rglob("*.py")) - {LIBRARY / "__init__.py"}), ids=lambda path: str(path.relative_to(LIBRARY))
)
def test_a_module_imports_only_from_rooms_below_its_own(path):
    assert broken_rules(path, path.read_text()) == []


def test_every_room_has_its_place():
    rooms = {
        path.name.removesuffix(".py") for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "source", "rule"),
    [
        ("images", "from forensics_lib.data.manifest import usable", "stands above"),
        ("images", "def f():\n    from forensics_lib.run import Run", "stands above"),
        ("run.py", "from forensics_lib import pipeline", "stands above"),
        ("data", "from forensics_lib.images.io import _quality", "is private"),
    ],
)
def test_the_check_finds_what_it_looks_for(room, source, rule):
    assert rule in broken_rules(LIBRARY / room, source)[0]
