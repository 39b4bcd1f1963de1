"""One training loop for both tasks: step 1 trains the head on a frozen backbone, step 2 the last backbone stages too.

The whole state is saved after every epoch, so that a stopped run goes on from there; the best epoch by validation becomes
the step's model.  Each epoch appends a line to ``metrics.jsonl``.  The results of another training of the same name stay
until the new one has an epoch, and are then moved aside, never deleted.
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
from forensics_lib.data.rows import DONOR
from forensics_lib.device import Machine, choose_machine, compiled_for_training, lost_device_is_told
from forensics_lib.models.checkpoint import read_checkpoint, save_checkpoint
from forensics_lib.models.combined import CombinedModel, build_model
from forensics_lib.models.lora import add_adapters
from forensics_lib.run import Run, record_trained
from forensics_lib.training import resume
from forensics_lib.training.epoch import make_optimizer, make_schedule, some_get_no_gradient, train_epoch, validate
from forensics_lib.training.state import STEPS, PartialEpoch, SavedState, Step, Stopped, TrainingState
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
    """Train the model of a task in both steps; writes ``_classifier_model.pth`` and ``_finetuned_model.pth``.

    A training with the same parameters and data is resumed, or taken as it is where it is finished.  While another process
    trains the same task of the run, this one prints its epochs and waits.  ``processes`` above 1 starts that many processes.

    Returns a row per epoch, as ``read_history`` does.

    Raises:
        FloatingPointError: the loss is not finite; the message names the files of the batch.
        ImageError: no training image, or no validation image of a class, can be read.
        LayoutError: two test images would share a mask file.
        DeviceLostError, DeviceMemoryError: the GPU failed, or its memory does not suffice; saved epochs are whole.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything up to the last batch is saved.
    """
    check_test_names(run, task)
    if not run.params.trains:
        return _take_as_it_is(run, task, manifest)
    if should_launch(run.params.processes):
        launch(run.params.processes, "train", "--params", str(run.write_params()), "--tasks", task)
    else:
        with resume.only_trainer(run, task, partial(resume.epoch_lines, run, task)):
            _train(run, task, manifest)
    return resume.read_history(run, task)


def _take_as_it_is(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Record a run that brings what predicts, and so trains nothing; returns a history without epochs."""
    what = run.params.detector or f"the mean of {', '.join(run.params.ensemble or [])}"
    print(f"Task {task}: {what} is used as it is, nothing is trained")
    record_trained(run, task, {"detector": run.params.detector, "ensemble": run.params.ensemble}, taken_up=False)
    run.record(**{f"task{task}_{name}": value for name, value in _data_facts(manifest).items()})
    return pd.DataFrame(columns=["step", "epoch", "train_loss", "val_auc"])


@lost_device_is_told()
def _train(run: Run, task: str, manifest: pd.DataFrame) -> None:
    machine = choose_machine(run.params)
    print(f"Task {task} training on {machine}{f', {world()} processes' if world() > 1 else ''}")
    torch.manual_seed(run.params.seed)
    state, saved = _begin(run, task, manifest, machine)
    with stop_requests() as state.stopping, closing(state.batches):
        for name, epochs in zip(STEPS, (run.params.epochs_head, run.params.epochs_finetune), strict=True):
            _run_step(state, name, epochs, saved)
        if state.stopping():
            raise KeyboardInterrupt(f"stopped when Task {task} was trained: {resume.GO_ON}")
    record_trained(run, task, state.trained_with, taken_up=saved is not None)
    _record(state, manifest)


def _begin(run: Run, task: str, manifest: pd.DataFrame, machine: Machine) -> tuple[TrainingState, SavedState | None]:
    """A training's state, and the saved state that it resumes from, if there is one."""
    train_rows, val_rows, donors = (usable(manifest, split) for split in ("train", "val", DONOR))
    decides, rule = deciding(run, task, val_rows, train_rows)
    pasted = f"; regions of {len(donors)} synthetic images are pasted into authentic ones" if len(donors) else ""
    print(f"{len(train_rows)} training and {len(val_rows)} validation images{pasted}")
    print(f"the best epoch is chosen on {min(decides.sum(), run.params.val_limit)} validation images: {rule}")
    for found in findings_of(run, task, manifest):
        print(f"WARNING {found['finding']}: {found['count']}. {found['remedy']}")
    equalize = all_gather(close_shortcut(run, task, train_rows) if is_main() else None)[0]
    trained_with = resume.training_inputs(run.params, task, pd.concat([train_rows, val_rows, donors]))
    saved, begun = resume.find_resumable(run, task, trained_with)
    without_weights = {"pretrained": False, "pretrained_file": None}  # saved ones will replace them
    params = run.params.model_copy(update=without_weights) if saved else run.params
    model = build_model(params, task, levels=_levels_of(saved) if saved else None).to(machine.device)
    val_rows = deciding_first(val_rows, decides, run.params.val_limit, run.params.seed_for())
    state = TrainingState(
        run, task, model, machine, train_rows, val_rows, equalize, donors, trained_with=trained_with, begun=begun
    )
    if saved:
        state.errors, state.seconds, state.machine_then = dict(saved.errors), saved.seconds, saved.machine
    state.started = time.monotonic() - state.seconds
    wait_for_all()  # all processes have read the files before the first one changes any
    if is_main() and not (saved and begun):
        resume.discard_begun(run, task)
    wait_for_all()
    return state, saved


def _levels_of(saved: SavedState) -> bool | str:
    """What a saved model's classifier sees of its backbone: those of earlier versions saw pooled features, or stages too."""
    if "norm.weight" not in saved.model:
        return "mask"
    sizes = [len(weight) for name, weight in saved.model.items() if name.startswith("level_norms.") and name.endswith("weight")]
    if set(sizes) == {len(saved.model["norm.weight"])}:
        return "tokens"
    return bool(sizes)


def _data_facts(manifest: pd.DataFrame) -> dict[str, Any]:
    return {"data_fingerprint": data_fingerprint(manifest), "data": sources(manifest).to_dict("records")}


def _record(state: TrainingState, manifest: pd.DataFrame) -> None:
    """Keep the facts of a finished training in ``run.json``; resuming it again changes none of them."""
    facts = _data_facts(manifest)
    if state.seconds:  # unknown of trainings of earlier versions, whose facts stay
        facts |= {"training_seconds": round(state.seconds, 1), "machine": state.machine_then}
        facts |= {"unreadable_in_training": sorted(state.errors)}
    state.run.record(**{f"task{state.task}_{name}": value for name, value in facts.items()})
    if state.errors:
        print(f"{len(state.errors)} training image(s) could not be read and were left out:")
        print("\n".join(f"  {reason}" for reason in list(state.errors.values())[:10]))


def _run_step(state: TrainingState, name: str, epochs: int, saved: SavedState | None) -> None:
    """Train a step from where ``saved`` left it, then publish its best epoch as the step's model."""
    mine = saved if saved and saved.step == name else None
    finished = saved is not None and (mine.epoch >= epochs if mine else saved.step == "finetune")
    if not finished:
        step = _begin_step(state, name, epochs, mine)
        for epoch in range(mine.epoch if mine else 0, epochs):
            _run_epoch(state, step, epoch, mine if mine and mine.epoch == epoch else None)
    target = state.run.classifier_model(state.task) if name == "head" else state.run.finetuned_model(state.task)
    if is_main() and not state.begun and not (finished and target.is_file()):
        resume.publish(state, name, target)
    wait_for_all()


def _begin_step(state: TrainingState, name: str, epochs: int, saved: SavedState | None) -> Step:
    """Set the weights that a step starts from, freeze those that it does not train, and build its optimizer."""
    params = state.params
    if name == "finetune" and not saved:
        state.model.load_state_dict(read_checkpoint(state.best_file("head"))["model"])
    if name == "finetune" and params.lora_rank:
        add_adapters(state.model.backbone, params.lora_rank)
    keep = params.pretrained and state.task == "A"  # Task B needs features far from those of pretraining
    state.model.freeze_backbone(0 if name == "head" else params.finetune_stages, keep_statistics=keep)
    optimizer = make_optimizer(state.model, params.lr_head if name == "head" else params.lr_finetune, params)
    scaler = torch.amp.GradScaler(state.machine.device.type, enabled=state.machine.precision == "fp16")
    if saved:
        state.model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        if saved.scaler:
            scaler.load_state_dict(saved.scaler)
    broadcast_weights(state.model)
    average = ModelEmaV3(state.model, decay=params.ema, use_warmup=True) if params.ema else None
    if average and saved and saved.average:
        average.module.load_state_dict(saved.average)
    pixels, share = epochs * len(state.train) * params.crop_size**2, len(range(rank(), params.batch_size, world()))
    find_unused = world() > 1 and some_get_no_gradient(state)
    state.trained = replicated(compiled_for_training(state.model, state.task, share, pixels), find_unused)
    best = saved.best if saved else _first_best(state, name)
    schedule = make_schedule(optimizer, epochs * state.updates, params.warmup)
    return Step(name, epochs, optimizer, schedule, scaler, average, best)


def _first_best(state: TrainingState, step: str) -> float:
    """The score that a step has to beat: none for step 1, the best of step 1 for step 2, which starts from that model."""
    score = -1.0 if step == "head" else float(read_checkpoint(state.best_file("head"))["score"])
    if is_main():
        save_checkpoint(state.best_file(step), state.model, score=score, epoch=0, step=step)
    return score


def _run_epoch(state: TrainingState, step: Step, epoch: int, saved: SavedState | None) -> None:
    """Train and validate an epoch, of which ``saved`` may hold a part, and keep its results."""
    line = (saved and saved.line) or _train_or_stop(state, step, epoch, saved.partial if saved else None)
    judged = step.average.module if step.average else state.model
    broadcast_weights(judged)  # the normalization statistics of each process are of its own images
    line = line | _validate_or_stop(state, step, epoch, line, judged)
    better, step.best = line["score"] > step.best, max(line["score"], step.best)
    if is_main():
        if state.begun:
            resume.move_replaced_aside(state, step.name)
        resume.append_history(state.run, line)
        if better:
            save_checkpoint(state.best_file(step.name), judged, score=step.best, epoch=epoch + 1, step=step.name)
        _save(state, step, epoch + 1)
    state.begun = False
    print(resume.epoch_line(line, state.params), flush=True)


def _train_or_stop(state: TrainingState, step: Step, epoch: int, unfinished: PartialEpoch | None) -> dict[str, Any]:
    """``train_epoch``; a requested stop saves the batches so far."""
    try:
        return train_epoch(state, step, epoch, unfinished)
    except Stopped as stopped:
        if is_main():
            _save(state, step, epoch, unfinished=stopped.partial)
        where = f"stopped in {step.name} epoch {epoch + 1} after {stopped.partial.batches} batches"
        raise KeyboardInterrupt(f"{where}, which are saved: {resume.GO_ON}") from None


def _validate_or_stop(
    state: TrainingState, step: Step, epoch: int, line: dict[str, Any], judged: CombinedModel
) -> dict[str, float]:
    """``validate``, unless a stop is requested."""
    try:
        if all_reduce_sum(int(state.stopping()))[0]:
            where = f"stopped in {step.name} epoch {epoch + 1} before its validation"
            raise KeyboardInterrupt(f"{where}, with all batches saved: {resume.GO_ON}")
        return validate(state, judged)
    except BaseException:  # save first, so that an interrupted validation does not cost the epoch
        if is_main():
            _save(state, step, epoch, line=line)
        raise


def _save(
    state: TrainingState, step: Step, epoch: int, unfinished: PartialEpoch | None = None, line: dict[str, Any] | None = None
) -> None:
    """Write the state file: ``epoch`` epochs of the step are done, and of the next one either batches or its line."""
    state.seconds, state.machine_then = time.monotonic() - state.started, str(state.machine)
    content = SavedState(
        step=step.name,
        epoch=epoch,
        best=step.best,
        model=state.model.state_dict(),
        optimizer=step.optimizer.state_dict(),
        average=step.average.module.state_dict() if step.average else None,
        scaler=step.scaler.state_dict(),
        partial=unfinished,
        line=line,
        trained_with=state.trained_with,
        errors=dict(state.errors),
        seconds=state.seconds,
        machine=state.machine_then,
    )
    save_checkpoint(state.state_file, state.model, merged=False, **content.to_dict())
