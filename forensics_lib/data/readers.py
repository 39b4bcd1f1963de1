"""Readers of public data sets as downloaded, and detection of a folder's layout.

Each reader takes a root and its entry of the ``data`` parameter, and returns ``Rows``.  Layouts are those of the data sets'
own pages and repositories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from forensics_lib.data.hub import has_masks, is_parquet, parquet_files, read_parquet
from forensics_lib.data.layouts import (
    TASK_A_LABELS,
    TGIF2_METHODS,
    TGIF_NAMES,
    photo_group,
    read_task_a,
    read_task_b_validation,
    read_tgif,
    sagid_path,
)
from forensics_lib.data.rows import LABELS, LayoutError, Rows, check_parts, contents, refuse_broken_links, scan
from forensics_lib.data.tables import read_listing, read_text, read_text_table
from forensics_lib.params import DataSet
from forensics_lib.utils.callables import load_callable
from forensics_lib.utils.files import broken_link, from_home
from forensics_lib.utils.names import CLASSES, class_of, split_in, split_of

Reader = Callable[[Path, DataSet], Rows]
ITW_SM = "ITW-SM"  # the folder in the archive
# Its file names are platform, class (optional) and number: Facebook_real_1042.jpg, x_618.jpg
PLATFORMS = frozenset(("facebook", "instagram", "linkedin", "reddit", "tiktok", "twitter", "x", "youtube", "telegram"))
_ITW_SM_NAME = re.compile(rf"(?:{'|'.join(sorted(PLATFORMS))})_(?:(?:real|fake)_)?\d+\.\w+", re.IGNORECASE)
_LSUN = "airplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
CNNDETECTION_CATEGORIES = frozenset([*_LSUN.split(), "sheep", "sofa", "train", "tvmonitor"])
KINDS = ("orig", "sp", "fr", "full")  # authentic, spliced, fully regenerated, fully synthetic
NOTHING = frozenset(("", "nan", "none", "null"))  # spellings of an empty field in a table
TABLE_COLUMNS = ("mask_path", "split", "source", "generator", "method", "kind", "group")  # optional columns of a table


def read_data_set(entry: DataSet) -> Rows:
    """The images of an entry of the ``data`` parameter, and notes on what its reader skipped.

    Raises ``LayoutError`` if the data is not laid out as expected or has no images, ``ValueError`` if a reader
    ``module:function`` cannot be loaded.
    """
    entry = recognised(entry)
    root, layout = from_home(entry.root), str(entry.layout)
    wanted = "its function gets the root (a Path) and the entry, and returns data.rows.Rows"
    reader = READERS[layout] if layout in READERS else load_callable(layout, "data: layout", wanted)
    rows = reader(root, entry)
    if layout not in READERS:
        _check_own(rows, entry)
    elif len(rows):
        in_rows = layout in ("table", "parquet")  # their readers use the entry's split as a default
        rows.state_split(None if in_rows else entry.split, root)
    if entry.task and entry.task != own_task(entry):
        rows.serve(entry.task)
    if not len(rows):
        raise LayoutError(f"{root}: no images in the layout {entry.layout}; {contents(root)}")
    return rows


def _check_own(rows: Rows, entry: DataSet) -> None:
    """Check the rows of a user's own reader.  Raises ``LayoutError``."""
    if not isinstance(rows, Rows):
        raise LayoutError(f"data: {entry.layout} returned {type(rows).__name__}; forensics_lib.data.rows.Rows is needed")
    table = rows.table()
    wrong = table[~table["label"].isin([0, 1]) | ~table["split"].isin(["train", "val", "test"])]
    if len(wrong):
        raise LayoutError(
            f"data: {entry.layout} gave {wrong['path'].iloc[0]} a label or split that is none of 0, 1, train, val, test"
        )
    validation = [path for path in table.loc[table["split"] == "train", "path"] if of_itw_sm(Path(path))]
    if validation:
        raise LayoutError(f"{validation[0]} is of ITW-SM, the validation set, and must not be trained on")


def recognised(entry: DataSet) -> DataSet:
    """The entry with its layout, which is detected if null.  Raises ``LayoutError``."""
    root = from_home(entry.root)
    if not root.exists():
        raise LayoutError(f"data: {broken_link(root) or f'no such folder or file {root}'}")
    refuse_broken_links(root)
    layout = entry.layout or detect_layout(root)
    if layout in ("itw_sm", "task_b_validation") and entry.split == "train":
        raise LayoutError(f"{root} is an official validation set ({layout}) and must not be trained on: leave its split out")
    return entry if entry.layout else DataSet(**entry.model_dump() | {"layout": layout})


def task_of(entry: DataSet) -> str:
    """The task of a data set with a known layout: as stated, else Task B if it has masks."""
    return entry.task or own_task(entry)


def own_task(entry: DataSet) -> str:
    """The task of a data set with a known layout, whatever its entry states: Task B if it has masks."""
    if entry.layout == "table":
        return "B" if "mask_path" in read_text_table(from_home(entry.root), rows=0) else "A"
    if entry.layout == "parquet":
        return "B" if has_masks(from_home(entry.root)) else "A"
    if entry.layout not in READERS:
        return "B" if read_data_set(entry.model_copy(update={"task": None})).table()["mask_path"].notna().any() else "A"
    return "B" if entry.layout in TASK_B_LAYOUTS else "A"


@dataclass(frozen=True)
class ClassFolder:
    """A folder of images at or below a class folder."""

    paths: list[str]
    label: int
    split: str | None  # None: no folder name tells it
    above: tuple[str, ...]  # folders above the class folder, without the split's

    def add_to(self, rows: Rows, source: str, generator: str | None = None) -> None:
        """Add the images to ``rows``; ``generator`` made the synthetic ones."""
        rows.add(self.paths, self.label, self.split, source, generator=generator if self.label else None)


def _by_class(rows: Rows, root: Path, category_train: bool = False) -> Iterator[ClassFolder]:
    """The folders of images below ``root``, with class and split by the outermost folders on their paths that name them.

    ``category_train``: the folder ``train`` above a class is a category.  Folders without a class are noted.  Raises
    ``LayoutError`` for a class inside of the other, or test images inside of training.
    """
    of_root = split_of(root.name) or split_of(root.resolve().name)
    for folder in rows.walk(root):
        parts, place = folder.parts, root.joinpath(*folder.parts)
        number = next((i for i, part in enumerate(parts) if class_of(part) is not None), None)
        if number is None:
            rows.leave_unread(place, f"no folder on its path names a class (known: {', '.join(sorted(CLASSES))})")
            continue
        category = number - 1 if category_train and parts[number - 1] == "train" else None
        named = next((i for i, part in enumerate(parts) if split_of(part) and i != category), None)
        split = of_root if named is None else split_of(parts[named])
        label = int(class_of(parts[number]) or 0)
        check_parts(place, parts[number + 1 :], label, None)
        if named is not None:
            check_parts(place, parts[named + 1 :], label, split)
        yield ClassFolder(folder.paths, label, split, tuple(part for i, part in enumerate(parts[:number]) if i != named))


def read_cnndetection(root: Path, entry: DataSet) -> Rows:
    """Wang et al. 2020: ``{split}/{category}/{0_real,1_fake}`` or ``{split}/{generator}/[{category}/]{0_real,1_fake}``.

    The root may be the whole data set or the folder of one split.
    """
    rows = Rows()
    parents = {tree[-2] for tree in class_trees(root) if len(tree) > 1}
    for found in _by_class(rows, root, category_train=not parents.isdisjoint(CNNDETECTION_CATEGORIES - {"train"})):
        tested = (entry.split or found.split) == "test"
        generator = found.above[0] if tested and found.above else "progan"
        found.add_to(rows, f"cnndetection/{generator}" if tested else "cnndetection", generator)
    return rows


def read_corvi_ldm(root: Path, entry: DataSet) -> Rows:
    """Corvi et al. 2022: ``{train,valid}/latent_diffusion_*/*.png``; its authentic images are listed files of other sets.

    ``real_coco.txt`` holds names in COCO's train2017 (``coco_root``), ``real_lsun.txt`` lines ``{category}_{file}`` of
    CNNDetection's ``{category}/0_real/{file}`` (``lsun_root``).
    """
    rows = Rows()
    for name, split in (("train", "train"), ("valid", "val")):
        for folder in rows.walk(root / name):
            if folder.parts and folder.parts[0].startswith("latent_diffusion_"):
                method = folder.parts[0].removeprefix("latent_diffusion_")
                rows.add(folder.paths, 1, split, "corvi_ldm", generator="latent_diffusion", method=method)
            else:
                rows.leave_unread((root / name).joinpath(*folder.parts), "its images are in no folder latent_diffusion_*")
        for source in ("coco", "lsun"):
            listing = root / name / f"real_{source}.txt"
            if listing.is_file():
                _add_listed(rows, listing, source, split, entry)
    return rows


def _add_listed(rows: Rows, listing: Path, source: str, split: str, entry: DataSet) -> None:
    place = entry.coco_root if source == "coco" else entry.lsun_root
    if not place:
        what = "COCO's train2017 images" if source == "coco" else "CNNDetection's train folder"
        raise LayoutError(f"{listing} lists files of another data set: set {source}_root to the folder with {what}")
    if not from_home(place).is_dir():
        raise LayoutError(f"{source}_root: {contents(from_home(place))}")
    lines = [line.strip() for line in re.split(r"[\r\n]", read_text(listing))]
    names = [line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines if line]
    if source == "lsun":
        names = [f"{category}/0_real/{file}" for category, _, file in (name.partition("_") for name in names)]
    groups = [photo_group("coco", Path(name).stem) for name in names] if source == "coco" else None
    rows.add([f"{from_home(place)}/{name}" for name in names], 0, split, source, groups=groups)


def of_itw_sm(path: Path) -> bool:
    """Whether a path has a folder named ITW-SM, the validation set."""
    return ITW_SM.lower() in map(str.lower, path.parts)


def named_as_itw_sm(names: Sequence[str]) -> bool:
    """Whether at least nine tenths of the names are ITW-SM's: platform and number."""
    fitting = sum(_ITW_SM_NAME.fullmatch(name) is not None for name in names)
    return fitting > 0 and fitting >= 0.9 * len(names)


def holds_itw_sm(root: Path) -> bool:
    """Whether the class folders in ``root`` hold files with names of ITW-SM, or folders named for platforms."""
    names: list[str] = []
    for place in (path for path in root.iterdir() if class_of(path.name) is not None and path.is_dir()):
        inside = [path.name for path in islice(place.iterdir(), 2_000) if path.name[0] != "."]
        if all(name.lower() in PLATFORMS for name in inside) or named_as_itw_sm([n for n in inside if "." in n]):
            names += inside
        elif inside:
            return False
    return bool(names)


def read_itw_sm(root: Path, _: DataSet) -> Rows:
    """ITW-SM: ``{0_real,1_fake}/``, with the platform as a folder or as the first part of file names.

    The root may also be the parent of the archive's folder ``ITW-SM``.
    """
    rows = Rows()
    inner = root / ITW_SM
    root = inner if inner.is_dir() else root
    for folder in rows.walk(root):
        label = class_of(folder.parts[0]) if folder.parts else None
        if label is None:
            rows.leave_unread(root.joinpath(*folder.parts), "it is in neither 0_real nor 1_fake")
            continue
        check_parts(root.joinpath(*folder.parts), folder.parts[1:], label, "val")
        platforms: dict[str, list[str]] = {}
        for name, path in zip(folder.images, folder.paths, strict=True):
            platform = folder.parts[1] if len(folder.parts) > 1 else name.split("_")[0]
            platforms.setdefault(platform.lower(), []).append(path)
        for platform, paths in sorted(platforms.items()):
            rows.add(paths, label, "val", f"itw_sm/{platform}")
    return rows


def read_genimage(root: Path, _: DataSet) -> Rows:
    """GenImage: ``{generator}/[...]/{train,val}/{ai,nature}/*``."""
    rows = Rows()
    for found in _by_class(rows, root):
        generator = found.above[0] if found.above else root.name
        found.add_to(rows, f"genimage/{generator}", generator)
    return rows


def read_community_forensics(root: Path, _: DataSet) -> Rows:
    """Community Forensics in its local form: ``{generator}/{real,fake}/*``, generators in nested folders too."""
    rows = Rows()
    for found in _by_class(rows, root):
        generator = "/".join(found.above) or root.name
        found.add_to(rows, f"community_forensics/{generator}", generator)
    return rows


def read_folders(root: Path, _: DataSet) -> Rows:
    """Folders named for class and split, in either order, or for the class only: ``{train,val,test}/{real,fake}``, ...

    The source is the set's name and the folders above the class.
    """
    rows = Rows()
    for found in _by_class(rows, root):
        found.add_to(rows, "/".join((root.name, *found.above)))
    return rows


def read_authentic(root: Path, _: DataSet) -> Rows:
    """Photographs in any folders, all authentic; the source is the set's name and the first folder."""
    rows = Rows()
    for folder in rows.walk(root):
        split = next((split for part in folder.parts if (split := split_of(part))), None)
        rows.add(folder.paths, 0, split, "/".join((root.name, *folder.parts[:1])), kind="orig")
    return rows


def read_sagi_d(root: Path, _: DataSet) -> Rows:
    """SAGI-D: ``sagid.csv`` beside the folders of the splits; the listed originals are the authentic images."""
    columns = ["img_path", "mask_path", "src_path", "split", "inpainting_model", "diffusion_model", "type"]
    listing = read_listing(root / "sagid.csv", columns)
    rows, originals = Rows(), set()
    for item in listing.itertuples(index=False):
        image, mask = sagid_path(root, item.img_path, ()), sagid_path(root, item.mask_path, ())
        photos = image.relative_to(root).parts[1]
        split, source, group = split_of(item.split) or "test", f"sagi_d/{photos}", photo_group(photos, image.stem)
        if item.src_path:
            original = sagid_path(root, item.src_path, ())
            group = photo_group(photos, original.stem)
            if original not in originals:
                originals.add(original)
                rows.add([str(original)], 0, split, source, groups=[group])
        made = {"kind": item.type, "generator": item.diffusion_model or None, "method": item.inpainting_model}
        rows.add([str(image)], 1, split, source, groups=[group], masks=[str(mask)], **made)
    return rows


def read_table(path: Path, entry: DataSet) -> Rows:
    """A CSV with ``path`` and ``label`` (0 or 1), and any of ``TABLE_COLUMNS``; paths are relative to the table's folder."""
    table = read_text_table(path)
    missing = {"path", "label"} - set(table.columns)
    unknown = set(table.columns) - {"path", "label", *TABLE_COLUMNS}
    if missing or unknown:
        raise LayoutError(
            f"{path} has the columns {list(table.columns)}; needed: path, label; allowed as well: {', '.join(TABLE_COLUMNS)}"
        )
    named = split_in(path.name) or split_of(path.parent.name)
    if entry.split == "train" and named == "test":
        raise LayoutError(f"{path}: split: train, but its name says test, and test images are never trained on")
    rows = Rows()
    for number, item in zip(table.index, table.to_dict("records"), strict=True):
        _add_table_row(rows, path, number, item, entry.split or named)
    if "mask_path" in table:
        masked = table["label"].str.lower().map(LABELS).eq(0) & ~table["mask_path"].str.lower().isin(NOTHING)
        if masked.any():
            rows.leave_unread(path, f"the masks of {masked.sum()} rows with label 0, since authentic images have none")
    return rows


def _add_table_row(rows: Rows, table: Path, number: int, item: dict[str, str], default_split: str | None) -> None:
    values = {name: None if item.get(name, "").lower() in NOTHING else item[name] for name in TABLE_COLUMNS}
    label = LABELS.get(item["label"].lower())
    split = split_of(values["split"]) if values["split"] else default_split
    if label is None or (split is None and values["split"]):
        raise LayoutError(
            f"{table} row {number}: label {item['label']!r} must be 0 or 1, split {values['split']!r} train, val or test"
        )
    if not item["path"]:
        raise LayoutError(f"{table} row {number}: names no path")
    image = str(table.parent / item["path"].replace("\\", "/"))
    if split == "train" and of_itw_sm(Path(image)):
        raise LayoutError(f"{table} row {number}: {image} is of ITW-SM, the validation set, and must not be trained on")
    mask = str(table.parent / values["mask_path"].replace("\\", "/")) if values["mask_path"] and label else None
    kind = values["kind"] and values["kind"].lower()
    if kind not in (None, *KINDS):
        raise LayoutError(f"{table} row {number}: kind {values['kind']!r} must be one of {', '.join(KINDS)}")
    made = {"kind": kind, "generator": values["generator"], "method": values["method"]}
    rows.add([image], label, split, values["source"] or table.stem, groups=[values["group"]], masks=[mask], **made)


READERS: dict[str, Reader] = {
    "own": lambda root, _: read_task_a(root),
    "cnndetection": read_cnndetection,
    "corvi_ldm": read_corvi_ldm,
    "itw_sm": read_itw_sm,
    "genimage": read_genimage,
    "community_forensics": read_community_forensics,
    "folders": read_folders,
    "authentic": read_authentic,
    "table": read_table,
    "parquet": read_parquet,
    "tgif": lambda root, _: read_tgif(root),
    "task_b_validation": lambda root, _: read_task_b_validation(root),
    "sagi_d": read_sagi_d,
}
TASK_B_LAYOUTS = frozenset({"tgif", "task_b_validation", "sagi_d"})
CONSTRAINED_LAYOUTS = frozenset({"cnndetection", "corvi_ldm", "itw_sm", "tgif", "task_b_validation", "own"})

# Patterns below the root that identify a layout (any one of them), in the order of trial
_SIGNS: dict[str, tuple[str, ...]] = {
    "task_b_validation": ("taskB_val.csv",),
    "sagi_d": ("sagid.csv",),
    "tgif": tuple(f"{folder}/*" for folder in (*TGIF_NAMES, *TGIF2_METHODS)),
    "corvi_ldm": ("train/latent_diffusion_*", "valid/latent_diffusion_*"),
}
# Tried after those: places of class folders, in any spelling
_TREES = {
    "own": "{train,val}/{0_real,1_fake}",
    "itw_sm": "{0_real,1_fake} with files named for platforms",
    "cnndetection": "[{train,val,test}/]{category}/{0_real,1_fake}",
    "genimage": "{generator}/[...]/{train,val}/{ai,nature}",
    "community_forensics": "{generator}/{real,fake}",
    "folders": "{train,val,test}/{real,fake}, {real,fake}/{train,val,test} or {real,fake}",
}


def class_trees(root: Path, depth: int = 5) -> list[tuple[str, ...]]:
    """The class folders below ``root``, at most ``depth`` levels deep, as sorted parts of their paths."""
    found: list[tuple[str, ...]] = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        if parts and class_of(parts[-1]) is not None:
            found.append(parts)
        elif len(parts) < depth:
            inside = [entry.name for entry in scan(root.joinpath(*parts)) if entry.name[0] != "." and entry.is_dir()]
            waiting += [(*parts, name) for name in inside]
    return sorted(found)


def _layout_of_trees(root: Path) -> str | None:
    """The layout by the places of class folders."""
    trees = class_trees(root)
    if not trees:
        return None
    tops, plain = {tree[0] for tree in trees}, all(tree[-1].lower() in TASK_A_LABELS for tree in trees)
    flat = all(len(tree) == 1 for tree in trees)
    if (plain and tops == {ITW_SM}) or (flat and holds_itw_sm(root)):
        return "itw_sm"
    if flat:
        return "folders"
    if all({tree[-1].lower()} <= {"ai", "nature"} and len(tree) > 1 and split_of(tree[-2]) for tree in trees):
        return "genimage"
    if plain and any(split_of(tree[0]) and len(tree) == 2 for tree in trees) and not tops & CNNDETECTION_CATEGORIES - {"train"}:
        return "own"
    if plain:
        return "cnndetection"
    told = any(split_of(part) for tree in trees for part in tree)
    real_fake = all(tree[-1].lower() in ("real", "fake") and len(tree) > 1 for tree in trees)
    return "community_forensics" if real_fake and not told else "folders"


def detect_layout(root: Path) -> str:
    """The layout of a folder or file by its content.  Raises ``LayoutError`` if none fits."""
    if root.is_file() and root.suffix.lower() == ".csv":
        return "table"
    if root.is_file() and is_parquet(root.name):
        return "parquet"
    if layout := _sign_of(root):
        return layout
    if parquet_files(root):
        return "parquet"
    inner = [(path, layout) for path in sorted(root.glob("*/")) if (layout := _sign_of(path))]
    hint = "".join(f" Did you mean root: {path} ({layout})?" for path, layout in inner[:3])
    looked = "; ".join(f"{layout}: {' or '.join(patterns)}" for layout, patterns in _SIGNS.items())
    looked += "".join(f"; {layout}: {pattern}" for layout, pattern in _TREES.items()) + "; parquet: **/*.parquet"
    raise LayoutError(f"no known layout in {root}. Looked for {looked}. {contents(root)}.{hint}")


def _sign_of(root: Path) -> str | None:
    """The first layout with a sign below ``root``."""
    found = (name for name, patterns in _SIGNS.items() if any(next(root.glob(pattern), None) for pattern in patterns))
    return next(found, None) or _layout_of_trees(root)
