"""The figures of images on their way through the method show what the method does."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import changed
from matplotlib.patches import Rectangle
from scipy.special import logit

from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import choose_machine
from forensics_lib.images.crops import chosen_places, whole_crops
from forensics_lib.images.io import read_image
from forensics_lib.inference.predict import predict_mask, predict_probabilities, used_scales
from forensics_lib.inference.probabilities import calibrated
from forensics_lib.models.checkpoint import load_model, save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.reports import figures
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.utils.files import update_json


@pytest.fixture
def untrained(tiny_run) -> Run:
    """The tiny run with models that have learned nothing."""
    torch.manual_seed(0)
    for task in "AB":
        save_checkpoint(tiny_run.finetuned_model(task), build_model(tiny_run.params, task))
    update_json(tiny_run.thresholds, A={"threshold": 0.5, "temperature": 0.2, "intercept": 0.3})
    update_json(tiny_run.thresholds, B={"threshold": 0.5, "loc_threshold": 0.25})
    return tiny_run


def row_of(run: Run, task: str, label: int = 1) -> pd.Series:
    rows = usable(build_manifest(run, task), "val")
    return rows[rows["label"] == label].iloc[0]


@pytest.mark.parametrize("size", [32, 64], ids=["several crops", "an image smaller than a crop"])
def test_the_probabilities_of_crops_are_those_that_make_the_image_s(untrained, size):
    run = changed(untrained, crop_size=size)
    row, machine = row_of(run, "A"), choose_machine(run.params)
    figure = figures.on_its_way(run, row)
    figure.canvas.draw()
    crops = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    bars = np.array([bar.get_width() for bar in figure.axes[4].patches])
    image = read_image(row["path"])
    views = [len(chosen_places(image, size, 2)), len(whole_crops(image, size))]
    assert [len(crops), len(bars) - 1] == [views[0], sum(views)]
    found = next(predict_probabilities(load_model(run.finetuned_model("A"), "A")[0], row.to_frame().T, run.params, machine))
    assert bars[-1] == pytest.approx(float(calibrated(np.array(found.prob), stored_thresholds(run, "A"))))
    parts = [part.mean() for part in np.split(logit(bars[:-1]), views[:1]) if len(part)]
    assert logit(bars[-1]) == pytest.approx(np.mean(parts), abs=1e-4)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("values", [{"mask_scales": [1.0, 0.5], "tile_size": 32}, {"mask_scales": "pyramid", "crop_size": 50}])
def test_the_masks_of_the_scales_are_those_that_make_the_mask(untrained, label, values):
    run = changed(untrained, **values)
    row, machine = row_of(run, "B", label), choose_machine(run.params)
    image, figure = read_image(row["path"]), figures.tiling(run, row)
    figure.canvas.draw()
    scales = used_scales(run.params, image.shape[:2])
    columns = len(scales) + 1
    above, below = figure.axes[:columns], figure.axes[columns:]
    tiles = [len(axis.patches) for axis in above[:-1]]
    assert tiles == ([6, 1] if columns == 3 else [1])
    drawn = [np.asarray(axis.images[0].get_array()) for axis in below]
    mask = predict_mask(load_model(run.finetuned_model("B"), "B")[0], image, run.params, machine)[1]
    assert np.array_equal(drawn[-1], mask.astype(np.float32))
    np.testing.assert_allclose(np.mean(drawn[:-1], 0), drawn[-1], atol=2e-3)
    assert bool(above[-1].collections) == bool(label), "the outline of what is manipulated"
