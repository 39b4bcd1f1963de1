"""Probabilities on their way from a model's logits to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit

EDGE = 1e-12  # probabilities are kept this far from 0 and 1, so that their log-odds are finite


def calibrated(probs: np.ndarray, calibration: Mapping[str, float]) -> np.ndarray:
    """Probabilities ``(N,)`` with their log-odds divided by ``temperature`` and moved by ``intercept``; NaN stays NaN.

    ``calibration`` may hold more, as stored thresholds do; without an intercept, as from runs that fitted none, it is 0.
    """
    odds = logit(np.clip(probs, EDGE, 1 - EDGE))
    return expit(odds / calibration["temperature"] + calibration.get("intercept", 0.0))


DECIMALS = 6  # probabilities are written, and compared, with this many


def round_probs(probs: np.ndarray) -> np.ndarray:
    """Probabilities as they are written to files, so that labels agree with what a reader computes; NaN stays NaN.

    They are kept one unit of the last decimal from 0 and 1, so that a threshold in [0, 1] can lie below all of them.
    """
    return np.clip(np.round(np.asarray(probs, np.float64), DECIMALS), 10.0**-DECIMALS, 1 - 10.0**-DECIMALS)


SHOWN = 5  # images that an error names
FALLBACK_PROB = 0.5  # for a test image that cannot be read: it must be in the submission all the same


class BrokenModelError(RuntimeError):
    """A model's answer to an image that could be read is not a finite number; the message names the images."""


def check_finite(paths: Sequence[str] | pd.Series, probs: Sequence[float] | pd.Series, errors: Sequence | pd.Series) -> None:
    """Raise ``BrokenModelError`` where a probability is not finite though its image has no error (None or missing)."""
    broken = [path for path, prob, error in zip(paths, probs, errors, strict=True) if pd.isna(error) and not np.isfinite(prob)]
    if broken:
        raise BrokenModelError(
            f"the model's answer is not a finite number for {len(broken)} of {len(probs)} images, such as "
            f"{', '.join(broken[:SHOWN])}: its weights are damaged or its activations overflow. Try precision: fp32; else "
            "train again at a lower rate"
        )


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -60, 60)))) if np.isfinite(x) else float("nan")
