import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import beside, records, wait_until
from PIL import Image

from forensics_lib.data.layouts import read_task_a, read_task_b_validation, read_test, read_tgif
from forensics_lib.synthesis import sample
from forensics_lib.synthesis.sample import PHOTOS, build_sample, load_photo


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.mark.slow
def test_the_sample_is_in_the_official_layout_and_the_same_every_time(small_sample, tmp_path):
    one, two = build_sample(tmp_path / "one"), build_sample(tmp_path / "two")
    assert digest(one) == digest(two)
    folder = one / "dataset_taskB"
    rows = records(read_tgif(folder / "TGIF")) + records(read_task_b_validation(folder / "validation"))
    for row in rows:
        if row["label"]:
            with Image.open(row["path"]) as image, Image.open(row["mask_path"]) as mask:
                assert image.size == mask.size
                assert np.asarray(mask).max() == 255
    task_a = records(read_task_a(one / "dataset")) + records(read_task_a(one / "dataset_open"))
    assert {Path(row["path"]).suffix for row in task_a} == {".jpg"}, "both classes in one format"
    assert len(read_test(one / "test" / "taskA")) == 8
    assert len(read_test(one / "test" / "taskB")) == 4
    splits = {}
    for row in task_a:
        splits.setdefault(Path(row["path"]).name.rsplit("_", 1)[0], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values()), "no photograph crosses a split"


def test_a_finished_sample_is_kept_and_an_old_one_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sample, "_build", lambda root: (root / sample.MARKER).write_text(json.dumps({"version": sample.VERSION}))
    )
    root = build_sample(tmp_path / "s")
    (root / "mine").touch()
    build_sample(root)
    assert (root / "mine").exists()
    (root / sample.MARKER).write_text(json.dumps({"version": -1}))
    build_sample(root)
    assert not (root / "mine").exists()


def test_a_stopped_build_leaves_nothing(tmp_path, monkeypatch):
    def stops(root):
        (root / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_build", stops)
    with pytest.raises(KeyboardInterrupt):
        build_sample(tmp_path / "s")
    assert [path for path in tmp_path.iterdir() if path.name != ".s-lock"] == []


def build_slowly(root: Path, name: str) -> None:
    def slowly(building: Path) -> None:  # until the other one waits
        wait_until(lambda: any("another process makes the sample" in out.read_text() for out in root.parent.glob("*.txt")))
        (building / "by").write_text(name)
        (building / sample.MARKER).write_text(json.dumps({"version": sample.VERSION}))

    sample._build = slowly
    print(build_sample(root).stat().st_ino, (root / "by").read_text())


@pytest.mark.slow
def test_two_first_runs_at_once_share_one_sample(tmp_path):
    """The folder that the first one reads is the one that the second one finds, not a second one in its place."""
    outputs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    both = [beside(build_slowly, tmp_path / "s", out.stem, said=out) for out in outputs]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    said = [out.read_text().splitlines() for out in outputs]
    assert said[0][-1] == said[1][-1], "one folder, made by one of them"
    assert sum("another process makes the sample data" in line for lines in said for line in lines) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["s"]


def test_what_a_killed_build_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sample, "_build", lambda root: (root / sample.MARKER).write_text(json.dumps({"version": sample.VERSION}))
    )
    (tmp_path / ".sample-x1y2").mkdir()
    (tmp_path / ".sample-x1y2" / "half.jpg").write_bytes(b"half")
    build_sample(tmp_path / "sample")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["sample"]


def test_files_of_others_are_not_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_build", lambda root: None)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "holiday.jpg").touch()
    with pytest.raises(FileExistsError, match="not a sample"):
        build_sample(tmp_path / "s")
    assert (tmp_path / "s" / "holiday.jpg").exists()


@pytest.mark.parametrize("name", PHOTOS)
def test_every_photograph_is_there(name):
    assert load_photo(name).shape[2] == 3
    assert PHOTOS[name].licence
