"""Comparison of runs from their files: scores with intervals, differing parameters, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forensics_lib.evaluation.metrics import bootstrap_intervals, f1_score, roc_auc
from forensics_lib.params import Params
from forensics_lib.reports.figures import BLUE, ORANGE, new_figure
from forensics_lib.run import Run, parameters_in_force, stored_thresholds
from forensics_lib.utils.files import home, read_json

SHOWN = {"A": ("auc", "f1", "fpr", "ece"), "B": ("auc", "f1", "fpr", "iou_manipulated", "submitted_iou_all")}
ROUNDS = 1000


class ComparisonError(ValueError):
    """Runs cannot be compared; the message says which and why."""


def compare(runs: list[str]) -> dict[str, pd.DataFrame]:
    """Tables about runs in ``outputs``: ``scores``, ``differences`` of each run to the one before, ``parameters``, ``cost``.

    Scores are of each run's own validation images that decide, with 95% intervals.  Differences are of those that two runs
    share, by paired bootstrap over photographs: both runs' scores are taken on the same draws.  Raises ``ComparisonError``.
    """
    if len(set(runs)) < 2:
        raise ComparisonError(f"two or more different runs are needed; found {runs or 'none'}")
    there = evaluated_runs()
    missing = [run for run in runs if run not in there]
    if missing:
        raise ComparisonError(f"no evaluated run {', '.join(missing)}; there are {', '.join(sorted(there)) or 'none'}")
    facts = {run: there[run] for run in runs}
    return {
        "scores": _scores(facts),
        "differences": _differences(facts),
        "parameters": _parameters(facts),
        "cost": _cost(facts),
    }


def recent_runs(run: Run, others: int = 2) -> list[str]:
    """Names of up to ``others`` further runs in ``outputs`` that were evaluated last, the latest last, then this one's."""
    found = [name for name in evaluated_runs(run.params.tasks) if name != run.name]
    return [*found[-others:], run.name]


def evaluated_runs(tasks: Iterable[str] = "AB") -> dict[str, dict[str, Any]]:
    """What ``run.json`` holds of each run in ``outputs`` that was evaluated on any of some tasks, the latest last."""
    paths = sorted((home() / "outputs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    found = {path.parent.name: read_json(path) for path in paths}
    return {name: facts for name, facts in found.items() if any(f"task{task}_validation" in facts for task in tasks)}


def _scores(facts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for task, keys in SHOWN.items():
        for run, fact in facts.items():
            scores = fact.get(f"task{task}_validation") or {}
            ends = fact.get(f"task{task}_validation_intervals") or {}
            for key in (key for key in keys if key in scores):
                low, high = ends.get(key, (np.nan, np.nan))
                rows.append([task, key, run, scores[key], low, high])
    return pd.DataFrame(rows, columns=["task", "score", "run", "value", "from", "to"]).round(4)


def _differences(facts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for first, second in pairwise(facts):
        for task in SHOWN:
            tables = [table for run in (first, second) if (table := validation_table(run, task)) is not None]
            if len(tables) < 2:
                continue
            first_table, second_table = (table[["label", "prob", "group"]] for table in tables)
            both = first_table.add_suffix("_first").join(second_table.add_suffix("_second"), how="inner")
            if both.empty or both["label_first"].nunique() < 2:
                continue
            thresholds = [stored_thresholds(paths_of(run), task).threshold for run in (first, second)]
            for key, (value, low, high) in _paired(both, thresholds).items():
                rows.append([task, key, f"{second} minus {first}", value, low, high, len(both)])
    columns = ["task", "score", "difference of", "value", "from", "to", "images"]
    return pd.DataFrame(rows, columns=columns).round(4)


def paths_of(run: str) -> Run:
    """A run of this name, for where its files are."""
    return Run(Params(run_name=run), home())


def validation_table(run: str, task: str) -> pd.DataFrame | None:
    """A run's validation images that decided, by path, as evaluated; all of them where its file does not tell.

    None where the run was not evaluated on the task.
    """
    path = paths_of(run).val_probs(task)
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype={"group": str}, keep_default_na=False, na_values=[""])
    table = table[table["deciding"]] if "deciding" in table else table
    table = table.assign(group=table.get("group", table["path"])).drop_duplicates("path")
    return table.set_index("path")


def _paired(both: pd.DataFrame, thresholds: list[float]) -> dict[str, tuple[float, float, float]]:
    """The difference of AUC and F1, and its 95% interval over draws of photographs, as ``bootstrap_intervals``."""
    labels, probs = both["label_first"].to_numpy(int), both[["prob_first", "prob_second"]].to_numpy()

    def differences(y: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
        first, second = drawn.T
        f1 = f1_score(y, second >= thresholds[1]) - f1_score(y, first >= thresholds[0])
        return {"auc": roc_auc(y, second) - roc_auc(y, first), "f1": f1}

    ends = bootstrap_intervals(differences, labels, probs, ROUNDS, groups=both["group_first"].to_numpy())
    return {key: (value, *ends[key]) for key, value in differences(labels, probs).items()}


def _parameters(facts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The parameters in which the runs differ."""
    table = pd.DataFrame({run: pd.Series(parameters_in_force(paths_of(run)), dtype=object) for run in facts})
    told = table.drop("run_name", errors="ignore").map(str)  # astype(str) would leave None as it is, unlike itself
    return told[told.ne(told.iloc[:, 0], axis=0).any(axis=1)]


def _cost(facts: dict[str, dict[str, Any]]) -> pd.DataFrame:
    rows = {}
    for run, fact in facts.items():
        seconds = {f"task {task}, training, s": fact.get(f"task{task}_training_seconds") for task in "AB"}
        rows[run] = seconds | {"all notebooks, s": fact.get("pipeline_seconds"), "machine": fact.get("machine")}
    return pd.DataFrame(rows).dropna(how="all")


def comparison_figure(tables: dict[str, pd.DataFrame]) -> Figure:
    """Scores with their intervals, a panel for each task and score; runs from top to bottom."""
    groups = list(tables["scores"].groupby(["task", "score"], sort=False))
    runs = list(dict.fromkeys(tables["scores"]["run"]))
    figure, axes = new_figure(1, len(groups), 2.4 * len(groups) + 1, 0.4 * len(runs) + 1.4)
    for axis, ((task, score), part) in zip(axes[0], groups, strict=True):
        places = [runs.index(run) for run in part["run"]]
        axis.hlines(places, part["from"], part["to"], color=BLUE, linewidth=3, alpha=0.5)
        axis.scatter(part["value"], places, color=ORANGE, zorder=3)
        axis.set(title=f"Task {task}: {score}", ylim=(len(runs) - 0.5, -0.5))
        axis.set_yticks(range(len(runs)), runs if axis is axes[0, 0] else [""] * len(runs))
    figure.suptitle("Validation, with 95% intervals", fontsize=10)
    return figure
