from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import choose_machine
from forensics_lib.evaluation import robustness as module
from forensics_lib.evaluation.predictions import Predictions
from forensics_lib.evaluation.robustness import SWEEP, Change, robustness
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.models.combined import build_model
from forensics_lib.reports.figures import robustness_curves
from forensics_lib.run import Thresholds


@pytest.mark.parametrize(("name", "strengths"), SWEEP.items())
def test_every_change_does_something_the_same_every_time(name, strengths, rng):
    image = picture(rng, 64, 80)
    for strength in strengths:
        changed = Change(name, strength)(image)
        assert changed.dtype == np.uint8 and changed.shape[2] == 3
        assert changed.shape != image.shape or not np.array_equal(changed, image)
        assert np.array_equal(changed, Change(name, strength)(image))


@pytest.mark.parametrize("name", ["JPEG quality", "WebP quality", "blur, sigma", "noise, sigma"])
def test_changes_grow_stronger_along_the_sweep(name, rng):
    image = picture(rng, 64, 80).astype(float)
    away = [np.abs(Change(name, strength)(image.astype(np.uint8)) - image).mean() for strength in SWEEP[name]]
    assert away == sorted(away)


def test_the_sweep_measures_what_the_model_makes_of_changed_images(tiny_run, monkeypatch):
    rows, params = usable(build_manifest(tiny_run, "A"), "val"), tiny_run.params
    seen = []

    def predicted(model, task, rows, params, machine, change, title):
        seen.append(change)
        right = change is None or change.strength > 50
        return Predictions(np.abs(rows["label"] - (0.2 if right else 0.8)).to_numpy(), {})

    monkeypatch.setattr(module, "predict_labelled", predicted)
    model, machine = build_model(params, "A"), choose_machine(params)
    thresholds = Thresholds(threshold=0.5)
    table = robustness(model, "A", rows, params, machine, thresholds, sweep={"JPEG quality": (90, 40)})
    assert seen == [None, Change("JPEG quality", 90), Change("JPEG quality", 40)]
    assert table["auc"].tolist() == [1.0, 1.0, 0.0] and table["fpr"].tolist() == [0.0, 0.0, 1.0]
    robustness_curves(table, "A").canvas.draw()


WIDE = (1, 16_400)  # height and width, beyond WebP's limit of 16,383


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (Change("WebP quality", 80), WIDE),
        (Change("JPEG quality", 80), (65_501, 1)),
        (Change("upload, scale", 0.9), (1, 73_000)),
    ],
)
def test_a_change_that_cannot_be_done_to_an_image_says_which_and_why(change, shape):
    with pytest.raises(ImageError, match=f"{change.name} {change.strength:g} cannot be done to {shape[1]} x {shape[0]} pixels"):
        change(np.zeros((*shape, 3), np.uint8))


@pytest.mark.parametrize("task", ["A", "B"])
def test_an_image_that_a_change_fails_on_is_left_out_of_its_row_alone(task, tiny_run, monkeypatch, capsys):
    """The sweep goes on; a row that fails on every image has no scores."""
    rows, params = usable(build_manifest(tiny_run, task), "val"), tiny_run.params
    machine, path = choose_machine(params), Path(rows["path"][1])
    shape = read_image(path).shape

    def failing(image, codec, quality):
        if quality == 10 or (quality == 75 and codec == "WEBP" and np.array_equal(image, read_image(path))):
            raise ValueError("encoding error 5")
        return image

    monkeypatch.setattr(module, "recompress", failing)
    thresholds = Thresholds(threshold=0.5, loc_threshold=0.5)
    sweep = {"WebP quality": (90, 75, 60, 10), "JPEG quality": (85,)}
    model = build_model(params, task)
    table = robustness(model, task, rows, params, machine, thresholds, sweep)
    assert table["images"].tolist() == [len(rows), len(rows), len(rows) - 1, len(rows), 0, len(rows)]
    scores = table.drop(columns=["change", "strength", "images"])
    assert scores.iloc[4].isna().all() and scores["f1"].drop(4).notna().all()
    said = capsys.readouterr().out
    assert f"1 of {len(rows)} images left out: {path}: WebP quality 75 cannot be done to {shape[1]} x {shape[0]}" in said
    robustness_curves(table, task).canvas.draw()


def test_a_wide_image_goes_through_the_whole_sweep(tiny_run, capsys):
    rows, params = usable(build_manifest(tiny_run, "A"), "val"), tiny_run.params
    path = Path(rows["path"][0]).with_name("wide.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*WIDE, 3), np.uint8)).save(path)
    rows.loc[0, "path"] = str(path)
    thresholds = Thresholds(threshold=0.5)
    sweep = {"WebP quality": (80,), "shrunk": (0.5,)}
    table = robustness(build_model(params, "A"), "A", rows, params, choose_machine(params), thresholds, sweep)
    assert table["images"].tolist() == [len(rows), len(rows) - 1, len(rows)]
    assert str(path) in capsys.readouterr().out


def test_changes_reach_the_images(tiny_run):
    rows, params = usable(build_manifest(tiny_run, "A"), "val"), tiny_run.params
    model, machine = build_model(params, "A").eval(), choose_machine(params)
    plain, changed = (
        module.predict_labelled(model, "A", rows, params, machine, change).probs for change in (None, Change("shrunk", 0.5))
    )
    assert np.abs(plain - changed).max() > 1e-6


def test_the_truth_goes_with_images_that_are_scaled(tiny_run):
    rows, params = usable(build_manifest(tiny_run, "B"), "val"), tiny_run.params
    model, machine = build_model(params, "B").eval(), choose_machine(params)
    thresholds = Thresholds(threshold=0.5, loc_threshold=0.5)
    table = robustness(model, "B", rows, params, machine, thresholds, sweep={"shrunk": (0.5,)})
    assert table["images"].tolist() == [len(rows)] * 2
    whole, half = (
        module.predict_labelled(model, "B", rows, params, machine, c).histograms for c in (None, Change("shrunk", 0.5))
    )
    assert half[:, 1].sum() == pytest.approx(whole[:, 1].sum() / 4, rel=0.05)
    assert {"iou", "submitted_iou", "submitted_flagged_authentic"} <= set(table.columns)
    robustness_curves(table, "B").canvas.draw()
