"""Rows of a manifest as readers collect them, one per image, with notes on what they skip."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from forensics_lib.data.headers import Looks, pandas_type
from forensics_lib.images.io import SUFFIXES, has_image_ending, is_image
from forensics_lib.utils.files import broken_link, shown
from forensics_lib.utils.names import SPLITS, class_of, split_of

COLUMNS = ["path", "label", "mask_path", "split", "source", "generator", "method", "kind", "group"]
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
DONOR = "donor"  # in Task B the split of synthetic training images, whose regions are pasted into photographs
NAMED = 20  # most files that a message names; further ones are counted


class LayoutError(ValueError):
    """A folder is not laid out as expected; the message says what was expected and found."""


def check_parts(place: Path, parts: tuple[str, ...], label: int, split: str | None) -> None:
    """Raise ``LayoutError`` if a folder inside a class or a training split is named for another class or split."""
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
    """A folder with images: its path below the root of the walk, the images' names and their paths."""

    parts: tuple[str, ...]
    images: list[str]
    paths: list[str]


class _Run(NamedTuple):
    """Consecutive images with the same values."""

    images: int
    label: int | None
    split: str | None
    source: str
    generator: str | None
    method: str | None
    kind: str | None


class Rows:
    """The images that a reader collects, and notes on what it skips."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.looks = Looks()
        self._groups: list[str] = []
        self._masks: list[str | None] = []
        self._runs: list[_Run] = []
        self._not_named: list[str] = []  # files without an image's ending
        self._no_images: list[str] = []  # by their content
        self._hidden: list[str] = []
        self._unreadable: list[str] = []
        self._unread: list[str] = []
        self._empty: list[str] = []  # links to empty folders
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
        kind: str | None = None,
        generator: str | None = None,
        method: str | None = None,
        groups: Sequence[str | None] | None = None,
        masks: Sequence[str | None] | None = None,
    ) -> None:
        """Add images that share label, split and names.

        Args:
            paths: of the images; bytes that are not UTF-8 are stored as ``shown`` returns them.
            label: 0 authentic, 1 synthetic or manipulated, None for test images.
            split: train, val or test; None: ``state_split`` sets it later.
            source: the data set, or a part of it.
            kind: orig, sp (spliced), fr (fully regenerated) or full (fully synthetic); None: orig, or sp with masks, else full.
            generator: the model that made the images.
            method: the method of manipulation.
            groups: the photograph that each image derives from; None: each image is a photograph of its own.
            masks: the path of each image's ground-truth mask, or None.
        """
        paths = [shown(path) for path in paths]
        self.paths += paths
        self._groups += [shown(group or path) for group, path in zip(groups, paths, strict=True)] if groups else paths
        self._masks += [mask and shown(mask) for mask in masks] if masks else [None] * len(paths)
        if kind is None and label is not None:
            kind = "orig" if not label else "sp" if masks and any(masks) else "full"
        self._runs.append(_Run(len(paths), label, split, source, generator, method, kind))

    def walk(self, root: Path, *, by_content: bool = False) -> Iterator[Folder]:
        """The folders below ``root`` that hold images, sorted, following links, each real folder once (so loops end).

        Hidden folders and those that macOS adds to archives are skipped; files without an image's ending, and unreadable
        folders, are noted.  With ``by_content`` files without an image's ending are opened, and images among them count.
        Names that are not UTF-8 are returned as by ``shown``.  Raises ``LayoutError`` for broken links to folders.
        """
        if not root.is_dir():
            if link := broken_link(root):
                raise LayoutError(link)
            return
        seen: set[str] = set()
        waiting: list[tuple[str, tuple[str, ...]]] = [(str(root), ())]
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
            if not names and os.path.islink(place):  # noqa: PTH114 (odd names)
                self._empty.append(f"{shown(place)} (to {shown(real)})")
            images, folders = self._images_and_folders(place, names, by_content)
            waiting += [(f"{place}{os.sep}{name}", (*parts, shown(name))) for name in reversed(folders)]
            if images:
                images = [shown(name) for name in images]
                paths = [f"{shown(place)}{os.sep}{name}" for name in images]
                self.looks.ask(paths)
                yield Folder(parts, images, paths)

    def _images_and_folders(self, place: str, names: list[str], by_content: bool) -> tuple[list[str], list[str]]:
        """The images and the folders among the sorted ``names`` in a folder; other files are noted."""
        images = [name for name in names if name[name.rfind(".") :].lower() in SUFFIXES and name[0] != "."]
        others = sorted(set(names).difference(images)) if len(images) < len(names) else []
        others = [name for name in others if name[0] != "." and name != "__MACOSX"]
        folders = [name for name in others if os.path.isdir(f"{place}{os.sep}{name}")]  # noqa: PTH112 (odd names)
        files = [name for name in others if name not in folders]
        if by_content:
            found = [name for name in files if has_image_ending(name) or is_image(f"{place}{os.sep}{name}")]
            self._no_images += [shown(f"{place}{os.sep}{name}") for name in files if name not in found]
            hidden = [f"{place}{os.sep}{name}" for name in names if name[0] == "."]
            self._hidden += [shown(path) for path in hidden if is_image(path)]
            return sorted([*images, *found]), folders
        paths = [f"{place}{os.sep}{name}" for name in files]
        _refuse([link for path in paths if (link := broken_link(path))])
        self._not_named += map(shown, paths)
        return images, folders

    def serve(self, task: str) -> None:
        """Use rows of Task B for Task A, without their masks, or rows of Task A for Task B.

        In Task B synthetic training images become donors of pasted regions; other synthetic images are left out.
        """
        if task == "A":
            self._masks = [None] * len(self.paths)
            self._runs = [run._replace(kind="full" if run.label else "orig") for run in self._runs]
            return
        self._runs = [run._replace(split=DONOR) if run.label and run.split == "train" else run for run in self._runs]
        used = [not run.label or run.split == DONOR for run in self._runs]
        kept = np.repeat(used, [run.images for run in self._runs])
        if not kept.all():
            self._left_out.append(f"{np.count_nonzero(~kept)} synthetic image(s), which have no masks, are left out of Task B")
        self.paths, self._groups = list(compress(self.paths, kept)), list(compress(self._groups, kept))
        self._masks = list(compress(self._masks, kept))
        self._runs = list(compress(self._runs, used))

    def state_split(self, stated: str | None, root: Path) -> None:
        """Set the split that the entry states, or keep the one that folder or file names tell.

        Raises ``LayoutError`` if neither is known, or if test images were to be trained on.
        """
        told = [run.split for run in self._runs]
        if None in told and not stated:
            raise LayoutError(
                f"{root}: no folder or file name tells whether {self._first_of(told.index(None))} is for training: set split: "
                f"train, val or test for this set. Names that tell it: {', '.join(sorted(SPLITS))}"
            )
        if stated == "train" and "test" in told:
            first = self._first_of(told.index("test"))
            raise LayoutError(f"{root}: split: train, but {first} is of a test split, which is never trained on")
        if stated:
            self._runs = [run._replace(split=stated) for run in self._runs]

    def _first_of(self, number: int) -> str:
        """The path of the first image of a run."""
        return self.paths[sum(run.images for run in self._runs[:number])]

    def leave_unread(self, place: str | Path, reason: str) -> None:
        """Note a folder that the layout does not read."""
        self._unread.append(f"not read: {place}: {reason}")

    def notes(self) -> list[str]:
        """What the reader skipped, with the remedies."""
        notes = [f"{place} cannot be read and is left out: allow it with chmod u+rx" for place in self._unreadable]
        notes += [f"the link {place} leads to an empty folder: is its disk mounted?" for place in self._empty]
        notes += self._left_out
        if self._no_images:
            notes.append(f"{len(self._no_images)} file(s) whose content is no image are skipped: {joined(self._no_images)}")
        if self._hidden:
            notes.append(
                f"{len(self._hidden)} hidden image(s), whose names begin with a dot, are skipped; rename them if they are "
                f"wanted: {joined(self._hidden)}"
            )
        notes += self._unread[:NAMED]
        if len(self._unread) > NAMED:
            notes.append(f"... and {len(self._unread) - NAMED} more folders that the layout does not read")
        if self._not_named:
            endings = Counter(Path(path).suffix.lower() or "no ending" for path in self._not_named)
            counted = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(4))
            notes.append(
                f"{len(self._not_named)} file(s) without an image's ending are skipped ({counted}): rename those that are "
                f"images. They are {joined(self._not_named)}"
            )
        return notes

    def table(self) -> pd.DataFrame:
        """A row with ``COLUMNS`` per image."""
        columns = {"path": pa.array(self.paths, pa.large_string()), "group": pa.array(self._groups, pa.large_string())}
        columns["mask_path"] = pa.array(self._masks, pa.large_string())
        run_of = pa.array(np.repeat(np.arange(len(self._runs)), [run.images for run in self._runs]))
        for name in ("label", "split", "source", "generator", "method", "kind"):
            kind = pa.int64() if name == "label" else pa.large_string()
            columns[name] = pa.array([getattr(run, name) for run in self._runs], kind).take(run_of)
        return pa.table(columns).select(COLUMNS).to_pandas(types_mapper=pandas_type)


def contents(folder: Path) -> str:
    """The content of a folder, for error messages."""
    if not folder.is_dir():
        return broken_link(folder) or f"{folder} is {'a file' if folder.exists() else 'not there'}"
    inside = sorted(folder.iterdir())
    names = [shown(path.name) + "/" * path.is_dir() for path in inside]
    links = [link for path in inside if (link := broken_link(path))]
    held = f"{folder} holds {', '.join(names[:12]) or 'nothing'}{' ...' if len(names) > 12 else ''}"
    return "; ".join([held, *links[:12]])


def refuse_broken_links(root: Path) -> None:
    """Raise ``LayoutError`` for broken links to folders in ``root`` and in its folders."""
    folders = [str(root), *(entry.path for entry in scan(root) if entry.is_dir())]
    links = [entry for folder in folders for entry in scan(folder) if entry.is_symlink() and entry.name[0] != "."]
    _refuse([broken for link in links if Path(link).suffix.lower() not in SUFFIXES and (broken := broken_link(link.path))])


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; none of an unreadable one, which ``Rows.walk`` notes."""
    with suppress(OSError), os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)
    return []


def _refuse(links: list[str]) -> None:
    if links:
        raise LayoutError(f"{joined(links, '; ')}; mount it, or take the links out")


def joined(items: Sequence[str], separator: str = ", ") -> str:
    """The first ``NAMED`` items in a row, and the number of further ones."""
    more = [f"and {len(items) - NAMED} more"] if len(items) > NAMED else []
    return separator.join([*items[:NAMED], *more])
