import csv
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, records, save

from forensics_lib.files import project_root
from forensics_lib.layouts import LayoutError, Rows, read_task_a, read_task_b_validation, read_test, read_tgif

CORPUS = Path(os.environ.get("FORENSICS_CORPUS", project_root().parent / "shared" / "corpus"))
OFFICIAL = CORPUS.parent / "official"


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


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official tables are not at {OFFICIAL} (FORENSICS_CORPUS)")
def test_official_task_b_table(tmp_path):
    (tmp_path / "taskB_val.csv").write_bytes((OFFICIAL / "taskB_val.csv").read_bytes())
    rows = records(read_task_b_validation(tmp_path))
    assert len(rows) == 6212
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("fr"), kinds.count("sp")) == (3169, 3043)
    assert len({row["group"] for row in rows if row["source"] == "coco"}) == 1950


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official tables are not at {OFFICIAL} (FORENSICS_CORPUS)")
def test_official_tgif_names(tmp_path):
    """Empty files under the first official names of each method: each must find its mask's official name."""
    for method, middle, mask in (
        ("sd2", "_mask_{m}.png_ps_mask.png_sd2_{v}.png", "_mask_{m}.png_ps_mask.png"),
        ("ps", "_mask_{m}.png_ps_{v}.png", "_mask_{m}.png_ps_mask.png"),
    ):
        with (OFFICIAL / "tgif" / f"{method}_validation.csv").open() as lines:
            for item in list(csv.DictReader(lines))[:50]:
                values = {"m": item["mask_variation"], "v": item["gen_variation_id"]}
                for folder, ending in ((f"{method}-sp", middle), ("masks", mask)):
                    path = tmp_path / folder / "validation" / item["category"] / (item["image_id"] + ending.format(**values))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
    rows = records(read_tgif(tmp_path))
    assert len(rows) == 100
    assert all(Path(row["mask_path"]).is_file() for row in rows)


@pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS} (FORENSICS_CORPUS)")
def test_corpus_is_read_as_it_lies():
    folder = CORPUS / "dataset_taskB"
    rows = records(read_tgif(folder / "TGIF")) + records(read_task_b_validation(folder / "validation"))
    assert all(Path(row["mask_path"]).is_file() for row in rows if row["label"])
    labels = np.array([row["label"] for row in records(read_task_a(CORPUS / "dataset")) if row["split"] == "val"])
    assert (labels.sum(), len(labels)) == (150, 300)
