import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture, save

from forensics_lib import training
from forensics_lib.evaluation import evaluate, evaluate_held_out, infer, mask_examples, mask_names, stored_thresholds
from forensics_lib.files import read_json
from forensics_lib.images import ImageError
from forensics_lib.inference import load_mask
from forensics_lib.layouts import LayoutError
from forensics_lib.manifest import build_manifest
from forensics_lib.model import read_checkpoint
from forensics_lib.runs import Run
from forensics_lib.training import mask_loss, read_metrics, train


def changed(run: Run, **values) -> Run:
    return Run(run.params.model_copy(update=values), run.data)


@pytest.mark.parametrize("task", ["A", "B"])
def test_both_steps_leave_their_files(tiny_run, task):
    manifest = build_manifest(tiny_run, task)
    metrics = train(tiny_run, task, manifest)
    assert metrics["step"].tolist() == ["head", "finetune"]
    assert (
        tiny_run.classifier_model(task).name == {"A": "tiny_classifier_model.pth", "B": "tiny_taskB_classifier_model.pth"}[task]
    )
    head, tuned = read_checkpoint(tiny_run.classifier_model(task)), read_checkpoint(tiny_run.finetuned_model(task))
    assert (head["step"], tuned["step"]) == ("head", "finetune")
    assert head["config"]["task"] == task


def test_step_one_leaves_the_backbone_as_it_was(tiny_run):
    torch.manual_seed(tiny_run.params.seed)
    fresh = training.build_model(tiny_run.params, "A").backbone.state_dict()
    train(tiny_run, "A", build_manifest(tiny_run, "A"))
    trained = read_checkpoint(tiny_run.classifier_model("A"))["model"]
    assert all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in fresh.items())


def test_step_two_starts_from_step_ones_best_and_changes_the_backbone(tiny_run):
    run = changed(tiny_run, epochs_finetune=2, lr_finetune=0.01)
    train(run, "A", build_manifest(run, "A"))
    head, last = read_checkpoint(run.classifier_model("A")), read_checkpoint(run.folder / "checkpoints" / "taskA_state.pt")
    assert any(not torch.equal(head["model"][k], last["model"][k]) for k in head["model"] if k.startswith("backbone.stages"))


def test_a_finished_training_is_not_done_again_unless_something_changed(tiny_run, capsys):
    manifest = build_manifest(tiny_run, "A")
    train(tiny_run, "A", manifest)
    before = tiny_run.finetuned_model("A").read_bytes()
    capsys.readouterr()
    train(tiny_run, "A", manifest)
    assert "taking up" in capsys.readouterr().out
    assert tiny_run.finetuned_model("A").read_bytes() == before
    evaluate(tiny_run, "A", manifest)
    train(changed(tiny_run, lr_head=0.5, epochs_finetune=0), "A", manifest)
    assert "starting anew" in capsys.readouterr().out
    assert not tiny_run.val_probs("A").exists(), "results of the old training must not outlive it"
    with pytest.raises(FileNotFoundError):
        stored_thresholds(tiny_run, "A")


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_training_goes_on_and_ends_the_same(tiny_run, monkeypatch, stop_after):
    run = changed(tiny_run, epochs_head=2, epochs_finetune=2)
    manifest = build_manifest(run, "A")
    train(run, "A", manifest)
    expected = read_checkpoint(run.finetuned_model("A"))["model"], read_metrics(run, "A")["train_loss"].tolist()
    again = changed(run, run_name="again")
    calls, original = [], training._train_epoch

    def stops(*arguments):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(training, "_train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train(again, "A", manifest)
    assert not again.finetuned_model("A").exists(), "an unfinished step has no public file"
    monkeypatch.setattr(training, "_train_epoch", original)
    train(again, "A", manifest)
    resumed = read_checkpoint(again.finetuned_model("A"))["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in expected[0].items())
    assert read_metrics(again, "A")["train_loss"].tolist() == expected[1]


def spoil(path) -> None:
    """Leave the header and the end as they are, and make the pixels between unreadable."""
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(200) + data[1200:])


def test_corrupt_training_and_validation_images_are_counted(tiny_run, capsys):
    folder = tiny_run.data / "dataset"
    for split in ("train", "val"):
        path = folder / split / "1_fake" / "src" / "1_fake0.png"
        spoil(path)
    manifest = build_manifest(tiny_run, "A")
    train(tiny_run, "A", manifest)
    assert "1 training image(s) could not be read" in capsys.readouterr().out
    evaluation = evaluate(tiny_run, "A", manifest)
    assert len(evaluation.table) == 7
    facts = read_json(tiny_run.folder / "run.json")
    assert "1_fake0.png" in facts["taskA_unreadable_in_training"][0]
    assert "1_fake0.png" in facts["taskA_left_out"][0]


def test_validation_without_a_readable_class_is_an_error(tiny_run):
    for path in (tiny_run.data / "dataset" / "val" / "1_fake" / "src").iterdir():
        spoil(path)
    with pytest.raises(ImageError, match=r"both classes; 4 could not be read: .*1_fake0\.png"):
        train(tiny_run, "A", build_manifest(tiny_run, "A"))


def test_a_loss_that_is_not_finite_names_the_files(tiny_run, monkeypatch):
    monkeypatch.setattr(training, "_loss", lambda fit, batch, mix: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match=r"src/\d_\w+\.png"):
        train(tiny_run, "A", build_manifest(tiny_run, "A"))


def test_mask_loss_rewards_the_truth_and_is_finite_without_one():
    truth = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    truth[0, 0, :4] = True
    right, wrong = (truth.float() * 20 - 10), (10 - truth.float() * 20)
    assert mask_loss(right, truth) < 0.01 < mask_loss(wrong, truth)
    assert torch.isfinite(mask_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)))


def test_validation_writes_probabilities_and_thresholds(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    evaluation = evaluate(tiny_run, "B", manifest)
    written = pd.read_csv(tiny_run.val_probs("B"))
    assert written.columns[:2].tolist() == ["image_id", "prob"]
    assert len(written) == len(evaluation.table) == 10
    thresholds = stored_thresholds(tiny_run, "B")
    assert set(thresholds) == {"threshold", "loc_threshold"}
    assert read_checkpoint(tiny_run.finetuned_model("B"))["thresholds"] == thresholds
    assert {"iou_manipulated", "iou_all", "flagged_authentic"} <= set(evaluation.metrics)
    assert evaluation.without_overlap["images"] == 6, "four images show photographs that TGIF's training split holds too"
    assert evaluation.summary().columns.tolist() == ["all images", "without overlap"]
    held_out = evaluate_held_out(tiny_run, "B", manifest)
    assert set(held_out.table["split"]) == {"test"}
    assert held_out.thresholds == thresholds
    assert evaluation.by("source", "kind")["images"].sum() == 10
    assert all(example.truth.any() for example in mask_examples(tiny_run, evaluation, 3))


def test_inference_covers_every_test_image(tiny_run, rng):
    manifest = build_manifest(tiny_run, "B")
    train(tiny_run, "B", manifest)
    evaluate(tiny_run, "B", manifest)
    folder = tiny_run.test_folder("B")
    cut = save(folder / "cut.png", picture(rng, 64, 48))
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "junk.jpg").write_bytes(b"junk")
    save(folder / "UPPER.PNG", picture(rng, 20, 30))
    (tiny_run.masks).mkdir(parents=True)
    (tiny_run.masks / "stale.npz").write_bytes(b"of another inference")
    table = infer(tiny_run, "B")
    assert table["image_id"].tolist() == sorted(path.name for path in folder.iterdir())
    assert pd.read_csv(tiny_run.test_probs("B")).columns.tolist() == ["image_id", "prob"]
    assert set(table.loc[table["error"].notna(), "image_id"]) == {"cut.png", "junk.jpg"}
    assert (table.loc[table["error"].notna(), "prob"] == 0.5).all()
    assert {path.name for path in tiny_run.masks.iterdir()} == {f"{name.rsplit('.')[0]}.npz" for name in table["image_id"]}
    assert load_mask(tiny_run.masks / "cut.npz").shape == (64, 48)
    assert not load_mask(tiny_run.masks / "cut.npz").any()
    assert load_mask(tiny_run.masks / "UPPER.npz").shape == (20, 30)


def test_names_that_would_share_a_mask_are_named():
    with pytest.raises(LayoutError, match=r"x\.jpg and x\.png"):
        mask_names(["f/x.jpg", "f/x.png"])


def test_without_a_threshold_the_way_out_is_named(tiny_run):
    with pytest.raises(FileNotFoundError, match="training notebook"):
        stored_thresholds(tiny_run, "A")


def test_metrics_are_lines_of_json_while_training_runs(tiny_run):
    train(tiny_run, "A", build_manifest(tiny_run, "A"))
    lines = tiny_run.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ["head", "finetune"]
    assert np.isfinite([json.loads(line)["train_loss"] for line in lines]).all()
