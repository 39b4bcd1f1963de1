"""Names of splits and classes, in any of the field's spellings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Spellings of splits and classes in folder and file names; look names up by ``split_of`` and ``class_of``
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


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def split_of(name: str) -> str | None:
    """The split that a folder name stands for, in any spelling: train, val, test or None."""
    return SPLITS.get(_plain(name))


def class_of(name: str) -> int | None:
    """The label that a folder name stands for, in any spelling: 0, 1 or None."""
    return CLASSES.get(_plain(name))


def split_in(name: str) -> str | None:
    """The split named by a word of a file name, as in ``validation-00000-of-00004.parquet``; None if words name several."""
    stem = name.partition(".")[0]
    told = {split for word in (stem, *re.split(r"[-_ ]", stem)) if (split := split_of(word))}
    return told.pop() if len(told) == 1 else None


def named_folders(root: Path, lookup: Callable[[str], Any]) -> Iterator[tuple[Path, Any]]:
    """The folders in ``root``, following links, each with ``lookup(name)``; hidden folders are skipped."""
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if not folder.name.startswith(".") and folder.name != "__MACOSX" and folder.is_dir():
                yield folder, lookup(folder.name)


def split_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders in ``root`` named for a split, in any spelling: training first, then validation, then test."""
    found = [(folder, split) for folder, split in named_folders(root, split_of) if split]
    return sorted(found, key=lambda item: (("train", "val", "test").index(item[1]), item[0]))
