"""A whole run: the five notebooks one after the other by papermill, each checked by the files that it must leave."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import papermill
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from forensics_lib.data.manifest import build_manifest, data_fingerprint
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.shards import infer
from forensics_lib.params import Params, find_params, make_params, settings_text, without_removed
from forensics_lib.run import Run, open_run, trained_by, trained_tasks
from forensics_lib.submission.build import archive_path
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, project_root, read_json, update_json, write_traceback
from forensics_lib.utils.locks import exclusive

PATIENCE = 600.0  # seconds that a notebook has to stop; at half of them it is told again, at the end killed
OUTPUT_PATIENCE = 600  # seconds until the last output of a cell that has ended must have come
NOTEBOOKS = ("01_explore", "02_train_taskA", "03_train_taskB", "04_infer", "05_submit")


class PipelineError(RuntimeError):
    """A notebook failed; the message is the block that the user sees."""


def expected_files(run: Run, notebook: str) -> list[Path]:
    """What a notebook must leave behind for the run to count as done that far."""
    tasks = run.params.tasks
    if notebook == "02_train_taskA":
        tasks = [task for task in tasks if task == "A"]
    elif notebook == "03_train_taskB":
        tasks = [task for task in tasks if task == "B"]
    if notebook.startswith(("02", "03")):
        return [f(task) for task in tasks for f in (run.classifier_model, run.finetuned_model, run.val_probs)]
    if notebook == "04_infer":
        return [run.test_probs(task) for task in tasks]
    if notebook == "05_submit":
        return [*(archive_path(run, task) for task in tasks), run.folder / "report.html"]
    return []


def run_pipeline(params_file: str, overrides: dict[str, Any], start: str = NOTEBOOKS[0]) -> Run:
    """Execute the notebooks from ``start`` on; executed copies go to ``outputs/<run_name>/notebooks/``.

    Raises ``PipelineError`` at the first notebook that fails or leaves a file missing, and for whatever else ends the run
    on the way; ``KeyboardInterrupt`` for Ctrl-C and SIGTERM.  Both hold the block that says how to go on.
    """
    params_file = _from_anywhere(params_file)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a notebook's process is told, as by Ctrl-C
    try:
        run = open_run(params_file, overrides)
        with _headless():
            _run_notebooks(run, params_file, overrides, start)
        return run
    finally:
        signal.signal(signal.SIGTERM, before)


def _from_anywhere(params_file: str) -> str:
    """A parameter file as its notebooks, which run in their own folder, find it too: from the project, or absolute."""
    found, project = find_params(params_file), project_root()
    return str(found.relative_to(project) if found.is_relative_to(project) else found)


@contextmanager
def _headless() -> Iterator[None]:
    before = os.environ.get("FORENSICS_HEADLESS")
    os.environ["FORENSICS_HEADLESS"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("FORENSICS_HEADLESS")
        else:
            os.environ["FORENSICS_HEADLESS"] = before


def _run_notebooks(run: Run, params_file: str, overrides: dict[str, Any], start: str) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that the notebooks take from the file
    began, notebook = time.monotonic(), start
    held = f"another process executes the notebooks of run {run.name}: waiting for it"
    try:
        with exclusive(run.folder / "notebooks.lock", held):
            for notebook in NOTEBOOKS[NOTEBOOKS.index(start) :]:
                print(f"--- {notebook}  ({run.name}, {time.monotonic() - began:.0f} s so far)", flush=True)
                _execute(run, notebook, {"params_file": params_file, **overrides})
                _require_files(run, notebook)
            run.record(pipeline_seconds=round(time.monotonic() - began, 1))
    except BaseException as error:  # whatever ends a run on the way, its user is told how to go on
        raise _stopped(run, notebook, error, resume_command(params_file, overrides, notebook)) from error
    print(f"--- done in {time.monotonic() - began:.0f} s: report {run.folder / 'report.html'}")
    for task in run.params.tasks:
        print(f"    Task {task}: {archive_path(run, task)}")


def _require_files(run: Run, notebook: str) -> None:
    missing = [str(path) for path in expected_files(run, notebook) if not path.is_file()]
    if missing:
        raise PipelineError(f"it ended without {', '.join(missing)}")


def _execute(run: Run, notebook: str, parameters: dict[str, Any]) -> None:
    output = run.folder / "notebooks" / f"{notebook}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(project_root() / "notebooks" / f"{notebook}.ipynb"),
        str(output),
        parameters=parameters,
        cwd=str(project_root() / "notebooks"),
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
        iopub_timeout=OUTPUT_PATIENCE,
        config=Config(KernelManager={"shutdown_wait_time": PATIENCE}),
    )


def _stopped(run: Run, notebook: str, error: BaseException, resume: str) -> BaseException:
    """The error to end with: what stopped the run, in which cell, and how to go on."""
    if isinstance(error, KeyboardInterrupt):
        cause = "Ctrl-C or SIGTERM; what was trained and predicted is kept"
        return KeyboardInterrupt(_block(run, notebook, "-", cause, resume))
    if isinstance(error, PapermillExecutionError):
        return PipelineError(_block(run, notebook, str(error.exec_count), f"{error.ename}: {error.evalue}", resume))
    if isinstance(error, DeadKernelError):
        cause = "the kernel was killed: out of memory? Lower batch_size, tile_size or workers"
    elif isinstance(error, CellExecutionError):
        cause = f"{error.ename}: {error.evalue}"
    elif isinstance(error, PipelineError):
        cause = str(error)
    else:
        cause = f"{type(error).__name__}: {error}{_traceback_kept(run, error)}"
    return PipelineError(_block(run, notebook, "-", cause, resume))


def _traceback_kept(run: Run, error: BaseException) -> str:
    with suppress(OSError):
        return f"\n(traceback in {write_traceback(run.folder, error)})"
    return ""


def resume_command(params_file: str, overrides: dict[str, Any], notebook: str) -> str:
    """The command for a shell that goes on with a run from a notebook, wherever it was started from."""
    values = dict(overrides)
    settings = {"PARAMS": params_file, "FROM": notebook}
    if Path(sys.prefix).resolve() != (project_root() / ".venv").resolve():
        settings["ENV"] = "active"
    if Path(str(values.get("data_root", ""))).is_absolute():  # a relative one is counted from another folder than DATA=
        settings["DATA"] = values.pop("data_root")
    if values:
        settings["SET"] = settings_text(values)
    home = os.environ.get("FORENSICS_HOME")
    elsewhere = "" if Path.cwd() == project_root() else f" -C {shlex.quote(str(project_root()))}"
    words = [f"{name}={shlex.quote(str(value).replace('$', '$$'))}" for name, value in settings.items()]
    return f"{f'FORENSICS_HOME={shlex.quote(home)} ' if home else ''}make{elsewhere} run {' '.join(words)}"


def _block(run: Run, notebook: str, cell: str, cause: str, resume: str) -> str:
    line = "=" * 78
    executed = run.folder / "notebooks" / f"{notebook}.ipynb"
    cause = cause.replace("\n", "\n           ")
    return (
        f"{line}\nRUN STOPPED\n  notebook {notebook}, cell [{cell}] (see {executed})\n  cause    {cause}\n"
        f"  go on    {resume}\n{line}"
    )


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
    first = Run(
        make_params(without_removed(trained["params"]) | {"run_name": name}, f"run.json of {name}"), Path(trained["data"])
    )
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
