"""One training loop for both tasks: step 1 trains the head on a frozen backbone, step 2 the last backbone stages too.

After every epoch the whole state is saved, so that a stopped run goes on from there; the best epoch by validation
becomes the step's model.  ``metrics.jsonl`` receives one line per epoch while it runs.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.utils import ModelEmaV3

from forensics_lib.attach import only_trainer
from forensics_lib.audits import equalized_audit, findings_of, shortcut_audit
from forensics_lib.distributed import as_one, launch, launches, rank, replicated, totals, wait_for_all, world
from forensics_lib.epochs import Fit, Stopped, make_optimizer, make_schedule, train_epoch, training_crops, validate
from forensics_lib.files import is_main, read_json, write_json, write_text
from forensics_lib.machine import choose_machine, learning_view
from forensics_lib.manifest import data_fingerprint, sampled, sources, usable
from forensics_lib.model import CheckpointError, build_model, read_checkpoint, save_checkpoint
from forensics_lib.params import Params
from forensics_lib.runs import Run, record_trained
from forensics_lib.stopping import stop_requests

GO_ON = "the same command or cell goes on from there"
NOT_TRAINING = {  # parameters that training does not depend on: changing them does not start it anew
    "run_name", "team", "edition", "tasks", "test_folder_a", "test_folder_b", "workers", "data_root",
    "robustness_images", "processes",
}  # fmt: skip


def train(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Train a task's model by both steps and write ``_classifier_model.pth`` and ``_finetuned_model.pth``.

    Returns the epochs' metrics.  Finished work with the same parameters and data is taken up, not done again, and where
    another process trains it at this moment its epochs are shown until it ends.  With ``processes`` above 1 that many
    processes train together.  Raises ``FloatingPointError`` with the batch's files where the loss is not finite.
    """
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
    print(f"{len(train_rows)} training and {len(val_rows)} validation images")
    for found in findings_of(run, task, manifest):
        print(f"WARNING {found['finding']}: {found['count']}. {found['remedy']}")
    equalize = close_shortcut(run, task, train_rows)
    fingerprint = _fingerprint(run.params, task, pd.concat([train_rows, val_rows]))
    state = _resumable(run, task, fingerprint)
    model = build_model(_without_pretrained(run.params) if state else run.params, task).to(machine.device)
    fit = Fit(
        run,
        task,
        model,
        machine,
        train_rows,
        equalize=equalize,
        val=sampled(val_rows, run.params.val_limit, run.params.seed),
    )
    if not state and is_main():
        _forget(run, task)
    wait_for_all()
    started = time.monotonic()
    with stop_requests() as fit.stopping, closing(fit.batches):
        for step, epochs in (("head", run.params.epochs_head), ("finetune", run.params.epochs_finetune)):
            _run_step(fit, step, epochs, state, fingerprint)
        if fit.stopping():
            raise KeyboardInterrupt(f"stopped when Task {task} was trained: {GO_ON}")
    record_trained(run, task, fingerprint, taken_up=state is not None)
    run.record(**{f"task{task}_data_fingerprint": data_fingerprint(manifest)})
    run.record(**{f"task{task}_data": sources(manifest).to_dict("records")})
    run.record(**{f"task{task}_training_seconds": round(time.monotonic() - started, 1), f"task{task}_machine": str(machine)})
    if fit.errors:
        print(f"{len(fit.errors)} training image(s) could not be read and were left out:")
        print("\n".join(f"  {reason}" for reason in list(fit.errors.values())[:10]))
        run.record(**{f"task{task}_unreadable_in_training": sorted(fit.errors)})


def close_shortcut(run: Run, task: str, rows: pd.DataFrame) -> bool:
    """Say whether file facts tell the classes apart and what closes it; returns whether crops are equalized."""
    audit = shortcut_audit(rows)
    print(audit.message())
    equalize = {"auto": audit.of_codecs, "always": True, "never": False}[run.params.equalize]
    facts = {"shortcut_auc": round(audit.auc, 3), "equalized": equalize, "shortcut_auc_of_crops": None}
    if audit.found:
        print("\n".join(f"  closed by {remedy}" for remedy in audit.remedies()))
        after = equalized_audit(rows, training_crops(rows, task, run.params, equalize=equalize), run.params.seed)
        print(f"  of the training crops, equalize {'on' if equalize else 'off'}: {after.message()}")
        facts["shortcut_auc_of_crops"] = round(after.auc, 3)
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})
    return equalize


def _forget(run: Run, task: str) -> None:
    """Remove what another training of this name left, so that nothing is taken for this one's."""
    for path in (run.classifier_model(task), run.finetuned_model(task), run.val_probs(task), run.test_probs(task)):
        path.unlink(missing_ok=True)
    write_json(run.thresholds, {key: value for key, value in read_json(run.thresholds).items() if key != task})
    _write_metrics(run, [line for line in _metric_lines(run) if line["task"] != task])


def read_metrics(run: Run, task: str) -> pd.DataFrame:
    """The epochs of a task so far, one row each, from ``metrics.jsonl``."""
    return pd.DataFrame(_task_lines(run, task))


def _task_lines(run: Run, task: str) -> list[dict[str, Any]]:
    return [line for line in _metric_lines(run) if line["task"] == task]


def _metric_lines(run: Run) -> list[dict[str, Any]]:
    path = run.metrics
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _write_metrics(run: Run, lines: list[dict[str, Any]]) -> None:
    write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def _fingerprint(params: Params, task: str, rows: pd.DataFrame) -> str:
    """Changes when a parameter that training depends on, or a file of the data, changes."""
    values = {k: v for k, v in params.model_dump().items() if k not in NOT_TRAINING}
    return hashlib.sha256(json.dumps([task, values, data_fingerprint(rows)], sort_keys=True).encode()).hexdigest()[:16]


def _resumable(run: Run, task: str, fingerprint: str) -> dict[str, Any] | None:
    path = run.folder / "checkpoints" / f"task{task}_state.pt"
    if not path.is_file():
        return None
    try:
        state = read_checkpoint(path)
    except CheckpointError as error:
        print(f"starting anew: {error}")
        return None
    if state["fingerprint"] != fingerprint:
        print("parameters or data changed since the last training of this name: starting anew")
        return None
    print(f"taking up the training of this name after step {state['step']}, epoch {state['epoch']}")
    return state


def _without_pretrained(params: Params) -> Params:
    return params.model_copy(update={"pretrained": False, "pretrained_file": None})


# ---- Steps and epochs ------------------------------------------------------------------------------------------------


def _run_step(fit: Fit, step: str, epochs: int, state: dict[str, Any] | None, fingerprint: str) -> None:
    """Train one step from where ``state`` left it, then publish its best epoch as the step's model."""
    target = fit.run.classifier_model(fit.task) if step == "head" else fit.run.finetuned_model(fit.task)
    past = state is not None and (state["step"], step) == ("finetune", "head")
    mine = state if state is not None and state["step"] == step else None
    if past or (mine and mine["epoch"] >= epochs):
        if is_main() and not target.is_file():
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
        content |= {"best": best, "epoch": epoch, "step": step, "fingerprint": fingerprint, "part": part}
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
            _append_metrics(fit.run, line)
            if better:
                save_checkpoint(fit.best_file(step), judged, score=best, epoch=epoch + 1, step=step)
            save(epoch + 1)
        print(_epoch_line(line, fit.params), flush=True)
    if is_main():
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
    best = read_checkpoint(fit.best_file(step))
    fit.model.load_state_dict(best["model"])
    keep = ("crop_size", "crops_per_image", "tile_size", "tile_overlap", "mask_scales", "mask_flips")
    params = {key: getattr(fit.params, key) for key in keep}
    facts = {"step": step, "epoch": best["epoch"], "score": best["score"], "inference": params, "run": fit.run.name}
    save_checkpoint(target, fit.model, sample=fit.run.sample, **facts)


def _append_metrics(run: Run, line: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; one that a stopped run wrote for the same epoch is replaced."""
    same = ("task", "step", "epoch")
    kept = [old for old in _metric_lines(run) if any(old[key] != line[key] for key in same)]
    _write_metrics(run, [*kept, line])


def _epoch_lines(run: Run, task: str) -> list[str]:
    return [_epoch_line(line, run.params) for line in _task_lines(run, task)]


def _epoch_line(line: dict[str, Any], params: Params) -> str:
    epochs = params.epochs_head if line["step"] == "head" else params.epochs_finetune
    iou = f", IoU {line['val_iou']:.3f}" if "val_iou" in line else ""
    return (
        f"{line['step']} {line['epoch']}/{epochs}: loss {line['train_loss']:.3f}, validation AUC {line['val_auc']:.3f}{iou}"
        f" ({line['seconds']:.0f} s, {line['images_per_second']:.0f} images/s)"
    )
