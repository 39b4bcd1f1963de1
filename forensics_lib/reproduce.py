"""Do a run again from what its ``run.json`` says, and compare what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.data.manifest import build_manifest, data_fingerprint
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.inference.predict import load_mask
from forensics_lib.inference.shards import infer
from forensics_lib.params import Params, make_params
from forensics_lib.run import Run, open_run, trained_by, trained_tasks
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, read_json, update_json

ENDING = "_again"  # of the repeated run's name
COMPARED = ("python", "machine", "versions", "git")  # facts that may explain a difference


def reproduce(name: str) -> pd.DataFrame:
    """Train, evaluate and infer once more with what trained the tasks of ``outputs/<name>``, as ``<name>_again``.

    Prints what differs in versions, machine, code and data.  Returns one row per result: file, whether its bytes are
    equal, and the largest difference of a number in it.  Raises ``FileNotFoundError`` where there is no such run,
    ``FileExistsError`` where another run has the name of its repetition.
    """
    record = home() / "outputs" / name / "run.json"
    facts = read_json(record)
    tasks = trained_tasks(facts)
    if not tasks:
        there = sorted(path.parent.name for path in record.parents[1].glob("*/run.json"))
        raise FileNotFoundError(f"no trained run {name} (looked at {record}); there are {', '.join(there) or 'none'}")
    _make_room(name)
    rows = []
    for task in tasks:
        first, again = _opened(name, task, facts)
        now = read_json(again.folder / "run.json")
        if task == tasks[0]:
            print("\n".join(_differences(facts, now)))
        own = {key: value for key, value in trained_by(first, task).items() if value != facts.get(key)}
        print("\n".join(f"Task {task}: {line}" for line in _differences({key: now.get(key) for key in COMPARED} | own, now)))
        rows += _done_again(first, again, task, facts)
    return pd.DataFrame(rows, columns=["file", "equal", "largest_difference"])


def _make_room(name: str) -> None:
    """Remove an earlier repetition; a run that is none is left alone."""
    folder = home() / "outputs" / f"{name}{ENDING}"
    if (folder / "run.json").is_file() and read_json(folder / "run.json").get("repeats") != name:
        raise FileExistsError(f"{folder} is not known as a repetition of {name}: rename it, or remove it")
    shutil.rmtree(folder, ignore_errors=True)
    update_json(folder / "run.json", repeats=name)


def _opened(name: str, task: str, facts: dict[str, Any]) -> tuple[Run, Run]:
    """A run as it was when a task was trained, and its repetition."""
    trained = trained_by(Run(Params(run_name=name), home()), task)
    first = Run(make_params(trained["params"] | {"run_name": name}, f"run.json of {name}"), Path(trained["data"]))
    values: dict[str, Any] = {"run_name": name + ENDING, "tasks": [task]}
    if f"task{task}_inferred" in facts:
        values[f"test_folder_{task.lower()}"] = facts[f"task{task}_inferred"]["test_folder"]
    again = Run(first.params.model_copy(update=values), first.data)
    return first, open_run(again.write_params())


def _done_again(first: Run, again: Run, task: str, facts: dict[str, Any]) -> list[tuple[str, bool, float]]:
    manifest = build_manifest(again, task)
    if data_fingerprint(manifest) != facts.get(f"task{task}_data_fingerprint"):
        print(f"Task {task}: the data are not those of the first run")
    train(again, task, manifest)
    evaluate(again, task, manifest)
    infer(again, task)
    rows = [_compared(first.val_probs(task), again.val_probs(task)), _compared(first.test_probs(task), again.test_probs(task))]
    if task == "B":
        rows += [_compared(mask, again.masks / mask.name) for mask in sorted(first.masks.glob("*.npz"))]
    return rows


def _differences(first: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    return [f"{key} was {first.get(key)}, is {again.get(key)}" for key in COMPARED if first.get(key) != again.get(key)]


def _compared(first: Path, again: Path) -> tuple[str, bool, float]:
    """A result's name, whether it is the same to the last byte, and the largest difference of its numbers."""
    if not (first.is_file() and again.is_file()):
        return first.name, False, float("nan")
    if first.read_bytes() == again.read_bytes():
        return first.name, True, 0.0
    if first.suffix == ".npz":
        one, other = (load_mask(path).astype(float) for path in (first, again))
    else:
        one, other = (pd.read_csv(path)["prob"].to_numpy() for path in (first, again))
    return first.name, False, float(np.abs(one - other).max()) if one.shape == other.shape else float("nan")
