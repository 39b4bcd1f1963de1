"""Evaluation of a trained model: calibration, thresholds, and scores with their intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.data.duplicates import overlapping
from forensics_lib.data.manifest import deciding, problems, sampled, usable
from forensics_lib.device import choose_machine
from forensics_lib.evaluation.calibration import expected_calibration_error, fit_calibration
from forensics_lib.evaluation.metrics import (
    FALSE_ALARMS,
    THRESHOLDS,
    best_f1_threshold,
    bootstrap_intervals,
    crossfit_f1,
    f1_score,
    image_metrics,
    iou_thresholds,
    localization_intervals,
    localization_metrics,
    pixel_table,
    quiet_thresholds,
    roc_auc,
)
from forensics_lib.evaluation.predictions import Predictions, predict_labelled
from forensics_lib.evaluation.robustness import robustness
from forensics_lib.inference.detectors import common_rows, load_detector
from forensics_lib.inference.predict import inference_settings
from forensics_lib.inference.probabilities import calibrated, round_probs, warn_of_ties
from forensics_lib.models.checkpoint import add_to_checkpoint
from forensics_lib.run import Calibration, Run, Thresholds, stored_thresholds
from forensics_lib.utils.files import is_main, update_json, write_csv
from forensics_lib.utils.processes import wait_for_all

KEPT_COLUMNS = ["label", "split", "source", "generator", "method", "kind", "format", "group", "path", "mask_path"]
# How much of an image is manipulated: edges of the classes and their names
SIZES = (0, 1e-9, 0.01, 0.05, 0.2, 1.01)
SIZE_NAMES = ("none", "under 1%", "1 to 5%", "5 to 20%", "over 20%")
INTERVALS = ("auc", "ap", "f1", "accuracy", "balanced_accuracy", "precision", "recall", "fpr", "eer", "tpr_at_5_fpr")
PLATFORMS = frozenset(["facebook", "instagram", "linkedin", "pinterest", "reddit", "telegram", "tiktok", "twitter", "x"])
RULES = {
    "A": "best F1 on validation",
    "B": f"best mean IoU, then best as submitted with at most {FALSE_ALARMS:.0%} of authentic images called, on validation",
}
RANKED_BY_IOU = "best mean IoU over manipulated images, then best mean IoU as submitted over all images, on validation"


@dataclass
class Evaluation:
    """Predictions on labelled images, the thresholds in force, and the scores."""

    table: pd.DataFrame  # a row per image: image_id, prob, KEPT_COLUMNS, platform, deciding, and pixel scores for Task B
    thresholds: Thresholds
    metrics: dict[str, float]  # of the images that decide
    errors: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95%, by bootstrap over photographs
    without_overlap: dict[str, float] | None = None  # scores without photographs that also occur elsewhere in the data
    others: dict[str, float] | None = None  # scores of the validation images that do not decide
    other_kinds: dict[str, dict[str, float]] = field(default_factory=dict)  # of manipulated images that do not decide, by kind
    uncalibrated: np.ndarray | None = None  # (N,) probabilities of a validation set before calibration
    chosen_on: dict[str, Any] | None = None  # the rule that selected the images that decide, and their number

    @property
    def judged(self) -> pd.DataFrame:
        """The images that decide, which ``metrics`` are of."""
        return self.table[self.table["deciding"]]

    def summary(self) -> pd.DataFrame:
        """The scores with their intervals, without overlapping photographs, and of the images that do not decide."""
        columns = {"all images" if self.others is None else "deciding images": self.metrics}
        for number, name in enumerate(("95% from", "to")):
            columns[name] = {key: ends[number] for key, ends in self.intervals.items()}
        columns |= {f"{kind} beside": scores for kind, scores in self.other_kinds.items()}
        if self.without_overlap is not None:
            columns["without overlap"] = self.without_overlap
        if self.others is not None:
            columns["other validation images"] = self.others
        return pd.DataFrame(columns).reindex(list(self.metrics)).rename_axis("metric").round(3)

    def threshold_table(self) -> pd.DataFrame:
        """F1 and false-positive rate at the stored threshold, at 0.5, and at the best threshold in hindsight."""
        labels, probs = self.judged["label"].to_numpy(int), self.judged["prob"].to_numpy()
        choices = {"stored": self.thresholds.threshold, "0.5": 0.5, "best in hindsight": best_f1_threshold(labels, probs)}
        lines = {name: image_metrics(labels, probs, value) for name, value in choices.items()}
        return pd.DataFrame(lines).loc[["threshold", "f1", "fpr", "precision", "recall"]].T.round(3)

    def most_wrong(self, count: int = 8) -> pd.DataFrame:
        """The images whose probability is furthest on the wrong side of the threshold, half of each class."""
        away = (self.table["prob"] - self.thresholds.threshold) * (1 - 2 * self.table["label"])
        ranked = self.table.assign(away=away)[away >= 0].sort_values("away", ascending=False, kind="stable")
        return pd.concat([ranked[ranked["label"] == label].head(count // 2) for label in (0, 1)]).drop(columns="away")

    def surest(self, count: int = 8) -> pd.DataFrame:
        """The images whose probability is furthest on the right side of the threshold, half of each class."""
        right = (self.table["prob"] >= self.thresholds.threshold) == (self.table["label"] == 1)
        ranked = self.table[right].sort_values("prob", ascending=False, kind="stable")
        positive, authentic = ranked[ranked["label"] == 1], ranked[ranked["label"] == 0]
        return pd.concat([authentic.tail(count // 2)[::-1], positive.head(count // 2)])

    def typical(self) -> pd.Series:
        """Of the positive images that decide the one with the median probability, for Task B with the median IoU.

        Raises ``ValueError`` where none is positive.
        """
        positive = self.judged[self.judged["label"] == 1]
        if positive.empty:
            raise ValueError("no positive image among those that decide: none of them is typical")
        return positive.sort_values("iou" if "iou" in positive else "prob", kind="stable").iloc[len(positive) // 2]

    def by(self, *columns: str) -> pd.DataFrame:
        """Scores of each group of images: their number, the share called positive, and for Task B the mean IoU.

        ``auc`` is of the group against all images of the other class.
        """
        called = self.table.assign(called_positive=self.table["prob"] >= self.thresholds.threshold)
        called[list(columns)] = called[list(columns)].fillna("-")
        wanted = {"images": ("prob", "size"), "mean_prob": ("prob", "mean"), "called_positive": ("called_positive", "mean")}
        if "iou" in called:
            of_masks = ["iou", "best_pixel_f1", "pixel_auc"]  # of manipulated images
            called[of_masks] = called[of_masks].where(called["label"] == 1)
            wanted |= {"mean_iou": ("iou", "mean"), "best_pixel_f1": ("best_pixel_f1", "mean")}
            wanted |= {"pixel_auc": ("pixel_auc", "mean"), "flagged_pixels": ("flagged", "mean")}
        groups = called.groupby([*columns, "label"])
        aucs = {name: self._auc_against_others(group) for name, group in groups}
        return groups.agg(**wanted).assign(auc=pd.Series(aucs)).reset_index().round(3)

    def _auc_against_others(self, group: pd.DataFrame) -> float:
        others = self.table[self.table["label"] != group["label"].iloc[0]]
        both = pd.concat([group, others])
        return roc_auc(both["label"].to_numpy(int), both["prob"].to_numpy())


def evaluate(run: Run, task: str, manifest: pd.DataFrame) -> Evaluation:
    """Evaluate the fine-tuned model on the whole validation set.

    Calibration and thresholds are chosen on the images that decide (``manifest.deciding``), and the metrics are of them; the
    others are scored beside them.  Writes ``_val_probs.csv`` and ``thresholds.json``, and adds calibration and thresholds to
    the checkpoint.

    Args:
        run: a trained run.
        task: "A" or "B".
        manifest: one row per image, from ``build_manifest``.

    Returns:
        Probabilities, thresholds, and scores with 95% intervals.

    Raises:
        FileNotFoundError: the task is not trained.
        BrokenModelError: predictions are not finite.
    """
    rows = common_rows(run, task, usable(manifest, "val"))
    result, table, errors = _predict_rows(run, task, rows, Calibration())
    table["deciding"], rule = deciding(run, task, rows[result.good()], usable(manifest, "train"))
    decides, raw = table["deciding"].to_numpy(), result.probs[result.good()]
    thresholds = _chosen_thresholds(run, table, raw, result)
    table["prob"] = round_probs(calibrated(raw, thresholds))
    warn_of_ties(raw, table["prob"].to_numpy())
    _add_pixel_scores(task, table, result, thresholds)
    scores = _scores(task, table, result, thresholds, decides) | _calibration_scores(table, raw)
    scores |= {"temperature": thresholds.temperature, "intercept": thresholds.intercept}
    evaluation = Evaluation(table, thresholds, scores, errors, uncalibrated=round_probs(raw))
    positive = int(evaluation.judged["label"].sum())
    evaluation.chosen_on = {"rule": rule, "images": int(decides.sum()), "positive": positive, "others": int((~decides).sum())}
    print(f"calibration and thresholds are chosen on {decides.sum()} of {len(table)} validation images: {rule}")
    if task == "B":
        print(
            f"mean IoU of the masks as submitted: {scores['submitted_iou_manipulated']:.3f} over manipulated images; "
            f"{scores['submitted_iou_all']:.3f} over all images, where an authentic image counts 1 if its mask is empty, else "
            "0 (as TGIF's authors have it)"
        )
    evaluation.intervals = _all_intervals(run, task, evaluation, result)
    evaluation.without_overlap = _without_overlap(task, manifest, table, result, thresholds)
    evaluation.other_kinds = _other_kinds(run, task, table, result, thresholds)
    evaluation.others = _scores(task, table, result, thresholds, ~decides) if not decides.all() else None
    _store(run, task, evaluation, problems(manifest, repeats=False))
    wait_for_all()
    return evaluation


def _ranked_by_iou(run: Run) -> bool:
    """Whether the edition ranks Task B by IoU alone, and not by F1 as well."""
    return run.params.edition >= 2026


def _other_kinds(
    run: Run, task: str, table: pd.DataFrame, result: Predictions, thresholds: Thresholds
) -> dict[str, dict[str, float]]:
    """Scores of Task B's kinds that do not decide, against the authentic images that do."""
    decides, authentic = table["deciding"].to_numpy(), table["label"].eq(0).to_numpy()
    if task == "A" or not set(table.loc[decides & ~authentic, "kind"]) <= set(run.params.kinds):
        return {}
    kinds = [kind for kind in ("fr", "sp") if kind not in run.params.kinds and table["kind"].eq(kind).any()]
    chosen = {kind: decides & authentic | table["kind"].eq(kind).to_numpy() for kind in kinds}
    return {kind: _scores(task, table, result, thresholds, rows) for kind, rows in chosen.items()}


def _chosen_thresholds(run: Run, table: pd.DataFrame, raw: np.ndarray, result: Predictions) -> Thresholds:
    """Calibration and thresholds, chosen on the images that decide; ``raw`` (N,) are probabilities before calibration."""
    decides = table["deciding"].to_numpy()
    labels = table["label"].to_numpy(int)[decides]
    calibration = fit_calibration(labels, raw[decides])
    probs = round_probs(calibrated(raw[decides], calibration))
    if result.histograms is None:
        return Thresholds(threshold=best_f1_threshold(labels, probs), **asdict(calibration))
    histograms = result.pixels(decides)[0]
    chosen = iou_thresholds(labels, probs, histograms) if _ranked_by_iou(run) else _quiet(labels, probs, histograms)
    return Thresholds(**dict(zip(THRESHOLDS, chosen, strict=True)), **asdict(calibration))


def _quiet(labels: np.ndarray, probs: np.ndarray, histograms: np.ndarray) -> tuple[float, float]:
    """``quiet_thresholds``; prints what the limit of false alarms costs."""
    told = []
    for limit in (1.0, FALSE_ALARMS):
        threshold, loc_threshold = quiet_thresholds(labels, probs, histograms, limit)
        found = localization_metrics(histograms, loc_threshold, probs >= threshold)
        told.append(
            f"{(probs[labels == 0] >= threshold).mean():.0%} of authentic images called, mean IoU "
            f"{found['submitted_iou_manipulated']:.3f}, F1 {f1_score(labels, probs >= threshold):.3f}"
        )
    print(f"at most {FALSE_ALARMS:.0%} of authentic images may be called manipulated: {told[1]}; without this rule: {told[0]}")
    return threshold, loc_threshold


def _calibration_scores(table: pd.DataFrame, raw: np.ndarray) -> dict[str, float]:
    """F1 without the stored threshold, and calibration errors before and after calibration, of the images that decide."""
    decides = table["deciding"].to_numpy()
    labels, probs = table["label"].to_numpy(int)[decides], table["prob"].to_numpy()[decides]
    return {
        "f1_crossfit": crossfit_f1(labels, probs),
        "f1_at_half": f1_score(labels, probs >= 0.5),
        "ece_uncalibrated": expected_calibration_error(labels, raw[decides]),
        "ece": expected_calibration_error(labels, probs),
    }


def _all_intervals(run: Run, task: str, evaluation: Evaluation, result: Predictions) -> dict[str, tuple[float, float]]:
    """Intervals of the thresholds, and of the scores of the images that decide."""
    labels, probs = evaluation.judged["label"].to_numpy(int), evaluation.judged["prob"].to_numpy()
    threshold, groups = evaluation.thresholds.threshold, evaluation.judged["group"].to_numpy()
    intervals = _intervals(labels, probs, threshold, groups)
    if task == "A":
        return intervals | bootstrap_intervals(
            lambda y, p: {"threshold": best_f1_threshold(y, p)}, labels, probs, groups=groups
        )
    histograms, exact = result.pixels(evaluation.table["deciding"].to_numpy())
    called, loc_threshold = probs >= threshold, evaluation.thresholds.loc_threshold
    choose = iou_thresholds if _ranked_by_iou(run) else quiet_thresholds
    return intervals | localization_intervals(
        histograms, loc_threshold, called, exact, groups=groups, probs=probs, choose=choose
    )


def _intervals(labels: np.ndarray, probs: np.ndarray, threshold: float, groups: np.ndarray) -> dict[str, tuple[float, float]]:
    def scores(drawn_labels: np.ndarray, drawn_probs: np.ndarray) -> dict[str, float]:
        found = image_metrics(drawn_labels, drawn_probs, threshold)
        return {key: found[key] for key in INTERVALS}

    return bootstrap_intervals(scores, labels, probs, groups=groups)


def _without_overlap(
    task: str, manifest: pd.DataFrame, table: pd.DataFrame, result: Predictions, thresholds: Thresholds
) -> dict[str, float] | None:
    """Scores on photographs that occur in no other split or data set; None where these are all of them, or too few.

    865 COCO photographs of the Task B validation set are TGIF's as well.
    """
    elsewhere = table["path"].isin(manifest.loc[overlapping(manifest), "path"]).to_numpy()
    alone = table["deciding"].to_numpy() & ~elsewhere
    if alone.sum() == table["deciding"].sum() or table.loc[alone, "label"].nunique() < 2:
        return None
    return _scores(task, table, result, thresholds, alone)


def evaluate_held_out(run: Run, task: str, manifest: pd.DataFrame) -> Evaluation | None:
    """Evaluate labelled images that nothing was chosen on (TGIF's testing split) at the stored thresholds.

    Args:
        run: a trained and evaluated run.
        task: "A" or "B".
        manifest: one row per image, from ``build_manifest``.

    Returns:
        Probabilities and scores with 95% intervals; None where the manifest has no such images.

    Raises:
        FileNotFoundError: the task is not trained and evaluated.
        BrokenModelError: predictions are not finite.
    """
    rows = usable(manifest, "test")
    if rows.empty:
        return None
    thresholds = stored_thresholds(run, task)
    result, table, errors = _predict_rows(run, task, rows, thresholds)
    table["deciding"] = True
    _add_pixel_scores(task, table, result, thresholds)
    evaluation = Evaluation(table, thresholds, _scores(task, table, result, thresholds), errors)
    labels, probs = table["label"].to_numpy(int), table["prob"].to_numpy()
    evaluation.intervals = _intervals(labels, probs, thresholds.threshold, table["group"].to_numpy())
    run.record(**{f"task{task}_held_out": evaluation.metrics})
    return evaluation


def _predict_rows(
    run: Run, task: str, rows: pd.DataFrame, calibration: Calibration
) -> tuple[Predictions, pd.DataFrame, list[str]]:
    """The predictions for ``rows``, a table of the readable ones, and the reasons of the others."""
    model = load_detector(run, task)
    result = predict_labelled(model, task, rows, run.params, choose_machine(run.params))
    good = result.good()
    table = rows.loc[good, KEPT_COLUMNS].reset_index(drop=True)
    table.insert(0, "image_id", [Path(path).name for path in table["path"]])
    table.insert(1, "prob", round_probs(calibrated(result.probs[good], calibration)))
    table["platform"] = [_platform(source, name) for source, name in zip(table["source"], table["image_id"], strict=True)]
    return result, table, list(result.errors.values())


def _platform(source: str, name: str) -> str | None:
    """The social platform in an image's source (``itw_sm/facebook``) or file name (``Facebook_real_1042.jpg``)."""
    words = (source.rpartition("/")[2].lower(), name.partition("_")[0].lower())
    return next((word for word in words if word in PLATFORMS), None)


def _add_pixel_scores(task: str, table: pd.DataFrame, result: Predictions, thresholds: Thresholds) -> None:
    """Task B: add the pixel scores of each image to ``table``."""
    if task == "A":
        return
    called = table["prob"].to_numpy() >= thresholds.threshold
    histograms, exact = result.pixels()
    pixels = pixel_table(histograms, thresholds.loc_threshold, called, exact)
    for column in ("iou", "submitted_iou", "pixel_f1", "best_pixel_f1", "pixel_auc", "flagged", "truth"):
        table[column] = pixels[column]
    table["size"] = pd.cut(table["truth"], SIZES, right=False, labels=SIZE_NAMES).astype(str)


def _scores(
    task: str, table: pd.DataFrame, result: Predictions, thresholds: Thresholds, chosen: np.ndarray | slice = slice(None)
) -> dict[str, float]:
    """Image-level metrics, and for Task B the pixel-level ones, of the ``chosen`` (N,) bool rows of ``table``."""
    labels, probs = table["label"].to_numpy(int)[chosen], table["prob"].to_numpy()[chosen]
    scores = image_metrics(labels, probs, thresholds.threshold)
    if task == "B":
        histograms, exact = result.pixels(chosen)
        scores |= localization_metrics(histograms, thresholds.loc_threshold, probs >= thresholds.threshold, exact)
    return scores | {"images": len(labels)}


def _store(run: Run, task: str, evaluation: Evaluation, excluded: pd.DataFrame) -> None:
    """Write probabilities, thresholds and scores to the files of the run."""
    if not is_main():
        return
    write_csv(run.val_probs(task), evaluation.table)
    how = inference_settings(run.params, task)  # thresholds only hold for images that are processed in the same way
    update_json(run.thresholds, **{task: _threshold_facts(run, task, evaluation) | how})
    if run.params.trains:
        add_to_checkpoint(run.finetuned_model(task), thresholds=evaluation.thresholds.facts(), inference=how["inference"])
    facts = {"validation": evaluation.metrics, "validation_intervals": evaluation.intervals}
    facts |= {"validation_without_overlap": evaluation.without_overlap, "validation_others": evaluation.others}
    facts |= {"validation_other_kinds": evaluation.other_kinds or None}
    facts |= {"chosen_on": evaluation.chosen_on, "left_out": excluded["path"].tolist() + evaluation.errors}
    columns = {"source": ["source"], "generator": ["generator"], "platform": ["platform"], "format": ["format"]}
    facts["diagnosis"] = None  # an earlier one was of other results
    if task == "B":
        columns = {"source": ["source"], "method": ["kind", "method"], "size": ["kind", "size"]}
    facts |= {f"by_{name}": evaluation.by(*keys).to_dict("records") for name, keys in columns.items()}
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})


def _threshold_facts(run: Run, task: str, evaluation: Evaluation) -> dict[str, Any]:
    """The thresholds, and how they were chosen."""
    facts: dict[str, Any] = dict(evaluation.thresholds.facts())
    facts |= {
        "rule": RANKED_BY_IOU if task == "B" and _ranked_by_iou(run) else RULES[task],
        "f1": evaluation.metrics["f1"],
        "images": len(evaluation.judged),
    }
    facts |= {"chosen_on": evaluation.chosen_on, "edition": run.params.edition}
    known = ("threshold", "f1") if task == "A" else ("threshold", "f1", "loc_threshold", "iou_manipulated")
    facts |= {f"{key}_interval": list(evaluation.intervals[key]) for key in known}
    return facts


def evaluate_robustness(run: Run, task: str, manifest: pd.DataFrame) -> pd.DataFrame:
    """Scores after common changes (see ``robustness``) at the stored thresholds; also written to ``run.json``.

    Args:
        run: a trained and evaluated run; at most its ``robustness_images`` of the validation images that decide are used,
            the same share of each class and source.
        task: "A" or "B".
        manifest: one row per image, from ``build_manifest``.

    Returns:
        One row per change: change, strength, auc, f1, fpr, for Task B pixel scores, images.

    Raises:
        FileNotFoundError: the task is not trained and evaluated.
        BrokenModelError: predictions are not finite.
    """
    rows = common_rows(run, task, usable(manifest, "val"))
    decides, _ = deciding(run, task, rows, usable(manifest, "train"))
    rows = sampled(rows[decides], run.params.robustness_images, run.params.seed_for())
    model = load_detector(run, task)
    table = robustness(model, task, rows, run.params, choose_machine(run.params), stored_thresholds(run, task))
    run.record(**{f"task{task}_robustness": table.astype(object).where(table.notna(), None).round(4).to_dict("records")})
    return table
