"""The challenge's archives: built from a run's files, and checked as an outsider would who has only the archive.

Sources of the format: the README of the challenge's repository for 2025 (zip with one CSV; masks as npz) and for 2026
(Task A as plain CSV).
"""

from __future__ import annotations

import csv
import filecmp
import io
import itertools
import math
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forensics_lib.attach import one_at_a_time
from forensics_lib.evaluation import stored_thresholds
from forensics_lib.files import home, read_json, update_json, whole
from forensics_lib.images import ImageError, read_header
from forensics_lib.infer import mask_names
from forensics_lib.inference import MASK_KEY, load_mask
from forensics_lib.layouts import read_test
from forensics_lib.metrics import DECIMALS
from forensics_lib.progress import progress
from forensics_lib.runs import Run

HEADERS = {
    "A": ["image_id", "prob", "label", "threshold"],
    "B": ["image_id", "prob", "label", "threshold", "loc_threshold"],
}
SCORES = "scores.csv"
SHOWN_FAULTS = 20
MAX_MEMBER_BYTES = 4 << 30  # of one file inside an archive, unpacked
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time in archives: the same results give the same bytes


class SubmissionError(ValueError):
    """A submission that would not be valid; the message lists its faults."""


@dataclass
class Validation:
    """What the validator found in an archive."""

    path: Path
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # not faults, but worth knowing
    rows: int = 0
    masks: int = 0
    authentic: set[str] = field(default_factory=set)  # the images whose label is 0
    marked: list[str] = field(default_factory=list)  # those of them whose masks are not empty

    @property
    def valid(self) -> bool:
        return not self.faults

    def report(self) -> str:
        """The verdict and the findings as text."""
        masks = f", {self.masks} masks" if self.masks else ""
        lines = [f"{self.path.name}: {'VALID' if self.valid else f'{len(self.faults)} FAULT(S)'} ({self.rows} rows{masks})"]
        lines += [f"  fault: {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"  ... and {len(self.faults) - SHOWN_FAULTS} more")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


# ---- Building --------------------------------------------------------------------------------------------------------


def archive_path(run: Run, task: str) -> Path:
    """Where a task's archive goes; a sample run's carries ``sample`` in its name."""
    if task == "A":
        parts, ending = [run.params.team, run.params.run_type], ".zip" if run.params.edition == 2025 else ".csv"
    else:
        parts, ending = [run.params.team, "localization_masks"], ".zip"
        parts += ["open"] if run.params.run_type == "open" else []
    parts += ["sample"] if run.sample else []
    return run.submission / f"{'_'.join(parts)}{ending}"


def scores_path(run: Run) -> Path:
    """The copy of ``scores.csv`` that lies beside the Task B archive."""
    marks = (("_open", run.params.run_type == "open"), ("_sample", run.sample))
    return run.submission / f"scores{''.join(mark for mark, on in marks if on)}.csv"


def build_submission(run: Run, task: str) -> Validation:
    """Build and check a task's archive; it gets its name only when it is valid.  Raises ``SubmissionError``.

    A Task B archive holds an all-zero mask for every image that is called authentic: nothing was detected there.  Where
    another run's archive has the name, that one is kept under a name that says its run.
    """
    target = archive_path(run, task)
    table = submission_table(run, task)
    text = table.to_csv(index=False, float_format=f"%.{DECIMALS}f")
    with whole(target) as temporary:
        if target.suffix == ".csv":
            temporary.write_text(text, encoding="utf-8")
        else:
            _write_zip(run, task, temporary, text, f"{target.stem}.csv" if task == "A" else SCORES, table)
        result = validate_submission(temporary, task, run.test_folder(task))
        result.path = target
        if not result.valid:
            raise SubmissionError(f"{target.name} was not written:\n{result.report()}")
        _claim(run, target, temporary)
    if task == "B":
        with whole(scores_path(run)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            _claim(run, scores_path(run), temporary)
    run.record(**{f"task{task}_submission": str(target)})
    return result


def _claim(run: Run, path: Path, new: Path) -> None:
    """Note in ``run.json`` that the file ``path`` is this run's from now on; what another run left there is kept beside it."""
    lock = home() / "outputs" / ".submission.lock"
    with one_at_a_time(lock, f"another process writes to {run.submission}: waiting for it"):
        records = {record.parent.name: read_json(record) for record in (home() / "outputs").glob("*/run.json")}
        owners = [name for name, facts in records.items() if str(path) in _archives(facts)]
        same = path.is_file() and not owners and filecmp.cmp(path, new, shallow=False)
        if path.is_file() and owners != [run.name] and not same:
            kept = _kept(path, owners[0] if len(owners) == 1 else None)
            path.replace(kept)
            for name in set(owners) - {run.name}:
                _rename_archive(name, records[name], path, kept)
            said = f"was made by run {', '.join(owners)}" if owners else "was made by no run in outputs/"
            print(f"{path.name} {said}: it is kept as {kept.name}, and is now of run {run.name}")
        run.record(archives=sorted({*_archives(records.get(run.name, {})), str(path)}))


def _archives(facts: dict[str, Any]) -> set[str]:
    """The files in ``submission/`` that are a run's, from its ``run.json``."""
    latest = [facts[key] for key in ("taskA_submission", "taskB_submission") if key in facts]
    return {*latest, *facts.get("archives", [])}


def _kept(path: Path, owner: str | None) -> Path:
    """Where the earlier file of a name goes: of a known run to the one place of that run, else to a new one."""
    if owner:
        return path.with_name(f"{path.stem}_of_run_{owner}{path.suffix}")
    names = (f"{path.stem}_earlier{number or ''}{path.suffix}" for number in itertools.count())
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _rename_archive(name: str, facts: dict[str, Any], path: Path, kept: Path) -> None:
    renamed = {key: str(kept) for key in ("taskA_submission", "taskB_submission") if facts.get(key) == str(path)}
    archives = sorted({*_archives(facts), str(kept)} - {str(path)})
    update_json(home() / "outputs" / name / "run.json", archives=archives, **renamed)


def submission_table(run: Run, task: str) -> pd.DataFrame:
    """The rows to submit: probabilities, labels at the stored threshold, and the threshold in every row."""
    path = run.test_probs(task)
    if not path.is_file():
        raise FileNotFoundError(f"no test probabilities {path}; run 04_infer of this run first")
    table = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False)[["image_id", "prob"]]
    thresholds = stored_thresholds(run, task)
    inferred = read_json(run.folder / "run.json").get(f"task{task}_inferred")
    if inferred and inferred["thresholds"] != thresholds:
        raise SubmissionError(
            f"the Task {task} thresholds of run {run.name} were chosen anew since its test images were predicted: run 04_infer "
            "of this run again (shards that still hold are taken up)"
        )
    table["label"] = (table["prob"] >= thresholds["threshold"]).astype(int)
    for name in HEADERS[task][3:]:
        table[name] = thresholds[name]
    return table


def _write_zip(run: Run, task: str, path: Path, text: str, csv_name: str, table: pd.DataFrame) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(csv_name, _EPOCH), text, zipfile.ZIP_DEFLATED)
        if task == "B":
            names = mask_names(table["image_id"]).values()
            for name, label in progress(list(zip(names, table["label"], strict=True)), "archive"):
                mask = run.masks / name
                if not mask.is_file():
                    raise FileNotFoundError(f"no mask {mask}; run 04_infer of this run again")
                content = mask.read_bytes() if label else _empty_like(mask)
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_STORED)


def _empty_like(mask: Path) -> bytes:
    """An all-zero mask file of the size of another."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{MASK_KEY: np.zeros_like(load_mask(mask))})
    return buffer.getvalue()


# ---- Validation ------------------------------------------------------------------------------------------------------


def validate_submission(path: Path, task: str, test_folder: Path) -> Validation:
    """Check an archive (or plain CSV) against the folder of test images, and name every fault by row or file."""
    result = Validation(path)
    images = {Path(path).name: Path(path) for path in read_test(test_folder).paths}
    if path.suffix == ".csv":
        _check_csv(path.read_bytes(), path.name, task, images, result)
        return result
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises nearly anything on damaged directories
        result.faults.append(f"not a zip archive: {error}")
        return result
    with archive:
        members = [info for info in archive.infolist() if not info.filename.endswith("/")]  # is_dir() fails on an empty name
        _check_members(members, result)
        csv_members = [info for info in members if info.filename.lower().endswith(".csv")]
        if len(csv_members) != 1 or (task == "B" and csv_members[0].filename != SCORES):
            found = ", ".join(info.filename for info in csv_members) or "none"
            result.faults.append(f"expected {'one CSV' if task == 'A' else f'one CSV named {SCORES}'}, found {found}")
        for info in csv_members[:1]:
            _check_csv(_read(archive, info, result), info.filename, task, images, result)
        others = [info for info in members if info not in csv_members]
        if task == "A":
            result.faults += [f"{info.filename}: does not belong in the archive" for info in others]
        else:
            _check_masks(archive, others, images, result)
    if result.marked:
        result.notes.append(
            f"{len(result.marked)} image(s) with label 0 have masks that are not all zero, such as {result.marked[0]}; "
            "the challenge asks for zeros where nothing is detected"
        )
    return result


def _check_members(members: list[zipfile.ZipInfo], result: Validation) -> None:
    for name, times in Counter(info.filename for info in members).items():
        if times > 1:
            result.faults.append(f"{name}: {times} times in the archive")
        if not name:
            result.faults.append("a file in the archive has no name")
        if "/" in name or "\\" in name:
            result.faults.append(f"{name}: lies in a folder; files belong at the top of the archive")


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, result: Validation) -> bytes:
    """A member's bytes, empty with a fault where it is damaged, encrypted or too large."""
    if info.file_size > MAX_MEMBER_BYTES:
        result.faults.append(f"{info.filename}: {info.file_size:,} bytes unpacked; at most {MAX_MEMBER_BYTES:,} are read")
        return b""
    try:
        return archive.read(info)
    except Exception as error:  # zlib, CRC, encryption: all mean the same to the reader
        result.faults.append(f"{info.filename}: cannot be unpacked: {error}")
        return b""


def _check_csv(content: bytes, name: str, task: str, images: dict[str, Path], result: Validation) -> None:
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        result.faults.append(f"{name}: not a UTF-8 CSV: {error}")
        return
    header = HEADERS[task]
    if not rows or rows[0] != header:
        result.faults.append(f"{name}: header is {','.join(rows[0]) if rows else 'missing'}; expected {','.join(header)}")
        return
    result.rows = len(rows) - 1
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            result.faults.append(f"{name} row {number}: {len(row)} fields; expected {len(header)}")
            continue
        seen[row[0]] += 1
        result.authentic |= {row[0]} if row[2] == "0" else set()
        result.faults += [f"{name} row {number} ({row[0]}): {fault}" for fault in _row_faults(row)]
        if row[0] not in images:
            result.faults.append(f"{name} row {number} ({row[0]}): extra, no such test image")
    result.faults += [f"{name}: {image} stands in {times} rows" for image, times in seen.items() if times > 1]
    result.faults += [f"{name}: {image} is missing" for image in images if image not in seen]
    if list(seen) != sorted(seen):
        result.notes.append(f"{name}: rows are not sorted by image_id")
    for column in range(3, len(header)):
        values = {row[column] for row in rows[1:] if len(row) == len(header)}
        if len(values) > 1:
            found = ", ".join(sorted(values)[:3])
            result.faults.append(f"{name}: {len(values)} different values of {header[column]} ({found}); one is allowed")


def _row_faults(row: list[str]) -> list[str]:
    """Faults of one row: values that are no numbers in [0, 1], and a label that contradicts prob and threshold."""
    faults, values = [], []
    for column, text in zip(("prob", "threshold", "loc_threshold"), [row[1], *row[3:]], strict=False):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            faults.append(f"{column} is {text!r}; expected a number in [0, 1]")
        values.append(value)
    if row[2] not in ("0", "1"):
        faults.append(f"label is {row[2]!r}; expected 0 or 1")
    elif not faults and int(row[2]) != (values[0] >= values[1]):
        faults.append(f"label {row[2]} contradicts prob {row[1]} and threshold {row[3]} (1 where prob >= threshold)")
    return faults


def _check_masks(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], images: dict[str, Path], result: Validation) -> None:
    expected = {f"{Path(name).stem}.npz": path for name, path in images.items()}
    names = {info.filename for info in members}
    result.faults += [f"{name}: mask is missing" for name in expected if name not in names]
    for info in progress(members, "checking masks"):
        if info.filename not in expected:
            result.faults.append(f"{info.filename}: extra, belongs to no test image")
            continue
        result.masks += 1
        content = _read(archive, info, result)
        if content:
            result.faults += [f"{info.filename}: {fault}" for fault in _mask_faults(content, expected[info.filename], result)]


def _mask_faults(content: bytes, image: Path, result: Validation) -> list[str]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                return [f"holds {len(arrays.files)} arrays; expected one"]
            mask = arrays[arrays.files[0]]
    except Exception as error:  # numpy raises nearly anything on damaged files
        return [f"not a readable npz: {error}"]
    if mask.dtype != np.float16 or mask.ndim != 2:
        return [f"{mask.dtype} array of shape {mask.shape}; expected float16 of shape (H, W)"]
    if not (np.isfinite(mask).all() and mask.min(initial=0) >= 0 and mask.max(initial=0) <= 1):
        return ["values outside [0, 1] or not finite"]
    if image.name in result.authentic and mask.any():
        result.marked.append(image.name)
    try:
        header = read_header(image)
    except ImageError as error:
        result.notes.append(f"{image.name} cannot be read, so the size of its mask {mask.shape} was not checked ({error})")
        return []
    if mask.shape != (header.height, header.width):
        return [f"shape {mask.shape}; its image has {(header.height, header.width)} (height, width)"]
    return []
