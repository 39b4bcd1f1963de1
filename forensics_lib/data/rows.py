"""Rows of a manifest as readers collect them, one per image, with notes on what was passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from forensics_lib.data.headers import Looks, pandas_type
from forensics_lib.images.io import SUFFIXES, has_image_ending, is_image
from forensics_lib.utils.files import broken_link, shown
from forensics_lib.utils.names import SPLITS, class_of, split_of

COLUMNS = ["path", "label", "mask_path", "split", "source", "generator", "method", "kind", "group"]
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
NAMED = 20  # files that a message names before it only counts


class LayoutError(ValueError):
    """A folder is not laid out as expected; the message says what was looked for and what was found."""


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
