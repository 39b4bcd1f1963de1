"""Audits of readable data: shortcuts that separate the classes, duplicates, odd masks, and the findings that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from forensics_lib.data.datasets import TrainingCrops
from forensics_lib.data.duplicates import (
    NearDuplicates,
    exact_duplicates,
    groups_across_splits,
    near_duplicates,
    shared_photographs,
)
from forensics_lib.data.manifest import data_fingerprint, problems, sampled_places
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import EMPTY_MASK, mask_facts
from forensics_lib.params import Params
from forensics_lib.run import Run
from forensics_lib.utils.files import read_json
from forensics_lib.utils.processes import main_process_first
from forensics_lib.utils.progress import progress

SHORTCUT_LIMIT = 0.60  # AUC from file facts alone above which there is a shortcut to close
EQUALIZED_ROWS = 1_000  # images decoded to audit the training crops
LEAF = 5  # smallest leaf of the audit's trees, images
FEWEST = 2 * LEAF  # images of a class that the audit needs
MOST = 0.6  # median share of manipulated pixels above which a set's masks may be inverted
AUDIT_ROWS = 5_000  # most images of an audit: enough to find a shortcut, in seconds


@dataclass
class ShortcutAudit:
    """How well file facts separate the classes, without pixels."""

    auc: float  # of a classifier on all facts, on held-out images
    facts: pd.Series  # of each fact alone, highest first

    @property
    def found(self) -> bool:
        return self.auc > SHORTCUT_LIMIT

    @property
    def of_codecs(self) -> bool:
        """Whether format or JPEG quality alone separates the classes: a shortcut that recompression closes."""
        return bool((self.facts.reindex(["format", "JPEG quality"]) > SHORTCUT_LIMIT).any())

    def message(self) -> str:
        """The result as text."""
        carriers = ", ".join(f"{name} {auc:.2f}" for name, auc in self.facts[self.facts > SHORTCUT_LIMIT].head(4).items())
        if np.isnan(self.auc):
            return "too few images to tell whether file facts alone separate the classes"
        if not self.found:
            return f"file facts alone separate the classes with AUC {self.auc:.2f}: no shortcut (limit {SHORTCUT_LIMIT:.2f})"
        return (
            f"SHORTCUT: file facts alone separate the classes with AUC {self.auc:.2f} (limit {SHORTCUT_LIMIT:.2f}). "
            f"Carried by: {carriers or 'several together'}. A model shown such files may learn them instead of the traces."
        )

    def remedies(self) -> list[str]:
        """The remedies, by kind of fact that carries the shortcut."""
        carriers = set(self.facts[self.facts > SHORTCUT_LIMIT].index)
        return [text for facts, text in _REMEDIES.items() if carriers & set(facts)]


_REMEDIES = {
    ("long side", "short side", "aspect ratio"): "size and shape: crops of one size at native resolution (always done)",
    ("format", "JPEG quality"): "format and quality: every crop recompressed by one distribution (equalize)",
    ("bytes per pixel",): "bytes per pixel: recompression too, where format or quality differ; else it is texture and stays",
    ("camera EXIF",): "camera EXIF: the network sees pixels alone (always so)",
}


def shortcut_audit(manifest: pd.DataFrame, split: str = "train", seed: int = 0) -> ShortcutAudit:
    """Audit whether size, format and compression of files alone separate the classes.

    Detectors learn such differences instead of the traces of generation (Grommelt et al., arXiv 2403.17608).  Random forests
    are cross-validated without common groups, on at most ``AUDIT_ROWS`` images of a split without errors; the AUCs are NaN
    if a class has too few images or groups.
    """
    rows = manifest[(manifest["split"] == split) & manifest["error"].isna()]
    rows = rows.iloc[_drawn(rows, AUDIT_ROWS, seed)]
    facts, labels, groups = shortcut_features(rows), rows["label"].to_numpy(int), rows["group"].to_numpy()
    folds = _folds(facts, labels, groups, seed)
    if not folds:
        return ShortcutAudit(float("nan"), pd.Series(dtype=float))
    formats = [name for name in facts if name.startswith("format ")]
    columns_of = {name: [name] for name in facts if name not in formats} | {"format": formats}
    each = progress(columns_of.items(), "auditing file facts")
    alone = {name: _held_out_auc(facts[columns], labels, folds, seed) for name, columns in each}
    everything = _held_out_auc(facts, labels, folds, seed)
    return ShortcutAudit(everything, pd.Series(alone).sort_values(ascending=False, kind="stable"))


def equalized_audit(rows: pd.DataFrame, crops: TrainingCrops, seed: int = 0) -> ShortcutAudit:
    """Repeat the audit on training crops: the images of ``rows`` after the degradations of ``crops``.

    At most ``EQUALIZED_ROWS`` images are drawn, since each is decoded.
    """
    drawn = rows.iloc[_drawn(rows, EQUALIZED_ROWS, seed)]
    shown = progress(drawn.index, "auditing the training crops")
    facts = [crops.source_facts((seed, index, 0), rows.loc[index]) for index in shown]
    table = drawn.assign(**pd.DataFrame(facts, index=drawn.index))
    return shortcut_audit(table[table["width"].notna()], "train", seed)


def _drawn(rows: pd.DataFrame, limit: int, seed: int) -> np.ndarray:
    """The positions of at most ``limit`` rows: both classes equally often if possible, of as many photographs as possible."""
    labels = rows["label"].to_numpy(int)
    few, many = sorted((np.flatnonzero(labels == label) for label in (0, 1)), key=len)
    smaller = min(limit // 2, len(few))
    parts = ((few, smaller), (many, limit - smaller))
    return np.sort(np.concatenate([part[sampled_places(rows.iloc[part], count, seed, by="group")] for part, count in parts]))


def shortcut_features(rows: pd.DataFrame) -> pd.DataFrame:
    """The file facts as numbers: a column per fact, and one per format."""
    width, height = rows["width"].astype(float), rows["height"].astype(float)
    numbers = {
        "long side": np.maximum(width, height),
        "short side": np.minimum(width, height),
        "aspect ratio": width / height,
        "bytes per pixel": rows["bytes"].astype(float) / (width * height),
        "JPEG quality": rows["jpeg_quality"].astype(float).fillna(-1),
        "camera EXIF": rows["camera"].astype(float),
    }
    return pd.DataFrame(numbers).join(pd.get_dummies(rows["format"], prefix="format", prefix_sep=" ").astype(float))


def _folds(facts: pd.DataFrame, labels: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Up to three folds (fitted, held out) without common groups; none if a class has too few images or groups."""
    number = min([3, *(len(set(groups[labels == label])) for label in (0, 1))])
    if number < 2 or np.bincount(labels, minlength=2).min() < FEWEST:
        return []
    folds = list(StratifiedGroupKFold(number, shuffle=True, random_state=seed % 2**32).split(facts, labels, groups))
    return folds if all(len(set(labels[fitted])) == 2 for fitted, _ in folds) else []


def _held_out_auc(facts: pd.DataFrame, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], seed: int) -> float:
    scores = np.zeros(len(labels))
    for fit, held in folds:
        forest = RandomForestClassifier(40, min_samples_leaf=LEAF, random_state=seed % 2**32)
        scores[held] = forest.fit(facts.iloc[fit], labels[fit]).predict_proba(facts.iloc[held])[:, 1]
    return float(roc_auc_score(labels, scores))


def mask_areas(manifest: pd.DataFrame, count: int = 400, seed: int = 0) -> pd.DataFrame:
    """Measure the masks of at most ``count`` images, stratified by method.

    Columns are data_set, split, source, method, kind, ``share`` (of manipulated pixels), ``values`` (the number of grey
    values) and ``error``, why a mask cannot be used; the measures are then missing.
    """
    marked = manifest[manifest["mask_path"].notna() & manifest["error"].isna()]
    drawn = marked.iloc[sampled_places(marked, count, seed, by="method")]
    facts: list[tuple[float, float, str | None]] = []
    for row in progress(drawn.to_dict("records"), "measuring masks"):
        try:
            facts.append((*mask_facts(row["mask_path"], (int(row["height"]), int(row["width"]))), None))
        except ImageError as error:
            facts.append((np.nan, np.nan, str(error)))
    measured = pd.DataFrame(facts, columns=["share", "values", "error"], index=drawn.index)
    return drawn[["data_set", "split", "source", "method", "kind"]].join(measured).reset_index(drop=True)


def mask_findings(manifest: pd.DataFrame, masks: pd.DataFrame) -> list[tuple[str, int, str]]:
    """Odd masks, by the measures of ``mask_areas``: finding, count and remedy of each kind."""
    medians = masks.groupby("data_set")["share"].median()
    full = medians[medians > MOST]
    several = masks[masks["values"] > 2].groupby("data_set").size()
    empty = masks["error"].str.contains(EMPTY_MASK, regex=False, na=False)
    unusable = masks[masks["error"].notna() & ~empty]
    unmasked = manifest["label"].eq(1) & manifest["mask_path"].isna()
    if manifest["mask_path"].isna().all():  # a manifest of Task A
        unmasked &= manifest["kind"].isin(["sp", "fr"])
    looked = f"of {len(masks)} masks that were measured"
    inverted = f"inverted? white is what was manipulated: {_by_set(full.map('median {:.0%}'.format))}"
    soft = f"{looked}; soft edges are fine, ids of objects or classes are not: {_by_set(several)}"
    return [
        ("manipulated images without a mask", int(unmasked.sum()), "name it in mask_path, or take the image out"),
        ("masks that mark nothing", int(empty.sum()), f"{looked}; authentic images belong in label 0: {_first(masks[empty])}"),
        ("masks that cannot be used", len(unusable), f"{looked}; the first: {_first(unusable)}"),
        (f"sets whose regions fill over {MOST:.0%} of an image", len(full), inverted),
        ("masks with more than two values", int(several.sum()), soft),
    ]


def _by_set(values: pd.Series) -> str:
    return ", ".join(f"{Path(name).name} {value}" for name, value in values.items())


def _first(masks: pd.DataFrame) -> str:
    return masks["error"].iloc[0] if len(masks) else ""


def balance(manifest: pd.DataFrame, column: str) -> pd.DataFrame:
    """Usable images by split and ``column`` (source, generator, method or kind), a column per class."""
    good = manifest[manifest["error"].isna()]
    named = good.assign(**{column: good[column].fillna("-")})
    return pd.crosstab([named["split"], named[column]], named["label"].map({0: "authentic", 1: "positive"}))


@dataclass
class Audit:
    """All audits of a task's data."""

    shortcut: ShortcutAudit
    exact: pd.DataFrame
    near: NearDuplicates
    groups: pd.DataFrame
    shared: pd.DataFrame
    masks: pd.DataFrame  # of mask_areas; empty for Task A
    findings: pd.DataFrame = field(init=False)  # what to fix or to know: finding, count, remedy

    def duplicates(self) -> str:
        """The number of duplicates, as text."""
        across = int(self.exact.groupby("set")["label"].nunique().gt(1).sum())
        return (
            f"{len(self.exact)} files with byte-for-byte duplicates, {across} sets of duplicates across classes; "
            f"{len(self.groups)} photographs in several splits"
        )


def audit(run: Run, task: str, manifest: pd.DataFrame) -> Audit:
    """Run all audits of a task's data: shortcuts, duplicates, photographs in several splits, and masks.

    The findings that follow are kept in ``run.json``.
    """
    result = Audit(
        shortcut=shortcut_audit(manifest),
        exact=exact_duplicates(manifest),
        near=near_duplicates(manifest),
        groups=groups_across_splits(manifest),
        shared=shared_photographs(manifest),
        masks=mask_areas(manifest),
    )
    result.findings = _findings(manifest, result)
    kept = {"data_fingerprint": data_fingerprint(manifest), "rows": result.findings.astype(object).to_dict("records")}
    run.record(**{f"task{task}_findings": kept})
    return result


def findings_of(run: Run, task: str, manifest: pd.DataFrame) -> list[dict[str, Any]]:
    """The findings that ``audit`` stored for the same data, else those of a new audit: finding, count and remedy of each.

    Of several processes the main one audits, and the others read its findings.
    """

    def kept_or_new() -> list[dict[str, Any]]:
        kept = read_json(run.folder / "run.json").get(f"task{task}_findings")
        if not kept or kept["data_fingerprint"] != data_fingerprint(manifest):
            return audit(run, task, manifest).findings.to_dict("records")
        return kept["rows"]

    return main_process_first(kept_or_new)


def _findings(manifest: pd.DataFrame, audits: Audit) -> pd.DataFrame:
    """What to fix or to know before training, with remedies; no rows if there is nothing."""
    shortcut, near = audits.shortcut, audits.near
    equal = audits.exact.groupby("set")[["label", "split"]].nunique().gt(1).sum()
    counts = pd.crosstab(manifest["split"], manifest["label"]).reindex(index=["train", "val"], columns=[0, 1], fill_value=0)
    uneven = int(counts.max(axis=1).gt(5 * counts.min(axis=1)).sum())
    optimistic = "validation scores will be optimistic: remove these from training"
    found = [
        ("files left out", len(problems(manifest, repeats=False)), "see the list; restore them, or train without"),
        ("notes on folders and names", len(manifest.attrs.get("notes", [])), "see the notes printed above"),
        ("file facts that reveal the class", int(shortcut.found), "; ".join(shortcut.remedies()) or "see the table of facts"),
        ("equal files in both classes", equal["label"], "remove them from one class"),
        ("equal files in several splits", equal["split"], "remove them from training"),
        ("look-alikes in both classes", near.across("label"), "expected for aligned twins; otherwise remove one of each pair"),
        ("look-alikes in several splits", near.across("split"), optimistic),
        ("photographs in several splits", len(audits.groups), "scores with and without them are reported"),
        ("splits with a class over 5 times the other", uneven, "epochs draw both classes equally often"),
        *mask_findings(manifest, audits.masks),
    ]
    return pd.DataFrame([item for item in found if item[1]], columns=["finding", "count", "remedy"])


def close_shortcut(run: Run, task: str, rows: pd.DataFrame) -> bool:
    """Audit for shortcuts before training, and print the result; returns whether crops are to be equalized."""
    audit = shortcut_audit(rows)
    print(audit.message())
    equalize = {"auto": audit.of_codecs, "always": True, "never": False}[run.params.equalize]
    facts = {"shortcut_auc": round(audit.auc, 3), "equalized": equalize, "shortcut_auc_of_crops": None}
    if audit.found:
        print("\n".join(f"  closed by {remedy}" for remedy in audit.remedies()))
        after = equalized_audit(rows, training_crops(rows, task, run.params, equalize=equalize), run.params.seed_for())
        print(f"  of the training crops, equalize {'on' if equalize else 'off'}: {after.message()}")
        facts["shortcut_auc_of_crops"] = round(after.auc, 3)
    run.record(**{f"task{task}_{name}": value for name, value in facts.items()})
    return equalize


def training_crops(
    rows: pd.DataFrame, task: str, params: Params, *, equalize: bool, donors: pd.DataFrame | None = None
) -> TrainingCrops:
    """The training crops of a task; for Task B ``donors`` are rows of synthetic images."""
    if task == "A":
        return TrainingCrops(rows, params.crop_size, params.degrade, masks=False, equalize=equalize)
    return TrainingCrops(
        rows, params.crop_size, params.degrade_b, masks=True, equalize=equalize, paste=params.paste, donors=donors
    )
