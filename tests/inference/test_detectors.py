"""Detectors of the user's own and ensembles give tables and archives as a run's own model does."""

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import changed
from scipy.special import expit, logit

from forensics_lib.__main__ import main
from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import choose_machine
from forensics_lib.evaluation.ensemble import EnsembleError, make_ensemble
from forensics_lib.evaluation.evaluate import evaluate, evaluate_robustness
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.detectors import DetectorError, Ensemble, FunctionDetector, common_rows, predictions
from forensics_lib.inference.shards import InferenceError, infer
from forensics_lib.reports import figures
from forensics_lib.reports.browser import browse_evaluated_images, browse_evaluated_masks
from forensics_lib.reports.compare import compare
from forensics_lib.reports.model_card import build_card
from forensics_lib.reports.report import build_report
from forensics_lib.run import Thresholds, open_run, stored_thresholds
from forensics_lib.submission.build import archive_path, build_submission
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, read_json, update_json

BRIGHT = """
import numpy as np


def brightness(image):
    return image.mean() / 255


def bright_regions(image):
    mask = image.mean(2) / 255
    return mask.mean(), mask
"""


@pytest.fixture
def module(monkeypatch, tiny_run):
    (home() / "bright.py").write_text(BRIGHT)
    monkeypatch.delitem(sys.modules, "bright", raising=False)
    monkeypatch.syspath_prepend(str(home()))


@pytest.mark.parametrize(("task", "name"), [("A", "bright:brightness"), ("B", "bright:bright_regions")])
def test_a_detector_of_ones_own_goes_all_the_way(tiny_run, module, task, name, capsys, monkeypatch):
    run = changed(tiny_run, detector=name, tasks=[task], run_name="mine")
    manifest = build_manifest(run, task)
    history = train(run, task, manifest)
    assert history.empty and "used as it is" in capsys.readouterr().out
    assert figures.learning_curves(history, task)
    found = evaluate(run, task, manifest)
    assert found.metrics["images"] and not found.errors and (task == "A" or "iou_manipulated" in found.metrics)
    assert found.thresholds.temperature != 1, "it is calibrated"
    assert len(evaluate_robustness(changed(run, robustness_images=2), task, manifest)) > 10
    table = infer(run, task)
    assert len(table) == 4 and build_submission(run, task).valid and archive_path(run, task).is_file()
    assert name in build_card(run, task).read_text() and name in build_report(run).read_text()
    if task == "A":
        assert figures.attribution_gallery(run, found.surest(), "surest")
        assert browse_evaluated_images(run, found).view.options == ("image",)
    else:
        assert load_mask(run.masks / "b0.npz").shape == (70, 90)
        assert figures.mask_examples(run, found, "best", 1) and browse_evaluated_masks(run, found).text.value
    with pytest.raises(InferenceError, match=r"detector: bright:\w+ there, bright:other here"):
        infer(changed(run, detector="bright:other"), task)


@pytest.mark.parametrize(
    ("task", "answer", "told"),
    [
        ("A", "1 / 0", "failed: ZeroDivisionError"),
        ("A", "float('nan')", "the probability nan; expected a number in"),
        ("A", "1.5", "the probability 1.5"),
        ("A", "'high'", "gave str; expected a number"),
        ("B", "0.5", "gave float; expected a probability and a mask"),
        ("B", "(0.5, image[:5, :5, 0] / 255)", r"mask of shape \(5, 5\) for an image of \(48, 56\)"),
        ("B", "(0.5, image[..., 0])", "not numbers in"),
        ("B", "(0.5, image[..., 0] * float('nan'))", "not numbers in"),
    ],
)
def test_a_detector_that_fails_on_an_image_is_told_and_the_rest_goes_on(tiny_run, task, answer, told):
    good = {"A": lambda image: 0.5, "B": lambda image: (0.5, image[..., 0] / 255)}[task]
    bad = eval(f"lambda image: {answer}")  # noqa: S307
    rows, machine = usable(build_manifest(tiny_run, task), "val"), choose_machine(tiny_run.params)
    calls = iter([good, bad, *[good] * len(rows)])
    detector = FunctionDetector("my:own", task, lambda image: next(calls)(image))
    found = list(predictions(detector, task, rows, tiny_run.params, machine))
    assert [one.prob for one in found if not one.error] == [0.5] * (len(rows) - 1)
    assert found[1].error.startswith(rows["path"][1]) and pd.Series(found[1].error).str.contains(told).all()
    with pytest.raises(DetectorError, match=f"no answer for any of {len(rows)} images; the first: .*{told}"):
        list(predictions(FunctionDetector("my:own", task, bad), task, rows, tiny_run.params, machine))


def test_files_that_cannot_be_read_are_no_failure_of_a_detector(tiny_run, tmp_path):
    """What is left of a stopped inference may be the unreadable images alone."""
    path = tmp_path / "no.png"
    path.write_bytes(b"corrupt")
    detector, machine = FunctionDetector("my:own", "A", lambda image: 0.5), choose_machine(tiny_run.params)
    (found,) = predictions(detector, "A", pd.DataFrame({"path": [str(path)]}), tiny_run.params, machine)
    assert "no.png" in found.error


def test_no_member_of_an_ensemble_outvotes_the_others_by_being_too_sure():
    sharp = Thresholds(threshold=0.5, temperature=0.48)
    ensemble = Ensemble("A", [(None, None, sharp), (None, None, sharp)])
    assert ensemble._mean([(1 - 1e-9, None), (1e-9, None)])[0] == pytest.approx(0.5, abs=1e-4)
    assert ensemble._mean([(1 - 1e-9, None), (0.001, None)])[0] < 0.999, "its log-odds are finite"


@pytest.fixture
def pair(trained):
    """Two runs of both tasks with other calibrations, and the manifests."""
    run, _ = trained("AB")
    other = changed(run, run_name="other")
    shutil.copytree(run.folder, other.folder)
    for task in "AB":
        for file in ("finetuned_model", "val_probs"):
            (path,) = (home() / "outputs").glob(f"tiny{'_taskB' if task == 'B' else ''}_{file}.*")
            (path.parent / path.name.replace("tiny", "other", 1)).write_bytes(path.read_bytes())
        stored = read_json(other.thresholds)[task]
        update_json(other.thresholds, **{task: stored | {"temperature": 2.0, "intercept": 0.7}})
    return run, other


def test_an_ensemble_averages_calibrated_log_odds_and_masks_and_submits(pair, capsys):
    assert main(["ensemble", "tiny", "other", "--name", "both"]) == 0
    assert "python -m forensics_lib infer --params" in capsys.readouterr().out
    run = open_run(home() / "outputs" / "both" / "params.yaml")
    assert run.params.ensemble == ["tiny", "other"] and run.params.run_type == "constrained" and run.params.tasks == ["A", "B"]
    for task in "AB":
        odds = [logit(infer(member, task)["prob"]) for member in pair]
        own = stored_thresholds(run, task)
        expected = expit(np.mean(odds, axis=0) / own.temperature + own.intercept)
        assert infer(run, task)["prob"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert np.abs(odds[0] - odds[1]).min() > 0.01 and build_submission(run, task).valid
    masks = [load_mask(member.masks / "b0.npz").astype(float) for member in (*pair, run)]
    assert np.abs((masks[0] + masks[1]) / 2 - masks[2]).max() < 2e-3
    assert "both" in compare(["tiny", "both"])["scores"]["run"].tolist()
    assert (
        "the runs tiny, other" in build_card(run, "B").read_text()
        and "the mean of tiny, other" in build_report(run).read_text()
    )
    found = evaluate(run, "B", build_manifest(run, "B"))
    assert figures.mask_examples(run, found, "best", 1) and found.thresholds == own


def test_an_ensemble_is_no_member_of_itself(pair):
    make_ensemble(["tiny", "other"], "both")
    shutil.copytree(home() / "outputs" / "other", home() / "outputs" / "both", dirs_exist_ok=True)
    update_json(home() / "outputs" / "both" / "run.json", params={"ensemble": ["tiny", "other"]})
    for names in (["both", "tiny"], ["tiny", "both"]):
        with pytest.raises(EnsembleError, match="among the runs that it would average"):
            make_ensemble(names, "both")


def test_an_ensemble_is_constrained_and_validates_where_its_members_do(pair, capsys):
    run, other = pair
    facts = read_json(other.folder / "run.json")
    trained = facts["taskA_trained"]
    trained["params"]["run_type"] = "open"
    update_json(other.folder / "run.json", taskA_trained=trained)
    assert open_run(make_ensemble(["tiny", "other"], "both")).params.run_type == "open"
    table = pd.read_csv(other.val_probs("A"))
    table.iloc[2:].to_csv(other.val_probs("A"), index=False)
    both = changed(run, run_name="both", ensemble=["tiny", "other"])
    rows = usable(build_manifest(run, "A"), "val")
    assert len(common_rows(both, "A", rows)) == len(rows) - 2
    assert "2 of 8 validation images are left out" in capsys.readouterr().out
    table[table["label"].eq(1)].to_csv(other.val_probs("A"), index=False)
    with pytest.raises(ValueError, match="no validation images of both classes in common"):
        common_rows(both, "A", rows)
    for names, name, told in (
        (["tiny"], "x", "two or more"),
        (["tiny", "none"], "x", "no trained run none; there are"),
        (["tiny", "other"], "tiny", "averages none"),
    ):
        with pytest.raises(EnsembleError, match=told):
            make_ensemble(names, name)
