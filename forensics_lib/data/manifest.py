"""One table for all images of a run: what each is, and what its file says of itself."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.data.generated import make_forgeries, make_twins
from forensics_lib.data.headers import read_headers
from forensics_lib.data.layouts import mask_names, masks_alike, read_test
from forensics_lib.data.official import refuse_misuse, refuse_validation_rows
from forensics_lib.data.readers import of_itw_sm, read_data_set, recognised, task_of
from forensics_lib.data.rows import LayoutError, Rows
from forensics_lib.params import DataSet
from forensics_lib.run import Run, task_b_training_folders
from forensics_lib.utils.files import from_home, home

FEWEST = 10  # images of each class with which validation images decide; with fewer others do that have as many


def build_manifest(run: Run, task: str) -> pd.DataFrame:
    """The labelled images of a task, one row each: ``layouts.COLUMNS``, ``facts.FILE_COLUMNS`` and ``data_set``.

    Files that cannot be opened, and manipulated images whose mask is missing or of another size, stay in the table with
    the reason in ``error``; ``usable`` leaves them out.  ``attrs["notes"]`` holds what was passed over.  Raises
    ``LayoutError`` where a split lacks a class.
    """
    tables = [indexed(entry) for entry in data_sets(run, task)]
    notes = [*unused(run), *(note for table in tables for note in table.attrs.pop("notes"))]
    table = pd.concat(tables, ignore_index=True)
    refuse_validation_rows(run, _named(run), table)
    table["error"] = table["error"].fillna(_contradictions(table, task))
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
    cache = facts_cache(entry.root, f"{entry.layout}{entry.task or ''}")
    table = _with_file_facts(rows, cache).assign(data_set=entry.root, layout=entry.layout)
    table.attrs["notes"] = rows.notes()
    return table


def _made(run: Run, name: str, make: Callable[[pd.DataFrame], pd.DataFrame], table: pd.DataFrame) -> pd.DataFrame:
    """The images that are made of all usable training photographs, with the facts of their files."""
    photos = table[table["split"].eq("train") & table["label"].eq(0) & table["error"].isna()].reset_index(drop=True)
    made = make(photos)
    facts = read_headers(made["path"].tolist(), facts_cache(run.folder, name))
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
    entries = _named(run) or _of_data_root(run, task)
    refuse_misuse(run, task, entries)
    if run.params.run_type == "constrained":
        _refuse_other_task(entries)
    return _serving(task, entries)


def _named(run: Run) -> list[DataSet]:
    """The sets of the ``data`` parameter with their layouts; none where the run takes the folders of its data root."""
    return [] if run.sample else [recognised(entry) for entry in run.params.data or []]


def _serving(task: str, entries: list[DataSet]) -> list[DataSet]:
    tasks = [task_of(entry) for entry in entries]
    if task not in tasks:
        listed = "; ".join(f"{entry.root} ({entry.layout}) serves Task {of}" for entry, of in zip(entries, tasks, strict=True))
        raise LayoutError(
            f"Task {task}: no data set of data: serves it. {listed}. Add one{_SERVES_B if task == 'B' else ''}, or take the "
            f"task out: tasks: [{'BA'['AB'.index(task)]}]"
        )
    return [entry for entry, of in zip(entries, tasks, strict=True) if of == task]


_SERVES_B = " (a table serves Task B where it has a column mask_path; task: B in an entry takes a set's authentic images)"


def _refuse_other_task(entries: list[DataSet]) -> None:
    """Official data are so for one task.  Raises ``LayoutError``."""
    for entry in entries:
        if entry.task and entry.task != task_of(entry.model_copy(update={"task": None})):
            raise LayoutError(
                f"a constrained run takes official data only: {entry.root} ({entry.layout}) is none of Task {entry.task}. "
                "Take task out of its entry, or set run_type: open"
            )


def unused(run: Run) -> list[str]:
    """The data sets that the run names and that no task of it uses, each with the remedy."""
    if run.sample or len(run.params.tasks) > 1:
        return []
    (task,) = run.params.tasks
    entries = [recognised(entry) for entry in run.params.data or []]
    return [
        f"data: {entry.root} ({entry.layout}) serves Task {task_of(entry)} and is not used, since tasks is [{task}]: take it "
        f"out{', or set task: B in its entry to use its authentic images' if task == 'B' else ''}"
        for entry in entries
        if task_of(entry) != task
    ]


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
    """The unlabelled test images of a task, sorted by name; unreadable ones are kept, with the reason in ``error``.

    Raises ``LayoutError`` where there are none, or two of Task B would share a mask.
    """
    table = test_images(run.test_folder(task)).drop(columns="identity")
    if task == "B":
        check_mask_names(table["path"])
    return table


def check_mask_names(paths: pd.Series | list[str]) -> None:
    """Raise ``LayoutError`` where two test images would share a mask; say where masks' names differ in case alone."""
    mask_names(paths)
    if pairs := masks_alike(paths):
        print(f"masks that replace one another where upper and lower case are one (Windows, macOS): {', '.join(pairs[:20])}")


def check_test_names(run: Run, task: str) -> None:
    """What a training of Task B should not end with: raises ``LayoutError`` where two of its test images would share a mask."""
    if task == "B":
        flat = (found for found in Rows().walk(run.test_folder(task), by_content=True) if not found.parts)
        check_mask_names([path for found in flat for path in found.paths])


def test_images(folder: Path) -> pd.DataFrame:
    """The images of a flat folder, sorted by name, with the facts of their files."""
    table = _with_file_facts(read_test(folder), facts_cache(folder, "test"))
    return table.sort_values("path", ignore_index=True)


def usable(manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split without an error, numbered from 0."""
    return manifest[(manifest["split"] == split) & manifest["error"].isna()].reset_index(drop=True)


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
    facts = read_headers([*rows.paths, *masks], cache, rows.looks)
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


def _contradictions(table: pd.DataFrame, task: str) -> pd.Series:
    """Images that are listed under both labels, and manipulated images of which no mask is known."""
    problems = pd.Series(np.nan, table.index, dtype="str")
    keys = _image_keys(table)
    twice = table.loc[keys.index[keys.duplicated(keep=False)], "label"]
    both = twice.index[twice.groupby(keys[twice.index]).transform("nunique") > 1]
    problems[both] = table["path"][both] + ": listed as authentic and as synthetic; take it out of one class"
    manipulated = table["label"].eq(1) if task == "B" else table["kind"].isin(["sp", "fr"])
    unknown = table["mask_path"].isna() & manipulated
    problems[unknown] = table["path"][unknown] + ": its name tells no mask, or none of its size is there, nor does a table"
    return problems


def _image_keys(table: pd.DataFrame) -> pd.Series:
    """A number per image that exists, the same for one file by two paths, and for one member of a parquet file."""
    keys = table.loc[table["identity"].ne(-1), "identity"]
    inside = table["path"][keys.index].str.lower().str.contains(".parquet#", regex=False)
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
    good, lacking = table["error"].isna(), []
    for split in ("train", "val"):
        for label, name in enumerate(("authentic (0)", "synthetic or manipulated (1)")):
            listed = table["split"].eq(split) & table["label"].eq(label)
            if not (listed & good).any():
                reasons = "".join(f"\n  {reason}" for reason in _reasons(table[listed]))
                lacking.append(f"no usable {name} images in {split} ({listed.sum()} found that cannot be used){reasons}")
    if lacking:
        names = table["label"].map({0: "authentic", 1: "positive"})
        found = ", ".join(f"{split} {name} {count}" for (split, name), count in table.groupby(["split", names]).size().items())
        raise LayoutError(
            f"Task {task}: {'; '.join(lacking)}\nRead: {found}, from {', '.join(table['data_set'].unique())}. data/README.md "
            "says what goes where; split: in an entry of data: says what a set is for"
        )


def _reasons(rows: pd.DataFrame, shown: int = 5) -> Iterator[str]:
    """Why rows cannot be used: each kind of reason with how many there are and the first, the commonest first."""
    kinds: dict[str, list[str]] = {}
    for row in rows[rows["error"].notna()].itertuples(index=False):
        kind = row.error
        for path in (row.path, row.mask_path):
            kind = kind.replace(path, "").replace(Path(path).name, "") if isinstance(path, str) else kind
        kinds.setdefault(re.sub(r"\d+", "0", kind), []).append(row.error)
    sorted_kinds = sorted(kinds.values(), key=len, reverse=True)
    for errors in sorted_kinds[:shown]:
        yield f"{len(errors)}: {errors[0]}"
    if len(sorted_kinds) > shown:
        yield f"{sum(map(len, sorted_kinds[shown:]))} for other reasons"
