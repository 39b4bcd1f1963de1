"""One training loop for both tasks: step 1 trains the head on a frozen backbone, step 2 the last backbone stages too.

After every epoch the whole state is saved, so that a stopped run goes on from there; the best epoch by validation
becomes the step's model.  ``metrics.jsonl`` receives one line per epoch while it runs.  What another training of the same
name left stays as it was until the new one has an epoch, and is then moved aside, never deleted.
"""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import Any

import pandas as pd
import torch
from timm.utils import ModelEmaV3

from forensics_lib.data.audit import close_shortcut, findings_of
from forensics_lib.data.manifest import check_test_names, data_fingerprint, deciding, deciding_first, sources, usable
from forensics_lib.device import choose_machine, compiled_for_training
from forensics_lib.models.checkpoint import read_checkpoint, save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.params import Params
from forensics_lib.run import Run, record_trained
from forensics_lib.training.epoch import STEPS, Stopped, TrainingState, make_optimizer, make_schedule, train_epoch, validate
from forensics_lib.training.resume import (
    GO_ON,
    append_history,
    discard_begun,
    epoch_line,
    epoch_lines,
    find_resumable,
    move_replaced_aside,
    only_trainer,
    publish,
    read_history,
    training_inputs,
)
from forensics_lib.utils.files import is_main
from forensics_lib.utils.locks import stop_requests
from forensics_lib.utils.processes import (
    all_gather,
    all_reduce_sum,
    broadcast_weights,
    launch,
    rank,
    replicated,
    should_launch,
    wait_for_all,
    world,
)


def train(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Train a task's model by both steps and write ``_classifier_model.pth`` and ``_finetuned_model.pth``.

    Returns the epochs' metrics.  Finished work with the same parameters and data is taken up, not done again, and where
    another process trains it at this moment its epochs are shown until it ends.  With ``processes`` above 1 that many
    processes train together.  Raises ``FloatingPointError`` with the batch's files where the loss is not finite, and
    ``LayoutError`` at once where two test images would share a mask.
    """
    check_test_names(run, task)
    if should_launch(run.params.processes):
        launch(run.params.processes, "train", "--params", str(run.write_params()), "--tasks", task)
    else:
        with only_trainer(run, task, partial(epoch_lines, run, task)):
            _train(run, task, manifest)
    return read_history(run, task)


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
    equalize = all_gather(close_shortcut(run, task, train_rows) if is_main() else None)[0]
    trained_with = training_inputs(run.params, task, pd.concat([train_rows, val_rows]))
    state, begun = find_resumable(run, task, trained_with)
    model = build_model(_without_pretrained(run.params) if state else run.params, task).to(machine.device)
    val_rows = deciding_first(val_rows, decides, run.params.val_limit, run.params.seed_for())
    fit = TrainingState(run, task, model, machine, train_rows, val_rows, equalize, trained_with=trained_with, begun=begun)
    _take_up(fit, state)
    started = time.monotonic() - fit.seconds
    with stop_requests() as fit.stopping, closing(fit.batches):
        for step, epochs in zip(STEPS, (run.params.epochs_head, run.params.epochs_finetune), strict=True):
            _run_step(fit, step, epochs, state, started)
        if fit.stopping():
            raise KeyboardInterrupt(f"stopped when Task {task} was trained: {GO_ON}")
    record_trained(run, task, trained_with, taken_up=state is not None)
    _record(fit, manifest)


def _take_up(fit: TrainingState, state: dict[str, Any] | None) -> None:
    """Set what ``state`` tells of the training so far, and remove one that had begun otherwise and is not gone on with."""
    if state:
        fit.errors, fit.seconds, fit.machine_then = dict(state["errors"]), state["seconds"], state["machine"]
    wait_for_all()  # all have looked before the first one changes anything
    if is_main() and not (state and fit.begun):
        discard_begun(fit.run, fit.task)
    wait_for_all()


def _record(fit: TrainingState, manifest: pd.DataFrame) -> None:
    """What ``run.json`` keeps of a finished training; taking it up again changes nothing of it."""
    facts = {"data_fingerprint": data_fingerprint(manifest), "data": sources(manifest).to_dict("records")}
    if fit.seconds:  # unknown of trainings of earlier versions, whose facts stay
        facts |= {"training_seconds": round(fit.seconds, 1), "machine": fit.machine_then}
        facts |= {"unreadable_in_training": sorted(fit.errors)}
    fit.run.record(**{f"task{fit.task}_{name}": value for name, value in facts.items()})
    if fit.errors:
        print(f"{len(fit.errors)} training image(s) could not be read and were left out:")
        print("\n".join(f"  {reason}" for reason in list(fit.errors.values())[:10]))


def _without_pretrained(params: Params) -> Params:
    return params.model_copy(update={"pretrained": False, "pretrained_file": None})


def _run_step(fit: TrainingState, step: str, epochs: int, state: dict[str, Any] | None, started: float) -> None:
    """Train one step from where ``state`` left it, then publish its best epoch as the step's model.

    ``started`` is a time of the monotonic clock: when the training began, had it had no pauses.
    """
    target = fit.run.classifier_model(fit.task) if step == "head" else fit.run.finetuned_model(fit.task)
    past = state is not None and (state["step"], step) == ("finetune", "head")
    mine = state if state is not None and state["step"] == step else None
    if past or (mine and mine["epoch"] >= epochs):
        if is_main() and not fit.begun and not target.is_file():
            publish(fit, step, target)
        wait_for_all()
        return
    if step == "finetune" and not mine:
        fit.model.load_state_dict(read_checkpoint(fit.best_file("head"))["model"])
    fit.model.freeze_backbone(0 if step == "head" else fit.params.finetune_stages)
    optimizer = make_optimizer(fit.model, fit.params.lr_head if step == "head" else fit.params.lr_finetune, fit.params)
    if mine:
        fit.model.load_state_dict(mine["model"])
        optimizer.load_state_dict(mine["optimizer"])
    broadcast_weights(fit.model)
    average = ModelEmaV3(fit.model, decay=fit.params.ema, use_warmup=True) if fit.params.ema else None
    if mine and average:
        average.module.load_state_dict(mine["average"])
    pixels = epochs * len(fit.train) * fit.params.crop_size**2
    share = len(range(rank(), fit.params.batch_size, world()))
    fit.trained = replicated(compiled_for_training(fit.model, fit.task, share, pixels))
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
        broadcast_weights(judged)  # each process has normalised with statistics of its own images
        try:
            if all_reduce_sum(int(fit.stopping()))[0]:
                raise KeyboardInterrupt(f"{where} before its validation, with all batches saved: {GO_ON}")
            line = line | validate(fit, judged)
        except BaseException:  # whatever ends a validation, the epoch is not to be trained again
            if is_main():
                save(epoch, {"line": line})
            raise
        better, best = line["score"] > best, max(line["score"], best)
        if is_main():
            if fit.begun:
                move_replaced_aside(fit, step)
            append_history(fit.run, line)
            if better:
                save_checkpoint(fit.best_file(step), judged, score=best, epoch=epoch + 1, step=step)
            save(epoch + 1)
        fit.begun = False
        print(epoch_line(line, fit.params), flush=True)
    if is_main() and not fit.begun:
        publish(fit, step, target)
    wait_for_all()


def _first_best(fit: TrainingState, step: str) -> float:
    """The score a step has to beat: none for step 1, step 1's best for step 2, whose model it starts from."""
    score = -1.0 if step == "head" else float(read_checkpoint(fit.best_file("head"))["score"])
    if is_main():
        save_checkpoint(fit.best_file(step), fit.model, score=score, epoch=0, step=step)
    return score
