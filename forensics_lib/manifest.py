"""One table for all images of a run: what each is, and what its file says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.aligned import make_twins
from forensics_lib.facts import file_facts
from forensics_lib.files import from_home, home
from forensics_lib.forgeries import make_forgeries
from forensics_lib.identity import refuse_misuse, refuse_validation_rows
from forensics_lib.layouts import LayoutError, Rows, read_test
from forensics_lib.params import DataSet
from forensics_lib.readers import read_data_set, recognised, task_of
from forensics_lib.runs import Run, task_b_training_folders


def build_manifest(run: Run, task: str) -> pd.DataFrame:
    """The labelled images of a task, one row each: ``layouts.COLUMNS``, ``facts.FILE_COLUMNS`` and ``data_set``.

    Files that cannot be opened, and manipulated images whose mask is missing or of another size, stay in the table with
    the reason in ``error``; ``usable`` leaves them out.  ``attrs["notes"]`` holds what was passed over.  Raises
    ``LayoutError`` where a split lacks a class.
    """
    tables = [indexed(entry) for entry in data_sets(run, task)]
    notes = [note for table in tables for note in table.attrs.pop("notes")]
    table = pd.concat(tables, ignore_index=True)
    refuse_validation_rows(table)
    table["error"] = table["error"].fillna(_contradictions(table))
    table["error"] = table["error"].fillna(_repeats(table))
    notes += _repeat_notes(table)
    made = []
    if run.params.aligned and task == "A":
        made.append(_made(run, "aligned", lambda photos: make_twins(photos, run.params.aligned), table))
    if run.params.forgeries and task == "B":
        made.append(_made(run, "forgeries", lambda photos: make_forgeries(photos, run.params.forgeries), table))
    table = pd.concat([table, *made], ignore_index=True).drop(columns="identity")
    table.attrs["notes"] = notes
    for note in notes:
        print(note)
    _check_classes(table, task)
    return table


def indexed(entry: DataSet) -> pd.DataFrame:
    """The images of one data set with the facts of their files; raises ``LayoutError``."""
    rows = read_data_set(entry)
    table = _with_file_facts(rows, facts_cache(entry.root, entry.layout)).assign(data_set=entry.root, layout=entry.layout)
    table.attrs["notes"] = rows.notes()
    return table


def _made(run: Run, name: str, make: Callable[[pd.DataFrame], pd.DataFrame], table: pd.DataFrame) -> pd.DataFrame:
    """The images that are made of all usable training photographs, with the facts of their files."""
    photos = table[table["split"].eq("train") & table["label"].eq(0) & table["error"].isna()].reset_index(drop=True)
    made = make(photos)
    facts = file_facts(made["path"].tolist(), facts_cache(run.folder, name))
    return made.join(facts).assign(data_set=name, layout=name)


def sources(manifest: pd.DataFrame) -> pd.DataFrame:
    """Every source that goes in: data set, layout, source, split, and usable images of each class."""
    good = manifest[manifest["error"].isna()]
    keys = ["data_set", "layout", "source", "split"]
    counted = good.groupby(keys)["label"].agg(images="size", positive="sum").reset_index()
    return counted.assign(authentic=counted["images"] - counted["positive"])[[*keys, "authentic", "positive"]]


def facts_cache(root: str | Path, what: str) -> Path:
    """Where the facts about a folder's files are kept."""
    name = hashlib.sha256(f"{from_home(root)} {what}".encode()).hexdigest()[:12]
    return home() / "outputs" / ".cache" / f"{Path(root).name}-{what}-{name}.parquet"


def data_sets(run: Run, task: str) -> list[DataSet]:
    """The data sets of a task: those of the ``data`` parameter, or the folders of the data root.

    Raises ``LayoutError`` where a set would train on validation data or, in a constrained run, on data that is not official.
    """
    named = run.params.data and not run.sample
    entries = [recognised(entry) for entry in run.params.data or []] if named else _of_data_root(run, task)
    refuse_misuse(run, task, entries)
    return [entry for entry in entries if task_of(entry) == task]


def _of_data_root(run: Run, task: str) -> list[DataSet]:
    if task == "B":
        return [*_task_b_training(run), _own(run.data / "dataset_taskB" / "validation", "task_b_validation")]
    opened = run.data / "dataset_open"
    if run.params.run_type == "open":
        both = [_own(run.data / "dataset", "own"), _own(opened, "own")]
        return both if opened.exists() or not run.params.aligned else both[:1]
    if opened.is_dir():
        print(f"constrained run: {opened} is there and is not used")
    return [_own(run.data / "dataset", "own")]


def _task_b_training(run: Run) -> list[DataSet]:
    """TGIF, and from edition 2026 on SAGI-D, of which either is enough."""
    layouts = ("tgif", "sagi_d") if run.params.edition >= 2026 else ("tgif",)
    folders = dict(zip(task_b_training_folders(run.data), layouts, strict=False))
    there = {folder: layout for folder, layout in folders.items() if folder.exists()}
    for folder in folders if there else ():
        if folder not in there:
            print(f"edition {run.params.edition} trains on TGIF and SAGI-D: {folder} is not there, so the other alone is used")
    return [_own(folder, layout) for folder, layout in (there or folders).items()]


def _own(root: Path, layout: str) -> DataSet:
    return DataSet(root=str(root), layout=layout)


def build_test_manifest(run: Run, task: str) -> pd.DataFrame:
    """The unlabelled test images of a task, sorted by name; unreadable ones are kept, with the reason in ``error``."""
    return test_images(run.test_folder(task)).drop(columns="identity")


def test_images(folder: Path) -> pd.DataFrame:
    """The images of a flat folder, sorted by name, with the facts of their files."""
    table = _with_file_facts(read_test(folder), facts_cache(folder, "test"))
    return table.sort_values("path", ignore_index=True)


def usable(manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split without an error, numbered from 0."""
    return manifest[(manifest["split"] == split) & manifest["error"].isna()].reset_index(drop=True)


def manipulation(row: pd.Series) -> str:
    """How a manipulated image was made, for titles: ``sd2-sp (sp)``, or ``manipulated (sp)`` where the method is not known."""
    return f"{'manipulated' if pd.isna(row['method']) else row['method']} ({row['kind']})"


def sampled(rows: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """At most ``limit`` rows, the same share of each class and source."""
    if len(rows) <= limit:
        return rows
    parts = rows.groupby(["label", "source"], group_keys=False)
    return parts.sample(frac=limit / len(rows), random_state=seed).sort_index().reset_index(drop=True)


def data_fingerprint(manifest: pd.DataFrame) -> str:
    """Changes with the images' paths, sizes in bytes, labels, masks or splits."""
    facts = manifest[["path", "label", "mask_path", "split", "bytes"]].to_csv(index=False)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def problems(manifest: pd.DataFrame, repeats: bool = True) -> pd.DataFrame:
    """The rows that are left out, with the reason; without ``repeats`` those alone that are not used in another place."""
    repeated = _repeated(manifest)
    wrong = manifest[manifest["error"].notna() & ~repeated]
    parts = [wrong, manifest[repeated]] if repeats else [wrong]
    return pd.concat(parts)[["split", "path", "error"]].reset_index(drop=True)


def taken_for(manifest: pd.DataFrame) -> pd.DataFrame:
    """What every data set was taken for: set, layout, split, class, images, and how many of those are left out."""
    names = manifest["label"].map({0: "authentic", 1: "synthetic or manipulated"})
    rows = manifest.assign(**{"class": names, "left out": manifest["error"].notna()})
    counted = rows.groupby(["data_set", "layout", "split", "class"], sort=False)["left out"].agg(["size", "sum"]).reset_index()
    return counted.rename(columns={"data_set": "set", "size": "images", "sum": "left out"})


def overview(manifest: pd.DataFrame) -> pd.DataFrame:
    """Image counts by split, source, method and class."""
    names = manifest.assign(
        label=manifest["label"].map({0: "authentic", 1: "synthetic or manipulated"}), method=manifest["method"].fillna("-")
    )
    return names.groupby(["split", "source", "method", "label"]).size().rename("images").reset_index()


def _with_file_facts(rows: Rows, cache: Path) -> pd.DataFrame:
    """The rows with ``FILE_COLUMNS``; a mask that does not fit its image counts as the image's error."""
    table = rows.table()
    masks = table["mask_path"].dropna().drop_duplicates().tolist()
    facts = file_facts([*rows.paths, *masks], cache, rows.looks)
    table = table.join(facts.iloc[: len(table)])
    if len(masks):
        of_masks = facts.iloc[len(table) :].set_index(pd.Index(masks))
        table["error"] = table["error"].fillna(_mask_problems(table, of_masks))
    return table


def _mask_problems(table: pd.DataFrame, masks: pd.DataFrame) -> pd.Series:
    """Why a manipulated image's mask cannot be used; missing where it can, and for images without one."""
    problems = pd.Series(np.nan, table.index, dtype="str")
    marked = table["mask_path"].notna()
    image = table[marked]
    mask = masks.loc[image["mask_path"]].set_axis(image.index)
    broken = mask["error"].notna()
    problems[mask.index[broken]] = image["path"][broken] + ": its mask " + mask["error"][broken]
    other = ~broken & image["error"].isna() & ((mask["width"] != image["width"]) | (mask["height"] != image["height"]))
    for row in mask.index[other]:
        sizes = [f"{int(facts['width'])} x {int(facts['height'])}" for facts in (image.loc[row], mask.loc[row])]
        path, name = table.loc[row, ["path", "mask_path"]]
        problems[row] = f"{path} is of {sizes[0]} pixels, its mask {name} of {sizes[1]}: they must be equal"
    return problems


def _contradictions(table: pd.DataFrame) -> pd.Series:
    """Images that are listed under both labels, and manipulated images of which no mask is known."""
    problems = pd.Series(np.nan, table.index, dtype="str")
    keys = _image_keys(table)
    twice = table.loc[keys.index[keys.duplicated(keep=False)], "label"]
    both = twice.index[twice.groupby(keys[twice.index]).transform("nunique") > 1]
    problems[both] = table["path"][both] + ": listed as authentic and as synthetic; take it out of one class"
    unknown = table["mask_path"].isna() & table["kind"].isin(["sp", "fr"])
    problems[unknown] = table["path"][unknown] + ": its name tells no mask, or none of its size is there"
    return problems


def _image_keys(table: pd.DataFrame) -> pd.Series:
    """A number per image that exists, the same for one file by two paths, and for one member of a parquet file."""
    keys = table.loc[table["identity"].ne(-1), "identity"]
    inside = table["path"][keys.index].str.contains(".parquet#", regex=False)
    if inside.any():
        rows = keys.index[inside]
        members = [path.rpartition("#")[2] for path in table["path"][rows]]
        hashed = pd.util.hash_pandas_object(pd.DataFrame({"file": keys[rows], "member": members}), index=False)
        keys = keys.copy()
        keys[rows] = hashed.to_numpy().view(np.int64)
    return keys


REPEATED = ": the same image as "  # in the reason of an image that stands in several places
_ORDER = {"train": 0, "val": 1, "test": 2}


def _repeats(table: pd.DataFrame) -> pd.Series:
    """Why an image that stands in several places is left out of this one; missing where it is not.

    An image that trains neither validates nor is held out, one that validates is not held out, and each counts once, where
    it is listed first.
    """
    problems = pd.Series(np.nan, table.index, dtype="str")
    keys = _image_keys(table[table["error"].isna()])
    keys = keys[keys.duplicated(keep=False)]
    keys = keys[table["split"][keys.index].map(_ORDER).sort_values(kind="stable").index]
    again = keys.index[keys.duplicated()]
    first = pd.Series(keys.index, index=keys.to_numpy()).groupby(level=0).first()[keys[again]].to_numpy()
    where = table["path"].take(first) + ", which is " + table["split"].take(first).map(_ROLES)
    problems[again] = table["path"][again] + REPEATED + where.set_axis(again)
    return problems


_ROLES = {"train": "trained on", "val": "in validation", "test": "held out"}


def _repeat_notes(table: pd.DataFrame) -> list[str]:
    """How many images of each set are left out since they stand elsewhere too."""
    rows = table[_repeated(table)]
    first = [reason.rpartition(", which is ")[2] for reason in rows["error"]]
    counts = rows.assign(first=first).groupby(["data_set", "split", "first"]).size()
    return [
        f"{count} image(s) of {name} ({split}) are left out: they are listed elsewhere too, where they are {first}"
        for (name, split, first), count in counts.items()
    ]


def _repeated(table: pd.DataFrame) -> pd.Series:
    return table["error"].str.contains(REPEATED, regex=False).fillna(False).astype(bool)


def _check_classes(table: pd.DataFrame, task: str) -> None:
    good = table["error"].isna()
    for split in ("train", "val"):
        for label, name in enumerate(("authentic (0)", "synthetic or manipulated (1)")):
            listed = table["split"].eq(split) & table["label"].eq(label)
            if not (listed & good).any():
                raise LayoutError(f"Task {task}: no usable {name} images in {split} ({listed.sum()} found that cannot be used)")
