"""Two runs on the same validation images: paired differences by group, what either alone gets wrong, traits of its errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from forensics_lib.data.headers import read_headers
from forensics_lib.data.manifest import facts_cache
from forensics_lib.evaluation.metrics import FLAGGED, bootstrap_intervals, rank_auc, roc_auc
from forensics_lib.images.traits import TRAITS, traits_of
from forensics_lib.reports.compare import ComparisonError, compare, evaluated_runs, paths_of, validation_table
from forensics_lib.reports.figures import CLASS_NAMES
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.utils.cores import spread
from forensics_lib.utils.files import read_json
from forensics_lib.utils.progress import progress

FEWEST = 5  # images of a group, and of an error, of which something is said
MOST = 400  # images of each kind whose pixels are looked at
_READ = 20  # images that a process looks at in one go
QUALITIES = ((0, 70, "under 70"), (70, 80, "70 to 79"), (80, 90, "80 to 89"), (90, 101, "90 and more"))
SIDES = ((0, 256, "under 256"), (256, 512, "256 to 511"), (512, 1024, "512 to 1023"), (1024, np.inf, "1024 and more"))
GROUPS = ("source", "generator", "platform", "format", "JPEG quality", "short side", "kind", "method", "region")


@dataclass
class Analysis:
    """What two runs of a task find on the validation images that decide in both."""

    task: str
    runs: tuple[str, str]
    images: pd.DataFrame  # a row per image: path, label, GROUPS, and of either run prob, wrong, for Task B iou, flagged
    differences: pd.DataFrame  # AUC and F1 of all images, second minus first
    groups: pd.DataFrame  # error rates, AUC, IoU of each group: first, second, second minus first with its 95% interval
    errors: pd.DataFrame  # by class: images right in both runs, wrong in one alone, wrong in both; McNemar's p
    traits: pd.DataFrame  # effect sizes of what wrongly judged images differ in from rightly judged ones of their class
    training: pd.DataFrame  # training images by data set and source, of either run

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        names = ("differences", "groups", "errors", "traits", "training")
        return {name: getattr(self, name) for name in names}


def runs_to_compare(names: Sequence[str] = ()) -> tuple[str, str]:
    """The two runs that are named; without names the constrained and the open run that were evaluated last.

    Raises ``ComparisonError`` where they are not two, or not evaluated.
    """
    there = evaluated_runs()
    if not names:
        latest = {facts["params"].get("run_type"): name for name, facts in there.items() if facts.get("params")}
        names = [latest[kind] for kind in ("constrained", "open") if kind in latest]
    if len(set(names)) != 2:
        said = f"found {', '.join(names) or 'none'}; evaluated are {', '.join(there) or 'none'}"
        raise ComparisonError(
            f"an analysis compares two runs, by default the latest constrained and the latest open one: {said}"
        )
    first, second = names
    return first, second


def other_type(run: Run) -> list[str]:
    """A run and the one of the other type (constrained, open) that was evaluated last on a task of it, constrained first.

    Empty where there is none.
    """
    there = evaluated_runs(run.params.tasks)
    others = [
        name for name, facts in there.items() if facts.get("params", {}).get("run_type") not in (None, run.params.run_type)
    ]
    if run.name not in there or not others:
        return []
    return [others[-1], run.name] if run.params.run_type == "open" else [run.name, others[-1]]


def analyze(names: Sequence[str] = ()) -> list[Analysis]:
    """Compare two runs (see ``runs_to_compare``) by each task that both were evaluated on.

    Raises ``ComparisonError`` where they share no task, or no images of both classes.
    """
    runs = runs_to_compare(names)
    differences = compare(list(runs))["differences"]
    found = [_analysis(runs, task, part.drop(columns="task")) for task, part in differences.groupby("task")]
    if not found:
        raise ComparisonError(f"{' and '.join(runs)} were not evaluated on the same images of one task: nothing to compare")
    return found


def _analysis(runs: tuple[str, str], task: str, differences: pd.DataFrame) -> Analysis:
    images = _shared(runs, task)
    data = [read_json(paths_of(run).folder / "run.json").get(f"task{task}_data") or [] for run in runs]
    images["in training"] = _in_training(images, data, runs)
    groups = pd.DataFrame(chain.from_iterable(_of_groups(images, key, task) for key in ("", *GROUPS, "in training")))
    return Analysis(
        task,
        runs,
        images,
        differences=differences.reset_index(drop=True),
        groups=groups.rename(columns={"first": runs[0], "second": runs[1]}).round(4),
        errors=_errors(images, runs, task),
        traits=pd.DataFrame(_traits(images, runs, task), columns=_TRAIT_COLUMNS),
        training=_training(data, runs),
    )


# ---- Images ----------------------------------------------------------------------------------------------------------


def _shared(runs: tuple[str, str], task: str) -> pd.DataFrame:
    """The images that decide in both runs, with the facts they are grouped by and what either run says of them."""
    tables = []
    for run, name in zip(runs, ("first", "second"), strict=True):
        table = validation_table(run, task)
        if table is None:
            raise ComparisonError(f"{run} was not evaluated on Task {task}")
        wrong = (table["prob"] >= stored_thresholds(paths_of(run), task).threshold) != table["label"]
        mine = {f"prob {name}": table["prob"], f"wrong {name}": wrong}
        if "iou" in table:
            mine |= {f"iou {name}": table["iou"], f"flagged {name}": (table["flagged"] > FLAGGED).astype(float)}
        tables.append(table.assign(**mine))
    both = tables[0].join(tables[1].filter(regex=" second$"), how="inner").reset_index()
    headers = read_headers(both["path"].tolist(), facts_cache(f"analysis-{task}", "headers"))
    both["JPEG quality"] = _binned(headers["jpeg_quality"], QUALITIES)
    both["short side"] = _binned(headers[["width", "height"]].min(axis=1), SIDES)
    both["region"] = both["size"].where(both["label"] == 1) if "size" in both else None
    return both.reindex(columns=["path", "label", "group", *GROUPS, *both.filter(regex=" (first|second)$")])


def _binned(values: pd.Series, bins: tuple[tuple[float, float, str], ...]) -> pd.Series:
    found = pd.Series(None, index=values.index, dtype=object)
    for low, high, name in bins:
        found[(values >= low) & (values < high)] = name
    return found


def _in_training(images: pd.DataFrame, data: list[list[dict[str, Any]]], runs: tuple[str, str]) -> pd.Series:
    """Whose training images an image's source was among."""
    known = [{row["source"] for row in rows if row["split"] == "train"} for rows in data]
    first, second = (images["source"].isin(names) for names in known)
    told = np.select([first & second, first, second], ["of both", *(f"of {run} alone" for run in runs)], "of neither")
    return pd.Series(told, index=images.index)


# ---- Groups ----------------------------------------------------------------------------------------------------------


def _of_groups(images: pd.DataFrame, key: str, task: str) -> Iterator[dict[str, Any]]:
    """Rows on each class of each value of a column, but those that are all of their class; these for an empty ``key``."""
    values = images[key] if key else pd.Series("all images", index=images.index)
    for value, label in product(sorted(values.dropna().unique()), (0, 1)):
        part = images[(values == value) & (images["label"] == label)]
        if len(part) < FEWEST or (key and len(part) == (images["label"] == label).sum()):
            continue
        told = {"by": key or "all", "group": value, "class": CLASS_NAMES[task][label], "images": len(part)}
        for measure, first, second, (low, high) in _measures(part, images[images["label"] != label]):
            found = {"measure": measure, "first": first, "second": second}
            yield told | found | {"difference": second - first, "from": low, "to": high}


def _measures(part: pd.DataFrame, others: pd.DataFrame) -> Iterator[tuple[str, float, float, tuple[float, float]]]:
    """Scores of both runs for images of one class, and the interval of the difference over photographs.

    ``auc`` is against all images of the other class.
    """
    wanted = {"error rate": "wrong"}
    if "iou first" in part:
        wanted |= {"mean IoU": "iou"} if part["label"].iloc[0] else {"flagged": "flagged"}
    for measure, name in wanted.items():
        values = part[[f"{name} first", f"{name} second"]].to_numpy(float)
        yield measure, *values.mean(0), _mean_interval(values[:, 1] - values[:, 0], part["group"].to_numpy())
    both = pd.concat([part, others])
    labels, probs = both["label"].to_numpy(int), both[["prob first", "prob second"]].to_numpy()

    def difference(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
        return {"auc": roc_auc(y, p[:, 1]) - roc_auc(y, p[:, 0])}

    ends = bootstrap_intervals(difference, labels, probs, groups=both["group"].to_numpy())["auc"]
    yield "AUC", roc_auc(labels, probs[:, 0]), roc_auc(labels, probs[:, 1]), ends


def _mean_interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a mean over photographs that are drawn with replacement, each with all its images."""

    def mean(_: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
        return {"mean": float(drawn.mean())}

    return bootstrap_intervals(mean, np.zeros(len(values), int), values, rounds=1000, groups=groups)["mean"]


# ---- Errors ----------------------------------------------------------------------------------------------------------


def errors_of(images: pd.DataFrame) -> pd.Series:
    """Which run judges each image wrongly: ``neither``, ``first alone``, ``second alone`` or ``both``."""
    first, second = images["wrong first"].astype(bool), images["wrong second"].astype(bool)
    told = np.select([first & second, first, second], ["both", "first alone", "second alone"], "neither")
    return pd.Series(told, index=images.index)


def error_name(task: str, label: int) -> str:
    return f"{CLASS_NAMES[task][label]} called {CLASS_NAMES[task][1 - label]}"


def _errors(images: pd.DataFrame, runs: tuple[str, str], task: str) -> pd.DataFrame:
    """A row per class; ``p`` is of McNemar's exact test: whether the errors of either run alone are equally many."""
    kinds, rows = errors_of(images), []
    for label in (0, 1):
        count = kinds[images["label"] == label].value_counts()
        alone = [int(count.get(f"{name} alone", 0)) for name in ("first", "second")]
        p = binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
        told = [error_name(task, label), int(count.get("neither", 0)), *alone, int(count.get("both", 0)), round(float(p), 4)]
        rows.append(told)
    return pd.DataFrame(rows, columns=["error", "neither", f"{runs[0]} alone", f"{runs[1]} alone", "both", "p"])


_TRAIT_COLUMNS = ["run", "error", "trait", "wrong", "right", "of wrong", "of right", "effect", "from", "to"]


def _traits(images: pd.DataFrame, runs: tuple[str, str], task: str) -> Iterator[list[Any]]:
    """What images that a run judges wrongly differ in from those of their class that it judges rightly.

    The effect is Cliff's delta: how much likelier it is that a wrongly judged image has the larger value than the smaller one.
    """
    looked = pd.concat([_drawn(part) for _, part in images.groupby(["label", errors_of(images)])])
    chunks = [looked["path"].tolist()[start : start + _READ] for start in range(0, len(looked), _READ)]
    values = chain.from_iterable(progress(spread(traits_of, chunks), "looking at images", total=len(chunks)))
    measured = pd.DataFrame(list(values), columns=list(TRAITS), index=looked.index)
    for place in sorted(looked["platform"].dropna().unique()):
        measured[place] = (looked["platform"] == place).astype(float)
    for (run, name), label in product(zip(runs, ("first", "second"), strict=True), (0, 1)):
        mine = looked["label"] == label
        wrong = looked.loc[mine, f"wrong {name}"].to_numpy(int)
        for trait in measured:
            found = measured.loc[mine, trait].to_numpy(float)
            known = ~np.isnan(found)
            if min(wrong[known].sum(), (1 - wrong[known]).sum()) >= FEWEST and np.ptp(found[known]) > 0:
                effect = _effect(wrong[known], found[known], looked.loc[mine, "group"].to_numpy()[known])
                yield [run, error_name(task, label), trait, *effect]


def _drawn(part: pd.DataFrame) -> pd.DataFrame:
    return part if len(part) <= MOST else part.sample(MOST, random_state=0)


def _effect(wrong: np.ndarray, values: np.ndarray, groups: np.ndarray) -> list[float]:
    """Numbers of images, medians (means of what is 0 or 1), Cliff's delta and its 95% interval."""
    middle = np.mean if set(np.unique(values)) <= {0, 1} else np.median

    def delta(y: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
        return {"delta": 2 * rank_auc(y, drawn) - 1}

    ends = bootstrap_intervals(delta, wrong, values, groups=groups)["delta"]
    counted = [int(wrong.sum()), int((1 - wrong).sum())]
    sides = [float(middle(values[wrong == side])) for side in (1, 0)]
    return [*counted, *np.round([*sides, delta(wrong, values)["delta"], *ends], 4)]


# ---- Training data ---------------------------------------------------------------------------------------------------


def _training(data: list[list[dict[str, Any]]], runs: tuple[str, str]) -> pd.DataFrame:
    """Training images by data set and source, authentic and positive of either run."""
    columns: dict[str, dict[tuple[str, str], int]] = {}
    for run, rows in zip(runs, data, strict=True):
        for kind in ("authentic", "positive"):
            counts = Counter[tuple[str, str]]()
            for row in rows:
                if row["split"] == "train":
                    counts[row["data_set"].rpartition("/")[2], row["source"]] += row[kind]
            columns[f"{run}, {kind}"] = dict(counts)
    table = pd.DataFrame(columns).fillna(0).astype(int)
    return table.rename_axis(["data set", "source"]).reset_index() if len(table) else pd.DataFrame()
