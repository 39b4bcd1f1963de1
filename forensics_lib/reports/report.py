"""``report.html``: a run's data, scores and figures on one self-contained page, which works offline and runs no script."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from PIL import Image

from forensics_lib.run import OF_TRAINING, Run, parameters_in_force, trained_tasks
from forensics_lib.utils.files import read_json, write_text

METRIC_NAMES = {  # by a metric's key, in the order of importance
    "f1": "F1 at the threshold",
    "f1_crossfit": "F1 with thresholds chosen on other folds",
    "f1_at_half": "F1 at 0.5",
    "auc": "AUC",
    "ap": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "precision",
    "recall": "recall",
    "fpr": "false-positive rate on authentic images",
    "eer": "equal error rate",
    "tpr_at_5_fpr": "recall at 5% false positives",
    "ece": "calibration error (ECE)",
    "ece_uncalibrated": "calibration error before calibration",
    "temperature": "temperature",
    "intercept": "intercept of the log-odds",
    "threshold": "threshold",
    "iou_manipulated": "mean IoU over manipulated images",
    "pixel_f1_manipulated": "mean pixel F1 over manipulated images",
    "best_pixel_f1_manipulated": "mean pixel F1 at each manipulated image's own best threshold",
    "pixel_auc_manipulated": "mean pixel AUC over manipulated images",
    "pixel_ap_manipulated": "mean pixel average precision over manipulated images",
    "iou_all": "mean IoU over all images (empty against empty = 1)",
    "submitted_iou_manipulated": "mean IoU over manipulated images, as submitted (empty where called authentic)",
    "submitted_iou_all": "mean IoU over all images, as submitted",
    "submitted_flagged_authentic": "authentic images with over 1% of pixels flagged, as submitted",
    "flagged_authentic": "authentic images with over 1% of pixels flagged",
    "loc_threshold": "localization threshold",
}
_RANKING = {"A": ("f1", "auc", "fpr"), "B": ("f1", "iou_manipulated", "submitted_flagged_authentic")}
TASK_NAMES = {"A": "Task A: real or synthetic", "B": "Task B: manipulated regions"}
TABLES = {  # by key in run.json
    "by_source": "by source",
    "by_generator": "by generator",
    "by_platform": "by platform",
    "by_format": "by file format",
    "by_method": "by kind and method",
    "by_size": "by kind and size of the region",
    "robustness": "after common changes",
}
_CAPTIONS = {
    "balance": "Usable images by split, source, method and class",
    "sound": "Unusable and duplicate images, by split",
    "samples": "Training images at native resolution, and their noise (image minus median filter)",
    "spectra": "Average spectra of noise residuals",
    "forgeries": "Forgeries made of authentic training images",
    "areas": "Size of manipulated regions",
    "shortcut": "How well a single file fact tells the classes apart",
    "regions": "Manipulated training images with outlines of the manipulated regions",
    "files": "File facts by class",
    "learning": "Loss and validation scores over the epochs",
    "validation": "ROC, precision and recall, probabilities on validation images",
    "way": "An image on its way through the method: crops, a degradation of training, noise residual, probabilities",
    "tiling": "An image as the method looks at it: tiles and mask of each scale, the mean mask, the truth",
    "calibration": "Calibration: predicted probabilities against observed shares",
    "robustness": "Scores after recompression, scaling, blur, noise and an upload",
    "wrong": "The most wrong images, and where the model sees signs of generation",
    "right": "Correctly classified images, and where the model sees signs of generation",
    "confusion": "Confusion matrix at the threshold",
    "best": "Manipulated images with the best masks",
    "worst": "Manipulated images with the worst masks",
    "borderline": "Images whose probability is next to the threshold",
    "alarms": "Authentic images with the most falsely flagged pixels",
    "test": "Test images with their predictions",
    "submitted": "Probabilities of the test images, and the threshold",
}


_UNREADABLE = {
    "left_out": "Labelled images left out: unreadable, or without their mask",
    "unreadable_in_training": "Training images that could not be read",
    "unreadable_test": "Test images that could not be read and got the fallback",
}


def build_report(run: Run) -> Path:
    """Write ``outputs/<run_name>/report.html`` from the run's files; returns its path."""
    facts = read_json(run.folder / "run.json")
    tasks = sorted({*run.params.tasks, *trained_tasks(facts)})  # another command may have trained the other task
    page = template("report.html.j2").render(
        run=run,
        html_of=html_of,
        sentence=_sentence(run, tasks, facts),
        summary=_summary(tasks, facts),
        archives={f"Task {task}, validated archive": path for task in tasks if (path := facts.get(f"task{task}_submission"))},
        tasks=[_task_section(run, task, facts) for task in tasks],
        provenance=_provenance(facts),
        parameters=parameters_in_force(run),
    )
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def template(name: str) -> Template:
    """A Jinja2 template of ``assets``; values are escaped in those of HTML."""
    environment = Environment(
        loader=PackageLoader("forensics_lib", "assets"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name)


def _sentence(run: Run, tasks: list[str], facts: dict[str, Any]) -> str:
    params = run.params.model_dump() | parameters_in_force(run)
    backbone = params["backbone"]
    named = " and ".join(f"{name} ({task})" for task, name in backbone.items()) if isinstance(backbone, dict) else backbone
    if not run.params.trains:
        named = run.params.detector or f"the mean of {', '.join(run.params.ensemble or [])}"
    return f"A {run.params.run_type} run of Task {' and '.join(tasks)} with {named}, {facts.get('updated', '')}."


def _summary(tasks: list[str], facts: dict[str, Any]) -> pd.DataFrame:
    """The scores that rank runs, with their intervals."""
    rows = {}
    for task in tasks:
        scores, held_out = (facts.get(f"task{task}_{name}") or {} for name in ("validation", "held_out"))
        ends = facts.get(f"task{task}_validation_intervals") or {}
        for key in (key for key in _RANKING[task] if key in scores):
            interval = "{:.3f} to {:.3f}".format(*ends[key]) if key in ends else None
            row = {"validation": scores[key], "95% interval": interval, "held out": held_out.get(key)}
            rows[f"Task {task}: {METRIC_NAMES[key]}"] = row
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis="columns", how="all")


def _task_section(run: Run, task: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The values of a task for the template."""
    found = facts_of_task(facts, task)
    tables = {f"Scores {title}": found[name] for name, title in TABLES.items() if found.get(name)}
    tables["Training data"] = found.get("data", [])
    if findings := found.get("findings", {}).get("rows"):
        tables["Problems of the data"] = findings
    figures = sorted((run.folder / "figures").glob(f"task{task}_*.png"), key=_figure_order)
    return {
        "title": TASK_NAMES[task],
        "scores": _score_table(found),
        "chosen_on": chosen_on(facts, task),
        "without_overlap": bool(found.get("validation_without_overlap")),
        "diagnosis": _diagnosis(found),
        "tables": {title: pd.DataFrame(rows) for title, rows in tables.items()},
        "shortcut": _shortcut_sentence(found),
        "figures": [{"caption": _caption(path), "data": picture_of(path)} for path in figures],
        "unreadable": {title: found[key] for key, title in _UNREADABLE.items() if found.get(key)},
    }


def _diagnosis(found: dict[str, Any]) -> dict[str, Any] | None:
    """What ``doctor`` stored of the results, with its findings as a table; None where it has not seen them."""
    kept = found.get("diagnosis")
    return kept and {"comparisons": kept["comparisons"], "findings": pd.DataFrame(kept["findings"])}


def facts_of_task(facts: dict[str, Any], task: str) -> dict[str, Any]:
    """What ``run.json`` holds of a task, without the task in the keys."""
    return {key.removeprefix(f"task{task}_"): value for key, value in facts.items() if key.startswith(f"task{task}_")}


def _score_table(found: dict[str, Any]) -> pd.DataFrame:
    """Scores on validation and other images, one column each, in the order of ``METRIC_NAMES``."""
    validation, ends = found.get("validation") or {}, found.get("validation_intervals") or {}
    columns = {
        "validation": validation,
        "95% from": {key: value[0] for key, value in ends.items()},
        "to": {key: value[1] for key, value in ends.items()},
        **{f"{kind} beside": scores for kind, scores in (found.get("validation_other_kinds") or {}).items()},
        "without overlap": found.get("validation_without_overlap"),
        "other validation images": found.get("validation_others"),
        "held out": found.get("held_out"),
    }
    table = pd.DataFrame({title: scores for title, scores in columns.items() if scores})
    return table.reindex([key for key in METRIC_NAMES if key in validation]).rename(index=METRIC_NAMES)


def chosen_on(facts: dict[str, Any], task: str) -> str:
    """A sentence on the validation images that epoch and thresholds were chosen on; empty for runs without that record."""
    found = facts.get(f"task{task}_chosen_on")
    if not found:
        return ""
    others = f"; {found['others']:,} others are reported beside them" if found["others"] else ""
    return (
        f"Epoch, calibration and thresholds were chosen on {found['images']:,} validation images "
        f"({found['positive']:,} of them positive): {found['rule']}{others}."
    )


def _shortcut_sentence(facts: dict[str, Any]) -> str:
    """A sentence on the shortcut audit; empty where there was none.  ``facts`` are those of a task."""
    if "shortcut_auc" not in facts:
        return ""
    found = {key: facts.get(key) for key in OF_TRAINING} | (facts.get("trained") or {})
    if np.isnan(found["shortcut_auc"]):
        return "Too few training images to tell whether file facts alone separate the classes."
    text = f"File facts alone separate the training classes with AUC {found['shortcut_auc']:.2f}"
    after, equalized = found["shortcut_auc_of_crops"], "on" if found["equalized"] else "off"
    return text + (f"; of the crops that were trained on, with AUC {after:.2f} (equalize {equalized})." if after else ".")


def _figure_order(path: Path) -> int:
    kind = path.stem.split("_", 1)[1]
    return list(_CAPTIONS).index(kind) if kind in _CAPTIONS else len(_CAPTIONS)


def _caption(path: Path) -> str:
    return _CAPTIONS.get(path.stem.split("_", 1)[1], path.stem)


def picture_of(path: Path) -> str:
    """A figure's file as WebP in base64."""
    with Image.open(path) as opened:
        return base64.b64encode(webp(opened.convert("RGB"))).decode()


def webp(picture: Image.Image) -> bytes:
    """A picture as WebP, lossless where that is the smaller file, as it is for charts."""
    files = []
    for options in ({"lossless": True, "method": 2}, {"quality": 80}):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", **options)
        files.append(buffer.getvalue())
    return min(files, key=len)


def html_of(table: pd.DataFrame) -> str:
    """A table as HTML, with its index only where that is named."""
    named = not isinstance(table.index, pd.RangeIndex)
    return table.to_html(float_format="%.3f", border=0, na_rep="-", index=named).replace("<th></th>", "<td></td>")


def _provenance(facts: dict[str, Any]) -> dict[str, Any]:
    keys = ("params_file", "data", "git", "python", "versions", "machine", "updated")
    wanted = {key: facts.get(key) for key in keys}
    for task in trained_tasks(facts):  # where they were not trained alike
        trained = facts.get(f"task{task}_trained") or {}
        wanted |= {f"task{task}_{key}": trained[key] for key in keys if key in trained and trained[key] != facts.get(key)}
    return wanted | {key: value for key, value in facts.items() if key.endswith(("_seconds", "_machine", "_submission"))}
