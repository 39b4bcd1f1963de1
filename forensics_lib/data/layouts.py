"""Readers of data as it lies on disk: each turns a folder into rows, one per image; nothing is copied or converted.

Columns are those of ``COLUMNS``: path, label (0 authentic, 1 synthetic or manipulated), mask_path, split (train, val,
test), source, generator, method, kind (orig, sp, fr, full) and group (the photo it derives from).
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from forensics_lib.images.io import SUFFIXES, ImageError, has_image_ending, is_image, read_header
from forensics_lib.utils.disk import LFS, LFS_POINTER, NOT_UTF8, Looks, broken_link, shown

COLUMNS = ["path", "label", "mask_path", "split", "source", "generator", "method", "kind", "group"]
TASK_A_LABELS = {"0_real": 0, "1_fake": 1}
NAMED = 20  # files that a message names before it only counts
# How the field spells splits and classes, of folders and files; ``split_of`` and ``class_of`` look names up
SPLITS = dict.fromkeys(("train", "training", "trainset", "train_set", "trn", "progan_train"), "train")
SPLITS |= dict.fromkeys(("val", "valid", "validation", "validate", "valset", "val_set", "validset", "progan_val"), "val")
SPLITS |= dict.fromkeys(("dev", "devel", "development", "devset", "dev_set", "eval", "evaluation"), "val")
SPLITS |= dict.fromkeys(("test", "testing", "tests", "testset", "test_set", "cnn_synth_testset"), "test")
SPLITS |= dict.fromkeys(("heldout", "held_out", "holdout", "hold_out"), "test")
CLASSES = dict.fromkeys(("0_real", "real", "reals", "real_image", "real_images", "authentic", "genuine", "pristine"), 0)
CLASSES |= dict.fromkeys(("nature", "natural", "original", "originals", "untampered", "unmanipulated"), 0)
CLASSES |= dict.fromkeys(("1_fake", "fake", "fakes", "fake_image", "fake_images", "synthetic", "synthetic_images"), 1)
CLASSES |= dict.fromkeys(("ai", "ai_generated", "ai_images", "generated", "generated_images", "artificial"), 1)
CLASSES |= dict.fromkeys(("manipulated", "tampered", "forged"), 1)
TGIF_SPLITS = {"training": "train", "validation": "val", "testing": "test"}
# Per folder of manipulated images: the pattern of an image's name, and the name of its mask
_SPLICED, _REGENERATED = "{id}_mask_{m}.png_ps_mask.png", "{id}_mask_{m}_%d.png"
_STEM = r"(?P<id>\d+)_mask_(?P<m>bbox|segm)\.png"
TGIF_NAMES = {
    "sd2-sp": (re.compile(_STEM + r"_ps_mask\.png_sd2_\d+\.png"), _SPLICED),
    "ps-sp": (re.compile(_STEM + r"_ps_\d+\.png"), _SPLICED),
    "sd2-fr": (re.compile(_STEM + r"_sd2-512_\d+\.png"), _REGENERATED % 512),
    "sdxl-fr": (re.compile(_STEM + r"_sdxl-1024_\d+\.png"), _REGENERATED % 1024),
}
TGIF2_METHODS = tuple(f"{model}-{kind}" for model in ("flux1schnell", "flux1dev", "flux1filldev") for kind in ("sp", "fr"))
TGIF2_NAME = re.compile(r"(?P<id>\d+)_mask_(?P<m>[a-z]+)(?![a-z]).*\.png")  # of an image and of its mask in masks-flux
TGIF_ORIGINALS = ("orig", "original", "original-flux")
TGIF_ORIGINAL = re.compile(r"(?P<id>\d+)_orig(_\w+)?\.png")


class LayoutError(ValueError):
    """A folder is not laid out as expected; the message says what was looked for and what was found."""


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def split_of(name: str) -> str | None:
    """The split that a folder's name tells, in any of the field's spellings: train, val, test or None."""
    return SPLITS.get(_plain(name))


def class_of(name: str) -> int | None:
    """The label that a folder's name tells, in any of the field's spellings: 0, 1 or None."""
    return CLASSES.get(_plain(name))


def split_in(name: str) -> str | None:
    """The split that the words of a name tell, as in ``validation-00000-of-00004.parquet``; None where they tell several."""
    stem = name.partition(".")[0]
    told = {split for word in (stem, *re.split(r"[-_ ]", stem)) if (split := split_of(word))}
    return told.pop() if len(told) == 1 else None


def check_parts(place: Path, parts: tuple[str, ...], label: int, split: str | None) -> None:
    """Raise ``LayoutError`` where a folder below a class's, or below a training split's, is named for another one."""
    for part in parts:
        if class_of(part) == 1 - label:
            other = ("authentic", "synthetic")[label]
            raise LayoutError(f"{place}: {part} is named for a class and lies inside of the {other} one: move it beside")
        if split == "train" and split_of(part) in ("val", "test"):
            raise LayoutError(
                f"{place}: {part} is named for validation or test images and lies inside of a training folder: move it "
                "out, or rename it if its images are meant for training"
            )


@dataclass(frozen=True)
class Folder:
    """A folder with images: the folders that lead to it from where the walk began, the images' names and their paths."""

    parts: tuple[str, ...]
    images: list[str]
    paths: list[str]


class Rows:
    """What a reader collects: images, in runs that share most of their values, and notes on what it passed over."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.looks = Looks()
        self._groups: list[str] = []
        self._masks: list[str | None] = []
        self._shared: list[tuple] = []  # label, split, source, generator, method, kind of a run of images
        self._lengths: list[int] = []
        self._passed_over: list[str] = []
        self._no_images: list[str] = []  # by their content
        self._hidden: list[str] = []
        self._unreadable: list[str] = []
        self._unread: list[str] = []
        self._empty: list[str] = []  # links to folders that hold nothing
        self._left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def add(
        self,
        paths: list[str],
        label: int | None,
        split: str | None,
        source: str,
        *,
        kind: str | None,
        generator: str | None = None,
        method: str | None = None,
        groups: list[str | None] | None = None,
        masks: list[str | None] | None = None,
    ) -> None:
        """Add images; without ``groups`` each is a photo of its own, and a split of None waits for ``state_split``.

        Paths that are not UTF-8 stand as ``disk.shown``.
        """
        paths = [shown(path) for path in paths]
        self.paths += paths
        self._groups += [shown(group or path) for group, path in zip(groups, paths, strict=True)] if groups else paths
        self._masks += [mask and shown(mask) for mask in masks] if masks else [None] * len(paths)
        self._shared.append((label, split, source, generator, method, kind))
        self._lengths.append(len(paths))

    def walk(self, root: Path, *, by_content: bool = False) -> Iterator[Folder]:
        """The folders below ``root`` that hold images, sorted, through links, each real folder once (so loops end).

        Hidden folders and those that macOS adds to archives are passed over; files without an image's name, and folders
        that cannot be read, are noted.  With ``by_content`` files without an image's name are opened: those that are
        images all the same count.  Names that are not UTF-8 come as ``disk.shown`` gives them.  Raises ``LayoutError`` for
        links to folders that are not there.
        """
        seen: set[str] = set()
        waiting: list[tuple[str, tuple[str, ...]]] = [(str(root), ())] if root.is_dir() else []
        if not waiting and (link := broken_link(root)):
            raise LayoutError(link)
        while waiting:
            place, parts = waiting.pop()
            real = os.path.realpath(place)
            if real in seen:
                continue
            seen.add(real)
            try:
                names = sorted(os.listdir(place))  # noqa: PTH208 (speed)
            except OSError as error:
                self._unreadable.append(f"{shown(place)} ({error.strerror})")
                continue
            images = [name for name in names if name[name.rfind(".") :].lower() in SUFFIXES and name[0] != "."]
            others = sorted(set(names).difference(images)) if len(images) < len(names) else []
            others = [name for name in others if not name.startswith(".") and name != "__MACOSX"]
            folders = [name for name in others if os.path.isdir(f"{place}{os.sep}{name}")]  # noqa: PTH112 (odd names)
            rest = [name for name in others if name not in folders]
            if by_content:
                found = self._by_content(place, names, rest)
                images = sorted([*images, *found]) if found else images
            else:
                self._pass_over(place, rest)
            waiting += [(f"{place}{os.sep}{name}", (*parts, shown(name))) for name in reversed(folders)]
            if images:
                images = [shown(name) for name in images]
                paths = [f"{shown(place)}{os.sep}{name}" for name in images]
                self.looks.ask(paths)
                yield Folder(parts, images, paths)
            elif not names and os.path.islink(place):  # noqa: PTH114 (as above)
                self._empty.append(f"{shown(place)} (to {shown(real)})")

    def _pass_over(self, place: str, names: list[str]) -> None:
        """Note files without an image's ending.  Raises ``LayoutError`` where they are links that lead nowhere."""
        paths = [f"{place}{os.sep}{name}" for name in names]
        links = [link for path in paths if (link := broken_link(path))]
        _refuse(links)
        self._passed_over += map(shown, paths)

    def serve(self, task: str) -> None:
        """Make rows of Task B serve Task A, without their masks, or the authentic ones of Task A serve Task B."""
        if task == "A":
            self._masks = [None] * len(self.paths)
            self._shared = [(*values[:5], "full" if values[0] else "orig") for values in self._shared]
            return
        authentic = [not values[0] for values in self._shared]
        kept = np.repeat(authentic, self._lengths)
        if not kept.all():
            self._left_out.append(f"{np.count_nonzero(~kept)} synthetic image(s), which have no masks, are left out of Task B")
        self.paths, self._groups, self._masks = (
            list(compress(column, kept)) for column in (self.paths, self._groups, self._masks)
        )
        self._shared, self._lengths = (list(compress(column, authentic)) for column in (self._shared, self._lengths))

    def _by_content(self, place: str, names: list[str], unknown: list[str]) -> list[str]:
        """Those of the ``unknown`` files of a folder that are images; the others, and hidden images, are noted."""
        found = [name for name in unknown if has_image_ending(name) or is_image(f"{place}{os.sep}{name}")]
        self._no_images += [shown(f"{place}{os.sep}{name}") for name in sorted(set(unknown).difference(found))]
        hidden = [f"{place}{os.sep}{name}" for name in names if name.startswith(".")]
        self._hidden += [shown(path) for path in hidden if is_image(path)]
        return found

    def state_split(self, stated: str | None, root: Path) -> None:
        """Give every image the split that the entry states, else leave the one that its folder or file tells.

        Raises ``LayoutError`` where neither is known, and where test images were to be trained on.
        """
        told = [values[1] for values in self._shared]
        untold = [start for start, split in zip(np.cumsum([0, *self._lengths]), told, strict=False) if split is None]
        if untold and not stated:
            raise LayoutError(
                f"{root}: no folder or file name tells whether {self.paths[untold[0]]} is for training: set split: train, "
                f"val or test for this set. Names that tell it: {', '.join(sorted(SPLITS))}"
            )
        if stated == "train" and "test" in told:
            first = self.paths[int(np.cumsum([0, *self._lengths])[told.index("test")])]
            raise LayoutError(f"{root}: split: train, but {first} is of a test split, which is never trained on")
        if stated:
            self._shared = [(label, stated, *others) for label, _, *others in self._shared]

    def leave_unread(self, place: str | Path, reason: str) -> None:
        """Note a folder that the layout does not read."""
        self._unread.append(f"not read: {place}: {reason}")

    def notes(self) -> list[str]:
        """What was passed over, with the remedy."""
        notes = [f"{place} cannot be read and is left out: allow it with chmod u+rx" for place in self._unreadable]
        notes += [f"the link {place} leads to an empty folder: is its disk mounted?" for place in self._empty]
        notes += self._left_out
        for paths, what in (
            (self._no_images, "file(s) whose content is no image are passed over"),
            (self._hidden, "hidden image(s), whose names begin with a dot, are passed over: rename those that are wanted"),
        ):
            if paths:
                notes.append(f"{len(paths)} {what}: {', '.join(paths[:NAMED])}{', ...' * (len(paths) > NAMED)}")
        notes += self._unread[:NAMED]
        if len(self._unread) > NAMED:
            notes.append(f"... and {len(self._unread) - NAMED} more folders that are not read")
        if self._passed_over:
            endings = Counter(Path(path).suffix.lower() or "no ending" for path in self._passed_over)
            counted = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(4))
            notes.append(
                f"{len(self._passed_over)} file(s) without an image's ending are passed over ({counted}): rename those that "
                f"are images. They are {', '.join(self._passed_over[:NAMED])}{', ...' * (len(self._passed_over) > NAMED)}"
            )
        return notes

    def table(self) -> pd.DataFrame:
        """All images, with ``COLUMNS``."""
        columns = {"path": pa.array(self.paths, pa.large_string()), "group": pa.array(self._groups, pa.large_string())}
        columns["mask_path"] = pa.array(self._masks, pa.large_string())
        names = ("label", "split", "source", "generator", "method", "kind")
        run_of = pa.array(np.repeat(np.arange(len(self._lengths)), self._lengths))
        for number, name in enumerate(names):
            runs = pa.array([values[number] for values in self._shared], pa.large_string() if number else pa.int64())
            columns[name] = runs.take(run_of)
        return pa.table(columns).select(COLUMNS).to_pandas(types_mapper=pandas_type)


def pandas_type(kind: pa.DataType) -> pd.StringDtype | pd.UInt64Dtype | None:
    """What arrow's columns become in pandas: text stays on arrow's memory, hashes keep all their bits."""
    if pa.types.is_large_string(kind):
        return pd.StringDtype("pyarrow", na_value=np.nan)
    return pd.UInt64Dtype() if pa.types.is_uint64(kind) else None


def contents(folder: Path) -> str:
    """What a folder holds, for error messages."""
    if not folder.is_dir():
        return broken_link(folder) or f"{folder} is {'a file' if folder.exists() else 'not there'}"
    entries = sorted(folder.iterdir())
    names = [shown(entry.name) + "/" * entry.is_dir() for entry in entries]
    links = [link for entry in entries if (link := broken_link(entry))]
    held = f"{folder} holds {', '.join(names[:12]) or 'nothing'}{' ...' if len(names) > 12 else ''}"
    return "; ".join([held, *links[:12]])


def refuse_broken_links(root: Path) -> None:
    """Raise ``LayoutError`` for links to folders, in ``root`` and in its folders, that lead nowhere."""
    folders, links = [str(root)] if root.is_dir() else [], []
    for folder in folders:
        with suppress(PermissionError), os.scandir(folder) as entries:  # the walk notes it
            for entry in sorted(entries, key=lambda entry: entry.name):
                if folder == str(root) and entry.is_dir():
                    folders.append(entry.path)  # its folders are looked at, theirs are not
                elif entry.is_symlink() and entry.name[0] != "." and Path(entry).suffix.lower() not in SUFFIXES:
                    links.append(broken_link(entry.path))
    _refuse([link for link in links if link])


def _refuse(links: list[str]) -> None:
    if links:
        more = f"; and {len(links) - NAMED} more." if len(links) > NAMED else ""
        raise LayoutError(f"{'; '.join(links[:NAMED])}{more} Mount it, or take the links out")


def named_folders(root: Path, told: Callable[[str], Any]) -> Iterator[tuple[Path, Any]]:
    """The folders in ``root``, through links, with what ``told`` makes of their names; hidden ones are passed over."""
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if not folder.name.startswith(".") and folder.name != "__MACOSX" and folder.is_dir():
                yield folder, told(folder.name)


def split_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders in ``root`` that are named for a split, in any spelling: training first, then validation, then test."""
    found = [(folder, split) for folder, split in named_folders(root, split_of) if split]
    return sorted(found, key=lambda item: (("train", "val", "test").index(item[1]), item[0]))


def read_task_a(root: Path) -> Rows:
    """``{train,val}/{0_real,1_fake}/**``: the user's own layout, links to other data sets included.

    Splits and classes may be spelled otherwise (``validation``, ``Real``), and there may be a labelled test split.  The
    source is the first folder below the class, or the data set's name for images that lie in the class itself.
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
                rows.add(folder.paths, label, split, source, kind="full" if label else "orig")
    for place, split in named_folders(root, split_of):
        if split is None:
            rows.leave_unread(place, _unnamed("split", SPLITS))
    for place in [place for place in (root, *(place for place, _ in split_folders(root))) if place.is_dir()]:
        if count := sum(path.suffix.lower() in SUFFIXES for path in place.iterdir()):
            rows.leave_unread(f"{count} image(s) in {place} itself", "they lie in no class's folder")
    if not len(rows):
        raise LayoutError(f"no images in {root}/{{train,val}}/{{0_real,1_fake}}; {contents(root)}")
    return rows


def _unnamed(what: str, known: dict[str, Any]) -> str:
    return f"its name tells no {what} (known: {', '.join(sorted(known))})"


def read_tgif(root: Path) -> Rows:
    """TGIF's tree ``{orig,masks,sd2-sp,ps-sp,sd2-fr,sdxl-fr}/{training,validation,testing}/{category}/*.png``.

    The group is the COCO id: the same photo stands under several categories.  TGIF2's folders (``flux1...-{sp,fr}``,
    ``masks-flux``, ``original-flux``) are read where they are there.
    """
    rows = Rows()
    for tgif_split, split in TGIF_SPLITS.items():
        for name in TGIF_ORIGINALS:
            for folder in rows.walk(root / name / tgif_split):
                matches = [TGIF_ORIGINAL.fullmatch(image) for image in folder.images]
                rows.add(folder.paths, 0, split, "tgif", kind="orig", groups=[_coco(match) for match in matches])
        for method in (*TGIF_NAMES, *TGIF2_METHODS):
            for folder in rows.walk(root / method / tgif_split):
                pair = _tgif_pairs if method in TGIF_NAMES else _tgif2_pairs
                groups, masks = pair(root, folder, method, tgif_split)
                names = {"generator": method[:-3], "method": method, "kind": method[-2:]}
                rows.add(folder.paths, 1, split, "tgif", groups=groups, masks=masks, **names)
    _note_strangers(rows, root, ("masks", "masks-flux", *TGIF_ORIGINALS, *TGIF_NAMES, *TGIF2_METHODS))
    for method in (*TGIF_ORIGINALS, *TGIF_NAMES, *TGIF2_METHODS):
        _note_strangers(rows, root / method, tuple(TGIF_SPLITS))
    if not len(rows):
        raise LayoutError(f"no images in {root}/{{orig,sd2-sp,...}}/{{training,validation,testing}}; {contents(root)}")
    return rows


def _note_strangers(rows: Rows, root: Path, known: tuple[str, ...]) -> None:
    for place, name in named_folders(root, str):
        if name not in known:
            rows.leave_unread(place, f"none of {', '.join(known)}")


Pairs = tuple[list[str | None], list[str | None]]  # groups and masks, one per image; None: the name tells none


def _coco(match: re.Match[str] | None) -> str | None:
    return f"coco:{match['id']}" if match else None


def _tgif_pairs(root: Path, folder: Folder, method: str, tgif_split: str) -> Pairs:
    pattern, mask_name = TGIF_NAMES[method]
    masks = root.joinpath("masks", tgif_split, *folder.parts)
    matches = [pattern.fullmatch(image) for image in folder.images]
    return [_coco(m) for m in matches], [f"{masks}{os.sep}{mask_name.format(**m.groupdict())}" if m else None for m in matches]


def _tgif2_pairs(root: Path, folder: Folder, _: str, tgif_split: str) -> Pairs:
    """TGIF2's mask names are not documented: the mask of the same photo and mask variation, and of the image's size."""
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
    """The only mask, or of several the only one of the image's size."""
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

    The table names the manipulated images with their masks; authentic ones are the files in the ``original`` folders.
    """
    listing = read_listing(root / "taskB_val.csv", ["img_path", "mask_path", "src_path", "type"])
    rows = Rows()
    for source in ("coco", "raise"):
        for folder in rows.walk(root / source / "original"):
            groups = [photo_group(source, Path(name).stem) for name in folder.images]
            rows.add(folder.paths, 0, "val", source, kind="orig", groups=groups)
    for item in listing.itertuples(index=False):
        image, mask = (sagid_path(root, written, ("val",)) for written in (item.img_path, item.mask_path))
        source, method = image.relative_to(root).parts[:2]
        original = item.src_path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
        group = photo_group(source, original or image.stem)
        rows.add([str(image)], 1, "val", source, method=method, kind=item.type, groups=[group], masks=[str(mask)])
    return rows


def read_listing(path: Path, columns: list[str]) -> pd.DataFrame:
    """A data set's own CSV as text.  Raises ``LayoutError``."""
    if not path.is_file():
        raise LayoutError(f"no {path.name} in {path.parent}; {contents(path.parent)}")
    listing = read_text_table(path)
    if list(listing.columns) != columns:
        raise LayoutError(f"{path} has the columns {list(listing.columns)}; expected {columns}")
    return listing


def read_text_table(path: Path, rows: int | None = None) -> pd.DataFrame:
    """A CSV (or its first ``rows`` rows) as text, its column names in small letters, its index the lines' numbers from 1 on.

    Fields may be separated by commas, semicolons or tabs and stand in quotes; blanks around them and empty lines do not
    count, and short rows end in empty fields.  A first line ``sep=;``, as Excel takes it, tells the separator.  Raises
    ``LayoutError``.
    """
    text = read_text(path)
    lines = text.lstrip("\r\n")
    stated = _SEPARATOR.match(lines)
    lines = lines[stated.end() :] if stated else lines
    try:
        options = {
            "sep": stated[1] if stated else _delimiter(lines),
            "skipinitialspace": True,
            "skip_blank_lines": False,
            "keep_default_na": False,
        }
        table = pd.read_csv(io.StringIO(lines), header=None, dtype=str, nrows=None if rows is None else rows + 1, **options)
    except (ValueError, csv.Error) as error:  # what pandas raises of damaged files are ValueErrors
        raise LayoutError(
            f"{path} is not a CSV: {str(error).strip()}. A field that holds a separator must stand in quotes"
        ) from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += 1 + _line_ends(text[: len(text) - len(lines)])
    table = table[table.ne("").any(axis=1)]
    return _with_header(path, table)


_SEPARATOR = re.compile(r"\"?sep=([^\r\n])\"?[,;\t ]*(?:[\r\n]+|$)", re.IGNORECASE)


def _delimiter(text: str) -> str:
    """What separates a table's fields, by its header."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _with_header(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table under the names of its first row, without columns that are empty altogether."""
    if table.empty:
        raise LayoutError(f"{path} is not a CSV: it is empty")
    table = table.loc[:, table.ne("").any()]
    names, body = table.iloc[0].str.lower().tolist(), table.iloc[1:]
    if "" in names:
        raise LayoutError(
            f"{path}: column {names.index('') + 1} has no name. If it is the index that pandas writes, write the table again "
            "with to_csv(..., index=False); else name it, or take it out"
        )
    if len(set(names)) < len(names):
        raise LayoutError(f"{path} names a column twice: {', '.join(names)}")
    return body.set_axis(names, axis=1)


def read_text(path: Path) -> str:
    """A file's text: UTF-8 with or without a byte order mark, or UTF-16 with one.  Raises ``LayoutError``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {broken_link(path) or error.strerror}") from None
    if data.startswith(LFS):
        raise LayoutError(f"{path} is {LFS_POINTER}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        row, kind = _line_ends(data[: error.start].decode("latin-1")) + 1, "CSV" if path.suffix.lower() == ".csv" else "text"
        raise LayoutError(
            f"{path} is not a {kind} in UTF-{16 if wide else 8}: byte 0x{data[error.start]:02x} in row {row}. Save it as UTF-8 "
            f"(Excel: CSV UTF-8), or convert it from its own encoding: iconv -f cp1252 -t UTF-8 {path.name} > new{path.suffix}"
        ) from None
    if "\0" in text:
        row = _line_ends(text[: text.index("\0")]) + 1
        raise LayoutError(f"{path} row {row}: holds a null byte, which no text does (UTF-16 is read with a byte order mark)")
    return text


def _line_ends(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))


def sagid_path(root: Path, written: str, prefix: tuple[str, ...]) -> Path:
    """``sagid\\val\\coco\\...`` as the official tables write it, below ``root``, without ``sagid`` and ``prefix``."""
    parts = re.split(r"[\\/]", written.strip())
    for leading in ("sagid", *prefix):
        if parts[:1] == [leading]:
            parts = parts[1:]
    if len(parts) < 3 or ".." in parts:
        raise LayoutError(f"{root}: its table names {written!r}; expected sagid\\{{split}}\\{{source}}\\{{method}}\\...")
    return root.joinpath(*parts)


def photo_group(source: str, stem: str) -> str:
    """COCO ids without their leading zeros, as TGIF writes them; RAISE names as they are."""
    return f"coco:{int(stem)}" if source == "coco" and stem.isdecimal() else f"{source}:{stem}"


def mask_names(paths: pd.Series | list[str]) -> dict[str, str]:
    """Image name to mask name, ``<stem>.npz``.  Raises ``LayoutError`` where two images would share one."""
    if clashes := mask_clashes(paths):
        raise LayoutError(
            f"{'; '.join(clashes[:NAMED])}{'; ...' * (len(clashes) > NAMED)}: the challenge names a mask after its image "
            "without the ending, so take those that are no test images out of the folder"
        )
    return {Path(path).name: f"{Path(path).stem}.npz" for path in paths}


def mask_clashes(paths: pd.Series | list[str]) -> list[str]:
    """Which images would share a mask, a sentence each."""
    names: dict[str, list[str]] = {}
    for path in map(Path, paths):
        names.setdefault(path.stem, []).append(path.name)
    return [f"{' and '.join(images)} would share the mask {stem}.npz" for stem, images in names.items() if len(images) > 1]


def masks_alike(paths: pd.Series | list[str]) -> list[str]:
    """Masks whose names differ in case alone, or in how accents are encoded, each with the first of its kind: a pair a text."""
    first: dict[str, str] = {}
    pairs = []
    for stem in dict.fromkeys(Path(path).stem for path in paths):
        other = first.setdefault(unicodedata.normalize("NFC", stem).casefold(), stem)
        pairs += [f"{other}.npz and {stem}.npz"] if other != stem else []
    return pairs


def read_test(folder: Path) -> Rows:
    """A flat folder of unlabelled test images, by name: every file that is an image by its content or its name."""
    if not folder.is_dir():
        raise LayoutError(broken_link(folder) or f"no test folder {folder}; {contents(folder.parent)}")
    rows, deeper = Rows(), []
    for found in rows.walk(folder, by_content=True):
        if found.parts:
            deeper.append(folder.joinpath(*found.parts))
        else:
            rows.add(found.paths, None, "test", folder.name, kind=None)
    if not len(rows):
        raise LayoutError(f"no images in the test folder; {contents(folder)}")
    _check_names(folder)
    if deeper:
        names = ", ".join(map(str, deeper[:NAMED]))
        print(f"{folder}: the images in {names} are not test images, since those lie in the folder itself")
    for note in rows.notes():
        print(note)
    return rows


def _check_names(folder: Path) -> None:
    """Refuse test images whose names no submission can hold, since it is UTF-8.  Raises ``LayoutError``."""
    odd = sorted(shown(name) for name in os.listdir(folder) if shown(name) != name)  # noqa: PTH208 (speed)
    odd = [name for name in odd if name[name.rfind(".") :].lower() in SUFFIXES]
    if odd:
        raise LayoutError(
            f"{folder}: {len(odd)} test image(s) cannot be named in a submission, which is UTF-8. They are "
            f"{', '.join(odd[:NAMED])}{', ...' * (len(odd) > NAMED)}; of each: {NOT_UTF8}"
        )
