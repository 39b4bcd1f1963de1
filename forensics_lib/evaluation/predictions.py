"""Predictions for labelled images: probabilities, and for Task B the agreement of their masks with the true ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.device import Machine
from forensics_lib.evaluation.metrics import THRESHOLD_FREE, binned, threshold_free_scores, value_counts
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import read_mask
from forensics_lib.inference.detectors import Detector, predictions
from forensics_lib.inference.probabilities import check_finite
from forensics_lib.params import Params
from forensics_lib.utils.processes import all_gather, rank, world

Transform = Callable[[np.ndarray], np.ndarray]  # from image to image


@dataclass
class Predictions:
    """Predictions for N labelled rows of a manifest; rows that failed have NaN."""

    probs: np.ndarray  # (N,)
    errors: dict[int, str]
    histograms: np.ndarray | None = None  # (N, 2, 256) pixel counts, Task B
    exact: pd.DataFrame | None = None  # (N) metrics.threshold_free_scores of the masks, Task B

    def good(self) -> np.ndarray:
        """Which rows have a prediction, ``(N,)`` bool."""
        return np.isfinite(self.probs)

    def pixels(self, chosen: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, pd.DataFrame | None]:
        """``histograms`` and ``exact`` of the ``chosen`` ones of the good rows, Task B."""
        if self.histograms is None:
            raise ValueError("no pixels were counted: Task A has no masks")
        good = self.good()
        return self.histograms[good][chosen], None if self.exact is None else self.exact[good][chosen]


def predict_labelled(
    model: Detector,
    task: str,
    rows: pd.DataFrame,
    params: Params,
    machine: Machine,
    change: Transform | None = None,
    title: str | None = None,
) -> Predictions:
    """Predict the labelled ``rows``, and for Task B count their pixels against the truth.

    ``change`` is applied to each image first; where it scales, the true mask is scaled by nearest neighbour.  Several
    processes divide the rows among themselves and each gets the whole result.  Raises ``BrokenModelError`` where the
    prediction for a readable image is not finite.
    """
    mine = np.arange(rank(), len(rows), world())
    of_task = _probabilities if task == "A" else _masks
    parts = all_gather((mine, of_task(model, rows.iloc[mine], params, machine, change, title)))
    probs = np.full(len(rows), np.nan)
    errors: dict[int, str] = {}
    for places, part in parts:
        probs[places] = part.probs
        errors |= {int(places[number]): reason for number, reason in part.errors.items()}
    errors = dict(sorted(errors.items()))
    check_finite(rows["path"], probs, [errors.get(number) for number in range(len(rows))])
    if task == "A":
        return Predictions(probs, errors)
    histograms = np.zeros((len(rows), 2, 256), np.uint32)
    for places, part in parts:
        histograms[places] = part.histograms
    exact = pd.concat([part.exact.set_axis(places) for places, part in parts]).sort_index()
    return Predictions(probs, errors, histograms, exact)


def _probabilities(
    model: Detector, rows: pd.DataFrame, params: Params, machine: Machine, change: Transform | None, title: str | None
) -> Predictions:
    found = list(predictions(model, "A", rows, params, machine, change, title))
    return Predictions(np.array([p.prob for p in found]), {p.index: p.error for p in found if p.error})


def _masks(
    model: Detector, rows: pd.DataFrame, params: Params, machine: Machine, change: Transform | None, title: str | None
) -> Predictions:
    probs, errors = np.full(len(rows), np.nan), {}
    histograms = np.zeros((len(rows), 2, 256), np.uint32)
    exact: dict[int, dict[str, float]] = {}
    for prediction in predictions(model, "B", rows, params, machine, change, title):
        mask, row = prediction.mask, rows.iloc[prediction.index]
        try:
            if mask is None:
                raise ImageError(prediction.error)
            truth = truth_mask(row, mask.shape) if change is None else _scaled(truth_mask(row, _size(row)), mask.shape)
        except ImageError as error:
            errors[prediction.index] = str(error)
            continue
        if np.isfinite(prediction.prob):
            counts = value_counts(mask, truth)
            histograms[prediction.index] = binned(counts)
            exact[prediction.index] = threshold_free_scores(counts)
        probs[prediction.index] = prediction.prob
    table = pd.DataFrame.from_dict(exact, "index", float, THRESHOLD_FREE).reindex(range(len(rows)))
    return Predictions(probs, errors, histograms, table)


def _size(row: pd.Series) -> tuple[int, int]:
    return int(row["height"]), int(row["width"])


def _scaled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def truth_mask(row: pd.Series, size: tuple[int, int]) -> np.ndarray:
    """The true mask ``(H, W)`` bool of a labelled row: empty for an authentic image."""
    return read_mask(Path(row["mask_path"]), size) if row["label"] else np.zeros(size, bool)
