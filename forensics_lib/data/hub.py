"""Data sets of the Hugging Face hub in parquet shards: their splits, labels, images and masks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forensics_lib.data.rows import LABELS, LayoutError, Rows, contents, joined
from forensics_lib.images.parquet import class_names, damage, damaged_by, image_columns, member_path
from forensics_lib.params import DataSet
from forensics_lib.utils.files import shown
from forensics_lib.utils.names import CLASSES, class_of, split_in, split_of

# Columns of a hub data set that may hold the label
LABEL_COLUMNS = ("label", "labels", "is_fake", "fake", "class", "target")


def parquet_files(root: Path) -> list[Path]:
    """The parquet file ``root``, or the parquet files below it (ending in any case); hidden ones are skipped."""
    if root.is_file() and is_parquet(root.name):
        return [root]
    found, seen = [], set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        found += [Path(place) / name for name in names if is_parquet(name)]
    return sorted(found)


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and name[0] != "."


def sound_parquet_files(root: Path) -> list[Path]:
    """The parquet files of a data set.  Raises ``LayoutError`` naming all that are damaged or not downloaded."""
    files = parquet_files(root)
    damaged = [f"{shown(file)} ({why})" for file in files if (why := damage(file))]
    if damaged:
        raise LayoutError(f"{len(damaged)} of {len(files)} parquet files cannot be read: {joined(damaged, '; ')}")
    if not files:
        raise LayoutError(f"no parquet files in {root}; {contents(root)}")
    return files


def has_masks(root: Path) -> bool:
    """Whether any file of a hub data set has a column ``mask``, so that the set serves Task B."""
    return any(_mask_column(file) for file in sound_parquet_files(root))


@dataclass(frozen=True)
class _Columns:
    """The columns of a parquet file by their meaning; None: it has none of the kind."""

    image: str
    label: str
    mask: str | None
    generator: str | None
    split: str | None


def _mask_column(file: Path) -> str | None:
    return next((name for name in image_columns(file) if name.lower() == "mask"), None)


def _columns_of(file: Path) -> _Columns:
    """Find the columns of a parquet file.  Raises ``LayoutError`` without an image column or a label."""
    mask, names = _mask_column(file), pq.read_schema(file).names
    images = [name for name in image_columns(file) if name != mask]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if image is None or label is None:
        raise LayoutError(f"{file} needs an image column and one of {', '.join(LABEL_COLUMNS)}; it has {', '.join(names)}")
    generator = next((name for name in ("generator", "model") if name in names), None)
    return _Columns(image, label, mask, generator, next((name for name in names if name.lower() == "split"), None))


def read_parquet(root: Path, entry: DataSet) -> Rows:
    """A hub data set as downloaded: parquet files with an image column and a label column, read in place.

    The split is in a column ``split``, else in the name of the file (``train-00000-of-00010.parquet``) or a folder; the class
    is a number (0 authentic, 1 synthetic), one of the hub's class names, or a word.  Columns ``model`` or ``generator``, and
    ``mask``, are optional; if any file has masks, files without may hold authentic images only.
    """
    rows, files = Rows(), sound_parquet_files(root)
    columns = [_columns_of(file) for file in files]
    masked = any(found.mask for found in columns)
    for file, found in zip(files, columns, strict=True):
        table = _read(file, [name for name in (found.label, found.generator, found.split) if name])
        labels = _hub_labels(file, found.label, table.column(found.label).to_pylist())
        if masked and found.mask is None and any(labels):
            raise LayoutError(
                f"{file} row {labels.index(1)}: manipulated, but this file has no column mask, as others of {root} have; "
                "add one, or keep files with and without masks in two data sets"
            )
        generators = table.column(found.generator).to_pylist() if found.generator else [None] * len(labels)
        splits = _hub_splits(file, found.split, table.column(found.split).to_pylist()) if found.split else [None] * len(labels)
        of_file = _default_split(root, file, entry)
        keys = zip([split or of_file for split in splits], labels, generators, strict=True)
        _add_members(rows, file, found, keys, root.stem)
    return rows


_Key = tuple[str | None, int, str | None]  # split, label and generator of an image


def _add_members(rows: Rows, file: Path, columns: _Columns, keys: Iterable[_Key], source: str) -> None:
    """Add the images of a file, those with the same key together."""
    groups: dict[_Key, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    for (split, label, generator), numbers in sorted(groups.items(), key=lambda item: str(item[0])):
        masks = [member_path(file, columns.mask, number) for number in numbers] if columns.mask and label else None
        paths = [member_path(file, columns.image, number) for number in numbers]
        rows.add(paths, label, split, source, generator=generator if label else None, masks=masks)


def _hub_words(file: Path, column: str, values: list[Any]) -> list[Any]:
    """The values of a column, with class numbers replaced by the hub's class names."""
    names = class_names(file, column)
    return [names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value for value in values]


def _hub_splits(file: Path, column: str, values: list[Any]) -> list[str | None]:
    """The split of each row; None for an empty field.  Raises ``LayoutError`` for other words."""
    texts = ["" if word is None else str(word).strip() for word in _hub_words(file, column, values)]
    for number, text in enumerate(texts):
        if text and split_of(text) is None:
            raise LayoutError(f"{file} row {number}: {column} is {text!r}; it must be train, val or test")
    return [split_of(text) for text in texts]


def _read(file: Path, names: list[str]) -> pa.Table:
    try:
        return pq.ParquetFile(file).read(names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise LayoutError(f"{file}: {damaged_by(error)}") from None


def _default_split(root: Path, file: Path, entry: DataSet) -> str | None:
    """The split of rows without one of their own: the entry's, else that in the name of the file or of the nearest folder.

    Raises ``LayoutError`` if test images were to be trained on.
    """
    folders = [path.name for path in file.parents if path.is_relative_to(file.parent if root == file else root)]
    told = next((split for name in (file.name, *folders) if (split := split_in(name))), None)
    if entry.split == "train" and told == "test":
        raise LayoutError(f"{root}: split: train, but {file} is of a test split, which is never trained on")
    return entry.split or told


def _hub_labels(file: Path, column: str, values: list[Any]) -> list[int]:
    labels = []
    for number, word in enumerate(_hub_words(file, column, values)):
        named, written = class_of(str(word)), LABELS.get(str(word).strip().lower())
        label = written if named is None else named
        if label is None:
            raise LayoutError(f"{file} row {number}: {column} is {word!r}; known are 0, 1 and the words {', '.join(CLASSES)}")
        labels.append(label)
    return labels
