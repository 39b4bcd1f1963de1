"""Archives are built of what inference leaves, or the reason is told."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SIZES, changed, picture, save

from forensics_lib.evaluation.metrics import best_f1_threshold, bin_threshold
from forensics_lib.images.masks import load_mask, save_mask
from forensics_lib.inference.probabilities import round_probs
from forensics_lib.run import Run
from forensics_lib.submission.build import SubmissionError, archive_path, build_submission, scores_path
from forensics_lib.submission.validate import validate_submission
from forensics_lib.utils.files import decimal_text, read_json, update_json, write_csv


def test_constrained_archive(submittable):
    result = build_submission(submittable, "A")
    assert result.path.name == "team_constrained.zip"
    with zipfile.ZipFile(result.path) as archive:
        assert archive.namelist() == ["team_constrained.csv"]
        text = archive.read("team_constrained.csv").decode()
    assert text.splitlines() == [
        "image_id,prob,label,threshold",
        "a.jpg,0.900000,1,0.500000",
        "b.png,0.200000,0,0.500000",
    ]


def as_run(run: Run, name: str, prob: float) -> Run:
    """Another run with the results of a first one, but for the probability of its first image."""
    other = changed(run, run_name=name)
    for task in ("A", "B"):
        write_csv(other.test_probs(task), pd.DataFrame({"image_id": list(SIZES), "prob": [prob, 0.2]}))
    shutil.copytree(run.masks, other.masks)
    shutil.copy(run.thresholds, other.thresholds)
    return other


def first_prob(path: Path) -> float:
    """The probability of the first image in an archive or table."""
    if path.suffix == ".csv":
        return pd.read_csv(path)["prob"].iloc[0]
    with zipfile.ZipFile(path) as archive:
        return pd.read_csv(archive.open(next(n for n in archive.namelist() if n.endswith(".csv"))))["prob"].iloc[0]


@pytest.mark.parametrize("values", [{}, {"edition": 2026}, {"run_type": "open", "team": "x.y"}])
def test_archives_of_two_runs_with_one_name_are_both_kept(submittable, capsys, values):
    first, second = changed(submittable, **values), changed(as_run(submittable, "second", 0.7), **values)
    for task in ("A", "B"):
        names = [archive_path(first, task)] + ([scores_path(first)] if task == "B" else [])
        capsys.readouterr()
        build_submission(first, task)
        build_submission(first, task)  # the run's own is simply built again
        assert "kept as" not in capsys.readouterr().out
        build_submission(second, task)
        said = capsys.readouterr().out
        for path in names:
            kept = path.with_name(f"{path.stem}_of_run_tiny{path.suffix}")
            assert (first_prob(path), first_prob(kept)) == (0.7, 0.9)
            assert f"{path.name} was made by run tiny: it is kept as {kept.name}" in said
        record = read_json(first.folder / "run.json")[f"task{task}_submission"]
        assert record == str(names[0].with_name(f"{names[0].stem}_of_run_tiny{names[0].suffix}"))
        build_submission(first, task)  # and back
        for path in names:
            assert first_prob(path) == 0.9
            assert first_prob(path.with_name(f"{path.stem}_of_run_second{path.suffix}")) == 0.7
        assert read_json(first.folder / "run.json")[f"task{task}_submission"] == str(names[0])


def test_an_archive_of_nobody_is_kept_unless_it_is_the_same(submittable):
    path = archive_path(submittable, "A")
    for content in (b"mine", b"mine too"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        (submittable.folder / "run.json").unlink(missing_ok=True)
        build_submission(submittable, "A")
    assert path.with_name("team_constrained_earlier.zip").read_bytes() == b"mine"
    assert path.with_name("team_constrained_earlier1.zip").read_bytes() == b"mine too"
    (submittable.folder / "run.json").unlink()
    build_submission(submittable, "A")
    assert len(list(path.parent.iterdir())) == 3


def test_probabilities_and_thresholds_of_different_evaluations_do_not_mix(submittable):
    update_json(submittable.folder / "run.json", taskA_inferred={"thresholds": {"threshold": 0.5}})
    assert build_submission(submittable, "A").valid
    update_json(submittable.thresholds, A={"threshold": 0.6})
    with pytest.raises(SubmissionError, match=r"chosen anew.*run 04_infer"):
        build_submission(submittable, "A")


def test_localization_archive(submittable):
    result = build_submission(submittable, "B")
    assert result.path.name == "team_localization_masks.zip"
    with zipfile.ZipFile(result.path) as archive:
        assert archive.namelist() == ["scores.csv", "a.npz", "b.npz"]
        text = archive.read("scores.csv").decode()
        masks = {}
        for name in ("a", "b"):
            with np.load(io.BytesIO(archive.read(f"{name}.npz"))) as content:
                masks[name] = content["arr_0"]
    assert np.array_equal(masks["a"], load_mask(submittable.masks / "a.npz"))
    assert masks["b"].shape == (31, 17)
    assert masks["b"].dtype == np.float16
    assert not masks["b"].any()  # called authentic: nothing is detected there
    assert load_mask(submittable.masks / "b.npz").any()
    assert text.startswith("image_id,prob,label,threshold,loc_threshold\n")
    assert scores_path(submittable).name == "scores.csv"
    assert scores_path(submittable).read_text() == text


@pytest.mark.parametrize(
    ("changes", "task", "name"),
    [
        ({}, "A", "team_constrained.zip"),
        ({"run_type": "open"}, "A", "team_open.zip"),
        ({"edition": 2026}, "A", "team_constrained.csv"),
        ({"edition": 2026}, "B", "team_localization_masks.zip"),
        ({"run_type": "open"}, "B", "team_localization_masks_open.zip"),
        ({"sample": True}, "A", "team_constrained_sample.zip"),
        ({"sample": True}, "B", "team_localization_masks_sample.zip"),
    ],
)
def test_archive_names(tiny_run, changes, task, name):
    assert archive_path(changed(tiny_run, **changes), task).name == name


def test_edition_2026_is_a_plain_csv(submittable):
    result = build_submission(changed(submittable, edition=2026), "A")
    assert result.path.read_text().startswith("image_id,prob,label,threshold\n")
    assert validate_submission(result.path, "A", submittable.test_folder("A")).valid


def test_thresholds_by_the_rules_of_another_edition_are_refused_for_task_b(submittable):
    update_json(submittable.thresholds, B={"threshold": 0.5, "loc_threshold": 0.25, "edition": 2025})
    with pytest.raises(ValueError, match="chosen by the rules of edition 2025, and this command says edition: 2026"):
        build_submission(changed(submittable, edition=2026), "B")
    assert build_submission(submittable, "B").valid


def test_the_same_results_give_the_same_bytes(submittable):
    first = build_submission(submittable, "B").path.read_bytes()
    assert build_submission(submittable, "B").path.read_bytes() == first


def test_a_faulty_archive_is_not_written(submittable):
    save_mask(submittable.masks / "a.npz", np.zeros((5, 5)))
    with pytest.raises(SubmissionError, match=r"a\.npz: shape \(5, 5\); its image has \(20, 30\)"):
        build_submission(submittable, "B")
    assert not archive_path(submittable, "B").exists()
    assert list(submittable.submission.iterdir()) == [], "nothing half-made is left"


def test_an_unreadable_test_image_is_a_note(submittable):
    (submittable.test_folder("B") / "a.jpg").write_bytes(b"junk")
    result = build_submission(submittable, "B")
    assert result.valid
    assert "a.jpg cannot be read" in result.notes[0]


def test_ids_that_look_like_numbers_or_nothing_stay_text(submittable, rng):
    for name in ("007.jpg", "NA.jpg"):
        save(submittable.test_folder("A") / name, picture(rng, 20, 20))
    ids = ["007.jpg", "NA.jpg", *SIZES]
    write_csv(submittable.test_probs("A"), pd.DataFrame({"image_id": ids, "prob": 0.1}))
    assert build_submission(submittable, "A").rows == 4


@pytest.mark.parametrize("number", range(1, 256))
def test_thresholds_are_written_exactly(number):
    for threshold in (bin_threshold(number), number / 256, number / 256 + 5.1e-7):
        assert float(decimal_text(threshold)) == threshold


@pytest.mark.parametrize("loc_threshold", [bin_threshold(137), 137 / 256])
def test_a_submission_reads_the_same_by_both_rules(submittable, loc_threshold):
    """Also of probabilities next to the threshold."""
    probs = round_probs(np.array([0.123456789013, 0.123456789012]))
    threshold = best_f1_threshold(np.array([1, 0]), probs)
    write_csv(submittable.test_probs("B"), pd.DataFrame({"image_id": list(SIZES), "prob": probs}))
    update_json(submittable.thresholds, B={"threshold": threshold, "loc_threshold": loc_threshold})
    result = build_submission(submittable, "B")
    table = pd.read_csv(scores_path(submittable))
    assert result.notes == [] and table["label"].tolist() == [1, 0]
    for column in (table["prob"] > table["threshold"], table["prob"] >= table["threshold"]):
        assert column.tolist() == [True, False]
    assert table["loc_threshold"].unique().tolist() == [loc_threshold]


@pytest.mark.parametrize("value", ["", "nan", "inf", "high"])
@pytest.mark.parametrize("task", ["A", "B"])
def test_an_image_without_a_probability_is_named(submittable, task, value):
    submittable.test_probs(task).write_text(f"image_id,prob\na.jpg,{value}\nb.png,0.2\n")
    with pytest.raises(SubmissionError, match=r"no probability of 1 image\(s\).* a\.jpg"):
        build_submission(submittable, task)


def test_missing_results_name_the_step_to_run(tiny_run):
    with pytest.raises(FileNotFoundError, match="04_infer"):
        build_submission(tiny_run, "A")
