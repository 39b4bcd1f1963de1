"""Earlier trainings of a run: resuming one, taking a finished one, or moving it aside; and the training history."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from forensics_lib.data.manifest import data_fingerprint, masks_fingerprint
from forensics_lib.models.checkpoint import CheckpointError, derive_checkpoint, read_checkpoint
from forensics_lib.params import REMOVED, Params
from forensics_lib.run import OF_TRAINING, Run
from forensics_lib.training.state import BEGUN, SavedState, TrainingState
from forensics_lib.utils.files import is_main, locked, read_json, write_json, write_text
from forensics_lib.utils.locks import exclusive
from forensics_lib.utils.processes import wait_for_all

ADDED = ("lora_rank",)  # keys that versions before 0.2 had not: their trainings are those of the defaults
GO_ON = "the same command or cell goes on from there"
OF_DATA = ("findings", *OF_TRAINING)  # facts in run.json that depend on a task's data alone


def read_history(run: Run, task: str) -> pd.DataFrame:
    """The training history of a task, from ``metrics.jsonl``: a row per epoch (none before the first).

    Columns are step ("head" or "finetune"), epoch (from 1), train_loss, val_auc, score (which selects the best epoch), lr,
    seconds, images_per_second; for Task B also val_iou.
    """
    return pd.DataFrame(_history(run, task))


def _history(run: Run, task: str | None = None) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, of one task or of both."""
    lines = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines()) if run.metrics.is_file() else ()
    return [line for line in lines if task in (None, line["task"])]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def training_inputs(params: Params, task: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Every parameter that the training depends on, and the fingerprints of its ``rows`` and for Task B of their masks."""
    masks = {"masks": masks_fingerprint(rows)} if task == "B" else {}
    return params.of_training(task) | {"data": data_fingerprint(rows)} | masks


def find_resumable(run: Run, task: str, wanted: dict[str, Any]) -> tuple[SavedState | None, bool]:
    """The saved state to resume, if there is one, and whether another training's files stay until an epoch is done.

    ``wanted`` are the ``training_inputs``.  The state of this name comes first, then that of a training without an epoch yet.
    """
    folder, name = run.folder / "checkpoints", f"task{task}_state.pt"
    last, begun = _read_state(folder / name), _read_state(folder / BEGUN / name)
    differs = last and _difference(run, task, last, wanted)
    for content, is_begun in ((last, False), (begun, True)):
        if content and not _difference(run, task, content, wanted):
            print(f"taking up the training of this name after step {content['step']}, epoch {content['epoch']}")
            return SavedState.from_dict(content), is_begun
    kept = _has_results(run, task)
    if kept:
        print(f"starting anew and not from the last training of this name: {differs or 'it has no state to go on from'}.")
        print("Its model and results stay until the new training has an epoch, and are then moved aside.")
    return None, kept


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        print(f"not going on: {error}")
        return None


def _difference(run: Run, task: str, state: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How the training of a state differs from the one wanted now, in words; None where it does not."""
    if "trained_with" not in state:
        if _finished_by_version_1(run, task, state, wanted["data"]):
            return None
        return "it is of an earlier version of this project, and unfinished or of other parameters or data"
    before = state["trained_with"]
    wanted = {key: value for key, (value, _) in REMOVED.items() if key in before} | wanted
    before = {key: value for key, value in Params().of_training(task).items() if key in ADDED} | before
    before = {key: wanted[key] for key in ("masks",) if key in wanted} | before  # which was not recorded either
    changed = [key for key in before | wanted if before.get(key) != wanted.get(key)]
    words = [
        key
        if key in ("data", "masks") or isinstance(wanted.get(key), dict)
        else f"{key} ({before.get(key)}, now {wanted.get(key)})"
        for key in changed
    ]
    return f"parameters or data changed: {', '.join(words)}" if words else None


def _finished_by_version_1(run: Run, task: str, state: dict[str, Any], data: str) -> bool:
    """Whether a state that only holds a hash, of all parameters but these, is of the same training, and at its end."""
    others = {
        "run_name", "team", "edition", "tasks", "test_folder_a", "test_folder_b", "workers", "data_root",
        "robustness_images", "processes", *ADDED,
    }  # fmt: skip
    values = {key: value for key, (value, _) in REMOVED.items() if "." not in key} | run.params.model_dump(exclude=others)
    fingerprint = hashlib.sha256(json.dumps([task, values, data], sort_keys=True).encode()).hexdigest()[:16]
    last = ("finetune", run.params.epochs_finetune) if run.params.epochs_finetune else ("head", run.params.epochs_head)
    return state.get("fingerprint") == fingerprint and (state["step"], state["epoch"]) == last


def _files(run: Run, task: str) -> list[Path]:
    """All files of a task's training; its state last, so that an interrupted move can be completed."""
    names = ("head_best.pth", "finetune_best.pth", "state.pt")
    checkpoints = [run.folder / "checkpoints" / f"task{task}_{name}" for name in names]
    return [run.classifier_model(task), run.finetuned_model(task), run.val_probs(task), run.test_probs(task), *checkpoints]


def _has_results(run: Run, task: str) -> bool:
    """Whether a training of this name left results; ``_best.pth`` is written before the first batch and does not count."""
    files = [path for path in _files(run, task) if not path.name.endswith("_best.pth")]
    return any(path.exists() for path in files) or task in read_json(run.thresholds) or bool(_history(run, task))


def discard_begun(run: Run, task: str) -> None:
    """Remove a training that has no epoch and is not resumed."""
    for path in (run.folder / "checkpoints" / BEGUN).glob(f"task{task}_*"):
        if path.name.endswith("_state.pt"):
            print("the training that was begun with other parameters, and has no epoch yet, is given up")
        path.unlink()


def move_replaced_aside(state: TrainingState, step: str) -> None:
    """Move the files of the earlier training aside, and those of this one, which now has an epoch, to their places."""
    run, task = state.run, state.task
    place = run.folder / "replaced" / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-task{task}"
    place.mkdir(parents=True)
    with locked(run.folder):
        _set_aside_entries(run, task, place)
    for path in filter(Path.exists, _files(run, task)):
        shutil.move(path, place / path.name)
    for path in sorted(state.checkpoints.glob(f"task{task}_*")):
        path.replace(run.folder / "checkpoints" / path.name)
    state.begun = False
    print(f"what was trained before under this name, and its results, are now in {place}", flush=True)
    if step == "finetune":  # step 1 had no epochs to wait for
        publish(state, "head", run.classifier_model(task))


def _set_aside_entries(run: Run, task: str, place: Path) -> None:
    """Move the entries of a task in the files that both tasks share."""
    thresholds, facts = read_json(run.thresholds), read_json(run.folder / "run.json")
    write_json(place / "run.json", facts)
    mine = {key for key in facts if key.startswith(f"task{task}_")} - {f"task{task}_{name}" for name in OF_DATA}
    write_json(run.folder / "run.json", {key: value for key, value in facts.items() if key not in mine})
    if task in thresholds:
        write_json(place / "thresholds.json", {task: thresholds.pop(task)})
        write_json(run.thresholds, thresholds)
    _write_lines(place / "metrics.jsonl", _history(run, task))
    _write_lines(run.metrics, [line for line in _history(run) if line["task"] != task])


def publish(state: TrainingState, step: str, target: Path) -> None:
    """Write the step's best checkpoint under its public name, with the parameters of inference."""
    facts = {"inference": state.params.of_prediction(state.task), "run": state.run.name, "sample": state.run.sample}
    derive_checkpoint(state.best_file(step), target, **facts)


def append_history(run: Run, line: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; it replaces one that a stopped run wrote for the same epoch."""
    same = ("task", "step", "epoch")
    with locked(run.folder):
        kept = [old for old in _history(run) if any(old[key] != line[key] for key in same)]
        _write_lines(run.metrics, [*kept, line])


def epoch_lines(run: Run, task: str) -> list[str]:
    """A line of text for each epoch of a task so far."""
    if any((run.folder / "checkpoints" / BEGUN).glob(f"task{task}_*")):
        return []  # the lines are those of another training
    return [epoch_line(line, run.params) for line in _history(run, task)]


def epoch_line(line: dict[str, Any], params: Params) -> str:
    """A line of the history as text."""
    epochs = params.epochs_head if line["step"] == "head" else params.epochs_finetune
    iou = f", IoU {line['val_iou']:.3f}" if "val_iou" in line else ""
    return (
        f"{line['step']} {line['epoch']}/{epochs}: loss {line['train_loss']:.3f}, validation AUC {line['val_auc']:.3f}{iou}"
        f" ({line['seconds']:.0f} s, {line['images_per_second']:.0f} images/s)"
    )


@contextmanager
def only_trainer(run: Run, task: str, epochs: Callable[[], list[str]]) -> Iterator[None]:
    """Within the block no other process trains this task of this run; while one does, prints its ``epochs`` and waits.

    ``epochs`` returns a line for each epoch in ``metrics.jsonl``.
    """
    held = f"Task {task} of run {run.name} is being trained by another process: its epochs follow"
    with exclusive(run.folder / "checkpoints" / f"task{task}.lock", held, epochs) if is_main() else nullcontext():
        wait_for_all()
        yield
