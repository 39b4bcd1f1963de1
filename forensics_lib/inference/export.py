"""Export of a trained model to ONNX, checked against the library's own answers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit
from torch import nn

from forensics_lib.data.manifest import build_test_manifest
from forensics_lib.device import choose_machine
from forensics_lib.images.crops import centre_crop, chosen_crops, pad_to, whole_crops
from forensics_lib.images.io import read_image
from forensics_lib.inference.predict import predict_mask, predict_probabilities
from forensics_lib.inference.probabilities import EDGE
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.run import Run, recorded_run, require_trained, stored_thresholds, trained_by, trained_tasks
from forensics_lib.utils.files import atomic_write, home, read_json

NEEDED = ("onnx", "onnxscript")
CHECKED = 4  # test images of the check
TOLERANCE = 0.01


class ExportError(RuntimeError):
    """A model cannot be exported, or the file gives other answers than the library; the message says what to do."""


class _Exported(nn.Module):
    """Images ``(N, 3, S, S)`` in [0, 1] to probabilities ``(N,)``, not calibrated, and for Task B masks ``(N, S, S)``."""

    def __init__(self, model: CombinedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(images)
        prob = (output.logits[:, 1] - output.logits[:, 0]).sigmoid()
        return (prob,) if output.mask_logits is None else (prob, output.mask_logits.sigmoid()[:, 0])


def run_to_export(name: str) -> tuple[Run, list[str]]:
    """The run of this name, and its trained tasks.  Raises ``ExportError`` where there is none."""
    record = home() / "outputs" / name / "run.json"
    tasks = trained_tasks(read_json(record))
    if not tasks:
        raise ExportError(f"no trained run {name} (looked at {record})")
    return recorded_run(name, tasks[0]), tasks


def export(run: Run, task: str) -> Path:
    """Write ``outputs/<run>_model.onnx`` (``_taskB_model.onnx``): native crops or tiles in, probability and mask out.

    Input ``images`` (N, 3, S, S) float32 RGB in [0, 1], S = crop_size for Task A, tile_size for Task B; outputs ``prob`` (N,),
    not calibrated, and for Task B ``mask`` (N, S, S).  The file's metadata hold task, side, thresholds and calibration.

    Raises:
        ExportError: packages are missing, the run trains no model of its own, or the file's answers differ from the library's.
        FileNotFoundError: the task is not trained.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ExportError(f"export needs {', '.join(missing)}: pip install {' '.join(NEEDED)} onnxruntime (or '.[onnx]')")
    if not run.params.trains:
        raise ExportError(f"run {run.name} has no model of its own: export the runs that it is made of, or the detector itself")
    require_trained(run, task)
    model, _ = load_model(run.finetuned_model(task), task)
    params = _params(run, task)
    side = params.crop_size if task == "A" else params.tile_size
    facts = {"task": task, "side": side, "run": run.name, **stored_thresholds(run, task).facts()}
    path = run.output(task, "model.onnx")
    with atomic_write(path) as temporary:
        _write(model, side, facts, temporary)
        difference = _difference(run, task, model, params, temporary) if find_spec("onnxruntime") else None
    checked = f"within {difference:.5f} of the library's answers" if difference is not None else ""
    print(f"Task {task}: {path}, {checked or 'not checked, since onnxruntime is not installed'}")
    return path


def _params(run: Run, task: str) -> Params:
    """The parameters that the thresholds were chosen with, for a check in fp32 at one scale."""
    own = run.params.of_prediction(task)
    chosen = {key: value for key, value in trained_by(run, task)["params"].items() if key in own}
    exact = {"device": "cpu", "precision": "fp32", "workers": 0, "mask_scales": [1.0], "mask_flips": False, "copy_move": False}
    return run.params.model_copy(update=chosen | exact)


def _write(model: CombinedModel, side: int, facts: dict[str, Any], path: Path) -> None:
    import onnx

    program = torch.onnx.export(
        _Exported(model).eval(),
        (torch.rand(2, 3, side, side),),
        dynamo=True,
        input_names=["images"],
        output_names=["prob", "mask"][: 1 if model.segmentation is None else 2],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise ExportError("PyTorch exported nothing")
    content = program.model_proto
    for key, value in facts.items():
        content.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(content, str(path))


def _difference(run: Run, task: str, model: CombinedModel, params: Params, path: Path) -> float:
    """The largest difference between the answers for some test images.  Raises ``ExportError`` where it is too large."""
    rows = build_test_manifest(run, task)
    rows = rows[rows["error"].isna()].head(CHECKED).reset_index(drop=True)
    compared = _of_task_a if task == "A" else _of_task_b
    difference = max(compared(rows, model, params, path))
    if not difference <= TOLERANCE:
        raise ExportError(f"the exported file's answers differ from the library's by up to {difference:.3f}: it was not kept")
    return difference


def _of_task_a(rows: pd.DataFrame, model: CombinedModel, params: Params, path: Path) -> list[float]:
    found = predict_probabilities(model, rows, params, choose_machine(params))
    differences = []
    for one, name in zip(found, rows["path"], strict=True):
        image = read_image(name)
        views = [chosen_crops(image, params.crop_size, params.crops_per_image)]
        views += [crops] if model.sees_whole and (crops := whole_crops(image, params.crop_size)) else []
        margins = [logit(np.clip(_run(path, crops)[0].astype(float), EDGE, 1 - EDGE)).mean() for crops in views]
        differences.append(abs(one.prob - float(expit(np.mean(margins)))))
    return differences


def _of_task_b(rows: pd.DataFrame, model: CombinedModel, params: Params, path: Path) -> list[float]:
    side, differences = params.tile_size, []
    for name in rows["path"]:
        tile = pad_to(centre_crop(read_image(name), side), side, side)
        prob, mask = predict_mask(model, tile, params, choose_machine(params))
        probs, masks = _run(path, [tile])
        differences += [abs(prob - float(probs[0])), float(np.abs(masks[0] - mask).max())]
    return differences


def _run(path: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return onnxruntime.InferenceSession(str(path)).run(None, {"images": batch})
