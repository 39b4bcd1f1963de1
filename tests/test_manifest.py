import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture, save, square_mask

from forensics_lib import facts, images
from forensics_lib.disk import Looks, look
from forensics_lib.files import home
from forensics_lib.layouts import LayoutError
from forensics_lib.manifest import build_manifest, build_test_manifest, overview, problems, taken_for, usable
from forensics_lib.params import DataSet
from forensics_lib.runs import Run


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
    for label in ("0_real", "1_fake"):
        save(tiny_run.data / "dataset_open" / "train" / label / "more" / "x.png", picture(rng))
    assert "more" not in set(build_manifest(tiny_run, "A")["source"])
    opened = type(tiny_run)(tiny_run.params.model_copy(update={"run_type": "open"}), tiny_run.data)
    assert "more" in set(build_manifest(opened, "A")["source"])


def test_overview_counts_every_image(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    assert overview(manifest)["images"].sum() == len(manifest)


def test_a_mask_of_another_size_is_a_problem_with_both_sizes(tiny_run):
    mask = next((tiny_run.data / "dataset_taskB" / "TGIF" / "masks" / "training").rglob("*_512.png"))
    save(mask, square_mask(30, 20))
    assert "is of 40 x 40 pixels, its mask" in problems(build_manifest(tiny_run, "B"))["error"].item()
    assert "of 20 x 30" in problems(build_manifest(tiny_run, "B"))["error"].item()


def test_a_truncated_file_is_found_without_decoding_the_others(tiny_run, monkeypatch, rng):
    folder = tiny_run.data / "dataset" / "train" / "1_fake" / "src"
    whole = save(folder / "whole.jpg", picture(rng)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-40])
    (folder / "trailing.jpg").write_bytes(whole + bytes(100))  # cameras append things: no fault
    png = save(folder / "whole.png", picture(rng)).read_bytes()
    (folder / "cut.png").write_bytes(png[:-40])
    found = problems(build_manifest(tiny_run, "A"))
    assert [Path(path).name for path in found["path"]] == ["cut.jpg", "cut.png"]
    assert found["error"].str.contains("truncated").all()


def test_one_file_in_both_classes_is_used_in_neither(tiny_run):
    fake = tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png"
    link = tiny_run.data / "dataset" / "train" / "0_real" / "src" / "link.png"
    link.symlink_to(fake)
    found = problems(build_manifest(tiny_run, "A"))
    assert sorted(found["path"]) == sorted([str(fake), str(link)])
    assert found["error"].str.contains("listed as authentic and as synthetic").all()


def test_what_is_passed_over_is_said(tiny_run, capsys):
    folder = tiny_run.data / "dataset" / "train" / "1_fake" / "src"
    (folder / "noending").write_bytes((folder / "1_fake0.png").read_bytes())
    (folder / "notes.txt").write_text("x")
    manifest = build_manifest(tiny_run, "A")
    (note,) = manifest.attrs["notes"]
    assert note in capsys.readouterr().out
    assert note.startswith("2 file(s) without an image's ending") and "no ending 1" in note and ".txt 1" in note
    assert str(folder / "noending") in note and str(folder / "notes.txt") in note


def test_an_unreadable_folder_is_said_and_the_rest_is_read(tiny_run, monkeypatch):
    closed = tiny_run.data / "dataset" / "train" / "1_fake" / "closed"
    save(closed / "x.png", square_mask(48, 56))
    listdir = os.listdir

    def refuse(place):
        if str(place) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return listdir(place)

    monkeypatch.setattr(os, "listdir", refuse)
    manifest = build_manifest(tiny_run, "A")
    assert len(manifest) == 20
    assert f"{closed} (Permission denied)" in manifest.attrs["notes"][0]


def test_very_long_and_unicode_names(tiny_run, rng):
    folder = tiny_run.data / "dataset" / "train" / "1_fake" / "src"
    names = ["x" * 251 + ".png", "фото 写真 é.png", "-dash.png", "new\nline.png", "#hash=1.png", "a'b\".png"]
    for name in names:
        save(folder / name, picture(rng))
    manifest = build_manifest(tiny_run, "A")
    assert problems(manifest).empty
    assert set(names) <= {Path(path).name for path in manifest["path"]}


def test_facts_are_kept_and_read_again_only_where_a_file_changed(tiny_run, monkeypatch, rng):
    first = build_manifest(tiny_run, "A")
    read = []
    known = facts.facts_of
    monkeypatch.setattr(facts, "facts_of", lambda paths: read.extend(paths) or known(paths))
    pd.testing.assert_frame_equal(build_manifest(tiny_run, "A"), first)
    assert read == []
    folder = tiny_run.data / "dataset" / "train" / "1_fake" / "src"
    changed, new, gone = folder / "1_fake0.png", folder / "0_new.png", folder / "1_fake1.png"
    save(changed, picture(rng, 20, 30))
    save(new, picture(rng, 10, 12))
    gone.unlink()
    second = build_manifest(tiny_run, "A").set_index("path")
    assert sorted(read) == sorted([str(changed), str(new)])
    assert second.loc[[str(changed), str(new)], "width"].tolist() == [30, 12]
    assert str(gone) not in second.index
    kept = first.set_index("path").drop([str(changed), str(gone)])
    pd.testing.assert_frame_equal(second.loc[kept.index], kept)


@pytest.mark.parametrize("content", [b"", b"not parquet"])
def test_a_broken_cache_is_made_anew(tiny_run, content):
    first = build_manifest(tiny_run, "A")
    for path in (home() / "outputs" / ".cache").glob("*.parquet"):
        path.write_bytes(content)
    pd.testing.assert_frame_equal(build_manifest(tiny_run, "A"), first)


def test_many_files_are_looked_at_in_other_processes_with_the_same_answers(tmp_path, rng, monkeypatch):
    save(tmp_path / "0.png", picture(rng))
    paths = [str(tmp_path / "0.png")]
    for number in range(1, 2100):
        paths.append(str(tmp_path / f"{number}.png"))
        os.link(paths[0], paths[-1])
    looks = Looks()
    looks.ask(paths)
    assert looks._asked
    mixed = [str(tmp_path / "missing.png"), *paths, str(tmp_path)]
    np.testing.assert_array_equal(looks.at(mixed), look(mixed))
    monkeypatch.setattr(facts, "_HEADERS", 500)  # headers are read by the same processes
    found = facts.file_facts(mixed, tmp_path / "cache.parquet", looks)
    assert (found["width"] == 56).sum() == 2100 and found["error"].notna().sum() == 2


def test_a_file_that_failed_is_read_again_when_its_cause_is_gone(tiny_run, monkeypatch):
    """A forbidden file keeps its size and time when it is allowed again."""
    known = images.Image.open
    name = str(tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png")

    def refuse(source, **options):
        if source == name:
            raise PermissionError(13, "Permission denied", name)
        return known(source, **options)

    monkeypatch.setattr(images.Image, "open", refuse)
    assert "Permission denied" in problems(build_manifest(tiny_run, "A"))["error"].item()
    monkeypatch.setattr(images.Image, "open", known)
    assert problems(build_manifest(tiny_run, "A")).empty


def test_a_table_that_names_a_file_twice_is_read_from_the_cache_too(tiny_run, tmp_path):
    folder = tiny_run.data / "dataset"
    lines = [f"{path},{int('1_fake' in str(path))},{path.parts[-4]}" for path in sorted(folder.rglob("*.png"))]
    table = tmp_path / "t.csv"
    params = tiny_run.params.model_copy(update={"data": [DataSet(root=str(table))], "run_type": "open"})
    for more in ([lines[0]], [lines[0], lines[1]], []):
        table.write_text("\n".join(["path,label,split", *lines, *more]))
        manifest = build_manifest(Run(params, tiny_run.data), "A")
        assert len(manifest) == len(lines) + len(more)
        assert manifest["error"].isna().sum() == len(lines)


def with_sets(run: Run, *entries: dict, **values) -> Run:
    return Run(run.params.model_copy(update={"data": [DataSet(**entry) for entry in entries]} | values), run.data)


def places(run: Run, split: str) -> Path:
    return run.data / "dataset" / split / "0_real"


def hard_link(run: Run) -> None:
    os.link(places(run, "train") / "src" / "0_real0.png", places(run, "val") / "src" / "again.png")


def file_link(run: Run) -> None:
    (places(run, "val") / "src" / "again.png").symlink_to(places(run, "train") / "src" / "0_real0.png")


def folder_link(run: Run) -> None:
    (places(run, "val") / "again").symlink_to(places(run, "train") / "src")


@pytest.mark.parametrize(("link", "count"), [(hard_link, 1), (file_link, 1), (folder_link, 6)])
def test_an_image_that_trains_does_not_validate(tiny_run, capsys, link, count):
    link(tiny_run)
    manifest = build_manifest(tiny_run, "A")
    found = problems(manifest)
    assert set(found["split"]) == {"val"} and len(found) == count
    assert found["error"].str.contains("the same image as .*/train/.*trained on").all()
    assert len(usable(manifest, "train")) == 12 and len(usable(manifest, "val")) == 8
    (note,) = manifest.attrs["notes"]
    assert note.startswith(f"{count} image(s) of {tiny_run.data / 'dataset'} (val)") and note in capsys.readouterr().out
    assert problems(manifest, repeats=False).empty


def test_an_image_that_validates_is_not_held_out(tiny_run):
    (tiny_run.data / "dataset" / "test").symlink_to(tiny_run.data / "dataset" / "val")
    manifest = build_manifest(tiny_run, "A")
    assert set(problems(manifest)["split"]) == {"test"} and len(usable(manifest, "val")) == 8
    assert usable(manifest, "test").empty


def table_of(run: Run, path: Path, split: str, as_split: str) -> dict:
    images = sorted((run.data / "dataset" / split).rglob("*.png"))
    lines = [f"{image},{int('1_fake' in str(image))},{as_split}" for image in images]
    path.write_text("\n".join(["path,label,split", *lines]))
    return {"root": str(path)}


def test_sets_that_share_images(tiny_run, tmp_path):
    own = {"root": str(tiny_run.data / "dataset")}
    (tmp_path / "other").symlink_to(tiny_run.data / "dataset")
    again = table_of(tiny_run, tmp_path / "again.csv", "train", "train")
    validating = table_of(tiny_run, tmp_path / "validating.csv", "train", "val")
    for more in ([own], [{"root": str(tmp_path / "other")}], [again], [again, again], [validating]):
        sets = with_sets(tiny_run, own, *more, run_type="open")
        manifest = build_manifest(sets, "A")
        assert len(usable(manifest, "train")) == 12 and len(usable(manifest, "val")) == 8, more
    manifest = build_manifest(with_sets(tiny_run, validating, own, run_type="open"), "A")
    assert set(manifest.loc[manifest["error"].notna(), "data_set"]) == {validating["root"]}, "whichever comes first"


def test_one_root_under_two_layouts(tiny_run, tmp_path):
    root = str(tiny_run.data / "dataset")
    sets = with_sets(tiny_run, {"root": root}, {"root": root, "layout": "folders"}, run_type="open")
    manifest = build_manifest(sets, "A")
    assert manifest.loc[manifest["error"].isna(), "layout"].unique().tolist() == ["own"]
    assert manifest["error"].isna().sum() == 20 and len(manifest) == 40


def test_an_image_that_cannot_train_still_validates(tiny_run):
    """Its mask is wrong where it would train."""
    folder = tiny_run.data / "dataset_taskB" / "TGIF"
    image = next((folder / "sd2-fr" / "training").rglob("*.png"))
    again = folder / "sd2-fr" / "validation" / "cat" / image.name
    os.link(image, again)
    mask = next((folder / "masks" / "training").rglob(f"{image.name.split('_')[0]}_mask_bbox_512.png"))
    os.link(mask, folder / "masks" / "validation" / "cat" / mask.name)
    mask.unlink()
    assert problems(build_manifest(tiny_run, "B"))["path"].tolist() == [str(image)]


def test_the_example_of_the_readme_does_not_validate_on_what_it_trains_on(tiny_run, tmp_path, rng):
    for label in ("0_real", "1_fake"):
        for split, number in (("train", 1), ("val", 2)):
            save(tmp_path / f"progan_{split}" / "cat" / label / f"{number}.png", picture(rng))
    for split in ("train", "valid"):
        save(tmp_path / "ldm" / split / "latent_diffusion_class2image" / "1.png", picture(rng))
        (tmp_path / "ldm" / split / "real_lsun.txt").write_text("cat_1.png\n")
    corvi = {"root": str(tmp_path / "ldm"), "lsun_root": str(tmp_path / "progan_train")}
    sets = {"root": str(tmp_path / "progan_train")}, corvi, {"root": str(tmp_path / "progan_val")}
    manifest = build_manifest(with_sets(tiny_run, *sets), "A")
    photo = str(tmp_path / "progan_train" / "cat" / "0_real" / "1.png")
    assert manifest.loc[manifest["path"].eq(photo) & manifest["error"].isna(), "split"].tolist() == ["train"]
    assert problems(manifest)[["split", "path"]].to_numpy().tolist() == [["train", photo], ["val", photo]]


def test_members_of_parquet_files_are_images_of_their_own(tiny_run, tmp_path, rng):
    from test_readers import hub_file

    hub_file(tmp_path / "hub" / "train-0.parquet", rng, names=None, labels=[0, 1, 1])
    os.link(tmp_path / "hub" / "train-0.parquet", tmp_path / "hub" / "validation-0.parquet")
    own = {"root": str(tiny_run.data / "dataset")}
    manifest = build_manifest(with_sets(tiny_run, own, {"root": str(tmp_path / "hub")}, run_type="open"), "A")
    members = manifest[manifest["layout"] == "parquet"]
    assert members.groupby("split")["error"].count().to_dict() == {"train": 0, "val": 3}


def test_what_every_set_was_taken_for(tiny_run):
    hard_link(tiny_run)
    found = taken_for(build_manifest(tiny_run, "A")).set_index(["layout", "split", "class"])
    assert found.loc[("own", "val", "authentic"), ["images", "left out"]].tolist() == [5, 1]
    assert found["images"].sum() == 21 and set(found["set"]) == {str(tiny_run.data / "dataset")}
