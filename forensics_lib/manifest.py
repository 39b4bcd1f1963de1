"""One table for all images of a run: what each is, and what its file says of itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.aligned import make_twins
from forensics_lib.facts import file_facts
from forensics_lib.files import from_home, home
from forensics_lib.forgeries import make_forgeries
from forensics_lib.identity import refuse_training_on_validation, refuse_unofficial
from forensics_lib.layouts import LayoutError, Rows, read_test
from forensics_lib.params import DataSet
from forensics_lib.readers import of_itw_sm, read_data_set, recognised, task_of
from forensics_lib.runs import Run

FEWEST = 10  # images of each class with which validation images decide; with fewer others do that have as many


def build_manifest(run: Run, task: str) -> pd.DataFrame:
    """The labelled images of a task, one row each: ``layouts.COLUMNS``, ``facts.FILE_COLUMNS`` and ``data_set``.

    Files that cannot be opened, and manipulated images whose mask is missing or of another size, stay in the table with
    the reason in ``error``; ``usable`` leaves them out.  ``attrs["notes"]`` holds what was passed over.  Raises
    ``LayoutError`` where a split lacks a class.
    """
    tables = [indexed(entry) for entry in data_sets(run, task)]
    notes = [note for table in tables for note in table.attrs.pop("notes")]
    if run.params.aligned and task == "A":
        tables.append(_made(run, "aligned", lambda photos: make_twins(photos, run.params.aligned), tables))
    if run.params.forgeries and task == "B":
        tables.append(_made(run, "forgeries", lambda photos: make_forgeries(photos, run.params.forgeries), tables))
    table = pd.concat(tables, ignore_index=True)
    table["error"] = table["error"].fillna(_contradictions(table))
    table = table.drop(columns="identity")
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


def _made(run: Run, name: str, make: Callable[[pd.DataFrame], pd.DataFrame], tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The images that are made of all usable training photographs, with the facts of their files."""
    photos = pd.concat(tables, ignore_index=True)
    photos = photos[photos["split"].eq("train") & photos["label"].eq(0) & photos["error"].isna()]
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

    Raises ``LayoutError`` where a constrained run names a set that is not an official one.
    """
    entries = _named(run, task) if run.params.data and not run.sample else _of_data_root(run, task)
    refuse_training_on_validation(entries)
    if run.params.run_type == "constrained":
        refuse_unofficial(entries, run.params.edition)
    return entries


def _named(run: Run, task: str) -> list[DataSet]:
    entries = [recognised(entry) for entry in run.params.data or []]
    if run.params.run_type == "constrained":
        refuse_unofficial(entries, run.params.edition)
    return [entry for entry in entries if task_of(entry) == task]


def _of_data_root(run: Run, task: str) -> list[DataSet]:
    if task == "B":
        folder = run.data / "dataset_taskB"
        return [_own(folder / "TGIF", "tgif"), _own(folder / "validation", "task_b_validation")]
    opened = run.data / "dataset_open"
    if run.params.run_type == "open":
        both = [_own(run.data / "dataset", "own"), _own(opened, "own")]
        return both if opened.exists() or not run.params.aligned else both[:1]
    if opened.is_dir():
        print(f"constrained run: {opened} is there and is not used")
    return [_own(run.data / "dataset", "own")]


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
    """``limit`` rows, or all where there are no more; classes and their sources by ``sampled_places``."""
    return rows.iloc[sampled_places(rows, limit, seed)].reset_index(drop=True)


def sampled_places(rows: pd.DataFrame, limit: int, seed: int, by: str = "source") -> np.ndarray:
    """The positions, in order, of ``limit`` rows, or of all where there are no more.

    The classes have their shares of ``rows``, and so have the groups ``by`` which a class is divided; while ``limit`` allows
    each has at least one row.  ``seed`` is any number from 0 on; the same rows and seed give the same answer.
    """
    if len(rows) <= limit:
        return np.arange(len(rows))
    rng, chosen = np.random.default_rng(seed), []
    labels = rows["label"].to_numpy(int)
    classes, counts = np.unique(labels, return_counts=True)
    for label, quota in zip(classes, apportioned(counts, limit, rng), strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        groups, names = pd.factorize(rows[by].iloc[members], use_na_sentinel=False)
        quotas = apportioned(np.bincount(groups, minlength=len(names)), quota, rng)
        turn = pd.Series(groups).groupby(groups).cumcount().to_numpy()
        chosen.append(members[turn < quotas[groups]])
    return np.sort(np.concatenate([np.zeros(0, int), *chosen]))


def apportioned(counts: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """How many of ``limit`` each of the groups of ``counts`` images gets, by largest remainder; equal remainders by lot.

    Where ``limit`` allows, each group gets at least one; none gets more than it has.
    """
    counts = np.asarray(counts)
    limit = min(limit, int(counts.sum()))
    shares = counts * (limit / max(1, counts.sum()))
    if len(counts) <= limit:
        free = np.ones(len(counts), bool)
        while (low := free & (shares < 1)).any():
            free &= ~low
            shares = np.where(free, counts * ((limit - (~free).sum()) / max(1, counts[free].sum())), 1.0)
    quotas = np.floor(shares + 1e-9).astype(int)  # 3 / 7 * 7 is below 3
    by_remainder = np.lexsort((rng.random(len(counts)), quotas - shares.round(9)))
    quotas[by_remainder[: limit - quotas.sum()]] += 1
    return quotas


def deciding(run: Run, task: str, rows: pd.DataFrame, train: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Which validation ``rows`` choose epoch, calibration and thresholds: ``(N,)`` bool, and the rule in words.

    They are the official validation set's; without it those of sources that ``train`` lacks; else all.  A rule is passed
    over where its images lack a class, and where they have under ``FEWEST`` of one and those of a later rule have not.
    """
    labels, everything = rows["label"].to_numpy(int), np.ones(len(rows), bool)
    rules = _official(run, task, rows, train)
    rules["sources that training lacks"] = ~rows["source"].isin(train["source"]).to_numpy()
    wanted = FEWEST if np.bincount(labels, minlength=2).min() >= FEWEST else 1
    passed_over = ""
    for name, mask in rules.items():
        authentic, positive = np.bincount(labels[mask], minlength=2)
        if min(authentic, positive) >= wanted:
            return mask, name + passed_over
        if mask.any():
            passed_over += f"; too few of {name}: {authentic} authentic, {positive} positive"
    return everything, "all validation images" + passed_over


def _official(run: Run, task: str, rows: pd.DataFrame, train: pd.DataFrame) -> dict[str, np.ndarray]:
    """The rules that name official validation images, the narrowest first."""
    if task == "B":
        return {"the official validation set": rows["layout"].eq("task_b_validation").to_numpy()}
    folders = rows["path"].map(os.path.dirname)
    in_itw_sm = {folder: of_itw_sm(Path(folder).resolve()) for folder in folders.unique()}
    itw_sm = (rows["layout"].eq("itw_sm") | folders.map(in_itw_sm)).to_numpy(bool)
    place = (run.data / "dataset").resolve()
    roots = [root for root in rows.loc[rows["layout"].eq("own"), "data_set"].unique() if from_home(root).resolve() == place]
    own = rows["data_set"].isin(roots).to_numpy()
    new = own & ~rows["source"].isin(train["source"]).to_numpy()
    named = "the official validation set (dataset/val)"
    return {"the official validation set (ITW-SM)": itw_sm, f"{named}, sources that training lacks": new, named: own}


def deciding_first(rows: pd.DataFrame, decides: np.ndarray, limit: int, seed: int) -> pd.DataFrame:
    """``limit`` validation rows, or all, ``sampled`` from those that decide, and from the others where there is room."""
    first = sampled(rows[decides], limit, seed)
    return pd.concat([first, sampled(rows[~decides], limit - len(first), seed)], ignore_index=True)


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
    """Files that are listed under both labels, and manipulated images of which no mask is known."""
    problems = pd.Series(np.nan, table.index, dtype="str")
    twice = table[table["identity"].duplicated(keep=False) & ~table["path"].str.contains(".parquet#", regex=False)]
    both = twice.index[twice.groupby("identity")["label"].transform("nunique") > 1]
    problems[both] = table["path"][both] + ": listed as authentic and as synthetic; take it out of one class"
    unknown = table["mask_path"].isna() & table["kind"].isin(["sp", "fr"])
    problems[unknown] = table["path"][unknown] + ": its name tells no mask, or none of its size is there"
    return problems


def _check_classes(table: pd.DataFrame, task: str) -> None:
    good = table["error"].isna()
    for split in ("train", "val"):
        for label, name in enumerate(("authentic (0)", "synthetic or manipulated (1)")):
            listed = table["split"].eq(split) & table["label"].eq(label)
            if not (listed & good).any():
                raise LayoutError(f"Task {task}: no usable {name} images in {split} ({listed.sum()} found that cannot be used)")
