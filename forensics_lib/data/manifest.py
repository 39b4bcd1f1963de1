"""The manifest: one table of all images of a run, with labels, names and file facts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from forensics_lib.data.generated import make_forgeries, make_twins
from forensics_lib.data.headers import read_headers
from forensics_lib.data.layouts import mask_names, masks_alike, read_test
from forensics_lib.data.official import refuse_misuse, refuse_validation_rows
from forensics_lib.data.readers import of_itw_sm, own_task, read_data_set, recognised, task_of
from forensics_lib.data.rows import DONOR, LayoutError, Rows
from forensics_lib.images.parquet import file_of
from forensics_lib.params import DataSet
from forensics_lib.run import Run, task_b_training_folders
from forensics_lib.utils.files import from_home, home
from forensics_lib.utils.progress import progress

FEWEST = 10  # images of each class that validation images need to decide, if others have as many
_CLASSES = {0: "authentic", 1: "synthetic or manipulated"}


def build_manifest(run: Run, task: str) -> pd.DataFrame:
    """Build the table of a task's labelled images, and of the twins or forgeries that the parameters ask for.

    Headers are read in parallel and cached.  Twins and forgeries are made if they are not in the cache, with a message;
    for large data sets and generators that takes long.

    Returns a row per image with ``rows.COLUMNS``, ``headers.FILE_COLUMNS``, ``data_set`` and ``layout``.  Unreadable files, and
    manipulated images whose mask is missing or of another size, have the reason in ``error``; ``usable`` leaves them out.
    ``attrs["notes"]`` lists what the readers skipped.  Raises ``LayoutError`` if data is not laid out as expected or must not
    be trained on, or a split lacks a class.
    """
    tables = [indexed(entry) for entry in data_sets(run, task)]
    notes = [*unused(run), *(note for table in tables for note in table.attrs.pop("notes"))]
    table = pd.concat(tables, ignore_index=True)
    refuse_validation_rows(run, task, _named(run), table)
    table["error"] = table["error"].fillna(_contradictions(table, task))
    table["error"] = table["error"].fillna(_repeats(table))
    notes += _repeat_notes(table)
    if task == "B":
        table = _of_kinds(run, table, notes)
    table = pd.concat([table, *_generated(run, task, table)], ignore_index=True).drop(columns="identity")
    table.attrs["notes"] = notes
    for note in notes:
        print(note)
    _check_classes(table, task, ("train", "val") if run.params.trains else ("val",))
    return table


def _of_kinds(run: Run, table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The table without training images of other kinds than the parameter ``kind`` asks for, which are counted in ``notes``."""
    other = table["split"].eq("train") & ~_wanted_kind(run, table)
    if other.any():
        kinds = ", ".join(run.params.kinds)
        notes.append(f"{other.sum()} manipulated training images are not trained on: kind asks for {kinds}")
    return table[~other].reset_index(drop=True)


def _wanted_kind(run: Run, rows: pd.DataFrame) -> pd.Series:
    """Which rows are authentic or of a kind that the parameters ask for."""
    return rows["label"].eq(0) | ~rows["kind"].isin({"sp", "fr"} - set(run.params.kinds))


def indexed(entry: DataSet) -> pd.DataFrame:
    """The images of a data set with file facts.  Raises ``LayoutError``."""
    rows = read_data_set(entry)
    cache = facts_cache(entry.root, f"{entry.layout}{entry.task or ''}")
    table = _with_file_facts(rows, cache).assign(data_set=entry.root, layout=entry.layout)
    table.attrs["notes"] = rows.notes()
    return table


def _generated(run: Run, task: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Twins (Task A) or forgeries (Task B) of all usable training photographs, if the parameters ask for them."""
    photos = table[table["split"].eq("train") & table["label"].eq(0) & table["error"].isna()].reset_index(drop=True)
    if not run.params.trains:
        return []
    if task == "A" and run.params.aligned:
        name, made = "aligned", make_twins(photos, run.params.aligned)
    elif task == "B" and run.params.forgeries:
        name, made = "forgeries", make_forgeries(photos, run.params.forgeries)
    else:
        return []
    facts = read_headers(made["path"].tolist(), facts_cache(run.folder, name))
    return [made.join(facts).assign(data_set=name, layout=name)]


def sources(manifest: pd.DataFrame) -> pd.DataFrame:
    """The sources of a manifest: data set, layout, source, split, and the usable images of each class."""
    good = manifest[manifest["error"].isna()]
    keys = ["data_set", "layout", "source", "split"]
    counted = good.groupby(keys)["label"].agg(images="size", positive="sum").reset_index()
    return counted.assign(authentic=counted["images"] - counted["positive"])[[*keys, "authentic", "positive"]]


def facts_cache(root: str | Path, what: str) -> Path:
    """The cache of the file facts of a folder."""
    name = hashlib.sha256(f"{from_home(root)} {what}".encode()).hexdigest()[:12]
    return home() / "outputs" / ".cache" / f"{Path(root).name}-{what}-{name}.parquet"


def data_sets(run: Run, task: str) -> list[DataSet]:
    """The data sets of a task: those of the ``data`` parameter, or the folders of the data root.

    Raises ``LayoutError`` if a set would train on validation data or, in a constrained run, on data that is not official.
    """
    entries = _named(run) or _of_data_root(run, task)
    refuse_misuse(run, task, entries)
    for entry in entries:
        if entry.task and run.params.official_only(entry.task) and entry.task != own_task(entry):
            raise LayoutError(
                f"a constrained run takes official data only: {entry.root} ({entry.layout}) is none of Task {entry.task}. "
                "Take task out of its entry, or set run_type: open"
            )
    tasks = [task_of(entry) for entry in entries]
    if task not in tasks:
        listed = "; ".join(f"{entry.root} ({entry.layout}) serves Task {of}" for entry, of in zip(entries, tasks, strict=True))
        ways = " (a table serves Task B where it has a column mask_path; task: B in an entry takes a set of Task A for it)"
        raise LayoutError(
            f"Task {task}: no data set of data: serves it. {listed}. Add one{ways if task == 'B' else ''}, or take the "
            f"task out: tasks: [{'A' if task == 'B' else 'B'}]"
        )
    return [entry for entry, of in zip(entries, tasks, strict=True) if of == task]


def _named(run: Run) -> list[DataSet]:
    """The sets of the ``data`` parameter with their layouts; none if the run uses the folders of its data root."""
    return [] if run.sample else [recognised(entry) for entry in run.params.data or []]


def unused(run: Run) -> list[str]:
    """The data sets of the ``data`` parameter that no task of the run uses, each with the remedy."""
    if len(run.params.tasks) > 1:
        return []
    (task,) = run.params.tasks
    return [
        f"data: {entry.root} ({entry.layout}) serves Task {task_of(entry)} and is not used, since tasks is [{task}]: take it "
        f"out{', or set task: B in its entry to paste regions of its training images' if task == 'B' else ''}"
        for entry in _named(run)
        if task_of(entry) != task
    ]


def _of_data_root(run: Run, task: str) -> list[DataSet]:
    if task == "B":
        return [*_task_b_training(run), _own(run.data / "dataset_taskB" / "validation", "task_b_validation")]
    opened = run.data / "dataset_open"
    if run.params.run_type == "open":
        both = [_own(run.data / "dataset", "own"), _own(opened, "own")]
        return both if opened.exists() or (run.params.trains and not run.params.aligned) else both[:1]
    if opened.is_dir():
        print(f"constrained run: {opened} is there and is not used")
    return [_own(run.data / "dataset", "own")]


def _task_b_training(run: Run) -> list[DataSet]:
    """TGIF and, from edition 2026 on, SAGI-D; either is enough."""
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
    """The table of a task's unlabelled test images, sorted by name; unreadable ones have the reason in ``error``.

    Raises ``LayoutError`` if there are none, or if two of Task B would share a mask.
    """
    table = test_images(run.test_folder(task)).drop(columns="identity")
    if task == "B":
        _check_mask_names(table["path"])
    return table


def _check_mask_names(paths: Sequence[str]) -> None:
    """Raise ``LayoutError`` if two test images would share a mask; print names of masks that differ only in case."""
    mask_names(paths)
    if pairs := masks_alike(paths):
        print(f"masks that replace one another where upper and lower case are one (Windows, macOS): {', '.join(pairs[:20])}")


def check_test_names(run: Run, task: str) -> None:
    """Check before a training of Task B: raises ``LayoutError`` if two of its test images would share a mask."""
    if task == "B":
        flat = (found for found in Rows().walk(run.test_folder(task), by_content=True) if not found.parts)
        _check_mask_names([path for found in flat for path in found.paths])


def test_images(folder: Path) -> pd.DataFrame:
    """The images of a flat folder, sorted by name, with file facts."""
    table = _with_file_facts(read_test(folder), facts_cache(folder, "test"))
    return table.sort_values("path", ignore_index=True)


def usable(manifest: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split (train, val, test or ``rows.DONOR``) that have no error, with a new index from 0."""
    return manifest[(manifest["split"] == split) & manifest["error"].isna()].reset_index(drop=True)


def sampled(rows: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """The rows at ``sampled_places``, stratified by source, with a new index from 0."""
    return rows.iloc[sampled_places(rows, limit, seed)].reset_index(drop=True)


def sampled_places(rows: pd.DataFrame, limit: int, seed: int, by: str = "source") -> np.ndarray:
    """The positions, ascending, of a stratified sample of ``limit`` rows, or of all if there are no more.

    Classes keep their shares of ``rows``, and so do the strata of a class, its values of the column ``by``; if ``limit``
    allows, each has at least one row.  The same rows and seed give the same sample.
    """
    if len(rows) <= limit:
        return np.arange(len(rows))
    rng, chosen = np.random.default_rng(seed), []
    labels = rows["label"].to_numpy(int)
    classes, counts = np.unique(labels, return_counts=True)
    for label, quota in zip(classes, apportioned(counts, limit, rng), strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        strata, names = pd.factorize(rows[by].iloc[members], use_na_sentinel=False)
        quotas = apportioned(np.bincount(strata, minlength=len(names)), quota, rng)
        turn = pd.Series(strata).groupby(strata).cumcount().to_numpy()
        chosen.append(members[turn < quotas[strata]])
    return np.sort(np.concatenate([np.zeros(0, int), *chosen]))


def apportioned(counts: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The sample sizes of strata of ``counts`` images, ``limit`` in all, by largest remainder; ties are drawn by lot.

    If ``limit`` allows, each stratum gets at least one; none gets more than it has.
    """
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
    """The validation ``rows`` that choose epoch, calibration and thresholds, ``(N,)`` bool, and the rule in words.

    The rules in order: the official validation set, sources that ``train`` lacks, all images.  A rule is skipped if its
    images lack a class, or if they have fewer than ``FEWEST`` of a class and those of a later rule do not.  Of manipulated
    images those of the ``kind`` asked for decide.
    """
    labels, everything = rows["label"].to_numpy(int), np.ones(len(rows), bool)
    rules = _official(run, task, rows, train)
    rules["sources that training lacks"] = ~rows["source"].isin(train["source"]).to_numpy()
    if task == "B" and not (of_kind := _wanted_kind(run, rows).to_numpy(bool)).all():
        rules = {f"{name}, {'/'.join(run.params.kinds)} alone": mask & of_kind for name, mask in rules.items()}
        rules[f"all validation images, {'/'.join(run.params.kinds)} alone"] = of_kind
    wanted = FEWEST if np.bincount(labels, minlength=2).min() >= FEWEST else 1
    skipped = ""
    for name, mask in rules.items():
        authentic, positive = np.bincount(labels[mask], minlength=2)
        if min(authentic, positive) >= wanted:
            return mask, name + skipped
        if mask.any():
            skipped += f"; too few of {name}: {authentic} authentic, {positive} positive"
    return everything, "all validation images" + skipped


def _official(run: Run, task: str, rows: pd.DataFrame, train: pd.DataFrame) -> dict[str, np.ndarray]:
    """The rules for official validation images, the narrowest first."""
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
    """At most ``limit`` validation rows, ``sampled`` from those that decide, then from the others."""
    first = sampled(rows[decides], limit, seed)
    return pd.concat([first, sampled(rows[~decides], limit - len(first), seed)], ignore_index=True)


def data_fingerprint(manifest: pd.DataFrame) -> str:
    """A hash of the images' paths, sizes in bytes, labels, masks and splits."""
    facts = manifest[["path", "label", "mask_path", "split", "bytes"]].to_csv(index=False)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def masks_fingerprint(manifest: pd.DataFrame) -> str:
    """A hash of the contents of all mask files; of files that hold many masks, of their sizes."""
    digest = hashlib.sha256()
    paths = manifest["mask_path"].dropna().drop_duplicates().tolist()
    for path in progress(paths, "reading masks", total=len(paths)):
        with suppress(OSError):  # reading the mask will report it
            inside = "#" in path
            digest.update(str(Path(file_of(path)).stat().st_size).encode() if inside else Path(path).read_bytes())
    return digest.hexdigest()[:16]


def problems(manifest: pd.DataFrame, repeats: bool = True) -> pd.DataFrame:
    """The rows that are left out, with the reasons; without ``repeats`` only those that are not used in another place."""
    wrong, repeated = manifest["error"].notna(), _repeated(manifest)
    parts = [manifest[wrong & ~repeated], manifest[repeated & repeats]]
    return pd.concat(parts)[["split", "path", "error"]].reset_index(drop=True)


def taken_for(manifest: pd.DataFrame) -> pd.DataFrame:
    """How each data set was read: set, layout, split, class, images, and the number of images left out."""
    rows = manifest.assign(**{"class": manifest["label"].map(_CLASSES), "left out": manifest["error"].notna()})
    counted = rows.groupby(["data_set", "layout", "split", "class"], sort=False)["left out"].agg(["size", "sum"]).reset_index()
    return counted.rename(columns={"data_set": "set", "size": "images", "sum": "left out"})


def overview(manifest: pd.DataFrame) -> pd.DataFrame:
    """Image counts by split, source, method and class."""
    names = manifest.assign(label=manifest["label"].map(_CLASSES), method=manifest["method"].fillna("-"))
    return names.groupby(["split", "source", "method", "label"]).size().rename("images").reset_index()


def _with_file_facts(rows: Rows, cache: Path) -> pd.DataFrame:
    """The rows with ``FILE_COLUMNS``; a mask that does not fit is an error of its image."""
    table = rows.table()
    masks = table["mask_path"].dropna().drop_duplicates().tolist()
    facts = read_headers([*rows.paths, *masks], cache, rows.looks)
    table = table.join(facts.iloc[: len(table)])
    if len(masks):
        of_masks = facts.iloc[len(table) :].set_index(pd.Index(masks))
        table["error"] = table["error"].fillna(_mask_problems(table, of_masks))
    return table


def _mask_problems(table: pd.DataFrame, masks: pd.DataFrame) -> pd.Series:
    """Why a mask cannot be used, per image; missing if it can, or if there is none."""
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
    """Errors of images that are listed under both labels, and of manipulated images without a known mask."""
    problems = pd.Series(np.nan, table.index, dtype="str")
    keys = _image_keys(table)
    twice = table.loc[keys.index[keys.duplicated(keep=False)], "label"]
    both = twice.index[twice.groupby(keys[twice.index]).transform("nunique") > 1]
    problems[both] = table["path"][both] + ": listed as authentic and as synthetic; take it out of one class"
    manipulated = table["label"].eq(1) if task == "B" else table["kind"].isin(["sp", "fr"])
    unknown = table["mask_path"].isna() & manipulated & table["split"].ne(DONOR)
    problems[unknown] = table["path"][unknown] + ": no mask is known: neither its name and size nor a table leads to one"
    return problems


def _image_keys(table: pd.DataFrame) -> pd.Series:
    """A number per existing image, the same for two paths to one file or to one member of a parquet file."""
    keys = table.loc[table["identity"].ne(-1), "identity"]
    inside = table["path"][keys.index].str.lower().str.contains(".parquet#", regex=False)
    if inside.any():
        rows = keys.index[inside]
        members = [path.rpartition("#")[2] for path in table["path"][rows]]
        hashed = pd.util.hash_pandas_object(pd.DataFrame({"file": keys[rows], "member": members}), index=False)
        keys = keys.copy()
        keys[rows] = hashed.to_numpy().view(np.int64)
    return keys


REPEATED = ": the same image as "  # in the error of an image that is listed several times
# What images of each split are; the first of an image's splits counts
_ROLES = {"train": "trained on", "val": "in validation", "test": "held out", DONOR: "a donor of pasted regions"}


def _repeats(table: pd.DataFrame) -> pd.Series:
    """Errors of images that are listed several times; missing for the place where an image is used.

    Training comes before validation, validation before test, and within a split the first place counts.
    """
    problems = pd.Series(np.nan, table.index, dtype="str")
    keys = _image_keys(table[table["error"].isna()])
    keys = keys[keys.duplicated(keep=False)]
    keys = keys[table["split"][keys.index].map(list(_ROLES).index).sort_values(kind="stable").index]
    again = keys.index[keys.duplicated()]
    first = pd.Series(keys.index, index=keys.to_numpy()).groupby(level=0).first()[keys[again]].to_numpy()
    where = table["path"].take(first) + ", which is " + table["split"].take(first).map(_ROLES)
    problems[again] = table["path"][again] + REPEATED + where.set_axis(again)
    return problems


def _repeat_notes(table: pd.DataFrame) -> list[str]:
    """Notes on the images of each set that are left out since they are listed elsewhere too."""
    rows = table[_repeated(table)]
    first = [reason.rpartition(", which is ")[2] for reason in rows["error"]]
    counts = rows.assign(first=first).groupby(["data_set", "split", "first"]).size()
    return [
        f"{count} image(s) of {name} ({split}) are left out: they are listed elsewhere too, where they are {first}"
        for (name, split, first), count in counts.items()
    ]


def _repeated(table: pd.DataFrame) -> pd.Series:
    return table["error"].str.contains(REPEATED, regex=False).fillna(False).astype(bool)


def _check_classes(table: pd.DataFrame, task: str, splits: tuple[str, ...]) -> None:
    good, lacking = table["error"].isna(), []
    for split in splits:
        for label, name in _CLASSES.items():
            listed = table["split"].eq(split) & table["label"].eq(label)
            if not (listed & good).any():
                reasons = "".join(f"\n  {reason}" for reason in _reasons(table[listed]))
                found = f"{listed.sum()} found that cannot be used"
                lacking.append(f"no usable {name} ({label}) images in {split} ({found}){reasons}")
    if lacking:
        names = table["label"].map({0: "authentic", 1: "positive"})
        found = ", ".join(f"{split} {name} {count}" for (split, name), count in table.groupby(["split", names]).size().items())
        raise LayoutError(
            f"Task {task}: {'; '.join(lacking)}\nRead: {found}, from {', '.join(table['data_set'].unique())}. data/README.md "
            "says what goes where; split: in an entry of data: says what a set is for"
        )


def _reasons(rows: pd.DataFrame, shown: int = 5) -> Iterator[str]:
    """The errors of rows by kind, the commonest first: the count and the first error of each kind."""
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
