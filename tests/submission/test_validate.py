import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, save

from forensics_lib.submission.build import archive_path, build_submission, scores_path
from forensics_lib.submission.validate import validate_submission


def rewritten(archive: Path, change) -> Path:
    """A copy of an archive whose members (a dict of name to bytes) were passed through ``change``."""
    with zipfile.ZipFile(archive) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    members = change(members) or members
    out = archive.with_name("changed.zip")
    with zipfile.ZipFile(out, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return out


def npz(array: np.ndarray, **more) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, array, **more)
    return buffer.getvalue()


def test_unsorted_rows_are_a_note(submittable, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("image_id,prob,label,threshold\nb.png,0.1,0,0.5\na.jpg,0.9,1,0.5\n")
    result = validate_submission(path, "A", submittable.test_folder("A"))
    assert result.valid
    assert "not sorted" in result.notes[0]


def test_extra_masks_and_duplicate_members(submittable):
    path = build_submission(submittable, "B").path
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.npz", npz(np.zeros((2, 2), np.float16)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npz", npz(np.zeros((20, 30), np.float16)))
    faults = validate_submission(path, "B", submittable.test_folder("B")).faults
    assert any("extra.npz: extra" in fault for fault in faults)
    assert any("a.npz: 2 times" in fault for fault in faults)


def test_masks_of_images_called_authentic_are_noted(submittable):
    archive = build_submission(submittable, "B").path
    assert not validate_submission(archive, "B", submittable.test_folder("B")).notes
    changed = rewritten(archive, lambda members: members | {"b.npz": npz(np.full((31, 17), 0.5, np.float16))})
    result = validate_submission(changed, "B", submittable.test_folder("B"))
    assert result.valid
    assert "1 image(s) with label 0" in result.notes[0]
    assert "b.png" in result.notes[0]


def test_a_probability_at_the_threshold_is_noted(submittable, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("image_id,prob,label,threshold\na.jpg,0.5,1,0.50\nb.png,0.2,0,0.50\n")
    result = validate_submission(path, "A", submittable.test_folder("A"))
    assert result.valid and "1 image(s), such as a.jpg, equals the threshold" in result.notes[0]


def test_a_truncated_archive_is_told_as_such(submittable, tmp_path):
    build_submission(submittable, "B")
    (tmp_path / "cut.zip").write_bytes(archive_path(submittable, "B").read_bytes()[:300])
    (fault,) = validate_submission(tmp_path / "cut.zip", "B", submittable.test_folder("B")).faults
    assert fault.startswith("not a zip archive: it begins as one, but is truncated") and "download it again" in fault


def test_an_archive_of_an_unknown_zip_version(submittable):
    path = build_submission(submittable, "A").path
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 255  # the version that is needed to unpack it
    path.write_bytes(content)
    assert "not a zip archive" in validate_submission(path, "A", submittable.test_folder("A")).faults[0]


def test_a_member_whose_name_begins_with_a_null_byte(submittable):
    """zipfile takes a name to end there."""
    path = build_submission(submittable, "B").path
    content = bytearray(path.read_bytes())
    content[content.rindex(b"b.npz")] = 0  # in the directory at the end
    path.write_bytes(content)
    faults = validate_submission(path, "B", submittable.test_folder("B")).faults
    assert "a file in the archive has no name" in faults
    assert "b.npz: mask is missing" in faults


def table(change):
    """A change of the bytes of an archive's CSV."""

    def changed(members):
        name = next(name for name in members if name.endswith(".csv"))
        assert members[name] != change(members[name])
        members[name] = change(members[name])

    return changed


def edit(old: bytes, new: bytes):
    return table(lambda text: text.replace(old, new))


def renamed(old: str, new: str):
    return lambda members: members.update({new: members.pop(old)})


def moved(folder: str):
    return lambda members: {folder + name: content for name, content in members.items()}


def mask(content: bytes):
    return lambda members: members.update({"a.npz": content})


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bare(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ZEROS = np.zeros((20, 30), np.float16)
BROKEN_TABLES = [
    (table(lambda text: b"\xef\xbb\xbf" + text), "begins with a byte order mark", "UTF-8 without one"),
    (table(lambda text: text.decode().encode("utf-16")), "is in UTF-16", "save it as UTF-8"),
    (table(lambda text: text.decode().encode("utf-16-be")), "is in UTF-16", "save it as UTF-8"),
    (table(lambda text: text.replace(b"a.jpg", "\u00e4.jpg".encode("latin-1"))), "not a UTF-8 CSV", ""),
    (edit(b",", b";"), "separated by ;", "write commas"),
    (edit(b",", b"\t"), "separated by tabs", "write commas"),
    (table(lambda text: text.replace(b",", b", ", 3)), "header is image_id, prob", "without spaces"),
    (table(lambda text: b"Image_ID" + text[8:]), "header is Image_ID", "small letters"),
    (edit(b"image_id,prob,label", b"image_id,label,prob"), "header is", "in this order"),
    (table(lambda text: text.replace(b"threshold", b"cutoff", 1)), "lacks threshold", "has in addition cutoff"),
    (table(lambda text: b",image_id" + text[8:]), "a column without a name", "index=False"),
    (table(lambda text: text.split(b"\n", 1)[1]), "the first row is an image's", "header"),
    (table(lambda text: b""), "header is missing", "expected image_id"),
    (table(lambda text: b"PK\x03\x04" + text), "not a CSV: it is a zip archive", "spreadsheets"),
    (edit(b"0.900000,1,", b"0.900000,1.0,"), "label is '1.0'", "astype(int)"),
    (edit(b"0.900000,1,", b"0.900000,True,"), "label is 'True'", "astype(int)"),
    (edit(b"0.900000", b'"0,9"'), "prob is '0,9'", "decimal point"),
    (edit(b"0.900000", b"0_9"), "prob is '0_9'", ""),
    (edit(b"0.900000", b"-1e-3"), "prob is '-1e-3'", "[0, 1]"),
    (edit(b"a.jpg", b"a"), "row 2 (a): no such test image; a.jpg seems", "with its ending"),
    (edit(b"a.jpg", b"test/a.jpg"), "(test/a.jpg): no such test image; a.jpg", "without folders"),
    (edit(b"a.jpg", b"t\\a.jpg"), "a.jpg seems to be meant", "without folders"),
    (edit(b"a.jpg", b"A.JPG"), "(A.JPG): no such test image; a.jpg", "exact"),
    (edit(b"a.jpg", b"a.png"), "(a.png): no such test image; a.jpg", "ending"),
    (table(lambda text: text + b"\n"), "row 4: 0 fields", "empty line"),
    (table(lambda text: text + text.split(b"\n")[1] + b"\n"), "a.jpg stands in 2 rows", ""),
    (table(lambda text: text + text.split(b"\n")[1].replace(b"a.", b"z.") + b"\n"), "(z.jpg): extra", ""),
    (
        table(lambda text: b"\n".join(text.split(b"\n")[:2]) + b"\n"),
        "1 rows for 2 test images, none for any with the ending .png (1)",
        "other endings",
    ),
    (edit(b"b.png,0.2", b"c.png,0.2"), "row 3 (c.png): extra", ""),
    (edit(b"b.png,0.2", b"c.png,0.2"), "b.png is missing", ""),
    (edit(b"b.png,0.2", b"a.jpg,0.2"), "a.jpg stands in 2 rows", ""),
    (edit(b"image_id,prob", b"prob,image_id"), "header is prob,image_id", ""),
    (edit(b"0.900000", b"1.5"), "row 2 (a.jpg): prob is '1.5'", ""),
    (edit(b"0.900000", b"nan"), "prob is 'nan'", ""),
    (edit(b"0.900000", b"inf"), "prob is 'inf'", ""),
    (edit(b"0.900000", b"high"), "prob is 'high'", ""),
    (edit(b"0.900000,1", b"0.900000,0"), "label 0 contradicts prob 0.900000 and threshold 0.500000", ""),
    (edit(b"0.900000,1", b"0.900000,yes"), "label is 'yes'", ""),
    (edit(b"0.200000,0,0.500000", b"0.200000,0,0.600000"), "2 different values of threshold", ""),
    (edit(b"0.900000,1,", b"0.900000,1,,"), "fields; expected", ""),
    (lambda members: members.update({"notes.txt": b"x"}), "notes.txt", ""),
    (lambda members: members.update({"../evil.csv": b"x"}), "lies in a folder", ""),
    (lambda members: members.clear(), "found none", ""),
]
BROKEN_MASKS = [
    (lambda members: members.__delitem__("a.npz"), "a.npz: mask is missing", ""),
    (mask(npz(ZEROS.astype(np.float32))), "float32 array", ""),
    (mask(npz(ZEROS[..., None])), "shape (20, 30, 1)", ""),
    (mask(npz(np.full((20, 30), 1.5, np.float16))), "values outside", ""),
    (mask(npz(np.full((20, 30), np.nan, np.float16))), "not finite", ""),
    (mask(npz(ZEROS, more=np.zeros(1))), "2 arrays", ""),
    (mask(npz(np.array([{}], dtype=object))), "not a readable npz", ""),
    (mask(b"rubbish"), "not a readable npz", ""),
    (mask(b""), "a.npz: not a readable npz: it is empty (0 bytes)", "np.savez_compressed"),
    (mask(bare(ZEROS)), "a bare NumPy array", "np.savez_compressed"),
    (mask(b"\x89PNG\r\n\x1a\n" + bytes(50)), "it is a PNG image", "np.savez_compressed"),
    (mask(b"0.1,0.2\n"), "it is text", "np.savez_compressed"),
    (mask(b"\x80\x04\x95rest"), "it is a pickle", "np.savez_compressed"),
    (mask(bytes(40)), "it is no zip archive", "np.savez_compressed"),
    (mask(zipped(**{"mask.png": b"\x89PNG"})), "holds mask.png, which is no array", ""),
    (mask(zipped()), "holds 0 arrays", ""),
    (mask(npz(ZEROS)[:-30]), "not a readable npz", ""),
    (mask(npz(ZEROS.astype(np.float64))), "float64 array", "astype(np.float16)"),
    (mask(npz(ZEROS > 0)), "bool array", "astype(np.float16)"),
    (mask(npz(np.zeros((20, 30), np.uint8))), "uint8 array", "in [0, 1]"),
    (mask(npz(ZEROS.T)), "shape (30, 20); its image has (20, 30)", "write mask.T"),
    (mask(npz(ZEROS[None])), "shape (1, 20, 30)", "(H, W)"),
    (mask(npz(np.full((20, 30), 255, np.float16))), "values outside [0, 1] or not finite: 255.0 to 255.0", "divide by 255"),
    (mask(npz(np.full((20, 30), np.inf, np.float16))), "values outside", ""),
    (mask(npz(np.where(np.arange(30) == 7, np.nan, ZEROS).astype(np.float16))), "not finite (NaN)", ""),
    (renamed("a.npz", "a.NPZ"), "a.NPZ: must be called a.npz", ""),
    (renamed("a.npz", "a.jpg.npz"), "a.jpg.npz: must be called a.npz", "without the ending"),
    (renamed("a.npz", "a.npy"), "a.npy: must be called a.npz", ""),
    (renamed("a.npz", "c.npz"), "a.npz: mask is missing", ""),
    (renamed("a.npz", "masks/a.npz"), "masks/a.npz: lies in a folder", "zip the files, not the folder"),
    (moved("team_localization_masks/"), "as do 2 more", "zip the files"),
    (moved("team\\"), "as do 2 more", "zip the files"),
    (renamed("scores.csv", "Scores.csv"), "one CSV named scores.csv, found Scores.csv", ""),
    (renamed("scores.csv", "scores.txt"), "found none", ""),
    (lambda members: members.update({"more.csv": b""}), "found more.csv, scores.csv", ""),
    (lambda members: members.update({"masks.zip": zipped(a=b"")}), "masks.zip: extra", "an archive inside"),
    (lambda members: members.update({"__MACOSX/._scores.csv": b"", "__MACOSX/._a.npz": b""}), "2 hidden or system", "zip -d"),
    (lambda members: members.update({".DS_Store": b""}), "such as .DS_Store", "zip -d"),
    (lambda members: members.update({"Thumbs.db": b""}), "such as Thumbs.db", "zip -d"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "change", "fault", "remedy"), [
    *[(task, *case) for case in BROKEN_TABLES for task in "AB"], *[("B", *case) for case in BROKEN_MASKS],
])  # fmt: skip
def test_broken_archives_are_named_with_what_to_do(task, change, fault, remedy, submittable):
    archive = rewritten(build_submission(submittable, task).path, change)
    result = validate_submission(archive, task, submittable.test_folder(task))
    assert not result.valid
    assert any(fault in found and remedy in found for found in result.faults), result.faults
    assert f"{len(result.faults)} FAULT(S)" in result.report()


@pytest.mark.parametrize("change", [
    renamed("a.npz", "masks/a.npz"), renamed("a.npz", "a.NPZ"), moved("x/"), mask(b""), mask(npz(ZEROS.T)),
    lambda members: members.update({"__MACOSX/._scores.csv": b"", "__MACOSX/._a.npz": b""}),
    table(lambda text: b"\xef\xbb\xbf" + text), edit(b"a.jpg", b"a"),
])  # fmt: skip
def test_one_mistake_is_one_fault(change, submittable):
    archive = rewritten(build_submission(submittable, "B").path, change)
    assert len(validate_submission(archive, "B", submittable.test_folder("B")).faults) == 1


@pytest.mark.parametrize("task", ["A", "B"])
@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: b'"' + text.split(b"\n", 1)[0].replace(b",", b'","') + b'"\n' + text.split(b"\n", 1)[1],
    lambda text: text.replace(b"0.200000", b"2e-1"),
    lambda text: text.replace(b"0.500000", b"5.0E-1", 1),
    lambda text: text.removesuffix(b"\n"),
])  # fmt: skip
def test_what_csv_readers_take_is_valid(task, change, submittable):
    result = validate_submission(
        rewritten(build_submission(submittable, task).path, table(change)), task, submittable.test_folder(task)
    )
    assert result.valid, result.faults
    assert [note for note in result.notes if "CRLF" in note] == result.notes


def test_a_table_of_any_name_serves_task_a(submittable):
    archive = rewritten(build_submission(submittable, "A").path, renamed("team_constrained.csv", "predictions.CSV"))
    assert validate_submission(archive, "A", submittable.test_folder("A")).valid


def test_an_encrypted_archive(submittable):
    path = build_submission(submittable, "B").path
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.start_dir + 8] |= 1  # the flag of the first file, in the directory
    path.write_bytes(content)
    faults = validate_submission(path, "B", submittable.test_folder("B")).faults
    assert faults == ["scores.csv: is encrypted; zip without a password"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"image_id,prob\n", "it is text"),
        (b"no zip", "not a zip archive"),
        (b"Rar!\x1a\x07\x00", "a RAR archive"),
        (b"\x1f\x8b\x08", "gzip"),
        (bytes(40), "not a zip"),
    ],
)
def test_files_that_are_no_zip_are_told(content, found, submittable, tmp_path):
    path = tmp_path / "x.ZIP"
    path.write_bytes(content)
    (fault,) = validate_submission(path, "B", submittable.test_folder("B")).faults
    assert fault.startswith("not a zip archive") and found in fault


def test_what_is_no_file_is_told(submittable, tmp_path):
    for path, found in ((tmp_path / "no.zip", "not there"), (tmp_path / "no.csv", "not there"), (tmp_path, "holds")):
        (fault,) = validate_submission(path, "A", submittable.test_folder("A")).faults
        assert fault.startswith("no file to check") and found in fault


def test_a_lone_table_is_no_task_b_submission(submittable):
    build_submission(submittable, "B")
    result = validate_submission(scores_path(submittable), "B", submittable.test_folder("B"))
    (fault,) = result.faults
    assert fault.startswith("masks are missing") and "2 masks" in fault and "validate the zip" in fault
    assert result.rows == 2
    scores_path(submittable).write_text(scores_path(submittable).read_text().replace("b.png", "c.png"))
    assert len(validate_submission(scores_path(submittable), "B", submittable.test_folder("B")).faults) > 1


def test_endings_that_a_filter_dropped_are_named(submittable, rng):
    folder = submittable.test_folder("A")
    for name in ("c.jpeg", "d.jpeg", "e.webp", "f.JPG"):
        save(folder / name, picture(rng))
    rows = "".join(f"{name},0.1,0,0.5\n" for name in ("a.jpg", "b.png", "c.jpeg"))
    path = folder.parent / "x.csv"
    path.write_text(f"image_id,prob,label,threshold\n{rows}")
    result = validate_submission(path, "A", folder)
    assert result.faults[0].endswith(".JPG (1), .webp (1): was the folder listed by other endings alone?")
    assert [fault.split(": ")[1].split()[0] for fault in result.faults[1:]] == ["d.jpeg", "e.webp", "f.JPG"]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([(0.9, 1), (0.8, 0), (0.7, 0)], "confidence in the label"),
        ([(0.1, 1), (0.8, 0), (0.9, 0)], "probability of label 0"),
        ([(0.9, 1), (0.1, 0), (0.7, 0)], None),
        ([(0.9, 1), (0.1, 1), (0.7, 1)], None),
    ],
)
def test_probabilities_of_something_else_are_noted(rows, note, submittable, rng):
    folder = submittable.test_folder("A")
    save(folder / "c.png", picture(rng))
    names = ("a.jpg", "b.png", "c.png")
    text = "".join(f"{name},{prob},{label},0.5\n" for name, (prob, label) in zip(names, rows, strict=True))
    path = folder.parent / "x.csv"
    path.write_text(f"image_id,prob,label,threshold\n{text}")
    result = validate_submission(path, "A", folder)
    assert not result.valid
    assert (note in result.notes[0]) if note else not result.notes


def scores(*rows: str, header: str = "image_id,prob,label,threshold,loc_threshold"):
    return table(lambda _: "\n".join([header, *rows, ""]).encode())


def both(first, second):
    def changed(members):
        first(members)
        second(members)

    return changed


GOOD = ("a.jpg,0.9,1,0.5,0.25", "b.png,0.2,0,0.5,0.25")
ACCIDENTS = {  # seen in submissions of participants: a change of a valid archive, and the words that must be in the report
    "no extensions": (edit(b".jpg", b"") , "a.jpg seems to be meant"),
    "no extensions at all": (scores("a,0.9,1,0.5,0.25", "b,0.2,0,0.5,0.25"), "2 of 2 image_id are without extension"),
    "other extensions": (scores("a.png,0.9,1,0.5,0.25", GOOD[1]), "a.jpg seems to be meant"),
    "names of masks": (scores("a.npz,0.9,1,0.5,0.25", "b.npz,0.2,0,0.5,0.25"), "b.png seems to be meant"),
    "paths": (scores("test/a.jpg,0.9,1,0.5,0.25", GOOD[1]), "without folders"),
    "filtered by extension": (scores(GOOD[0]), "1 rows for 2 test images, none for any with the ending .png"),
    "filtered, with masks": (both(scores(GOOD[0]), lambda members: members.pop("b.npz")), "b.npz: mask is missing"),
    "no rows": (scores(), "a.jpg is missing"),
    "rows twice": (scores(*GOOD, GOOD[0]), "a.jpg stands in 2 rows"),
    "confidence": (scores("a.jpg,0.9,1,0.5,0.25", "b.png,0.8,0,0.5,0.25"), "label 0 contradicts prob 0.8"),
    "probability of real": (scores("a.jpg,0.1,1,0.5,0.25", "b.png,0.8,0,0.5,0.25"), "is prob the probability of label 0?"),
    "labels turned": (scores("a.jpg,0.9,0,0.5,0.25", "b.png,0.2,1,0.5,0.25"), "every label contradicts its prob"),
    "log-odds": (scores("a.jpg,2.1,1,0.5,0.25", GOOD[1]), "prob is '2.1'; expected a number in [0, 1]"),
    "percent": (scores("a.jpg,90%,1,0.5,0.25", GOOD[1]), "prob is '90%'"),
    "names as labels": (scores("a.jpg,0.9,fake,0.5,0.25", GOOD[1]), "label is 'fake'; expected 0 or 1"),
    "another folder": (scores("x.jpg,0.9,1,0.5,0.25", "y.jpg,0.2,0,0.5,0.25"), "is it the table of another folder?"),
    "not the masks' images": (
        scores("x.jpg,0.9,1,0.5,0.25", "y.jpg,0.2,0,0.5,0.25"), "scores.csv is of another folder than the masks",
    ),
    "masks of another folder": (both(renamed("a.npz", "x.npz"), renamed("b.npz", "y.npz")), "x.npz: extra, belongs to no test"),
    "several thresholds": (scores("a.jpg,0.9,1,0.5,0.25", "b.png,0.2,0,0.6,0.25"), "values of threshold (0.5, 0.6)"),
    "several mask thresholds": (scores("a.jpg,0.9,1,0.5,0.25", "b.png,0.2,0,0.5,0.3"), "2 different values of loc_threshold"),
    "no mask threshold": (scores("a.jpg,0.9,1,0.5", header="image_id,prob,label,threshold"), "it lacks loc_threshold"),
    "resized masks": (mask(npz(np.zeros((224, 224), np.float16))), "shape (224, 224); its image has (20, 30)"),
    "masks as grey values": (mask(npz(np.full((20, 30), 255, np.uint8))), "uint8 array of shape (20, 30)"),
    "masks as grey floats": (mask(npz(np.full((20, 30), 255, np.float16))), "divide by 255"),
    "masks with channels": (mask(npz(np.zeros((1, 20, 30), np.float16))), "shape (1, 20, 30)"),
    "masks of booleans": (mask(npz(np.ones((20, 30), bool))), "bool array"),
    "masks in a folder": (both(renamed("a.npz", "masks/a.npz"), renamed("b.npz", "masks/b.npz")), "zip the files, not"),
}  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_accidents_of_participants_are_named_in_their_words(accident, submittable):
    change, words = ACCIDENTS[accident]
    result = validate_submission(rewritten(build_submission(submittable, "B").path, change), "B", submittable.test_folder("B"))
    assert not result.valid
    assert words in result.report()


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (1, "1 mask(s) have one value all over, such as that of a.jpg, which is 1 everywhere"),
        (0.5, "1 mask(s) have one value all over, such as that of a.jpg, which is 0.5 everywhere"),
        (0, "1 mask(s) of images with label 1 mark nothing (zeros all over), such as that of a.jpg"),
    ],
)
def test_masks_of_one_value_are_noted(value, note, submittable):
    archive = rewritten(build_submission(submittable, "B").path, mask(npz(np.full((20, 30), value, np.float16))))
    result = validate_submission(archive, "B", submittable.test_folder("B"))
    assert result.valid
    assert result.notes == [note]


def test_test_images_that_share_a_mask_are_a_fault(submittable, rng):
    archive = build_submission(submittable, "B").path
    save(submittable.test_folder("B") / "a.png", picture(rng, 20, 30))
    faults = validate_submission(archive, "B", submittable.test_folder("B")).faults
    assert "a.jpg and a.png would share the mask a.npz" in faults
