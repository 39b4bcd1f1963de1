import itertools
import multiprocessing
import os
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EVERYTHING, NOTHING, picture, save

from forensics_lib.data import datasets
from forensics_lib.data.datasets import (
    Columns,
    TrainingBatches,
    TrainingCrops,
    collate,
    drawing_strata,
    epoch_order,
    numbered_draws,
)
from forensics_lib.data.manifest import build_manifest, usable
from forensics_lib.device import Machine
from forensics_lib.params import Degradations, Params


@pytest.fixture
def rows(tiny_run):
    return usable(build_manifest(tiny_run, "B"), "train")


def crops(rows, **changes):
    options = {"crop_size": 32, "masks": True, "degradations": Degradations()} | changes
    return TrainingCrops(rows, **options)


def test_crops_have_the_asked_size_and_masks_go_with_them(rows):
    dataset = crops(rows)
    for sample in (dataset[0, index, 0] for index in range(len(dataset))):
        assert sample["image"].shape == (3, 32, 32)
        assert sample["image"].dtype == torch.uint8
        assert sample["mask"].shape == (1, 32, 32)


def test_a_crop_depends_on_its_seed_alone(rows):
    first, again = crops(rows), crops(rows)
    assert torch.equal(first[0, 3, 0]["image"], again[0, 3, 0]["image"])
    assert not torch.equal(first[0, 3, 0]["image"], again[1, 3, 0]["image"])


@pytest.fixture
def batches_of(rows):
    """Makes ``TrainingBatches``, which end with the test."""
    with ExitStack() as made:
        yield lambda workers: made.enter_context(closing(TrainingBatches(crops(rows), workers)))


def test_workers_change_nothing(rows, batches_of):
    order = np.arange(len(rows))
    batches = [next(iter(batches_of(workers).epoch(0, [numbered_draws(order)]))) for workers in (0, 2)]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert batches[0]["index"] == batches[1]["index"] == order.tolist()


def loader_processes():
    """The processes of loaders, which are daemons; pools of other tests in this process (loky's) are none."""
    return {process for process in multiprocessing.active_children() if process.daemon}


def test_loader_processes_serve_every_epoch(rows, batches_of):
    """Also after an epoch that was left in its middle; each sample is what its seed says, and no number is drawn."""
    source, batches = batches_of(2), [numbered_draws(np.array(indices)) for indices in ([0, 1], [2, 3], [1, 3])]
    random = torch.get_rng_state()
    next(iter(source.epoch(0, batches)))
    processes = loader_processes()
    assert len(processes) == 2
    for seed, wanted in ((1, batches), (2, batches[1:])):
        made = list(source.epoch(seed, wanted))
        assert [batch["index"] for batch in made] == [batch[:, 0].tolist() for batch in wanted]
        assert torch.equal(made[1]["image"], torch.stack([crops(rows)[seed, index, 0]["image"] for index in wanted[1][:, 0]]))
    assert torch.equal(torch.get_rng_state(), random)
    assert loader_processes() == processes
    source.close()
    assert not loader_processes()


@pytest.mark.parametrize(("on_cpu", "below"), [(True, 10), (False, 0)])
def test_loader_processes_yield_to_a_network_on_the_same_cpu(rows, on_cpu, below):
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with closing(TrainingBatches(crops(rows), 2, on_cpu=on_cpu)) as batches:
        list(batches.epoch(0, [numbered_draws(np.array([index])) for index in (0, 1)]))  # both processes have begun
        priorities = {os.getpriority(os.PRIO_PROCESS, process.pid) for process in loader_processes()}
    assert priorities == {min(usual + below, 19)}


def test_few_images_are_loaded_without_processes(rows, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "DataLoader", lambda images, num_workers, **_: asked.append(num_workers) or [])
    for images in (4, 25, 600):
        machine = Machine(torch.device("cpu"), "fp32", workers=2)
        list(datasets.stream(datasets.InferenceImages(pd.concat([rows] * images).head(images)), machine))
    assert asked == [0, 1, 2]


def test_a_share_of_a_batch_may_be_empty(batches_of):
    first, second = batches_of(0).epoch(0, [numbered_draws(np.array([2, 0])), np.zeros((0, 2), int)])
    assert first["index"] == [2, 0]
    assert second["index"] == second["errors"] == []


def test_a_spliced_crop_without_its_region_is_authentic(rows):
    spliced = rows[rows["kind"] == "sp"].reset_index(drop=True)
    dataset = crops(spliced, degradations=NOTHING, crop_size=16)
    labels = []
    for seed in range(30):
        for sample in (dataset[seed, index, 0] for index in range(len(dataset))):
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
    for seed in range(20):
        sample = dataset[seed, 0, 0]
        bright = sample["image"].float().mean(0) > 127
        assert (bright == sample["mask"][0]).float().mean() > 0.93


def test_unreadable_files_are_reported_and_the_rest_goes_on(rows):
    rows = rows.copy()
    rows.loc[0, "path"] = "/nowhere.png"
    batch = collate([crops(rows)[0, i, 0] for i in range(len(rows))])
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
    plain = crops(table.iloc[:1], **options, equalize=True)[0, 0, 0]["image"].float()
    history = crops(table, **options, equalize=True)[0, 0, 0]["image"].float()
    assert (history - plain).abs().mean() > 5


def test_sources_of_a_class_are_drawn_equally_often():
    labels = np.array([0] * 50 + [1] * 50)
    sources = np.array(["a"] * 45 + ["b"] * 5 + ["c"] * 50)
    drawn = epoch_order(labels, 0, 0, sources)
    assert len(drawn) == 100 and labels[drawn].sum() == 50
    assert (sources[drawn] == "b").sum() == 25
    assert len(set(drawn[labels[drawn] == 1])) == 50, "a single source is drawn without repetition"


def test_crops_show_regions_borders_and_authentic_places(tmp_path, rng):
    mask = np.zeros((400, 400), np.uint8)
    mask[150:250, 150:250] = 255
    files = [save(tmp_path / "a.png", picture(rng, 400, 400)), save(tmp_path / "m.png", mask)]
    rows = pd.DataFrame({"path": str(files[0]), "label": 1, "mask_path": str(files[1]), "kind": "sp"}, index=[0])
    rows = rows.assign(format="PNG", jpeg_quality=np.nan, width=400.0, height=400.0)
    crops = TrainingCrops(rows, 64, masks=True, degradations=NOTHING)
    shares = np.array([crops[seed, 0, 0]["mask"].float().mean().item() for seed in range(150)])
    assert (shares == 0).mean() > 0.05
    assert (shares == 1).any()
    assert ((shares > 0) & (shares < 1)).mean() > 0.4


def test_pasted_regions_are_marked_and_count_as_manipulated(rows):
    authentic = rows.assign(label=0, mask_path=None, kind="orig")
    crops = TrainingCrops(authentic, 48, masks=True, degradations=NOTHING, paste=1.0)
    plain = TrainingCrops(authentic, 48, masks=True, degradations=NOTHING)
    samples = [crops[0, index, 0] for index in range(len(authentic))]
    assert any(sample["label"] for sample in samples)
    assert all(sample["label"] == int(sample["mask"].any()) for sample in samples)
    assert not any(plain[0, index, 0]["mask"].any() for index in range(len(authentic)))


@pytest.mark.parametrize("readable", [True, False])
def test_half_of_the_pasted_regions_come_from_synthetic_images(rows, tmp_path, readable):
    save(tmp_path / "red.png", np.full((80, 80, 3), (255, 0, 0), np.uint8))
    if not readable:
        (tmp_path / "red.png").write_bytes(b"no image")
    authentic = rows.assign(label=0, mask_path=None, kind="orig")
    donors = pd.DataFrame({"path": [str(tmp_path / "red.png")]})
    crops = TrainingCrops(authentic, 48, masks=True, degradations=NOTHING, paste=1.0, donors=donors)
    samples = [crops[seed, index, 0] for seed in range(12) for index in range(len(authentic))]
    marked = [sample["image"].numpy()[:, sample["mask"][0].numpy()] for sample in samples if sample["mask"].sum() > 50]
    reds = np.mean([np.median(pixels[0].astype(int) - pixels[1]) > 200 for pixels in marked])
    assert 0.2 < reds < 0.5 if readable else reds == 0  # a third is matched in colour


def test_half_of_the_squares_are_shrunk_from_larger_ones(tmp_path):
    ramp = np.repeat(np.arange(512)[None, :, None] // 2, 512, 0).repeat(3, 2).astype(np.uint8)
    mask = ramp[..., 0] >= 128
    save(tmp_path / "ramp.png", ramp)
    save(tmp_path / "mask.png", mask.astype(np.uint8) * 255)
    facts = {"path": str(tmp_path / "ramp.png"), "mask_path": str(tmp_path / "mask.png"), "format": "PNG", "kind": "sp"}
    row = pd.DataFrame([facts | {"label": 1, "width": 512, "height": 512, "jpeg_quality": np.nan}])
    small = row.assign(width=64, height=64)  # what sets the common size of squares
    spans = {}
    for task in "AB":
        crops = TrainingCrops(pd.concat([row, small], ignore_index=True), 64, NOTHING, masks=task == "B")
        samples = [crops[seed, 0, 0] for seed in range(200)]
        spans[task] = np.array([np.ptp(sample["image"][0].numpy().astype(int)) for sample in samples])
        for sample in samples if task == "B" else []:
            grey = sample["image"][0].numpy().astype(int)
            clear = np.abs(grey - 127.5) > 6
            assert (sample["mask"][0].numpy() == (grey >= 128))[clear].all(), "the mask is shrunk with its image"
    assert 0.4 < (spans["A"] > 250).mean() < 0.6, "Task A sees half of the images whole"
    assert ((spans["A"] <= 32) | (spans["A"] > 250)).all(), "and the others in native pixels"
    assert 0.35 < (spans["B"] > 34).mean() < 0.6 and 110 < spans["B"].max() <= 128


def test_spliced_and_regenerated_images_are_drawn_equally_often():
    rows = pd.DataFrame({"label": [0] * 40 + [1] * 60, "kind": ["orig"] * 40 + ["sp"] * 10 + ["fr"] * 50, "source": "s"})
    drawn = rows.iloc[epoch_order(rows["label"].to_numpy(), 0, 0, *drawing_strata(rows, "B", Params()))]
    assert drawn["kind"].value_counts().to_dict() == {"orig": 50, "sp": 25, "fr": 25}
    one_kind = rows[rows["kind"] != "fr"].reset_index(drop=True)
    order = epoch_order(one_kind["label"].to_numpy(), 0, 0, *drawing_strata(one_kind, "B", Params()))
    assert (one_kind["label"].iloc[order] == 1).sum() == 25


def test_an_image_drawn_again_in_an_epoch_gives_another_crop(rows):
    labels = np.array([0] + [1] * 7)
    draws = numbered_draws(epoch_order(labels, 0, 0))
    again = draws[draws[:, 0] == 0]
    assert sorted(again[:, 1]) == [0, 1, 2, 3], "one authentic image makes half of the epoch"
    dataset = crops(rows)
    samples = [dataset[0, index, draw]["image"] for index, draw in again.tolist()]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(samples, 2))


def test_keys_of_an_epoch_differ_within_each_batch_and_over_all(rows, batches_of):
    labels = np.array([0] * 2 + [1] * 30)
    draws = numbered_draws(epoch_order(labels, 3, 1))
    source = batches_of(0)
    source.epoch(10**15, [draws[:20], draws[20:]])
    keys = [key for batch in source for key in batch]
    assert len(keys) == len(set(keys)) == 32
    assert {seed for seed, _, _ in keys} == {10**15}


def test_rows_are_columns_with_missing_values_as_none():
    table = pd.DataFrame({"path": [f"/data/{i}.png" for i in range(5)], "label": range(5), "mask_path": [None] * 4 + ["m"]})
    columns = Columns(table, list(table))
    assert len(columns) == 5
    assert columns.row(3) == {"path": "/data/3.png", "label": 3, "mask_path": None}
    assert columns.row(4)["mask_path"] == "m"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's account of a process's memory")
def test_a_loader_process_copies_no_rows():
    columns = Columns(pd.DataFrame({"path": [f"/data/{i:060d}.png" for i in range(200_000)]}), ["path"])
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    process = context.Process(target=_memory_copied_by_reading, args=(columns, found))
    process.start()
    copied = found.get(timeout=600)
    process.join()
    assert copied < 8e6, "as Python's strings they would be 25 MB"


def _memory_copied_by_reading(columns, found):
    before = _private_bytes()
    for index in range(len(columns)):
        columns.row(index)
    found.put(_private_bytes() - before)


def _private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))
