"""Links between pages, and the commands and names that pages speak of."""

import re
from importlib.util import find_spec

import pytest

from forensics_lib.__main__ import _parser
from forensics_lib.params import Params
from forensics_lib.utils.files import project_root

ROOT = project_root()
LIBRARY = ROOT / "forensics_lib"
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_and_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", "\n".join(re.findall(r"`{1,3}[^`]*`{1,3}", text))):
        assert set(line.split()) <= targets, f"{page.name}: make {line}"
    commands = _parser()._subparsers._group_actions[0].choices
    for command in re.findall(r"-m forensics_lib ([a-z-]+)", text):
        assert command in commands, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_are_parameters(page):
    for settings in re.findall(r'SET="([^"]*)"', page.read_text(encoding="utf-8")):
        for setting in settings.split():
            assert setting.partition("=")[0] in {*Params.model_fields, "key", "..."}, f"{page.name}: {setting}"


def test_every_room_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [*LIBRARY.glob("[a-z]*.py"), *(path.parent for path in LIBRARY.glob("*/__init__.py"))]
    assert [path.stem for path in rooms if f"`{path.stem}`" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_and_what_they_hold_exist(page):
    text = page.read_text(encoding="utf-8")
    for module, name in re.findall(r"`([\w./]+/\w+\.py)`(?: \(`(\w+)`\))?", text):
        found = [path for path in (ROOT / module, LIBRARY / module) if path.is_file()]
        assert found, f"{page.name}: {module}"
        assert name in found[0].read_text(encoding="utf-8"), f"{page.name}: {module} has no {name}"
    for module in re.findall(r"\bfrom (forensics_lib[\w.]*) import", text):
        assert find_spec(module), f"{page.name}: {module}"
