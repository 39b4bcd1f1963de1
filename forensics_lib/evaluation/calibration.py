"""Platt scaling, and the calibration error before and after it.

A calibration holds for the class mixture that it was fitted on: with another share of synthetic images the log-odds shift by
``log(share / (1 - share))`` minus that of the fitted share.  Training draws both classes equally often, so an intercept beside
the temperature is needed to get to the fitted share.  The order of images never changes, so AUC and the best F1 stay.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from forensics_lib.inference.probabilities import EDGE
from forensics_lib.run import Calibration

BINS = 15
LIMITS = (0.1, 10.0)  # of temperatures


def fit_calibration(labels: np.ndarray, probs: np.ndarray) -> Calibration:
    """Fit Platt scaling (Platt, 1999) by cross-entropy.

    As in Platt's paper, labels are smoothed, less with more images, so that a few separable images do not give certainty.  A
    weak prior keeps the temperature near 1.

    Args:
        labels: ``(N,)`` of 0 and 1.
        probs: ``(N,)`` probabilities of the model, in [0, 1].

    Returns:
        A temperature in [0.1, 10] and an intercept, for ``calibrated``; those that change nothing without both classes.
    """
    labels, odds = np.asarray(labels, float), logit(np.clip(probs, EDGE, 1 - EDGE))
    positive, authentic = labels.sum(), (1 - labels).sum()
    if not (positive and authentic):
        return Calibration()
    wanted = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (authentic + 2))
    middle = odds.mean()

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = np.exp(-values[0]), values[1]
        scaled = slope * (odds - middle) + shift
        away = (expit(scaled) - wanted) / len(odds)
        slopes = np.array([-slope * (away @ (odds - middle)) + values[0] / len(odds), away.sum()])
        return float(np.mean(np.logaddexp(0, scaled) - wanted * scaled) + values[0] ** 2 / 2 / len(odds)), slopes

    found = minimize(loss, [0.0, 0.0], jac=True, method="L-BFGS-B", bounds=[np.log(LIMITS), (None, None)])
    temperature = round(float(np.exp(found.x[0])), 4)
    return Calibration(temperature=temperature, intercept=round(float(found.x[1] - middle / temperature), 4) + 0.0)


def reliability(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Mean probability, share of positives and images of each of 15 equal bins that holds any; ``(B, 3)``."""
    labels, probs = np.asarray(labels, float), np.asarray(probs, float)
    bins = np.minimum((probs * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    used = count > 0
    sums = [np.bincount(bins, values, BINS)[used] / count[used] for values in (probs, labels)]
    return np.column_stack([*sums, count[used]])


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray) -> float:
    """ECE over 15 bins of equal width (Naeini et al., AAAI 2015); NaN without images."""
    table = reliability(labels, probs)
    if not len(table):
        return float("nan")
    return float(np.average(np.abs(table[:, 0] - table[:, 1]), weights=table[:, 2]))
