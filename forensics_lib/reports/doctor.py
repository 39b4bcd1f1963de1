"""Why is my score what it is?  What a run has stored, checked for what usually goes wrong, and told in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.data.audit import MOST, SHORTCUT_LIMIT
from forensics_lib.data.layouts import mask_names
from forensics_lib.data.manifest import build_manifest, problems
from forensics_lib.data.rows import LayoutError, joined
from forensics_lib.evaluation.metrics import BINS, FALSE_ALARMS, best_f1_threshold, f1_score, roc_auc, threshold_bin
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.predict import inference_settings, other_settings
from forensics_lib.params import settings_text
from forensics_lib.reports.figures import CLASS_NAMES
from forensics_lib.reports.report import chosen_on, facts_of_task
from forensics_lib.run import Run, Thresholds, recorded_run, trained_by, trained_tasks
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import read_json
from forensics_lib.utils.progress import progress

SEVERITIES = ("WRONG", "DOUBTFUL", "TO KNOW")  # of findings, the worst first
WRONG, DOUBTFUL, TO_KNOW = range(3)
CONSTANT = 0.01  # range of all probabilities under which they count as one answer
INVERTED = 0.4  # AUC under which the order of images is inverted and not a matter of chance
MARGIN = 0.01  # by which a score has to be better than that of an answer without a model
EMPTY, FULL = 0.001, 0.95  # shares of flagged pixels under and over which a mask is nearly empty or full
FELL = 0.98  # a loss has fallen if it is under this share of the first one
MASKS_READ = 100  # masks of test images that are looked at
WIDTH = 110  # of the text, characters


@dataclass(frozen=True)
class Finding:
    """Something that explains a score or spoils it."""

    severity: int  # its place in SEVERITIES
    found: str
    why: str
    remedy: str


@dataclass
class Diagnosis:
    """The findings on a task of a run, and what they stand beside."""

    title: str
    findings: list[Finding]  # the worst first
    comparisons: list[str]  # scores beside those of answers without a model, and which images count in each
    checked: list[str]
    unchecked: dict[str, str] = field(default_factory=dict)  # the reason by check

    def __str__(self) -> str:
        count = f"{len(self.findings)} finding(s), the worst first" if self.findings else "nothing wrong was found"
        lines = [f"{self.title}: {count}"]
        for number, finding in enumerate(self.findings, start=1):
            lines += [_wrapped(f"{number}. {SEVERITIES[finding.severity]}: {finding.found}", "   ")]
            lines += [_wrapped(f"   Why it matters: {finding.why}", "   "), _wrapped(f"   What to do: {finding.remedy}", "   ")]
        lines += [_wrapped(f"- {text}", "  ") for text in self.comparisons]
        lines += [_wrapped(f"Checked: {', '.join(self.checked) or 'nothing'}.", "  ")]
        lines += [_wrapped(f"Not checked: {name}, since {why}.", "  ") for name, why in self.unchecked.items()]
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """As ``run.json`` holds it, for the report."""
        rows = [
            {"": SEVERITIES[one.severity], "found": one.found, "why it matters": one.why, "what to do": one.remedy}
            for one in self.findings
        ]
        return {"findings": rows, "comparisons": self.comparisons, "checked": self.checked, "unchecked": self.unchecked}


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


class NotStoredError(LookupError):
    """A check needs what the run has not stored, or what is no longer there."""


@dataclass
class Stored:
    """What a run has stored of a task.  Whatever is not there raises ``NotStoredError`` when it is asked for."""

    run: Run
    task: str
    known: pd.DataFrame | None  # the manifest; None where the data cannot be read

    @cached_property
    def facts(self) -> dict[str, Any]:
        return facts_of_task(read_json(self.run.folder / "run.json"), self.task)

    @cached_property
    def kept(self) -> dict[str, Any]:
        """The task's entry in ``thresholds.json``."""
        facts = read_json(self.run.thresholds).get(self.task)
        if not facts:
            raise NotStoredError("no thresholds have been chosen")
        return facts

    @cached_property
    def thresholds(self) -> Thresholds:
        return Thresholds.of(self.kept)

    @cached_property
    def validation(self) -> pd.DataFrame:
        """The validation images with their probabilities."""
        path = self.run.val_probs(self.task)
        if not path.is_file():
            raise NotStoredError(f"there is no {path.name}")
        table = pd.read_csv(path, dtype={"group": str, "path": str})
        return table if "deciding" in table else table.assign(deciding=True)

    @property
    def judged(self) -> pd.DataFrame:
        """The validation images that decide."""
        return self.validation[self.validation["deciding"].astype(bool)]

    @property
    def called(self) -> np.ndarray:
        """Whether each of them is called positive, ``(N,)`` bool."""
        return (self.judged["prob"] >= self.thresholds.threshold).to_numpy()

    @property
    def manipulated(self) -> pd.DataFrame:
        """Those of them that are manipulated, with their pixel scores."""
        if "iou" not in self.judged:
            raise NotStoredError("no pixel scores are stored")
        return self.judged[self.judged["label"] == 1]

    @property
    def manifest(self) -> pd.DataFrame:
        if self.known is None:
            raise NotStoredError("the data of the run cannot be read here")
        return self.known

    @cached_property
    def history(self) -> pd.DataFrame:
        """A row per epoch."""
        history = read_history(self.run, self.task)
        if history.empty:
            raise NotStoredError(f"{self.run.metrics.name} has no epoch")
        return history

    @property
    def positive(self) -> str:
        return CLASS_NAMES[self.task][1]

    @property
    def notebook(self) -> str:
        return {"A": "notebook 02", "B": "notebook 03"}[self.task]


def diagnose(run: Run, task: str, manifest: pd.DataFrame | None) -> Diagnosis:
    """Check what a run has stored of a task for what usually explains a score, and keep the result for the report.

    It predicts nothing and takes seconds: ``_val_probs.csv``, ``thresholds.json``, ``run.json``, ``metrics.jsonl``, and up to
    ``MASKS_READ`` masks of test images are read.

    Args:
        run: a run that was trained, or begun.
        task: "A" or "B".
        manifest: one row per image, from ``build_manifest``; None where the data is not there.

    Returns:
        The findings with their numbers, why they matter and what to do, and the scores beside those without a model.
    """
    stored = Stored(run, task, manifest)
    findings: list[Finding] = []
    checked, unchecked = [], {}
    for name, check in CHECKS.items():
        if task == "A" and "masks" in name:
            continue
        try:
            findings += check(stored)
            checked.append(name)
        except NotStoredError as missing:
            unchecked[name] = str(missing)
    findings.sort(key=lambda finding: finding.severity)
    title = f"Task {task} of run {run.name}"
    result = Diagnosis(title, findings, list(_comparisons(stored)), checked, unchecked)
    run.record(**{f"task{task}_diagnosis": result.facts()})
    return result


def diagnose_run(name: str) -> list[Diagnosis]:
    """Diagnose each task of a run in ``outputs``.  Raises ``FileNotFoundError`` where there is no such run."""
    results = []
    first = recorded_run(name, "A")
    for task in sorted({*first.params.tasks, *trained_tasks(read_json(first.folder / "run.json"))}):
        run = recorded_run(name, task)
        manifest = None
        try:
            manifest = build_manifest(run, task)
        except (LayoutError, OSError) as error:
            print(f"the data of Task {task} cannot be read: {error}")
        results.append(diagnose(run, task, manifest))
    return results


def _never_evaluated(stored: Stored) -> Iterator[Finding]:
    thresholds, probs = stored.run.thresholds, stored.run.val_probs(stored.task)
    there = {thresholds: read_json(thresholds).get(stored.task), probs: probs.is_file()}
    if missing := [path.name for path, found in there.items() if not found]:
        found = f"the run was not evaluated: nothing of Task {stored.task} in {joined(missing)}"
        yield Finding(WRONG, found, "there is no threshold and no score", f"run {stored.notebook} (or train) to its end")


def _constant(stored: Stored) -> Iterator[Finding]:
    probs = stored.judged["prob"]
    if len(probs) > 1 and probs.max() - probs.min() < CONSTANT:
        yield Finding(
            WRONG,
            f"the output is constant: all {len(probs)} probabilities lie between {probs.min():.4f} and {probs.max():.4f}",
            "an answer that is the same for every image orders nothing: AUC is that of chance, F1 that of calling all alike",
            "look at the training loss; raise lr_head and lr_finetune or the epochs, train more stages (finetune_stages), and "
            "look at the images in notebook 01: can the classes be told apart at all?",
        )


def _inverted_order(stored: Stored) -> Iterator[Finding]:
    auc = roc_auc(stored.judged["label"].to_numpy(int), stored.judged["prob"].to_numpy())
    if auc < INVERTED:
        yield Finding(
            WRONG,
            f"probabilities are inverted: AUC {auc:.3f} on {len(stored.judged)} validation images, and {1 - auc:.3f} for "
            "1 - probability",
            "the model separates the classes the wrong way round: labels of training and validation contradict each other, or "
            "it learned what is the other way round in validation (or chance, where images are few)",
            "see in notebook 01 what each folder was taken for, and compare with the images: labels must mean the same in both "
            "splits; then train again",
        )


def _edges(stored: Stored) -> Iterator[Finding]:
    threshold, called = stored.thresholds.threshold, stored.called
    if called.all() or not called.any():
        what = f"all {len(called)}" if called.all() else f"none of {len(called)}"
        quiet = f", or none lets at most {FALSE_ALARMS:.0%} of authentic images be called" if stored.task == "B" else ""
        yield Finding(
            WRONG,
            f"the threshold {threshold:.6f} is at the edge of the range: {what} validation images are called {stored.positive}",
            f"no threshold between the probabilities does better{quiet}; labels then say nothing about an image",
            "see the other findings for the cause, such as a constant output; the threshold follows from the probabilities",
        )
    if stored.task == "B" and threshold_bin(stored.thresholds.loc_threshold) in (1, BINS - 1):
        yield Finding(
            DOUBTFUL,
            f"the localization threshold {stored.thresholds.loc_threshold:.4f} is at the edge of the range",
            "masks are then nearly full or nearly empty at every other threshold: they were not learned",
            "train longer, raise mask_weight, and look at the masks of the training images in notebook 01",
        )


def _trivial(stored: Stored) -> Iterator[Finding]:
    labels = stored.judged["label"].to_numpy(int)
    f1, trivial = f1_score(labels, stored.called), _f1_of_all_positive(labels)
    if f1 > trivial + MARGIN:
        return
    observed = f"F1 {f1:.3f} is no better than that of calling every image {stored.positive} ({trivial:.3f})"
    probs = stored.judged["prob"].to_numpy()
    best, missed = f1_score(labels, probs >= best_f1_threshold(labels, probs)), (labels[~stored.called] == 1).sum()
    if stored.task == "B" and best > trivial + MARGIN:
        yield Finding(
            DOUBTFUL,
            observed,
            f"the threshold lets at most {FALSE_ALARMS:.0%} of the authentic validation images be called manipulated, which "
            f"misses {missed} of {labels.sum()} manipulated ones; without this limit F1 would be {best:.3f}",
            "nothing is wrong with the threshold: a model that separates the classes better loses less by the limit",
        )
        return
    yield Finding(
        WRONG,
        observed,
        f"with {labels.mean():.0%} positive images that much F1 needs no model",
        "judge the model by AUC first; if it is near 0.5, see the training loss and the data",
    )


def _f1_of_all_positive(labels: np.ndarray) -> float:
    return f1_score(labels, np.ones(len(labels), bool))


def _masks(stored: Stored) -> Iterator[Finding]:
    rows = stored.manipulated
    iou, flagged, truth = rows["iou"].mean(), rows["flagged"], rows["truth"].mean()
    inverted = _inverted_iou(rows).mean()
    backwards = rows["pixel_auc"].mean() < INVERTED if "pixel_auc" in rows else flagged.mean() > MOST
    if inverted > iou and backwards:
        yield Finding(
            WRONG,
            f"masks are inverted: mean IoU {iou:.3f} over {len(rows)} manipulated images, and {inverted:.3f} for 1 - mask",
            "the model marks what was left as it was",
            "true masks are white where an image was manipulated: see the outlines in notebook 01, invert the training masks "
            "that are the wrong way round, and train again",
        )
    for kind, count in _nearly_all(flagged.to_numpy()):
        limit = f"under {EMPTY:.1%}" if kind == "empty" else f"over {FULL:.0%}"
        share = f"{count / len(rows):.0%} of {len(rows)} manipulated images"
        yield Finding(
            WRONG,
            f"masks are nearly {kind}: {limit} of the pixels are flagged in {share}",
            f"the mean IoU {iou:.3f} is then about that of a mask that is always {kind}",
            "train longer, raise mask_weight, and look at the outlines in notebook 01; for empty masks lower "
            "authentic_weight too",
        )
    if iou <= truth + MARGIN:
        yield Finding(
            DOUBTFUL,
            f"the mean IoU {iou:.3f} over manipulated images is no better than that of flagging every pixel ({truth:.3f})",
            "such masks find no region",
            "look at the worst masks in notebook 03, and at the table by method and size: small regions are the hardest",
        )


def _inverted_iou(rows: pd.DataFrame) -> pd.Series:
    """IoU of 1 - mask, which follows from IoU and the shares of flagged and of manipulated pixels."""
    both = rows["iou"] * (rows["flagged"] + rows["truth"]) / (1 + rows["iou"])
    return (rows["truth"] - both) / (1 - rows["flagged"] + both)


def _test_masks(stored: Stored) -> Iterator[Finding]:
    """Masks of test images: of their image's size, and not all empty or full."""
    run = stored.run
    if "inferred" not in stored.facts or not run.test_probs("B").is_file():
        raise NotStoredError("no test image has been predicted")
    table = pd.read_csv(run.test_probs("B"), dtype={"image_id": str}, keep_default_na=False)
    folder, names = Path(stored.facts["inferred"]["test_folder"]), mask_names(table["image_id"])
    drawn = table.iloc[np.unique(np.linspace(0, len(table) - 1, min(len(table), MASKS_READ)).round().astype(int))]
    wrong, missing, flagged = [], [], []
    for image, prob in progress(list(zip(drawn["image_id"], drawn["prob"], strict=True)), "reading masks"):
        path = run.masks / names[image]
        if not path.is_file():
            missing.append(path.name)
            continue
        mask = load_mask(path)
        if told := _other_size(mask, folder / image):
            wrong.append(told)
        if prob >= stored.thresholds.threshold:
            flagged.append((mask >= stored.thresholds.loc_threshold).mean())
    again = "run notebook 04 again; remove the folder of masks first where another program wrote them"
    looked = f"of {len(drawn)} masks of test images that were read"
    if wrong:
        yield Finding(
            WRONG,
            f"masks are of another size than their images: {len(wrong)} {looked}: {joined(wrong)}",
            "such a submission is refused",
            again,
        )
    if missing:
        yield Finding(WRONG, f"masks are missing: {len(missing)}: {joined(missing)}", "each test image needs one", again)
    yield from _alike(np.array(flagged))


def _alike(flagged: np.ndarray) -> Iterator[Finding]:
    """``flagged`` (N,) are the shares of flagged pixels of test images that are called manipulated."""
    for kind, count in _nearly_all(flagged):
        yield Finding(
            DOUBTFUL,
            f"masks of test images are nearly {kind}: {count} of {len(flagged)} that are called manipulated",
            "image decision and mask contradict each other" if kind == "empty" else "no region was found",
            "compare the masks of validation images in notebook 03; test images may be of another size or kind",
        )


def _nearly_all(flagged: np.ndarray) -> Iterator[tuple[str, int]]:
    """What more than half of the masks nearly are, empty or full, and how many; ``flagged`` (N,) shares of pixels."""
    for kind, count in (("empty", int((flagged < EMPTY).sum())), ("full", int((flagged > FULL).sum()))):
        if count > len(flagged) / 2:
            yield kind, count


def _other_size(mask: np.ndarray, image: Path) -> str | None:
    """How a mask's size differs from its image's; None where it does not, or where the image cannot be read."""
    try:
        header = read_header(image)
    except ImageError:
        return None
    if mask.shape == (header.height, header.width):
        return None
    return f"{image.name} has {header.width} x {header.height} pixels, its mask {' x '.join(map(str, mask.shape[::-1]))}"


def _leaks(stored: Stored) -> Iterator[Finding]:
    """Validation images, or their photographs, among the training images."""
    train = stored.manifest[(stored.manifest["split"] == "train") & stored.manifest["error"].isna()]
    judged, count = stored.judged, len(stored.judged)
    same = judged["path"].isin(train["path"])
    if same.any():
        yield Finding(
            WRONG,
            f"validation trains: {same.sum()} of {count} validation images are training images: "
            f"{joined(judged.loc[same, 'path'].map(lambda path: Path(path).name).tolist()[:3])}",
            "the model has seen them with their labels, so every score is too good",
            f"take them out of one split, and run {stored.notebook} again",
        )
    photograph = judged["group"].isin(train["group"]) & ~same
    if photograph.any():
        apart, f1 = stored.facts.get("validation_without_overlap"), stored.facts.get("validation", {}).get("f1", math.nan)
        scores = f" (F1 without them {apart['f1']:.3f}, with them {f1:.3f})" if apart else ""
        yield Finding(
            DOUBTFUL,
            f"photographs of {photograph.sum()} of {count} validation images are in training too{scores}",
            "the model knows the subject and the camera of these, so scores are too good for new photographs",
            "report the scores without overlap, or move all images of a photograph into one split",
        )


OF_AUDIT = {  # findings of notebook 01 that change what a score means: how bad each is, and why
    "equal files in several splits": (WRONG, "validation trains: the model has seen these files, so scores are too good"),
    "look-alikes in several splits": (DOUBTFUL, "validation may train: copies of its images, so scores may be too good"),
    "equal files in both classes": (WRONG, "the same pixels have both labels: no model can be right on both"),
    f"sets whose regions fill over {MOST:.0%} of an image": (DOUBTFUL, "a model of inverted masks marks what is authentic"),
}


def _of_audit(stored: Stored) -> Iterator[Finding]:
    if "findings" not in stored.facts:
        raise NotStoredError("the data were not audited (notebook 01)")
    for row in stored.facts["findings"]["rows"]:
        if row["finding"] in OF_AUDIT:
            severity, why = OF_AUDIT[row["finding"]]
            yield Finding(severity, f"{row['finding']}: {row['count']}", why, row["remedy"])
    trained = stored.facts.get("trained") or stored.facts
    if (trained.get("shortcut_auc_of_crops") or 0) > SHORTCUT_LIMIT:
        yield Finding(
            DOUBTFUL,
            f"the shortcut stays in the training crops: facts of their files tell the classes with AUC "
            f"{trained['shortcut_auc_of_crops']:.2f}",
            "scores on data with the same difference are too good, others poor",
            "set equalize: always, and train again; what is left is texture",
        )


def _one_class(stored: Stored) -> Iterator[Finding]:
    rows = pd.DataFrame(stored.facts.get("data") or [])
    if rows.empty:
        raise NotStoredError("the run has not stored its sources")
    counts = rows[rows["split"] == "train"].groupby("source")[["authentic", "positive"]].sum()
    single = counts[(counts == 0).any(axis=1)]
    if len(single):
        named = [f"{name} ({row.authentic} authentic, {row.positive} {stored.positive})" for name, row in single.iterrows()]
        yield Finding(
            TO_KNOW,
            f"one class is missing in {len(single)} of {len(counts)} training sources: {joined(named)}",
            "whatever else marks such a source (camera, subject, size) marks its class too: a shortcut",
            "compare the scores by source; add the other class from the same source, or aligned twins (open runs)",
        )


def _training(stored: Stored) -> Iterator[Finding]:
    history, params = stored.history, trained_by(stored.run, stored.task)["params"]
    for step in ("head", "finetune"):
        done, wanted = int((history["step"] == step).sum()), params.get(f"epochs_{step}", 0)
        if done < wanted:
            yield Finding(
                WRONG,
                f"training stopped early: step {step} has {done} of {wanted} epochs",
                "the model is not what the parameters say",
                f"run {stored.notebook} (or train) again: it goes on from there; a loss that is not finite ends a training too",
            )
    losses = history["train_loss"].astype(float)
    if not np.isfinite(losses).all():
        first = history[~np.isfinite(losses)].iloc[0]
        yield Finding(
            WRONG,
            f"the training loss is not finite from step {first['step']}, epoch {first['epoch']} on",
            "weights without a value learn nothing more, and answer nothing",
            "lower the rates (lr_head, lr_finetune), try precision: fp32, and look at the images of that batch",
        )
    elif len(losses) > 1 and losses.iloc[1:].min() > FELL * losses.iloc[0]:
        yield Finding(
            WRONG,
            f"the training loss never fell: {losses.iloc[0]:.3f} in the first of {len(losses)} epochs, "
            f"{losses.iloc[1:].min():.3f} in the best later one",
            "the model has learned next to nothing (guessing between two classes costs 0.693)",
            "raise lr_finetune and epochs_finetune, train more stages, take a pretrained backbone; see that labels are right",
        )


def _settings(stored: Stored) -> Iterator[Finding]:
    """Thresholds hold for the inference that they were chosen with."""
    run, task, chosen = stored.run, stored.task, stored.kept.get("inference") or {}
    again = f"run {stored.notebook} (or train) again, which chooses thresholds anew and trains nothing"
    there, here = other_settings(chosen, run.params, task)
    if here:
        yield Finding(
            WRONG,
            f"thresholds were chosen with other inference settings than those in use: {settings_text(there)} then, "
            f"{settings_text(here)} now",
            "other crops or tiles give other probabilities, for which the threshold was not chosen",
            f"set {settings_text(there)}, or {again}",
        )
    inferred = stored.facts.get("inferred")
    if inferred and (
        inferred["inference"] != chosen or Thresholds.of(inferred["thresholds"]).facts() != stored.thresholds.facts()
    ):
        yield Finding(
            WRONG,
            "the test images were predicted with other thresholds or inference settings than those that are stored now",
            "their probabilities do not fit the thresholds, and no archive is built of them",
            "run notebook 04 (or infer) again",
        )
    now = inference_settings(run.params, task)["precision"]
    if stored.kept.get("precision", now) != now:
        found = f"thresholds were chosen in {stored.kept['precision']}, this machine predicts in {now}"
        yield Finding(TO_KNOW, found, "probabilities may differ by a hundredth", f"for exact thresholds {again}")


CHECKS: dict[str, Callable[[Stored], Iterator[Finding]]] = {
    "that the run is evaluated": _never_evaluated,
    "the training": _training,
    "constant outputs": _constant,
    "inverted probabilities": _inverted_order,
    "thresholds at an edge": _edges,
    "F1 against an answer that is always positive": _trivial,
    "masks of validation images": _masks,
    "masks of test images": _test_masks,
    "validation images in training": _leaks,
    "findings on the data": _of_audit,
    "sources of one class": _one_class,
    "settings of inference": _settings,
}


def _comparisons(stored: Stored) -> Iterator[str]:
    """Scores beside those of answers without a model, and which images count in them."""
    try:
        labels, called, threshold = stored.judged["label"].to_numpy(int), stored.called, stored.thresholds.threshold
    except NotStoredError:
        return
    f1, trivial = f1_score(labels, called), _f1_of_all_positive(labels)
    yield f"F1 {f1:.3f} at the threshold {threshold:.6f}; calling every image {stored.positive} has {trivial:.3f}."
    if stored.task == "B":
        yield from _mask_comparisons(stored)
    yield from _counts(stored)


def _mask_comparisons(stored: Stored) -> Iterator[str]:
    rows, judged = stored.manipulated, stored.judged
    iou, full = rows["iou"].mean(), rows["truth"].mean()
    yield f"Mean IoU over manipulated images {iou:.3f}; flagging every pixel has {full:.3f}, an empty mask 0."
    yield (
        f"Mean IoU over all images {judged['iou'].mean():.3f}, as submitted {judged['submitted_iou'].mean():.3f}; empty masks "
        f"everywhere have {(judged['label'] == 0).mean():.3f}, since empty against empty is 1."
    )


def _counts(stored: Stored) -> Iterator[str]:
    """How many images count in each mean, and which are left out and why."""
    judged, count = stored.judged, len(stored.judged)
    positive = int(judged["label"].sum())
    rule = chosen_on(read_json(stored.run.folder / "run.json"), stored.task)
    yield f"{count} of {len(stored.validation)} validation images decide. {rule}".rstrip()
    masks = f"; mean IoU: the {positive} manipulated ones, or all {count}" if stored.task == "B" else ""
    yield (
        f"F1, accuracy, AUC and calibration are of these {count}; recall: the {positive} positive ones; false-positive rate: "
        f"the {count - positive} authentic ones{masks}."
    )
    left_out = _left_out(stored)
    yield f"Left out: {len(left_out)} labelled images: {joined(left_out)}." if left_out else "No labelled image is left out."


def _left_out(stored: Stored) -> list[str]:
    """The labelled images that count nowhere, with the reasons where the manifest tells them."""
    names = stored.facts.get("left_out") or []
    if stored.known is None:
        return names
    reasons = dict(problems(stored.known, repeats=False)[["path", "error"]].itertuples(index=False))
    return [reasons.get(name, name) for name in names]
