import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS, OFFICIAL, encoded, needs_corpus, needs_official, picture, records, save
from PIL import Image

from forensics_lib.data.layouts import mask_names, read_task_a, read_task_b_validation, read_test, read_tgif
from forensics_lib.data.manifest import build_manifest, build_test_manifest
from forensics_lib.data.rows import LayoutError, Rows
from forensics_lib.images.io import FORMATS, SUFFIXES
from forensics_lib.training.loop import train


def test_task_a_labels_splits_and_sources(tiny_data):
    rows = records(read_task_a(tiny_data / "dataset"))
    assert len(rows) == 20
    assert {(row["split"], row["label"]) for row in rows} == {(s, y) for s in ("train", "val") for y in (0, 1)}
    assert {row["source"] for row in rows} == {"src"}


def test_links_are_followed_and_loops_end(tiny_data, tmp_path, rng):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "airplane" / "00001.PNG".lower(), picture(rng))
    folder = tiny_data / "dataset" / "train" / "0_real"
    (folder / "progan").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (folder / "dead.png").symlink_to(tmp_path / "nothing.png")
    rows = records(read_task_a(tiny_data / "dataset"))
    assert [row["source"] for row in rows].count("progan") == 1
    assert any(row["path"].endswith("dead.png") for row in rows), "a broken link is listed, so that it is reported"


def test_upper_case_endings_count_and_other_files_do_not(tmp_path, rng):
    save(tmp_path / "A.JPG", picture(rng))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    assert [Path(row["path"]).name for row in records(read_test(tmp_path))] == ["A.JPG"]


def test_images_below_the_test_folder_are_named(tmp_path, rng, capsys):
    save(tmp_path / "a.jpg", picture(rng))
    save(tmp_path / "deeper" / "b.jpg", picture(rng))
    assert len(records(read_test(tmp_path))) == 1
    assert str(tmp_path / "deeper") in capsys.readouterr().out


def test_an_empty_folder_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "training").mkdir()
    with pytest.raises(LayoutError, match=r"0_real.*training/"):
        read_task_a(tmp_path)


def test_tgif_pairs_masks_and_groups_by_photo(tiny_data):
    rows = records(read_tgif(tiny_data / "dataset_taskB" / "TGIF"))
    fakes = [row for row in rows if row["label"]]
    assert {row["kind"] for row in fakes} == {"sp", "fr"}
    assert all(Path(row["mask_path"]).is_file() for row in fakes)
    assert {row["group"] for row in rows if row["split"] == "train"} == {"coco:0", "coco:1"}


def test_validation_reads_windows_paths_and_a_byte_order_mark(tiny_data):
    rows = records(read_task_b_validation(tiny_data / "dataset_taskB" / "validation"))
    assert [row["kind"] for row in rows] == ["orig", "orig", "sp", "sp"]
    assert all(Path(row["path"]).is_file() for row in rows)
    assert rows[0]["group"] == rows[2]["group"] == "coco:0"


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "img_path,mask_path,src_path,type\n..\\..\\x.jpg,m,s,sp\n"])
def test_validation_table_with_wrong_columns_or_paths(tiny_data, content):
    folder = tiny_data / "dataset_taskB" / "validation"
    (folder / "taskB_val.csv").write_text(content)
    with pytest.raises(LayoutError, match=r"taskB_val\.csv|its table names"):
        read_task_b_validation(folder)


def test_walk_is_sorted_and_passes_over_hidden_folders(tmp_path):
    for name in ("b.png", "a.png", "c.png", ".ipynb_checkpoints/x.png", "__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [folder.images for folder in Rows().walk(tmp_path)] == [["a.png", "b.png", "c.png"]]


@needs_official
def test_official_task_b_table(tmp_path):
    (tmp_path / "taskB_val.csv").write_bytes((OFFICIAL / "taskB_val.csv").read_bytes())
    rows = records(read_task_b_validation(tmp_path))
    assert len(rows) == 6212
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("fr"), kinds.count("sp")) == (3169, 3043)
    assert len({row["group"] for row in rows if row["source"] == "coco"}) == 1950


@needs_corpus
def test_corpus_is_read_as_it_lies():
    folder = CORPUS / "dataset_taskB"
    rows = records(read_tgif(folder / "TGIF")) + records(read_task_b_validation(folder / "validation"))
    assert all(Path(row["mask_path"]).is_file() for row in rows if row["label"])
    labels = np.array([row["label"] for row in records(read_task_a(CORPUS / "dataset")) if row["split"] == "val"])
    assert (labels.sum(), len(labels)) == (150, 300)


ODD_NAMES = {
    "a.jp2": "JPEG2000", "b.ppm": "PPM", "c.jpg_large": "JPEG", "d.JPG": "JPEG", "e.jpeg%20": "JPEG", "no ending": "PNG",
    "f.data": "WEBP", "g.txt": "GIF", "h.png.bak": "TIFF", "i.": "BMP", "3f2a.v2": "AVIF",
    "j.jpg:large": "JPEG", "k.npz": "PPM",
}  # fmt: skip


def test_test_images_are_told_by_their_content(tmp_path, rng, capsys):
    for name, form in ODD_NAMES.items():
        (tmp_path / name).write_bytes(encoded(picture(rng), form))
    broken = {"x.heic": b"", "y.jpeg%20": b"cut", "z.hif": b"z", "w.jpg_large": b"", "v.jfif": b"v", "cut": b"\xff\xd8\xff\xe0"}
    others = {
        "Thumbs.db": b"\xd0\xcf\x11\xe0", "notes.txt": b"BMW and P5 are no images", "scores.csv": b"P1,0.5\n",
        "clip.mp4": b"\0\0\0 ftypisom",
        "empty": b"", "m.svg": b"<svg/>", "page.html": b"<html>", "zip": b"PK\x03\x04", "riff.wav": b"RIFF0000WAVEfmt ",
    }  # fmt: skip
    for name, content in (broken | others).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / ".hidden").write_bytes(encoded(picture(rng), "JPEG"))
    os.mkfifo(tmp_path / "pipe")
    listed = [Path(row["path"]).name for row in records(read_test(tmp_path))]
    assert listed == sorted([*ODD_NAMES, *broken])
    passed, hidden = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert passed.startswith(f"{len(others) + 1} file(s) whose content is no image")
    assert all(str(tmp_path / name) in passed for name in [*others, "pipe"])
    assert hidden.startswith("1 hidden image(s)") and str(tmp_path / ".hidden") in hidden
    assert ".DS_Store" not in passed + hidden


def test_heif_by_any_name(tmp_path, rng):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for name in ("a.hif", "b.heif", "c"):
        (tmp_path / name).write_bytes(encoded(picture(rng), "HEIF"))
    assert len(read_test(tmp_path)) == 3


def test_every_ending_of_the_formats_that_are_read_is_known():
    Image.init()
    endings = {ending for ending, form in Image.registered_extensions().items() if form in FORMATS}
    assert endings <= SUFFIXES


def test_training_images_of_rare_endings(tiny_data, rng):
    folder = tiny_data / "dataset" / "train" / "0_real"
    names = ["a.jp2", "b.PGM", "c.jpg_large"]
    for name, form in zip(names, ("JPEG2000", "PPM", "JPEG"), strict=True):
        (folder / name).write_bytes(encoded(picture(rng), form))
    listed = {Path(row["path"]).name for row in records(read_task_a(tiny_data / "dataset"))}
    assert set(names) <= listed


def test_names_that_would_share_a_mask_are_named():
    with pytest.raises(LayoutError, match=r"x\.jpg and x\.png and x would share the mask x\.npz; y\.z\.gif and y\.z\.webp"):
        mask_names(["f/x.jpg", "f/y.z.gif", "f/x.png", "f/one.png", "f/y.z.webp", "f/x"])
    assert mask_names(["f/x.jpg", "f/X.png"]) == {"x.jpg": "x.npz", "X.png": "X.npz"}


def test_test_images_that_would_share_a_mask_are_told_before_training(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    folder = tiny_run.test_folder("B")
    shutil.copy(folder / "b1.jpg", folder / "b1.jpeg%20")
    for early in (lambda: build_test_manifest(tiny_run, "B"), lambda: train(tiny_run, "B", manifest)):
        with pytest.raises(LayoutError, match=r"b1\.jpeg%20 and b1\.jpg would share the mask b1\.npz"):
            early()
    assert not tiny_run.metrics.is_file(), "nothing was trained"


def test_masks_whose_names_differ_in_case_alone_are_noted(tiny_run, capsys):
    folder = tiny_run.test_folder("B")
    shutil.copy(folder / "b1.jpg", folder / "B1.png")
    shutil.copy(folder / "b2.jpg", folder / "ne\u0301.png")
    shutil.copy(folder / "b2.jpg", folder / "N\u00e9.png")
    assert len(build_test_manifest(tiny_run, "B")) == 7
    said = capsys.readouterr().out
    assert "B1.npz and b1.npz" in said
    assert "N\u00e9.npz and ne\u0301.npz" in said
    build_test_manifest(tiny_run, "A")
    assert "case" not in capsys.readouterr().out
