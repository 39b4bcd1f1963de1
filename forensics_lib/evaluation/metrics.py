"""Image-level metrics, and pixel-level metrics from histograms.

Intervals are by bootstrap over photographs, since images made from one photograph are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_curve
from sklearn.model_selection import StratifiedKFold

from forensics_lib.inference.probabilities import round_probs
from forensics_lib.utils.files import DECIMALS
from forensics_lib.utils.progress import progress

BINS = 256  # pixel probabilities are counted in bins of 1/256, exact in float16
VALUES = 15_361  # the float16 numbers from 0 to 1, whose bit patterns are 0, 1, 2, ... in their order
THRESHOLDS = ("threshold", "loc_threshold")
THRESHOLD_FREE = ("pixel_auc", "pixel_ap", "best_pixel_f1")  # scores of an image's pixels that need all VALUES
_BIN_STARTS = (np.arange(BINS) / BINS).astype(np.float16).view(np.uint16)  # where among them each of the bins begins
FLAGGED = 0.01  # an authentic image with a larger share of flagged pixels counts as flagged
FALSE_ALARMS = 0.1  # at most this share of the authentic images that decide is called manipulated


def best_f1_threshold(labels: np.ndarray, probs: np.ndarray) -> float:
    """The threshold with the highest F1, about half-way between two neighbouring probabilities.

    It has two decimals (51) more than written probabilities.  So no written probability of any image equals it, and
    ``prob > threshold`` and ``prob >= threshold`` give the same labels; rounded like a probability it still gives the same
    by ``>=``.

    Args:
        labels: ``(N,)`` of 0 and 1.
        probs: ``(N,)`` in [0, 1].

    Returns:
        The threshold, in (0, 1).

    Raises:
        ValueError: no label is 1.
    """
    labels, probs = np.asarray(labels), round_probs(probs)
    if not labels.any():
        raise ValueError("no positive label: an F1 threshold needs at least one")
    order = np.argsort(-probs, kind="stable")
    ranked = probs[order]
    f1 = 2 * labels[order].cumsum() / (np.arange(1, len(ranked) + 1) + labels.sum())
    f1[:-1][ranked[1:] == ranked[:-1]] = -1  # no threshold separates equal probabilities
    return _threshold_after(ranked, int(f1.argmax()) + 1)


def _threshold_after(ranked: np.ndarray, count: int) -> float:
    """The threshold that calls the first ``count`` of probabilities ``ranked`` from the highest down; as that of best F1."""
    units = [round(prob * 10**DECIMALS) for prob in (1.0, *ranked.tolist(), 0.0)[count : count + 2]]
    return (sum(units) // 2 * 100 + 51) / 10 ** (DECIMALS + 2)


def counts(labels: np.ndarray, predicted: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives."""
    labels, predicted = np.asarray(labels).astype(bool), np.asarray(predicted).astype(bool)
    return (
        int((labels & predicted).sum()),
        int((~labels & predicted).sum()),
        int((labels & ~predicted).sum()),
        int((~labels & ~predicted).sum()),
    )


def f1_score(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of binary predictions; 0 without positive labels and predictions."""
    tp, fp, fn, _ = counts(labels, predicted)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def image_metrics(labels: np.ndarray, probs: np.ndarray, threshold: float) -> dict[str, float]:
    """Image-level metrics.

    Args:
        labels: ``(N,)`` of 0 and 1.
        probs: ``(N,)`` in [0, 1].
        threshold: images with at least this probability are called positive.

    Returns:
        auc, ap, eer and tpr_at_5_fpr; f1, accuracy, balanced_accuracy, precision, recall and fpr at the threshold; threshold.
        NaN where the images of a class that a figure is of are missing.

    Raises:
        ValueError: values outside [0, 1].
    """
    labels, probs = np.asarray(labels), _as_written(probs)
    tp, fp, fn, tn = counts(labels, probs >= threshold)
    recall, specificity = tp / max(tp + fn, 1), tn / max(tn + fp, 1)
    both = 0 < labels.sum() < len(labels)
    return {
        "auc": rank_auc(labels, probs),
        "ap": float(average_precision_score(labels, probs)) if both else math.nan,
        "f1": f1_score(labels, probs >= threshold),
        "accuracy": (tp + tn) / max(len(labels), 1),
        "balanced_accuracy": (recall + specificity) / 2 if both else math.nan,
        "precision": tp / max(tp + fp, 1),
        "recall": recall if tp + fn else math.nan,
        "fpr": 1 - specificity if tn + fp else math.nan,
        "eer": equal_error_rate(labels, probs) if both else math.nan,
        "tpr_at_5_fpr": recall_at_fpr(labels, probs, 0.05) if both else math.nan,
        "threshold": threshold,
    }


def roc_auc(labels: np.ndarray, probs: np.ndarray) -> float:
    """Area under the ROC curve of probabilities, rounded as they are stored; NaN where one class is missing.

    Raises ``ValueError`` for values outside [0, 1], as ``image_metrics`` does.
    """
    return rank_auc(labels, _as_written(probs))


def _as_written(probs: np.ndarray) -> np.ndarray:
    """``round_probs`` of probabilities; other values, which it would clip, are refused."""
    values = np.asarray(probs, np.float64)
    if ((values < 0) | (values > 1)).any():
        found = f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
        raise ValueError(f"found values from {found}: probabilities lie in [0, 1]; are these logits?")
    return round_probs(values)


def rank_auc(labels: np.ndarray, values: np.ndarray) -> float:
    """The share of pairs of a positive and another image in which the positive one has the higher value; ties count half.

    Computed from ranks (Mann and Whitney): bootstraps call it often, and scikit-learn takes many times as long.
    """
    positive = np.asarray(labels).astype(bool)
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return math.nan
    return float((rankdata(values)[positive].sum() - count * (count + 1) / 2) / (count * others))


def equal_error_rate(labels: np.ndarray, probs: np.ndarray) -> float:
    """The rate where false-positive and false-negative rate are equal, interpolated on the ROC curve."""
    fpr, tpr, _ = roc_curve(labels, probs)
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    return float(np.interp(0.0, gap, fpr))


def recall_at_fpr(labels: np.ndarray, probs: np.ndarray, limit: float) -> float:
    """The highest recall at a false-positive rate of at most ``limit``."""
    fpr, tpr, _ = roc_curve(labels, probs, drop_intermediate=False)
    return float(tpr[fpr <= limit].max())


def crossfit_f1(labels: np.ndarray, probs: np.ndarray, folds: int = 5, seed: int = 0) -> float:
    """F1 with each fold's threshold chosen on the other folds, so on images that it was not chosen on."""
    labels, probs = np.asarray(labels), round_probs(probs)
    folds = min(folds, int(np.bincount(labels, minlength=2).min()))
    if folds < 2:
        return math.nan
    predicted = np.zeros(len(labels), bool)
    for rest, fold in StratifiedKFold(folds, shuffle=True, random_state=seed).split(probs, labels):
        predicted[fold] = probs[fold] >= best_f1_threshold(labels[rest], probs[rest])
    return f1_score(labels, predicted)


def bootstrap_interval(
    score: Callable[[np.ndarray, np.ndarray], float],
    labels: np.ndarray,
    probs: np.ndarray,
    rounds: int = 300,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """95% interval of ``score(labels, probs)`` over photographs drawn with replacement, as ``bootstrap_intervals``."""
    return bootstrap_intervals(lambda y, p: {"score": score(y, p)}, labels, probs, rounds, seed, groups)["score"]


def bootstrap_intervals(
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    labels: np.ndarray,
    probs: np.ndarray,
    rounds: int = 300,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95% intervals of several scores from the same resamples; ``probs`` may be of several models, ``(N, M)``.

    ``groups`` (N,) names the photograph of each image: photographs are drawn with replacement, each with all its images.
    Without it every image is its own photograph.
    """
    labels, probs = np.asarray(labels), np.asarray(probs)
    draws = progress(_draws(labels, groups, rounds, seed), "bootstrap", total=rounds)
    return _intervals([scores(labels[drawn], probs[drawn]) for drawn in draws])


def _intervals(rounds: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """The 2.5% and 97.5% quantiles of each score over all rounds without those where it is NaN."""
    ends = pd.DataFrame(rounds).quantile([0.025, 0.975])
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _draws(labels: np.ndarray, groups: np.ndarray | None, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """The positions of the images drawn in each round: whole groups with replacement.

    Groups with authentic images, with positive ones and with both are drawn separately, so that every draw has both classes.
    """
    labels = np.asarray(labels).astype(bool)
    codes = np.arange(len(labels)) if groups is None else pd.factorize(np.asarray(groups))[0]
    if (codes < 0).any():
        raise ValueError(f"{(codes < 0).sum()} of {len(codes)} images have no group: name the photograph of each")
    by_group, sizes = np.argsort(codes, kind="stable"), np.bincount(codes)
    starts = sizes.cumsum() - sizes
    manipulated = np.bincount(codes, labels)
    kinds = (manipulated < sizes) + 2 * (manipulated > 0)
    strata = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        count = sizes[drawn]
        ends = count.cumsum()
        yield by_group[np.arange(ends[-1]) + np.repeat(starts[drawn] - (ends - count), count)]


def value_counts(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixel counts ``(2, 15361)`` by truth (authentic, manipulated) and by the values that float16 has in [0, 1].

    ``mask`` (H, W) in [0, 1], rounded to float16 as in files; ``truth`` (H, W) bool.  Raises ``ValueError`` for values outside
    [0, 1].
    """
    bits = mask.astype(np.float16).view(np.uint16)
    bits[bits == 1 << 15] = 0  # -0.0
    if bits.max() >= VALUES:  # also where negative or not finite
        raise ValueError(f"mask: probabilities from {mask.min()} to {mask.max()}; they must be from 0 to 1")
    manipulated = np.bincount(bits[truth], minlength=VALUES)
    return np.stack([np.bincount(bits.ravel(), minlength=VALUES) - manipulated, manipulated])


def pixel_histogram(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """``value_counts`` in 256 bins of equal width, ``(2, 256)``."""
    return binned(value_counts(mask, truth))


def binned(counts: np.ndarray) -> np.ndarray:
    """``value_counts`` ``(2, 15361)`` summed in 256 bins of equal width, the last with 1.0."""
    return np.add.reduceat(counts, _BIN_STARTS, axis=1)


def threshold_free_scores(counts: np.ndarray) -> dict[str, float]:
    """``THRESHOLD_FREE`` of one image's ``value_counts``; ``best_pixel_f1`` is F1 at the image's own best threshold."""
    values = pixel_auc(counts[None])[0], pixel_ap(counts[None])[0], pixel_curves(counts[None])[1].max()
    return dict(zip(THRESHOLD_FREE, map(float, values), strict=True))


def pixel_curves(histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU, F1 and flagged share ``(N, B)`` of N images' counts ``(N, 2, B)`` at the lower end of each bin.

    The bins of ``pixel_histogram`` start at 0, 1/256, ...  Where neither truth nor prediction marks a pixel, IoU and F1 are 1.
    """
    flagged = histograms[:, :, ::-1].cumsum(2)[:, :, ::-1].astype(float)
    fp, tp = flagged[:, 0], flagged[:, 1]
    positives = histograms[:, 1].sum(1, keepdims=True)
    union, both = positives + fp, positives + fp + tp
    iou = np.divide(tp, union, out=np.ones_like(tp), where=union > 0)
    f1 = np.divide(2 * tp, both, out=np.ones_like(tp), where=both > 0)
    return iou, f1, (fp + tp) / histograms.sum((1, 2))[:, None]


def bin_threshold(number: int) -> float:
    """The threshold just below ``number`` / 256 (1 to 255): no pixel equals it, and it flags those from that bin on.

    It lies between two neighbouring float16 values, so that ``>`` and ``>=`` flag the same pixels.  In float16 it is rounded
    to the lower one, which ``written_mask`` never contains.
    """
    edge = np.float16(number / BINS)
    below = np.nextafter(edge, np.float16(0))
    return float(below) + (float(edge) - float(below)) / 4


def threshold_bin(loc_threshold: float) -> int:
    """The first of the histograms' bins that a localization threshold flags; see ``bin_threshold``."""
    return round(loc_threshold * BINS)


def quiet_thresholds(
    labels: np.ndarray, probs: np.ndarray, histograms: np.ndarray, limit: float = FALSE_ALARMS
) -> tuple[float, float]:
    """The image and the localization threshold of Task B, with few false alarms.

    The localization threshold has the best mean IoU over manipulated images.  The image threshold has the best mean IoU over
    them as submitted, where images below it have empty masks, of those at which at most a share ``limit`` of the authentic
    images is called manipulated.  So false alarms up to the limit are the price of masks that would else be empty: on kinds of
    manipulation that validation lacks probabilities are lower, and a threshold of best F1 would leave most of them out.

    Args:
        labels: ``(N,)`` of 0 and 1.
        probs: ``(N,)`` in [0, 1].
        histograms: ``(N, 2, 256)`` pixel counts, from ``pixel_histogram``.
        limit: the highest share of false alarms, in [0, 1]; 1: any.

    Returns:
        The image threshold, see ``best_f1_threshold``, and the localization threshold, see ``bin_threshold``.

    Raises:
        ValueError: no label is 1.
    """
    ranked, manipulated, iou, column = _ranked(labels, probs, histograms)
    alarms = (~manipulated).cumsum() / max(1, (~manipulated).sum())
    gains = np.append(0, (iou * manipulated).cumsum())  # of calling the first 0, 1, ... images
    gains[1:][alarms > limit] = -np.inf
    return _best_threshold(ranked, gains), bin_threshold(column)


def iou_thresholds(labels: np.ndarray, probs: np.ndarray, histograms: np.ndarray) -> tuple[float, float]:
    """The image and the localization threshold of Task B where IoU alone ranks.

    The localization threshold is that of ``quiet_thresholds``.  The image threshold has the best mean IoU as submitted, over
    all images: masks of images below it are empty, which counts 1 for an authentic image and 0 for a manipulated one.

    Args, returned values and errors are those of ``quiet_thresholds``.
    """
    ranked, manipulated, iou, column = _ranked(labels, probs, histograms)
    gains = np.append(0, (iou - ~manipulated).cumsum())  # of calling the first 0, 1, ... images
    return _best_threshold(ranked, gains), bin_threshold(column)


def _ranked(labels: np.ndarray, probs: np.ndarray, histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """From the highest probability on: probabilities, whether manipulated, IoU from the best bin on; and this bin."""
    probs = round_probs(probs)
    order = np.argsort(-probs, kind="stable")
    manipulated = np.asarray(labels)[order] == 1
    iou, _, _ = pixel_curves(histograms[order])
    column = _best_bin(iou[manipulated])
    return probs[order], manipulated, iou[:, column], column


def _best_threshold(ranked: np.ndarray, gains: np.ndarray) -> float:
    """The best for probabilities ``ranked`` (N,); ``gains`` (N + 1,) are of calling the first 0, 1, ... of them."""
    gains[1:-1][ranked[1:] == ranked[:-1]] = -np.inf  # no threshold separates equal probabilities
    return _threshold_after(ranked, int(gains.argmax()))


def _best_bin(iou: np.ndarray) -> int:
    """The bin from which on flagging gives the best mean IoU; ``iou`` (N, 256) is of manipulated images."""
    if not len(iou):
        raise ValueError("no manipulated image: thresholds need at least one")
    return int(iou.mean(0)[1:].argmax()) + 1


def pixel_auc(histograms: np.ndarray) -> np.ndarray:
    """ROC AUC of the pixels of N images' counts ``(N, 2, B)``; NaN where all pixels are of one class.

    Pixels in one bin count as equal: exact for ``value_counts``.
    """
    authentic, manipulated = histograms[:, 0].astype(float), histograms[:, 1].astype(float)
    below = authentic.cumsum(1) - authentic / 2
    pairs = authentic.sum(1) * manipulated.sum(1)
    return np.divide((manipulated * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def pixel_ap(histograms: np.ndarray) -> np.ndarray:
    """Average precision of the pixels, as ``pixel_auc``; NaN without manipulated pixels."""
    manipulated = histograms[:, 1, ::-1].astype(float)
    found, flagged = manipulated.cumsum(1), histograms[:, :, ::-1].sum(1).cumsum(1).astype(float)
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    total = manipulated.sum(1)
    return np.divide((precision * manipulated).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)


def pixel_table(
    histograms: np.ndarray, loc_threshold: float, called: np.ndarray | None = None, exact: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Scores of each image: IoU, F1 and flagged share at ``loc_threshold`` (see ``bin_threshold``), and ``exact``.

    ``truth`` is the share of manipulated pixels.  ``exact`` (N rows) holds the ``threshold_free_scores``, which need finer
    counts.  ``called`` (N,) bool are the images called manipulated: ``submitted_iou`` and ``submitted_flagged`` are of masks
    that are empty for the others.
    """
    column = threshold_bin(loc_threshold)
    iou, f1, flagged = pixel_curves(histograms)
    facts = {"iou": iou[:, column], "pixel_f1": f1[:, column], "flagged": flagged[:, column]}
    if exact is not None:
        facts |= {name: values.to_numpy() for name, values in exact.items()}
    truth = histograms[:, 1].sum(1) / histograms.sum((1, 2))
    if called is not None:
        facts |= {"submitted_iou": np.where(called, facts["iou"], truth == 0), "submitted_flagged": facts["flagged"] * called}
    return pd.DataFrame(facts | {"truth": truth})


def localization_metrics(
    histograms: np.ndarray, loc_threshold: float, called: np.ndarray | None = None, exact: pd.DataFrame | None = None
) -> dict[str, float]:
    """Pixel-level metrics, means over images.

    Args:
        histograms: ``(N, 2, 256)`` pixel counts of N images, from ``pixel_histogram``.
        loc_threshold: pixels with at least this probability are flagged.
        called: ``(N,)`` bool, the images called manipulated; the masks of the others are submitted empty.
        exact: N rows of ``threshold_free_scores``.

    Returns:
        iou and pixel_f1, and with ``exact`` best_pixel_f1 (at each image's own best threshold, so optimistic), pixel_auc and
        pixel_ap, as ``*_manipulated``: over manipulated images; iou_all: over all images, where an empty mask of an authentic
        one counts 1; flagged_authentic: the share of authentic images with more than 1% flagged pixels; with ``called`` the
        same of the submitted masks as ``submitted_*``; loc_threshold.
    """
    return _localization_means(pixel_table(histograms, loc_threshold, called, exact)) | {"loc_threshold": loc_threshold}


def _localization_means(table: pd.DataFrame) -> dict[str, float]:
    manipulated, authentic = table[table["truth"] > 0], table[table["truth"] == 0]
    scores = ("iou", "pixel_f1", "best_pixel_f1", "pixel_auc", "pixel_ap")
    means = {f"{score}_manipulated": float(manipulated[score].mean()) for score in scores if score in table}
    for kind in ("", "submitted_") if "submitted_iou" in table else ("",):
        flagged = float((authentic[f"{kind}flagged"] > FLAGGED).mean()) if len(authentic) else math.nan
        means |= {f"{kind}iou_manipulated": float(manipulated[f"{kind}iou"].mean())}
        means |= {f"{kind}iou_all": float(table[f"{kind}iou"].mean()), f"{kind}flagged_authentic": flagged}
    return means


def localization_intervals(
    histograms: np.ndarray,
    loc_threshold: float,
    called: np.ndarray | None = None,
    exact: pd.DataFrame | None = None,
    rounds: int = 300,
    seed: int = 0,
    groups: np.ndarray | None = None,
    probs: np.ndarray | None = None,
    choose: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, float]] = quiet_thresholds,
) -> dict[str, tuple[float, float]]:
    """95% intervals of ``localization_metrics``, by bootstrap over photographs as in ``bootstrap_intervals``.

    With the images' ``probs`` ``(N,)`` those of both thresholds too, which ``choose`` finds on each resample.
    """
    table, lines = pixel_table(histograms, loc_threshold, called, exact), []
    manipulated = (table["truth"] > 0).to_numpy()
    for drawn in progress(_draws(manipulated, groups, rounds, seed), "bootstrap of masks", total=rounds):
        lines.append(_localization_means(table.iloc[drawn]))
        if probs is not None:
            lines[-1] |= zip(THRESHOLDS, choose(manipulated[drawn], probs[drawn], histograms[drawn]), strict=True)
    return _intervals(lines)
