"""Probabilities that mean what they say: temperature scaling, and how far off they are before and after.

A calibrated probability holds for the mixture of classes that it was fitted on: with another share of synthetic images
the log-odds shift by ``log(share / (1 - share))`` less that of the fitted share.  The order of images never changes, so
AUC and the best F1 stay as they are.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

BINS = 15
_EDGE = 1e-12  # probabilities are kept this far from 0 and 1, so that their log-odds are finite
LIMITS = (0.1, 10.0)  # of temperatures: where classes are all but separated, a lower one would claim certainty


def at_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities ``(N,)`` with their log-odds divided by ``temperature``; NaN stays NaN."""
    return expit(logit(np.clip(probs, _EDGE, 1 - _EDGE)) / temperature)


def fit_temperature(labels: np.ndarray, probs: np.ndarray) -> float:
    """The temperature with the least cross-entropy (Guo et al., ICML 2017); 1.0 where one class is missing."""
    labels, odds = np.asarray(labels, float), logit(np.clip(probs, _EDGE, 1 - _EDGE))
    if len(set(labels.tolist())) < 2:
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = odds / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, scaled) - labels * scaled))

    return round(float(np.exp(minimize_scalar(loss, bounds=np.log(LIMITS), method="bounded").x)), 4)


def reliability(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Per bin of equal width that holds images: mean probability, share of positives, images; ``(B, 3)``."""
    labels, probs = np.asarray(labels, float), np.asarray(probs, float)
    bins = np.minimum((probs * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    used = count > 0
    sums = [np.bincount(bins, values, BINS)[used] / count[used] for values in (probs, labels)]
    return np.column_stack([*sums, count[used]])


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray) -> float:
    """ECE over 15 bins of equal width (Naeini et al., AAAI 2015): 0 where probabilities mean what they say."""
    table = reliability(labels, probs)
    return float(np.average(np.abs(table[:, 0] - table[:, 1]), weights=table[:, 2]))
