"""One epoch of a training: crops to updates, and what its validation says; both tasks, one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from forensics_lib.data.audit import training_crops
from forensics_lib.data.datasets import TrainingBatches, drawing_strata, epoch_order, numbered_draws
from forensics_lib.data.manifest import deciding
from forensics_lib.device import Machine
from forensics_lib.evaluation.metrics import pixel_curves, roc_auc
from forensics_lib.evaluation.predictions import predict_labelled
from forensics_lib.images.io import ImageError
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.run import Run
from forensics_lib.training.losses import mask_loss
from forensics_lib.utils.files import is_main
from forensics_lib.utils.processes import all_gather, all_reduce_sum, rank, world
from forensics_lib.utils.progress import progress

CLIP_NORM = 1.0  # gradients are scaled down to this norm
STEPS = ("head", "finetune")
BEGUN = "begun"  # the folder in checkpoints/ of a training that has no epoch yet and will replace another


class Stopped(Exception):
    """An epoch was stopped between two batches; ``part`` is what is needed to go on from there."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__()
        self.part = part


@dataclass
class TrainingState:
    """The state of one training that outlives an epoch."""

    run: Run
    task: str
    model: CombinedModel
    machine: Machine
    train: pd.DataFrame
    val: pd.DataFrame  # what is scored after each epoch; those of it that decide choose the best one
    equalize: bool  # recompress every crop, see degradations.degrade
    errors: dict[str, str] = field(default_factory=dict)  # path to reason, images that failed while training
    trained: nn.Module = field(init=False)  # the model, or its view that is compiled or averages gradients over processes
    stopping: Callable[[], bool] = lambda: False  # whether somebody asks to stop
    trained_with: dict[str, Any] = field(default_factory=dict)  # parameters and data that the training depends on
    begun: bool = False  # it has no epoch yet, and another training's files are still there
    seconds: float = 0.0  # what it took when it was last saved, all its parts together
    machine_then: str = ""  # where that was

    def __post_init__(self) -> None:
        self.trained = self.model

    @property
    def params(self) -> Params:
        return self.run.params

    @cached_property
    def batches(self) -> TrainingBatches:
        crops = training_crops(self.train, self.task, self.params, equalize=self.equalize)
        return TrainingBatches(crops, self.machine.workers)

    @property
    def updates(self) -> int:
        """Optimizer updates in an epoch."""
        return -(-len(self.train) // self.params.batch_size)

    @property
    def checkpoints(self) -> Path:
        folder = self.run.folder / "checkpoints"
        return folder / BEGUN if self.begun else folder

    @property
    def state_file(self) -> Path:
        return self.checkpoints / f"task{self.task}_state.pt"

    def best_file(self, step: str) -> Path:
        return self.checkpoints / f"task{self.task}_{step}_best.pth"


def make_optimizer(model: CombinedModel, rate: float, params: Params) -> torch.optim.Optimizer:
    """AdamW; with ``layer_decay`` each backbone layer below the last learns that much slower (Bao et al., BEiT, 2022)."""
    if params.layer_decay == 1:
        return torch.optim.AdamW(param_groups_weight_decay(model, params.weight_decay), lr=rate)
    new = [module for name, module in model.named_children() if name != "backbone"]
    groups = [group for module in new for group in param_groups_weight_decay(module, params.weight_decay) if group["params"]]
    layers = param_groups_layer_decay(model.backbone, params.weight_decay, layer_decay=params.layer_decay)
    return torch.optim.AdamW([*groups, *layers], lr=rate)


def make_schedule(optimizer: torch.optim.Optimizer, updates: int, warmup: float) -> CosineLRScheduler:
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


def train_epoch(
    fit: TrainingState,
    step: str,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    schedule: CosineLRScheduler,
    average: ModelEmaV3 | None,
    part: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One pass over a balanced selection of the training images; returns what goes into ``metrics.jsonl``.

    ``part`` is what ``Stopped`` told of an epoch that was begun earlier.  Raises ``Stopped`` between two batches when
    somebody asks to stop, ``FloatingPointError`` where the loss is not finite, ``ImageError`` where nothing can be read.
    """
    seed = fit.params.seed_for(STEPS.index(step), epoch)
    own = fit.params.seed_for(STEPS.index(step), epoch, rank())
    torch.manual_seed(own)  # dropout and stochastic depth
    fit.model.to(memory_format=torch.channels_last).train()
    started, first, losses, seen = time.monotonic(), 0, [], 0
    if part:
        started, first, seen = started - part["seconds"], part["batches"], part["seen"]
        losses = _losses_of(part)
    bar = progress(_batches(fit, epoch, seed, first), f"Task {fit.task} {step} epoch {epoch + 1}")
    for number, batch in enumerate(bar, start=first):
        if part and number == first:
            _set_random_state(part["random"], fit.machine.device)
        fit.errors |= {fit.train["path"][index]: reason for index, reason in batch["errors"]}
        share = len(batch["index"])
        everywhere, stops = all_reduce_sum(share, int(fit.stopping()))
        if stops:
            raise Stopped({"batches": number} | _so_far(fit, losses, seen, time.monotonic() - started))
        if not everywhere:
            continue
        update = epoch * fit.updates + number
        schedule.step_update(update)
        loss = batch_loss(fit, batch if share else dummy_batch(fit))
        _check_finite(fit, loss, batch, f"{step} epoch {epoch + 1}")
        optimizer.zero_grad(set_to_none=True)
        (loss * (share * world() / everywhere)).backward()  # gradients are averaged over processes, whatever their shares
        torch.nn.utils.clip_grad_norm_(fit.model.parameters(), CLIP_NORM)
        optimizer.step()
        if average:
            average.update(fit.model, update)
        losses += [loss.item()] if share else []
        seen += everywhere
        bar.note(f"loss {np.mean(losses[-20:]):.3f}")
    return _gathered_line(fit, step, epoch, losses, seen, time.monotonic() - started) | {"lr": optimizer.param_groups[0]["lr"]}


def _batches(fit: TrainingState, epoch: int, seed: int, first: int) -> DataLoader:
    """This process's shares of an epoch's batches, from the batch ``first`` on."""
    order = epoch_order(fit.train["label"].to_numpy(int), seed, epoch, *drawing_strata(fit.train, fit.task, fit.params))
    draws = numbered_draws(order)
    batches = [draws[start : start + fit.params.batch_size] for start in range(0, len(draws), fit.params.batch_size)]
    mine = [batch[rank() :: world()] for batch in batches[first:]]
    return fit.batches.epoch(seed, mine)


def _check_finite(fit: TrainingState, loss: torch.Tensor, batch: dict[str, Any], where: str) -> None:
    if not torch.isfinite(loss):
        files = "\n  ".join(fit.train["path"][index] for index in batch["index"])
        raise FloatingPointError(f"the loss is {loss.item()} in {where}; lower the rate, or look at\n  {files}")


def _gathered_line(fit: TrainingState, step: str, epoch: int, losses: list[float], seen: int, seconds: float) -> dict[str, Any]:
    """An epoch's line in ``metrics.jsonl``, of all processes; their unreadable images are put together too."""
    losses = [value for part in all_gather(losses) for value in part]
    fit.errors = {path: reason for part in all_gather(fit.errors) for path, reason in part.items()}
    if not losses:
        raise ImageError(
            f"none of the {len(fit.train)} training images could be read; the first: {next(iter(fit.errors.values()))}"
        )
    line = {"task": fit.task, "step": step, "epoch": epoch + 1, "train_loss": float(np.mean(losses))}
    return line | {"images_per_second": round(seen / seconds, 1), "seconds": round(seconds, 1)}


def _so_far(fit: TrainingState, losses: list[float], seen: int, seconds: float) -> dict[str, Any]:
    """What all processes need to go on within an epoch; the first one's file holds it for all of them."""
    fit.errors = {path: reason for part in all_gather(fit.errors) for path, reason in part.items()}
    facts = {"losses": all_gather(losses), "random": all_gather(_random_state(fit.machine.device))}
    return facts | {"seen": seen, "seconds": seconds}


def _losses_of(part: dict[str, Any]) -> list[float]:
    """This process's losses; of another number of processes the first one gets all."""
    if len(part["losses"]) == world():
        return list(part["losses"][rank()])
    return [loss for losses in part["losses"] for loss in losses] if is_main() else []


def _random_state(device: torch.device) -> list[Any]:
    """The states of torch's generators in this process, in types that a checkpoint may hold."""
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]


def _set_random_state(states: list[list[Any]], device: torch.device) -> None:
    """Set this process's generators from those of all; a process that there was not keeps its own."""
    if rank() >= len(states):
        return
    cpu, cuda, *_ = states[rank()]  # earlier versions kept NumPy's too
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def dummy_batch(fit: TrainingState) -> dict[str, Any]:
    """A batch of one black image, for a process whose share of a batch is empty: its loss counts nothing."""
    side = fit.params.crop_size
    batch = {"index": [], "image": torch.zeros(1, 3, side, side, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.long)}
    return batch | {"mask": torch.zeros(1, 1, side, side, dtype=torch.bool)}


def batch_loss(fit: TrainingState, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy, and for Task B + ``mask_weight`` x mask loss."""
    images, labels = fit.machine.to_device(batch["image"]), batch["label"].to(fit.machine.device)
    with fit.machine.autocast():
        output = fit.trained(images)
    loss = F.cross_entropy(output.logits.float(), labels)
    if output.mask_logits is not None:
        masks = batch["mask"].to(fit.machine.device, non_blocking=True)
        of_masks = mask_loss(output.mask_logits.float(), masks, fit.params.authentic_weight)
        loss = loss + fit.params.mask_weight * of_masks
    return loss


def validate(fit: TrainingState, model: CombinedModel) -> dict[str, float]:
    """An epoch's validation: ``score`` selects the best one (AUC; for Task B the mean of AUC and best mean IoU).

    Scores are of the images that decide, see ``manifest.deciding``; ``val_auc_others`` is of the others, where they have both
    classes.
    """
    result = predict_labelled(model, fit.task, fit.val, fit.params, fit.machine)
    good, labels = result.good(), fit.val["label"].to_numpy(int)
    if len(set(labels[good])) < 2:
        reasons = "; ".join(list(result.errors.values())[:3])
        raise ImageError(f"validation needs readable images of both classes; {len(result.errors)} could not be read: {reasons}")
    decides = np.zeros(len(good), bool)
    decides[good] = deciding(fit.run, fit.task, fit.val[good], fit.train)[0]
    auc, others = (roc_auc(labels[chosen], result.probs[chosen]) for chosen in (decides, good & ~decides))
    values = {"val_auc": auc, "score": auc} | ({"val_auc_others": others} if np.isfinite(others) else {})
    if result.histograms is not None:
        manipulated = result.histograms[decides & (labels == 1)]
        values["val_iou"] = float(pixel_curves(manipulated)[0].mean(0)[1:].max())
        values["score"] = (values["val_auc"] + values["val_iou"]) / 2
    return values
