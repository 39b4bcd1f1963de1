import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import changed, picture, save, train_and_evaluate
from scipy.special import logit

from forensics_lib import device as machine
from forensics_lib.data.layouts import mask_names
from forensics_lib.data.manifest import build_manifest, build_test_manifest, data_fingerprint, usable
from forensics_lib.data.rows import LayoutError
from forensics_lib.evaluation.evaluate import _platform, evaluate, evaluate_held_out, evaluate_robustness
from forensics_lib.evaluation.predictions import Predictions
from forensics_lib.images.io import ImageError
from forensics_lib.images.masks import load_mask
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.models.combined import Output, build_model
from forensics_lib.reports import figures as plots
from forensics_lib.reports.attribution import grad_cam
from forensics_lib.reports.browser import browse_evaluated_masks
from forensics_lib.reports.figures import mask_examples
from forensics_lib.reports.model_card import build_card
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.training import epoch as epochs
from forensics_lib.training import loop as training
from forensics_lib.training.loop import train
from forensics_lib.training.losses import mask_loss
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import read_json, update_json


def contents(run: Run) -> dict[Path, bytes]:
    """What a training and its results are: everything but what is being made and the record of each call."""
    files = [path for path in (run.folder.parent).rglob("*") if path.is_file() and "begun" not in path.parts]
    return {path: path.read_bytes() for path in files if path.suffix != ".lock" and path.name not in (".lock", "run.json")}


@pytest.fixture
def applied(trained):
    """Gives the tiny run, trained, evaluated and applied, with its manifest and its files."""

    def of(task: str) -> tuple[Run, pd.DataFrame, dict[Path, bytes]]:
        run, manifest = trained(task)
        infer(run, task)
        return run, manifest, contents(run)

    return of


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("A", {"tile_size": 96, "mask_flips": True, "crops_per_image": 3, "workers": 1, "mask_weight": 3.0, "paste": 0.0}),
        ("B", {"tile_size": 96, "mask_scales": [0.5, 1.0], "crops_per_image": 3, "precision": "bf16"}),
    ],
)
def test_a_trained_model_stays_where_nothing_changed_that_it_depends_on(task, changes, applied, capsys):
    first, manifest, before = applied(task)
    capsys.readouterr()
    run = changed(first, team="other", tasks=[task], robustness_images=5, decoder_channels=32 if task == "A" else 16, **changes)
    train(run, task, manifest)
    assert "taking up" in capsys.readouterr().out
    assert contents(run) == before
    evaluate(run, task, manifest)
    content = read_checkpoint(run.finetuned_model(task))
    assert content["inference"] == run.params.of_prediction(task), "thresholds hold for images that are looked at so"
    assert len(infer(run, task)) == 4


@pytest.mark.parametrize(("task", "changes"), [("A", {"batch_size": 3}), ("B", {"epochs_head": 0, "mask_weight": 2.0})])
def test_a_training_that_fails_in_its_first_batch_leaves_another_one_s_results(task, changes, tiny_run, monkeypatch, capsys):
    manifest = train_and_evaluate(tiny_run, task)
    infer(tiny_run, task)
    before = contents(tiny_run)
    probs = pd.read_csv(tiny_run.test_probs(task))
    run, loss = changed(tiny_run, **changes), epochs.batch_loss
    monkeypatch.setattr(epochs, "batch_loss", lambda *_: torch.tensor(float("nan")))
    capsys.readouterr()
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            train(run, task, manifest)
    assert next(iter(changes)) in capsys.readouterr().out, "what changed is named"
    assert contents(run) == before
    assert infer(tiny_run, task)["prob"].round(6).tolist() == probs["prob"].tolist()
    monkeypatch.setattr(epochs, "batch_loss", loss)
    train(tiny_run, task, manifest)
    assert "taking up" in capsys.readouterr().out, "the parameters of before find the training of before"
    assert contents(tiny_run) == before

    train(run, task, manifest)
    (place,) = (run.folder / "replaced").iterdir()
    assert str(place) in capsys.readouterr().out
    for path in (run.classifier_model(task), run.finetuned_model(task), run.val_probs(task), run.test_probs(task)):
        assert (place / path.name).read_bytes() == before[path]
        assert not path.exists() or path.read_bytes() != before[path]
    assert (place / f"task{task}_state.pt").read_bytes() == before[run.folder / "checkpoints" / f"task{task}_state.pt"]
    assert (place / "metrics.jsonl").read_bytes() == before[run.metrics]
    assert json.loads((place / "thresholds.json").read_text()) == json.loads(before[run.thresholds])
    assert json.loads(run.thresholds.read_text()) == {}
    assert f"task{task}_validation" in read_json(place / "run.json")
    assert f"task{task}_validation" not in read_json(run.folder / "run.json")
    assert read_history(run, task)["step"].tolist() == (["head", "finetune"] if run.params.epochs_head else ["finetune"])
    assert read_checkpoint(run.classifier_model(task))["step"] == "head"
    assert not list((run.folder / "checkpoints" / "begun").iterdir())
    evaluate(run, task, manifest)
    assert len(infer(run, task)) == 4


def test_a_training_stopped_in_its_first_epoch_goes_on_and_only_then_replaces_another(applied, monkeypatch, capsys):
    first, manifest, before = applied("A")
    run, loss, calls = changed(first, lr_head=0.002), epochs.batch_loss, []
    alone = changed(run, run_name="alone")
    expected = train(alone, "A", manifest)

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(epochs, "batch_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        train(run, "A", manifest)
    assert {path: data for path, data in contents(run).items() if "alone" not in str(path)} == before
    capsys.readouterr()
    metrics = train(run, "A", manifest)
    assert "taking up" in capsys.readouterr().out
    assert len(calls) == len(usable(manifest, "train")) // 4 * 2, "no batch was done twice"
    assert metrics[["train_loss", "val_auc"]].equals(expected[["train_loss", "val_auc"]])
    assert len(list((run.folder / "replaced").iterdir())) == 1


def test_the_other_task_s_results_stay(applied):
    run, _, before = applied("B")
    manifest = train_and_evaluate(run, "A")
    train(changed(run, lr_head=0.002), "A", manifest)
    after = contents(run)
    kept = [path for path in before if path not in (run.thresholds, run.metrics)]
    assert all(after[path] == before[path] for path in kept)
    assert set(read_json(run.thresholds)) == {"B"}
    assert len(read_history(run, "B")) == 2
    assert "taskB_validation" in read_json(run.folder / "run.json")


def as_of_an_earlier_version(run: Run, task: str, manifest: pd.DataFrame) -> Path:
    """Rewrite a training's state as one that held a hash instead of what it was trained with."""
    others = ("run_name", "team", "edition", "tasks", "test_folder_a", "test_folder_b", "workers", "data_root")
    values = run.params.model_dump(exclude={*others, "robustness_images", "processes"})
    rows = pd.concat([usable(manifest, "train"), usable(manifest, "val")])
    text = json.dumps([task, values, data_fingerprint(rows)], sort_keys=True)
    path = run.folder / "checkpoints" / f"task{task}_state.pt"
    state = torch.load(path, weights_only=True) | {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16]}
    for key in ("trained_with", "errors", "seconds", "machine"):
        del state[key]
    torch.save(state, path)
    return path


def test_a_finished_training_of_an_earlier_version_is_taken_up(applied, capsys):
    run, manifest, _ = applied("A")
    as_of_an_earlier_version(run, "A", manifest)
    before, facts = contents(run), read_json(run.folder / "run.json")
    capsys.readouterr()
    train(run, "A", manifest)
    assert "taking up" in capsys.readouterr().out
    assert contents(run) == before
    seconds = "taskA_training_seconds"
    assert read_json(run.folder / "run.json")[seconds] == facts[seconds]


def test_an_unfinished_training_of_an_earlier_version_is_kept_aside(applied, capsys):
    run, manifest, _ = applied("A")
    path = as_of_an_earlier_version(run, "A", manifest)
    torch.save(torch.load(path, weights_only=True) | {"epoch": 0}, path)
    capsys.readouterr()
    train(run, "A", manifest)
    assert "earlier version" in capsys.readouterr().out
    assert len(list((run.folder / "replaced").iterdir())) == 1


@pytest.mark.parametrize("seed", [4_294_968, 20251126, 2**32, 2**63, 2**64 - 1])
def test_any_seed_trains(seed, tiny_run):
    run = changed(tiny_run, seed=seed, val_limit=6, robustness_images=6)
    manifest = build_manifest(run, "A")
    manifest.loc[manifest["label"] == 0, "format"] = "JPEG"  # file facts tell the class: the crops are audited too
    assert len(train(run, "A", manifest)) == 2
    evaluate(run, "A", manifest)
    assert len(evaluate_robustness(run, "A", manifest))


def test_another_seed_draws_other_crops(tiny_run):
    losses = []
    for seed in (0, 1, 2**32, 2**32 + 1):
        run = changed(tiny_run, seed=seed, run_name=f"seed{seed}", epochs_finetune=0)
        losses.append(train(run, "A", build_manifest(run, "A"))["train_loss"].item())
    assert len(set(losses)) == 4


def test_what_a_training_took_and_left_out_is_kept_over_its_parts(tiny_run, monkeypatch):
    spoil(tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "1_fake0.png")
    manifest, calls, original = build_manifest(tiny_run, "A"), [], training.train_epoch

    def slow(fit, step, *arguments):
        if step == "finetune" and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        time.sleep(1)
        return original(fit, step, *arguments)

    monkeypatch.setattr(training, "train_epoch", slow)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run, "A", manifest)
    (known,) = read_checkpoint(tiny_run.folder / "checkpoints" / "taskA_state.pt")["errors"]
    assert "1_fake0.png" in known
    train(tiny_run, "A", manifest)
    facts = read_json(tiny_run.folder / "run.json")
    assert facts["taskA_training_seconds"] > 2, "of both parts"
    monkeypatch.setattr(
        training, "choose_machine", lambda params: replace(machine.choose_machine(params), workers=0, bf16=True)
    )
    train(tiny_run, "A", manifest)
    again = read_json(tiny_run.folder / "run.json")
    for name in ("training_seconds", "machine", "unreadable_in_training"):
        assert again[f"taskA_{name}"] == facts[f"taskA_{name}"]


@pytest.mark.parametrize("task", ["A", "B"])
def test_both_steps_leave_their_files(trained, task):
    run, _ = trained(task)
    assert read_history(run, task)["step"].tolist() == ["head", "finetune"]
    assert run.classifier_model(task).name == {"A": "tiny_classifier_model.pth", "B": "tiny_taskB_classifier_model.pth"}[task]
    head, tuned = read_checkpoint(run.classifier_model(task)), read_checkpoint(run.finetuned_model(task))
    assert (head["step"], tuned["step"]) == ("head", "finetune")
    assert head["config"]["task"] == task


def test_step_one_leaves_the_backbone_as_it_was(trained):
    run, _ = trained("A")
    torch.manual_seed(run.params.seed)
    fresh = training.build_model(run.params, "A").backbone.state_dict()
    learned = read_checkpoint(run.classifier_model("A"))["model"]
    assert all(torch.equal(value, learned[f"backbone.{name}"]) for name, value in fresh.items())


def test_step_two_starts_from_step_ones_best_and_changes_the_backbone(tiny_run):
    run = changed(tiny_run, epochs_finetune=2, lr_finetune=0.01)
    train(run, "A", build_manifest(run, "A"))
    head, last = read_checkpoint(run.classifier_model("A")), read_checkpoint(run.folder / "checkpoints" / "taskA_state.pt")
    assert any(not torch.equal(head["model"][k], last["model"][k]) for k in head["model"] if k.startswith("backbone.stages"))


def test_a_finished_training_is_not_done_again_unless_something_changed(trained, capsys):
    run, manifest = trained("A")
    before = run.finetuned_model("A").read_bytes()
    capsys.readouterr()
    train(run, "A", manifest)
    assert "taking up" in capsys.readouterr().out
    assert run.finetuned_model("A").read_bytes() == before
    evaluate(run, "A", manifest)
    train(changed(run, lr_head=0.5, epochs_finetune=0), "A", manifest)
    assert "starting anew" in capsys.readouterr().out
    assert not run.val_probs("A").exists(), "results of the old training must not outlive it"
    with pytest.raises(FileNotFoundError):
        stored_thresholds(run, "A")


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_training_goes_on_and_ends_the_same(tiny_run, monkeypatch, stop_after):
    run = changed(tiny_run, epochs_head=2, epochs_finetune=2)
    manifest = build_manifest(run, "A")
    train(run, "A", manifest)
    expected = read_checkpoint(run.finetuned_model("A"))["model"], read_history(run, "A")["train_loss"].tolist()
    again = changed(run, run_name="again")
    calls, original = [], training.train_epoch

    def stops(*arguments):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(training, "train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train(again, "A", manifest)
    assert not again.finetuned_model("A").exists(), "an unfinished step has no public file"
    monkeypatch.setattr(training, "train_epoch", original)
    train(again, "A", manifest)
    resumed = read_checkpoint(again.finetuned_model("A"))["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in expected[0].items())
    assert read_history(again, "A")["train_loss"].tolist() == expected[1]


def spoil(path) -> None:
    """Leave the header and the end as they are, and make the pixels between unreadable."""
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(200) + data[1200:])


def test_corrupt_training_and_validation_images_are_counted(tiny_run, capsys):
    folder = tiny_run.data / "dataset"
    for split in ("train", "val"):
        spoil(folder / split / "1_fake" / "src" / "1_fake0.png")
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
    monkeypatch.setattr(epochs, "batch_loss", lambda fit, batch: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match=r"src/\d_\w+\.png"):
        train(tiny_run, "A", build_manifest(tiny_run, "A"))


def test_mask_loss_rewards_the_truth_and_is_finite_without_one():
    truth = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    truth[0, 0, :4] = True
    right, wrong = (truth.float() * 20 - 10), (10 - truth.float() * 20)
    assert mask_loss(right, truth) < 0.01
    assert mask_loss(wrong, truth) > 1
    nothing = mask_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    assert nothing == pytest.approx(np.log(2), rel=1e-3)


def test_false_alarms_on_authentic_images_weigh_more():
    logits, empty, marked = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.zeros(2, 1, 8, 8) > 0
    marked[:, :, :2] = True
    assert torch.isclose(mask_loss(logits, empty, authentic_weight=4.0), 4 * mask_loss(logits, empty))
    assert torch.equal(mask_loss(logits, marked, authentic_weight=4.0), mask_loss(logits, marked))


def test_validation_writes_probabilities_and_thresholds(trained):
    run, manifest = trained("B")
    evaluation = evaluate(run, "B", manifest)
    written = pd.read_csv(run.val_probs("B"))
    assert written.columns[:2].tolist() == ["image_id", "prob"]
    assert len(written) == len(evaluation.table) == 10
    thresholds = stored_thresholds(run, "B")
    assert set(thresholds) == {"threshold", "loc_threshold", "temperature", "intercept"}
    assert read_checkpoint(run.finetuned_model("B"))["thresholds"] == thresholds
    assert {"iou_manipulated", "iou_all", "flagged_authentic"} <= set(evaluation.metrics)
    assert evaluation.without_overlap is None, "the official set's photographs are all TGIF's here"
    assert evaluation.summary().columns.tolist() == ["deciding images", "95% from", "to", "other validation images"]
    held_out = evaluate_held_out(run, "B", manifest)
    assert set(held_out.table["split"]) == {"test"}
    assert held_out.thresholds == thresholds
    assert evaluation.by("source", "kind")["images"].sum() == 10
    assert all(example.truth.any() for example in mask_examples(run, evaluation, "best", 3))
    assert not any(example.truth.any() for example in mask_examples(run, evaluation, "alarms", 3))
    ranked = evaluation.table[evaluation.table["label"] == 1].sort_values("iou")
    for which, row in (("worst", ranked.iloc[0]), ("best", ranked.iloc[-1])):
        (first,) = mask_examples(run, evaluation, which, 1)
        assert f"IoU {row['iou']:.2f}" in first.title
    (nearest,) = mask_examples(run, evaluation, "borderline", 1)
    assert plots.mask_gallery([nearest], 0.5, "borderline")
    unknown = replace(evaluation, table=evaluation.table.assign(method=None))
    assert "\nmanipulated (" in mask_examples(run, unknown, "best", 1)[0].title
    browser = browse_evaluated_masks(run, evaluation)
    browser.forth.click()
    assert "IoU" in browser.text.value
    assert {"loc_threshold", "iou_manipulated", "threshold"} <= set(evaluation.intervals)
    by_size = evaluation.by("kind", "size")
    assert set(by_size.loc[by_size["label"] == 0, "size"]) == {"none"}
    assert "none" not in set(by_size.loc[by_size["label"] == 1, "size"])


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


def test_names_that_would_share_a_mask_are_named():
    with pytest.raises(LayoutError, match=r"x\.jpg and x\.png and x would share the mask x\.npz; y\.z\.gif and y\.z\.webp"):
        mask_names(["f/x.jpg", "f/y.z.gif", "f/x.png", "f/one.png", "f/y.z.webp", "f/x"])
    assert mask_names(["f/x.jpg", "f/X.png"]) == {"x.jpg": "x.npz", "X.png": "X.npz"}


def test_test_images_that_would_share_a_mask_are_told_before_training(tiny_run):
    manifest = build_manifest(tiny_run, "B")
    folder = tiny_run.test_folder("B")
    shutil.copy(folder / "b1.jpg", folder / "b1.jpeg%20")
    for early in (lambda: build_test_manifest(tiny_run, "B"), lambda: train(tiny_run, "B", manifest)):
        with pytest.raises(LayoutError, match=r"b1\.jpeg%20 and b1\.jpg would share the mask b1\.npz"):
            early()
    assert not tiny_run.metrics.is_file(), "nothing was trained"


def test_masks_whose_names_differ_in_case_alone_are_noted(tiny_run, capsys):
    folder = tiny_run.test_folder("B")
    shutil.copy(folder / "b1.jpg", folder / "B1.png")
    shutil.copy(folder / "b2.jpg", folder / "ne\u0301.png")
    shutil.copy(folder / "b2.jpg", folder / "N\u00e9.png")
    assert len(build_test_manifest(tiny_run, "B")) == 7
    said = capsys.readouterr().out
    assert "B1.npz and b1.npz" in said
    assert "N\u00e9.npz and ne\u0301.npz" in said
    build_test_manifest(tiny_run, "A")
    assert "case" not in capsys.readouterr().out


def test_without_a_threshold_the_way_out_is_named(tiny_run):
    with pytest.raises(FileNotFoundError, match="training notebook"):
        stored_thresholds(tiny_run, "A")


def test_metrics_are_lines_of_json_while_training_runs(trained):
    run, _ = trained("A")
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ["head", "finetune"]
    assert np.isfinite([json.loads(line)["train_loss"] for line in lines]).all()


def test_lower_layers_learn_slower_with_layer_decay(tiny_run):
    model = build_model(tiny_run.params, "A")
    model.freeze_backbone("all")
    params = tiny_run.params.model_copy(update={"layer_decay": 0.5})
    optimizer = epochs.make_optimizer(model, 1e-3, params)
    schedule = epochs.make_schedule(optimizer, 100, 0.1)
    schedule.step_update(10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == len(list(model.parameters())), "every parameter is trained"
    assert of["classifier.weight"] == pytest.approx(max(of.values()))
    assert of["backbone.stem.0.weight"] < of["backbone.stages.0.blocks.0.mlp.fc1.weight"] < of["classifier.weight"]


def test_training_may_draw_sources_equally_often(tiny_run):
    run = changed(tiny_run, balance="source")
    metrics = train(run, "A", build_manifest(run, "A"))
    assert np.isfinite(metrics["train_loss"]).all()


def test_only_full_batches_are_compiled_for(tiny_run, monkeypatch):
    """What is not: an epoch's last batch, batches that lack unreadable images, and validation."""
    run = changed(tiny_run, finetune_stages=1, batch_size=5)
    manifest, sizes = build_manifest(run, "A"), []
    expected = train(run, "A", manifest)

    def compiled(model, dynamic):
        def forward(images):
            sizes.append(len(images))
            return model(images)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(machine, "LEARNS_COMPILED_FROM", {"cpu": 0})
    (run.folder / "checkpoints" / "taskA_state.pt").unlink()
    columns = ["step", "epoch", "train_loss", "val_auc"]
    assert train(run, "A", manifest)[columns].equals(expected[columns])
    images = len(usable(manifest, "train"))
    assert images % 5, "there is a smaller batch"
    assert sizes == [5] * (images // 5) * 2, "in both steps"


def test_epochs_are_judged_on_sources_that_training_lacks(tiny_run, monkeypatch):
    """Right on the seen source, wrong on the unseen one: the score must be the latter's."""
    manifest = build_manifest(tiny_run, "A")
    val = usable(manifest, "val")
    val["source"] = np.where(val.groupby("label").cumcount() < 2, "src", "other")
    probs = np.where(val["source"] == "src", val["label"], 1 - val["label"]).astype(float)
    monkeypatch.setattr(epochs, "predict_labelled", lambda *_: Predictions(probs, {}))
    fit = epochs.TrainingState(tiny_run, "A", None, None, usable(manifest, "train"), val, equalize=False)
    assert epochs.validate(fit, None)["score"] == 0.0
    fit.val = val.assign(source="src")
    assert epochs.validate(fit, None)["score"] == epochs.validate(fit, None)["val_auc"] == 0.5


def test_calibrated_probabilities_are_what_is_written_for_test_images(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    plain = infer(run, "A")["prob"]
    stored = json.loads(run.thresholds.read_text())
    assert stored["A"]["temperature"] == evaluation.thresholds["temperature"]
    assert stored["A"]["intercept"] == evaluation.thresholds["intercept"]
    before = {key: stored["A"].pop(key) for key in ("temperature", "intercept")}
    stored["A"]["temperature"] = 2.0  # alone, as a run of a version that fitted no intercept left it
    run.thresholds.write_text(json.dumps(stored))
    again = logit(infer(run, "A")["prob"]) * 2
    np.testing.assert_allclose(logit(plain), again / before["temperature"] + before["intercept"], atol=1e-4)


def test_an_evaluation_tells_what_stands_behind_its_scores(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    for low, high in evaluation.intervals.values():
        assert low <= high
    assert set(evaluation.intervals) >= {"auc", "f1", "fpr", "threshold", "tpr_at_5_fpr"}
    table = evaluation.threshold_table()
    assert table.loc["best in hindsight", "f1"] >= table["f1"].max() - 1e-9
    wrong = evaluation.most_wrong()
    called = wrong["prob"] >= evaluation.thresholds["threshold"]
    assert (called != wrong["label"].astype(bool)).all()
    sweep = evaluate_robustness(run, "A", manifest)
    assert sweep["images"].eq(8).all()
    card = build_card(run, "A").read_text()
    assert "chosen on 8 validation images (4 of them positive)" in card and "log(4 / 4)" in card
    facts = read_json(run.folder / "run.json")
    update_json(run.folder / "run.json", taskA_chosen_on=None)  # as a version that fitted no intercept left it
    assert "fitted no intercept" in build_card(run, "A").read_text()
    update_json(run.folder / "run.json", **facts)
    for part in ("Intended use", "| AUC |", "Scores by generator", "after common changes", "test_convnext", "Limits"):
        assert part in card
    for figure in (
        plots.reliability_diagram(evaluation, "A"),
        plots.robustness_curves(sweep, "A"),
        plots.attribution_gallery(run, evaluation.surest(), "surest"),
    ):
        figure.canvas.draw()


def test_without_a_mistake_the_gallery_of_mistakes_is_empty(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    evaluation.table["prob"] = evaluation.table["label"].astype(float)
    assert evaluation.most_wrong().empty
    plots.attribution_gallery(run, evaluation.most_wrong(), "none").canvas.draw()


def test_platforms_are_known_by_source_or_name():
    assert _platform("itw_sm/facebook", "a.jpg") == "facebook"
    assert _platform("src", "X_618.jpg") == "x"
    assert _platform("src", "holiday_1.jpg") is None


def test_grad_cam_follows_what_speaks_for_synthetic(tiny_run):
    """A model whose margin is the mean of one feature map must show just that map."""
    model = build_model(tiny_run.params, "A").eval()
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    machine = training.choose_machine(tiny_run.params)
    shown, heat = grad_cam(model, image, machine)
    assert shown.shape == (96, 64, 3) and heat.shape == (96, 64)
    assert heat.min() >= 0 and heat.max() <= 1

    maps = torch.zeros(1, 2, 3, 2)
    maps[0, 1, 2, 1] = 5.0
    model.encode = lambda x: (maps, [])
    model.decide = lambda x, final, stages: Output(final.mean((2, 3)), None, final.mean((2, 3)))
    heat = grad_cam(model, image, machine)[1]
    assert np.unravel_index(heat.argmax(), heat.shape)[0] > 64 and heat[:32].max() == 0


@pytest.mark.parametrize("task", ["A", "B"])
def test_images_of_one_pixel_are_trained_on_and_judged(tiny_run, task):
    """Padding by reflection makes a crop of anything."""
    manifest = build_manifest(tiny_run, task)
    authentic = manifest[manifest["label"] == 0]
    for split in ("train", "val"):
        save(Path(authentic.loc[authentic["split"] == split, "path"].iloc[0]), picture(np.random.default_rng(0), 1, 1))
    save(tiny_run.test_folder(task) / "dot.png", picture(np.random.default_rng(0), 1, 1))
    manifest = build_manifest(tiny_run, task)
    assert manifest["error"].isna().all()
    train(tiny_run, task, manifest)
    assert evaluate(tiny_run, task, manifest).table["prob"].between(0, 1).all()
    assert pd.isna(infer(tiny_run, task).set_index("image_id").loc["dot.png", "error"])


def test_a_state_of_another_version_starts_training_anew(trained, capsys):
    run, manifest = trained("A")
    path = run.folder / "checkpoints" / "taskA_state.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 1}, path)
    capsys.readouterr()
    assert len(train(run, "A", manifest)) == 2
    assert "starting anew" in capsys.readouterr().out
