"""A run: its parameters, its data, the names of its files, and the record of what trained it."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from forensics_lib.params import InferenceKeys, Params, keys_of, load_params, make_params, without_removed
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.files import broken_link, from_home, home, is_main, project_root, read_json, update_json, write_text
from forensics_lib.utils.names import split_folders
from forensics_lib.utils.notebook_cells import notebook_parameters

PROVENANCE = ("params", "params_file", "data", "python", "machine", "versions", "git", "updated")
OF_TRAINING = ("shortcut_auc", "equalized", "shortcut_auc_of_crops")  # facts that notebook 01 may compute again at any time
PACKAGES = ("torch", "timm", "numpy", "pandas", "scikit-learn", "pillow", "papermill")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ``calibrated`` does to log-odds: divide by the temperature, add the intercept.  The defaults change nothing."""

    temperature: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Thresholds(Calibration):
    """What a task's validation images chose: the calibration, and the thresholds of calibrated probabilities and of masks."""

    threshold: float  # an image is called positive from this probability on
    loc_threshold: float = math.nan  # a pixel is from this value of the mask on; Task A has none

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Thresholds:
        """Thresholds among the entries of a file; where it names no temperature or intercept, nothing was calibrated by it."""
        return cls(**{key.name: facts[key.name] for key in fields(cls) if key.name in facts})

    def facts(self) -> dict[str, float]:
        """As files hold them, which leave out what a task has not."""
        return {key: value for key, value in asdict(self).items() if not math.isnan(value)}


class MissingDataError(FileNotFoundError):
    """Data that the run needs is missing."""


@dataclass(frozen=True)
class Run:
    """The parameters of a run and the paths of its files."""

    params: Params
    data: Path  # the data root in use: the user's, or the sample's
    params_file: str = ""  # file of the parameters

    @property
    def name(self) -> str:
        return self.params.run_name

    @property
    def sample(self) -> bool:
        return self.params.sample

    @property
    def folder(self) -> Path:
        """``outputs/<run_name>``: all of the run's files but those that ``output`` names."""
        return home() / "outputs" / self.name

    def output(self, task: str, ending: str) -> Path:
        """``outputs/<run_name>_<ending>``, with ``_taskB_`` in the name for Task B."""
        infix = "_taskB" if task == "B" else ""
        return home() / "outputs" / f"{self.name}{infix}_{ending}"

    def classifier_model(self, task: str) -> Path:
        return self.output(task, "classifier_model.pth")

    def finetuned_model(self, task: str) -> Path:
        return self.output(task, "finetuned_model.pth")

    def val_probs(self, task: str) -> Path:
        return self.output(task, "val_probs.csv")

    def test_probs(self, task: str) -> Path:
        return self.output(task, "test_probs.csv")

    @property
    def masks(self) -> Path:
        return self.folder / "masks"

    @property
    def thresholds(self) -> Path:
        return self.folder / "thresholds.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def submission(self) -> Path:
        return home() / "submission"

    def test_folder(self, task: str) -> Path:
        """The folder of unlabelled test images of a task."""
        chosen = self.params.test_folder_a if task == "A" else self.params.test_folder_b
        return from_home(chosen) if chosen and not self.sample else self.data / "test" / f"task{task}"

    def needed(self, task: str) -> dict[str, Path]:
        """The folders that the run reads for a task, by a short description."""
        if self.params.data:
            listed = {f"data set {number}": from_home(entry.root) for number, entry in enumerate(self.params.data, start=1)}
            return listed | {f"Task {task} test images": self.test_folder(task)}
        if task == "B":
            tgif, sagi = task_b_training_folders(self.data)
            training = {"Task B training (TGIF)": tgif}
            if self.params.edition >= 2026:  # either is enough
                training["Task B training (SAGI-D)"] = sagi
            return ({what: path for what, path in training.items() if path.exists()} or training) | {
                "Task B validation": self.data / "dataset_taskB" / "validation",
                "Task B test images": self.test_folder("B"),
            }
        splits = {split: folder for folder, split in reversed(split_folders(self.data / "dataset"))}
        folders = {
            "Task A training": splits.get("train", self.data / "dataset" / "train"),
            "Task A validation": splits.get("val", self.data / "dataset" / "val"),
            "Task A test images": self.test_folder("A"),
        }
        if self.params.run_type == "open" and self.params.trains and not self.params.aligned:  # twins count as open data
            folders["Task A open data"] = self.data / "dataset_open"
        return folders

    def missing(self) -> dict[str, Path]:
        """The folders that the run's tasks need and that do not exist."""
        return {what: path for task in self.params.tasks for what, path in self.needed(task).items() if not path.exists()}

    def describe(self) -> None:
        """Print the name, type and tasks of the run."""
        if self.sample:
            print(SAMPLE_BANNER)
        print(f"run {self.name}: {self.params.run_type}, tasks {', '.join(self.params.tasks)}")

    def parameters(self) -> pd.DataFrame:
        """A table of all parameters with their values and meanings."""
        rows = [(key, value, Params.model_fields[key].description) for key, value in self.params.model_dump().items()]
        return pd.DataFrame(rows, columns=["parameter", "value", "meaning"]).set_index("parameter")

    def require_task(self, task: str) -> None:
        """End a notebook here if its task is not in the run; papermill counts exit status 0 as success."""
        if task not in self.params.tasks:
            print(f"Task {task} is not in this run (tasks: {', '.join(self.params.tasks)}): nothing to do in this notebook.")
            raise SystemExit(0)

    def record(self, **values: Any) -> None:
        """Set keys in ``run.json``, the record of the run."""
        if is_main():
            update_json(self.folder / "run.json", **values)

    def write_params(self) -> Path:
        """Write the parameters in force to ``params.yaml`` in the run's folder, and return its path."""
        path = self.folder / "params.yaml"
        write_text(path, yaml.safe_dump(self.params.model_dump(mode="json"), sort_keys=False))
        return path


def task_b_training_folders(data: Path) -> tuple[Path, Path]:
    """The folders of TGIF and SAGI-D in a data root; SAGI-D also under the name used in its table's paths."""
    folder = data / "dataset_taskB"
    sagi = next((folder / name for name in ("SAGI-D", "sagid") if (folder / name).is_dir()), folder / "SAGI-D")
    return folder / "TGIF", sagi


SAMPLE_BANNER = """\
+----------------------------------------------------------------------------+
|  BUILT-IN SAMPLE DATA. These results say nothing about real generators:    |
|  they show that everything works. 'sample' is in the name of each file.    |
+----------------------------------------------------------------------------+"""


def open_run(params_file: str | Path, overrides: dict[str, Any] | None = None) -> Run:
    """Load the parameters of a run and find its data.

    If the default data root ``data/`` holds nothing that the run needs, the run uses the built-in sample, which is made
    first if necessary, and the parameters of ``params/sample.yaml``; both are announced, and ``sample`` becomes part of the
    run's name.  A data root that was given explicitly, or that is incomplete, is an error instead.

    Args:
        params_file: YAML file of parameters, absolute or relative to the project's folder.
        overrides: parameters that replace those of the file.

    Raises:
        ParamsError: some parameters are not valid.
        MissingDataError: data is missing; the message lists the folders.
    """
    overrides = dict(overrides or {})
    params = load_params(params_file, overrides)
    run = Run(params, from_home(params.data_root))
    missing = {} if params.sample else run.missing()
    if missing:
        _check_fallback(run, missing)
        run = Run(_sample_params(params, overrides), run.data)
        print(fallback_message(missing, run))
    if run.sample:
        from forensics_lib.synthesis.sample import build_sample

        run = Run(_named_sample(run.params), build_sample(home() / "data" / "sample"))
    run = replace(run, params_file=str(params_file))
    if not trained_tasks(read_json(run.folder / "run.json")):  # else run.json keeps what trained it
        run.record(run=run.name, sample=run.sample, **_provenance(run))
    return run


def open_notebook_run() -> Run:
    """Open the run of a notebook: ``params_file`` and any parameters set in its ``# Parameters`` cells."""
    parameters = notebook_parameters()
    return open_run(parameters.pop("params_file"), parameters)


def _check_fallback(run: Run, missing: dict[str, Path]) -> None:
    """Raise ``MissingDataError`` unless the sample may replace the data: only an empty default data folder."""
    wanted = sum(len(run.needed(task)) for task in run.params.tasks)
    default_root = run.params.data_root == Params.model_fields["data_root"].default
    links = {what: link for what, path in missing.items() if (link := broken_link(path))}
    if default_root and not run.params.data and len(missing) == wanted and not links:
        return
    listing = "\n".join(f"  {what}: {links.get(what, path)}" for what, path in missing.items())
    raise MissingDataError(
        f"the data root {run.data} lacks\n{listing}\n"
        "Put the data there (data/README.md says what goes where), name another root (DATA=/path/to/data), "
        "drop a task (tasks: [A]), or set sample: true for the built-in sample."
    )


def _sample_params(params: Params, overrides: dict[str, Any]) -> Params:
    """The sample's parameters, with the identity of the run that they replace."""
    keep = params.model_dump(include={"run_name", "run_type", "tasks", "detector", "team", "edition", "kind", "seed", "device"})
    return load_params("params/sample.yaml", keep | overrides | {"sample": True})


def _named_sample(params: Params) -> Params:
    if "sample" in params.run_name:
        return params
    return params.model_copy(update={"run_name": f"{params.run_name}_sample"})


def fallback_message(missing: dict[str, Path], run: Run) -> str:
    """The notice that the official data is missing and the sample is used."""
    listing = "\n".join(f"  {what:26} {path}" for what, path in missing.items())
    return (
        f"{'=' * 78}\nOFFICIAL DATA NOT FOUND. Looked for\n{listing}\n"
        f"Going on with the BUILT-IN SAMPLE and the small model of params/sample.yaml.\n"
        "To use your data: data/README.md says what goes where; another place: DATA=/path/to/data\n"
        f"{'=' * 78}"
    )


def _provenance(run: Run) -> dict[str, Any]:
    """The keys of ``PROVENANCE``, for this process and the run's parameters and data."""
    return {
        "params": run.params.model_dump(),
        "params_file": run.params_file or None,
        "data": str(run.data),
        "python": sys.version.split()[0],
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "versions": {package: version(package) for package in PACKAGES},
        "git": _git_state(),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record_trained(run: Run, task: str, trained_with: dict[str, Any], taken_up: bool) -> None:
    """Record in ``run.json`` what trained a task: parameters, data, versions and machine.

    A training that was resumed (``taken_up``) with the same parameters and data keeps its record, and later commands do not
    change it.
    """
    facts = read_json(run.folder / "run.json")
    earlier = facts.get(f"task{task}_trained") or {}
    if taken_up and earlier.get("trained_with") == trained_with:
        return
    of_old_version = taken_up and not earlier and task in trained_tasks(facts)
    provenance = {key: facts.get(key) for key in PROVENANCE} if of_old_version else _provenance(run)
    found = {key: facts[f"task{task}_{key}"] for key in OF_TRAINING if f"task{task}_{key}" in facts}
    run.record(**provenance, **{f"task{task}_trained": provenance | found | {"trained_with": trained_with}})


def trained_tasks(facts: dict[str, Any]) -> list[str]:
    """The trained tasks according to ``run.json``."""
    return [task for task in "AB" if facts.get(f"task{task}_trained") or f"task{task}_data_fingerprint" in facts]


def trained_by(run: Run, task: str) -> dict[str, Any]:
    """The ``PROVENANCE`` of a task's training; inference parameters are those with which its thresholds were chosen."""
    facts = read_json(run.folder / "run.json")
    found = {key: facts.get(key) for key in PROVENANCE} | (facts.get(f"task{task}_trained") or {})
    inference = read_json(run.thresholds).get(task, {}).get("inference", {})
    chosen = {key: inference[key] for key in run.params.of_prediction(task) if key in inference}
    return found | {"params": (found["params"] or run.params.model_dump()) | chosen}


def recorded_run(name: str, task: str) -> Run:
    """A run in ``outputs`` as it was when a task was trained, by its ``run.json``.

    Raises ``FileNotFoundError`` where there is no such run.
    """
    run = Run(Params(run_name=name), home())
    if not (run.folder / "run.json").is_file():
        there = sorted(path.parent.name for path in run.folder.parent.glob("*/run.json"))
        raise FileNotFoundError(f"no run {name} in {run.folder.parent}; there are {', '.join(there) or 'none'}")
    trained = trained_by(run, task)
    params = make_params(without_removed(trained["params"]) | {"run_name": name}, f"run.json of {name}")
    return Run(params, Path(trained["data"]))


def parameters_in_force(run: Run) -> dict[str, Any]:
    """The parameters behind a run's results; ``{"A": ..., "B": ...}`` for values that differ between its tasks."""
    facts = read_json(run.folder / "run.json")
    tasks = trained_tasks(facts)
    if not tasks:
        return facts.get("params") or {}
    params = {task: trained_by(run, task)["params"] for task in tasks}
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for values in params.values() for key in values):
        asked = [task for task in tasks if key in keys_of(InferenceKeys, task)]
        values = {task: params[task].get(key) for task in asked or tasks}
        same = all(value == next(iter(values.values())) for value in values.values())
        found[key] = next(iter(values.values())) if same else values
    return found | ({"tasks": tasks} if "tasks" in found else {})


def require_same_kind(run: Run, task: str) -> None:
    """Raise ``ValueError`` if a task was trained as another type of run, on other data or for another edition than wanted.

    Otherwise an archive's name would not describe the training behind it, nor its thresholds follow the edition's rules.
    """
    trained = trained_by(run, task)["params"]
    for key in ("run_type", "sample"):
        then, now = trained.get(key, getattr(run.params, key)), getattr(run.params, key)
        if then != now:
            raise ValueError(
                f"Task {task} of run {run.name} was trained with {key}: {then}, and this command says {key}: {now}. Give the "
                f"parameters that it was trained with ({key}={str(then).lower()}), or another run_name"
            )
    edition = read_json(run.thresholds).get(task, {}).get("edition", run.params.edition)
    if task == "B" and edition != run.params.edition:
        raise ValueError(
            f"the Task B thresholds of run {run.name} were chosen by the rules of edition {edition}, and this command says "
            f"edition: {run.params.edition}. Give edition={edition}, or run 03_train_taskB for this edition first (under "
            "another run_name to keep both)"
        )


def require_trained(run: Run, task: str) -> None:
    """Raise ``FileNotFoundError`` if a task has no model with thresholds yet, listing the runs that have one."""
    if _is_trained(run, task):
        return
    missing = run.thresholds if run.finetuned_model(task).is_file() else run.finetuned_model(task)
    notebook = {"A": "02_train_taskA", "B": "03_train_taskB"}[task]
    others = [f"  {name} (params_file: {file})" for name, file in _trained_runs(task).items()]
    listing = "\n".join([f"Trained for Task {task} in {home() / 'outputs'}:", *others]) if others else "No run in outputs/ is."
    raise FileNotFoundError(
        f"run {run.name} is not trained for Task {task} (nothing of it in {missing}): run the training notebook of this run "
        f"first ({notebook}), or set params_file and run_name to those of a run that is trained.\n{listing}"
    )


def _is_trained(run: Run, task: str) -> bool:
    """Whether a task has thresholds, and its model where it has one of its own."""
    stored = read_json(run.thresholds).get(task)
    brought = {"detector", "ensemble"} & set((stored or {}).get("inference", ()))
    return stored is not None and (bool(brought) or run.finetuned_model(task).is_file())


def _trained_runs(task: str) -> dict[str, Any]:
    """The runs in ``outputs`` that have a model with thresholds for a task: name to file of parameters."""
    runs = [Run(Params(run_name=path.parent.name), home()) for path in sorted((home() / "outputs").glob("*/thresholds.json"))]
    trained = [run for run in runs if _is_trained(run, task)]
    return {run.name: trained_by(run, task)["params_file"] for run in trained}


def _git_state() -> dict[str, Any] | None:
    """The commit, and whether tracked files differ from it; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def stored_thresholds(run: Run, task: str) -> Thresholds:
    """The thresholds chosen on validation.  Raises ``FileNotFoundError`` if none are stored."""
    facts = read_json(run.thresholds).get(task)
    if not facts:
        raise FileNotFoundError(f"no Task {task} threshold in {run.thresholds}; run the training notebook of this run first")
    return Thresholds.of(facts)
