import numpy as np
import pytest
import torch
from conftest import picture
from test_degradations import EVERYTHING, NOTHING

from forensics_lib.datasets import TrainingCrops, chosen_crops, collate, epoch_order, training_loader
from forensics_lib.manifest import build_manifest, usable
from forensics_lib.params import Degradations


@pytest.fixture
def rows(tiny_run):
    return usable(build_manifest(tiny_run, "B"), "train")


def crops(rows, **changes):
    options = {"crop_size": 32, "masks": True, "degradations": Degradations(), "seed": 0} | changes
    return TrainingCrops(rows, **options)


def test_crops_have_the_asked_size_and_masks_go_with_them(rows):
    for sample in crops(rows):
        assert sample["image"].shape == (3, 32, 32)
        assert sample["image"].dtype == torch.uint8
        assert sample["mask"].shape == (1, 32, 32)


def test_a_crop_depends_on_seed_and_epoch_alone(rows):
    first, again = crops(rows), crops(rows)
    assert torch.equal(first[3]["image"], again[3]["image"])
    again.epoch = 1
    assert not torch.equal(first[3]["image"], again[3]["image"])


def test_workers_change_nothing(rows):
    order = np.arange(len(rows))
    batches = [next(iter(training_loader(crops(rows), order, len(rows), workers))) for workers in (0, 2)]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert batches[0]["index"] == batches[1]["index"]


def test_a_spliced_crop_without_its_region_is_authentic(rows):
    spliced = rows[rows["kind"] == "sp"].reset_index(drop=True)
    dataset = crops(spliced, degradations=NOTHING, crop_size=16)
    labels = []
    for dataset.epoch in range(30):
        for sample in dataset:
            assert sample["label"] == int(sample["mask"].any())
            labels.append(sample["label"])
    assert 0 < sum(labels) < len(labels)


def test_image_and_mask_stay_aligned_through_degradations(tmp_path):
    """A white square on black is its own truth: after any change the mask must lie on the bright pixels."""
    import pandas as pd
    from conftest import save

    square = np.zeros((80, 80), np.uint8)
    square[20:60, 20:60] = 255
    path = str(save(tmp_path / "x.png", np.repeat(square[..., None], 3, 2)))
    mask = str(save(tmp_path / "m.png", square))
    table = pd.DataFrame([{"path": path, "label": 1, "mask_path": mask, "kind": "sp", "format": "PNG"}])
    table[["jpeg_quality", "width", "height"]] = np.nan, 80, 80
    dataset = crops(table, crop_size=64, degradations=EVERYTHING)
    for dataset.epoch in range(20):
        sample = dataset[0]
        bright = sample["image"].float().mean(0) > 127
        assert (bright == sample["mask"][0]).float().mean() > 0.93


def test_unreadable_files_are_reported_and_the_rest_goes_on(rows):
    rows = rows.copy()
    rows.loc[0, "path"] = "/nowhere.png"
    batch = collate([crops(rows)[i] for i in range(len(rows))])
    assert len(batch["index"]) == len(rows) - 1
    assert batch["errors"][0][0] == 0
    assert "/nowhere.png" in batch["errors"][0][1]


def test_a_batch_of_unreadable_files_alone():
    assert collate([{"index": 3, "error": "x"}]) == {"errors": [(3, "x")], "index": []}


def test_an_epoch_is_balanced_and_as_long_as_the_data():
    labels = np.array([0] * 90 + [1] * 10)
    order = epoch_order(labels, 0, 0)
    assert len(order) == 100
    assert labels[order].sum() == 50
    assert len(set(order[labels[order] == 0])) == 50, "the plentiful class is drawn without repeats"
    assert not np.array_equal(order, epoch_order(labels, 0, 1))


def test_a_balanced_epoch_shows_every_image_once():
    assert sorted(epoch_order(np.array([0, 1] * 20), 0, 0)) == list(range(40))


@pytest.mark.parametrize("shape", [(1, 1), (31, 64), (32, 32), (100, 40), (200, 300)])
@pytest.mark.parametrize("count", [1, 4])
def test_inference_crops_are_native_and_never_too_many(shape, count, rng):
    image = picture(rng, *shape)
    found = chosen_crops(image, 32, count)
    assert 1 <= len(found) <= count
    assert all(crop.shape == (32, 32, 3) for crop in found)


def test_the_textured_place_is_chosen(rng):
    image = np.full((96, 96, 3), 128, np.uint8)
    image[64:, 64:] = picture(rng, 32, 32)
    centre, textured = chosen_crops(image, 32, 2)
    assert (centre == image[32:64, 32:64]).all()
    assert (textured == image[64:, 64:]).all()


def test_equalizing_gives_other_formats_a_jpeg_history(tmp_path, rng):
    """A PNG is first compressed as one of the JPEG files were: what is left of it is what such a JPEG holds."""
    import pandas as pd
    from conftest import save

    path = str(save(tmp_path / "x.png", picture(rng, 64, 64)))
    columns = {"label": 1, "mask_path": None, "kind": "full", "width": 64, "height": 64}
    table = pd.DataFrame([{"path": path, "format": "PNG", "jpeg_quality": np.nan, **columns}] * 2)
    table.loc[1, ["format", "jpeg_quality"]] = "JPEG", 20.0
    fine = NOTHING.model_copy(update={"jpeg_quality": (100, 100), "webp_quality": (100, 100)})
    options = {"masks": False, "degradations": fine, "crop_size": 64}
    plain = crops(table.iloc[:1], **options, equalize=True)[0]["image"].float()
    history = crops(table, **options, equalize=True)[0]["image"].float()
    assert (history - plain).abs().mean() > 5


def test_sources_of_a_class_are_drawn_equally_often():
    labels = np.array([0] * 50 + [1] * 50)
    sources = np.array(["a"] * 45 + ["b"] * 5 + ["c"] * 50)
    drawn = epoch_order(labels, 0, 0, sources)
    assert len(drawn) == 100 and labels[drawn].sum() == 50
    assert (sources[drawn] == "b").sum() == 25
    assert len(set(drawn[labels[drawn] == 1])) == 50, "a single source is drawn without repetition"
