"""What complete official data holds, and what is missing."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import OFFICIAL, changed, records, tally, touch, with_data
from PIL import Image

from forensics_lib.__main__ import main
from forensics_lib.data import check as official
from forensics_lib.data.duplicates import groups_across_splits, overlapping, shared_photographs
from forensics_lib.data.layouts import read_task_b_validation, read_tgif
from forensics_lib.params import DataSet

TGIF_OFFICIAL = {  # table: (folder, image name, mask name)
    "sd2": ("sd2-sp", "{i}_mask_{m}.png_ps_mask.png_sd2_{v}.png", "{i}_mask_{m}.png_ps_mask.png"),
    "ps": ("ps-sp", "{i}_mask_{m}.png_ps_{v}.png", "{i}_mask_{m}.png_ps_mask.png"),
    "sd2-fr": ("sd2-fr", "{i}_mask_{m}.png_sd2-512_{v}.png", "{i}_mask_{m}_512.png"),
    "sdxl": ("sdxl-fr", "{i}_mask_{m}.png_sdxl-1024_{v}.png", "{i}_mask_{m}_1024.png"),
}


def test_check_data_says_what_is_missing(tiny_run, capsys, monkeypatch):
    monkeypatch.setitem(official.EXPECTED, "own", {("val", 0): 4, ("val", 1): 4})
    monkeypatch.setitem(official.EXPECTED, "task_b_validation", {("val", 0): 2, ("val", 1): 2})
    counts = {("train", 0): 2, ("train", 1): 4, ("val", 0): 2, ("val", 1): 4, ("test", 0): 2, ("test", 1): 4}
    monkeypatch.setitem(official.EXPECTED, "tgif", counts)
    monkeypatch.setitem(official.TEST_IMAGES, "A", 4)
    assert official.check_data(tiny_run).complete
    twin = tiny_run.test_folder("B") / "b0.webp"
    twin.write_bytes(b"")
    clashing = official.check_data(tiny_run)
    assert not clashing.complete
    assert "b0.jpg and b0.webp would share the mask b0.npz" in clashing.report()
    twin.unlink()
    next((tiny_run.data / "dataset_taskB" / "TGIF" / "masks" / "training").rglob("*_512.png")).unlink()
    found = official.check_data(tiny_run)
    assert not found.complete and "INCOMPLETE" in found.report() and "its mask" in found.report()
    next((tiny_run.data / "dataset_taskB" / "TGIF" / "sd2-fr" / "validation").rglob("*.png")).unlink()
    missing = official.check_data(tiny_run).table.set_index(["layout", "split", "class"])["missing"]
    assert missing["tgif", "val", "positive"].sum() == 1  # pandas 2 gives a series, since test images stand there twice
    assert main(["check-data", "--data", str(tiny_run.data)]) == 1
    assert "INCOMPLETE" in capsys.readouterr().out


def test_edition_2026_counts_regenerated_images(tiny_run, monkeypatch):
    monkeypatch.setitem(official.REGENERATED, "tgif", {"train": 2, "val": 2, "test": 3})
    table = official.check_data(changed(tiny_run, edition=2026, tasks=["B"])).table
    found = table[table["class"].eq("positive, fr")].set_index(["layout", "split"])[["found", "missing"]]
    assert found.loc[("tgif", "train")].tolist() == [2, 0] and found.loc[("tgif", "test")].tolist() == [2, 1]
    assert found.loc[("task_b_validation", "val")].tolist() == [0, 3_169]
    assert "positive, fr" not in set(official.check_data(tiny_run).table["class"])


@pytest.mark.parametrize("task", [None, "B"])
def test_published_counts_hold_for_the_official_set_alone(task, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(official.EXPECTED, "own", {("val", 0): 4, ("val", 1): 4})
    for number, split, name in ((0, "train", "0_real"), (1, "train", "1_fake"), (2, "val", "0_real")):
        folder = tmp_path / "second" / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (number, 90, 9)).save(folder / "a.png")
    entries = [{"root": str(tiny_run.data / "dataset")}, {"root": str(tmp_path / "second")}]
    entries = [entry | {"task": task, "layout": "own"} for entry in entries]
    run = with_data(tiny_run, *entries, run_type="open", tasks=[task or "A"])
    table = official.check_data(run).table
    own = table[table["layout"] == "own"].set_index("set")
    assert own.loc[str(tmp_path / "second"), "expected"].isna().all()
    assert own["missing"].eq(0).all()
    assert own.loc[str(tiny_run.data / "dataset"), "expected"].notna().any() == (task is None)


def test_check_data_of_nothing_names_every_set(tmp_path, capsys):
    assert main(["check-data", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for part in ("58560", "8184", "6212", "3227", "5000", "10000", str(tmp_path / "test" / "taskB")):
        assert part in said


@pytest.mark.slow
def test_official_tgif_and_validation_are_complete_by_count(official_tree, tmp_path):
    lines, _ = official._check_set(DataSet(root=str(official_tree / "TGIF"), layout="tgif"), official.EXPECTED["tgif"], True)
    sizes = {*official.EXPECTED["tgif"].values(), *official.REGENERATED["tgif"].values()}
    assert {line["found"] for line in lines} == sizes and not any(line["missing"] for line in lines)
    published = official.EXPECTED["task_b_validation"]
    lines, _ = official._check_set(DataSet(root=str(official_tree / "val"), layout="task_b_validation"), published, True)
    assert [(line["found"], line["missing"]) for line in lines] == [(3_227, 0), (6_212, 0), (3_169, 0)]


@pytest.fixture(scope="module")
def official_tree(tmp_path_factory) -> Path:
    """TGIF and the Task B validation set as empty files under all their official names."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"the official tables are not at {OFFICIAL} (FORENSICS_CORPUS)")
    root = tmp_path_factory.mktemp("official")
    touch(root / "TGIF", *(name for split in ("training", "validation", "testing") for name in _names_in_tgif(split)))
    table = (OFFICIAL / "taskB_val.csv").read_bytes()
    touch(root / "val", "taskB_val.csv")
    (root / "val" / "taskB_val.csv").write_bytes(table)
    originals = {line["src_path"] for line in csv.DictReader(table.decode().splitlines())}
    touch(root / "val", *(name.replace("\\", "/").removeprefix("sagid/val/") for name in originals))
    return root


def _names_in_tgif(split: str) -> Iterator[str]:
    def lines(table: str) -> list[dict[str, str]]:
        with (OFFICIAL / "tgif" / f"{table}_{split}.csv").open() as file:
            return list(csv.DictReader(file))

    for item in lines("orig"):
        yield from (f"orig/{split}/{item['category']}/{item['image_id']}_orig{size}.png" for size in ("", "_512", "_1024"))
    for table, (folder, image, mask) in TGIF_OFFICIAL.items():
        for item in lines(table.removesuffix("-fr")):
            values = {"i": item["image_id"], "m": item["mask_variation"], "v": item["gen_variation_id"]}
            yield f"{folder}/{split}/{item['category']}/{image.format(**values)}"
            yield f"masks/{split}/{item['category']}/{mask.format(**values)}"


@pytest.mark.slow
def test_official_tgif_counts_masks_and_groups(official_tree):
    rows = records(read_tgif(official_tree / "TGIF"))
    fakes = [row for row in rows if row["label"]]
    assert len(fakes) == 74_976
    assert tally(fakes, "split") == {("train",): 4 * 14_640, ("val",): 4 * 2_046, ("test",): 4 * 2_058}
    assert tally(fakes, "kind") == {("sp",): 37_488, ("fr",): 37_488}
    assert tally(fakes, "method") == {(method,): 18_744 for method in ("sd2-sp", "ps-sp", "sd2-fr", "sdxl-fr")}
    masks = {row["mask_path"] for row in fakes}
    assert len(masks) == 3 * 6_248
    assert all(Path(mask).is_file() for mask in masks)
    assert len(rows) - len(fakes) == 3 * 3_124


@pytest.mark.slow
def test_official_overlap_of_tgif_and_task_b_validation(official_tree):
    tgif = read_tgif(official_tree / "TGIF").table()
    validation = read_task_b_validation(official_tree / "val").table()
    assert (len(validation), int(validation["label"].sum())) == (3_227 + 6_212, 6_212)
    both = pd.concat([tgif.assign(data_set="TGIF"), validation.assign(data_set="val")])
    shared = shared_photographs(both).set_index(["one", "other"])["photographs"]
    assert [shared[f"TGIF {split}", "val val"] for split in ("train", "val", "test")] == [597, 126, 142]
    ours = both[both["data_set"] == "val"]
    assert ours.loc[overlapping(both)[both["data_set"] == "val"], "group"].nunique() == 865
    tgif["split"] = "tgif " + tgif["split"]
    both = groups_across_splits(pd.concat([tgif, validation]).assign(error=np.nan))
    shared = both[both["val"] > 0]
    assert len(shared) == 865
    assert {split: int((shared[f"tgif {split}"] > 0).sum()) for split in ("train", "val", "test")} == {
        "train": 597,
        "val": 126,
        "test": 142,
    }


def test_check_data_says_what_is_not_read(tiny_run, capsys):
    touch(tiny_run.data / "dataset", "holdout2/0_real/1.png")
    official.check_data(tiny_run)
    assert f"not read: {tiny_run.data / 'dataset' / 'holdout2'}" in capsys.readouterr().out
