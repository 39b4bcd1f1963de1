"""The figures of a run, in one style.  Each function returns a figure; ``save_figure`` keeps it with the run.

Colours are from the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw
from scipy.special import expit
from sklearn.metrics import precision_recall_curve, roc_curve

from forensics_lib.device import choose_machine
from forensics_lib.evaluation.calibration import reliability
from forensics_lib.evaluation.evaluate import Evaluation
from forensics_lib.evaluation.metrics import counts
from forensics_lib.evaluation.predictions import truth_mask
from forensics_lib.images.crops import at_scale, chosen_crops, chosen_places, pad_to
from forensics_lib.images.degradations import degrade
from forensics_lib.images.io import read_image
from forensics_lib.images.masks import load_mask
from forensics_lib.images.spectra import residual
from forensics_lib.inference.detectors import answer, load_detector
from forensics_lib.inference.predict import predict_mask, predict_probabilities, tile_starts, used_scales
from forensics_lib.inference.probabilities import calibrated
from forensics_lib.models.checkpoint import load_model
from forensics_lib.models.combined import CombinedModel
from forensics_lib.params import Params
from forensics_lib.reports.attribution import grad_cam
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.utils.files import atomic_write, read_json

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
CYCLE = (ORANGE, BLUE, GREEN, RED, "#CC79A7")  # of crops and tiles
CLASS_COLOURS = {0: BLUE, 1: ORANGE}
CLASS_NAMES = {"A": ("authentic", "synthetic"), "B": ("authentic", "manipulated")}
EXAMPLES = {  # choices of ``mask_examples``: what their galleries are called
    "best": "Validation: the best masks",
    "worst": "Validation: the worst masks",
    "borderline": "Validation: probabilities next to the threshold",
    "alarms": "Validation: authentic images with the most flagged pixels",
}
plt.rcParams["text.parse_math"] = False  # names of files and sources are shown, and dollar signs in them begin no formula
STYLE: Any = {"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    plt.close(figure)  # a notebook shows the returned figure once
    return figure, axes


def save_figure(run: Run, figure: Figure, name: str) -> Figure:
    """Keep a figure as ``figures/<name>.png`` and ``.svg`` of the run; returns it, so that a cell ends with this call."""
    if run.sample:
        figure.suptitle(f"{figure.get_suptitle()}  [sample data]".strip(), fontsize=10)
    write_figure(figure, run.folder / "figures" / name)
    return figure


def write_figure(figure: Figure, target: Path) -> None:
    """Write ``<target>.png`` and ``<target>.svg``."""
    for ending in ("png", "svg"):
        with atomic_write(target.with_name(f"{target.name}.{ending}")) as temporary:
            figure.savefig(temporary, dpi=110)


def submitted_probabilities(table: pd.DataFrame, task: str) -> Figure:
    """The distribution of the submitted probabilities (columns ``prob``, ``label``, ``threshold``), by submitted label."""
    figure, axes = new_figure(1, 1, 6, 2.6)
    axis, threshold = axes[0, 0], float(table["threshold"].iloc[0])
    groups = [table.loc[table["label"] == label, "prob"] for label in CLASS_COLOURS]
    names = [f"called {CLASS_NAMES[task][label]}: {len(group)}" for label, group in enumerate(groups)]
    axis.hist(groups, np.linspace(0, 1, 41), stacked=True, color=list(CLASS_COLOURS.values()), label=names)
    axis.axvline(threshold, color="black", lw=1, label=f"threshold {threshold:.3f}")
    axis.set(xlabel="probability", ylabel="test images")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Task {task}: what is submitted", fontsize=10)
    return figure


def hide_axes(axes: np.ndarray) -> None:
    for axis in axes.flat:
        axis.set_axis_off()


def learning_curves(metrics: pd.DataFrame, task: str) -> Figure:
    """Training loss and validation scores over the epochs of both steps; the figure says so where there are none."""
    if metrics.empty:
        return no_image(f"Task {task}: learning", "nothing was trained")
    figure, axes = new_figure(1, 2, 8, 2.8)
    epochs = np.arange(1, len(metrics) + 1)
    axes[0, 0].plot(epochs, metrics["train_loss"], color=BLUE, marker=".")
    axes[0, 0].set(xlabel="epoch", ylabel="training loss")
    axes[0, 1].plot(epochs, metrics["val_auc"], color=BLUE, marker=".", label="AUC")
    if "val_iou" in metrics:
        axes[0, 1].plot(epochs, metrics["val_iou"], color=ORANGE, marker=".", label="mean IoU, manipulated")
    axes[0, 1].set(xlabel="epoch", ylabel="validation", ylim=(0, 1.02))
    axes[0, 1].legend(loc="lower right", frameon=False)
    for axis in axes.flat:
        axis.axvline((metrics["step"] == "head").sum() + 0.5, color=GREY, lw=1, ls=":")
    figure.suptitle(f"Task {task}: learning (dotted line: step 2 begins)", fontsize=10)
    return figure


def score_curves(evaluation: Evaluation, task: str) -> Figure:
    """ROC, precision-recall, and the distribution of probabilities with the threshold."""
    table, threshold = evaluation.judged, evaluation.thresholds.threshold
    figure, axes = new_figure(1, 3, 10, 3)
    roc, pr, hist = axes.flat
    fpr, tpr, _ = roc_curve(table["label"], table["prob"])
    precision, recall, _ = precision_recall_curve(table["label"], table["prob"])
    roc.plot(fpr, tpr, color=BLUE)
    roc.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    roc.set(title="ROC", xlabel="false-positive rate", ylabel="true-positive rate")
    pr.step(recall, precision, where="post", color=BLUE)
    pr.set(title="precision and recall", xlabel="recall", ylabel="precision", ylim=(0, 1.05))
    for axis, text in ((roc, f"AUC {evaluation.metrics['auc']:.3f}"), (pr, f"AP {evaluation.metrics['ap']:.3f}")):
        axis.text(0.95, 0.08, text, ha="right", transform=axis.transAxes)
    for label, colour in CLASS_COLOURS.items():
        chosen = table.loc[table["label"] == label, "prob"]
        hist.hist(chosen, np.linspace(0, 1, 26), color=colour, alpha=0.6, label=CLASS_NAMES[task][label])
    hist.axvline(threshold, color="black", lw=1, label=f"threshold {threshold:.3f}")
    hist.set(title="probabilities", xlabel="probability", ylabel="images", ylim=(0, hist.get_ylim()[1] * 1.4))  # legend
    hist.legend(frameon=False)
    figure.suptitle(f"Task {task}: validation", fontsize=10)
    return figure


def reliability_diagram(evaluation: Evaluation, task: str) -> Figure:
    """Share of positive images at each predicted probability, before and after calibration."""
    figure, axes = new_figure(1, 1, 4, 3.4)
    axis, labels = axes[0, 0], evaluation.judged["label"].to_numpy(int)
    decides, uncalibrated = evaluation.table["deciding"].to_numpy(), np.asarray(evaluation.uncalibrated)
    axis.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="exact")
    scores = evaluation.metrics
    for name, probs, error, colour in (
        ("as trained", uncalibrated[decides], scores["ece_uncalibrated"], ORANGE),
        ("calibrated", evaluation.judged["prob"].to_numpy(), scores["ece"], BLUE),
    ):
        found = reliability(labels, probs)
        axis.plot(found[:, 0], found[:, 1], color=colour, marker="o", ms=4, label=f"{name}: ECE {error:.3f}")
    axis.set(xlabel="predicted probability", ylabel=f"share {CLASS_NAMES[task][1]}", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Task {task}: calibration on validation", fontsize=10)
    return figure


def robustness_curves(table: pd.DataFrame, task: str) -> Figure:
    """AUC, F1, false-positive rate and for Task B mean IoU at the stored thresholds after each change of ``robustness``."""
    changes = [name for name in table["change"].unique() if name != "unchanged"]
    start = table[table["change"] == "unchanged"].iloc[0]
    figure, axes = new_figure(2, -(-len(changes) // 2), 2.7 * -(-len(changes) // 2), 4.6)
    for axis, name in zip(axes.flat, changes, strict=False):
        rows = table[table["change"] == name]
        places = np.arange(len(rows) + 1)
        lines = [("auc", BLUE, "AUC"), ("f1", GREEN, "F1"), ("fpr", RED, "false-positive rate"), ("iou", ORANGE, "mean IoU")]
        for key, colour, label in (line for line in lines if line[0] in table):
            axis.plot(places, [start[key], *rows[key]], color=colour, marker=".", label=label)
        axis.set_xticks(places, ["none", *(f"{value:g}" for value in rows["strength"])])
        axis.set(xlabel=name, ylim=(0, 1.02))
    for axis in axes.flat[len(changes) :]:
        axis.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(f"Task {task}: what is left after common changes, {int(start['images'])} validation images", fontsize=10)
    return figure


def attribution_gallery(run: Run, rows: pd.DataFrame, title: str) -> Figure:
    """Task A images of an evaluation, and below each its attribution map; the figure says so where there are none."""
    if rows.empty:
        return no_image(title)
    model, machine = load_detector(run, "A"), choose_machine(run.params)
    if not isinstance(model, CombinedModel):
        return no_image(title, "attribution needs a model of the run's own")
    figure, axes = new_figure(2, len(rows), 1.8 * max(3, len(rows)), 4.2)
    hide_axes(axes)
    for column, (_, row) in zip(axes.T, rows.iterrows(), strict=False):
        shown, heat = grad_cam(model, read_image(row["path"]), machine)
        column[0].imshow(shown, interpolation="nearest")
        column[1].imshow(shown.mean(2), cmap="gray", vmin=0, vmax=255)
        column[1].imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        column[0].set_title(f"{row['source']}\n{CLASS_NAMES['A'][row['label']]}, prob {row['prob']:.2f}", fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def no_image(title: str, why: str = "no such image") -> Figure:
    """The figure of a gallery without an image."""
    figure, axes = new_figure(1, 1, 5, 0.9)
    hide_axes(axes)
    axes[0, 0].text(0.5, 0.5, why, ha="center", va="center", transform=axes[0, 0].transAxes)
    figure.suptitle(title, fontsize=10)
    return figure


def decisions(evaluation: Evaluation) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives at the threshold, of the images that decide."""
    called = evaluation.judged["prob"] >= evaluation.thresholds.threshold
    return counts(evaluation.judged["label"].to_numpy(), called.to_numpy())


def confusion(evaluation: Evaluation, task: str) -> Figure:
    """The confusion matrix at the chosen threshold, as counts."""
    tp, fp, fn, tn = decisions(evaluation)
    matrix = np.array([[tn, fp], [fn, tp]])
    figure, axes = new_figure(1, 1, 3.4, 3)
    axis, names = axes[0, 0], CLASS_NAMES[task]
    axis.imshow(matrix / matrix.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for (y, x), value in np.ndenumerate(matrix):
        dark = value > matrix[y].sum() / 2
        axis.text(x, y, str(value), ha="center", va="center", color="white" if dark else "black", fontsize=12)
    axis.set(xticks=[0, 1], yticks=[0, 1], xticklabels=names, yticklabels=names, xlabel="called", ylabel="is")
    figure.suptitle(f"Task {task}: threshold {evaluation.thresholds.threshold:.3f}", fontsize=10)
    return figure


def example_gallery(run: Run, evaluation: Evaluation, which: str) -> Figure:
    """``mask_gallery`` of one of the choices of ``mask_examples``."""
    return mask_gallery(mask_examples(run, evaluation, which), evaluation.thresholds.loc_threshold, EXAMPLES[which])


def mask_gallery(examples: list[MaskExample], loc_threshold: float, title: str) -> Figure:
    """A column per image: the image, its truth, the predicted probability, and hits and errors at ``loc_threshold``.

    Images without ground truth show flagged pixels alone; without any image the figure says so.
    """
    if not examples:
        return no_image(title)
    known = examples[0].truth is not None
    names = ["image", *(["truth"] if known else []), "probability", "decision"]
    rows = len(names)
    figure, axes = new_figure(rows, len(examples), 1.75 * len(examples), 1.85 * rows + 0.6)
    hide_axes(axes)
    for column, example in zip(axes.T, examples, strict=True):
        truth = [] if example.truth is None else [example.truth]
        panels = [example.image, *truth, example.mask, decision_overlay(example, loc_threshold)]
        for axis, panel in zip(column, panels, strict=True):
            axis.imshow(panel, **({} if panel.ndim == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}), interpolation="nearest")
        column[0].set_title(example.title, fontsize=7)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.text(-0.06, 0.5, name, rotation=90, va="center", ha="right", transform=axis.transAxes, fontsize=9)
    labels = {GREEN: "found", RED: "falsely flagged", BLUE: "missed"} if known else {RED: "flagged"}
    figure.legend(
        handles=[Patch(color=c, label=n) for c, n in labels.items()], loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    return figure


def decision_overlay(example: MaskExample, loc_threshold: float, opacity: float = 0.65) -> np.ndarray:
    """The image in grey with found, falsely flagged and missed pixels in colour; ``(H, W, 3)`` in [0, 1]."""
    grey = np.repeat(example.image.mean(2, keepdims=True) / 255, 3, 2) * 0.6 + 0.3
    flagged = example.mask >= loc_threshold
    truth = np.zeros_like(flagged) if example.truth is None else example.truth
    for where, colour in ((flagged & truth, GREEN), (flagged & ~truth, RED), (~flagged & truth, BLUE)):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        grey[where] = (1 - opacity) * grey[where] + opacity * rgb
    return grey


def crop_outlines(image: np.ndarray, params: Params) -> np.ndarray:
    """An image ``(H, W, 3)`` uint8 with outlines of the crops that Task A scores, thicker in a large image."""
    picture, size = Image.fromarray(image), params.crop_size
    drawing = ImageDraw.Draw(picture)
    for top, left in chosen_places(image, size, params.crops_per_image):
        outline = [left, top, left + size - 1, top + size - 1]
        drawing.rectangle(outline, outline=ORANGE, width=max(2, max(picture.size) // 300))
    return np.asarray(picture)


def test_gallery(run: Run, results: pd.DataFrame, loc_threshold: float, count: int = 6) -> Figure:
    """Test images with the masks that were written for them, from the highest probability to the lowest."""
    readable = results[results["error"].isna()].sort_values("prob", ascending=False, kind="stable")
    examples = []
    places = np.linspace(0, len(readable) - 1, min(count, len(readable))).round().astype(int)
    for _, row in readable.iloc[np.unique(places)].iterrows():
        mask = load_mask(run.masks / f"{Path(row['path']).stem}.npz")
        examples.append(
            MaskExample(f"{row['image_id'][:14]}\nprob {row['prob']:.2f}", read_image(Path(row["path"])), mask, None)
        )
    return mask_gallery(examples, loc_threshold, "Test images and their masks as predicted")


@dataclass
class MaskExample:
    """One image with its prediction, and its ground truth where known."""

    title: str
    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) in [0, 1]
    truth: np.ndarray | None  # (H, W) bool


def mask_examples(run: Run, evaluation: Evaluation, which: str, count: int = 6) -> list[MaskExample]:
    """Images of an evaluation, with masks that are predicted again.

    ``which``: ``best`` or ``worst`` (manipulated images by IoU), ``borderline`` (those next to the image threshold), or
    ``alarms`` (authentic images with the most flagged pixels).
    """
    machine = choose_machine(run.params)
    model = load_detector(run, "B")
    examples = []
    for _, row in _chosen(evaluation, which).head(count).iterrows():
        image = read_image(Path(row["path"]))
        prob, mask = answer(model, image, run.params, machine)
        truth = truth_mask(row, image.shape[:2])
        said = f"IoU {row['iou']:.2f}" if row["label"] else f"{row['flagged']:.0%} flagged"
        what = manipulation(row) if row["label"] else "authentic"
        title = f"{row['source']}\n{what}\n{said}, prob {calibrated(np.array(prob), evaluation.thresholds):.2f}"
        examples.append(MaskExample(title, image, mask, truth))
    return examples


def _chosen(evaluation: Evaluation, which: str) -> pd.DataFrame:
    table = evaluation.table
    if which == "borderline":
        return table.iloc[(table["prob"] - evaluation.thresholds.threshold).abs().argsort(kind="stable")]
    if which == "alarms":
        return table[table["label"] == 0].sort_values("flagged", ascending=False, kind="stable")
    return table[table["label"] == 1].sort_values("iou", ascending=which == "worst", kind="stable")


def on_its_way(run: Run, row: pd.Series) -> Figure:
    """A Task A image of an evaluation on its way through the method, of a run that trained a model.

    From left to right: the image with the native crops that are scored, the first of them, the same as a training crop may
    have become, its noise residual, and the probability of each crop beside that of the image.
    """
    image, size = read_image(row["path"]), run.params.crop_size
    places = chosen_places(image, size, run.params.crops_per_image)
    crop = chosen_crops(image, size, 1)[0]
    degraded, done = _as_in_training(run, crop)
    panels = {
        f"{image.shape[1]} x {image.shape[0]} pixels,\n{len(places)} native crops of {size}": pad_to(image, size, size),
        "crop 1,\nas it is": crop,
        f"as training may see it:\n{done}": degraded,
        "noise residual of crop 1:\nwhat a median filter removes": residual(crop),
    }
    figure, axes = new_figure(1, 5, 12, 3)
    hide_axes(axes[:, :4])
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(panel, **({} if panel.ndim == 3 else {"cmap": "gray", "vmin": -16, "vmax": 16}), interpolation="nearest")
        axis.set_title(title, fontsize=8)
    for number, (y, x) in enumerate(places):
        _outline(axes[0, 0], (x, y, size, size), number, str(number + 1))
    prob = _crop_bars(run, row, axes[0, 4])
    what = f"{CLASS_NAMES['A'][int(row['label'])]} image ({row['source']})"
    figure.suptitle(f"Task A: how this {what} gets its probability of being synthetic, {prob:.2f}", fontsize=10)
    return figure


def _as_in_training(run: Run, crop: np.ndarray) -> tuple[np.ndarray, str]:
    """The first random degradation of training that changes a crop, and what it left behind; the crop where none does."""
    equalize = bool(read_json(run.folder / "run.json").get("taskA_equalized"))
    for draw in range(100):
        rng = np.random.default_rng([run.params.seed_for(), draw])
        image, _, encoding = degrade(crop, None, run.params.degrade, rng, equalize=equalize)
        if not np.array_equal(image, crop):
            last = f", {encoding.format} {encoding.quality}" if encoding else ""
            return image, f"{image.shape[1]} x {image.shape[0]} pixels{last}"
    return crop, "unchanged in this run"


def _crop_bars(run: Run, row: pd.Series, axis: Axes) -> float:
    """Draw the calibrated probability of each crop and of the image, and return the latter."""
    model, machine = load_model(run.finetuned_model("A"), "A")[0], replace(choose_machine(run.params), workers=0)
    thresholds = stored_thresholds(run, "A")
    (found,) = predict_probabilities(model, row.to_frame().T, run.params, machine)
    native, whole = found.margins or [], found.whole_margins or []
    probs = calibrated(np.array([*expit(native), *expit(whole), found.prob]), thresholds)
    names = [f"crop {number + 1}" for number in range(len(native))] + [f"whole {number + 1}" for number in range(len(whole))]
    names.append("image")
    colours = [*(CYCLE[number % len(CYCLE)] for number in range(len(native))), *[GREY] * (len(whole) + 1)]
    axis.bar_label(axis.barh(names, probs, color=colours), fmt="%.2f", padding=2, fontsize=8)
    axis.axvline(thresholds.threshold, color="black", lw=1, label=f"threshold {thresholds.threshold:.2f}")
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.2), xticks=[0, 0.5, 1])
    axis.set_title("probabilities: the image's is of the mean\nlog-odds, of native crops and seen whole", fontsize=8)
    axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return float(probs[-1])


def tiling(run: Run, row: pd.Series) -> Figure:
    """A Task B image of an evaluation as the method looks at it, of a run that trained a model.

    Above, the image at each scale with its tiles, and the truth; below, the mask of each scale, and their mean.
    """
    image, params, machine = read_image(row["path"]), run.params, choose_machine(run.params)
    model, thresholds = load_model(run.finetuned_model("B"), "B")[0].to(machine.device), stored_thresholds(run, "B")
    scales = used_scales(params, image.shape[:2])
    figure, axes = new_figure(2, len(scales) + 1, 2.8 * (len(scales) + 1), 5.8)
    hide_axes(axes)
    for column, scale in zip(axes.T, scales, strict=False):
        _draw_tiles(column[0], at_scale(image, scale), scale, params)
        alone = params.model_copy(update={"mask_scales": [scale], "copy_move": False})
        _draw_mask(column[1], predict_mask(model, image, alone, machine)[1], "mask of these tiles")
    prob, mask = predict_mask(model, image, params, machine)
    truth, (above, below) = truth_mask(row, image.shape[:2]), axes[:, -1]
    above.imshow(image)
    told = "the line encloses\nwhat is manipulated" if truth.any() else "\nnothing is manipulated"
    above.set_title(f"truth: {told}", fontsize=8)
    _draw_mask(below, mask, f"mean mask; the line encloses\nthe pixels from {thresholds.loc_threshold:.2f} on")
    for axis, region in ((above, truth), (below, mask >= thresholds.loc_threshold)):
        if region.any() and not region.all():
            axis.contour(region, levels=[0.5], colors=ORANGE, linewidths=1.2)
    what = f"{row['source']}, {manipulation(row) if row['label'] else 'authentic'}"
    said = f"probability of being manipulated {calibrated(np.array(prob), thresholds):.2f}"
    figure.suptitle(f"Task B: how an image gets its mask\n{what}: {said}", fontsize=10)
    return figure


def _draw_tiles(axis: Axes, view: np.ndarray, scale: float, params: Params) -> None:
    (height, width), tile = view.shape[:2], params.tile_size
    tops, lefts = (tile_starts(length, tile, params.tile_overlap) for length in (height, width))
    axis.imshow(view)
    for number, (top, left) in enumerate(product(tops, lefts)):
        _outline(axis, (left, top, min(tile, width), min(tile, height)), number)
    tiles = f"{len(tops) * len(lefts)} tile{'' if len(tops) * len(lefts) == 1 else 's'}"
    axis.set_title(f"scale {scale:g}: {width} x {height} pixels,\n{tiles} of up to {tile}", fontsize=8)


def _draw_mask(axis: Axes, mask: np.ndarray, title: str) -> None:
    axis.imshow(mask.astype(np.float32), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8)


def _outline(axis: Axes, box: tuple[int, int, int, int], number: int, name: str = "") -> None:
    """Draw a box (left, top, width, height; pixels) a little inside, so that boxes that share an edge can be told apart."""
    left, top, width, height = box
    colour, inset = CYCLE[number % len(CYCLE)], (1 + number % len(CYCLE)) * min(width, height) / 100
    sides = (width - 2 * inset, height - 2 * inset)
    axis.add_patch(Rectangle((left + inset, top + inset), *sides, fill=False, edgecolor=colour, lw=1.6))
    if name:
        field: Any = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        axis.text(left + width / 2, top + height / 2, name, color="white", fontsize=7, ha="center", va="center", bbox=field)


def manipulation(row: pd.Series) -> str:
    """How a manipulated image was made, for titles: ``sd2-sp (sp)``, or ``manipulated (sp)`` where the method is not known."""
    return f"{'manipulated' if pd.isna(row['method']) else row['method']} ({row['kind']})"
