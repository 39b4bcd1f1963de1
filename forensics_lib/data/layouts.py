"""Readers of the official layouts: each turns a folder into rows, one per image; nothing is copied or converted.

Columns are ``rows.COLUMNS``: path, label (0 authentic, 1 synthetic or manipulated), mask_path, split (train, val, test),
source, generator, method, kind (orig, sp, fr, full) and group (the photograph that the image derives from).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forensics_lib.data.rows import Folder, LayoutError, Rows, check_parts, contents, joined
from forensics_lib.data.tables import read_listing
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import SUFFIXES, ImageError
from forensics_lib.utils.files import NOT_UTF8, broken_link, shown
from forensics_lib.utils.names import CLASSES, SPLITS, class_of, named_folders, split_folders, split_of

TASK_A_LABELS = {"0_real": 0, "1_fake": 1}
TGIF_SPLITS = {"training": "train", "validation": "val", "testing": "test"}
# By folder of manipulated images: the pattern of image names, and the name of the mask
_SPLICED, _REGENERATED = "{id}_mask_{m}.png_ps_mask.png", "{id}_mask_{m}_%d.png"
_STEM = r"(?P<id>\d+)_mask_(?P<m>bbox|segm)\.png"
TGIF_NAMES = {
    "sd2-sp": (re.compile(_STEM + r"_ps_mask\.png_sd2_\d+\.png"), _SPLICED),
    "ps-sp": (re.compile(_STEM + r"_ps_\d+\.png"), _SPLICED),
    "sd2-fr": (re.compile(_STEM + r"_sd2-512_\d+\.png"), _REGENERATED % 512),
    "sdxl-fr": (re.compile(_STEM + r"_sdxl-1024_\d+\.png"), _REGENERATED % 1024),
}
TGIF2_METHODS = tuple(f"{model}-{kind}" for model in ("flux1schnell", "flux1dev", "flux1filldev") for kind in ("sp", "fr"))
TGIF2_NAME = re.compile(r"(?P<id>\d+)_mask_(?P<m>[a-z]+)(?![a-z]).*\.png")  # of images, and of masks in masks-flux
TGIF_ORIGINALS = ("orig", "original", "original-flux")
TGIF_ORIGINAL = re.compile(r"(?P<id>\d+)_orig(_\w+)?\.png")


def read_task_a(root: Path) -> Rows:
    """``{train,val}/{0_real,1_fake}/**``: the user's own layout, links to other data sets included.

    Splits and classes may have other spellings (``validation``, ``Real``), and there may be a labelled test split.  The
    source is the first folder below the class, or the data set's name for images in the class folder itself.
    """
    rows = Rows()
    for place, split in split_folders(root):
        for inside, label in sorted(named_folders(place, class_of), key=lambda item: (item[1] is None, item[1], item[0])):
            if label is None:
                rows.leave_unread(inside, _unnamed("class", CLASSES))
                continue
            for folder in rows.walk(inside):
                check_parts(inside.joinpath(*folder.parts), folder.parts, label, split)
                source = folder.parts[0] if folder.parts else root.name
                rows.add(folder.paths, label, split, source)
    for place, split in named_folders(root, split_of):
        if split is None:
            rows.leave_unread(place, _unnamed("split", SPLITS))
    for place in (root, *(place for place, _ in split_folders(root))):
        if count := sum(path.suffix.lower() in SUFFIXES for path in place.glob("*")):
            rows.leave_unread(f"{count} image(s) in {place} itself", "they are in no class folder")
    if not len(rows):
        raise LayoutError(f"no images in {root}/{{train,val}}/{{0_real,1_fake}}; {contents(root)}")
    return rows


def _unnamed(what: str, known: dict[str, Any]) -> str:
    return f"its name is no known {what} ({', '.join(sorted(known))})"


def read_tgif(root: Path) -> Rows:
    """TGIF's tree ``{orig,masks,sd2-sp,ps-sp,sd2-fr,sdxl-fr}/{training,validation,testing}/{category}/*.png``.

    The group is the COCO id, since a photo may be in several categories.  TGIF2's folders (``flux1...-{sp,fr}``,
    ``masks-flux``, ``original-flux``) are read as well.
    """
    rows = Rows()
    for tgif_split, split in TGIF_SPLITS.items():
        for name in TGIF_ORIGINALS:
            for folder in rows.walk(root / name / tgif_split):
                matches = [TGIF_ORIGINAL.fullmatch(image) for image in folder.images]
                rows.add(folder.paths, 0, split, "tgif", groups=[_coco(match) for match in matches])
        for method in (*TGIF_NAMES, *TGIF2_METHODS):
            for folder in rows.walk(root / method / tgif_split):
                pair = _tgif_pairs if method in TGIF_NAMES else _tgif2_pairs
                groups, masks = pair(root, folder, method, tgif_split)
                made = {"generator": method[:-3], "method": method, "kind": method[-2:]}
                rows.add(folder.paths, 1, split, "tgif", groups=groups, masks=masks, **made)
    folders = (*TGIF_ORIGINALS, *TGIF_NAMES, *TGIF2_METHODS)
    known = {root: ("masks", "masks-flux", *folders)} | {root / name: tuple(TGIF_SPLITS) for name in folders}
    for above, names in known.items():
        for place in (place for place, name in named_folders(above, str) if name not in names):
            rows.leave_unread(place, f"none of {', '.join(names)}")
    if not len(rows):
        raise LayoutError(f"no images in {root}/{{orig,sd2-sp,...}}/{{training,validation,testing}}; {contents(root)}")
    return rows


Pairs = tuple[list[str | None], list[str | None]]  # group and mask of each image; None: its name tells none


def _coco(match: re.Match[str] | None) -> str | None:
    return f"coco:{match['id']}" if match else None


def _tgif_pairs(root: Path, folder: Folder, method: str, tgif_split: str) -> Pairs:
    pattern, mask_name = TGIF_NAMES[method]
    masks = root.joinpath("masks", tgif_split, *folder.parts)
    matches = [pattern.fullmatch(image) for image in folder.images]
    return [_coco(m) for m in matches], [f"{masks}{os.sep}{mask_name.format(**m.groupdict())}" if m else None for m in matches]


def _tgif2_pairs(root: Path, folder: Folder, _: str, tgif_split: str) -> Pairs:
    """The mask with the same photo id, mask variation and size: TGIF2's mask names are not documented."""
    masks = root.joinpath("masks-flux", tgif_split, *folder.parts)
    candidates: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(masks.glob("*.png")):
        if match := TGIF2_NAME.fullmatch(path.name):
            candidates.setdefault((match["id"], match["m"]), []).append(path)
    matches = [TGIF2_NAME.fullmatch(image) for image in folder.images]
    found = [candidates.get((m["id"], m["m"]), []) if m else [] for m in matches]
    chosen = [_of_size(path, fits) for path, fits in zip(folder.paths, found, strict=True)]
    return [_coco(m) for m in matches], chosen


def _of_size(image: str, masks: list[Path]) -> str | None:
    """The only mask, or the only one of the image's size."""
    if len(masks) < 2:
        return str(masks[0]) if masks else None
    try:
        size = _size(image)
        fitting = [mask for mask in masks if _size(mask) == size]
    except ImageError:
        return None
    return str(fitting[0]) if len(fitting) == 1 else None


def _size(path: str | Path) -> tuple[int, int]:
    header = read_header(path)
    return header.width, header.height


def read_task_b_validation(root: Path) -> Rows:
    """The official validation set: ``{coco,raise}/original/*``, ``{coco,raise}/{method}/{image,mask}/*``, ``taskB_val.csv``.

    The table lists manipulated images and masks; authentic images are the files in the ``original`` folders.
    """
    listing = read_listing(root / "taskB_val.csv", ["img_path", "mask_path", "src_path", "type"])
    rows = Rows()
    for source in ("coco", "raise"):
        for folder in rows.walk(root / source / "original"):
            groups = [photo_group(source, Path(name).stem) for name in folder.images]
            rows.add(folder.paths, 0, "val", source, groups=groups)
    for item in listing.itertuples(index=False):
        image, mask = sagid_path(root, item.img_path, ("val",)), sagid_path(root, item.mask_path, ("val",))
        source, method = image.relative_to(root).parts[:2]
        original = item.src_path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
        group = photo_group(source, original or image.stem)
        rows.add([str(image)], 1, "val", source, method=method, kind=item.type, groups=[group], masks=[str(mask)])
    return rows


def sagid_path(root: Path, written: str, prefix: tuple[str, ...]) -> Path:
    """The path below ``root`` of ``sagid\\val\\coco\\...`` in an official table, without ``sagid`` and ``prefix``."""
    parts = re.split(r"[\\/]", written.strip())
    for leading in ("sagid", *prefix):
        if parts[:1] == [leading]:
            parts = parts[1:]
    if len(parts) < 3 or ".." in parts:
        raise LayoutError(f"{root}: its table names {written!r}; expected sagid\\{{split}}\\{{source}}\\{{method}}\\...")
    return root.joinpath(*parts)


def photo_group(source: str, stem: str) -> str:
    """The group of a photograph: COCO ids without leading zeros, as in TGIF; RAISE names unchanged."""
    return f"coco:{int(stem)}" if source == "coco" and stem.isdecimal() else f"{source}:{stem}"


def mask_names(paths: Sequence[str]) -> dict[str, str]:
    """Image name to mask name, ``<stem>.npz``.  Raises ``LayoutError`` if two images would share a mask."""
    if clashes := mask_clashes(paths):
        raise LayoutError(
            f"{joined(clashes, '; ')}: the challenge names a mask after its image without the ending, so take those out of the "
            "folder that are no test images"
        )
    return {Path(path).name: f"{Path(path).stem}.npz" for path in paths}


def mask_clashes(paths: Sequence[str]) -> list[str]:
    """The images that would share a mask, a sentence per mask."""
    names: dict[str, list[str]] = {}
    for path in map(Path, paths):
        names.setdefault(path.stem, []).append(path.name)
    return [f"{' and '.join(images)} would share the mask {stem}.npz" for stem, images in names.items() if len(images) > 1]


def masks_alike(paths: Sequence[str]) -> list[str]:
    """Pairs of masks whose names differ only in case or in the encoding of accents, as texts."""
    first: dict[str, str] = {}
    pairs = []
    for stem in dict.fromkeys(Path(path).stem for path in paths):
        other = first.setdefault(unicodedata.normalize("NFC", stem).casefold(), stem)
        pairs += [f"{other}.npz and {stem}.npz"] if other != stem else []
    return pairs


def read_test(folder: Path) -> Rows:
    """A flat folder of unlabelled test images: every file that is an image by its content or its name."""
    if not folder.is_dir():
        raise LayoutError(broken_link(folder) or f"no test folder {folder}; {contents(folder.parent)}")
    rows, deeper = Rows(), []
    for found in rows.walk(folder, by_content=True):
        if found.parts:
            deeper.append(str(folder.joinpath(*found.parts)))
        else:
            rows.add(found.paths, None, "test", folder.name)
    if not len(rows):
        raise LayoutError(f"no images in the test folder; {contents(folder)}")
    odd = sorted(shown(name) for name in os.listdir(folder) if shown(name) != name)  # noqa: PTH208 (speed)
    if odd := [name for name in odd if name[name.rfind(".") :].lower() in SUFFIXES]:
        raise LayoutError(
            f"{folder}: {len(odd)} test image(s) cannot be named in a submission, which is UTF-8. They are "
            f"{joined(odd)}; of each: {NOT_UTF8}"
        )
    if odd := [Path(path).name for path in rows.paths if set("\\\r") & set(Path(path).name)]:
        raise LayoutError(
            f"{folder}: {len(odd)} test image(s) with a backslash or carriage return in their names, which no submission can "
            f"hold: {joined([repr(name) for name in odd])}; rename them"
        )
    if deeper:
        print(f"{folder}: the images in {joined(deeper)} are ignored: test images must be in the folder itself")
    for note in rows.notes():
        print(note)
    return rows
