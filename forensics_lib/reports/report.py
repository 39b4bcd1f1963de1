"""``report.html``: one self-contained page with what a run did and found; it works offline and runs no script."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from forensics_lib.run import OF_TRAINING, Run, parameters_in_force, trained_tasks
from forensics_lib.utils.files import read_json, write_text

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#1a1a1a;background:#fff}
h1,h2{line-height:1.2} h2{margin-top:2.2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;font-size:.9rem} td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td,th+th{font-variant-numeric:tabular-nums} .wide{overflow-x:auto;margin:1rem 0} img{max-width:100%;height:auto}
.facts th{font-weight:400;white-space:nowrap;vertical-align:top} .facts td{overflow-wrap:anywhere;min-width:12rem}
.sample{background:#fff3cd;border:2px solid #8a6d00;padding:.8rem;font-weight:600} figure{margin:1rem 0}
figcaption{font-size:.9rem;color:#444} @media print{h2{break-after:avoid} figure{break-inside:avoid}}
"""
METRIC_NAMES = {  # metric key: what the reader sees, in the order of importance
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
_TASKS = {"A": "Task A: real or synthetic", "B": "Task B: manipulated regions"}
TABLES = {  # key in run.json: how its scores are told apart
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
    "sound": "Images that cannot be used or that stand twice, by split",
    "samples": "Training images at native resolution, and what a median filter takes away",
    "spectra": "Average spectra of noise residuals",
    "forgeries": "Forgeries that the library makes of authentic training images",
    "areas": "Size of manipulated regions",
    "shortcut": "How well a file fact alone tells the class",
    "regions": "Manipulated training images with the outline of what was changed",
    "files": "File facts by class",
    "learning": "Loss and validation scores over the epochs",
    "validation": "ROC, precision and recall, probabilities on validation images",
    "calibration": "Calibration: predicted probabilities against what they turned out to be",
    "robustness": "What is left after recompression, scaling, blur, noise and an upload",
    "wrong": "The most wrong images, and where the model sees signs of generation",
    "right": "Images that were judged right, and where the model sees signs of generation",
    "confusion": "Confusion matrix at the threshold",
    "best": "Manipulated images with the best masks",
    "worst": "Manipulated images with the worst masks",
    "borderline": "Images whose probability is next to the threshold",
    "alarms": "Authentic images with the most falsely flagged pixels",
    "test": "What the test images got",
    "submitted": "Probabilities of the test images, and the threshold",
}


def build_report(run: Run) -> Path:
    """Write ``outputs/<run_name>/report.html`` from the run's files; returns its path."""
    facts = read_json(run.folder / "run.json")
    parts = [f"<h1>Run {escape(run.name)}</h1>", f"<p>{escape(_sentence(run, facts))}</p>"]
    if run.sample:
        parts.insert(0, '<p class="sample">BUILT-IN SAMPLE DATA. These results say nothing about real generators.</p>')
    parts += ["<h2>Summary</h2>", *_summary(run, facts)]
    for task in _tasks(run, facts):
        parts += _task_section(run, task, facts)
    again = f"<p><code>make reproduce RUN={escape(run.name)}</code> does this run again and compares every result.</p>"
    parts += ["<h2>Provenance</h2>", again, _table(_provenance(facts))]
    parts += ["<h2>Parameters</h2>", _table(parameters_in_force(run))]
    path = run.folder / "report.html"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(run.name)}</title>'
    view = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    write_text(path, f"{head}{view}<style>{_STYLE}</style><body><main>{''.join(parts)}</main></body></html>\n")
    return path


def _tasks(run: Run, facts: dict[str, Any]) -> list[str]:
    """The tasks of the run, and those that it was trained for by another command."""
    return sorted({*run.params.tasks, *trained_tasks(facts)})


def _sentence(run: Run, facts: dict[str, Any]) -> str:
    params = run.params.model_dump() | parameters_in_force(run)
    tasks, backbone = " and ".join(_tasks(run, facts)), params["backbone"]
    told = " and ".join(f"{name} ({task})" for task, name in backbone.items()) if isinstance(backbone, dict) else backbone
    return f"A {run.params.run_type} run of Task {tasks} with {told}, {facts.get('updated', '')}."


def _summary(run: Run, facts: dict[str, Any]) -> list[str]:
    """The scores that rank, with their intervals, and where the archives are."""
    rows, archives = {}, {}
    for task in _tasks(run, facts):
        scores, held_out = (facts.get(f"task{task}_{name}") or {} for name in ("validation", "held_out"))
        ends = facts.get(f"task{task}_validation_intervals") or {}
        for key in (key for key in _RANKING[task] if key in scores):
            interval = "{:.3f} to {:.3f}".format(*ends[key]) if key in ends else None
            row = {"validation": scores[key], "95% interval": interval, "held out": held_out.get(key)}
            rows[f"Task {task}: {METRIC_NAMES[key]}"] = row
        if f"task{task}_submission" in facts:
            archives[f"Task {task}, validated archive"] = facts[f"task{task}_submission"]
    table = pd.DataFrame.from_dict(rows, orient="index").dropna(axis="columns", how="all")
    return [_frame(table), *([_table(archives)] if archives else [])]


def _task_section(run: Run, task: str, facts: dict[str, Any]) -> list[str]:
    names = {"validation": "validation", "validation_without_overlap": "without overlap"}
    names |= {"validation_others": "other validation images", "held_out": "held out"}
    columns = {title: facts.get(f"task{task}_{name}") for name, title in names.items()}
    validation = columns["validation"] or {}
    ends = facts.get(f"task{task}_validation_intervals") or {}
    intervals = {name: {key: value[number] for key, value in ends.items()} for number, name in enumerate(("95% from", "to"))}
    ordered = {"validation": columns["validation"], **intervals, **columns}
    table = pd.DataFrame({title: scores for title, scores in ordered.items() if scores})
    table = table.reindex([key for key in METRIC_NAMES if key in validation]).rename(index=METRIC_NAMES)
    note = "Thresholds were chosen on the validation images, so scores at them are slightly kind there."
    note += f" {escape(chosen_on(facts, task))}"
    if columns["without overlap"]:
        note += " Without overlap: without the photographs that stand in another split or data set as well."
    parts = [f"<h2>{_TASKS[task]}</h2>", _frame(table), f"<p>{note}</p>"]
    for name, title in TABLES.items():
        if facts.get(f"task{task}_{name}"):
            parts += [f"<h3>Scores {title}</h3>", _frame(pd.DataFrame(facts[f"task{task}_{name}"]))]
    parts += ["<h3>Data that went in</h3>", _frame(pd.DataFrame(facts.get(f"task{task}_data", [])))]
    findings = facts.get(f"task{task}_findings", {}).get("rows")
    if findings:
        parts += ["<h3>What is wrong with the data</h3>", _frame(pd.DataFrame(findings))]
    if f"task{task}_shortcut_auc" in facts:
        parts.append(f"<p>{escape(_shortcut_sentence(task, facts))}</p>")
    parts += [_figure(path) for path in sorted((run.folder / "figures").glob(f"task{task}_*.png"), key=_figure_order)]
    for key, title in (
        (f"task{task}_left_out", "Labelled images left out: unreadable, or without their mask"),
        (f"task{task}_unreadable_in_training", "Training images that could not be read"),
        (f"task{task}_unreadable_test", "Test images that could not be read and got the fallback"),
    ):
        if facts.get(key):
            names = "".join(f"<li>{escape(str(name))}</li>" for name in facts[key][:50])
            parts.append(f"<h3>{title}: {len(facts[key])}</h3><ul>{names}</ul>")
    return parts


def chosen_on(facts: dict[str, Any], task: str) -> str:
    """Which validation images decided, in a sentence; nothing of a run whose record does not tell."""
    found = facts.get(f"task{task}_chosen_on")
    if not found:
        return ""
    others = f"; {found['others']:,} others are reported beside them" if found["others"] else ""
    return (
        f"Epoch, calibration and thresholds were chosen on {found['images']:,} validation images "
        f"({found['positive']:,} of them positive): {found['rule']}{others}."
    )


def _shortcut_sentence(task: str, facts: dict[str, Any]) -> str:
    found = {key: facts.get(f"task{task}_{key}") for key in OF_TRAINING} | (facts.get(f"task{task}_trained") or {})
    if np.isnan(found["shortcut_auc"]):
        return "Too few training images to tell whether file facts alone tell the classes apart."
    text = f"File facts alone tell the training classes apart with AUC {found['shortcut_auc']:.2f}"
    after, equalized = found["shortcut_auc_of_crops"], "on" if found["equalized"] else "off"
    return text + (f"; of the crops that were trained on, with AUC {after:.2f} (equalize {equalized})." if after else ".")


def _figure_order(path: Path) -> int:
    kind = path.stem.split("_", 1)[1]
    return list(_CAPTIONS).index(kind) if kind in _CAPTIONS else len(_CAPTIONS)


def _figure(path: Path) -> str:
    caption = escape(_CAPTIONS.get(path.stem.split("_", 1)[1], path.stem))
    data = base64.b64encode(_small(path)).decode()
    return f'<figure><img alt="{caption}" src="data:image/webp;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _small(path: Path) -> bytes:
    """The figure as WebP, lossless where that is the smaller file, as it is for charts; ``figures/`` has the original."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    files = []
    for options in ({"lossless": True, "method": 2}, {"quality": 80}):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", **options)
        files.append(buffer.getvalue())
    return min(files, key=len)


def _frame(table: pd.DataFrame) -> str:
    named = not isinstance(table.index, pd.RangeIndex)
    return _wide(table.to_html(float_format="%.3f", border=0, na_rep="-", index=named).replace("<th></th>", "<td></td>"))


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in values.items())
    return _wide(f'<table class="facts">{rows}</table>')


def _wide(table: str) -> str:
    """A table that scrolls by itself where the page is too narrow for it, by keyboard too."""
    return f'<div class="wide" tabindex="0">{table}</div>'


def _provenance(facts: dict[str, Any]) -> dict[str, Any]:
    keys = ("params_file", "data", "git", "python", "versions", "machine", "updated")
    wanted = {key: facts.get(key) for key in keys}
    for task in trained_tasks(facts):  # where they were not trained alike
        trained = facts.get(f"task{task}_trained") or {}
        wanted |= {f"task{task}_{key}": trained[key] for key in keys if key in trained and trained[key] != facts.get(key)}
    return wanted | {key: value for key, value in facts.items() if key.endswith(("_seconds", "_machine", "_submission"))}
