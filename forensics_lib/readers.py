"""Readers of public data sets exactly as they are downloaded, and the recognition of a folder's layout.

Each reader takes a root and the entry of the ``data`` parameter that named it, and gives the rows of ``layouts``.
Layouts are those of the data sets' own pages and repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from forensics_lib.files import from_home
from forensics_lib.layouts import (
    LayoutError,
    Row,
    contents,
    image_files,
    make_row,
    photo_group,
    read_listing,
    read_task_a,
    read_task_b_validation,
    read_tgif,
    sagid_path,
)
from forensics_lib.params import DataSet

Reader = Callable[[Path, DataSet], list[Row]]
SPLITS = {"train": "train", "progan_train": "train", "val": "val", "valid": "val", "progan_val": "val"}
SPLITS |= {"validation": "val", "test": "test", "CNN_synth_testset": "test"}
TABLE_COLUMNS = ("mask_path", "split", "source", "generator", "method", "kind", "group")  # a table may have these


def read_data_set(entry: DataSet) -> list[Row]:
    """The rows of one entry of the ``data`` parameter; its layout is recognised where none is named."""
    entry = recognised(entry)
    root = from_home(entry.root)
    rows = READERS[entry.layout](root, entry)
    if not rows:
        raise LayoutError(f"{root}: no images in the layout {entry.layout}; {contents(root)}")
    return rows


def recognised(entry: DataSet) -> DataSet:
    """The entry with its layout, recognised where none is named.  Raises ``LayoutError``."""
    root = from_home(entry.root)
    if not root.exists():
        raise LayoutError(f"data: no such folder or file {root}")
    return entry if entry.layout else DataSet(**entry.model_dump() | {"layout": detect_layout(root)})


def task_of(entry: DataSet) -> str:
    """The task that a data set with a known layout serves: Task B where it has masks."""
    if entry.layout == "table":
        header = from_home(entry.root).read_text(encoding="utf-8-sig").partition("\n")[0]
        return "B" if "mask_path" in header.strip().split(",") else "A"
    return "B" if entry.layout in TASK_B_LAYOUTS else "A"


def _by_class(root: Path, names: dict[str, int]) -> Iterator[tuple[Path, int, tuple[str, ...]]]:
    """Images below folders that are named for a class: path, label, and the folders above the class's."""
    for path in image_files(root):
        parts = path.relative_to(root).parts[:-1]
        for number, part in enumerate(parts):
            if part in names:
                yield path, names[part], parts[:number]
                break


def read_cnndetection(root: Path, entry: DataSet) -> list[Row]:
    """Wang et al. 2020: ``{split}/{category}/{0_real,1_fake}`` or ``{split}/{generator}/[{category}/]{0_real,1_fake}``.

    The root may be the whole data set or one split's folder, whose name or the entry's ``split`` then tells which.
    """
    rows = []
    for path, label, above in _by_class(root, {"0_real": 0, "1_fake": 1}):
        named = SPLITS.get(above[0]) if above else None
        split = entry.split or named or SPLITS.get(root.name, "train")
        inner = above[1:] if named else above
        generator = inner[0] if split == "test" and inner else "progan"
        source = "cnndetection" if split != "test" else f"cnndetection/{generator}"
        rows.append(make_row(path, label, split, source, kind=_kind(label), generator=generator if label else None))
    return rows


def read_corvi_ldm(root: Path, entry: DataSet) -> list[Row]:
    """Corvi et al. 2022: ``{train,valid}/latent_diffusion_*/*.png``; its authentic images are lists of other sets' files.

    ``real_coco.txt`` holds names in COCO's train2017 (``coco_root``), ``real_lsun.txt`` lines ``{category}_{file}`` of
    CNNDetection's ``{category}/0_real/{file}`` (``lsun_root``).
    """
    rows = []
    for folder, split in (("train", "train"), ("valid", "val")):
        for path in image_files(root / folder):
            if path.parent.name.startswith("latent_diffusion_"):
                method = path.parent.name.removeprefix("latent_diffusion_")
                rows.append(make_row(path, 1, split, "corvi_ldm", kind="full", generator="latent_diffusion", method=method))
        for name in ("coco", "lsun"):
            listing = root / folder / f"real_{name}.txt"
            if listing.is_file():
                rows += _listed(listing, name, split, entry)
    return rows


def _listed(listing: Path, name: str, split: str, entry: DataSet) -> list[Row]:
    place = entry.coco_root if name == "coco" else entry.lsun_root
    if not place:
        what = "COCO's train2017 images" if name == "coco" else "CNNDetection's train folder"
        raise LayoutError(f"{listing} lists files of another data set: set {name}_root to the folder with {what}")
    rows = []
    for line in listing.read_text(encoding="utf-8-sig").split():
        category, _, file = line.partition("_")
        path = from_home(place) / (Path(line).name if name == "coco" else Path(category) / "0_real" / Path(file).name)
        group = photo_group("coco", path.stem) if name == "coco" else None
        rows.append(make_row(path, 0, split, name, kind="orig", group=group))
    return rows


def read_itw_sm(root: Path, entry: DataSet) -> list[Row]:
    """ITW-SM: ``{0_real,1_fake}/``, the platform as a folder or as the first part of the file's name."""
    rows = []
    for path, label, above in _by_class(root, {"0_real": 0, "1_fake": 1}):
        folder = path.parent.name
        platform = folder if folder not in ("0_real", "1_fake") else path.name.split("_")[0]
        if not above:
            rows.append(make_row(path, label, entry.split or "val", f"itw_sm/{platform.lower()}", kind=_kind(label)))
    return rows


def read_genimage(root: Path, entry: DataSet) -> list[Row]:
    """GenImage: ``{generator}/[...]/{train,val}/{ai,nature}/*``."""
    rows = []
    for path, label, above in _by_class(root, {"nature": 0, "ai": 1}):
        split = entry.split or (SPLITS.get(above[-1], "train") if above else "train")
        generator = above[0] if above else root.name
        source = f"genimage/{generator}"
        rows.append(make_row(path, label, split, source, kind=_kind(label), generator=generator if label else None))
    return rows


def read_community_forensics(root: Path, entry: DataSet) -> list[Row]:
    """Community Forensics in its local form: ``{generator}/{real,fake}/*``."""
    rows = []
    for path, label, above in _by_class(root, {"real": 0, "fake": 1}):
        generator = "/".join(above) or root.name
        source = f"community_forensics/{generator}"
        split = entry.split or "train"
        rows.append(make_row(path, label, split, source, kind=_kind(label), generator=generator if label else None))
    return rows


def read_sagi_d(root: Path, _: DataSet) -> list[Row]:
    """SAGI-D: ``sagid.csv`` beside its splits' folders; the listed originals are the authentic images."""
    columns = ["img_path", "mask_path", "src_path", "split", "inpainting_model", "diffusion_model", "type"]
    listing = read_listing(root / "sagid.csv", columns)
    rows, originals = [], {}
    for item in listing.itertuples(index=False):
        image, mask = sagid_path(root, item.img_path, ()), sagid_path(root, item.mask_path, ())
        source = image.relative_to(root).parts[1]
        split = SPLITS.get(item.split, "test")
        group = photo_group(source, image.stem)
        if item.src_path:
            original = sagid_path(root, item.src_path, ())
            group = photo_group(source, original.stem)
            originals[original] = make_row(original, 0, split, f"sagi_d/{source}", kind="orig", group=group)
        names = {"generator": item.diffusion_model or None, "method": item.inpainting_model}
        rows.append(make_row(image, 1, split, f"sagi_d/{source}", kind=item.type, group=group, mask=mask, **names))
    return [*originals.values(), *rows]


def read_table(path: Path, entry: DataSet) -> list[Row]:
    """A CSV with ``path`` and ``label`` (0 or 1), and any of ``TABLE_COLUMNS``; paths count from the table's folder."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    missing = {"path", "label"} - set(table.columns)
    unknown = set(table.columns) - {"path", "label", *TABLE_COLUMNS}
    if missing or unknown:
        raise LayoutError(
            f"{path} has the columns {list(table.columns)}; needed: path, label; allowed as well: {', '.join(TABLE_COLUMNS)}"
        )
    return [_table_row(path, number, item, entry) for number, item in enumerate(table.to_dict("records"), start=2)]


def _table_row(table: Path, number: int, item: dict[str, Any], entry: DataSet) -> Row:
    values = {name: item.get(name) or None for name in TABLE_COLUMNS}
    split = SPLITS.get(values["split"] or entry.split or "train")
    if item["label"] not in ("0", "1") or split is None:
        raise LayoutError(
            f"{table} row {number}: label {item['label']!r} must be 0 or 1, split {values['split']!r} train, val or test"
        )
    image, mask = (table.parent / name.replace("\\", "/") if name else None for name in (item["path"], values["mask_path"]))
    label = int(item["label"])
    kind = values["kind"] or ("sp" if mask else _kind(label))
    names = {name: values[name] for name in ("generator", "method", "group")}
    return make_row(image, label, split, values["source"] or table.stem, kind=kind, mask=mask, **names)


def _kind(label: int) -> str:
    return "full" if label else "orig"


READERS: dict[str, Reader] = {
    "own": lambda root, _: read_task_a(root),
    "cnndetection": read_cnndetection,
    "corvi_ldm": read_corvi_ldm,
    "itw_sm": read_itw_sm,
    "genimage": read_genimage,
    "community_forensics": read_community_forensics,
    "table": read_table,
    "tgif": lambda root, _: read_tgif(root),
    "task_b_validation": lambda root, _: read_task_b_validation(root),
    "sagi_d": read_sagi_d,
}
TASK_B_LAYOUTS = frozenset({"tgif", "task_b_validation", "sagi_d"})
CONSTRAINED_LAYOUTS = frozenset({"cnndetection", "corvi_ldm", "itw_sm", "tgif", "task_b_validation", "own"})

# What tells a layout, in the order of trial: patterns of which one must be there below the root
_SIGNS: dict[str, tuple[str, ...]] = {
    "task_b_validation": ("taskB_val.csv",),
    "sagi_d": ("sagid.csv",),
    "tgif": ("sd2-sp/*", "ps-sp/*", "sd2-fr/*", "sdxl-fr/*"),
    "corvi_ldm": ("train/latent_diffusion_*", "valid/latent_diffusion_*"),
    "own": ("train/0_real", "train/1_fake"),
    "itw_sm": ("0_real", "1_fake"),
    "cnndetection": ("*/0_real", "*/1_fake", "*/*/0_real", "*/*/*/0_real"),
    "genimage": ("*/train/ai", "*/val/ai", "*/*/train/ai", "train/ai"),
    "community_forensics": ("*/fake", "*/real"),
}


def detect_layout(root: Path) -> str:
    """The layout of a folder (or of a ``.csv`` file) by what lies in it.  Raises ``LayoutError`` where none fits."""
    if root.is_file() and root.suffix.lower() == ".csv":
        return "table"
    for layout, patterns in _SIGNS.items():
        if any(next(root.glob(pattern), None) for pattern in patterns):
            return layout
    looked = "; ".join(f"{layout}: {' or '.join(patterns)}" for layout, patterns in _SIGNS.items())
    raise LayoutError(f"no known layout in {root}. Looked for {looked}. {contents(root)}")
