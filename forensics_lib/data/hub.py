"""Parquet shards as the Hugging Face hub stores data sets: their splits, labels, images and masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forensics_lib.data.rows import LABELS, NAMED, LayoutError, Rows, contents
from forensics_lib.images.parquet import class_names, damage, damaged_by, image_columns, member_path
from forensics_lib.params import DataSet
from forensics_lib.utils.files import shown
from forensics_lib.utils.names import CLASSES, class_of, split_in, split_of

# Of a hub data set: columns that may hold the label
LABEL_COLUMNS = ("label", "labels", "is_fake", "fake", "class", "target")


def parquet_files(root: Path) -> list[Path]:
    """The parquet files that ``root`` is or holds, in any case of the ending; what is hidden is passed over."""
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
    """The parquet files of a data set.  Raises ``LayoutError`` that names all that are damaged or not downloaded."""
    files = parquet_files(root)
    damaged = [f"{shown(file)} ({why})" for file in files if (why := damage(file))]
    if damaged:
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise LayoutError(f"{len(damaged)} of {len(files)} parquet files cannot be read: {'; '.join(damaged[:NAMED])}{more}")
    if not files:
        raise LayoutError(f"no parquet files in {root}; {contents(root)}")
    return files


def has_masks(root: Path) -> bool:
    """Whether any file of a hub data set has a column ``mask``, and so the set serves Task B."""
    return any(_mask_column(file) for file in sound_parquet_files(root))


def _mask_column(file: Path) -> str | None:
    return next((name for name in image_columns(file) if name.lower() == "mask"), None)


def read_parquet(root: Path, entry: DataSet) -> Rows:
    """A hub data set as downloaded: parquet files with an image column and a label, read where they lie.

    The split is told by a column ``split``, else by the file's name (``train-00000-of-00010.parquet``) or folder, the class
    by numbers (0 authentic, 1 synthetic), by the hub's own class names, or by words; ``model`` or ``generator`` and ``mask``
    are read where there.  Where any file has masks, one without them may hold authentic images alone.
    """
    rows, files = Rows(), sound_parquet_files(root)
    masked = any(_mask_column(file) for file in files)
    for file in files:
        mask = _mask_column(file)
        images = [name for name in image_columns(file) if name != mask]
        image = "image" if "image" in images else images[0] if len(images) == 1 else None
        names = pq.read_schema(file).names
        label = next((name for name in LABEL_COLUMNS if name in names), None)
        if image is None or label is None:
            raise LayoutError(f"{file} needs an image column and one of {', '.join(LABEL_COLUMNS)}; it has {', '.join(names)}")
        generator = next((name for name in ("generator", "model") if name in names), None)
        split = next((name for name in names if name.lower() == "split"), None)
        table = _columns(file, [name for name in (label, generator, split) if name])
        labels = _hub_labels(file, label, table.column(label).to_pylist())
        if masked and mask is None and any(labels):
            raise LayoutError(
                f"{file} row {labels.index(1)}: manipulated, but this file has no column mask, as others of {root} have; "
                "add one, or keep files with and without masks in two data sets"
            )
        generators = table.column(generator).to_pylist() if generator else [None] * len(labels)
        splits = _hub_splits(file, split, table.column(split).to_pylist()) if split else [None] * len(labels)
        told = _default_split(root, file, entry)
        places: dict[_Key, list[int]] = {}
        for number, (of_row, *key) in enumerate(zip(splits, labels, generators, strict=True)):
            places.setdefault((of_row or told, *key), []).append(number)
        _add_members(rows, file, image, mask, places, root.stem)
    return rows


_Key = tuple[str | None, int, str | None]  # split, label and generator of rows that go together


def _hub_words(file: Path, column: str, values: list[Any]) -> list[Any]:
    """The values of a column, numbers of classes as the names that the hub gives them."""
    names = class_names(file, column)
    return [names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value for value in values]


def _hub_splits(file: Path, column: str, values: list[Any]) -> list[str | None]:
    """The split of each row; None of an empty field.  Raises ``LayoutError`` of a word that names none."""
    words = _hub_words(file, column, values)
    texts = ["" if word is None else str(word).strip() for word in words]
    splits = [split_of(text) for text in texts]
    for number, (text, split) in enumerate(zip(texts, splits, strict=True)):
        if text and split is None:
            raise LayoutError(f"{file} row {number}: {column} is {text!r}; it must be train, val or test")
    return splits


def _columns(file: Path, names: list[str]) -> pa.Table:
    try:
        return pq.ParquetFile(file).read(names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise LayoutError(f"{file}: {damaged_by(error)}") from None


def _default_split(root: Path, file: Path, entry: DataSet) -> str | None:
    """The split of a parquet file's rows that tell none themselves.  Raises ``LayoutError``."""
    told = _split_of_shard(root, file)
    if entry.split == "train" and told == "test":
        raise LayoutError(f"{root}: split: train, but {file} is of a test split, which is never trained on")
    return entry.split or told


def _split_of_shard(root: Path, file: Path) -> str | None:
    """The split that a parquet file's name tells, else the nearest folder's up to the root, or the root's own name."""
    folders = [path.name for path in file.parents if path.is_relative_to(file.parent if root == file else root)]
    return next((split for name in (file.name, *folders) if (split := split_in(name))), None)


def _add_members(rows: Rows, file: Path, image: str, mask: str | None, places: dict[_Key, list[int]], source: str) -> None:
    for (split, label, generator), numbers in sorted(places.items(), key=lambda item: str(item[0])):
        masks = [member_path(file, mask, number) for number in numbers] if mask and label else None
        kind = "sp" if masks else kind_of(label)
        paths = [member_path(file, image, number) for number in numbers]
        rows.add(paths, label, split, source, kind=kind, generator=generator if label else None, masks=masks)


def _hub_labels(file: Path, column: str, values: list[Any]) -> list[int]:
    words = _hub_words(file, column, values)
    labels = [_label(word) if isinstance(word, str) else {0: 0, 1: 1}.get(word) for word in words]
    if None in labels:
        number = labels.index(None)
        raise LayoutError(
            f"{file} row {number}: {column} is {words[number]!r}; known are 0, 1 and the words {', '.join(CLASSES)}"
        )
    return labels


def _label(word: str) -> int | None:
    found = class_of(word)
    return LABELS.get(word.strip().lower()) if found is None else found


def kind_of(label: int) -> str:
    return "full" if label else "orig"
