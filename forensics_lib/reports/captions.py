"""One sentence on what a figure shows, computed from the numbers behind it.

A function with the name of a figure takes what that takes; ``group_table`` is of ``Evaluation.by``, ``most_wrong`` of its
namesake.  A sentence is empty where the numbers allow none.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from IPython.display import Markdown
from sklearn.metrics import roc_auc_score

from forensics_lib.data.audit import SHORTCUT_LIMIT, Audit, ShortcutAudit
from forensics_lib.data.duplicates import NearDuplicates
from forensics_lib.data.manifest import usable
from forensics_lib.evaluation.calibration import reliability
from forensics_lib.evaluation.evaluate import Evaluation
from forensics_lib.evaluation.metrics import FLAGGED
from forensics_lib.images.spectra import Peak, periodic_peak, radial_profile
from forensics_lib.reports import data_figures
from forensics_lib.reports.figures import CLASS_NAMES, decisions

SPLITS = {"train": "training", "val": "validation", "test": "testing"}
CHANGES = {  # of the robustness sweep, with their strength
    "JPEG quality": "JPEG quality {}",
    "WebP quality": "WebP quality {}",
    "enlarged": "Enlarging by {}",
    "shrunk": "Shrinking to {}",
    "blur, sigma": "Blur of sigma {}",
    "noise, sigma": "Noise of sigma {}",
    "upload, scale": "An upload at scale {}",
}
PERIOD_NAMES = {2: "half", 4: "a quarter", 8: "an eighth"}
FEWEST = 10  # images of a group of which a share says something
LOWEST = 8  # of a spectrum's frequencies to compare: lower ones are blurred by the window, and vary with the pictures
SLIGHT = 0.01  # differences of scores that are not worth a sentence
NEAR = 0.05  # of a threshold


def said(*sentences: str, task: str = "") -> Markdown:
    """Sentences as a notebook shows them, after the name of a task if there is one, without those that are empty."""
    named = f"Task {task}: " if task else ""
    return Markdown("\n\n".join(f"*{named}{sentence}*" for sentence in sentences if sentence))


def balance_bars(manifest: pd.DataFrame, task: str) -> str:
    """How many usable images each class has, and how many sources of training images have one class alone."""
    good = manifest[manifest["error"].isna()]
    if good.empty:
        return ""
    counts, names = pd.crosstab(good["split"], good["label"]).reindex(columns=[0, 1], fill_value=0), CLASS_NAMES[task]
    told = [
        f"{name} {counts[0][split]:,} {names[0]} and {counts[1][split]:,} {names[1]}"
        for split, name in SPLITS.items()
        if split in counts.index
    ]
    train = good[good["split"] == "train"]
    classes = train.groupby("source", observed=True)["label"].nunique()
    single = f"; {(classes == 1).sum()} of {_number(len(classes), 'source')} of training images with one class alone"
    return f"Usable images: {', '.join(told)}{single if (classes == 1).any() else ''}."


def file_distributions(manifest: pd.DataFrame, task: str) -> str:
    """The share of JPEG files where the classes differ in it, else the file fact in which they differ most."""
    good = manifest[manifest["error"].isna()]
    labels, (authentic, positive) = good["label"], CLASS_NAMES[task]
    if not _enough(labels):
        return ""
    facts = data_figures.file_facts(good)
    jpegs = facts["JPEG quality"].notna().groupby(labels).mean()
    if abs(jpegs[1] - jpegs[0]) > 0.1:
        shares = f"{_percent(jpegs[0])} of the {authentic} and {_percent(jpegs[1])} of the {positive} images"
        return f"{shares} are JPEG files: the format alone says much about the class."
    higher = {name: _higher(values[values.notna()], labels[values.notna()]) for name, values in facts.items()}
    name = max(higher, key=lambda fact: abs(higher[fact] - 0.5))
    share, medians = max(higher[name], 1 - higher[name]), facts[name].groupby(labels).median()
    if share <= SHORTCUT_LIMIT:
        most = f"even in {name} only in {_percent(share)} of all pairs of both classes"
        return f"No file fact alone is clearly higher in one class than in the other, {most}."
    return (
        f"Of single facts the classes differ most in {name}, with a median of {medians[0]:.3g} for {authentic} "
        f"and {medians[1]:.3g} for {positive} images: in {_percent(share)} of all pairs of both classes the {positive} image "
        f"has the {'higher' if higher[name] > 0.5 else 'lower'} value."
    )


def _enough(labels: pd.Series) -> bool:
    """Whether there are enough images of both classes to compare them."""
    return bool(labels.value_counts().reindex([0, 1], fill_value=0).min() >= FEWEST)


def _higher(values: pd.Series, labels: pd.Series) -> float:
    """The share of pairs of both classes of which the positive image has the higher value; equal ones count half."""
    return float(roc_auc_score(labels, values)) if _enough(labels) else 0.5


def shortcut_bars(audit: ShortcutAudit, task: str) -> str:
    """How far file facts alone get, by which of them, and what this would do to a model."""
    if np.isnan(audit.auc):
        return "There are too few images to tell what file facts alone say about the class."
    told = f"File facts alone reach AUC {audit.auc:.2f}"
    if not audit.found:
        return f"{told}, not more than the limit of {SHORTCUT_LIMIT:.2f}: they are no shortcut."
    name, alone = audit.facts.index[0], audit.facts.iloc[0]
    mostly = f", mostly by {name} ({alone:.2f} alone)" if alone > SHORTCUT_LIMIT else ", by several together"
    learned = "the codec" if audit.of_codecs else "them"
    return f"{told}{mostly}: a model shown these files as they are could learn {learned} instead of the traces."


def soundness_bars(audit: Audit, manifest: pd.DataFrame, task: str) -> str:
    """What is left out and what stands twice, each by the split that has most of it."""
    shares = data_figures.soundness(audit, manifest) / 100
    found = [
        f"{name}, {_percent(share)} of the {SPLITS.get(split, split)} images"
        for name, split, share in zip(shares, shares.idxmax(), shares.max(), strict=True)
        if share
    ]
    return f"Highest shares: {'; '.join(found)}." if found else "Every image can be used, and none stands twice."


def near_duplicate_pairs(near: NearDuplicates) -> str:
    """How alike the pairs are, and whether they join two splits."""
    if near.pairs.empty:
        return ""
    low, high = near.pairs["distance"].min(), near.pairs["distance"].max()
    bits, across = f"{low}" if low == high else f"{low} to {high}", near.across("split")
    joins = f"{across} of {_number(len(near.pairs), 'pair')}" if across else "no pair"
    kind = f" join{'s' if across <= 1 else ''} two splits{', which can make scores too kind' if across else ''}"
    return f"The hashes of a pair differ in {bits} of 64 bits; {joins}{kind}."


def spectra(manifest: pd.DataFrame, task: str) -> str:
    """The peak that one class has and the other has not, else where the two curves differ most."""
    both = data_figures.class_spectra(manifest)
    gap = (radial_profile(both[1]) - radial_profile(both[0]))[LOWEST:]
    if not _enough(usable(manifest, "train")["label"]) or not np.isfinite(gap).all():
        return ""
    peaks = {label: peak for label in (1, 0) if (peak := periodic_peak(both[label], both[1 - label]))}
    for label, peak in peaks.items():
        return _peak_sentence(peak, CLASS_NAMES[task][label], CLASS_NAMES[task][1 - label])
    widest = int(np.abs(gap).argmax())
    frequency = (widest + LOWEST) / len(both[0])
    apart = f"{abs(gap[widest]):.1f} dB"
    if abs(gap[widest]) < 1:
        return f"Neither class has a peak that the other has not, and the two curves are nowhere more than {apart} apart."
    return (
        f"Neither class has a peak that the other has not; the curves are furthest apart at {frequency:.2f} cycles "
        f"per pixel, where the {CLASS_NAMES[task][1]} images have {apart} {'more' if gap[widest] > 0 else 'less'}."
    )


def _peak_sentence(peak: Peak, name: str, other: str) -> str:
    return (
        f"The spectrum of the {name} images has a peak at {PERIOD_NAMES[peak.period]} of the sampling rate, "
        f"{peak.above_surroundings:.1f} dB above its surroundings and {peak.above_other:.1f} dB above the {other} images: "
        f"something repeats every {peak.period} pixels, as the upsampling of a generator or the blocks of a codec do."
    )


def mask_area_distribution(areas: pd.DataFrame) -> str:
    """How much of their image half and a tenth of the regions cover at most."""
    shares = areas["share"].dropna()
    if shares.empty:
        return ""
    tenth, half, largest = (_percent(shares.quantile(q)) for q in (0.1, 0.5, 1.0))
    if len(shares) < FEWEST:
        return f"The largest of {_number(len(shares), 'manipulated region')} covers {largest} of its image."
    covered = f"Half of the manipulated regions cover less than {half} of their image and a tenth less than {tenth}"
    return f"{covered}; the largest covers {largest}."


def learning_curves(metrics: pd.DataFrame, task: str) -> str:
    """Which epoch is the best one, and what loss and validation score did after it."""
    if metrics.empty or metrics["score"].isna().all():
        return ""
    score, loss, last = metrics["score"].to_numpy(float), metrics["train_loss"].to_numpy(float), len(metrics)
    if last == 1:
        return "There is one epoch alone, which shows no trend."
    best = int(np.nanargmax(score))  # the first of several, as in training
    what = "AUC" if task == "A" else "mean of AUC and IoU"
    told = f"The best epoch is {best + 1} of {last}, with a validation {what} of {score[best]:.3f}"
    if best + 1 == last:
        return f"{told}: it is the last one, so more epochs may still help."
    if loss[-1] >= loss[best]:
        return f"{told}; after it neither the loss falls nor the score rises."
    falls = f"{told}; after it the loss falls from {loss[best]:.2f} to {loss[-1]:.2f}"
    if score[-1] < score[best] - SLIGHT:
        return f"{falls}, but the score falls too, to {score[-1]:.3f}: more epochs would overfit."
    return f"{falls}, but the score no longer rises: more epochs would hardly help."


def score_curves(evaluation: Evaluation, task: str) -> str:
    """What AUC means on these images, and what is found at few false alarms."""
    auc, names = evaluation.metrics["auc"], CLASS_NAMES[task]
    if np.isnan(auc):
        return ""
    if evaluation.judged["prob"].min() == evaluation.judged["prob"].max():
        return "All images have the same probability, so the model tells none from another."
    low, high = evaluation.intervals.get("auc", (np.nan, np.nan))
    if low <= 0.5 <= high:
        return f"AUC {auc:.3f} could be chance: its 95% interval, {low:.3f} to {high:.3f}, holds 0.5."
    return (
        f"In {_percent(auc)} of all pairs of {_article(names[1])} and {_article(names[0])} image the {names[1]} one has the "
        f"higher probability (the AUC); with at most 5% false alarms {_percent(evaluation.metrics['tpr_at_5_fpr'])} of the "
        f"{names[1]} images are found."
    )


def confusion(evaluation: Evaluation, task: str) -> str:
    """Both kinds of errors at the threshold, in shares of their class."""
    tp, fp, fn, tn = decisions(evaluation)
    names, told = CLASS_NAMES[task], []
    if fp + tn:
        told.append(f"calls {_percent(fp / (fp + tn))} of the {names[0]} images {names[1]}")
    if tp + fn:
        told.append(f"misses {_percent(fn / (tp + fn))} of the {names[1]} images")
    return f"At the threshold {evaluation.thresholds.threshold:.2f} the model {_joined(told)}." if told else ""


def reliability_diagram(evaluation: Evaluation, task: str) -> str:
    """The bin that adds most to the calibration error, and this error before and after calibration."""
    found = reliability(evaluation.judged["label"].to_numpy(int), evaluation.judged["prob"].to_numpy())
    if not len(found):
        return ""
    prob, share, images = found[(np.abs(found[:, 0] - found[:, 1]) * found[:, 2]).argmax()]
    before, after = evaluation.metrics["ece_uncalibrated"], evaluation.metrics["ece"]
    return (
        f"Where the model says {prob:.2f}, {share:.2f} of {_number(int(images), 'image')} are {CLASS_NAMES[task][1]}, which is "
        f"the gap that counts most; the calibration error is {after:.3f}, and was {before:.3f} before calibration."
    )


def group_table(table: pd.DataFrame, task: str) -> str:
    """The group of ``Evaluation.by`` with the highest share of errors, for Task B those with the worst and the best masks."""
    keys = list(table.columns[: table.columns.get_loc("label")])
    groups = table[table["images"] >= FEWEST].reset_index(drop=True)
    return _masks_of_groups(groups, keys) if task == "B" else _errors_of_groups(groups, keys, CLASS_NAMES[task])


def _masks_of_groups(groups: pd.DataFrame, keys: list[str]) -> str:
    groups = groups.dropna(subset=["mean_iou"]).sort_values("mean_iou", kind="stable")
    if len(groups) < 2:
        return ""
    worst, best = (f"{_named(group, keys)} (mean IoU {group['mean_iou']:.2f})" for _, group in groups.iloc[[0, -1]].iterrows())
    return f"Masks are worst for {worst} and best for {best}."


def _errors_of_groups(groups: pd.DataFrame, keys: list[str], names: tuple[str, str]) -> str:
    if groups.empty or groups["label"].value_counts().max() < 2:
        return ""
    errors = groups["called_positive"].where(groups["label"] == 0, 1 - groups["called_positive"])
    if errors.max() == 0:
        return f"No {_joined(keys)} with at least {FEWEST} images has an error."
    group, error = groups.loc[errors.idxmax()], _percent(errors.max())
    done = f"misses {error} of them" if group["label"] else f"calls {error} of them {names[1]}"
    of = f"the {group['images']} {names[group['label']]} images of {_named(group, keys)}"
    return f"By {_joined(keys)} the model errs most on {of}: it {done}."


def _named(group: pd.Series, keys: list[str]) -> str:
    """The name of a group, in which a dash stands for what is not known."""
    return " ".join(f"no known {key}" if group[key] == "-" else str(group[key]) for key in keys)


def robustness_curves(table: pd.DataFrame, task: str) -> str:
    """The change that costs most."""
    key, what = ("auc", "AUC") if task == "A" else ("iou", "mean IoU")
    start = table.loc[table["change"] == "unchanged", key].iloc[0]
    changed = table[table["change"] != "unchanged"].dropna(subset=[key])
    if np.isnan(start) or changed.empty:
        return ""
    worst = changed.loc[changed[key].idxmin()]
    if start - worst[key] <= SLIGHT:
        return f"No change costs more than {SLIGHT:g} of the {what}, which is {start:.2f}."
    done = CHANGES[worst["change"]].format(f"{worst['strength']:g}")
    return f"{done} costs most: {what} {start:.2f} to {worst[key]:.2f}."


def most_wrong(evaluation: Evaluation, task: str) -> str:
    """How many images are on the wrong side of the threshold, and the furthest of each class."""
    table, (authentic, positive) = evaluation.table, CLASS_NAMES[task]
    wrong = table[(table["prob"] >= evaluation.thresholds.threshold) != table["label"].astype(bool)]
    if wrong.empty:
        return f"None of {_number(len(table), 'image')} is on the wrong side of the threshold."
    alarms, missed = (wrong.loc[wrong["label"] == label, "prob"] for label in (0, 1))
    told = [f"{len(alarms)} {authentic}, with probabilities up to {alarms.max():.2f}"] if len(alarms) else []
    told += [f"{len(missed)} {positive}, with probabilities down to {missed.min():.2f}"] if len(missed) else []
    of = f"{len(wrong)} of {_number(len(table), 'image')} {_are(len(wrong))}"
    return f"{of} on the wrong side of the threshold: {'; '.join(told)}."


def example_gallery(evaluation: Evaluation, which: str) -> str:
    """What share of all images is like those of a gallery of ``mask_examples``."""
    table, threshold = evaluation.table, evaluation.thresholds.threshold
    iou, flagged = table.loc[table["label"] == 1, "iou"], table.loc[table["label"] == 0, "flagged"]
    if which == "borderline":
        return f"{_near(table['prob'], threshold)}."
    if (flagged if which == "alarms" else iou).empty:
        return ""
    if which == "alarms":
        share, most = _percent((flagged > FLAGGED).mean()), _percent(flagged.max())
        return f"{share} of the authentic images have over {FLAGGED:.0%} of their pixels flagged, at most {most}."
    if which == "best":
        return f"The best mask has IoU {iou.max():.2f}; {_percent((iou >= 0.5).mean())} of the manipulated images reach 0.5."
    return f"The worst mask has IoU {iou.min():.2f}; {_percent((iou < 0.1).mean())} of the manipulated images stay below 0.1."


def _near(probs: pd.Series, threshold: float) -> str:
    near = int(((probs - threshold).abs() <= NEAR).sum())
    of = f"{near} of {_number(len(probs), 'image')} {_are(near)}"
    return f"{of} within {NEAR:g} of the threshold {threshold:.2f}, where a small change turns the label"


def submitted_probabilities(table: pd.DataFrame, task: str) -> str:
    """The share called positive, and how many labels hang on the threshold."""
    if table.empty:
        return ""
    probs = table["prob"]
    if len(probs) > 1 and probs.min() == probs.max():
        same = f"All {len(probs)} test images have the same probability, {probs.iloc[0]:.2f}"
        return f"{same}: the model tells none from another."
    called = f"{_percent(table['label'].mean())} of the test images are called {CLASS_NAMES[task][1]}"
    return f"{called}; {_near(probs, float(table['threshold'].iloc[0]))}."


def _percent(share: float) -> str:
    """A share as text, which is 0% or 100% only where it is exactly that."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.{1 if 0 < share < 0.01 or 0.99 < share < 1 else 0}%}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _joined(parts: list[str]) -> str:
    """Parts of a sentence as a list: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
