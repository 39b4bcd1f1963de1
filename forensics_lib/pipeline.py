"""A whole run: the five notebooks one after the other by papermill, each checked by the files that it must leave."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from forensics_lib.params import find_params
from forensics_lib.run import Run, open_run
from forensics_lib.settings import settings_text
from forensics_lib.submission.validate import archive_path
from forensics_lib.utils.files import project_root, write_traceback
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
