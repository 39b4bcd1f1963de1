"""The check of a run's data against the published sizes of the official sets.

Sizes are from the sets' own pages, papers and tables; unpublished ones are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from forensics_lib.data.audit import mask_areas, mask_findings
from forensics_lib.data.layouts import mask_clashes
from forensics_lib.data.manifest import data_sets, indexed, test_images, unused
from forensics_lib.data.readers import TASK_B_LAYOUTS
from forensics_lib.data.rows import LayoutError
from forensics_lib.params import DataSet
from forensics_lib.run import Run
from forensics_lib.utils.files import from_home

# Images expected per layout, split and label.  CNNDetection: Wang et al. 2020, section 3 (20 categories, 36,000 training
# and 200 validation images each, half of them real).  Corvi et al. 2022: 180,000 and 20,000 generated images.  ITW-SM:
# 5,000 of each class.  TGIF: its metadata (fakes; originals are counted as photographs).  Task B validation: taskB_val.csv.
EXPECTED: dict[str, dict[tuple[str, int], int]] = {
    "cnndetection": {("train", 0): 360_000, ("train", 1): 360_000, ("val", 0): 2_000, ("val", 1): 2_000},
    "corvi_ldm": {("train", 1): 180_000, ("val", 1): 20_000},
    "itw_sm": {("val", 0): 5_000, ("val", 1): 5_000},
    "tgif": {
        ("train", 0): 2_440, ("train", 1): 58_560,
        ("val", 0): 341, ("val", 1): 8_184,
        ("test", 0): 343, ("test", 1): 8_232,
    },
    "task_b_validation": {("val", 0): 3_227, ("val", 1): 6_212},
    "own": {("val", 0): 5_000, ("val", 1): 5_000},
}  # fmt: skip
# Fully regenerated images among them, half of TGIF's four methods, which edition 2026 is about
REGENERATED: dict[str, dict[str, int]] = {
    "tgif": {"train": 29_280, "val": 4_092, "test": 4_116},
    "task_b_validation": {"val": 3_169},
}
TEST_IMAGES = {"A": 10_000, "B": None}  # that of Task B is not published
CLASSES = ("authentic", "positive")
# Broken files in the official archives themselves: ITW-SM's 1_fake/x_618.jpg
BROKEN_AT_SOURCE = {("itw_sm", "val", 1): 1, ("own", "val", 1): 1}


@dataclass(frozen=True)
class Check:
    """The check of a run's data: one row per set, split and class."""

    table: pd.DataFrame  # set, layout, split, class, found, unusable, expected, missing
    unusable: list[str]  # errors of files, except those broken at their source; test images that share a mask

    @property
    def complete(self) -> bool:
        return not self.table["missing"].any() and not self.unusable

    def report(self) -> str:
        """The table, the files that cannot be used, and the verdict."""
        shown = self.table.astype(object).where(self.table.notna(), "-")
        parts = [shown.to_string(index=False), *(f"  {reason}" for reason in self.unusable[:10])]
        if len(self.unusable) > 10:
            parts.append(f"  ... and {len(self.unusable) - 10} more that cannot be used")
        return "\n".join([*parts, "complete" if self.complete else "INCOMPLETE: data/README.md says what goes where"])


def check_data(run: Run) -> Check:
    """Count the data of a run against the published sizes; missing sets count as empty.

    Where fully regenerated images alone train and decide, as in edition 2026, they are counted on lines of their own.
    """
    checked: list[tuple[list[dict[str, object]], list[str]]] = []
    for note in unused(run):
        print(note)
    for task in run.params.tasks:
        regenerated = task == "B" and "sp" not in run.params.kinds
        checked += [_check_set(entry, _published(run, entry), regenerated) for entry in data_sets(run, task)]
        checked.append(_check_test(run, task))
    table = pd.DataFrame([line for lines, _ in checked for line in lines])
    return Check(table.astype({"expected": "Int64"}), [reason for _, reasons in checked for reason in reasons])


def _published(run: Run, entry: DataSet) -> dict[tuple[str, int], int]:
    """The published sizes per split and label; none for a set of one's own, or a part of a set."""
    part = entry.task == "B" and entry.layout not in TASK_B_LAYOUTS
    other = entry.layout == "own" and from_home(entry.root).resolve() != (run.data / "dataset").resolve()
    return {} if part or other else EXPECTED.get(str(entry.layout), {})


def _check_set(
    entry: DataSet, expected: dict[tuple[str, int], int], regenerated: bool = False
) -> tuple[list[dict[str, object]], list[str]]:
    """The lines of a set with ``expected`` images per split and label, and the errors of its files."""
    try:
        table = indexed(entry)
    except (LayoutError, OSError) as error:
        print(error)
        wanted: dict[tuple[str, int], int | None] = {**expected} or {("train", 0): None}
        return [_line(entry.root, entry.layout, *key, 0, 0, count) for key, count in wanted.items()], []
    for finding, count, remedy in mask_findings(table, mask_areas(table)):
        if count:
            print(f"{entry.root}: {finding}: {count}. {remedy}")
    for note in table.attrs["notes"]:
        print(note)
    if entry.layout == "tgif":  # the same photograph is stored at several sizes
        photo = table["path"].str.replace(r"_orig(_\w+)?\.png$", "", regex=True)
        table = table[~photo.duplicated() | table["label"].eq(1)]
    found, bad = (Counter(zip(part["split"], part["label"], strict=True)) for part in (table, table[table["error"].notna()]))
    known: dict[tuple[str, int], int | None] = dict.fromkeys(sorted(found)) | expected
    if entry.split:
        known = {key: count for key, count in known.items() if key[0] == entry.split}
    elif entry.layout == "cnndetection":  # training, validation and test are separate downloads
        known = {key: count for key, count in known.items() if any(key[0] == split for split, _ in found)}
    lines = [_line(entry.root, entry.layout, *key, found[key], bad[key], count) for key, count in known.items()]
    if regenerated:
        lines += _regenerated(entry, table, expected)
    excused = [BROKEN_AT_SOURCE.get((str(entry.layout), *key), 0) >= bad[key] for key in known]
    reasons = table["error"].dropna().tolist()
    return lines, [] if all(excused) else reasons


def _regenerated(entry: DataSet, table: pd.DataFrame, expected: dict[tuple[str, int], int]) -> list[dict[str, object]]:
    """The lines of a set's fully regenerated images; ``expected`` is empty for a set of one's own."""
    found = table[table["kind"].eq("fr")]
    published = REGENERATED.get(str(entry.layout), {}) if expected else {}
    counts: dict[str, int | None] = dict.fromkeys(sorted(table["split"].unique())) | published
    bad = found[found["error"].notna()]
    lines = [
        _line(entry.root, entry.layout, split, 1, int(found["split"].eq(split).sum()), int(bad["split"].eq(split).sum()), count)
        for split, count in counts.items()
    ]
    return [line | {"class": "positive, fr"} for line in lines]


def _check_test(run: Run, task: str) -> tuple[list[dict[str, object]], list[str]]:
    """The line of the test images, and in Task B those that would share a mask."""
    folder, found, bad, clashes = run.test_folder(task), 0, 0, []
    try:
        table = test_images(folder)
        found, bad = len(table), int(table["error"].notna().sum())
        clashes = mask_clashes(table["path"]) if task == "B" else []
    except LayoutError as error:
        print(error)
    return [_line(str(folder), "test images", "test", None, found, bad, TEST_IMAGES[task])], clashes


def _line(
    root: str, layout: str | None, split: str, label: int | None, found: int, bad: int, expected: int | None
) -> dict[str, object]:
    missing = max(0, expected - found) if expected else int(not found)
    name = CLASSES[label] if label is not None else "unlabelled"
    facts = {"set": root, "layout": layout, "split": split, "class": name}
    return facts | {"found": found, "unusable": bad, "expected": expected, "missing": missing}
