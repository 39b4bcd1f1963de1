"""Archives are scored as the authors of TGIF score localization."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import SIZES, save, square_mask

from forensics_lib.evaluation.metrics import bin_threshold, pixel_histogram, pixel_table
from forensics_lib.images.masks import load_mask, save_mask, written_mask
from forensics_lib.submission.build import build_submission
from forensics_lib.submission.score import ScoreError, score_archive, strict_iou, summary
from forensics_lib.utils.files import update_json

HALF = np.repeat([True, False], 8).reshape(4, 4)


@pytest.mark.parametrize(
    ("mask", "truth", "iou"),
    [
        (HALF * 1.0, HALF, 1.0),
        (HALF * 0.0, HALF, 0.0),
        (HALF * 0.0, HALF & False, 1.0),
        (HALF * 1.0, HALF & False, 0.0),
        (HALF | True, HALF, 0.5),
        (HALF * 0.5, HALF, 0.0),  # equal to the threshold: strictly above it is flagged
    ],
)
def test_iou_by_the_organisers_rule(mask, truth, iou):
    assert strict_iou(np.asarray(mask, np.float16), truth, 0.5) == iou


@pytest.mark.parametrize("number", [1, 77, 128, 255])
def test_written_masks_score_the_same_by_both_rules_and_as_in_evaluation(number, rng):
    """Also where pixels are at the edge of a bin."""
    mask = written_mask(rng.integers(0, 257, (40, 40)) / 256)
    truth = rng.random(mask.shape) < 0.3
    (expected,) = pixel_table(pixel_histogram(mask, truth)[None], bin_threshold(number))["iou"]
    assert (mask == np.float16(number / 256)).any()
    assert strict_iou(mask, truth, bin_threshold(number)) == expected
    assert strict_iou(mask, truth, np.nextafter(bin_threshold(number), 0)) == expected


@pytest.fixture
def archive(submittable):
    update_json(submittable.thresholds, B={"threshold": 0.5, "loc_threshold": bin_threshold(64)})
    return build_submission(submittable, "B").path


def test_an_archive_is_scored_against_a_folder_or_a_table_of_masks(archive, submittable, tmp_path):
    truth = square_mask(*SIZES["a.jpg"])
    path = save(tmp_path / "truth" / "a_mask.png", truth)
    table = tmp_path / "truth.csv"
    table.write_text("image_id,mask_path\na.jpg,truth/a_mask.png\nb.png,\n")
    scores = score_archive(archive, path.parent)
    flagged = load_mask(submittable.masks / "a.npz").astype(float) > bin_threshold(64)
    assert scores["iou"].tolist() == [(flagged & (truth > 0)).sum() / (flagged | (truth > 0)).sum(), 1.0]
    pd.testing.assert_frame_equal(scores, score_archive(archive, table))
    found = summary(scores)
    assert found.loc["iou"].tolist() == pytest.approx([1.0, scores["iou"][0], scores["iou"].mean()])
    assert (found.loc["f1", "all"], found.loc["images"].tolist()) == (1.0, [1, 1, 2])


def test_a_black_mask_is_that_of_an_authentic_image(archive, tmp_path):
    save(tmp_path / "truth" / "a.png", square_mask(*SIZES["a.jpg"]))
    save(tmp_path / "truth" / "b.png", np.zeros(SIZES["b.png"], np.uint8))
    assert score_archive(archive, tmp_path / "truth")["manipulated"].tolist() == [True, False]


def test_truth_that_does_not_fit_is_told(archive, submittable, tmp_path):
    save(tmp_path / "other" / "z.png", square_mask(20, 30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.csv").write_text("image_id,mask_path\na.jpg,\n")
    (tmp_path / "odd.csv").write_text("name,mask\na.jpg,\n")
    for truth, told in (
        ("other", "1 of the masks .* no image of the archive, such as z"),
        ("empty", "no mask of an image"),
        ("none", "no folder or table"),
        ("short.csv", r"no truth for 1 image\(s\).* b\.png"),
        ("odd.csv", "needed: image_id or path, and mask_path"),
    ):
        with pytest.raises(ScoreError, match=told):
            score_archive(archive, tmp_path / truth)
    with zipfile.ZipFile(tmp_path / "no_masks.zip", "w") as incomplete:
        incomplete.writestr("scores.csv", zipfile.ZipFile(archive).read("scores.csv"))
    save(tmp_path / "truth" / "a.png", square_mask(20, 30))
    with pytest.raises(ScoreError, match=r"a\.npz.*validate it first"):
        score_archive(tmp_path / "no_masks.zip", tmp_path / "truth")
    save_mask(tmp_path / "x.npz", np.zeros((2, 2)))
    with pytest.raises(ScoreError, match="no complete Task B archive"):
        score_archive(tmp_path / "x.npz", tmp_path / "truth")


def test_archives_that_no_validator_would_pass_are_told(archive, tmp_path):
    truth = tmp_path / "truth"
    save(truth / "a.png", square_mask(*SIZES["a.jpg"]))
    with zipfile.ZipFile(archive) as opened:
        good = {name: opened.read(name) for name in opened.namelist()}
    table = good["scores.csv"].decode()
    nothing, unknown = io.BytesIO(), io.BytesIO()
    np.savez(nothing)
    np.savez(unknown, np.full(SIZES["a.jpg"], np.nan))
    for name, content, told in (
        ("scores.csv", (table + table.splitlines()[1] + "\n").encode(), "more than once"),
        ("scores.csv", b"", "no complete Task B archive"),
        ("a.npz", b"", "mask of a.jpg cannot be read"),
        ("a.npz", nothing.getvalue(), "mask of a.jpg cannot be read"),
        ("a.npz", unknown.getvalue(), "wanted are finite numbers"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
            for entry, kept in (good | {name: content}).items():
                bad.writestr(entry, kept)
        with pytest.raises(ScoreError, match=told):
            score_archive(tmp_path / "bad.zip", truth)
    save(truth / "a.jpg", square_mask(*SIZES["a.jpg"]))
    with pytest.raises(ScoreError, match=r"two masks of one image: a\.jpg and a\.png"):
        score_archive(archive, truth)
