import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import beside, changed, picture, save, wait_until
from filelock import FileLock
from PIL import Image
from scipy.special import logit

from forensics_lib.data.manifest import build_manifest
from forensics_lib.evaluation import predictions as scoring
from forensics_lib.evaluation.evaluate import evaluate, evaluate_robustness
from forensics_lib.images.masks import load_mask, written_mask
from forensics_lib.inference import shards as module
from forensics_lib.inference.predictor import predict
from forensics_lib.inference.probabilities import BrokenModelError
from forensics_lib.inference.shards import InferenceError, Shards, infer
from forensics_lib.models.checkpoint import read_checkpoint, save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.run import Run, open_run, stored_thresholds
from forensics_lib.submission.build import SubmissionError, build_submission
from forensics_lib.utils.files import WriteError, read_json, update_json

OTHERS = {  # other values than the tiny run's, of what a task's predictions depend on
    "A": {"crop_size": 64, "crops_per_image": 1},
    "B": {"crop_size": 64, "tile_size": 96, "mask_scales": [1.0, 0.5], "mask_flips": True, "copy_move": True},
}


@pytest.fixture(params=["A", "B"])
def trained_run(request, trained, monkeypatch) -> tuple[Run, str]:
    """The tiny run, trained and evaluated, with its task."""
    monkeypatch.setattr(module, "SHARDS", 2)  # two shards of two images
    return trained(request.param)[0], request.param


def shards(run: Run) -> list:
    return sorted((run.folder / "shards").rglob("*.parquet"))


def test_only_what_is_missing_is_done_again(trained_run, capsys):
    run, task = trained_run
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


def test_other_images_or_parameters_begin_anew(trained_run):
    run, task = trained_run
    infer(run, task)
    before = shards(run)
    name = "a" if task == "A" else "b"
    folder = run.test_folder(task)
    shutil.copy(folder / f"{name}0.jpg", folder / f"{name}9.jpg")
    assert len(infer(run, task)) == 5
    assert not set(shards(run)) & set(before)
    before = shards(run)
    other = changed(run, **OTHERS[task])
    evaluate(other, task, build_manifest(other, task))
    infer(other, task)
    assert not set(shards(run)) & set(before)


def test_an_image_that_another_of_the_same_size_replaced_is_predicted_anew(trained_run):
    run, task = trained_run
    path = next(iter(sorted(run.test_folder(task).iterdir())))
    image = Image.open(path).convert("RGB")
    path.unlink()
    other = path.with_suffix(".bmp")
    image.save(other)
    infer(run, task)
    Image.eval(image, lambda value: 255 - value).save(other)
    before = set(shards(run))
    infer(run, task)
    assert not before & set(shards(run))


def test_thresholds_hold_for_the_settings_that_they_were_chosen_with(trained_run, capsys):
    """In force on the present version's files, and on those that name settings in the checkpoint alone."""
    run, task = trained_run
    expected = infer(run, task)
    written = run.test_probs(task).read_bytes()
    for _ in range(2):
        for key, value in OTHERS[task].items():
            with pytest.raises(InferenceError) as caught:
                infer(changed(run, **{key: value}), task)
            said = str(caught.value)
            assert f"{key}: {getattr(run.params, key)} there, {value} here" in said
            assert f"{key}=" in said and f"notebook 0{2 if task == 'A' else 3}" in said and "'train'" in said
        with pytest.raises(InferenceError) as caught:
            infer(changed(run, **OTHERS[task]), task)
        assert all(f"{key}: " in str(caught.value) for key in OTHERS[task]), "all of them are named at once"
        assert run.test_probs(task).read_bytes() == written, "a refused inference changes nothing"
        of_other_task = {key: value for key, value in OTHERS["B" if task == "A" else "A"].items() if key not in OTHERS[task]}
        elsewhere = changed(run, **of_other_task | {"batch_size": 2})
        pd.testing.assert_frame_equal(infer(elsewhere, task), expected)
        facts = read_json(run.thresholds)[task]
        update_json(run.thresholds, **{task: {key: facts[key] for key in facts if key not in ("inference", "precision")}})


def test_another_precision_is_said(trained_run, capsys):
    run, task = trained_run
    update_json(run.thresholds, **{task: read_json(run.thresholds)[task] | {"precision": "bf16"}})
    infer(run, task)
    assert "thresholds were chosen in bf16, this machine predicts in fp32" in capsys.readouterr().out


def test_a_model_that_was_trained_since_has_no_thresholds(trained_run):
    run, task = trained_run
    content = read_checkpoint(run.finetuned_model(task))
    del content["thresholds"]
    torch.save(content, run.finetuned_model(task))
    with pytest.raises(InferenceError, match="trained after the thresholds"):
        infer(run, task)


def test_thresholds_chosen_anew_ask_for_another_inference(trained_run):
    run, task = trained_run
    infer(run, task)
    other = changed(run, **OTHERS[task])
    evaluate(other, task, build_manifest(other, task))
    with pytest.raises(SubmissionError, match="run 04_infer"):
        build_submission(other, task)
    infer(other, task)
    assert build_submission(other, task).valid


def test_settings_chosen_anew_ask_for_another_inference_where_thresholds_stay(trained_run):
    run, task = trained_run
    infer(run, task)
    kept = read_json(run.thresholds)[task]
    update_json(run.thresholds, **{task: kept | {"inference": kept["inference"] | {"new": 1}}})
    with pytest.raises(SubmissionError, match="chosen anew"):
        build_submission(run, task)


@pytest.mark.parametrize("values", [{"run_type": "open"}, {"sample": True}])
def test_a_run_is_submitted_as_what_it_was_trained_as(values, trained_run):
    run, task = trained_run
    infer(run, task)
    other = changed(run, **values)
    for step in (infer, build_submission):
        with pytest.raises(ValueError, match=f"was trained with {next(iter(values))}"):
            step(other, task)
    assert build_submission(run, task).valid


def test_untrained_runs_name_those_that_are_trained(trained_run):
    run, task = trained_run
    run.record(params_file="params/mine.yaml", taskA_trained=None, taskB_trained=None)
    with pytest.raises(FileNotFoundError) as caught:
        infer(changed(run, run_name="other"), task)
    said = str(caught.value)
    assert f"run other is not trained for Task {task}" in said and "run the training notebook of this run first" in said
    assert "tiny (params_file: params/mine.yaml)" in said
    run.thresholds.unlink()
    with pytest.raises(FileNotFoundError, match=r"No run in outputs/ is"):
        infer(run, task)


def infer_in_two_shards(file: Path, task: str) -> None:
    module.SHARDS = 2
    print(len(infer(open_run(str(file)), task)))


@pytest.mark.slow
def test_two_inferences_at_once_take_turns(trained_run, tmp_path):
    """The second waits and takes up the first one's shards; with other test images it does its own, unmixed."""
    run, task = trained_run
    other = tmp_path / "others"
    shutil.copytree(run.test_folder(task), other)
    (other / "extra.jpg").write_bytes(next(other.iterdir()).read_bytes())
    lock = FileLock(run.folder / "shards" / f"task{task}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    files = [run.write_params().rename(tmp_path / "first.yaml")]
    values = {f"test_folder_{task.lower()}": str(other)}
    files.append(changed(run, **values).write_params().rename(tmp_path / "second.yaml"))
    said = [file.with_suffix(".txt") for file in files]
    with lock:
        both = [beside(infer_in_two_shards, file, task, said=out) for file, out in zip(files, said, strict=True)]
        wait_until(lambda: all(out.exists() and "is being predicted by another process" in out.read_text() for out in said))
    for process in both:
        process.join(300)
    assert [out.read_text().splitlines()[-1] for out in said] == ["4", "5"]
    assert len({path.parent for path in shards(run)}) == 1
    assert len(pd.read_csv(run.test_probs(task))) == sum(len(pd.read_parquet(path)) for path in shards(run))


def test_shards_that_are_not_the_folders_are_refused(trained_run):
    run, task = trained_run
    infer(run, task)
    first, second = shards(run)
    second.replace(first)
    shutil.copy(first, second)
    with pytest.raises(InferenceError, match="differ"):
        infer(run, task)


@pytest.mark.parametrize("trained_run", ["B"], indirect=True)
def test_a_lost_mask_is_made_again(trained_run):
    run, task = trained_run
    infer(run, task)
    mask = run.masks / "b1.npz"
    before = load_mask(mask)
    mask.unlink()
    infer(run, task)
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


def test_a_model_that_answers_no_number_is_refused_by_name(trained_run, monkeypatch):
    run, task = trained_run
    for place in (module, scoring):
        monkeypatch.setattr(place, "predictions", broken(3, module.predictions))
    with pytest.raises(BrokenModelError, match=r"1 of 2 images, such as .*[ab]3\.jpg"):
        infer(run, task)
    assert len(shards(run)) == 1 and not run.test_probs(task).exists()
    assert task == "A" or not (run.masks / "b3.npz").exists()
    for score in (evaluate, evaluate_robustness):
        with pytest.raises(BrokenModelError, match="images, such as"):
            score(run, task, build_manifest(run, task))


def test_answers_that_are_no_numbers_in_shards_of_an_earlier_version_are_refused(trained_run):
    run, task = trained_run
    infer(run, task)
    path = shards(run)[1]
    table = pd.read_parquet(path)
    table.assign(prob=np.nan).to_parquet(path)
    with pytest.raises(InferenceError, match=r"2 of 4 images, such as .*2\.jpg.*remove it and infer again"):
        infer(run, task)


@pytest.mark.parametrize("trained_run", ["B"], indirect=True)
def test_a_mask_that_cannot_be_written_ends_the_inference_before_its_shard_counts(trained_run, monkeypatch):
    run, task = trained_run

    def fails(path, mask):
        raise WriteError(f"no room for {path.name}")

    infer(run, task)
    first = sorted(run.masks.glob("*.npz"))[0]
    first.unlink()
    with monkeypatch.context() as patched, pytest.raises(WriteError, match=f"no room for {first.name}"):
        patched.setattr("forensics_lib.inference.shards.save_mask", fails)
        infer(run, task)
    assert infer(run, task)["error"].isna().all() and first.is_file()


def test_weights_that_are_not_finite_are_refused_and_unreadable_images_are_not_their_fault(tiny_run, tmp_path):
    (tiny_run.test_folder("A") / "junk.jpg").write_bytes(b"junk")
    (tiny_run.test_folder("B") / "junk.jpg").write_bytes(b"junk")
    for task in "AB":
        model = build_model(tiny_run.params, task)
        with torch.no_grad():
            next(model.backbone.parameters()).fill_(float("nan"))
        path = tiny_run.finetuned_model(task)
        inference = {"crop_size": 32, "crops_per_image": 2, "tile_size": 64}
        save_checkpoint(path, model, thresholds={"threshold": 0.5, "temperature": 1.0}, inference=inference)
        update_json(tiny_run.thresholds, **{task: {"threshold": 0.5, "temperature": 1.0}})
        with pytest.raises(BrokenModelError, match="not a finite number for 4 of 5 images"):
            predict(tiny_run.test_folder(task), path, device="cpu")
        with pytest.raises(BrokenModelError, match=r"images, such as .*0\.jpg"):
            infer(tiny_run, task)


@pytest.mark.parametrize("trained_run", ["B"], indirect=True)
def test_written_masks_hold_no_value_that_a_threshold_may_have(trained_run):
    run, _ = trained_run
    infer(run, "B")
    for path in run.masks.glob("*.npz"):
        mask = load_mask(path)
        assert np.array_equal(written_mask(mask), mask) and len(np.unique(mask)) > 5
        threshold = stored_thresholds(run, "B").loc_threshold
        assert np.array_equal(mask > threshold, mask >= threshold)
        assert np.array_equal(mask > threshold, mask.astype(np.float64) > threshold)


def test_inference_covers_every_test_image(trained, rng):
    run, _ = trained("B")
    folder = run.test_folder("B")
    cut = save(folder / "cut.png", picture(rng, 64, 48))
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "junk.jpg").write_bytes(b"junk")
    save(folder / "UPPER.PNG", picture(rng, 20, 30))
    (run.masks).mkdir(parents=True)
    (run.masks / "stale.npz").write_bytes(b"of another inference")
    table = infer(run, "B")
    assert table["image_id"].tolist() == sorted(path.name for path in folder.iterdir())
    assert pd.read_csv(run.test_probs("B")).columns.tolist() == ["image_id", "prob"]
    assert set(table.loc[table["error"].notna(), "image_id"]) == {"cut.png", "junk.jpg"}
    assert (table.loc[table["error"].notna(), "prob"] == 0.5).all()
    assert {path.name for path in run.masks.iterdir()} == {f"{name.rsplit('.')[0]}.npz" for name in table["image_id"]}
    assert load_mask(run.masks / "cut.npz").shape == (64, 48)
    assert not load_mask(run.masks / "cut.npz").any()
    assert load_mask(run.masks / "UPPER.npz").shape == (20, 30)


def test_calibrated_probabilities_are_what_is_written_for_test_images(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    plain = infer(run, "A")["prob"]
    stored = json.loads(run.thresholds.read_text())
    assert stored["A"]["temperature"] == evaluation.thresholds.temperature
    assert stored["A"]["intercept"] == evaluation.thresholds.intercept
    before = {key: stored["A"].pop(key) for key in ("temperature", "intercept")}
    stored["A"]["temperature"] = 2.0  # alone, as a run of a version that fitted no intercept left it
    run.thresholds.write_text(json.dumps(stored))
    again = logit(infer(run, "A")["prob"]) * 2
    np.testing.assert_allclose(logit(plain), again / before["temperature"] + before["intercept"], atol=1e-4)
