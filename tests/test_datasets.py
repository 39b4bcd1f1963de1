import numpy as np
import pytest
import torch
from conftest import picture

from forensics_lib.datasets import TrainingCrops, chosen_crops, collate, epoch_order, training_loader
from forensics_lib.manifest import build_manifest, usable


@pytest.fixture
def rows(tiny_run):
    return usable(build_manifest(tiny_run, "B"), "train")


def crops(rows, **changes):
    options = {"crop_size": 32, "masks": True, "probability": 0.5, "seed": 0} | changes
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
    dataset = crops(spliced, probability=0.0, crop_size=16)
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
    table = pd.DataFrame([{"path": path, "label": 1, "mask_path": mask, "kind": "sp"}])
    dataset = crops(table, crop_size=64, probability=1.0)
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
