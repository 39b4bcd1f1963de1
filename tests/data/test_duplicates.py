"""Images that stand twice."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import photo_table, picture, save
from PIL import Image

from forensics_lib.data import duplicates
from forensics_lib.data.duplicates import (
    exact_duplicates,
    groups_across_splits,
    near_duplicates,
    overlapping,
    shared_photographs,
)


def smooth_picture(rng) -> np.ndarray:
    """Something with large shapes, as photographs have."""
    return np.asarray(
        Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((280, 240), Image.Resampling.BICUBIC)
    )


def test_exact_duplicates_within_and_across_splits(tmp_path, rng):
    first = save(tmp_path / "a.png", picture(rng))
    paths = [first, tmp_path / "b.png", save(tmp_path / "c.png", picture(rng))]
    paths[1].write_bytes(first.read_bytes())
    rows = pd.DataFrame(
        {"path": [str(p) for p in paths], "label": [0, 1, 0], "split": ["train", "val", "train"], "error": None}
    )
    rows["bytes"] = [path.stat().st_size for path in paths]
    found = exact_duplicates(rows)
    assert found["path"].tolist() == [str(paths[0]), str(paths[1])]
    assert set(found["set"]) == {0}


def test_equal_ends_are_not_equal_files(tmp_path):
    for name, start in (("a.png", b"1"), ("b.png", b"2"), ("c.png", b"1")):
        (tmp_path / name).write_bytes(start + bytes(9_000))
    rows = pd.DataFrame({"path": [str(tmp_path / f"{name}.png") for name in "abcd"], "label": 0, "split": "train"})
    found = exact_duplicates(rows.assign(error=None, bytes=9_001))
    assert [Path(path).name for path in found["path"]] == ["a.png", "c.png"], "d.png has gone meanwhile"


def test_photos_in_two_splits():
    rows = pd.DataFrame({"group": ["a", "a", "b"], "split": ["train", "val", "val"], "error": None})
    assert groups_across_splits(rows).index.tolist() == ["a"]


def test_look_alikes_survive_recompression_and_scaling(tmp_path, rng):
    first, other = smooth_picture(rng), smooth_picture(rng)
    paths = [save(tmp_path / "a.png", first), tmp_path / "b.jpg", save(tmp_path / "c.png", other)]
    Image.fromarray(first).resize((140, 120)).save(paths[1], quality=50)
    paths += [save(tmp_path / f"flat{grey}.png", np.full((50, 50, 3), grey, np.uint8)) for grey in (90, 91)]
    (tmp_path / "broken.jpg").write_bytes(b"x")
    rows = photo_table([*paths, tmp_path / "broken.jpg"], split=["train", "val", "train", "train", "val", "val"])
    near = near_duplicates(rows)
    assert near.pairs[["path_a", "path_b"]].to_numpy().tolist() == [[str(paths[0]), str(paths[1])]]
    assert near.across("split") == 1 and near.across("label") == 0
    assert "1 pairs look alike, 1 across splits, 0 across classes" in near.message()
    assert near_duplicates(rows.assign(group="one photo")).pairs.empty, "of one photo they are no find"


def test_look_alikes_of_many_images_are_sought_among_a_part(tmp_path, rng):
    rows = photo_table([save(tmp_path / f"{i}.png", smooth_picture(rng)) for i in range(6)], split=["train"] * 4 + ["val"] * 2)
    near = near_duplicates(rows, limit=3)
    assert (near.compared, near.of) == (3, 6)
    assert "3 images compared, drawn from 6" in near.message()


@pytest.mark.parametrize(("of_val", "limit", "drawn"), [(8, 6, 3), (2, 6, 2), (9, 8, 5), (12, 6, 6)])
def test_no_split_is_left_out_of_the_part_that_is_compared(tmp_path, rng, of_val, limit, drawn, monkeypatch):
    rows = photo_table([tmp_path / f"{i}.png" for i in range(12)], split=["val"] * of_val + ["train"] * (12 - of_val))
    rows["label"] = np.arange(12) % 2
    seen = []
    hashes = duplicates.image_hashes
    monkeypatch.setattr(duplicates, "image_hashes", lambda paths, cache: seen.extend(paths) or hashes(paths, cache))
    assert near_duplicates(rows, limit=limit).compared == limit == len(seen)
    chosen = rows[rows["path"].isin(seen)]
    assert (chosen["split"] == "val").sum() == drawn and chosen["label"].nunique() == 2


def test_photographs_that_two_sets_share():
    rows = pd.DataFrame(
        {
            "group": ["a", "a", "b", "c", "c", "d", "d"],
            "split": ["train", "val", "val", "train", "train", "val", "val"],
            "data_set": ["x/one", "x/two", "x/two", "x/one", "x/one", "x/one", "x/two"],
        }
    )
    assert overlapping(rows).tolist() == [True, True, False, False, False, True, True]
    assert shared_photographs(rows).to_numpy().tolist() == [["one train", "two val", 1], ["one val", "two val", 1]]


def test_overlaps_of_many_photographs_are_found_at_once(rng):
    count = 300_000
    rows = pd.DataFrame({"group": [f"/data/set/{i % 299_000}.png" for i in range(count)], "error": None, "label": 0})
    rows["split"], rows["data_set"] = np.where(np.arange(count) < 299_500, "train", "val"), "x/one"
    rows.loc[7, "group"] = None
    started = time.process_time()
    found, shared = groups_across_splits(rows), shared_photographs(rows)
    assert time.process_time() - started < 2
    assert len(found) == 500 and (found["train"] == 1).all() and (found["val"] == 1).all()
    assert shared.to_numpy().tolist() == [["one train", "one val", 500]]


def test_overlaps_where_there_are_none():
    rows = pd.DataFrame({"group": ["a", "b"], "split": ["train", "val"], "data_set": "x/one", "error": None})
    assert len(groups_across_splits(rows)) == len(groups_across_splits(rows[:0])) == 0
    assert len(shared_photographs(rows)) == len(shared_photographs(rows[:0])) == 0
