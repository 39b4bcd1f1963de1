"""One epoch of a training: optimizer updates and validation; both tasks, one process or several."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from forensics_lib.data.datasets import drawing_strata, epoch_order, numbered_draws
from forensics_lib.data.manifest import deciding
from forensics_lib.device import DeviceMemoryError, memory_of
from forensics_lib.evaluation.metrics import pixel_curves, roc_auc
from forensics_lib.evaluation.predictions import predict_labelled
from forensics_lib.images.io import ImageError
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.training.losses import mask_loss
from forensics_lib.training.state import STEPS, PartialEpoch, Step, Stopped, TrainingState
from forensics_lib.utils.files import is_main
from forensics_lib.utils.processes import all_gather, all_reduce_sum, rank, world
from forensics_lib.utils.progress import progress

CLIP_NORM = 1.0  # gradients are scaled down to this norm


def make_optimizer(model: CombinedModel, rate: float, params: Params) -> torch.optim.Optimizer:
    """AdamW; ``layer_decay`` multiplies the rate of each backbone layer below the last (Bao et al., BEiT, 2022)."""
    if params.layer_decay == 1:
        return torch.optim.AdamW(param_groups_weight_decay(model, params.weight_decay), lr=rate)
    new = [module for name, module in model.named_children() if name != "backbone"]
    groups = [group for module in new for group in param_groups_weight_decay(module, params.weight_decay) if group["params"]]
    layers = param_groups_layer_decay(model.backbone, params.weight_decay, layer_decay=params.layer_decay)
    return torch.optim.AdamW([*groups, *layers], lr=rate)


def make_schedule(optimizer: torch.optim.Optimizer, updates: int, warmup: float) -> CosineLRScheduler:
    """Linear warm-up, then a cosine down to 1% of the peak, both counted in updates."""
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


def train_epoch(state: TrainingState, step: Step, epoch: int, partial: PartialEpoch | None = None) -> dict[str, Any]:
    """One pass over a balanced selection of the training images; returns the epoch's line in ``metrics.jsonl``.

    ``partial`` is what ``Stopped`` held of an earlier attempt.  Raises ``Stopped`` between two batches when a stop is
    requested, ``FloatingPointError`` where the loss is not finite, ``ImageError`` where no image can be read.
    """
    number_of_step = STEPS.index(step.name)
    torch.manual_seed(state.params.seed_for(number_of_step, epoch, rank()))  # dropout and stochastic depth
    state.model.to(memory_format=torch.channels_last).train()
    first, seen = (partial.batches, partial.seen) if partial else (0, 0)
    losses = Losses(state, f"{step.name} epoch {epoch + 1}", _losses_of(partial) if partial else [])
    started = time.monotonic() - (partial.seconds if partial else 0.0)
    batches = _batches(state, epoch, state.params.seed_for(number_of_step, epoch), first)
    bar = progress(batches, f"Task {state.task} {step.name} epoch {epoch + 1}")
    for number, batch in enumerate(bar, start=first):
        if partial and number == first:
            _set_random_state(partial.random, state.machine.device)
        state.errors |= {state.train["path"][index]: reason for index, reason in batch["errors"]}
        share = len(batch["index"])
        everywhere, stops = all_reduce_sum(share, int(state.stopping()))
        if stops:
            raise Stopped(_partial_epoch(state, number, losses.read(), seen, time.monotonic() - started))
        if not everywhere:
            continue
        weight = share * world() / everywhere  # gradients are averaged over processes, whatever their shares
        _learn(state, step, epoch * state.updates + number, batch, weight, losses)
        seen += everywhere
        bar.note(losses.note())
    seconds = time.monotonic() - started
    line = {"task": state.task, "step": step.name, "epoch": epoch + 1, "train_loss": _mean_loss(state, losses.read())}
    line |= {"images_per_second": round(seen / seconds, 1), "seconds": round(seconds, 1)}
    return line | {"lr": step.optimizer.param_groups[0]["lr"]}


class Losses:
    """The losses of an epoch's batches, read from the device and checked every 20 batches on a GPU: each read waits for it."""

    def __init__(self, state: TrainingState, where: str, values: list[float]) -> None:
        self._state, self._where, self._values = state, where, values
        self._every = 20 if state.machine.device.type == "cuda" else 1
        self._unread: list[tuple[torch.Tensor, list[int]]] = []

    def add(self, loss: torch.Tensor, indices: list[int]) -> None:
        """Note the loss of a batch of the training images with these indices; of none, it counts nothing."""
        if indices:
            self._unread.append((loss, indices))
        if len(self._unread) >= self._every:
            self.read()

    def read(self) -> list[float]:
        """All losses so far.  Raises ``FloatingPointError`` with the files of the first batch whose loss is not finite."""
        values = torch.stack([loss for loss, _ in self._unread]).tolist() if self._unread else []
        for (_, indices), value in zip(self._unread, values, strict=True):
            if not np.isfinite(value):
                files = "\n  ".join(self._state.train["path"][index] for index in indices)
                raise FloatingPointError(f"the loss is {value} in {self._where}; lower the rate, or look at\n  {files}")
            self._values.append(value)
        self._unread = []
        return self._values

    def note(self) -> str:
        """The mean of the last losses that were read."""
        return f"loss {np.mean(self._values[-20:]):.3f}" if self._values else ""


def _learn(state: TrainingState, step: Step, update: int, batch: dict[str, Any], weight: float, losses: Losses) -> None:
    """Update ``update`` of a step: learn from a batch whose loss is multiplied by ``weight``, and note it in ``losses``."""
    step.schedule.step_update(update)
    try:
        loss = batch_loss(state, batch if len(batch["index"]) else dummy_batch(state))
        losses.add(loss.detach(), batch["index"])
        step.optimizer.zero_grad(set_to_none=True)
        step.scaler.scale(loss * weight).backward()
        step.scaler.unscale_(step.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP_NORM)
        step.scaler.step(step.optimizer)  # its first one needs memory too
    except torch.OutOfMemoryError:
        size = state.params.batch_size
        raise DeviceMemoryError(
            f"batches of {size} crops of {state.params.crop_size} pixels do not fit into {memory_of(state.machine.device)}: "
            f"set batch_size: {max(1, size // 2)} and halve the rates, or lower crop_size"
        ) from None
    step.scaler.update()
    if step.average:
        step.average.update(state.model, update)


def _batches(state: TrainingState, epoch: int, seed: int, first: int) -> DataLoader:
    """This process's shares of an epoch's batches, from the batch ``first`` on."""
    order = epoch_order(state.train["label"].to_numpy(int), seed, epoch, *drawing_strata(state.train, state.task, state.params))
    draws, size = numbered_draws(order), state.params.batch_size
    batches = [draws[start : start + size] for start in range(first * size, len(draws), size)]
    return state.batches.epoch(seed, [batch[rank() :: world()] for batch in batches])


def _mean_loss(state: TrainingState, losses: list[float]) -> float:
    """The mean loss of all processes' batches; merges the unreadable images of all processes."""
    losses = [loss for part in all_gather(losses) for loss in part]
    _merge_errors(state)
    if not losses:
        raise ImageError(
            f"none of the {len(state.train)} training images could be read; the first: {next(iter(state.errors.values()))}"
        )
    return float(np.mean(losses))


def _merge_errors(state: TrainingState) -> None:
    state.errors = {path: reason for part in all_gather(state.errors) for path, reason in part.items()}


def _partial_epoch(state: TrainingState, batches: int, losses: list[float], seen: int, seconds: float) -> PartialEpoch:
    """What all processes have done of an epoch; the first one's file holds it for all of them."""
    _merge_errors(state)
    device = state.machine.device
    random = [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]
    return PartialEpoch(batches, all_gather(losses), all_gather(random), seen, seconds)


def _losses_of(partial: PartialEpoch) -> list[float]:
    """This process's losses; where the number of processes has changed, the first one gets all."""
    if len(partial.losses) == world():
        return list(partial.losses[rank()])
    return [loss for losses in partial.losses for loss in losses] if is_main() else []


def _set_random_state(states: list[list[Any]], device: torch.device) -> None:
    """Set this process's generators from those of all; an additional process keeps its own."""
    if rank() >= len(states):
        return
    cpu, cuda, *_ = states[rank()]  # earlier versions kept NumPy's too
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def dummy_batch(state: TrainingState) -> dict[str, Any]:
    """A batch of one black image, whose loss has weight 0, for a process whose share of a batch is empty."""
    side = state.params.crop_size
    batch = {"index": [], "image": torch.zeros(1, 3, side, side, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.long)}
    return batch | {"mask": torch.zeros(1, 1, side, side, dtype=torch.bool)}


def some_get_no_gradient(state: TrainingState) -> bool:
    """Whether there are trained parameters that the loss does not depend on, such as a norm that the features do not pass."""
    state.trained = state.model.eval()  # so that nothing is drawn, and no statistics are updated
    batch_loss(state, dummy_batch(state)).backward()
    found = any(parameter.requires_grad and parameter.grad is None for parameter in state.model.parameters())
    state.model.zero_grad(set_to_none=True)
    return found


def batch_loss(state: TrainingState, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy, and for Task B + ``mask_weight`` x mask loss."""
    images = state.machine.to_device(batch["image"])
    labels = batch["label"].to(state.machine.device, non_blocking=True)
    with state.machine.autocast():
        output = state.trained(images)
    loss = F.cross_entropy(output.logits.float(), labels)
    if output.mask_logits is not None:
        masks = batch["mask"].to(state.machine.device, non_blocking=True)
        loss = loss + state.params.mask_weight * mask_loss(output.mask_logits.float(), masks, state.params.authentic_weight)
    return loss


def validate(state: TrainingState, model: CombinedModel) -> dict[str, float]:
    """Validate an epoch: ``score`` selects the best one (AUC; for Task B the mean of AUC and best mean IoU).

    Scores are of the images that decide, see ``manifest.deciding``; ``val_auc_others`` is of the others, where they have
    both classes.
    """
    result = predict_labelled(model, state.task, state.val, state.params, state.machine)
    good, labels = result.good(), state.val["label"].to_numpy(int)
    if len(set(labels[good])) < 2:
        reasons = "; ".join(list(result.errors.values())[:3])
        raise ImageError(f"validation needs readable images of both classes; {len(result.errors)} could not be read: {reasons}")
    decides = np.zeros(len(good), bool)
    decides[good] = deciding(state.run, state.task, state.val[good], state.train)[0]
    auc, others = (roc_auc(labels[chosen], result.probs[chosen]) for chosen in (decides, good & ~decides))
    values = {"val_auc": auc, "score": auc} | ({"val_auc_others": others} if np.isfinite(others) else {})
    if result.histograms is not None:
        manipulated = result.histograms[decides & (labels == 1)]
        values["val_iou"] = float(pixel_curves(manipulated)[0].mean(0)[1:].max())
        values["score"] = (values["val_auc"] + values["val_iou"]) / 2
    return values
