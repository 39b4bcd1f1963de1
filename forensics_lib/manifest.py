"""One table for all images of a run: what each is, and what its file says of itself."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import pandas as pd

from forensics_lib.images import ImageError, read_header
from forensics_lib.layouts import COLUMNS, LayoutError, read_test
from forensics_lib.params import DataSet
from forensics_lib.progress import progress
from forensics_lib.readers import CONSTRAINED_LAYOUTS, read_data_set, recognised, task_of
from forensics_lib.runs import Run

FILE_COLUMNS = ["width", "height", "format", "jpeg_quality", "camera", "bytes", "error"]


def build_manifest(run: Run, task: str, jobs: int = 16) -> pd.DataFrame:
    """The labelled images of a task, one row each: ``layouts.COLUMNS`` and ``FILE_COLUMNS``.

    Files that cannot be opened, and manipulated images without a mask, stay in the table with the reason in ``error``;
    ``usable`` leaves them out.  Raises ``LayoutError`` where a split lacks a class.
    """
    entries = data_sets(run, task)
    rows = [row for entry in entries for row in read_data_set(entry)]
    table = _with_file_facts(pd.DataFrame(rows, columns=COLUMNS), jobs)
    if task == "B":
        table["error"] = table["error"].where(table["error"].notna(), table.apply(_mask_problem, axis=1))
    _check_classes(table, task)
    return table


def data_sets(run: Run, task: str) -> list[DataSet]:
    """The data sets of a task: those of the ``data`` parameter, or the folders of the data root.

    Raises ``LayoutError`` where a constrained run names a set that is not an official one.
    """
    if run.params.data and not run.sample:
        entries = [recognised(entry) for entry in run.params.data]
        _refuse_unofficial(run, entries)
        return [entry for entry in entries if task_of(entry) == task]
    if task == "B":
        folder = run.data / "dataset_taskB"
        return [_own(folder / "TGIF", "tgif"), _own(folder / "validation", "task_b_validation")]
    opened = run.data / "dataset_open"
    if run.params.run_type == "open":
        return [_own(run.data / "dataset", "own"), _own(opened, "own")]
    if opened.is_dir():
        print(f"constrained run: {opened} is there and is not used")
    return [_own(run.data / "dataset", "own")]


def _own(root: Path, layout: str) -> DataSet:
    return DataSet(root=str(root), layout=layout)


def _refuse_unofficial(run: Run, entries: list[DataSet]) -> None:
    """Constrained means constrained: the official sets alone (SAGI-D among them from 2026 on)."""
    official = CONSTRAINED_LAYOUTS | ({"sagi_d"} if run.params.edition >= 2026 else set())
    refused = [f"{entry.root} ({entry.layout})" for entry in entries if entry.layout not in official]
    if run.params.run_type == "constrained" and refused:
        raise LayoutError(
            f"a constrained run takes official data only; refused: {', '.join(refused)}. "
            f"Take them out of data, or set run_type: open. Official layouts: {', '.join(sorted(official))}"
        )


def build_test_manifest(run: Run, task: str, jobs: int = 16) -> pd.DataFrame:
    """The unlabelled test images of a task, sorted by name; unreadable ones are kept, with the reason in ``error``."""
    return _with_file_facts(pd.DataFrame(read_test(run.test_folder(task)), columns=COLUMNS), jobs)


def usable(manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split without an error, numbered from 0."""
    return manifest[(manifest["split"] == split) & manifest["error"].isna()].reset_index(drop=True)


def data_fingerprint(manifest: pd.DataFrame) -> str:
    """Changes with the images' paths, sizes in bytes, labels, masks or splits."""
    facts = manifest[["path", "label", "mask_path", "split", "bytes"]].to_csv(index=False)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def problems(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that are left out, with the reason."""
    return manifest.loc[manifest["error"].notna(), ["split", "path", "error"]].reset_index(drop=True)


def overview(manifest: pd.DataFrame) -> pd.DataFrame:
    """Image counts by split, source, method and class."""
    names = manifest.assign(
        label=manifest["label"].map({0: "authentic", 1: "synthetic or manipulated"}), method=manifest["method"].fillna("-")
    )
    return names.groupby(["split", "source", "method", "label"]).size().rename("images").reset_index()


def _with_file_facts(table: pd.DataFrame, jobs: int) -> pd.DataFrame:
    """Add size, format and bytes from the files' headers, read by ``jobs`` threads."""
    with ThreadPoolExecutor(jobs) as pool:
        facts = list(progress(pool.map(_file_facts, table["path"]), "reading headers", total=len(table)))
    return table.join(pd.DataFrame(facts, columns=FILE_COLUMNS))


def _file_facts(path: str) -> tuple[object, ...]:
    """The values of ``FILE_COLUMNS`` for one file."""
    try:
        header = read_header(Path(path))
        return (*astuple(header), Path(path).stat().st_size, None)
    except (ImageError, OSError) as error:
        return (*[None] * (len(FILE_COLUMNS) - 1), str(error))


def _mask_problem(row: pd.Series) -> str | None:
    if row["label"] == 0:
        return None
    if pd.isna(row["mask_path"]):
        return f"{row['path']}: the name fits none of TGIF's, so its mask is not known"
    return None if Path(row["mask_path"]).is_file() else f"{row['path']}: its mask {row['mask_path']} is missing"


def _check_classes(table: pd.DataFrame, task: str) -> None:
    for split in ("train", "val"):
        found = usable(table, split)["label"].value_counts()
        for label, name in enumerate(("authentic (0)", "synthetic or manipulated (1)")):
            if not found.get(label, 0):
                bad = int((table["split"].eq(split) & table["label"].eq(label)).sum())
                raise LayoutError(f"Task {task}: no usable {name} images in {split} ({bad} found that cannot be used)")
