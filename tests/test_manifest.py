from pathlib import Path

import pytest

from forensics_lib.layouts import LayoutError
from forensics_lib.manifest import build_manifest, build_test_manifest, overview, problems, usable


def test_file_facts_come_from_the_headers(tiny_run):
    manifest = build_manifest(tiny_run, "A")
    assert manifest[["width", "height"]].drop_duplicates().to_numpy().tolist() == [[56, 48]]
    assert set(manifest["format"]) == {"PNG"}
    assert problems(manifest).empty


def test_bad_files_are_listed_and_left_out_but_not_lost(tiny_run):
    broken = tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png"
    broken.write_bytes(b"not an image")
    manifest = build_manifest(tiny_run, "A")
    assert len(manifest) == 20
    assert len(usable(manifest, "train")) == 11
    assert problems(manifest)["path"].tolist() == [str(broken)]


def test_a_missing_mask_is_a_problem_with_its_name(tiny_run):
    mask = next((tiny_run.data / "dataset_taskB" / "TGIF" / "masks" / "training").rglob("*_512.png"))
    mask.unlink()
    assert mask.name in problems(build_manifest(tiny_run, "B"))["error"].item()


def test_a_fake_with_a_name_that_is_not_tgifs(tiny_run):
    fake = next((tiny_run.data / "dataset_taskB" / "TGIF" / "sd2-sp" / "training").rglob("*.png"))
    fake.rename(fake.with_name("renamed.png"))
    assert "renamed.png" in problems(build_manifest(tiny_run, "B"))["error"].item()


def test_a_missing_class_is_an_error(tiny_run):
    for path in (tiny_run.data / "dataset" / "val" / "0_real" / "src").iterdir():
        path.write_bytes(b"")
    with pytest.raises(LayoutError, match=r"no usable authentic \(0\) images in val \(4 found"):
        build_manifest(tiny_run, "A")


def test_unreadable_test_images_are_kept(tiny_run):
    (tiny_run.test_folder("A") / "broken.jpg").write_bytes(b"")
    table = build_test_manifest(tiny_run, "A")
    assert [Path(path).name for path in table["path"]] == ["a0.jpg", "a1.jpg", "a2.jpg", "a3.jpg", "broken.jpg"]
    assert table["error"].notna().sum() == 1


def test_open_runs_read_the_open_folder_and_constrained_runs_do_not(tiny_run, rng):
    from conftest import picture, save

    for label in ("0_real", "1_fake"):
        save(tiny_run.data / "dataset_open" / "train" / label / "more" / "x.png", picture(rng))
    assert "more" not in set(build_manifest(tiny_run, "A")["source"])
    opened = type(tiny_run)(tiny_run.params.model_copy(update={"run_type": "open"}), tiny_run.data)
    assert "more" in set(build_manifest(opened, "A")["source"])


def test_overview_counts_every_image(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    assert overview(manifest)["images"].sum() == len(manifest)
