"""Checkpoints: weights with the configuration of their model, read without executing code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from forensics_lib.models.combined import CombinedModel
from forensics_lib.models.lora import merged_state
from forensics_lib.utils.files import atomic_write, locked

CHECKPOINT_FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save_checkpoint(path: Path, model: CombinedModel, *, merged: bool = True, **facts: Any) -> None:
    """Write weights and the model's configuration; ``facts`` (thresholds, metrics) are plain values, no objects.

    Adapters are added to their weights, or with ``merged=False`` kept apart, as a training needs them that goes on.
    """
    weights = merged_state(model) if merged else model.state_dict()
    content = {"format": CHECKPOINT_FORMAT, "config": model.config, "model": weights, **facts}
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def add_to_checkpoint(path: Path, **facts: Any) -> None:
    """Set plain values in an existing checkpoint."""
    with locked(path.parent):
        derive_checkpoint(path, path, **facts)


def derive_checkpoint(source: Path, target: Path, **facts: Any) -> None:
    """Write a checkpoint's content with other plain values to ``target``."""
    content = read_checkpoint(source) | facts
    with atomic_write(target) as temporary:
        torch.save(content, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` file that ``save_checkpoint`` wrote, without executing code in it.

    Returns "format", "config" (arguments of ``CombinedModel``), "model" (state dict on the CPU), and further values such as
    "thresholds" and "inference".  Raises ``FileNotFoundError``, or ``CheckpointError`` if it is damaged or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; run the training notebook of this run first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this version of the project (format {CHECKPOINT_FORMAT} expected): train again"
        )
    return content


def load_model(path: Path, task: str | None = None) -> tuple[CombinedModel, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and the checkpoint's content.

    Raises as ``read_checkpoint`` does, and ``CheckpointError`` if it is of another ``task`` or its weights do not fit.
    """
    content = read_checkpoint(path)
    config = content["config"]
    if task is not None and config["task"] != task:
        raise CheckpointError(f"{path} was trained for Task {config['task']}, not for Task {task}")
    parts = {"frontend": config["frontend"], "residual_branch": config.get("residual_branch", True)}
    if parts["frontend"] not in ("rgb", "srm") or not parts["residual_branch"]:
        raise CheckpointError(f"{path} has parts that version 0.2 removed ({parts}): train again, or use version 0.1 for it")
    model = CombinedModel(**{key: value for key, value in config.items() if key != "residual_branch"})
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        fitted = f"{config['backbone']} of timm {timm.__version__}"
        raise CheckpointError(f"{path}: the weights do not fit {fitted}: {error}") from None
    return model.eval(), content
