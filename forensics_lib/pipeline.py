"""A whole run: papermill executes the five notebooks, each checked by the files that it must write; and its repetition."""

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
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from forensics_lib.data.manifest import build_manifest, data_fingerprint
from forensics_lib.evaluation.evaluate import evaluate
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.shards import infer
from forensics_lib.params import find_params, settings_text
from forensics_lib.run import Run, open_run, recorded_run, trained_by, trained_tasks
from forensics_lib.submission.build import archive_path
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, project_root, read_json, update_json, write_traceback
from forensics_lib.utils.locks import exclusive

PATIENCE = 600.0  # seconds that a notebook has to stop; it is interrupted again after half of them, then killed
OUTPUT_PATIENCE = 600  # seconds to wait for the last output of a finished cell
NOTEBOOKS = ("01_explore", "02_train_taskA", "03_train_taskB", "04_infer", "05_submit")


class PipelineError(RuntimeError):
    """A notebook failed; the message is the block that the user sees."""


def expected_files(run: Run, notebook: str) -> list[Path]:
    """The files that a notebook must write."""
    tasks = run.params.tasks
    if notebook.startswith(("02", "03")):
        files = (run.classifier_model, run.finetuned_model, run.val_probs) if run.params.trains else (run.val_probs,)
        return [file(task) for task in tasks if notebook.endswith(f"task{task}") for file in files]
    if notebook == "04_infer":
        return [run.test_probs(task) for task in tasks]
    if notebook == "05_submit":
        return [*(archive_path(run, task) for task in tasks), run.folder / "report.html"]
    return []


def run_pipeline(params_file: str, overrides: dict[str, Any], start: str = NOTEBOOKS[0]) -> Run:
    """Execute the notebooks from ``start`` on; executed copies go to ``outputs/<run_name>/notebooks/``.

    ``params_file`` is relative to the project or the working directory; ``overrides`` replaces single parameters.  Raises
    ``PipelineError`` where a notebook failed or did not write a file, or anything else ended the run, and ``KeyboardInterrupt``
    after Ctrl-C or SIGTERM; their messages have the command that goes on.  Raises ``MissingDataError`` before the first
    notebook.
    """
    found, project = find_params(params_file), project_root()
    params_file = str(found.relative_to(project) if found.is_relative_to(project) else found)  # notebooks run elsewhere
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # interrupts the notebook, as Ctrl-C does
    try:
        run = open_run(params_file, overrides)
        with _headless():
            _run_notebooks(run, params_file, overrides, start)
        return run
    finally:
        signal.signal(signal.SIGTERM, before)


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
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that notebooks read from the file
    began, notebook = time.monotonic(), start
    held = f"another process executes the notebooks of run {run.name}: waiting for it"
    try:
        with exclusive(run.folder / "notebooks.lock", held):
            for notebook in NOTEBOOKS[NOTEBOOKS.index(start) :]:
                print(f"--- {notebook}  ({run.name}, {time.monotonic() - began:.0f} s so far)", flush=True)
                _execute(run, notebook, {"params_file": params_file, **overrides})
                _require_files(run, notebook)
            run.record(pipeline_seconds=round(time.monotonic() - began, 1))
    except BaseException as error:  # however a run ends, the message says how to go on
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
        engine_name=_Engine.__name__,
    )


class _Client(PapermillNotebookClient):
    """Ends the kernel at once after the last cell, and gives it ``PATIENCE`` where a run is interrupted.

    A kernel that is asked to end first waits for its child processes, half a minute for some, and it now and then misses the
    question, since it is interrupted just before.
    """

    def papermill_execute_cells(self) -> None:
        super().papermill_execute_cells()
        self.shutdown_kernel = "immediate"


class _Engine(Engine):
    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        streams = {name: options[name] for name in ("stdout_file", "stderr_file")}
        patience = Config(KernelManager={"shutdown_wait_time": PATIENCE})
        client = _Client(nb_man, kernel_name=kernel_name, iopub_timeout=OUTPUT_PATIENCE, config=patience, **streams)
        return client.execute()


papermill_engines.register(_Engine.__name__, _Engine)


def _stopped(run: Run, notebook: str, error: BaseException, resume: str) -> BaseException:
    """The error to raise: what stopped the run, in which cell, and how to go on."""
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
        cause = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            cause += f"\n(traceback in {write_traceback(run.folder, error)})"
    return PipelineError(_block(run, notebook, "-", cause, resume))


def resume_command(params_file: str, overrides: dict[str, Any], notebook: str) -> str:
    """The shell command that continues a run from a notebook on, from the current working directory."""
    values = dict(overrides)
    settings = {"PARAMS": params_file, "FROM": notebook}
    if Path(sys.prefix).resolve() != (project_root() / ".venv").resolve():
        settings["ENV"] = "active"
    if Path(str(values.get("data_root", ""))).is_absolute():  # DATA= resolves a relative one from another folder
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


ENDING = "_again"  # of the name of a repetition
COMPARED = ("python", "machine", "versions", "git")  # may explain a difference


def reproduce(name: str) -> pd.DataFrame:
    """Repeat a run as ``<name>_again``: train, evaluate and infer with the recorded parameters and data of each task.

    Prints the differences in versions, machine, code and data.  Returns a row per result: file, equal (byte by byte), and
    largest_difference of a number in it (NaN where they cannot be compared).  Raises ``FileNotFoundError`` if there is no such
    trained run in ``outputs``, ``FileExistsError`` if another run has the name of the repetition.
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
        rows += _repeated(first, again, task, facts)
    return pd.DataFrame(rows, columns=["file", "equal", "largest_difference"])


def _make_room(name: str) -> None:
    """Remove an earlier repetition.  Raises ``FileExistsError`` where the folder is another run's."""
    folder = home() / "outputs" / f"{name}{ENDING}"
    if (folder / "run.json").is_file() and read_json(folder / "run.json").get("repeats") != name:
        raise FileExistsError(f"{folder} is not known as a repetition of {name}: rename it, or remove it")
    shutil.rmtree(folder, ignore_errors=True)
    update_json(folder / "run.json", repeats=name)


def _opened(name: str, task: str, facts: dict[str, Any]) -> tuple[Run, Run]:
    """The run as it was when a task was trained, and its repetition."""
    first = recorded_run(name, task)
    values: dict[str, Any] = {"run_name": name + ENDING, "tasks": [task]}
    if f"task{task}_inferred" in facts:
        values[f"test_folder_{task.lower()}"] = facts[f"task{task}_inferred"]["test_folder"]
    again = Run(first.params.model_copy(update=values), first.data)
    return first, open_run(again.write_params())


def _repeated(first: Run, again: Run, task: str, facts: dict[str, Any]) -> list[tuple[str, bool, float]]:
    manifest = build_manifest(again, task)
    if data_fingerprint(manifest) != facts.get(f"task{task}_data_fingerprint"):
        print(f"Task {task}: the data are not those of the first run")
    train(again, task, manifest)
    evaluate(again, task, manifest)
    infer(again, task)
    pairs = [(first.val_probs(task), again.val_probs(task)), (first.test_probs(task), again.test_probs(task))]
    if task == "B":
        pairs += [(mask, again.masks / mask.name) for mask in sorted(first.masks.glob("*.npz"))]
    return [_compared(*pair) for pair in pairs]


def _differences(first: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """The differences between two records, in words."""
    return [f"{key} was {first.get(key)}, is {again.get(key)}" for key in COMPARED if first.get(key) != again.get(key)]


def _compared(first: Path, again: Path) -> tuple[str, bool, float]:
    """The name of a result, whether its bytes are equal, and the largest difference of a number in it."""
    if not (first.is_file() and again.is_file()):
        return first.name, False, float("nan")
    if first.read_bytes() == again.read_bytes():
        return first.name, True, 0.0
    if first.suffix == ".npz":
        one, other = (load_mask(path).astype(float) for path in (first, again))
    else:
        one, other = (pd.read_csv(path)["prob"].to_numpy() for path in (first, again))
    return first.name, False, float(np.abs(one - other).max()) if one.shape == other.shape else float("nan")
