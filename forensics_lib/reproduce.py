"""Do a run again from what its ``run.json`` says, and compare what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.evaluation import evaluate
from forensics_lib.files import home, read_json
from forensics_lib.infer import infer
from forensics_lib.inference import load_mask
from forensics_lib.manifest import build_manifest, data_fingerprint
from forensics_lib.params import make_params
from forensics_lib.runs import Run, open_run
from forensics_lib.training import train

ENDING = "_again"  # of the repeated run's name
COMPARED = ("python", "machine", "versions", "git")  # facts that may explain a difference


def reproduce(name: str) -> pd.DataFrame:
    """Train, evaluate and infer once more with the parameters and data of ``outputs/<name>``, as ``<name>_again``.

    Prints what differs in versions, machine, code and data.  Returns one row per result: file, whether its bytes are
    equal, and the largest difference of a number in it.  Raises ``FileNotFoundError`` where there is no such run.
    """
    record = home() / "outputs" / name / "run.json"
    facts = read_json(record)
    if "params" not in facts:
        raise FileNotFoundError(f"no run {name}: {record} is not there or names no parameters")
    first = Run(make_params(facts["params"], str(record)), Path(facts["data"]))
    again = Run(first.params.model_copy(update={"run_name": name + ENDING}), first.data)
    shutil.rmtree(again.folder, ignore_errors=True)
    again = open_run(again.write_params())
    for difference in _differences(facts, read_json(again.folder / "run.json")):
        print(difference)
    rows = []
    for task in again.params.tasks:
        manifest = build_manifest(again, task)
        if data_fingerprint(manifest) != facts.get(f"task{task}_data_fingerprint"):
            print(f"Task {task}: the data are not those of the first run")
        train(again, task, manifest)
        evaluate(again, task, manifest)
        infer(again, task)
        rows.append(_compared(first.val_probs(task), again.val_probs(task)))
        rows.append(_compared(first.test_probs(task), again.test_probs(task)))
        if task == "B":
            rows += [_compared(mask, again.masks / mask.name) for mask in sorted(first.masks.glob("*.npz"))]
    return pd.DataFrame(rows, columns=["file", "equal", "largest_difference"])


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
