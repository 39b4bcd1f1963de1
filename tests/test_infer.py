import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from forensics_lib import infer as module
from forensics_lib import scoring
from forensics_lib.evaluation import evaluate, evaluate_robustness, stored_thresholds
from forensics_lib.files import update_json
from forensics_lib.infer import InferenceError, Shards, infer
from forensics_lib.inference import BrokenModelError, load_mask
from forensics_lib.manifest import build_manifest
from forensics_lib.metrics import written_mask
from forensics_lib.model import build_model, save_checkpoint
from forensics_lib.predictor import predict
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


def broken(after: int, model_answers):
    """What a model answers, but from the image ``after`` on not a number."""

    def answers(*arguments, **options):
        for number, answer in enumerate(model_answers(*arguments, **options)):
            yield answer if number < after else replace(answer, prob=float("nan"))

    return answers


def test_a_model_that_answers_no_number_is_refused_by_name(trained, monkeypatch):
    run, task = trained
    names = {"A": "predict_probabilities", "B": "predict_masks"}
    for place in (module, scoring):
        monkeypatch.setattr(place, names[task], broken(3, getattr(module, names[task])))
    with pytest.raises(BrokenModelError, match=r"1 of 2 images, such as .*[ab]3\.jpg"):
        infer(run, task)
    assert len(shards(run)) == 1 and not run.test_probs(task).exists()
    assert task == "A" or not (run.masks / "b3.npz").exists()
    for score in (evaluate, evaluate_robustness):
        with pytest.raises(BrokenModelError, match="images, such as"):
            score(run, task, build_manifest(run, task))


def test_answers_that_are_no_numbers_in_shards_of_an_earlier_version_are_refused(trained):
    run, task = trained
    infer(run, task)
    path = shards(run)[1]
    table = pd.read_parquet(path)
    table.assign(prob=np.nan).to_parquet(path)
    with pytest.raises(InferenceError, match=r"2 of 4 images, such as .*2\.jpg.*remove it and infer again"):
        infer(run, task)


def test_weights_that_are_not_finite_are_refused_and_unreadable_images_are_not_their_fault(tiny_run, tmp_path):
    (tiny_run.test_folder("A") / "junk.jpg").write_bytes(b"junk")
    (tiny_run.test_folder("B") / "junk.jpg").write_bytes(b"junk")
    for task in "AB":
        model = build_model(tiny_run.params, task)
        with torch.no_grad():
            next(model.backbone.parameters()).fill_(float("nan"))
        path = tiny_run.finetuned_model(task)
        inference = {"crop_size": 32, "crops_per_image": 1, "tile_size": 64, "tile_overlap": 16}
        save_checkpoint(path, model, thresholds={"threshold": 0.5, "temperature": 1.0}, inference=inference)
        update_json(tiny_run.thresholds, **{task: {"threshold": 0.5, "temperature": 1.0}})
        with pytest.raises(BrokenModelError, match="not a finite number for 4 of 5 images"):
            predict(tiny_run.test_folder(task), path, device="cpu")
        with pytest.raises(BrokenModelError, match=r"images, such as .*0\.jpg"):
            infer(tiny_run, task)


def test_written_masks_hold_no_value_that_a_threshold_may_have(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    evaluate(tiny_run, "B", manifest)
    infer(tiny_run, "B")
    for path in tiny_run.masks.glob("*.npz"):
        mask = load_mask(path)
        assert np.array_equal(written_mask(mask), mask) and len(np.unique(mask)) > 5
        threshold = stored_thresholds(tiny_run, "B")["loc_threshold"]
        assert np.array_equal(mask > threshold, mask >= threshold)
        assert np.array_equal(mask > threshold, mask.astype(np.float64) > threshold)
