"""A trained checkpoint on any images, in three lines of Python and without a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.calibration import calibrated
from forensics_lib.disk import shown
from forensics_lib.inference import check_finite, predict_masks, predict_probabilities
from forensics_lib.machine import choose_machine
from forensics_lib.metrics import round_probs
from forensics_lib.model import CheckpointError, load_model
from forensics_lib.params import Params


def predict(
    images: str | Path | Iterable[str | Path], checkpoint: str | Path, device: str = "auto"
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """What a model says of images: a table, and for Task B the masks by path.

    ``images`` are files, or a folder whose files are taken by name.  The table has the columns path, prob (calibrated, in
    [0, 1]), label (1 where prob is at least the checkpoint's threshold) and error; an image that cannot be read has NaN
    and the reason.  Masks are float16 ``(H, W)`` in [0, 1] as predicted, whatever the label.  Raises ``CheckpointError``
    for a checkpoint without thresholds, such as that of step 1, and ``BrokenModelError`` where answers are not finite.
    """
    checkpoint, folder = Path(checkpoint), Path(images) if isinstance(images, str | Path) else None
    paths = sorted(p for p in folder.iterdir() if p.is_file()) if folder and folder.is_dir() else [folder] if folder else images
    rows = pd.DataFrame({"path": [shown(path) for path in paths]})
    model, content = load_model(checkpoint)
    if "thresholds" not in content:
        raise CheckpointError(f"{checkpoint} holds no thresholds: take the ..._finetuned_model.pth of an evaluated run")
    task, thresholds = content["config"]["task"], content["thresholds"]
    params = Params(**content["inference"], backbone=content["config"]["backbone"], pretrained=False, device=device)
    machine = choose_machine(params)
    masks: dict[str, np.ndarray] = {}
    answers = []
    for answer in (predict_probabilities if task == "A" else predict_masks)(model, rows, params, machine):
        answers.append((answer.prob, answer.error))
        if task == "B" and answer.mask is not None:
            masks[rows["path"].iloc[answer.index]] = answer.mask
    rows[["prob", "error"]] = pd.DataFrame(answers, columns=["prob", "error"], index=rows.index)
    check_finite(rows["path"], rows["prob"], rows["error"])
    rows["prob"] = round_probs(calibrated(rows["prob"].to_numpy(float), thresholds))
    rows["label"] = (rows["prob"] >= thresholds["threshold"]).astype("Int64").where(rows["prob"].notna())
    return rows[["path", "prob", "label", "error"]], masks
