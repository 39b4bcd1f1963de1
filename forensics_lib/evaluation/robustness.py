"""Robustness of a detector to common changes: recompression, scaling, blur, noise, an upload."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.device import Machine
from forensics_lib.evaluation.metrics import image_metrics, localization_metrics
from forensics_lib.evaluation.predictions import Predictions, predict_labelled
from forensics_lib.images.degradations import add_noise, blur, recompress, resize, upload
from forensics_lib.images.io import ImageError
from forensics_lib.inference.detectors import Detector
from forensics_lib.inference.probabilities import calibrated, round_probs
from forensics_lib.params import Params
from forensics_lib.run import Thresholds

UPLOAD_QUALITY = 75
# Operations, each with its strengths from weak to strong
SWEEP: dict[str, tuple[float, ...]] = {
    "JPEG quality": (95, 85, 75, 65, 50, 40),
    "WebP quality": (90, 75, 60, 45),
    "enlarged": (1.5, 2.0),
    "shrunk": (0.75, 0.5, 0.25),
    "blur, sigma": (0.5, 1.0, 2.0),
    "noise, sigma": (2, 5, 10),
    "upload, scale": (0.9, 0.7, 0.5),
}


@dataclass(frozen=True)
class Change:
    """One of ``SWEEP``'s operations at one strength, deterministic."""

    name: str
    strength: float

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 to the same, perhaps of another size.

        Raises ``ImageError`` where this image does not allow it: WebP takes at most 16,383 pixels a side, JPEG 65,500.
        """
        try:
            return self._done(image)
        except (OSError, ValueError, OverflowError, SystemError, MemoryError) as error:  # as Pillow's encoders fail
            size = f"{image.shape[1]} x {image.shape[0]} pixels"
            cause = str(error) or type(error).__name__
            raise ImageError(f"{self.name} {self.strength:g} cannot be done to {size}: {cause}") from None

    def _done(self, image: np.ndarray) -> np.ndarray:
        if self.name in ("JPEG quality", "WebP quality"):
            return recompress(image, self.name.split()[0].upper(), int(self.strength))
        if self.name in ("enlarged", "shrunk"):
            return resize(image, None, self.strength, Image.Resampling.BICUBIC)[0]
        if self.name == "blur, sigma":
            return blur(image, self.strength)
        if self.name == "noise, sigma":
            return add_noise(image, self.strength, np.random.default_rng(0))
        return upload(image, None, self.strength, UPLOAD_QUALITY)[0]


def robustness(
    model: Detector,
    task: str,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    thresholds: Thresholds,
    sweep: dict[str, tuple[float, ...]] | None = None,
) -> pd.DataFrame:
    """Scores at the stored ``thresholds`` after each change; the first row is of unchanged images.

    A row leaves out the images that its change fails on, which are printed; without any image its scores are NaN.  Columns:
    change, strength, auc, f1, fpr, for Task B iou and submitted_iou (means over manipulated images; see
    ``metrics.localization_metrics``) and submitted_flagged_authentic, images (how many were scored).
    """
    steps: list[Change | None] = [None]
    steps += [Change(name, strength) for name, strengths in (sweep or SWEEP).items() for strength in strengths]
    lines = []
    for number, step in enumerate(steps, start=1):
        name, strength = (step.name, step.strength) if step else ("unchanged", np.nan)
        title = f"robustness {number}/{len(steps)}, {name}" + (f" {strength:g}" if step else "")
        result = predict_labelled(model, task, rows, params, machine, step, title)
        _print_failed(title, rows, result)
        scores = _scores(task, rows, result, thresholds)
        lines.append({"change": name, "strength": strength, **scores, "images": int(result.good().sum())})
    return pd.DataFrame(lines)


def _scores(task: str, rows: pd.DataFrame, result: Predictions, thresholds: Thresholds) -> dict[str, float]:
    good = result.good()
    probs = round_probs(calibrated(result.probs[good], thresholds))
    scores = image_metrics(rows["label"].to_numpy(int)[good], probs, thresholds.threshold)
    scores = {key: scores[key] for key in ("auc", "f1", "fpr")}
    if task == "B":
        histograms, _ = result.pixels()
        pixels = localization_metrics(histograms, thresholds.loc_threshold, probs >= thresholds.threshold)
        scores |= {"iou": pixels["iou_manipulated"], "submitted_iou": pixels["submitted_iou_manipulated"]}
        scores |= {"submitted_flagged_authentic": pixels["submitted_flagged_authentic"]}
    return scores if good.any() else dict.fromkeys(scores, np.nan)


def _print_failed(title: str, rows: pd.DataFrame, result: Predictions) -> None:
    """Print the images that a step could not score, at most three of them."""
    if result.errors:
        paths = [str(rows["path"].iloc[number]) for number in result.errors]
        named = [why if path in why else f"{path}: {why}" for path, why in zip(paths, result.errors.values(), strict=True)]
        print(f"{title}: {len(named)} of {len(rows)} images left out: " + "; ".join(named[:3]))
