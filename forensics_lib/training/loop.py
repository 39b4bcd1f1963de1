"""One training loop for both tasks: step 1 trains the head on a frozen backbone, step 2 the last backbone stages too.

After every epoch the whole state is saved, so that a stopped run goes on from there; the best epoch by validation
becomes the step's model.  ``metrics.jsonl`` receives one line per epoch while it runs.  What another training of the same
name left stays as it was until the new one has an epoch, and is then moved aside, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.utils import ModelEmaV3

from forensics_lib.data.audit import equalized_audit, findings_of, shortcut_audit
from forensics_lib.data.manifest import check_test_names, data_fingerprint, deciding, deciding_first, sources, usable
from forensics_lib.device import choose_machine, learning_view
from forensics_lib.models.combined import CheckpointError, build_model, derive_checkpoint, read_checkpoint, save_checkpoint
from forensics_lib.params import Params
from forensics_lib.run import OF_TRAINING, Run, record_trained
from forensics_lib.training.epoch import (
    BEGUN,
    STEPS,
    Fit,
    Stopped,
    make_optimizer,
    make_schedule,
    train_epoch,
    training_crops,
    validate,
)
from forensics_lib.utils.files import is_main, locked, read_json, write_json, write_text
from forensics_lib.utils.locks import only_trainer
from forensics_lib.utils.processes import as_one, gathered, launch, launches, rank, replicated, totals, wait_for_all, world
from forensics_lib.utils.stopping import stop_requests

GO_ON = "the same command or cell goes on from there"
OF_DATA = ("findings", *OF_TRAINING)  # facts in run.json of a task's data alone


def train(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Train a task's model by both steps and write ``_classifier_model.pth`` and ``_finetuned_model.pth``.

    Returns the epochs' metrics.  Finished work with the same parameters and data is taken up, not done again, and where
    another process trains it at this moment its epochs are shown until it ends.  With ``processes`` above 1 that many
    processes train together.  Raises ``FloatingPointError`` with the batch's files where the loss is not finite, and
    ``LayoutError`` at once where two test images would share a mask.
    """
    check_test_names(run, task)
    if launches(run.params.processes):
        launch(run.params.processes, "train", "--params", str(run.write_params()), "--tasks", task)
    else:
        with only_trainer(run, task, partial(_epoch_lines, run, task)):
            _train(run, task, manifest)
    return read_metrics(run, task)


def _train(run: Run, task: str, manifest: pd.DataFrame) -> None:
    machine = choose_machine(run.params)
    print(f"Task {task} training on {machine}{f', {world()} processes' if world() > 1 else ''}")
    torch.manual_seed(run.params.seed)
    train_rows, val_rows = usable(manifest, "train"), usable(manifest, "val")
    decides, rule = deciding(run, task, val_rows, train_rows)
    print(f"{len(train_rows)} training and {len(val_rows)} validation images")
    print(f"the best epoch is chosen on {min(decides.sum(), run.params.val_limit)} validation images: {rule}")
    for found in findings_of(run, task, manifest):
        print(f"WARNING {found['finding']}: {found['count']}. {found['remedy']}")
    equalize = gathered(close_shortcut(run, task, train_rows) if is_main() else None)[0]
    trained_with = _trained_with(run.params, task, pd.concat([train_rows, val_rows]))
    state, begun = _resumable(run, task, trained_with)
    model = build_model(_without_pretrained(run.params) if state else run.params, task).to(machine.device)
    val_rows = deciding_first(val_rows, decides, run.params.val_limit, run.params.seed_for())
    fit = Fit(run, task, model, machine, train_rows, val_rows, equalize, trained_with=trained_with, begun=begun)
    _take_up(fit, state)
    started = time.monotonic() - fit.seconds
    with stop_requests() as fit.stopping, closing(fit.batches):
        for step, epochs in zip(STEPS, (run.params.epochs_head, run.params.epochs_finetune), strict=True):
            _run_step(fit, step, epochs, state, started)
        if fit.stopping():
            raise KeyboardInterrupt(f"stopped when Task {task} was trained: {GO_ON}")
    record_trained(run, task, trained_with, taken_up=state is not None)
    _record(fit, manifest)


def _take_up(fit: Fit, state: dict[str, Any] | None) -> None:
    """Set what ``state`` tells of the training so far, and remove one that had begun otherwise and is not gone on with."""
    if state:
        fit.errors, fit.seconds, fit.machine_then = dict(state["errors"]), state["seconds"], state["machine"]
    wait_for_all()  # all have looked before the first one changes anything
    if is_main() and not (state and fit.begun):
        _give_up_begun(fit.run, fit.task)
    wait_for_all()


def _record(fit: Fit, manifest: pd.DataFrame) -> None:
    """What ``run.json`` keeps of a finished training; taking it up again changes nothing of it."""
    facts = {"data_fingerprint": data_fingerprint(manifest), "data": sources(manifest).to_dict("records")}
    if fit.seconds:  # unknown of trainings of earlier versions, whose facts stay
        facts |= {"training_seconds": round(fit.seconds, 1), "machine": fit.machine_then}
        facts |= {"unreadable_in_training": sorted(fit.errors)}
    fit.run.record(**{f"task{fit.task}_{name}": value for name, value in facts.items()})
    if fit.errors:
        print(f"{len(fit.errors)} training image(s) could not be read and were left out:")
        print("\n".join(f"  {reason}" for reason in list(fit.errors.values())[:10]))


def close_shortcut(run: Run, task: str, rows: pd.DataFrame) -> bool:
    """Say whether file facts tell the classes apart and what closes it; returns whether crops are equalized."""
    audit = shortcut_audit(rows)
    print(audit.message())
    equalize = {"auto": audit.of_codecs, "always": True, "never": False}[run.params.equalize]
    facts = {"shortcut_auc": round(audit.auc, 3), "equalized": equalize, "shortcut_auc_of_crops": None}
    if audit.found:
        print("\n".join(f"  closed by {remedy}" for remedy in audit.remedies()))
        after = equalized_audit(rows, training_crops(rows, task, run.params, equalize=equalize), run.params.seed_for())
        print(f"  of the training crops, equalize {'on' if equalize else 'off'}: {after.message()}")
        facts["shortcut_auc_of_crops"] = round(after.auc, 3)
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})
    return equalize


def read_metrics(run: Run, task: str) -> pd.DataFrame:
    """The epochs of a task so far, one row each, from ``metrics.jsonl``."""
    return pd.DataFrame(_task_lines(run, task))


def _task_lines(run: Run, task: str) -> list[dict[str, Any]]:
    return [line for line in _metric_lines(run) if line["task"] == task]


def _metric_lines(run: Run) -> list[dict[str, Any]]:
    path = run.metrics
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# ---- What was trained before -----------------------------------------------------------------------------------------


def _trained_with(params: Params, task: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Every parameter that the training depends on, and the fingerprint of its ``rows``."""
    return params.of_training(task) | {"data": data_fingerprint(rows)}


def _resumable(run: Run, task: str, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The state to go on from, if there is one, and whether another training's files are to be kept until an epoch is done.

    The state of this name counts first, then that of a training which has no epoch yet.
    """
    folder, name = run.folder / "checkpoints", f"task{task}_state.pt"
    last, begun = _read_state(folder / name), _read_state(folder / BEGUN / name)
    differs = last and _difference(run, task, last, wanted)
    for state, is_begun in ((last, False), (begun, True)):
        if state and not _difference(run, task, state, wanted):
            print(f"taking up the training of this name after step {state['step']}, epoch {state['epoch']}")
            return {"errors": {}, "seconds": 0.0, "machine": ""} | state, is_begun
    kept = _has_results(run, task)
    if kept:
        why = differs or "it has no state to go on from"
        print(f"starting anew and not from the last training of this name: {why}.")
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
    """What a training differs in from what is wanted now, in words; None where that is nothing."""
    if "trained_with" not in state:
        same = _finished_earlier(run, task, state, wanted["data"])
        return None if same else "it is of an earlier version of this project, and unfinished or of other parameters or data"
    before = state["trained_with"]
    changed = [key for key in before | wanted if before.get(key) != wanted.get(key)]
    words = [
        key if key == "data" or isinstance(wanted.get(key), dict) else f"{key} ({before.get(key)}, now {wanted.get(key)})"
        for key in changed
    ]
    return f"parameters or data changed: {', '.join(words)}" if words else None


def _finished_earlier(run: Run, task: str, state: dict[str, Any], data: str) -> bool:
    """Whether a state of a version that kept a hash of all parameters but these is of the same training, and at its end."""
    others = {
        "run_name", "team", "edition", "tasks", "test_folder_a", "test_folder_b", "workers", "data_root",
        "robustness_images", "processes",
    }  # fmt: skip
    values = run.params.model_dump(exclude=others)
    fingerprint = hashlib.sha256(json.dumps([task, values, data], sort_keys=True).encode()).hexdigest()[:16]
    last = ("finetune", run.params.epochs_finetune) if run.params.epochs_finetune else ("head", run.params.epochs_head)
    return state.get("fingerprint") == fingerprint and (state["step"], state["epoch"]) == last


def _files(run: Run, task: str) -> list[Path]:
    """All files that belong to a task's training; its state last, so that a move that is cut short can be taken up."""
    checkpoints = [
        run.folder / "checkpoints" / f"task{task}_{name}" for name in ("head_best.pth", "finetune_best.pth", "state.pt")
    ]
    return [run.classifier_model(task), run.finetuned_model(task), run.val_probs(task), run.test_probs(task), *checkpoints]


def _has_results(run: Run, task: str) -> bool:
    """Whether a training of this name left anything; ``_best.pth`` alone is there before the first batch."""
    files = [path for path in _files(run, task) if not path.name.endswith("_best.pth")]
    return any(path.exists() for path in files) or task in read_json(run.thresholds) or bool(_task_lines(run, task))


def _give_up_begun(run: Run, task: str) -> None:
    """Remove a training that has no epoch and is not gone on with."""
    for path in (run.folder / "checkpoints" / BEGUN).glob(f"task{task}_*"):
        if path.name.endswith("_state.pt"):
            print("the training that was begun with other parameters, and has no epoch yet, is given up")
        path.unlink()


def _make_way(fit: Fit, step: str) -> None:
    """Move aside what was trained before, and the files of this training, which now has an epoch, to their places."""
    run, task = fit.run, fit.task
    place = run.folder / "replaced" / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-task{task}"
    place.mkdir(parents=True)
    with locked(run.folder):
        _set_aside_entries(run, task, place)
    for path in filter(Path.exists, _files(run, task)):
        shutil.move(path, place / path.name)
    for path in sorted(fit.checkpoints.glob(f"task{task}_*")):
        path.replace(run.folder / "checkpoints" / path.name)
    fit.begun = False
    print(f"what was trained before under this name, and its results, are now in {place}", flush=True)
    if step == "finetune":  # step 1 had no epochs to wait for
        _publish(fit, "head", run.classifier_model(task))


def _set_aside_entries(run: Run, task: str, place: Path) -> None:
    """Move a task's entries of the files that both tasks share."""
    thresholds, facts = read_json(run.thresholds), read_json(run.folder / "run.json")
    write_json(place / "run.json", facts)
    mine = {key for key in facts if key.startswith(f"task{task}_")} - {f"task{task}_{name}" for name in OF_DATA}
    write_json(run.folder / "run.json", {key: value for key, value in facts.items() if key not in mine})
    if task in thresholds:
        write_json(place / "thresholds.json", {task: thresholds.pop(task)})
        write_json(run.thresholds, thresholds)
    lines = _metric_lines(run)
    _write_lines(place / "metrics.jsonl", [line for line in lines if line["task"] == task])
    _write_lines(run.metrics, [line for line in lines if line["task"] != task])


def _without_pretrained(params: Params) -> Params:
    return params.model_copy(update={"pretrained": False, "pretrained_file": None})


# ---- Steps and epochs ------------------------------------------------------------------------------------------------


def _run_step(fit: Fit, step: str, epochs: int, state: dict[str, Any] | None, started: float) -> None:
    """Train one step from where ``state`` left it, then publish its best epoch as the step's model.

    ``started`` is a time of the monotonic clock: when the training began, had it had no pauses.
    """
    target = fit.run.classifier_model(fit.task) if step == "head" else fit.run.finetuned_model(fit.task)
    past = state is not None and (state["step"], step) == ("finetune", "head")
    mine = state if state is not None and state["step"] == step else None
    if past or (mine and mine["epoch"] >= epochs):
        if is_main() and not fit.begun and not target.is_file():
            _publish(fit, step, target)
        wait_for_all()
        return
    if step == "finetune" and not mine:
        fit.model.load_state_dict(read_checkpoint(fit.best_file("head"))["model"])
    fit.model.freeze_backbone(0 if step == "head" else fit.params.finetune_stages)
    optimizer = make_optimizer(fit.model, fit.params.lr_head if step == "head" else fit.params.lr_finetune, fit.params)
    if mine:
        fit.model.load_state_dict(mine["model"])
        optimizer.load_state_dict(mine["optimizer"])
    as_one(fit.model)
    average = ModelEmaV3(fit.model, decay=fit.params.ema, use_warmup=True) if fit.params.ema else None
    if mine and average:
        average.module.load_state_dict(mine["average"])
    pixels = epochs * len(fit.train) * fit.params.crop_size**2
    share = len(range(rank(), fit.params.batch_size, world()))
    fit.trained = replicated(learning_view(fit.model, fit.task, share, pixels))
    best = mine["best"] if mine else _first_best(fit, step)
    schedule = make_schedule(optimizer, epochs * fit.updates, fit.params.warmup)

    def save(epoch: int, part: dict[str, Any] | None = None) -> None:
        content = {"optimizer": optimizer.state_dict(), "average": average.module.state_dict() if average else None}
        content |= {"best": best, "epoch": epoch, "step": step, "part": part, "errors": dict(fit.errors)}
        fit.seconds, fit.machine_then = time.monotonic() - started, str(fit.machine)
        content |= {"trained_with": fit.trained_with, "seconds": fit.seconds, "machine": fit.machine_then}
        save_checkpoint(fit.state_file, fit.model, **content)

    part = mine["part"] if mine else None
    for epoch in range(mine["epoch"] if mine else 0, epochs):
        where = f"stopped in {step} epoch {epoch + 1}"
        try:
            whole = part and part.get("line")  # all that is left of the epoch is its validation
            line = whole or train_epoch(fit, step, epoch, optimizer, schedule, average, part)
        except Stopped as stopped:
            if is_main():
                save(epoch, stopped.part)
            raise KeyboardInterrupt(f"{where} after {stopped.part['batches']} batches, which are saved: {GO_ON}") from None
        part = None
        judged = average.module if average else fit.model
        as_one(judged)  # each process has normalised with statistics of its own images
        try:
            if totals(int(fit.stopping()))[0]:
                raise KeyboardInterrupt(f"{where} before its validation, with all batches saved: {GO_ON}")
            line = line | validate(fit, judged)
        except BaseException:  # whatever ends a validation, the epoch is not to be trained again
            if is_main():
                save(epoch, {"line": line})
            raise
        better, best = line["score"] > best, max(line["score"], best)
        if is_main():
            if fit.begun:
                _make_way(fit, step)
            _append_metrics(fit.run, line)
            if better:
                save_checkpoint(fit.best_file(step), judged, score=best, epoch=epoch + 1, step=step)
            save(epoch + 1)
        fit.begun = False
        print(_epoch_line(line, fit.params), flush=True)
    if is_main() and not fit.begun:
        _publish(fit, step, target)
    wait_for_all()


def _first_best(fit: Fit, step: str) -> float:
    """The score a step has to beat: none for step 1, step 1's best for step 2, whose model it starts from."""
    score = -1.0 if step == "head" else float(read_checkpoint(fit.best_file("head"))["score"])
    if is_main():
        save_checkpoint(fit.best_file(step), fit.model, score=score, epoch=0, step=step)
    return score


def _publish(fit: Fit, step: str, target: Path) -> None:
    """Give the step's best checkpoint its public name, with what inference needs to know."""
    facts = {"inference": fit.params.of_prediction(fit.task), "run": fit.run.name, "sample": fit.run.sample}
    derive_checkpoint(fit.best_file(step), target, **facts)


def _append_metrics(run: Run, line: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; one that a stopped run wrote for the same epoch is replaced."""
    same = ("task", "step", "epoch")
    with locked(run.folder):
        kept = [old for old in _metric_lines(run) if any(old[key] != line[key] for key in same)]
        _write_lines(run.metrics, [*kept, line])


def _epoch_lines(run: Run, task: str) -> list[str]:
    if any((run.folder / "checkpoints" / BEGUN).glob(f"task{task}_*")):
        return []  # the lines are those of another training
    return [_epoch_line(line, run.params) for line in _task_lines(run, task)]


def _epoch_line(line: dict[str, Any], params: Params) -> str:
    epochs = params.epochs_head if line["step"] == "head" else params.epochs_finetune
    iou = f", IoU {line['val_iou']:.3f}" if "val_iou" in line else ""
    return (
        f"{line['step']} {line['epoch']}/{epochs}: loss {line['train_loss']:.3f}, validation AUC {line['val_auc']:.3f}{iou}"
        f" ({line['seconds']:.0f} s, {line['images_per_second']:.0f} images/s)"
    )
