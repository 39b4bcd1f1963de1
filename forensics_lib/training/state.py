"""The state of a training: what lives as long as it, what belongs to one step, and what a state file keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from forensics_lib.data.audit import training_crops
from forensics_lib.data.datasets import TrainingBatches
from forensics_lib.device import Machine
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.run import Run

STEPS = ("head", "finetune")
BEGUN = "begun"  # the folder in checkpoints/ of a training that has no epoch yet and will replace another


@dataclass
class TrainingState:
    """What one training needs from its first batch to its last."""

    run: Run
    task: str
    model: CombinedModel
    machine: Machine
    train: pd.DataFrame
    val: pd.DataFrame  # scored after each epoch; the images of it that decide choose the best one
    equalize: bool  # recompress every crop, see degradations.degrade
    donors: pd.DataFrame | None = None  # Task B: synthetic images whose regions are pasted into authentic ones
    errors: dict[str, str] = field(default_factory=dict)  # path to reason, images that failed while training
    trained: nn.Module = field(init=False)  # the model, or its view that is compiled or averages gradients over processes
    stopping: Callable[[], bool] = lambda: False  # whether a stop is requested
    trained_with: dict[str, Any] = field(default_factory=dict)  # parameters and data that the training depends on
    begun: bool = False  # it has no epoch yet, and another training's files are still there
    started: float = 0.0  # on the monotonic clock: when the training would have started without its pauses
    seconds: float = 0.0  # training time when it was last saved, pauses excluded
    machine_then: str = ""  # the machine that it was last saved on

    def __post_init__(self) -> None:
        self.trained = self.model

    @property
    def params(self) -> Params:
        return self.run.params

    @cached_property
    def batches(self) -> TrainingBatches:
        crops = training_crops(self.train, self.task, self.params, equalize=self.equalize, donors=self.donors)
        kind = self.machine.device.type
        return TrainingBatches(crops, self.machine.workers, on_cpu=kind == "cpu", pinned=kind == "cuda")

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


@dataclass
class Step:
    """One of ``STEPS`` while it is trained."""

    name: str
    epochs: int
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    scaler: torch.amp.GradScaler  # of losses, so that fp16 gradients do not vanish; does nothing in other precisions
    average: ModelEmaV3 | None = None  # moving average of the weights, where there is one
    best: float = -1.0  # highest score of an epoch so far


@dataclass
class PartialEpoch:
    """An epoch that was stopped between two batches: what all processes need to go on from there."""

    batches: int  # that are done
    losses: list[list[float]]  # of each process
    random: list[list[Any]]  # states of each process's generators
    seen: int  # images, in all processes
    seconds: float


class Stopped(Exception):
    """An epoch was stopped between two batches."""

    def __init__(self, partial: PartialEpoch) -> None:
        super().__init__()
        self.partial = partial


@dataclass
class SavedState:
    """The content of a training's state file."""

    step: str
    epoch: int  # epochs of the step that are done
    best: float
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    average: dict[str, torch.Tensor] | None
    scaler: dict[str, Any] = field(default_factory=dict)
    partial: PartialEpoch | None = None  # the batches of the next epoch so far
    line: dict[str, Any] | None = None  # or its line in metrics.jsonl, which only lacks the validation
    trained_with: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    machine: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SavedState:
        """The state in a checkpoint's content; earlier versions kept less."""
        part = content.get("part") or {}
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        return cls(**known, line=part.get("line"), partial=PartialEpoch(**part) if "batches" in part else None)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model's weights, by the keys of the checkpoint."""
        part = vars(self.partial) if self.partial else {"line": self.line} if self.line else None
        return {key: value for key, value in vars(self).items() if key not in ("model", "partial", "line")} | {"part": part}
