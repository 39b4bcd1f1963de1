"""A run: its parameters, the data it uses, and the names of everything that it writes."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from forensics_lib.disk import broken_link, usable_cores
from forensics_lib.files import from_home, home, is_main, project_root, update_json, write_text
from forensics_lib.layouts import split_folders
from forensics_lib.params import Params, load_params, notebook_parameters

PACKAGES = ("torch", "timm", "numpy", "pandas", "scikit-learn", "pillow", "papermill")


class MissingDataError(FileNotFoundError):
    """Some of the data that the run needs is not where it should be."""


@dataclass(frozen=True)
class Run:
    """The parameters of a run and where its files are."""

    params: Params
    data: Path  # the data root in use: the user's, or the sample's

    @property
    def name(self) -> str:
        return self.params.run_name

    @property
    def sample(self) -> bool:
        return self.params.sample

    @property
    def folder(self) -> Path:
        """``outputs/<run_name>``: everything but the files whose names the challenge's users fixed."""
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
        """What the run reads for a task: a short description to a folder."""
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
        if self.params.run_type == "open" and not self.params.aligned:  # twins are open data too
            folders["Task A open data"] = self.data / "dataset_open"
        return folders

    def missing(self) -> dict[str, Path]:
        """The folders that the run's tasks need and that are not there."""
        return {what: path for task in self.params.tasks for what, path in self.needed(task).items() if not path.exists()}

    def describe(self) -> None:
        """Print what this run is."""
        if self.sample:
            print(SAMPLE_BANNER)
        print(f"run {self.name}: {self.params.run_type}, tasks {', '.join(self.params.tasks)}")

    def parameters(self) -> pd.DataFrame:
        """All parameters with their values and meanings."""
        rows = [(key, value, Params.model_fields[key].description) for key, value in self.params.model_dump().items()]
        return pd.DataFrame(rows, columns=["parameter", "value", "meaning"]).set_index("parameter")

    def require_task(self, task: str) -> None:
        """End a notebook here, as a success, where its task is not in the run (papermill takes exit status 0 so)."""
        if task not in self.params.tasks:
            print(f"Task {task} is not in this run (tasks: {', '.join(self.params.tasks)}): nothing to do in this notebook.")
            raise SystemExit(0)

    def record(self, **values: Any) -> None:
        """Set keys in ``run.json``, the run's provenance."""
        if is_main():
            update_json(self.folder / "run.json", **values)

    def write_params(self) -> Path:
        """Write the parameters as they are in force to ``params.yaml`` in the run's folder, and return its path."""
        path = self.folder / "params.yaml"
        write_text(path, yaml.safe_dump(self.params.model_dump(mode="json"), sort_keys=False))
        return path


def task_b_training_folders(data: Path) -> tuple[Path, Path]:
    """Where TGIF and SAGI-D lie in a data root; SAGI-D also under the name that its table's paths have."""
    folder = data / "dataset_taskB"
    sagi = next((folder / name for name in ("SAGI-D", "sagid") if (folder / name).is_dir()), folder / "SAGI-D")
    return folder / "TGIF", sagi


SAMPLE_BANNER = """\
+----------------------------------------------------------------------------+
|  BUILT-IN SAMPLE DATA. These results say nothing about real generators:    |
|  they show that everything works. 'sample' is in every name that is made.  |
+----------------------------------------------------------------------------+"""


def open_run(params_file: str | Path, overrides: dict[str, Any] | None = None) -> Run:
    """Load the parameters and find the data.

    Where ``data/`` holds nothing of what the run needs, the run goes on with the built-in sample and the parameters of
    ``params/sample.yaml``, and ``sample`` becomes part of its name.  A data root that was named on purpose, or that
    holds only a part, is an error instead.  Raises ``MissingDataError`` and ``params.ParamsError``.
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
        from forensics_lib.sample import build_sample  # imports torch, which looking at data does not need

        run = Run(_named_sample(run.params), build_sample(home() / "data" / "sample"))
    _record_provenance(run, str(params_file))
    return run


def open_notebook_run() -> Run:
    """The run of a notebook: ``params_file`` and any parameter set in its ``# Parameters`` cells."""
    parameters = notebook_parameters()
    return open_run(parameters.pop("params_file"), parameters)


def _check_fallback(run: Run, missing: dict[str, Path]) -> None:
    """The sample may only stand in for an empty default data folder."""
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
    """The sample's parameters under the identity of the run that they stand in for."""
    keep = params.model_dump(include={"run_name", "run_type", "tasks", "team", "edition", "seed", "device"})
    return load_params("params/sample.yaml", keep | overrides | {"sample": True})


def _named_sample(params: Params) -> Params:
    if "sample" in params.run_name:
        return params
    return params.model_copy(update={"run_name": f"{params.run_name}_sample"})


def fallback_message(missing: dict[str, Path], run: Run) -> str:
    """The block that says that the official data is not there and the sample is used."""
    listing = "\n".join(f"  {what:26} {path}" for what, path in missing.items())
    return (
        f"{'=' * 78}\nOFFICIAL DATA NOT FOUND. Looked for\n{listing}\n"
        f"Going on with the BUILT-IN SAMPLE and the small model of params/sample.yaml.\n"
        "To use your data: data/README.md says what goes where; another place: DATA=/path/to/data\n"
        f"{'=' * 78}"
    )


def _record_provenance(run: Run, params_file: str) -> None:
    run.record(
        run=run.name,
        sample=run.sample,
        params=run.params.model_dump(),
        params_file=params_file,
        data=str(run.data),
        python=sys.version.split()[0],
        machine=f"{platform.machine()}, {usable_cores()} cores",
        versions={package: version(package) for package in PACKAGES},
        git=_git_state(),
        updated=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _git_state() -> dict[str, Any] | None:
    """Commit and whether tracked files were changed; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None
