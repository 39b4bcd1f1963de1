"""From a trained model to what is reported and submitted: validation scores, thresholds, test predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.duplicates import overlapping
from forensics_lib.files import read_json, update_json, write_csv
from forensics_lib.images import ImageError, read_header, read_image
from forensics_lib.inference import (
    FALLBACK_PROB,
    load_mask,
    predict_mask,
    predict_masks,
    predict_probabilities,
    save_mask,
)
from forensics_lib.layouts import LayoutError
from forensics_lib.machine import choose_machine
from forensics_lib.manifest import build_test_manifest, problems, usable
from forensics_lib.metrics import (
    best_f1_threshold,
    best_iou_threshold,
    bootstrap_interval,
    crossfit_f1,
    f1_score,
    image_metrics,
    localization_metrics,
    pixel_table,
    round_probs,
)
from forensics_lib.model import add_to_checkpoint, load_model
from forensics_lib.runs import Run
from forensics_lib.training import Predictions, predict, truth_mask

KEPT_COLUMNS = ["label", "split", "source", "method", "kind", "group", "path", "mask_path"]


@dataclass
class Evaluation:
    """Predictions on labelled images, the thresholds in force, and the scores."""

    table: pd.DataFrame  # one row per image: image_id, prob, KEPT_COLUMNS, and pixel scores for Task B
    thresholds: dict[str, float]
    metrics: dict[str, float]
    errors: list[str]
    without_overlap: dict[str, float] | None = None  # the scores without photographs that stand elsewhere in the data too

    def summary(self) -> pd.DataFrame:
        """The scores as a table, with those without overlapping photographs beside them where there are any."""
        columns = {"all images": self.metrics}
        if self.without_overlap is not None:
            columns["without overlap"] = self.without_overlap
        return pd.DataFrame(columns).reindex(list(self.metrics)).rename_axis("metric").round(3)

    def by(self, *columns: str) -> pd.DataFrame:
        """Scores of each group of images: how many, the share called positive, and for Task B the mean IoU."""
        called = self.table.assign(called_positive=self.table["prob"] >= self.thresholds["threshold"])
        called[list(columns)] = called[list(columns)].fillna("-")
        wanted = {"images": ("prob", "size"), "mean_prob": ("prob", "mean"), "called_positive": ("called_positive", "mean")}
        if "iou" in called:
            called["iou"] = called["iou"].where(called["label"] == 1)
            wanted |= {"mean_iou": ("iou", "mean"), "flagged_pixels": ("flagged", "mean")}
        return called.groupby([*columns, "label"]).agg(**wanted).reset_index().round(3)


def evaluate(run: Run, task: str, manifest: pd.DataFrame) -> Evaluation:
    """Score the fine-tuned model on the whole validation set and choose the thresholds there.

    Writes ``_val_probs.csv`` and ``thresholds.json``, and puts the thresholds into the checkpoint.
    """
    rows = usable(manifest, "val")
    result, table, errors = _predict_rows(run, task, rows)
    labels, probs = table["label"].to_numpy(int), table["prob"].to_numpy()
    threshold = best_f1_threshold(labels, probs)
    thresholds = {"threshold": threshold}
    if task == "B":
        thresholds["loc_threshold"] = best_iou_threshold(result.histograms[result.good()])
    evaluation = Evaluation(table, thresholds, _scores(task, table, result, thresholds), errors)
    low, high = bootstrap_interval(lambda y, p: f1_score(y, p >= threshold), labels, probs)
    evaluation.metrics |= {"f1_low": low, "f1_high": high, "f1_crossfit": crossfit_f1(labels, probs)}
    evaluation.metrics |= {"f1_at_half": f1_score(labels, probs >= 0.5)}
    evaluation.without_overlap = _without_overlap(task, manifest, table, result, thresholds)
    _store(run, task, evaluation, problems(manifest))
    return evaluation


def _without_overlap(
    task: str, manifest: pd.DataFrame, table: pd.DataFrame, result: Predictions, thresholds: dict[str, float]
) -> dict[str, float] | None:
    """The scores on photographs that stand in no other split or data set; None where that is all of them, or too few.

    Of the Task B validation set 865 COCO photographs are TGIF's as well.
    """
    elsewhere = table["path"].isin(manifest.loc[overlapping(manifest), "path"]).to_numpy()
    alone = table[~elsewhere]
    if not elsewhere.any() or alone["label"].nunique() < 2:
        return None
    scores = image_metrics(alone["label"].to_numpy(int), alone["prob"].to_numpy(), thresholds["threshold"])
    if task == "B":
        scores |= localization_metrics(result.histograms[result.good()][~elsewhere], thresholds["loc_threshold"])
    return scores | {"images": len(alone)}


def evaluate_held_out(run: Run, task: str, manifest: pd.DataFrame) -> Evaluation | None:
    """Score labelled images that nothing was chosen on (TGIF's testing split) at the stored thresholds; None without any."""
    rows = usable(manifest, "test")
    if rows.empty:
        return None
    thresholds = stored_thresholds(run, task)
    result, table, errors = _predict_rows(run, task, rows)
    evaluation = Evaluation(table, thresholds, _scores(task, table, result, thresholds), errors)
    run.record(**{f"task{task}_held_out": evaluation.metrics})
    return evaluation


def _predict_rows(run: Run, task: str, rows: pd.DataFrame) -> tuple[Predictions, pd.DataFrame, list[str]]:
    model, _ = load_model(run.finetuned_model(task), task)
    result = predict(model, task, rows, run.params, choose_machine(run.params))
    good = result.good()
    table = rows.loc[good, KEPT_COLUMNS].reset_index(drop=True)
    table.insert(0, "image_id", [Path(path).name for path in table["path"]])
    table.insert(1, "prob", round_probs(result.probs[good]))
    return result, table, list(result.errors.values())


def _scores(task: str, table: pd.DataFrame, result: Predictions, thresholds: dict[str, float]) -> dict[str, float]:
    """Image-level metrics, and for Task B the pixel-level ones, whose per-image values are added to ``table``."""
    scores = image_metrics(table["label"].to_numpy(int), table["prob"].to_numpy(), thresholds["threshold"])
    if task == "B":
        histograms = result.histograms[result.good()]
        pixels = pixel_table(histograms, thresholds["loc_threshold"])
        for column in ("iou", "pixel_f1", "flagged"):
            table[column] = pixels[column]
        scores |= localization_metrics(histograms, thresholds["loc_threshold"])
    return scores


def _store(run: Run, task: str, evaluation: Evaluation, excluded: pd.DataFrame) -> None:
    write_csv(run.val_probs(task), evaluation.table)
    facts: dict[str, Any] = dict(evaluation.thresholds)
    facts |= {"rule": "best F1 on validation", "f1": evaluation.metrics["f1"], "images": len(evaluation.table)}
    facts |= {"f1_interval": [evaluation.metrics["f1_low"], evaluation.metrics["f1_high"]]}
    if task == "B":
        facts["loc_rule"] = "best mean IoU over manipulated validation images"
    update_json(run.thresholds, **{task: facts})
    add_to_checkpoint(run.finetuned_model(task), thresholds=evaluation.thresholds)
    unreadable = excluded["path"].tolist() + evaluation.errors
    facts = {"validation": evaluation.metrics, "validation_without_overlap": evaluation.without_overlap, "left_out": unreadable}
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})


def stored_thresholds(run: Run, task: str) -> dict[str, float]:
    """The thresholds chosen on validation.  Raises ``FileNotFoundError`` where none were stored."""
    facts = read_json(run.thresholds).get(task)
    if not facts:
        raise FileNotFoundError(f"no Task {task} threshold in {run.thresholds}; run the training notebook of this run first")
    return {key: facts[key] for key in ("threshold", "loc_threshold") if key in facts}


# ---- Test images -----------------------------------------------------------------------------------------------------


def infer(run: Run, task: str) -> pd.DataFrame:
    """Predict every image of the test folder; writes ``_test_probs.csv``, and for Task B the masks.

    An image that cannot be read gets ``FALLBACK_PROB`` and, for Task B, an all-zero mask (of its declared size where its
    header can be read, else 1 x 1): no test image may be missing from a submission.  Returns image_id, prob and error.
    """
    rows = build_test_manifest(run, task)
    run.test_probs(task).unlink(missing_ok=True)  # until this inference is complete there is no result
    model, _ = load_model(run.finetuned_model(task), task)
    machine = choose_machine(run.params)
    print(f"Task {task}: {len(rows)} test images on {machine}")
    if task == "A":
        table = predict_probabilities(model, rows, run.params, machine)
    else:
        table = pd.DataFrame(_infer_masks(run, rows, predict_masks(model, rows, run.params, machine)))
    failed = table["error"].notna()
    table["prob"] = table["prob"].where(~failed, FALLBACK_PROB)
    if failed.any():
        print(f"{failed.sum()} test image(s) could not be read and get probability {FALLBACK_PROB}:")
        print("\n".join(f"  {reason}" for reason in table.loc[failed, "error"].head(10)))
    run.record(**{f"task{task}_unreadable_test": [Path(p).name for p in rows.loc[failed.to_numpy(), "path"]]})
    written = pd.DataFrame({"image_id": [Path(path).name for path in rows["path"]], "prob": round_probs(table["prob"])})
    write_csv(run.test_probs(task), written)
    return written.assign(error=table["error"].to_numpy(), path=rows["path"])


def _infer_masks(run: Run, rows: pd.DataFrame, predictions: Any) -> list[dict[str, Any]]:
    names = mask_names(rows["path"])
    for old in run.masks.glob("*.npz"):
        old.unlink()
    results = []
    for prediction in predictions:
        path = Path(rows["path"].iloc[prediction.index])
        mask = np.zeros(_declared_size(path), np.float16) if prediction.mask is None else prediction.mask
        save_mask(run.masks / names[path.name], mask)
        results.append({"prob": prediction.prob, "error": prediction.error})
    return results


def _declared_size(path: Path) -> tuple[int, int]:
    try:
        header = read_header(path)
        return header.height, header.width
    except ImageError:
        return 1, 1


def mask_statistics(run: Run, results: pd.DataFrame) -> str:
    """What the written masks are, in words: nbval compares text, not pictures."""
    masks = [(path, load_mask(run.masks / f"{Path(path).stem}.npz")) for path in results.loc[results["error"].isna(), "path"]]
    own_size = sum(mask.shape == (header.height, header.width) for path, mask in masks for header in [read_header(Path(path))])
    in_range = sum(bool((mask >= 0).all() and (mask <= 1).all()) for _, mask in masks)
    kinds = ", ".join(sorted({str(mask.dtype) for _, mask in masks}))
    return f"{len(masks)} masks, {kinds}; {own_size} of their image's own size, {in_range} with all values in [0, 1]"


def mask_names(paths: pd.Series | list[str]) -> dict[str, str]:
    """Image name to mask name, ``<stem>.npz``.  Raises ``LayoutError`` where two images would share one."""
    names: dict[str, str] = {}
    owner: dict[str, str] = {}
    for path in map(Path, paths):
        mask = f"{path.stem}.npz"
        if mask in owner:
            raise LayoutError(f"{owner[mask]} and {path.name} would both get the mask {mask}; rename one of them")
        owner[mask] = path.name
        names[path.name] = mask
    return names


# ---- Examples --------------------------------------------------------------------------------------------------------


@dataclass
class MaskExample:
    """One image with its prediction, and its truth where that is known."""

    title: str
    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) in [0, 1]
    truth: np.ndarray | None  # (H, W) bool


def mask_examples(run: Run, evaluation: Evaluation, count: int = 6) -> list[MaskExample]:
    """Manipulated images of an evaluation from the best mask to the worst, predicted again for their pictures."""
    ranked = evaluation.table[evaluation.table["label"] == 1].sort_values("iou", ascending=False, kind="stable")
    chosen = ranked.iloc[np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))]
    machine = choose_machine(run.params)
    model = load_model(run.finetuned_model("B"), "B")[0].to(machine.device)
    examples = []
    for _, row in chosen.iterrows():
        image = read_image(Path(row["path"]))
        prob, mask = predict_mask(model, image, run.params, machine)
        truth = truth_mask(row, image.shape[:2])
        title = f"{row['source']} {row['method']} ({row['kind']})\nIoU {row['iou']:.2f}, prob {prob:.2f}"
        examples.append(MaskExample(title, image, mask, truth))
    return examples
