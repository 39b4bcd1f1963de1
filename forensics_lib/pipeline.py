"""A whole run: the five notebooks one after the other by papermill, each checked by the files that it must leave."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from forensics_lib.files import project_root
from forensics_lib.runs import Run, open_run
from forensics_lib.submission import archive_path

PATIENCE = 600.0  # seconds that a notebook has to stop; at half of them it is told again, at the end killed
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

    Raises ``PipelineError`` at the first notebook that fails or leaves a file missing.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a notebook's process is told, as by Ctrl-C
    try:
        return _run_notebooks(params_file, overrides, start)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_notebooks(params_file: str, overrides: dict[str, Any], start: str) -> Run:
    run = open_run(params_file, overrides)
    os.environ["FORENSICS_HEADLESS"] = "1"
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that the notebooks take from the file
    began = time.monotonic()
    for notebook in NOTEBOOKS[NOTEBOOKS.index(start) :]:
        print(f"--- {notebook}  ({run.name}, {time.monotonic() - began:.0f} s so far)", flush=True)
        try:
            _execute(run, notebook, {"params_file": params_file, **overrides})
        except KeyboardInterrupt:
            cause = "Ctrl-C or SIGTERM; what was trained and predicted is kept"
            raise KeyboardInterrupt(_block(run, notebook, "-", cause, _resume_command(params_file, notebook))) from None
        except (PapermillExecutionError, DeadKernelError) as error:
            raise PipelineError(_failure_block(run, notebook, params_file, error)) from None
        missing = [str(path) for path in expected_files(run, notebook) if not path.is_file()]
        if missing:
            cause = f"it ended without {', '.join(missing)}"
            raise PipelineError(_block(run, notebook, "-", cause, _resume_command(params_file, notebook)))
    run.record(pipeline_seconds=round(time.monotonic() - began, 1))
    print(f"--- done in {time.monotonic() - began:.0f} s: report {run.folder / 'report.html'}")
    for task in run.params.tasks:
        print(f"    Task {task}: {archive_path(run, task)}")
    return run


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
        config=Config(KernelManager={"shutdown_wait_time": PATIENCE}),
    )


def _failure_block(run: Run, notebook: str, params_file: str, error: Exception) -> str:
    resume = _resume_command(params_file, notebook)
    if isinstance(error, DeadKernelError):
        cause = "the kernel was killed: out of memory? Lower batch_size, tile_size or workers"
        return _block(run, notebook, "-", cause, resume)
    return _block(run, notebook, str(error.exec_count), f"{error.ename}: {error.evalue}", resume)


def _resume_command(params_file: str, notebook: str) -> str:
    return f"make run PARAMS={params_file} FROM={notebook}"


def _block(run: Run, notebook: str, cell: str, cause: str, resume: str) -> str:
    line = "=" * 78
    executed = run.folder / "notebooks" / f"{notebook}.ipynb"
    cause = cause.replace("\n", "\n           ")
    return (
        f"{line}\nRUN STOPPED\n  notebook {notebook}, cell [{cell}] (see {executed})\n  cause    {cause}\n"
        f"  go on    {resume}  (with the same DATA= and SET=)\n{line}"
    )
