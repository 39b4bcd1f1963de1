"""The score of a Task B archive against true masks, as TGIF's authors compute it for localization.

Their code (``localization_metrics.py`` of IDLabMedia/tgif-dataset) flags the pixels above the threshold, takes the IoU of each
image, 1 where neither mask nor truth marks a pixel, and the mean over images: of real ones, of fake ones, and of all.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.data.tables import read_text_table
from forensics_lib.evaluation.metrics import f1_score
from forensics_lib.images.io import SUFFIXES, ImageError
from forensics_lib.images.masks import EMPTY_MASK, read_mask
from forensics_lib.submission.validate import HEADERS, SCORES
from forensics_lib.utils.progress import progress


class ScoreError(ValueError):
    """An archive cannot be scored against these masks; the message says what does not fit."""


def score_archive(archive: Path, truth: Path) -> pd.DataFrame:
    """Score the masks of a Task B archive.

    Args:
        archive: the zip with ``scores.csv`` and a mask ``<stem>.npz`` for each of its images.
        truth: a folder of true masks, ``<stem>.png`` or ``<stem>_mask.png`` for an image ``<stem>.jpg``, where images without
            one are authentic; or a CSV with ``image_id`` (or ``path``) and ``mask_path``, relative to its folder and empty for
            authentic images, such as a run's ``_val_probs.csv``.

    Returns:
        A row per image of the archive: image_id, manipulated (whether the true mask marks a pixel), label, iou in [0, 1].

    Raises:
        ScoreError: archive and masks are not of the same images, or the archive has no table or mask.
        ImageError: a true mask cannot be read, or is of another size than the archive's.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            table = pd.read_csv(io.BytesIO(opened.read(SCORES)), dtype={"image_id": str}, keep_default_na=False)
            if list(table.columns) != HEADERS["B"]:
                raise ScoreError(f"{archive.name}: {SCORES} has the columns {list(table.columns)}: validate it first")
            if twice := table.loc[table["image_id"].duplicated(), "image_id"].tolist():
                raise ScoreError(f"{archive.name}: {SCORES} lists {twice[0]} more than once: validate it first")
            masks = _true_masks(truth, table["image_id"].tolist())
            table["manipulated"], table["iou"] = zip(*_scored(opened, table, masks), strict=True)
    except (zipfile.BadZipFile, KeyError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ScoreError(f"{archive} is no complete Task B archive ({error}): validate it first") from None
    return table[["image_id", "manipulated", "label", "iou"]]


def _scored(opened: zipfile.ZipFile, table: pd.DataFrame, masks: dict[str, Path | None]) -> list[tuple[bool, float]]:
    """Whether an image is manipulated, and its IoU."""
    found = []
    for row in progress(table.itertuples(index=False), "scoring masks", total=len(table)):
        content = opened.read(f"{Path(row.image_id).stem}.npz")
        mask = _archived_mask(content, row.image_id)
        truth = _truth(masks[row.image_id], mask.shape)
        found.append((bool(truth.any()), strict_iou(mask, truth, row.loc_threshold)))
    return found


def _archived_mask(content: bytes, image: str) -> np.ndarray:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            mask = arrays[arrays.files[0]]
    except (ValueError, EOFError, IndexError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ScoreError(f"the mask of {image} cannot be read ({type(error).__name__}): validate the archive first") from None
    if mask.ndim != 2 or mask.dtype.kind not in "fiub" or not np.isfinite(mask).all():
        wanted = "wanted are finite numbers (H, W)"
        raise ScoreError(f"the mask of {image} is {mask.dtype} {mask.shape}; {wanted}: validate the archive first")
    return mask


def strict_iou(mask: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """IoU of a mask ``(H, W)`` in [0, 1], whose pixels above ``threshold`` are flagged, and a true one ``(H, W)`` bool.

    1 where neither marks a pixel, so 0 where only one of them does.
    """
    flagged = mask.astype(np.float64) > threshold
    union = np.count_nonzero(flagged | truth)
    return np.count_nonzero(flagged & truth) / union if union else 1.0


def _truth(path: Path | None, size: tuple[int, int]) -> np.ndarray:
    try:
        return np.zeros(size, bool) if path is None else read_mask(path, size)
    except ImageError as error:
        if EMPTY_MASK in str(error):  # black all over, as some keep authentic images
            return np.zeros(size, bool)
        raise


def _true_masks(truth: Path, images: list[str]) -> dict[str, Path | None]:
    """The true mask of each image, None for authentic ones."""
    if truth.is_file():
        return _listed_masks(truth, images)
    if not truth.is_dir():
        raise ScoreError(f"no folder or table of true masks {truth}")
    paths = [path for path in sorted(truth.iterdir()) if path.suffix.lower() in SUFFIXES]
    files = {path.stem: path for path in paths}
    if len(files) < len(paths):
        twice = next(path for path in paths if files[path.stem] != path)
        raise ScoreError(f"{truth} has two masks of one image: {twice.name} and {files[twice.stem].name}")
    found = {name: next((files.pop(stem) for stem in _mask_stems(name) if stem in files), None) for name in images}
    if files:
        raise ScoreError(f"{len(files)} of the masks in {truth} belong to no image of the archive, such as {min(files)}")
    if not any(found.values()):
        raise ScoreError(
            f"no mask of an image of the archive in {truth}; looked for {', '.join(_mask_stems(images[0]))} (.png)"
        )
    print(f"{truth}: masks of {sum(map(bool, found.values()))} images; the other images of the archive count as authentic")
    return found


def _mask_stems(image: str) -> tuple[str, str]:
    stem = Path(image).stem
    return stem, f"{stem}_mask"


def _listed_masks(table: Path, images: list[str]) -> dict[str, Path | None]:
    listed = read_text_table(table)
    key = next((name for name in ("image_id", "path") if name in listed), None)
    if key is None or "mask_path" not in listed:
        raise ScoreError(f"{table} has the columns {list(listed.columns)}; needed: image_id or path, and mask_path")
    pairs = zip(listed[key], listed["mask_path"], strict=True)
    masks = {Path(name).name: table.parent / mask if mask else None for name, mask in pairs}
    if unknown := [name for name in images if name not in masks]:
        raise ScoreError(f"{table} lists no truth for {len(unknown)} image(s) of the archive, such as {unknown[0]}")
    return {name: masks[name] for name in images}


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean IoU and number of images: real, fake and all; F1 of the labels for all."""
    fake = scores["manipulated"].to_numpy(bool)
    parts = {"real": scores[~fake], "fake": scores[fake], "all": scores}
    table = pd.DataFrame({name: {"iou": part["iou"].mean(), "images": len(part)} for name, part in parts.items()})
    table.loc["f1", "all"] = f1_score(fake, scores["label"].to_numpy() == 1)
    return table.loc[["iou", "f1", "images"]]
