import shutil

import numpy as np
import pandas as pd
import pytest

from forensics_lib import infer as module
from forensics_lib.evaluation import evaluate
from forensics_lib.files import update_json
from forensics_lib.infer import InferenceError, Shards, infer
from forensics_lib.inference import load_mask
from forensics_lib.manifest import build_manifest
from forensics_lib.runs import Run
from forensics_lib.training import train


@pytest.fixture(params=["A", "B"])
def trained(request, tiny_run, monkeypatch) -> tuple[Run, str]:
    monkeypatch.setattr(module, "SHARDS", 2)  # two shards of two images
    manifest = build_manifest(tiny_run, request.param)
    train(tiny_run, request.param, manifest)
    evaluate(tiny_run, request.param, manifest)
    return tiny_run, request.param


def shards(run: Run) -> list:
    return sorted((run.folder / "shards").rglob("*.parquet"))


def test_only_what_is_missing_is_done_again(trained, capsys):
    run, task = trained
    first = infer(run, task)
    kept, gone = shards(run)
    before = kept.stat().st_mtime_ns
    gone.unlink()
    capsys.readouterr()
    again = infer(run, task)
    pd.testing.assert_frame_equal(again, first)
    assert "1 of 2 shards are done already" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    assert gone.is_file()


def test_other_images_or_parameters_begin_anew(trained):
    run, task = trained
    infer(run, task)
    before = shards(run)
    name = "a" if task == "A" else "b"
    folder = run.test_folder(task)
    shutil.copy(folder / f"{name}0.jpg", folder / f"{name}9.jpg")
    assert len(infer(run, task)) == 5
    assert not set(shards(run)) & set(before)
    before = shards(run)
    infer(Run(run.params.model_copy(update={"crops_per_image": 1}), run.data), task)
    assert not set(shards(run)) & set(before)


def test_shards_that_are_not_the_folders_are_refused(trained):
    run, task = trained
    infer(run, task)
    first, second = shards(run)
    second.replace(first)
    shutil.copy(first, second)
    with pytest.raises(InferenceError, match="differ"):
        infer(run, task)


def test_thresholds_of_an_older_version_are_refused(trained):
    run, task = trained
    update_json(run.thresholds, **{task: {"threshold": 0.5}})
    with pytest.raises(InferenceError, match="names no temperature"):
        infer(run, task)


def test_a_lost_mask_is_made_again(tiny_run, monkeypatch):
    monkeypatch.setattr(module, "SHARDS", 2)
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    evaluate(tiny_run, "B", manifest)
    infer(tiny_run, "B")
    mask = tiny_run.masks / "b1.npz"
    before = load_mask(mask)
    mask.unlink()
    infer(tiny_run, "B")
    assert np.array_equal(load_mask(mask), before)


@pytest.mark.parametrize(("images", "size"), [(1, 1), (40, 1), (3200, 100), (1_000_000, 1024)])
def test_the_size_of_a_shard_follows_from_the_number_of_images(images, size, tiny_run):
    rows = pd.DataFrame({"path": [f"{i}.jpg" for i in range(images)]})
    found = Shards(tiny_run, "A", rows, "key")
    assert found.size == size
    parts = [found.part(number) for number in range(len(found))]
    assert sum(len(part) for part in parts) == images
    assert all(len(part) for part in parts)
