"""Duplicates: equal files, look-alikes, and photographs in several splits or data sets."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.data.headers import image_hashes
from forensics_lib.data.manifest import sampled_places
from forensics_lib.images.parquet import member_bytes
from forensics_lib.utils.files import home
from forensics_lib.utils.progress import progress

END = 4096  # bytes at the end of files that are compared before whole files


def exact_duplicates(manifest: pd.DataFrame, jobs: int = 16) -> pd.DataFrame:
    """Files with the same bytes: path, label, split and a number per set of equal files.

    Files of equal size are compared by their ends, then as a whole if those are equal.
    """
    good = manifest[manifest["error"].isna()]
    equal = good[good.duplicated("bytes", keep=False)]
    for last, title in ((END, "comparing the ends of files"), (None, "comparing whole files")):
        with ThreadPoolExecutor(jobs) as pool:
            digests = pool.map(partial(_digest, last=last), equal["path"])
            equal = equal.assign(digest=list(progress(digests, title, total=len(equal))))
        equal = equal[equal.duplicated(["bytes", "digest"], keep=False)]
    return equal.assign(set=equal.groupby("digest").ngroup())[["set", "split", "label", "path"]].sort_values(["set", "path"])


def _digest(path: str, last: int | None) -> str:
    """The hash of a file's ``last`` bytes, or of all; for an unreadable file its path, which equals no other."""
    try:
        content = member_bytes(path)
        if content is None:
            with Path(path).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last) if last else 0)
                content = file.read()
        return hashlib.sha256(content).hexdigest()
    except OSError:
        return path


@dataclass
class NearDuplicates:
    """Pairs of images of different photographs that look alike."""

    pairs: pd.DataFrame  # distance, and path, split, label of both images
    compared: int
    of: int

    def message(self) -> str:
        """The result as text."""
        splits, classes = self.across("split"), self.across("label")
        drawn = f"{self.compared:,} images compared" + (f", drawn from {self.of:,}" if self.compared < self.of else "")
        return f"{len(self.pairs)} pairs look alike, {splits} across splits, {classes} across classes ({drawn})"

    def across(self, column: str) -> int:
        """Pairs whose images differ in ``split`` or in ``label``."""
        return int((self.pairs[f"{column}_a"] != self.pairs[f"{column}_b"]).sum())


def near_duplicates(manifest: pd.DataFrame, limit: int = 20_000, distance: int = 4) -> NearDuplicates:
    """Pairs of images of different groups whose 64-bit perceptual hashes differ in at most ``distance`` bits.

    This finds recompressed and scaled copies too.  Hashing decodes images, so at most ``limit`` are compared: half of them
    from validation, or more if the other splits have fewer, of as many photographs as possible.  Flat pictures are skipped.
    """
    good = manifest[manifest["error"].isna()]
    val, others = (np.flatnonzero(good["split"].eq("val") == is_val) for is_val in (True, False))
    of_val = min(len(val), max(limit // 2, limit - len(others)))
    parts = ((val, of_val), (others, limit - of_val))
    places = [part[sampled_places(good.iloc[part], count, 0, by="group")] for part, count in parts]
    drawn = good.iloc[np.sort(np.concatenate(places))]
    name = hashlib.sha256(" ".join(sorted(manifest["data_set"].unique())).encode()).hexdigest()[:12]
    cache = home() / "outputs" / ".cache" / f"hashes-{name}.parquet"
    hashes = image_hashes(drawn["path"].tolist(), cache).set_axis(drawn.index).dropna()
    rows, values = drawn.loc[hashes.index], hashes.to_numpy(np.uint64)
    pairs = _close_pairs(values, pd.factorize(rows["group"])[0], distance)
    ends = {end: rows.iloc[pairs[:, i]].reset_index(drop=True) for i, end in enumerate("ab")}
    columns = {f"{name}_{end}": ends[end][name] for end in "ab" for name in ("path", "split", "label")}
    table = pd.DataFrame({"distance": pairs[:, 2], **columns}).sort_values("distance", kind="stable", ignore_index=True)
    return NearDuplicates(table, len(drawn), len(good))


def _close_pairs(hashes: np.ndarray, groups: np.ndarray, distance: int) -> np.ndarray:
    """Pairs of hashes of different groups that differ in at most ``distance`` bits: both positions and the distance."""
    found = [np.zeros((0, 3), int)]
    for start in range(0, len(hashes), 1_000):
        bits = np.bitwise_count(hashes[start : start + 1_000, None] ^ hashes[None, start:])
        one, other = np.nonzero(bits <= distance)
        later = (other > one) & (groups[start + one] != groups[start + other])
        found.append(np.column_stack([one + start, other + start, bits[one, other]])[later])
    return np.concatenate(found)


def groups_across_splits(manifest: pd.DataFrame) -> pd.DataFrame:
    """Photographs with images in several splits: a row each, with the number of images per split."""
    good = manifest.loc[manifest["error"].isna(), ["group", "split"]]
    good = good[_in_several_places(good["group"], good["split"])].reset_index(drop=True)
    return pd.crosstab(good["group"], good["split"])


def _in_several_places(groups: pd.Series, places: pd.Series) -> np.ndarray:
    """Whether the group of a row is in more than one place, ``(N,)`` bool."""
    (of_group, names), (of_place, known) = pd.factorize(groups), pd.factorize(places)
    seen = np.zeros((len(names) + 1, len(known)), bool)
    seen[of_group, of_place] = True
    seen[-1] = False  # rows without a group have the code -1
    return (seen.sum(axis=1) > 1)[of_group]


def overlapping(manifest: pd.DataFrame) -> pd.Series:
    """Whether an image's photograph is also in another split or data set, a bool per row.

    An example are the COCO photographs shared by TGIF and the Task B validation set.
    """
    where = manifest["data_set"] + " " + manifest["split"]
    return where.groupby(manifest["group"]).transform("nunique") > 1


def shared_photographs(manifest: pd.DataFrame) -> pd.DataFrame:
    """The number of photographs that two data sets or splits share: a row per pair that shares any."""
    places = manifest.groupby(["data_set", "split"], sort=False).ngroup()
    shared = manifest[_in_several_places(manifest["group"], places)].reset_index(drop=True)
    names = shared["data_set"].map(lambda root: Path(root).name) + " " + shared["split"]
    places = pd.crosstab(shared["group"], names) > 0
    pairs = [(one, other, int((places[one] & places[other]).sum())) for one, other in combinations(places.columns, 2)]
    return pd.DataFrame([pair for pair in pairs if pair[2]], columns=["one", "other", "photographs"])
