"""One training loop for both tasks: step 1 trains the head on a frozen backbone, step 2 the last backbone stages too.

After every epoch the whole state is saved, so that a stopped run goes on from there; the best epoch by validation
becomes the step's model.  ``metrics.jsonl`` receives one line per epoch while it runs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from forensics_lib.audits import equalized_audit, findings_of, shortcut_audit
from forensics_lib.datasets import TrainingCrops, drawing_groups, epoch_order, training_loader
from forensics_lib.distributed import (
    as_one,
    gathered,
    launch,
    launches,
    rank,
    replicated,
    totals,
    wait_for_all,
    world,
)
from forensics_lib.files import is_main, read_json, write_json, write_text
from forensics_lib.images import ImageError
from forensics_lib.losses import make_mixup, mask_loss
from forensics_lib.machine import Machine, choose_machine
from forensics_lib.manifest import data_fingerprint, sources, usable
from forensics_lib.metrics import pixel_curves, roc_auc
from forensics_lib.model import CheckpointError, CombinedModel, build_model, read_checkpoint, save_checkpoint
from forensics_lib.params import Params
from forensics_lib.progress import progress
from forensics_lib.runs import Run
from forensics_lib.scoring import predict
from forensics_lib.stopping import stop_requests

CLIP_NORM = 1.0  # gradients are scaled down to this norm
NOT_TRAINING = {  # parameters that training does not depend on: changing them does not start it anew
    "run_name", "team", "edition", "tasks", "test_folder_a", "test_folder_b", "workers", "data_root",
    "robustness_images", "processes",
}  # fmt: skip


class Stopped(Exception):
    """An epoch was stopped between two batches; ``part`` is what is needed to go on from there."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__()
        self.part = part


@dataclass
class Fit:
    """The state of one training that outlives an epoch."""

    run: Run
    task: str
    model: CombinedModel
    machine: Machine
    train: pd.DataFrame
    val: pd.DataFrame
    equalize: bool  # recompress every crop, see degradations.degrade
    errors: dict[str, str] = field(default_factory=dict)  # path to reason, images that failed while training
    trained: nn.Module = field(init=False)  # the model, or its view that averages gradients over processes

    stopping: Callable[[], bool] = lambda: False  # whether somebody asks to stop

    def __post_init__(self) -> None:
        self.trained = self.model

    @property
    def params(self) -> Params:
        return self.run.params

    @property
    def updates(self) -> int:
        """Optimizer updates in an epoch."""
        return -(-len(self.train) // self.params.batch_size)

    @property
    def checkpoints(self) -> Path:
        return self.run.folder / "checkpoints"

    @property
    def state_file(self) -> Path:
        return self.checkpoints / f"task{self.task}_state.pt"

    def best_file(self, step: str) -> Path:
        return self.checkpoints / f"task{self.task}_{step}_best.pth"


def train(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Train a task's model by both steps and write ``_classifier_model.pth`` and ``_finetuned_model.pth``.

    Returns the epochs' metrics.  Finished work with the same parameters and data is taken up, not done again.  With
    ``processes`` above 1 that many processes train together.  Raises ``FloatingPointError`` with the batch's files where
    the loss is not finite.
    """
    if launches(run.params.processes):
        launch(run.params.processes, "train", "--params", str(run.write_params()), "--tasks", task)
        return read_metrics(run, task)
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
    with stop_requests() as fit.stopping:
        for step, epochs in (("head", run.params.epochs_head), ("finetune", run.params.epochs_finetune)):
            _run_step(fit, step, epochs, state, fingerprint)
    run.record(**{f"task{task}_data_fingerprint": data_fingerprint(manifest)})
    run.record(**{f"task{task}_data": sources(manifest).to_dict("records")})
    run.record(**{f"task{task}_training_seconds": round(time.monotonic() - started, 1), f"task{task}_machine": str(machine)})
    if fit.errors:
        print(f"{len(fit.errors)} training image(s) could not be read and were left out:")
        print("\n".join(f"  {reason}" for reason in list(fit.errors.values())[:10]))
        run.record(**{f"task{task}_unreadable_in_training": sorted(fit.errors)})
    return read_metrics(run, task)


def close_shortcut(run: Run, task: str, rows: pd.DataFrame) -> bool:
    """Say whether file facts tell the classes apart and what closes it; returns whether crops are equalized."""
    audit = shortcut_audit(rows)
    print(audit.message())
    equalize = {"auto": audit.of_codecs, "always": True, "never": False}[run.params.equalize]
    facts = {"shortcut_auc": round(audit.auc, 3), "equalized": equalize, "shortcut_auc_of_crops": None}
    if audit.found:
        print("\n".join(f"  closed by {remedy}" for remedy in audit.remedies()))
        after = equalized_audit(rows, training_crops(rows, task, run.params, equalize=equalize, seed=run.params.seed))
        print(f"  of the training crops, equalize {'on' if equalize else 'off'}: {after.message()}")
        facts["shortcut_auc_of_crops"] = round(after.auc, 3)
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})
    return equalize


def training_crops(rows: pd.DataFrame, task: str, params: Params, *, equalize: bool, seed: int) -> TrainingCrops:
    """The crops that a task trains on."""
    options = {"degradations": params.degrade if task == "A" else params.degrade_b, "seed": seed, "equalize": equalize}
    return TrainingCrops(rows, params.crop_size, masks=task == "B", paste=params.paste if task == "B" else 0.0, **options)


def _forget(run: Run, task: str) -> None:
    """Remove what another training of this name left, so that nothing is taken for this one's."""
    for path in (run.classifier_model(task), run.finetuned_model(task), run.val_probs(task), run.test_probs(task)):
        path.unlink(missing_ok=True)
    write_json(run.thresholds, {key: value for key, value in read_json(run.thresholds).items() if key != task})
    _write_metrics(run, [line for line in _metric_lines(run) if line["task"] != task])


def read_metrics(run: Run, task: str) -> pd.DataFrame:
    """The epochs of a task so far, one row each, from ``metrics.jsonl``."""
    return pd.DataFrame([line for line in _metric_lines(run) if line["task"] == task])


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


def sampled(rows: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """At most ``limit`` rows, the same share of each class and source."""
    if len(rows) <= limit:
        return rows
    parts = rows.groupby(["label", "source"], group_keys=False)
    return parts.sample(frac=limit / len(rows), random_state=seed).sort_index().reset_index(drop=True)


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
    optimizer = _optimizer(fit.model, fit.params.lr_head if step == "head" else fit.params.lr_finetune, fit.params)
    if mine:
        fit.model.load_state_dict(mine["model"])
        optimizer.load_state_dict(mine["optimizer"])
    as_one(fit.model)
    average = ModelEmaV3(fit.model, decay=fit.params.ema, use_warmup=True) if fit.params.ema else None
    if mine and average:
        average.module.load_state_dict(mine["average"])
    fit.trained = replicated(fit.model)
    best = mine["best"] if mine else _first_best(fit, step)
    schedule = _schedule(optimizer, epochs * fit.updates, fit.params.warmup)

    def save(epoch: int, part: dict[str, Any] | None = None) -> None:
        content = {"optimizer": optimizer.state_dict(), "average": average.module.state_dict() if average else None}
        content |= {"best": best, "epoch": epoch, "step": step, "fingerprint": fingerprint, "part": part}
        save_checkpoint(fit.state_file, fit.model, **content)

    part = mine["part"] if mine else None
    for epoch in range(mine["epoch"] if mine else 0, epochs):
        try:
            line = _train_epoch(fit, step, epoch, optimizer, schedule, average, part)
        except Stopped as stopped:
            if is_main():
                save(epoch, stopped.part)
            raise KeyboardInterrupt(
                f"stopped in {step} epoch {epoch + 1} after {stopped.part['batches']} batches, which are saved: "
                "the same command or cell goes on from there"
            ) from None
        part = None
        judged = average.module if average else fit.model
        as_one(judged)  # each process has normalised with statistics of its own images
        line |= _validate(fit, judged)
        better, best = line["score"] > best, max(line["score"], best)
        if is_main():
            _append_metrics(fit.run, line)
            if better:
                save_checkpoint(fit.best_file(step), judged, score=best, epoch=epoch + 1, step=step)
            save(epoch + 1)
        print(_epoch_line(line, epochs), flush=True)
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
    keep = ("crop_size", "crops_per_image", "tile_size", "tile_overlap")
    params = {key: getattr(fit.params, key) for key in keep}
    facts = {"step": step, "epoch": best["epoch"], "score": best["score"], "inference": params, "run": fit.run.name}
    save_checkpoint(target, fit.model, sample=fit.run.sample, **facts)


def _optimizer(model: CombinedModel, rate: float, params: Params) -> torch.optim.Optimizer:
    """AdamW; with ``layer_decay`` each backbone layer below the last learns that much slower (Bao et al., BEiT, 2022)."""
    if params.layer_decay == 1:
        return torch.optim.AdamW(param_groups_weight_decay(model, params.weight_decay), lr=rate)
    new = [module for name, module in model.named_children() if name != "backbone"]
    groups = [group for module in new for group in param_groups_weight_decay(module, params.weight_decay) if group["params"]]
    layers = param_groups_layer_decay(model.backbone, params.weight_decay, layer_decay=params.layer_decay)
    return torch.optim.AdamW([*groups, *layers], lr=rate)


def _schedule(optimizer: torch.optim.Optimizer, updates: int, warmup: float) -> CosineLRScheduler:
    """Linear warm-up, then a cosine down to a hundredth of the peak; stepped by the number of updates."""
    rise = max(1, round(updates * warmup))
    peak = optimizer.defaults["lr"]
    return CosineLRScheduler(
        optimizer,
        t_initial=max(updates, rise + 1),
        lr_min=peak / 100,
        warmup_t=rise,
        warmup_lr_init=peak / 100,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def _train_epoch(
    fit: Fit,
    step: str,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    schedule: CosineLRScheduler,
    average: ModelEmaV3 | None,
    part: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One pass over a balanced selection of the training images; returns what goes into ``metrics.jsonl``.

    ``part`` is what ``Stopped`` told of an epoch that was begun earlier.
    """
    seed = fit.params.seed * 1000 + (500 if step == "finetune" else 0) + epoch
    torch.manual_seed(seed + 10**6 * rank())  # dropout and stochastic depth
    dataset = training_crops(fit.train, fit.task, fit.params, equalize=fit.equalize, seed=seed)
    order = epoch_order(fit.train["label"].to_numpy(int), seed, epoch, *drawing_groups(fit.train, fit.task, fit.params))
    batches = [order[start : start + fit.params.batch_size] for start in range(0, len(order), fit.params.batch_size)]
    first = part["batches"] if part else 0
    loader = training_loader(dataset, [batch[rank() :: world()] for batch in batches[first:]], fit.machine.workers)
    fit.model.to(memory_format=torch.channels_last).train()
    mix = make_mixup(fit.params, fit.task)
    np.random.seed(seed + rank())  # noqa: NPY002 (timm's mixup draws from it)
    started, losses, seen = time.monotonic(), [], 0
    if part:
        losses, seen = list(part["losses"]) if is_main() else [], part["seen"]
        started -= part["seconds"]
    bar = progress(loader, f"Task {fit.task} {step} epoch {epoch + 1}")
    for number, batch in enumerate(bar, start=first):
        fit.errors |= {fit.train["path"][index]: reason for index, reason in batch["errors"]}
        if part and number == first:
            _set_random_state(part["random"])
        share = len(batch["index"])
        everywhere, stops = totals(share, int(fit.stopping()))
        if stops:
            facts = {"losses": losses, "seen": seen, "seconds": time.monotonic() - started, "random": _random_state()}
            raise Stopped({"batches": number} | facts)
        if not everywhere:
            continue
        update = epoch * fit.updates + number
        schedule.step_update(update)
        loss = _loss(fit, batch if share else _nothing(fit), mix)
        if not torch.isfinite(loss):
            files = "\n  ".join(fit.train["path"][index] for index in batch["index"])
            raise FloatingPointError(
                f"the loss is {loss.item()} in {step} epoch {epoch + 1}; lower the rate, or look at\n  {files}"
            )
        optimizer.zero_grad(set_to_none=True)
        (loss * (share * world() / everywhere)).backward()  # gradients are averaged over processes, whatever their shares
        torch.nn.utils.clip_grad_norm_(fit.model.parameters(), CLIP_NORM)
        optimizer.step()
        if average:
            average.update(fit.model, update)
        losses += [loss.item()] if share else []
        seen += everywhere
        bar.note(f"loss {np.mean(losses[-20:]):.3f}")
    losses = [value for part in gathered(losses) for value in part]
    fit.errors = {path: reason for part in gathered(fit.errors) for path, reason in part.items()}
    if not losses:
        raise ImageError(
            f"none of the {len(fit.train)} training images could be read; the first: {next(iter(fit.errors.values()))}"
        )
    seconds = time.monotonic() - started
    return {
        "task": fit.task,
        "step": step,
        "epoch": epoch + 1,
        "train_loss": float(np.mean(losses)),
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": round(seen / seconds, 1),
        "seconds": round(seconds, 1),
    }


def _random_state() -> list[Any]:
    """The states of torch's and NumPy's generators, in types that a checkpoint may hold."""
    name, keys, *others = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state(), name, keys.tolist(), *others]


def _set_random_state(state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state((state[1], np.array(state[2], np.uint32), *state[3:]))  # noqa: NPY002


def _nothing(fit: Fit) -> dict[str, Any]:
    """A batch of one black image, for a process whose share of a batch is empty: its loss counts nothing."""
    side = fit.params.crop_size
    batch = {"index": [], "image": torch.zeros(1, 3, side, side, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.long)}
    return batch | {"mask": torch.zeros(1, 1, side, side, dtype=torch.bool)}


def _loss(fit: Fit, batch: dict[str, Any], mix: Mixup | None) -> torch.Tensor:
    """Cross-entropy, and for Task B + ``mask_weight`` x mask loss."""
    images, labels = fit.machine.to_device(batch["image"]), batch["label"].to(fit.machine.device)
    smoothing = fit.params.label_smoothing
    if mix is not None and len(images) % 2 == 0:  # pairs are mixed; a last batch of an odd number is not
        images, labels = mix(images, labels)
        smoothing = 0.0
    with fit.machine.autocast():
        output = fit.trained(images)
    loss = F.cross_entropy(output.logits.float(), labels, label_smoothing=smoothing)
    if output.mask_logits is not None:
        masks, params = batch["mask"].to(fit.machine.device, non_blocking=True), fit.params
        of_masks = mask_loss(output.mask_logits.float(), masks, params.mask_loss, params.boundary_weight)
        loss = loss + params.mask_weight * of_masks
    return loss


# ---- Validation ------------------------------------------------------------------------------------------------------


def _validate(fit: Fit, model: CombinedModel) -> dict[str, float]:
    """An epoch's validation: ``score`` selects the best one (AUC; for Task B the mean of AUC and best mean IoU).

    Task A is judged on images of sources that training does not have, where validation has such of both classes.
    """
    result = predict(model, fit.task, fit.val, fit.params, fit.machine)
    good, labels = result.good(), fit.val["label"].to_numpy(int)
    auc = roc_auc(labels[good], result.probs[good])
    if not np.isfinite(auc):
        reasons = "; ".join(list(result.errors.values())[:3])
        raise ImageError(f"validation needs readable images of both classes; {len(result.errors)} could not be read: {reasons}")
    values = {"val_auc": auc, "score": auc}
    unseen = good & ~fit.val["source"].isin(fit.train["source"]).to_numpy()
    if fit.task == "A" and len(set(labels[unseen])) == 2:
        values["score"] = roc_auc(labels[unseen], result.probs[unseen])
    if result.histograms is not None:
        manipulated = result.histograms[good & (fit.val["label"] == 1)]
        values["val_iou"] = float(pixel_curves(manipulated)[0].mean(0)[1:].max())
        values["score"] = (values["val_auc"] + values["val_iou"]) / 2
    return values


def _append_metrics(run: Run, line: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; one that a stopped run wrote for the same epoch is replaced."""
    same = ("task", "step", "epoch")
    kept = [old for old in _metric_lines(run) if any(old[key] != line[key] for key in same)]
    _write_metrics(run, [*kept, line])


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    iou = f", IoU {line['val_iou']:.3f}" if "val_iou" in line else ""
    return (
        f"{line['step']} {line['epoch']}/{epochs}: loss {line['train_loss']:.3f}, validation AUC {line['val_auc']:.3f}{iou}"
        f" ({line['seconds']:.0f} s, {line['images_per_second']:.0f} images/s)"
    )
