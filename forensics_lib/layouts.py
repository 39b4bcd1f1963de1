"""Readers of data as it lies on disk: each turns a folder into rows, one per image; nothing is copied or converted.

A row is a dict with the columns of ``COLUMNS``: path, label (0 authentic, 1 synthetic or manipulated), mask_path,
split (train, val, test), source, generator, method, kind (orig, sp, fr, full) and group (the photo it derives from).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from forensics_lib.images import SUFFIXES

Row = dict[str, Any]  # one image, with the keys of COLUMNS
COLUMNS = ["path", "label", "mask_path", "split", "source", "generator", "method", "kind", "group"]
TASK_A_LABELS = {"0_real": 0, "1_fake": 1}
TGIF_SPLITS = {"training": "train", "validation": "val", "testing": "test"}
TGIF_KINDS = {"sd2-sp": "sp", "ps-sp": "sp", "sd2-fr": "fr", "sdxl-fr": "fr"}
# Per method: the pattern of an image's name, and the name of its mask
_SPLICED, _REGENERATED = "{id}_mask_{m}.png_ps_mask.png", "{id}_mask_{m}_%d.png"
_STEM = r"(?P<id>\d+)_mask_(?P<m>bbox|segm)\.png"
TGIF_NAMES = {
    "sd2-sp": (re.compile(_STEM + r"_ps_mask\.png_sd2_\d+\.png"), _SPLICED),
    "ps-sp": (re.compile(_STEM + r"_ps_\d+\.png"), _SPLICED),
    "sd2-fr": (re.compile(_STEM + r"_sd2-512_\d+\.png"), _REGENERATED % 512),
    "sdxl-fr": (re.compile(_STEM + r"_sdxl-1024_\d+\.png"), _REGENERATED % 1024),
}
TGIF_ORIGINAL = re.compile(r"(?P<id>\d+)_orig(_512|_1024)?\.png")


class LayoutError(ValueError):
    """A folder is not laid out as expected; the message says what was looked for and what was found."""


def walk(folder: Path) -> Iterator[Path]:
    """All files below ``folder`` in sorted order, through links, each real folder once (so link loops end).

    Hidden folders and those that macOS adds to archives are passed over.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(place) / name for name in sorted(files))


def image_files(folder: Path) -> Iterator[Path]:
    """The files below ``folder`` that have an image's name."""
    return filter(is_image_name, walk(folder))


def is_image_name(path: Path) -> bool:
    """Whether the name is an image's: not hidden, and with a known ending in upper or lower case."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def contents(folder: Path) -> str:
    """What a folder holds, for error messages."""
    if not folder.is_dir():
        return f"{folder} is not there"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"{folder} holds {', '.join(names[:12]) or 'nothing'}{' ...' if len(names) > 12 else ''}"


def read_task_a(root: Path) -> list[Row]:
    """``{train,val}/{0_real,1_fake}/**``: the user's own layout, links to other data sets included.

    The source is the first folder below the class, or the data set's name for images that lie in the class itself.
    """
    rows = []
    for split in ("train", "val"):
        for name, label in TASK_A_LABELS.items():
            folder = root / split / name
            for path in image_files(folder):
                inner = path.relative_to(folder).parts
                source = inner[0] if len(inner) > 1 else root.name
                rows.append(make_row(path, label, split, source, kind="full" if label else "orig"))
    if not rows:
        raise LayoutError(f"no images in {root}/{{train,val}}/{{0_real,1_fake}}; {contents(root)}")
    return rows


def read_tgif(root: Path) -> list[Row]:
    """TGIF's tree ``{orig,masks,sd2-sp,ps-sp,sd2-fr,sdxl-fr}/{training,validation,testing}/{category}/*.png``.

    The group is the COCO id: the same photo stands under several categories.
    """
    rows = []
    for folder_name in ("orig", "original", *TGIF_KINDS):
        for tgif_split, split in TGIF_SPLITS.items():
            for path in image_files(root / folder_name / tgif_split):
                rows.append(_tgif_row(root, path, folder_name, tgif_split, split))
    if not rows:
        raise LayoutError(f"no images in {root}/{{orig,sd2-sp,...}}/{{training,validation,testing}}; {contents(root)}")
    return rows


def _tgif_row(root: Path, path: Path, method: str, tgif_split: str, split: str) -> Row:
    if method not in TGIF_KINDS:
        match = TGIF_ORIGINAL.fullmatch(path.name)
        return make_row(path, 0, split, "tgif", kind="orig", group=f"coco:{match['id']}" if match else None)
    pattern, mask_name = TGIF_NAMES[method]
    match = pattern.fullmatch(path.name)
    if not match:  # listed with no mask: the manifest reports it
        return make_row(path, 1, split, "tgif", method=method, kind=TGIF_KINDS[method])
    mask = root / "masks" / tgif_split / path.parent.name / mask_name.format(**match.groupdict())
    names = {"generator": method[:-3], "method": method, "group": f"coco:{match['id']}"}
    return make_row(path, 1, split, "tgif", kind=TGIF_KINDS[method], mask=mask, **names)


def read_task_b_validation(root: Path) -> list[Row]:
    """The official validation set: ``{coco,raise}/original/*``, ``{coco,raise}/{method}/{image,mask}/*``, ``taskB_val.csv``.

    The table names the manipulated images with their masks; authentic ones are the files in the ``original`` folders.
    """
    listing = read_listing(root / "taskB_val.csv", ["img_path", "mask_path", "src_path", "type"])
    rows = []
    for source in ("coco", "raise"):
        for path in image_files(root / source / "original"):
            rows.append(make_row(path, 0, "val", source, kind="orig", group=photo_group(source, path.stem)))
    for item in listing.itertuples(index=False):
        image, mask = (sagid_path(root, written, ("val",)) for written in (item.img_path, item.mask_path))
        source, method = image.relative_to(root).parts[:2]
        original = item.src_path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
        group = photo_group(source, original or image.stem)
        rows.append(make_row(image, 1, "val", source, method=method, kind=item.type, group=group, mask=mask))
    return rows


def read_listing(path: Path, columns: list[str]) -> pd.DataFrame:
    """A data set's own CSV as text; a byte order mark and Windows line ends do not matter.  Raises ``LayoutError``."""
    if not path.is_file():
        raise LayoutError(f"no {path.name} in {path.parent}; {contents(path.parent)}")
    listing = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if list(listing.columns) != columns:
        raise LayoutError(f"{path} has the columns {list(listing.columns)}; expected {columns}")
    return listing


def sagid_path(root: Path, written: str, prefix: tuple[str, ...]) -> Path:
    """``sagid\\val\\coco\\...`` as the official tables write it, below ``root``, without ``sagid`` and ``prefix``."""
    parts = re.split(r"[\\/]", written.strip())
    for leading in ("sagid", *prefix):
        if parts[0] == leading:
            parts = parts[1:]
    if len(parts) < 3 or ".." in parts:
        raise LayoutError(f"{root}: its table names {written!r}; expected sagid\\{{split}}\\{{source}}\\{{method}}\\...")
    return root.joinpath(*parts)


def photo_group(source: str, stem: str) -> str:
    """COCO ids without their leading zeros, as TGIF writes them; RAISE names as they are."""
    return f"coco:{int(stem)}" if source == "coco" and stem.isdigit() else f"{source}:{stem}"


def read_test(folder: Path) -> list[Row]:
    """A flat folder of unlabelled test images: every file with an image's name, by name."""
    if not folder.is_dir():
        raise LayoutError(f"no test folder {folder}")
    paths = sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink())
    images = [path for path in paths if is_image_name(path)]
    if not images:
        raise LayoutError(f"no images in the test folder; {contents(folder)}")
    others = [path.name for path in paths if not is_image_name(path) and not path.name.startswith(".")]
    if others:
        print(f"{folder}: {len(others)} file(s) without an image's name are not test images: {', '.join(others[:5])}")
    return [make_row(path, None, "test", folder.name, kind=None) for path in images]


def make_row(
    path: Path,
    label: int | None,
    split: str,
    source: str,
    *,
    kind: str | None,
    generator: str | None = None,
    method: str | None = None,
    group: str | None = None,
    mask: Path | None = None,
) -> Row:
    return {
        "path": str(path),
        "label": label,
        "mask_path": str(mask) if mask else None,
        "split": split,
        "source": source,
        "generator": generator,
        "method": method,
        "kind": kind,
        "group": group or str(path),
    }
