"""The data that a run may train on, by layouts, by names in the official sets, and by the targets of links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import pandas as pd

from forensics_lib.data.headers import look
from forensics_lib.data.layouts import TGIF_NAMES, TGIF_SPLITS
from forensics_lib.data.readers import (
    CNNDETECTION_CATEGORIES,
    CONSTRAINED_LAYOUTS,
    ITW_SM,
    PLATFORMS,
    class_trees,
    holds_itw_sm,
    named_as_itw_sm,
    of_itw_sm,
    task_of,
)
from forensics_lib.data.rows import LayoutError, joined, scan
from forensics_lib.data.tables import read_text_table
from forensics_lib.images.io import SUFFIXES
from forensics_lib.params import DataSet
from forensics_lib.run import Run
from forensics_lib.utils.files import from_home
from forensics_lib.utils.names import class_of, split_of

LDM_SETS = ("class2image", "noise2image_FFHQ", "noise2image_bedrooms", "noise2image_churches")
LDM_FOLDERS = frozenset(f"latent_diffusion_{name}" for name in (*LDM_SETS, *(f"text2img_set{i}" for i in range(3))))
# The generators of CNNDetection's test set but for ProGAN, which its training set has as well
_GANS = "biggan crn cyclegan deepfake gaugan imle san seeingdark stargan stylegan stylegan2 whichfaceisreal"
TEST_GENERATORS = frozenset(_GANS.split())
VALIDATION_LAYOUTS = frozenset({"itw_sm", "task_b_validation"})
LISTED = frozenset({"table", "parquet"})  # layouts that list images instead of holding them in folders
_SOME = 200  # image names checked in a folder


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of a data set, or a link to a file in it, with its real place."""

    path: str  # as the set's reader reaches it
    parts: tuple[str, ...]  # folders from the set's root to it
    target: Path  # the real folder; for a file the real folder around it
    linked: bool  # whether reached through a link
    file: str | None = None  # the real file behind a link to a file
    names: tuple[str, ...] = ()  # of the first images in a folder


def refuse_misuse(run: Run, task: str, entries: list[DataSet]) -> None:
    """Raise ``LayoutError`` if a set of ``task`` would train on validation data or, in a constrained run, on data that is
    not official, also through links; the message names each place, its target and the reason.
    """
    for cached in (_real_folder, _names_in, _has_platforms, _listed_folders, _linked_from):
        cached.cache_clear()  # files may have changed since the last call
    own = [entry for entry in entries if task_of(entry) == task and ":" not in str(entry.layout) and entry.layout not in LISTED]
    places = {entry: places_of(entry) for entry in own}
    _refuse_validation(places, _never_trained_on(run, entries))
    judged = [entry for entry in entries if run.params.official_only(task_of(entry))]
    reasons = {entry.root: _why_unofficial(entry, CONSTRAINED_LAYOUTS) for entry in judged}
    _raise_unofficial([f"{root} ({reason})" for root, reason in reasons.items() if reason], CONSTRAINED_LAYOUTS)
    if run.params.official_only(task):
        _refuse_foreign(run, task, entries, places)


def refuse_validation_rows(run: Run, task: str, entries: list[DataSet], table: pd.DataFrame) -> None:
    """Raise ``LayoutError`` if a training row is a file of an official validation set or a test image, by identity or by
    name, or of ``dataset_open`` where ``task`` trains on official data only; ``entries`` are the run's sets of both tasks.
    """
    train = table[table["split"].eq("train")]
    kept = _never_trained_on(run, entries).items()
    known = {identity: what for root, what in kept for identity in _identities(root)}
    same = train[train["identity"].isin(list(known))]
    found = [f"{path} is a file of {known[identity]}" for path, identity in zip(same["path"], same["identity"], strict=True)]
    listed = train[train["layout"].eq("table") | train["layout"].str.contains(":", regex=False)]
    names: dict[str, list[str]] = {}
    for path in listed["path"]:
        target = os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114 (speed)
        names.setdefault(target.rpartition(os.sep)[0], []).append(target.rpartition(os.sep)[2])
    for folder, images in names.items():
        target = Path(folder).resolve()
        if of_itw_sm(target) or named_as_itw_sm(images) or _by_platforms(target):
            found.append(f"{folder}{os.sep}{images[0]} lies in {target}: ITW-SM")
    _raise_validation(found)
    if run.params.official_only(task):
        _refuse_hard_links(run.data / "dataset_open", train)


def _refuse_hard_links(opened: Path, train: pd.DataFrame) -> None:
    """Raise ``LayoutError`` if a training row is a file of ``dataset_open`` under another name."""
    several = train[[_names_of(path) > 1 for path in train["path"]]] if opened.is_dir() else train[:0]
    if len(several):
        same = several["identity"].isin(_identities(opened, but_official=True))
        found = [f"{path} is a file of {opened} too: it is open data" for path in several.loc[same, "path"]]
        _raise_unofficial(found, CONSTRAINED_LAYOUTS)


def _names_of(path: str) -> int:
    """The number of a file's hard links; 0 if it does not exist."""
    try:
        return os.stat(path).st_nlink  # noqa: PTH116 (speed)
    except OSError:
        return 0


def _raise_validation(found: list[str]) -> None:
    if found:
        raise LayoutError(
            f"{joined(found, '; ')}. ITW-SM and the Task B validation set are validation data of every run and must not be "
            "trained on, nor must the test images"
        )


def _never_trained_on(run: Run, entries: list[DataSet]) -> dict[Path, str]:
    """The real folders of official validation sets and of test images, with descriptions."""
    listed = [from_home(entry.root) for entry in entries if entry.layout in VALIDATION_LAYOUTS]
    roots = [root.resolve() for root in (run.data / "dataset_taskB" / "validation", *listed)]
    tests = {run.test_folder(task).resolve(): f"the Task {task} test images" for task in "AB"}
    return {root: f"the validation set {root}" for root in roots} | tests


def _identities(root: Path, but_official: bool = False) -> list[int]:
    """The identities of all files below a folder, also through links; ``but_official`` omits known official folders."""
    paths, real = [], root.resolve()
    for folder in {place.target for place in _walk(root) if not place.file}:
        inside = folder.is_relative_to(real)
        if but_official and _official(Path(*folder.relative_to(real).parts[2:]) if inside else folder):  # after split and class
            continue
        paths += [entry.path for entry in scan(folder) if entry.is_file()]
    return [identity for identity in look(paths)[:, 2].tolist() if identity != -1]


def places_of(entry: DataSet) -> list[Place]:
    """The folders of a set and the links to files in them, as its reader reaches them."""
    found = list(_walk(from_home(entry.root)))
    if entry.layout != "own":
        return found
    return [p for p in found if len(p.parts) < 2 or (split_of(p.parts[0]) and class_of(p.parts[1]) is not None)]


def _walk(root: Path) -> Iterator[Place]:
    """Every real folder once below each pair of first folders, and links to files; files are not opened."""
    seen: set[tuple[tuple[str, ...], str]] = set()
    waiting: list[tuple[str, tuple[str, ...], bool]] = [(str(root), (), root.is_symlink())] if root.is_dir() else []
    while waiting:
        path, parts, linked = waiting.pop()
        real = os.path.realpath(path)
        if (parts[:2], real) in seen:
            continue
        seen.add((parts[:2], real))
        links: list[str] = []
        names: list[str] = []
        for entry in scan(path):
            if entry.name[0] == "." or entry.name == "__MACOSX":
                continue
            if _named_as_image(entry.name):
                (links if entry.is_symlink() else names).append(entry.name)
            elif entry.is_dir():
                waiting.append((entry.path, (*parts, entry.name), linked or entry.is_symlink()))
        yield Place(path, parts, Path(real), linked, names=tuple(names[:_SOME]))
        for name in links:
            file = f"{path}{os.sep}{name}"
            target = _real_file(file)
            yield Place(file, parts, _real_folder(os.path.dirname(target)), True, target)  # noqa: PTH120 (speed)


def _named_as_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES


def _real_file(link: str) -> str:
    """The real path behind a link to a file, in a third of the time of ``os.path.realpath``."""
    for _ in range(40):
        try:
            link = os.path.join(_real_folder(os.path.dirname(link)), os.readlink(link))  # noqa: PTH115, PTH118, PTH120 (speed)
        except OSError:
            break
    return os.path.join(_real_folder(os.path.dirname(link)), os.path.basename(link))  # noqa: PTH118, PTH119, PTH120 (speed)


@lru_cache(maxsize=10_000)
def _real_folder(folder: str) -> Path:
    return Path(os.path.realpath(folder))


def _split(entry: DataSet, place: Place) -> str:
    """The split of the images at a place, by the entry and the folder names."""
    if entry.layout in VALIDATION_LAYOUTS:
        return "val"
    named = (split_of(part) for part in (*place.parts, from_home(entry.root).name))
    return entry.split or next((split for split in named if split), "train")


def _refuse_validation(places: dict[DataSet, list[Place]], roots: dict[Path, str]) -> None:
    found, known = [], dict[Path, str | None]()
    for entry, inside in places.items():
        for place in (place for place in inside if _split(entry, place) == "train"):
            target = place.target
            if target not in known:
                names = _names_in(target) if place.file else place.names
                if of_itw_sm(target) or named_as_itw_sm(names) or _by_platforms(target):
                    known[target] = "ITW-SM, by its name, its folders' or its files' names"
                else:
                    known[target] = next((what for root, what in roots.items() if target.is_relative_to(root)), None)
            if known[target]:
                found.append(f"{place.path} leads into {target}: {known[target]}")
    _raise_validation(found)


def _by_platforms(target: Path) -> bool:
    """Whether ``target`` is in a platform's folder of a class folder that holds only such folders.

    Class folders of a training split do not count: their folders are sources, which may be named for platforms.
    """
    parts = target.parts
    number = next((i for i in reversed(range(len(parts) - 1)) if class_of(parts[i]) is not None), None)
    if number is None or parts[number + 1].lower() not in PLATFORMS or split_of(parts[number - 1]) == "train":
        return False
    return _has_platforms(Path(*parts[:number]))


@lru_cache(maxsize=1_000)
def _has_platforms(root: Path) -> bool:
    try:
        return holds_itw_sm(root)
    except OSError:
        return False


@lru_cache(maxsize=10_000)
def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(islice((entry.name for entry in scan(folder) if _named_as_image(entry.name)), _SOME))


def _raise_unofficial(refused: list[str], official: frozenset[str]) -> None:
    if refused:
        raise LayoutError(
            f"a constrained run takes official data only; refused: {joined(refused, '; ')}. "
            f"Take them out, or set run_type: open. Official layouts: {', '.join(sorted(official))}"
        )


def _why_unofficial(entry: DataSet, official: frozenset[str]) -> str | None:
    """Why a set is not official by its layout or folder names; None if it is."""
    root = from_home(entry.root)
    if entry.layout not in official:
        return str(entry.layout)
    if entry.layout == "itw_sm":
        named = of_itw_sm(root) or of_itw_sm(root.resolve()) or (root / ITW_SM).is_dir() or _has_platforms(root)
        why = "itw_sm, but neither its folders nor its files are named for platforms, as those of ITW-SM are"
        return None if named else why
    if entry.layout == "cnndetection":
        return _why_not_cnndetection(entry, root)
    if entry.layout == "corvi_ldm":
        folders = {path.name for split in ("train", "valid") for path in root.glob(f"{split}/*/")}
        return _unknown(folders, LDM_FOLDERS, "the latent diffusion set's folders")
    return None


def _unknown(found: set[str], known: frozenset[str], what: str) -> str | None:
    others = sorted(found - known)
    return f"{', '.join(others[:5])}: not among {what}" if others else None


def _why_not_cnndetection(entry: DataSet, root: Path) -> str | None:
    """Whether a training or validation split has class folders outside of the 20 categories."""
    categories = set()
    for *above, _ in class_trees(root):
        told = split_of(above[0]) if len(above) > 1 else None
        if (told or split_of(root.name)) == "test":
            if entry.split == "train":
                return "split: train, but it is a test split, which is never trained on"
            continue
        category = "/".join(above[1:] if told else above)
        categories.add(category or "class folders outside of categories")
    return _unknown(categories, CNNDETECTION_CATEGORIES, "CNNDetection's training and validation categories")


def _refuse_foreign(run: Run, task: str, entries: list[DataSet], places: dict[DataSet, list[Place]]) -> None:
    """Raise ``LayoutError`` for the places of a constrained run's sets that lead to data which is not official."""
    opened, data, kept_apart, found = run.data / "dataset_open", run.data.resolve(), _kept_apart(places), []
    for entry, inside in places.items():
        claims = _claims(run, task, [other for other in entries if other != entry])
        roots = [from_home(root) for root in (entry.coco_root, entry.lsun_root) if root]
        listed = [Place(str(root), (), root.resolve(), True) for root in roots]
        known: dict[tuple[Path, Path, bool, bool], str | None] = {}
        for place in [*inside, *listed]:
            if not (place.linked or (entry.layout == "own" and not place.parts)):
                continue
            trains = _split(entry, place) == "train"
            key = place.target, _base_of(place, data), place.linked, trains
            if key not in known:
                above = (place.target, *place.target.parents)
                why = next((claims[folder] for folder in above if folder in claims), None)
                why = why or _foreign(*key, task)
                known[key] = why or _why_open(opened, place.target, *above)
            why = known[key] or (_why_open(opened, place.target, place.file) if place.file else None)
            if not why and trains:
                why = kept_apart.get(place.file or place.target) or kept_apart.get(place.target)
            if why:
                found.append(f"{place.path} leads into {place.file or place.target}: {why}")
    _raise_unofficial(found, CONSTRAINED_LAYOUTS)


def _kept_apart(places: dict[DataSet, list[Place]]) -> dict[Path | str, str]:
    """The real folders and files of the run's validation and test images, with descriptions."""
    roles = {"val": "it is in the run's validation set", "test": "it is in a test split of the run's sets"}
    splits = [(place.file or place.target, _split(entry, place)) for entry, inside in places.items() for place in inside]
    return {target: roles[split] for target, split in splits if split != "train"}


def _base_of(place: Place, data: Path) -> Path:
    """The folder below which names count for ``place``: names above the data root, or a set's root, do not."""
    if place.target.is_relative_to(data):
        return data
    return Path(place.target.anchor) if place.linked else place.target.parent


def _claims(run: Run, task: str, others: list[DataSet]) -> dict[Path, str]:
    """Real folders with another purpose than training for ``task``, with descriptions."""
    claims = {run.data / "dataset_open": "it is open data"}
    claims |= {run.test_folder(name): f"it is the Task {name} test images" for name in "AB"}
    if task == "A":
        claims[run.data / "dataset_taskB"] = "it is Task B's data"
    for other in others:
        trained_on = ("own", "cnndetection", "corvi_ldm") if task == "A" else ("tgif", "sagi_d")
        if other.layout not in trained_on:
            claims[from_home(other.root)] = f"it is the set {other.root} ({other.layout})"
    return {root.resolve(): what for root, what in claims.items()}


def _why_open(opened: Path, folder: Path, *paths: Path | str) -> str | None:
    """Why images in a real folder are open data: a link in ``opened`` leads to one of ``paths``, and none is official."""
    reached = not _linked_from(opened).isdisjoint(paths) and not _official(folder)
    return f"{opened} holds it too: it is open data" if reached else None


@lru_cache(maxsize=1)
def _linked_from(root: Path) -> frozenset[Path | str]:
    """The real folders and files behind links below ``root``."""
    return frozenset(found.file or found.target for found in _walk(root) if found.linked)


def _official(target: Path) -> bool:
    """Whether a folder is a place of training images in CNNDetection, the latent diffusion set or COCO."""
    parts = target.parts
    lsun = any(one in CNNDETECTION_CATEGORIES and other in ("0_real", "1_fake") for one, other in pairwise(parts))
    return lsun or not LDM_FOLDERS.isdisjoint(parts) or "train2017" in parts


def _foreign(target: Path, base: Path, linked: bool, trains: bool, task: str) -> str | None:
    """Why images in ``target`` are not official data of ``task``, by the folders from ``base`` to it or by a table."""
    names = target.relative_to(base).parts
    parts = [part.lower() for part in names]
    if any(name in ("ai", "nature") and split_of(above) for above, name in pairwise(parts)):
        return "it is laid out as GenImage"
    named = [number for number, part in enumerate(parts) if part in ("real", "fake")]
    for number in named:
        beside = base.joinpath(*names[:number], {"real": "fake", "fake": "real"}[parts[number]])
        if number == len(parts) - 1 or beside.is_dir():
            return "it is laid out as Community Forensics"
    if "dataset_open" in parts:
        return "it is open data"
    other = _of_other_task(target, base, task) or (_test_split(base, names) if trains else None)
    return other or (_listed_in(target) if linked else None)


def _of_other_task(target: Path, base: Path, task: str) -> str | None:
    for folder in (above for above in (target, *target.parents[:5]) if above.is_relative_to(base)):
        if (folder / "sagid.csv").is_file():
            return "it is of SAGI-D"
        if (folder / "taskB_val.csv").is_file():
            return "it is of the Task B validation set"
    for one, other in pairwise(target.relative_to(base).parts):
        if task == "A" and one in (*TGIF_NAMES, "orig") and other in TGIF_SPLITS:
            return "it is of TGIF"
    return None


def _test_split(base: Path, parts: tuple[str, ...]) -> str | None:
    """Whether ``parts`` below ``base`` are in a test split, or in a folder of CNNDetection's test generators."""
    if next((split for part in reversed(parts[-2:]) if (split := split_of(part))), None) == "test":
        return "it is a test split"
    number = next((i for i in reversed(range(len(parts))) if parts[i].lower() in ("0_real", "1_fake")), None)
    for up, spelled in enumerate(reversed(parts[max(0, number - 3) : number] if number else ())):
        name = spelled.lower()
        if split_of(name) == "test":
            return "it is a test split"
        if split_of(name) and not (up == 0 and name == "train"):  # which is also a category
            return None
        beside = base.joinpath(*parts[: parts.index(spelled)]).glob("*") if name == "progan" else ()
        if up < 2 and (name in TEST_GENERATORS or any(path.name.lower() in TEST_GENERATORS for path in beside)):
            return "it is of CNNDetection's test set"
    return None


def _listed_in(target: Path) -> str | None:
    """Whether there are parquet files beside the images, or a table there or one folder above lists some of them."""
    if _official(target):
        return None
    if next(target.glob("*.parquet"), None):
        return "it is a parquet set"
    tables = [entry for folder in (target.parent, target) for entry in scan(folder) if entry.name[-4:].lower() == ".csv"]
    for table in (Path(entry) for entry in tables if entry.is_file()):
        if any(folder.is_relative_to(target) for folder in _listed_folders(table)):
            return f"it is the set of the table {table}"
    return None


@lru_cache(maxsize=1_000)
def _listed_folders(table: Path) -> frozenset[Path]:
    """The real folders of the images listed by a table with ``path`` and ``label``; none of another table."""
    try:
        rows = read_text_table(table)
    except LayoutError:
        return frozenset()
    if not {"path", "label"} <= set(rows.columns):
        return frozenset()
    folders = {path.replace("\\", "/").rpartition("/")[0] for path in rows["path"].unique()}
    return frozenset((table.parent / folder).resolve() for folder in folders)
