"""Validation of the challenge's archives, from the archive and the test images alone."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from forensics_lib.data.layouts import mask_clashes, read_test
from forensics_lib.data.rows import contents
from forensics_lib.images.headers import read_header
from forensics_lib.images.io import ImageError
from forensics_lib.utils.progress import progress

HEADERS = {"A": ["image_id", "prob", "label", "threshold"], "B": ["image_id", "prob", "label", "threshold", "loc_threshold"]}
SCORES = "scores.csv"
SHOWN_FAULTS = 20
MAX_MEMBER_BYTES = 4 << 30  # of one file inside an archive, unpacked
WRITE_MASK = "np.savez_compressed(name, mask.astype(np.float16)) of a mask of shape (H, W) in [0, 1]"
MAGIC = {
    b"\x93NUMPY": "a bare NumPy array (.npy)",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a zip archive, as spreadsheets are too",
    b"\x1f\x8b": "a gzip file",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80": "a pickle",
}
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz")
ADDED = re.compile(r"(^|[\\/])(__MACOSX[\\/]|\.[^\\/]*$|(Thumbs\.db|desktop\.ini)$)", re.IGNORECASE)  # by file managers
SEPARATOR = re.compile(r"[\\/]")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass
class Validation:
    """Findings of the validator in an archive."""

    path: Path
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # not faults, but worth knowing
    rows: int = 0
    masks: int = 0
    named: set[str] = field(default_factory=set)  # the images that the table names
    authentic: set[str] = field(default_factory=set)  # the images whose label is 0
    marked: list[str] = field(default_factory=list)  # those of them whose masks are not empty
    uniform: dict[str, float] = field(default_factory=dict)  # images whose masks have one value all over, and the value

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


def validate_submission(path: Path, task: str, test_folder: Path) -> Validation:
    """Validate an archive, a plain CSV or any other file, also a damaged one, against the folder of test images.

    Returns every fault, named by row or file; no fault raises.  A lone ``scores.csv`` is not a Task B submission: its rows are
    checked, and the missing masks are a fault.
    """
    result = Validation(path)
    images = {Path(path).name: Path(path) for path in read_test(test_folder).paths}
    if not path.is_file():
        result.faults.append(f"no file to check: {contents(path)}")
        return result
    if path.suffix.lower() == ".csv":
        if task == "B":
            result.faults.append(
                f"masks are missing: a Task B submission is a zip with {SCORES} and {len(images)} masks, of which this is the "
                "table alone; validate the zip"
            )
        _check_csv(path.read_bytes(), path.name, task, images, result)
        return result
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises nearly anything on damaged directories
        with path.open("rb") as file:
            start = file.read(4096)
        cut = f"it begins as one, but is truncated, damaged or of an unknown kind ({error}); build or download it again"
        found = cut if start.startswith(b"PK\x03\x04") else _looks_like(start)
        result.faults.append(f"not a zip archive: {found or error}")
        return result
    with archive:
        _check_archive(archive, task, images, result)
    return result


def _uniform_masks(result: Validation) -> list[str]:
    """Notes on masks with one value all over: of images called manipulated if it is 0, of any if it is another one."""
    empty = [name for name, value in result.uniform.items() if value == 0 and name not in result.authentic]
    filled = [name for name, value in result.uniform.items() if value > 0]
    notes = []
    if filled:
        value = f"{result.uniform[filled[0]]:g}"
        notes.append(f"{len(filled)} mask(s) have one value all over, such as that of {filled[0]}, which is {value} everywhere")
    if empty:
        notes.append(f"{len(empty)} mask(s) of images with label 1 mark nothing (zeros all over), such as that of {empty[0]}")
    return notes


Entries = list[tuple[str, zipfile.ZipInfo]]  # names without folders


def _check_archive(archive: zipfile.ZipFile, task: str, images: dict[str, Path], result: Validation) -> None:
    entries = _check_members(archive, result)
    tables = sorted((entry for entry in entries if entry[0].lower().endswith(".csv")), key=lambda entry: entry[0] != SCORES)
    if len(tables) != 1 or (task == "B" and tables[0][0] != SCORES):
        found = ", ".join(sorted(name for name, _ in tables)) or "none"
        result.faults.append(f"expected {'one CSV' if task == 'A' else f'one CSV named {SCORES}'}, found {found}")
    for name, info in tables[:1]:
        if (content := _read(archive, info, result)) is not None:
            _check_csv(content, name, task, images, result)
    others = [entry for entry in entries if entry not in tables]
    if task == "A":
        result.faults += [f"{name}: does not belong in the archive{_nested(name)}" for name, _ in others]
        return
    result.faults += mask_clashes(list(images))
    _check_masks(archive, others, images, result)
    if result.marked:
        result.notes.append(
            f"{len(result.marked)} image(s) with label 0 have masks that are not all zero, such as {result.marked[0]}; "
            "the challenge asks for zeros where nothing is detected"
        )
    result.notes += _uniform_masks(result)


def _check_members(archive: zipfile.ZipFile, result: Validation) -> Entries:
    """The files of an archive by their names without folders; those that file managers add are faults and left out."""
    members = [info for info in archive.infolist() if not info.filename.endswith("/")]  # is_dir() fails on an empty name
    if added := [info.filename for info in members if ADDED.search(info.filename)]:
        result.faults.append(
            f"{len(added)} hidden or system file(s), such as {added[0]}, that a file manager added: take them out, for "
            f"example by  zip -d {result.path.name} '__MACOSX/*' '*.DS_Store' '*Thumbs.db'"
        )
    entries = [(SEPARATOR.split(info.filename)[-1], info) for info in members if not ADDED.search(info.filename)]
    if deeper := [info.filename for name, info in entries if name != info.filename]:
        result.faults.append(
            f"{deeper[0]}: lies in a folder{f', as do {len(deeper) - 1} more' if len(deeper) > 1 else ''}; files belong at "
            "the top of the archive: zip the files, not the folder that holds them"
        )
    if any(not name for name, _ in entries):
        result.faults.append("a file in the archive has no name")
    counts = Counter(name for name, _ in entries)
    result.faults += [f"{name}: {times} times in the archive" for name, times in counts.items() if times > 1]
    return entries


def _nested(name: str) -> str:
    return ": an archive inside of the archive; put its files in instead" if name.lower().endswith(ARCHIVES) else ""


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, result: Validation) -> bytes | None:
    """A member's bytes; None with a fault where it is damaged, encrypted or too large."""
    try:
        if info.flag_bits & 1:
            result.faults.append(f"{info.filename}: is encrypted; zip without a password")
        elif info.file_size > MAX_MEMBER_BYTES:
            result.faults.append(f"{info.filename}: {info.file_size:,} bytes unpacked; at most {MAX_MEMBER_BYTES:,} are read")
        else:
            return archive.read(info)
    except Exception as error:  # zlib, CRC, unknown compression
        result.faults.append(f"{info.filename}: cannot be unpacked: {error}; make the archive again")
    return None


def _looks_like(content: bytes) -> str | None:
    """What the content of a file of the wrong type is, in words; None where it is not known."""
    if not content:
        return "it is empty (0 bytes)"
    for magic, name in MAGIC.items():
        if content.startswith(magic):
            return f"it is {name}"
    start = content[:1000].decode("ascii", errors="replace")
    return "it is text" if all(c.isascii() and (c.isprintable() or c.isspace()) for c in start) else None


def _check_csv(content: bytes, name: str, task: str, images: dict[str, Path], result: Validation) -> None:
    if content.startswith(tuple(MAGIC)):
        result.faults.append(f"{name}: not a CSV: {_looks_like(content)}")
        return
    try:
        text = _decoded(content, name, result)
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        result.faults.append(f"{name}: not a UTF-8 CSV: {error}")
        return
    header, found = HEADERS[task], rows[0] if rows else []
    if found != header:
        result.faults.append(
            f"{name}: header is {','.join(found) or 'missing'}; expected {','.join(header)}{_remedy(found, header, images)}"
        )
        if [column.strip().lower() for column in found] != header:
            return
    result.rows = len(rows) - 1
    _check_rows(rows[1:], name, header, images, result)
    if "\r" in text:
        result.notes.append(f"{name}: lines end as on Windows (CRLF) or old Macs (CR), which is allowed")


def _decoded(content: bytes, name: str, result: Validation) -> str:
    """The text of a CSV; UTF-16 and a byte order mark are faults.  Raises ``UnicodeDecodeError``."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:100]:
        result.faults.append(f"{name}: is in UTF-16; save it as UTF-8 (Excel: 'CSV', pandas: encoding='utf-8')")
        return content.decode("utf-16")
    if content.startswith(codecs.BOM_UTF8):
        result.faults.append(
            f"{name}: begins with a byte order mark, which many readers take for a part of the first column's name; save it as "
            "UTF-8 without one (Excel: 'CSV', not 'CSV UTF-8'; pandas: encoding='utf-8', not 'utf-8-sig')"
        )
    return content.decode("utf-8-sig")


def _remedy(found: list[str], header: list[str], images: dict[str, Path]) -> str:
    """What to do about a wrong header, as the end of a sentence."""
    near = [column.strip().lower() for column in found]
    if near == header:
        return ": write the names in small letters without spaces"
    if len(found) == 1 and (separators := [sign for sign in ";\t|" if sign in found[0]]):
        sign = "tabs" if separators[0] == "\t" else separators[0]
        return f": fields are separated by {sign}; write commas, and decimal points"
    if found and (found[0] in images or _meant(found[0], _by_near_name(images))):
        return ": the first row is an image's; write the header above it"
    if sorted(near) == sorted(header):
        return ": put the columns in this order"
    lacking = [column for column in header if column not in near]
    extra = [column or "a column without a name (pandas: index=False)" for column in near if column not in header]
    parts = [f"{verb} {', '.join(names)}" for verb, names in (("lacks", lacking), ("has in addition", extra)) if names]
    return f": it {' and '.join(parts)}" if found and parts else ""


def _check_rows(rows: list[list[str]], name: str, header: list[str], images: dict[str, Path], result: Validation) -> None:
    near, seen = _by_near_name(images), Counter[str]()
    result.faults += _odd_names([row[0] for row in rows if row], images, near, name)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            remedy = "" if row else ": take the empty line out"
            result.faults.append(f"{name} row {number}: {len(row)} fields; expected {len(header)}{remedy}")
            continue
        image = row[0] if row[0] in images else _meant(row[0], near)
        seen[image or row[0]] += 1
        result.authentic |= {image or row[0]} if row[2] == "0" else set()
        faults = _row_faults(row)
        if image is None:
            faults.append("extra, no such test image")
        elif image != row[0]:
            faults.append(
                f"no such test image; {image} seems to be meant. image_id is the exact file name with its ending and "
                "without folders"
            )
        result.faults += [f"{name} row {number} ({row[0]}): {fault}" for fault in faults]
    result.faults += [f"{name}: {image} stands in {times} rows" for image, times in seen.items() if times > 1]
    missing = [image for image in images if image not in seen]
    result.faults += _dropped_endings(missing, list(images), name, len(rows))
    result.named = set(seen)
    result.faults += [f"{name}: {image} is missing" for image in missing]
    if list(seen) != sorted(seen):
        result.notes.append(f"{name}: rows are not sorted by image_id")
    _check_columns([row for row in rows if len(row) == len(header)], name, header, result)


def _check_columns(rows: list[list[str]], name: str, header: list[str], result: Validation) -> None:
    """One value of each threshold; notes on probabilities that readers could take in two ways."""
    if level := [row[0] for row in rows if _number(row[1]) == _number(row[3])]:
        result.notes.append(
            f"{name}: the probability of {len(level)} image(s), such as {level[0]}, equals the threshold: a scorer that takes "
            "prob > threshold reads label 0 from them, one that takes prob >= threshold label 1"
        )
    for number, column in enumerate(header[3:], start=3):
        values = {_number(row[number]): row[number] for row in rows}
        if len(values) > 1:
            found = ", ".join(sorted(values.values())[:3])
            result.faults.append(f"{name}: {len(values)} different values of {column} ({found}); one is allowed")
    result.notes += _turned_around(rows, name)


def _odd_names(written: list[str], images: dict[str, Path], near: dict[str, str], name: str) -> list[str]:
    """Faults of the names as a whole: without extensions, or of other images; from two rows on."""
    wrong = [image for image in written if image not in images]
    bare = [image for image in wrong if not Path(image).suffix and _meant(image, near)]
    unknown = [image for image in wrong if not _meant(image, near)]
    faults = []
    if len(bare) > 1:
        faults.append(
            f"{name}: {len(bare)} of {len(written)} image_id are without extension, such as {bare[0]}; write the exact file "
            f"name, {_meant(bare[0], near)}"
        )
    if len(unknown) > 1 and 2 * len(unknown) > len(written):
        faults.append(
            f"{name}: {len(unknown)} of {len(written)} names are of no test image, such as {unknown[0]}: is it the table of "
            f"another folder? The test images are called as {min(images)}"
        )
    return faults


def _by_near_name(images: dict[str, Path]) -> dict[str, str]:
    """Test images by their names in lower case, with and without extensions."""
    return {Path(image).stem.casefold(): image for image in images} | {image.casefold(): image for image in images}


def _meant(written: str, near: dict[str, str]) -> str | None:
    """The test image that a name with a folder, another extension or none, or in other case seems to mean."""
    name = SEPARATOR.split(written.strip())[-1].casefold()
    return near.get(name) or near.get(Path(name).stem)


def _dropped_endings(missing: list[str], images: list[str], name: str, rows: int) -> list[str]:
    """A fault for extensions without any row, where others have rows: the folder was filtered by extension."""
    absent, there = (Counter(Path(image).suffix or "no ending" for image in names) for names in (missing, images))
    dropped = {ending: count for ending, count in absent.items() if count == there[ending]}
    if not dropped or len(missing) == len(images):
        return []
    found = ", ".join(f"{ending} ({count})" for ending, count in sorted(dropped.items()))
    return [
        f"{name}: {rows} rows for {len(images)} test images, none for any with the ending {found}: was the folder listed by "
        "other endings alone?"
    ]


def _turned_around(rows: list[list[str]], name: str) -> list[str]:
    """Notes on probabilities that seem to be of label 0, or confidences; from two contradictions on."""
    labels = [row[2] for row in rows if row[2] in ("0", "1")]
    wrong = [row[2] for row in rows if row[2] in ("0", "1") and (_number(row[1]) >= _number(row[3])) != (row[2] == "1")]
    if len(wrong) < 2 or "0" not in labels:
        return []
    if len(wrong) == len(labels):
        return [f"{name}: every label contradicts its prob; is prob the probability of label 0? It must be that of label 1"]
    if wrong == ["0"] * labels.count("0"):
        return [f"{name}: every prob of label 0 is above the threshold; is prob the confidence in the label? It must be "
                "the probability of label 1 (synthetic or manipulated) in all rows"]  # fmt: skip
    return []


def _number(text: str) -> float:
    """The value of a decimal number, with or without an exponent; NaN for anything else."""
    return float(text) if NUMBER.fullmatch(text.strip()) else math.nan


def _row_faults(row: list[str]) -> list[str]:
    """Faults of a row: values that are not numbers in [0, 1], and a label that contradicts prob and threshold."""
    faults, values = [], []
    for column, text in zip(("prob", "threshold", "loc_threshold"), [row[1], *row[3:]], strict=False):
        value = _number(text)
        if not 0 <= value <= 1:
            remedy = ": write a decimal point" if re.fullmatch(r"\s*\d+,\d+\s*", text) else ""
            faults.append(f"{column} is {text!r}; expected a number in [0, 1]{remedy}")
        values.append(value)
    if row[2] not in ("0", "1"):
        whole_number = _number(row[2]) in (0, 1) or row[2].strip().lower() in ("true", "false")
        faults.append(f"label is {row[2]!r}; expected 0 or 1{': write whole numbers (pandas: astype(int))' * whole_number}")
    elif not faults and int(row[2]) != (values[0] >= values[1]):
        faults.append(f"label {row[2]} contradicts prob {row[1]} and threshold {row[3]} (1 where prob >= threshold)")
    return faults


def _check_masks(archive: zipfile.ZipFile, entries: Entries, images: dict[str, Path], result: Validation) -> None:
    expected = {f"{Path(name).stem}.npz": path for name, path in images.items()}
    near, names = _by_near_name(images), {name for name, _ in entries}
    wanted = {name: name if name in expected else _mask_meant(name, near, names) for name in names}
    if names and result.named and names.isdisjoint(f"{Path(image).stem}.npz" for image in result.named):
        result.faults.append(
            f"{SCORES} is of another folder than the masks: it names {min(result.named)}, the masks are those of {min(names)}"
        )
    there = set(wanted.values())
    result.faults += [f"{name}: mask is missing" for name in expected if name not in there]
    for name, info in progress(entries, "checking masks"):
        mask = wanted[name]
        if mask is None:
            result.faults.append(f"{name}: extra, belongs to no test image{_nested(name)}")
            continue
        if mask != name:
            result.faults.append(f"{name}: must be called {mask}, as its image without the ending, and .npz")
        result.masks += 1
        if (content := _read(archive, info, result)) is not None:
            result.faults += [f"{name}: {fault}" for fault in _mask_faults(content, expected[mask], result)]


def _mask_meant(name: str, near: dict[str, str], names: set[str]) -> str | None:
    """The mask that a wrong name (``a.NPZ``, ``a.jpg.npz``, ``a.npy``) seems to mean, where the archive lacks that one."""
    image = _meant(name, near) or _meant(Path(name).stem, near)
    mask = f"{Path(image).stem}.npz" if image else None
    return None if mask in names else mask


def _mask_faults(content: bytes, image: Path, result: Validation) -> list[str]:
    if not content.startswith(b"PK"):  # as every zip, and so every npz
        return [f"not a readable npz: {_looks_like(content) or 'it is no zip archive'}; write it by {WRITE_MASK}"]
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = arrays.files
            mask = arrays[names[0]] if len(names) == 1 else None
    except Exception as error:  # numpy raises nearly anything on damaged files
        return [f"not a readable npz: {error}; write it by {WRITE_MASK}"]
    if mask is None:
        return [f"holds {len(names)} arrays; expected one: write it by {WRITE_MASK}"]
    if not isinstance(mask, np.ndarray):  # numpy returns other members as bytes
        return [f"holds {names[0]}, which is no array; write it by {WRITE_MASK}"]
    if mask.dtype != np.float16 or mask.ndim != 2:
        return [f"{mask.dtype} array of shape {mask.shape}; expected float16 of shape (H, W): write it by {WRITE_MASK}"]
    low, high = (mask.min(), mask.max()) if mask.size else (0, 0)
    if np.isnan(low) or np.isnan(high):
        return ["holds values that are not finite (NaN); expected [0, 1]"]
    if low < 0 or high > 1:
        return [f"values outside [0, 1] or not finite: {low} to {high}{'; divide by 255' if 1 < high <= 255 else ''}"]
    if image.name in result.authentic and high > 0:
        result.marked.append(image.name)
    if low == high:
        result.uniform[image.name] = float(low)
    return _size_faults(mask.shape, image, result)


def _size_faults(shape: tuple[int, ...], image: Path, result: Validation) -> list[str]:
    try:
        header = read_header(image)
    except ImageError as error:
        result.notes.append(f"{image.name} cannot be read, so the size of its mask {shape} was not checked ({error})")
        return []
    size = (header.height, header.width)
    if shape == size:
        return []
    turned = "; height and width are the wrong way round: write mask.T" if shape == size[::-1] else ""
    return [f"shape {shape}; its image has {size} (height, width){turned}"]
