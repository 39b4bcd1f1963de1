import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import changed, hub_file, picture, save, square_mask

from forensics_lib.data import headers as facts
from forensics_lib.data.audit import audit
from forensics_lib.data.headers import Looks, look
from forensics_lib.data.manifest import (
    apportioned,
    build_manifest,
    build_test_manifest,
    deciding,
    deciding_first,
    indexed,
    overview,
    problems,
    sampled,
    taken_for,
    usable,
)
from forensics_lib.data.rows import LayoutError, Rows
from forensics_lib.images import io as images
from forensics_lib.params import DataSet
from forensics_lib.run import Run
from forensics_lib.utils.files import home


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
    found = facts.read_headers(mixed, tmp_path / "cache.parquet", looks)
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


def reasons_of(run: Run, task: str) -> str:
    with pytest.raises(LayoutError) as refused:
        build_manifest(run, task)
    return str(refused.value)


def test_a_class_that_cannot_be_used_says_why_with_counts_and_first_files(tiny_run):
    folder = tiny_run.data / "dataset" / "val" / "0_real" / "src"
    for number in range(2):
        (folder / f"0_real{number}.png").write_bytes(b"nothing")
    (folder / "0_real2.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (folder / "0_real3.png").unlink()
    for number in range(3, 9):
        (folder / f"0_real{number}.png").symlink_to(f"/mnt/none/{number}.png")
    said = reasons_of(tiny_run, "A")
    assert "no usable authentic (0) images in val (9 found that cannot be used)" in said
    lines = [line.strip() for line in said.splitlines()]
    assert lines[1].startswith(f"6: {folder}/0_real3.png: ") and "is its disk mounted?" in lines[1]
    assert lines[2] == f"2: {folder}/0_real0.png: not an image that Pillow can read"
    assert lines[3].startswith(f"1: {folder}/0_real2.png: a git-lfs pointer") and "git lfs pull" in lines[3]
    assert "train authentic 6, train positive 6, val authentic 9, val positive 4" in said


def test_masks_that_are_all_missing_are_one_reason(tiny_run):
    for mask in (tiny_run.data / "dataset_taskB" / "validation").rglob("*_mask.png"):
        mask.unlink()
    for folder in ("sd2-sp", "sd2-fr"):
        for path in (tiny_run.data / "dataset_taskB" / "TGIF" / folder / "validation").rglob("*.png"):
            path.unlink()
    said = reasons_of(tiny_run, "B")
    assert "no usable synthetic or manipulated (1) images in val (2 found that cannot be used)\n  2: " in said


def test_a_class_of_which_nothing_is_there_says_what_was_read(tiny_run):
    for path in (tiny_run.data / "dataset" / "val").rglob("*.png"):
        path.unlink()
    said = reasons_of(tiny_run, "A")
    assert said.count("(0 found that cannot be used)") == 2, "all that is lacking is said at once"
    assert "Read: train authentic 6, train positive 6, from" in said and "data/README.md" in said


LATIN = os.fsdecode(b"caf\xe9")  # as an archive made on Windows leaves it


def test_names_that_are_not_utf8_are_listed_and_left_out(tiny_run, rng, capsys):
    folder = tiny_run.data / "dataset" / "train" / "1_fake"
    save(folder / "src" / "0_plain.png", picture(rng)).rename(folder / "src" / f"{LATIN}.png")
    save(folder / "odd" / "x.png", picture(rng))
    save(folder / "odd" / "deeper" / "é.png", picture(rng))
    (folder / "odd").rename(folder / LATIN)
    (folder / "src" / f"{LATIN}.txt").write_text("x")
    for _ in range(2):  # the second time from the cache
        manifest = build_manifest(tiny_run, "A")
        found = problems(manifest)
        names = [f"{folder}/caf\\xe9/x.png", f"{folder}/caf\\xe9/deeper/é.png", f"{folder}/src/caf\\xe9.png"]
        assert sorted(found["path"]) == sorted(names)
        assert found["error"].str.contains("its name is not UTF-8").all() and found["error"].str.contains("convmv").all()
        assert len(usable(manifest, "train")) == 12
    capsys.readouterr().out.encode("utf-8")
    assert "src/caf\\xe9.txt" in manifest.attrs["notes"][0]
    for text in (found.to_csv(), json.dumps(manifest.attrs["notes"]), str(manifest["source"].unique())):
        text.encode("utf-8")
    assert audit(tiny_run, "A", manifest).findings["finding"].str.contains("left out").any()
    assert {"caf\\xe9"} <= set(manifest["source"])


def test_masks_and_tgif_folders_that_are_not_utf8(tiny_run):
    tgif = tiny_run.data / "dataset_taskB" / "TGIF"
    for place in (tgif / "sd2-sp" / "training", tgif / "masks" / "training"):
        (place / "cat").rename(place / LATIN)
    found = problems(indexed(DataSet(root=str(tgif), layout="tgif")))
    folders = found["path"].str.split("/").str[-2]
    assert found.loc[folders == "caf\\xe9", "error"].str.contains("its name is not UTF-8").tolist() == [True, True]
    assert found.loc[folders == "cat", "error"].str.contains("its mask .*/cat/.*: no such file").tolist() == [True, True]


def test_test_images_that_no_submission_can_name_are_told_before_inference(tiny_run, rng, capsys):
    folder = tiny_run.test_folder("A")
    for number in range(2):
        save(folder / "plain.jpg", picture(rng)).rename(folder / f"{LATIN}{number}.jpg")
    with pytest.raises(LayoutError, match=r"2 test image\(s\) cannot be named .*caf\\xe90\.jpg, caf\\xe91\.jpg.*convmv"):
        build_test_manifest(tiny_run, "A")
    for number in range(2):
        (folder / f"{LATIN}{number}.jpg").unlink()
    save(folder / "deeper" / "x.jpg", picture(rng))
    (folder / "deeper").rename(folder / LATIN)
    (folder / f"{LATIN}.txt").write_text("no image")
    assert len(build_test_manifest(tiny_run, "A")) == 4
    assert "caf\\xe9" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["back\\slash.jpg", "carriage\rreturn.jpg"])
def test_test_images_whose_names_archives_or_tables_would_change_are_told_before_inference(tiny_run, rng, name):
    save(tiny_run.test_folder("A") / "plain.jpg", picture(rng)).rename(tiny_run.test_folder("A") / name)
    with pytest.raises(LayoutError, match=r"1 test image\(s\) with a backslash or carriage return in their names"):
        build_test_manifest(tiny_run, "A")


def test_a_test_folder_that_is_a_broken_link(tiny_run, tmp_path):
    tiny_run.test_folder("A").rename(tmp_path / "moved")
    tiny_run.test_folder("A").symlink_to("/mnt/none")
    with pytest.raises(LayoutError, match="taskA is a link to /mnt/none, which is not there: is its disk mounted"):
        build_test_manifest(tiny_run, "A")


def test_a_readers_own_paths_that_are_not_utf8():
    rows = Rows()
    paths = [f"/data/{LATIN}.png", "/data/b.png"]
    rows.add(paths, 1, "train", "mine", kind="sp", groups=[LATIN, None], masks=[f"/masks/{LATIN}.png", None])
    table = rows.table()
    assert table["path"].tolist() == rows.paths == ["/data/caf\\xe9.png", "/data/b.png"]
    assert table["group"].tolist() == ["caf\\xe9", "/data/b.png"]
    assert table["mask_path"].tolist()[0] == "/masks/caf\\xe9.png"


def listed(
    *groups: tuple[int, str, int], layout: str = "own", data_set: str = "elsewhere", kind: str | None = None
) -> pd.DataFrame:
    """Rows of (label, source, images)."""
    rows = [(label, source) for label, source, count in groups for _ in range(count)]
    table = pd.DataFrame(rows, columns=["label", "source"]).assign(layout=layout, data_set=data_set, kind=kind)
    return table.assign(path=[f"{data_set}/{number}.png" for number in range(len(table))])


def test_a_sample_of_thousands_of_small_sources_has_its_size_and_both_classes():
    rows = listed((0, "photos", 10_000), *((1, f"generator{number}", 5) for number in range(4_800)))
    drawn = sampled(rows, 2_000, seed=2**40 + 1)
    assert len(drawn) == 2_000 and drawn["path"].is_unique
    assert drawn["label"].value_counts().to_dict() == {1: 1412, 0: 588}
    assert drawn.loc[drawn["label"] == 1, "source"].nunique() == 1412, "no source gets a second image before others have one"
    pd.testing.assert_frame_equal(drawn, sampled(rows, 2_000, seed=2**40 + 1))
    assert not drawn.equals(sampled(rows, 2_000, seed=2**40 + 2))


@pytest.mark.parametrize("seed", range(40))
def test_a_sample_has_exactly_its_size_every_class_and_every_source_that_fits(seed):
    rng = np.random.default_rng(seed)
    rows = listed(*((int(rng.integers(2)), f"s{number}", int(rng.integers(1, 60))) for number in range(rng.integers(1, 30))))
    limit = int(rng.integers(2, len(rows) + 5))
    drawn = sampled(rows, limit, int(rng.integers(2**62)))
    assert len(drawn) == min(limit, len(rows)) and drawn["path"].is_unique
    assert drawn["label"].nunique() == rows["label"].nunique()
    for label, part in rows.groupby("label"):
        got, share = drawn[drawn["label"] == label], len(part) * len(drawn) / len(rows)
        assert abs(len(got) - max(1, share)) <= 1
        assert got["source"].nunique() == part["source"].nunique() or len(got) < part["source"].nunique()


def test_sources_that_are_large_enough_have_their_shares_by_largest_remainder():
    rows = listed((0, "a", 100), (0, "b", 300), (1, "c", 400))
    assert sampled(rows, 80, 0)["source"].value_counts().to_dict() == {"c": 40, "b": 30, "a": 10}
    assert apportioned(np.array([1, 10_000]), 10, np.random.default_rng(0)).tolist() == [1, 9]
    assert apportioned(np.array([3, 3, 3]), 9, np.random.default_rng(0)).tolist() == [3, 3, 3]
    assert apportioned(np.array([5, 5]), 0, np.random.default_rng(0)).tolist() == [0, 0]
    assert len(sampled(rows.assign(source=None), 10, 0)) == 10, "a source that a reader does not tell"


TRAINED = listed((0, "lsun", 50), (1, "progan", 50))
OFFICIAL = {"A": {"layout": "itw_sm"}, "B": {"layout": "task_b_validation"}}


@pytest.mark.parametrize("task", ["A", "B"])
def test_the_official_validation_set_decides_where_it_is_there(tiny_run, task):
    seen, unseen = listed((0, "lsun", 30), (1, "progan", 30)), listed((0, "other", 30), (1, "sdxl", 30))
    official = listed((0, "web", 12), (1, "web", 15), **OFFICIAL[task])
    rows = pd.concat([seen, official, unseen], ignore_index=True)
    decides, rule = deciding(tiny_run, task, rows, TRAINED)
    assert decides.tolist() == [False] * 60 + [True] * 27 + [False] * 60 and "official validation set" in rule
    decides, rule = deciding(tiny_run, task, rows[rows["layout"] == "own"], TRAINED)
    assert decides.tolist() == [False] * 60 + [True] * 60 and rule == "sources that training lacks"
    decides, rule = deciding(tiny_run, task, seen, TRAINED)
    assert decides.all() and rule == "all validation images"


def test_the_data_roots_own_validation_is_the_official_one(tiny_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own = listed((0, "dataset", 20), (1, "progan", 20), data_set="data/dataset")  # as a parameter names it
    opened = listed((0, "other", 20), (1, "sdxl", 20), data_set=str(tiny_run.data / "dataset_open"))
    rows = pd.concat([own, opened], ignore_index=True)
    decides, rule = deciding(tiny_run, "A", rows, TRAINED)
    assert decides.tolist() == [True] * 40 + [False] * 40 and "dataset/val" in rule
    mixed = pd.concat([own, listed((0, "itw", 20), (1, "itw", 20), data_set="data/dataset"), opened], ignore_index=True)
    decides, rule = deciding(tiny_run, "A", mixed, pd.concat([TRAINED, listed((0, "dataset", 5))]))
    assert mixed.loc[decides, "source"].unique().tolist() == ["itw"] and "sources that training lacks" in rule


def test_itw_sm_decides_also_through_a_link_or_a_table(tiny_run, tmp_path):
    folder = tmp_path / "ITW-SM" / "0_real"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    rows = listed((0, "x", 20), (1, "x", 20), (0, "y", 20), (1, "y", 20), layout="table")
    rows.loc[rows["source"] == "y", "path"] = [f"{tmp_path}/link/{number}.jpg" for number in range(40)]
    decides, rule = deciding(tiny_run, "A", rows, TRAINED)
    assert rows.loc[decides, "source"].unique().tolist() == ["y"] and "ITW-SM" in rule


@pytest.mark.parametrize(("authentic", "positive"), [(0, 30), (3, 30), (9, 9)])
def test_too_few_official_images_leave_the_choice_to_the_next_rule_and_it_is_said(tiny_run, authentic, positive):
    official = listed((0, "web", authentic), (1, "web", positive), layout="task_b_validation")
    rows = pd.concat([official, listed((0, "lsun", 30), (1, "progan", 30))], ignore_index=True)
    decides, rule = deciding(tiny_run, "B", rows, TRAINED)
    assert decides.all()
    assert f"too few of the official validation set: {authentic} authentic, {positive} positive" in rule


@pytest.mark.parametrize(
    ("values", "official", "kinds", "said"),
    [
        ({}, "fr", {"fr", "sp"}, "the official validation set"),
        ({"edition": 2026}, "fr", {"fr"}, "the official validation set, fr alone"),
        ({"edition": 2026}, "sp", {"fr"}, "sources that training lacks, fr alone; too few of the official validation set"),
        ({"edition": 2026, "kind": "both"}, "fr", {"fr", "sp"}, "the official validation set"),
        ({"kind": "sp"}, "fr", {"sp"}, "the official validation set, sp alone"),
    ],
)
def test_the_kind_asked_for_decides(tiny_run, values, official, kinds, said):
    of_kind = [listed((0, "web", 12), (1, "web", 12), kind=kind, layout="task_b_validation") for kind in ("sp", official)]
    rows = pd.concat([*of_kind, listed((0, "x", 12), (1, "x", 12), kind="fr")], ignore_index=True)
    decides, rule = deciding(changed(tiny_run, **values), "B", rows, TRAINED)
    assert set(rows.loc[decides & rows["label"].eq(1), "kind"]) == kinds and rule.startswith(said)
    assert rows["label"][decides].eq(0).any()


def test_where_all_are_few_the_first_rule_with_both_classes_decides(tiny_run):
    rows = pd.concat([listed((0, "web", 2), (1, "web", 1), layout="itw_sm"), listed((0, "lsun", 5), (1, "progan", 7))])
    assert deciding(tiny_run, "A", rows, TRAINED)[0].sum() == 3


def test_epochs_are_judged_on_deciding_images_before_others():
    rows = listed((0, "a", 50), (1, "a", 50), (0, "b", 50), (1, "b", 50))
    decides = rows["source"].eq("b").to_numpy()
    assert deciding_first(rows, decides, 60, 0)["source"].unique().tolist() == ["b"]
    drawn = deciding_first(rows, decides, 130, 0)["source"].value_counts()
    assert drawn.to_dict() == {"b": 100, "a": 30}


def with_sets(run: Run, *entries: dict, **values) -> Run:
    return changed(run, **{"data": [DataSet(**entry) for entry in entries]} | values)


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
