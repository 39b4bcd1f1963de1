"""Ensembles: a run whose predictions are the mean of other runs' ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forensics_lib.params import Params, make_params, without_removed
from forensics_lib.run import Run, trained_by, trained_tasks
from forensics_lib.utils.files import home, read_json


class EnsembleError(ValueError):
    """Runs cannot be averaged; the message says why."""


def make_ensemble(names: list[str], name: str) -> Path:
    """Write the parameters of a run ``name`` that averages the runs ``names``; returns the file, for ``open_run``.

    It has the tasks that all members were trained for, the first one's data and other parameters, and is constrained only
    where every member is.  Raises ``EnsembleError``.
    """
    if len(set(names)) < 2:
        raise EnsembleError(f"two or more different runs are needed; found {', '.join(names) or 'none'}")
    facts = {member: read_json(_folder(member) / "run.json") for member in names}
    if missing := [member for member, found in facts.items() if not trained_tasks(found)]:
        there = sorted(path.parent.name for path in (home() / "outputs").glob("*/run.json"))
        raise EnsembleError(f"no trained run {', '.join(missing)}; there are {', '.join(there) or 'none'}")
    tasks = [task for task in "AB" if all(task in trained_tasks(found) for found in facts.values())]
    if not tasks:
        raise EnsembleError(f"{', '.join(names)} have no task in common")
    trained = [trained_by(Run(Params(run_name=member), home()), task)["params"] for member in names for task in tasks]
    if len({bool(params.get("sample")) for params in trained}) > 1:
        raise EnsembleError("some of the runs are of the built-in sample and some are not: they have no images in common")
    return _written(names, name, tasks, trained)


def _written(names: list[str], name: str, tasks: list[str], trained: list[dict[str, Any]]) -> Path:
    open_data = any(params.get("run_type") == "open" for params in trained)
    values = without_removed(trained[0]) | {"run_name": name, "ensemble": names, "detector": None, "tasks": tasks}
    params = make_params(values | {"run_type": "open" if open_data else "constrained"}, f"run.json of {names[0]}")
    if params.sample and "sample" not in name:
        params = params.model_copy(update={"run_name": f"{name}_sample"})
    earlier = (read_json(_folder(params.run_name) / "run.json").get("params") or {}).get("ensemble")
    if (_folder(params.run_name) / "run.json").is_file() and not earlier:
        raise EnsembleError(f"{_folder(params.run_name)} is a run that averages none: choose another name")
    if params.run_name in _members(names):
        raise EnsembleError(f"{params.run_name} is among the runs that it would average: choose another name")
    return Run(params, home()).write_params()


def _members(names: list[str]) -> set[str]:
    """These runs, and those that they average in turn."""
    found: set[str] = set()
    while names:
        found |= set(names)
        inner = [(read_json(_folder(name) / "run.json").get("params") or {}).get("ensemble") or [] for name in names]
        names = [name for members in inner for name in members if name not in found]
    return found


def _folder(name: str) -> Path:
    return home() / "outputs" / name
