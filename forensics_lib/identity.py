"""Which data a constrained run may use, told by layout, by the names that the official sets hold, and by where links lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from forensics_lib.files import from_home
from forensics_lib.layouts import TASK_A_LABELS, LayoutError
from forensics_lib.params import DataSet
from forensics_lib.readers import CONSTRAINED_LAYOUTS, SPLITS, of_itw_sm

_LSUN = "airplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
CNNDETECTION_CATEGORIES = frozenset([*_LSUN.split(), "sheep", "sofa", "train", "tvmonitor"])
LDM_SETS = ("class2image", "noise2image_FFHQ", "noise2image_bedrooms", "noise2image_churches")
LDM_FOLDERS = frozenset(f"latent_diffusion_{name}" for name in (*LDM_SETS, *(f"text2img_set{i}" for i in range(3))))


def refuse_unofficial(entries: list[DataSet], edition: int) -> None:
    """Constrained means constrained: raise ``LayoutError`` that names every set which is not official, and why."""
    official = CONSTRAINED_LAYOUTS | ({"sagi_d"} if edition >= 2026 else set())
    reasons = {entry.root: _why_unofficial(entry, official) for entry in entries}
    refused = [f"{root} ({reason})" for root, reason in reasons.items() if reason]
    if refused:
        raise LayoutError(
            f"a constrained run takes official data only; refused: {'; '.join(refused)}. "
            f"Take them out, or set run_type: open. Official layouts: {', '.join(sorted(official))}"
        )


def refuse_training_on_validation(entries: list[DataSet]) -> None:
    """ITW-SM is validation data of every run: raise ``LayoutError`` where a training folder leads into it."""
    for entry in entries:
        root = from_home(entry.root)
        places = [(root, root.resolve())]
        if entry.layout == "own":
            places = [(place, target) for place, target in _leads(root) if "train" in place.parts[-3:]]
        elif entry.layout in ("itw_sm", "table", "parquet") or entry.split in ("val", "test"):
            continue
        for place, target in places:
            if of_itw_sm(target):
                raise LayoutError(f"{place} leads into {target}: ITW-SM is the validation set and must not be trained on")


def _why_unofficial(entry: DataSet, official: frozenset[str] | set[str]) -> str | None:
    root = from_home(entry.root)
    if entry.layout not in official:
        return str(entry.layout)
    if entry.layout == "cnndetection":
        return _strangers(_categories(root), CNNDETECTION_CATEGORIES, "CNNDetection's training and validation categories")
    if entry.layout == "corvi_ldm":
        folders = {path.name for split in ("train", "valid") for path in root.glob(f"{split}/*/")}
        return _strangers(folders, LDM_FOLDERS, "the latent diffusion set's folders")
    if entry.layout == "own":
        return next((reason for place, target in _leads(root) if (reason := _open_data(place, target))), None)
    return None


def _strangers(found: set[str], known: frozenset[str], what: str) -> str | None:
    others = sorted(found - known)
    return f"{', '.join(others[:5])}: not among {what}" if others else None


def _categories(root: Path) -> set[str]:
    """The folders that hold a class folder, but for those of test sets, whose names are generators."""
    found = set()
    for pattern in ("*/0_real", "*/1_fake", "*/*/0_real", "*/*/1_fake"):
        for path in root.glob(pattern):
            above = path.relative_to(root).parts[:-1]
            if SPLITS.get(above[0]) != "test" and SPLITS.get(root.name) != "test" and above[-1] not in SPLITS:
                found.add(above[-1])
    return found


def _leads(root: Path) -> Iterator[tuple[Path, Path]]:
    """Where the class folders of the user's own layout, and the links in them, really are."""
    for split in ("train", "val"):
        for name in TASK_A_LABELS:
            folder = root / split / name
            if folder.is_dir():
                yield folder, folder.resolve()
                with os.scandir(folder) as entries:
                    links = sorted(entry.path for entry in entries if entry.is_symlink() and entry.is_dir())
                yield from ((Path(link), Path(link).resolve()) for link in links)


def _open_data(place: Path, target: Path) -> str | None:
    """Why what lies at ``target`` is not official, where its path tells."""
    if "dataset_open" in target.parts:
        return f"{place} is open data, {target}"
    if target.name in ("ai", "nature") and target.parent.name in ("train", "val"):
        return f"{place} leads into GenImage, {target}"
    if target.name in ("real", "fake"):
        return f"{place} leads into {target}, which is laid out as Community Forensics"
    return None
