"""What can be wrong with data that reads well: shortcuts that tell the classes apart, and all findings of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from forensics_lib.datasets import TrainingCrops
from forensics_lib.duplicates import (
    NearDuplicates,
    exact_duplicates,
    groups_across_splits,
    near_duplicates,
    shared_photographs,
)
from forensics_lib.files import read_json
from forensics_lib.images import ImageError, read_mask
from forensics_lib.manifest import data_fingerprint, problems
from forensics_lib.progress import progress
from forensics_lib.runs import Run

SHORTCUT_LIMIT = 0.60  # an AUC above this from file facts alone is a shortcut worth closing
EQUALIZED_ROWS = 1_000  # images decoded to see whether the training crops still hold it
AUDIT_ROWS = 5_000  # of more images as many are drawn: enough to see a shortcut, in seconds


@dataclass
class ShortcutAudit:
    """How well file facts alone, without a single pixel, tell the classes apart."""

    auc: float  # of a classifier that sees all facts, on images it was not fitted on
    facts: pd.Series  # the same with one fact alone, highest first

    @property
    def found(self) -> bool:
        return self.auc > SHORTCUT_LIMIT

    @property
    def of_codecs(self) -> bool:
        """Whether format or JPEG quality alone tell the class: what a common recompression closes."""
        return bool((self.facts.reindex(["format", "JPEG quality"]) > SHORTCUT_LIMIT).any())

    def message(self) -> str:
        """The finding in a sentence or two."""
        carriers = ", ".join(f"{name} {auc:.2f}" for name, auc in self.facts[self.facts > SHORTCUT_LIMIT].head(4).items())
        if np.isnan(self.auc):
            return "too few images to tell whether file facts alone tell the classes apart"
        if not self.found:
            return f"file facts alone tell the classes apart with AUC {self.auc:.2f}: no shortcut (limit {SHORTCUT_LIMIT:.2f})"
        return (
            f"SHORTCUT: file facts alone tell the classes apart with AUC {self.auc:.2f} (limit {SHORTCUT_LIMIT:.2f}). "
            f"Carried by: {carriers or 'several together'}. A model shown such files may learn them instead of the traces."
        )

    def remedies(self) -> list[str]:
        """What closes it, for each kind of fact that carries it."""
        carriers = set(self.facts[self.facts > SHORTCUT_LIMIT].index)
        return [text for facts, text in _REMEDIES.items() if carriers & set(facts)]


_REMEDIES = {
    ("long side", "short side", "aspect ratio"): "size and shape: crops of one size at native resolution (always done)",
    ("format", "JPEG quality"): "format and quality: every crop recompressed by one distribution (equalize)",
    ("bytes per pixel",): "bytes per pixel: recompression too, where format or quality differ; else it is texture and stays",
    ("camera EXIF",): "camera EXIF: the network sees pixels alone (always so)",
}


def shortcut_audit(manifest: pd.DataFrame, split: str = "train", seed: int = 0) -> ShortcutAudit:
    """Cross-validated by group: can size, format and compression of a file tell its class?

    The reason: classes that differ in format or size make a detector learn the format (Grommelt et al., arXiv
    2403.17608).  Rows with errors are left out; with fewer than two groups in a class the AUC is NaN.
    """
    rows = manifest[(manifest["split"] == split) & manifest["error"].isna()]
    if len(rows) > AUDIT_ROWS:
        rows = rows.sample(AUDIT_ROWS, random_state=seed)
    facts, labels, groups = file_facts(rows), rows["label"].to_numpy(int), rows["group"].to_numpy()
    folds = min([3, *(rows.loc[rows["label"] == label, "group"].nunique() for label in (0, 1))])
    if folds < 2:
        return ShortcutAudit(float("nan"), pd.Series(dtype=float))
    each = progress(_by_fact(facts).items(), "auditing file facts")
    alone = {name: _held_out_auc(facts[columns], labels, groups, folds, seed) for name, columns in each}
    everything = _held_out_auc(facts, labels, groups, folds, seed)
    return ShortcutAudit(everything, pd.Series(alone).sort_values(ascending=False, kind="stable"))


def equalized_audit(rows: pd.DataFrame, crops: TrainingCrops, seed: int = 0) -> ShortcutAudit:
    """The audit repeated on what ``crops`` makes its tensors from: the images of ``rows`` after their degradations.

    At most ``EQUALIZED_ROWS`` images are drawn, since each is decoded.
    """
    drawn = rows.sample(min(EQUALIZED_ROWS, len(rows)), random_state=seed)
    shown = progress(drawn.index, "auditing the training crops")
    facts = [crops.source_facts((seed, index), rows.loc[index]) for index in shown]
    table = drawn.assign(**pd.DataFrame(facts, index=drawn.index))
    return shortcut_audit(table[table["width"].notna()], "train", seed)


def file_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """What a file says of itself, as numbers: one column a fact, and one for each format."""
    width, height = rows["width"].astype(float), rows["height"].astype(float)
    numbers = pd.DataFrame(
        {
            "long side": np.maximum(width, height),
            "short side": np.minimum(width, height),
            "aspect ratio": width / height,
            "bytes per pixel": rows["bytes"].astype(float) / (width * height),
            "JPEG quality": rows["jpeg_quality"].astype(float).fillna(-1),
            "camera EXIF": rows["camera"].astype(float),
        }
    )
    return numbers.join(pd.get_dummies(rows["format"], prefix="format", prefix_sep=" ").astype(float))


def _by_fact(facts: pd.DataFrame) -> dict[str, list[str]]:
    formats = [name for name in facts if name.startswith("format ")]
    return {name: [name] for name in facts if name not in formats} | {"format": formats}


def _held_out_auc(facts: pd.DataFrame, labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> float:
    scores = np.zeros(len(labels))
    for fit, held in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(facts, labels, groups):
        forest = RandomForestClassifier(40, min_samples_leaf=5, random_state=seed)
        scores[held] = forest.fit(facts.iloc[fit], labels[fit]).predict_proba(facts.iloc[held])[:, 1]
    return float(roc_auc_score(labels, scores))


def mask_areas(manifest: pd.DataFrame, count: int = 400, seed: int = 0) -> pd.DataFrame:
    """The share of manipulated pixels of at most ``count`` images, with split, method and kind."""
    marked = manifest[manifest["mask_path"].notna() & manifest["error"].isna()]
    drawn = marked.sample(min(count, len(marked)), random_state=seed)
    shares = []
    for row in progress(drawn.to_dict("records"), "measuring masks"):
        try:
            shares.append(read_mask(row["mask_path"], (int(row["height"]), int(row["width"]))).mean())
        except ImageError:
            shares.append(np.nan)
    return drawn[["split", "source", "method", "kind"]].assign(share=shares).dropna(subset=["share"]).reset_index(drop=True)


def balance(manifest: pd.DataFrame, column: str) -> pd.DataFrame:
    """Usable images by split and ``column`` (source, generator, method or kind), a column per class."""
    good = manifest[manifest["error"].isna()]
    named = good.assign(**{column: good[column].fillna("-")})
    return pd.crosstab([named["split"], named[column]], named["label"].map({0: "authentic", 1: "positive"}))


@dataclass
class Audit:
    """All that was looked for in the data of a task."""

    shortcut: ShortcutAudit
    exact: pd.DataFrame
    near: NearDuplicates
    groups: pd.DataFrame
    shared: pd.DataFrame
    findings: pd.DataFrame  # what must be fixed, or known: finding, count, remedy

    def duplicates(self) -> str:
        """What stands twice, in words."""
        across = int(self.exact.groupby("set")["label"].nunique().gt(1).sum())
        return (
            f"{len(self.exact)} files with a byte-for-byte twin, {across} twins across classes; "
            f"{len(self.groups)} photographs in several splits"
        )


def audit(run: Run, task: str, manifest: pd.DataFrame) -> Audit:
    """Every audit of a task's manifest, and what follows from them; ``run.json`` keeps the findings."""
    shortcut, exact, near = shortcut_audit(manifest), exact_duplicates(manifest), near_duplicates(manifest)
    groups, shared = groups_across_splits(manifest), shared_photographs(manifest)
    findings = _findings(manifest, shortcut, exact, near, groups)
    kept = {"data_fingerprint": data_fingerprint(manifest), "rows": findings.astype(object).to_dict("records")}
    run.record(**{f"task{task}_findings": kept})
    return Audit(shortcut, exact, near, groups, shared, findings)


def findings_of(run: Run, task: str, manifest: pd.DataFrame) -> list[dict[str, Any]]:
    """The findings that ``audit`` kept for this very data, else of a new audit: finding, count and remedy of each."""
    kept = read_json(run.folder / "run.json").get(f"task{task}_findings")
    if not kept or kept["data_fingerprint"] != data_fingerprint(manifest):
        return audit(run, task, manifest).findings.to_dict("records")
    return kept["rows"]


def _findings(
    manifest: pd.DataFrame, shortcut: ShortcutAudit, exact: pd.DataFrame, near: NearDuplicates, groups: pd.DataFrame
) -> pd.DataFrame:
    """What must be fixed or known before training, with its remedy; nothing where all is well."""
    twins = exact.groupby("set")[["label", "split"]].nunique().gt(1).sum()
    counts = pd.crosstab(manifest["split"], manifest["label"]).reindex(index=["train", "val"], columns=[0, 1], fill_value=0)
    uneven = int((counts.max(axis=1) > 5 * counts.min(axis=1)).sum())
    found = [
        ("files left out", len(problems(manifest, repeats=False)), "see the list; restore them, or live without"),
        ("notes on folders and names", len(manifest.attrs.get("notes", [])), "see the notes printed above"),
        ("facts that tell the class", int(shortcut.found), "; ".join(shortcut.remedies()) or "look at the table of facts"),
        ("equal files in both classes", twins["label"], "remove them from one class"),
        ("equal files in several splits", twins["split"], "remove them from training"),
        ("look-alikes in both classes", near.across("label"), "twins of a photo are well; else remove"),
        (
            "look-alikes in several splits",
            near.across("split"),
            "scores are too kind: remove from training",
        ),
        ("photographs in several splits", len(groups), "scores with and without them are reported"),
        ("splits with a class over 5 times the other", uneven, "epochs draw both classes equally often"),
    ]
    return pd.DataFrame([item for item in found if item[1]], columns=["finding", "count", "remedy"])
