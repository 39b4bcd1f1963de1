"""Probabilities that mean what they say: Platt scaling, and how far off they are before and after.

A calibrated probability holds for the mixture of classes that it was fitted on: with another share of synthetic images
the log-odds shift by ``log(share / (1 - share))`` less that of the fitted share.  Training sees both classes equally
often whatever their share, so it takes an intercept beside the temperature to get from there to the fitted share.  The
order of images never changes, so AUC and the best F1 stay as they are.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from forensics_lib.inference.probabilities import EDGE

BINS = 15
LIMITS = (0.1, 10.0)  # of temperatures
NOT_CALIBRATED = {"temperature": 1.0, "intercept": 0.0}


def fit_calibration(labels: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """``temperature`` and ``intercept`` with the least cross-entropy (Platt, 1999); ``NOT_CALIBRATED`` without both classes.

    As in Platt's paper labels are a little less than certain, the less the more images there are, so that few images and
    classes that are separated claim no certainty.  A weak pull towards 1 keeps the temperature where images tell nothing.
    """
    labels, odds = np.asarray(labels, float), logit(np.clip(probs, EDGE, 1 - EDGE))
    positive, authentic = labels.sum(), (1 - labels).sum()
    if not (positive and authentic):
        return dict(NOT_CALIBRATED)
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
    return {"temperature": temperature, "intercept": round(float(found.x[1] - middle / temperature), 4) + 0.0}


def reliability(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Per bin of equal width that holds images: mean probability, share of positives, images; ``(B, 3)``."""
    labels, probs = np.asarray(labels, float), np.asarray(probs, float)
    bins = np.minimum((probs * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    used = count > 0
    sums = [np.bincount(bins, values, BINS)[used] / count[used] for values in (probs, labels)]
    return np.column_stack([*sums, count[used]])


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray) -> float:
    """ECE over 15 bins of equal width (Naeini et al., AAAI 2015): 0 where probabilities mean what they say; NaN of none."""
    table = reliability(labels, probs)
    if not len(table):
        return float("nan")
    return float(np.average(np.abs(table[:, 0] - table[:, 1]), weights=table[:, 2]))
