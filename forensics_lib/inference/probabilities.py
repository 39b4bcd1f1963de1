"""Probabilities between the logits of a model and the files: calibration, rounding, and the check for NaN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from forensics_lib.run import Calibration
from forensics_lib.utils.files import DECIMALS

EDGE = 10.0**-DECIMALS  # probabilities are kept this far from 0 and 1, so that their log-odds are finite


def calibrated(probs: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Apply a calibration: divide log-odds by ``temperature`` and add ``intercept``.

    Args:
        probs: ``(N,)`` probabilities of a model; NaN stays NaN.
        calibration: from ``fit_calibration``, or thresholds, which hold it too.

    Returns:
        ``(N,)`` calibrated probabilities.
    """
    odds = logit(np.clip(probs, EDGE, 1 - EDGE))
    return expit(odds / calibration.temperature + calibration.intercept)


def round_probs(probs: np.ndarray) -> np.ndarray:
    """Round probabilities as files hold them, so that labels agree with what a reader computes; NaN stays NaN.

    They stay one unit of the last decimal away from 0 and 1, so that a threshold in [0, 1] can lie below all of them.
    """
    return np.clip(np.round(np.asarray(probs, np.float64), DECIMALS), EDGE, 1 - EDGE)


def new_ties(probs: np.ndarray, written: np.ndarray) -> int:
    """How many different values of ``probs`` (N,) are no longer different as they are ``written`` (N,); NaN do not count."""
    before, after = (len(np.unique(values[np.isfinite(values)])) for values in (probs, written))
    return max(0, before - after)


def warn_of_ties(probs: np.ndarray, written: np.ndarray) -> None:
    """Print a warning where writing probabilities made some of them equal, so that they have no order among themselves."""
    if ties := new_ties(probs, written):
        print(
            f"WARNING: {ties} of {len(probs)} probabilities equal others since they are written with {DECIMALS} decimals: the "
            "model is so sure of these images that files do not hold their order"
        )


SHOWN = 5  # images that an error names
FALLBACK_PROB = 0.5  # of test images that cannot be read, which the submission must contain too


class BrokenModelError(RuntimeError):
    """The prediction for a readable image is not a finite number; the message names the images."""


def check_finite(paths: Sequence[str] | pd.Series, probs: Sequence[float] | pd.Series, errors: Sequence | pd.Series) -> None:
    """Raise ``BrokenModelError`` where the probability of an image without an error (None or missing) is not finite."""
    broken = [path for path, prob, error in zip(paths, probs, errors, strict=True) if pd.isna(error) and not np.isfinite(prob)]
    if broken:
        raise BrokenModelError(
            f"the model's answer is not a finite number for {len(broken)} of {len(probs)} images, such as "
            f"{', '.join(broken[:SHOWN])}: its weights are damaged or its activations overflow. Try precision: fp32; else "
            "train again at a lower rate"
        )


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -60, 60)))) if np.isfinite(x) else float("nan")
