"""What can be wrong with data that reads well: shortcuts that tell the classes apart, duplicates, photos in two splits."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from forensics_lib.datasets import TrainingCrops
from forensics_lib.progress import progress

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
    ("bytes per pixel",): "bytes per pixel: the same recompression; what is left is the pictures' own texture",
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
    alone = {name: _held_out_auc(facts[columns], labels, groups, folds, seed) for name, columns in _by_fact(facts).items()}
    everything = _held_out_auc(facts, labels, groups, folds, seed)
    return ShortcutAudit(everything, pd.Series(alone).sort_values(ascending=False, kind="stable"))


def equalized_audit(rows: pd.DataFrame, crops: TrainingCrops, seed: int = 0) -> ShortcutAudit:
    """The audit repeated on what ``crops`` makes its tensors from: the images of ``rows`` after their degradations.

    At most ``EQUALIZED_ROWS`` images are drawn, since each is decoded.
    """
    drawn = rows.sample(min(EQUALIZED_ROWS, len(rows)), random_state=seed)
    facts = [crops.source_facts(index, rows.loc[index]) for index in progress(drawn.index, "auditing the training crops")]
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


def exact_duplicates(manifest: pd.DataFrame, jobs: int = 16) -> pd.DataFrame:
    """Files with the same bytes: path, label, split and a number per set of equal files.

    Only files that share their size in bytes are read.
    """
    good = manifest[manifest["error"].isna()]
    same_size = good[good.duplicated("bytes", keep=False)]
    with ThreadPoolExecutor(jobs) as pool:
        digests = list(progress(pool.map(_digest, same_size["path"]), "comparing files", total=len(same_size)))
    same_size = same_size.assign(digest=digests)
    equal = same_size[same_size.duplicated("digest", keep=False)]
    return equal.assign(set=equal.groupby("digest").ngroup())[["set", "split", "label", "path"]].sort_values(["set", "path"])


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def groups_across_splits(manifest: pd.DataFrame) -> pd.DataFrame:
    """Photographs whose images stand in several splits: one row each, with the images per split."""
    good = manifest[manifest["error"].isna()]
    counted = pd.crosstab(good["group"], good["split"])
    return counted[(counted > 0).sum(axis=1) > 1]
