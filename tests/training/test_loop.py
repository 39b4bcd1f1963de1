import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import changed, picture, save, stopping, train_and_evaluate

from forensics_lib import device as machine
from forensics_lib.data.manifest import build_manifest, data_fingerprint, usable
from forensics_lib.device import DeviceLostError, DeviceMemoryError
from forensics_lib.evaluation.evaluate import evaluate, evaluate_robustness
from forensics_lib.evaluation.predictions import Predictions
from forensics_lib.images.io import ImageError
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.params import REMOVED
from forensics_lib.run import Run, stored_thresholds
from forensics_lib.training import epoch as epochs
from forensics_lib.training import loop as training
from forensics_lib.training.loop import train
from forensics_lib.training.losses import mask_loss
from forensics_lib.training.resume import read_history
from forensics_lib.utils.files import read_json


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
    assert infer(tiny_run, task)["prob"].tolist() == pytest.approx(probs["prob"].tolist(), abs=1e-9)
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
    run = changed(first, lr_head=0.002)
    alone = changed(run, run_name="alone")
    expected = train(alone, "A", manifest)

    loss, calls = stopping(epochs.batch_loss, lambda call: call == 2)
    monkeypatch.setattr(epochs, "batch_loss", loss)
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
    values = run.params.model_dump(exclude={*others, "robustness_images", "processes", "lora_rank"})
    values |= {key: value for key, (value, _) in REMOVED.items() if "." not in key}
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


@pytest.mark.parametrize("seed", [4_294_968, 2**32, 2**64 - 1])
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
        if step.name == "finetune" and not calls:
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
        training, "choose_machine", lambda params: replace(machine.choose_machine(params), workers=0, precision="bf16")
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


def test_a_stopped_training_goes_on_and_ends_the_same(tiny_run, monkeypatch):
    run = changed(tiny_run, epochs_head=2, epochs_finetune=2)
    manifest = build_manifest(run, "A")
    train(run, "A", manifest)
    expected = read_checkpoint(run.finetuned_model("A"))["model"], read_history(run, "A")["train_loss"].tolist()
    original = training.train_epoch
    for stop_after in (1, 2, 3):
        again = changed(run, run_name=f"again{stop_after}")
        calls = []

        def stops(*arguments, stop_after=stop_after, calls=calls):
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


def test_mask_loss_reads_no_value_from_the_device():
    nothing = torch.zeros(2, 1, 8, 8, device="meta")  # where there are none
    assert mask_loss(nothing, nothing > 0).shape == ()


def test_false_alarms_on_authentic_images_weigh_more():
    logits, empty, marked = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.zeros(2, 1, 8, 8) > 0
    marked[:, :, :2] = True
    assert torch.isclose(mask_loss(logits, empty, authentic_weight=4.0), 4 * mask_loss(logits, empty))
    assert torch.equal(mask_loss(logits, marked, authentic_weight=4.0), mask_loss(logits, marked))


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


@pytest.mark.parametrize("stages", ["all", 1])
def test_adapters_are_trained_in_step_2_and_a_stopped_training_of_them_goes_on(stages, tiny_run, monkeypatch):
    run = changed(tiny_run, lora_rank=2, finetune_stages=stages, epochs_finetune=2, ema=0.0)
    manifest = build_manifest(run, "A")
    expected = train(run, "A", manifest)
    head, tuned = (read_checkpoint(path)["model"] for path in (run.classifier_model("A"), run.finetuned_model("A")))
    assert set(head) == set(tuned), "adapters are merged"
    stopped = changed(run, run_name="stopped")
    monkeypatch.setattr(epochs, "batch_loss", stopping(epochs.batch_loss, lambda call: call == 6)[0])
    with pytest.raises(KeyboardInterrupt):
        train(stopped, "A", manifest)
    columns = ["step", "epoch", "train_loss", "val_auc"]
    assert train(stopped, "A", manifest)[columns].equals(expected[columns])
    again = read_checkpoint(stopped.finetuned_model("A"))["model"]
    assert all(torch.equal(again[name], value) for name, value in tuned.items())


def test_a_frozen_backbone_stays_as_it_was_pretrained(tiny_run):
    run = changed(tiny_run, finetune_stages=0)
    train(run, "A", build_manifest(run, "A"))
    torch.manual_seed(run.params.seed)
    fresh, tuned = build_model(run.params, "A").state_dict(), read_checkpoint(run.finetuned_model("A"))["model"]
    assert all(torch.equal(tuned[name], value) for name, value in fresh.items() if name.startswith("backbone."))
    assert not torch.equal(tuned["classifier.weight"], fresh["classifier.weight"])


def test_fp16_trains_with_scaled_losses_and_goes_on_with_its_scale(tiny_run):
    run = changed(tiny_run, precision="fp16", epochs_finetune=2)
    history = train(run, "A", build_manifest(run, "A"))
    assert np.isfinite(history["train_loss"]).all()
    state = read_checkpoint(run.folder / "checkpoints" / "taskA_state.pt")
    assert state["scaler"]["scale"] > 1


@pytest.mark.parametrize("task", ["A", "B"])
def test_parameters_without_gradients_are_looked_for_where_there_are_some(task, tiny_run):
    rows, model = usable(build_manifest(tiny_run, task), "train"), build_model(tiny_run.params, task)
    state = epochs.TrainingState(tiny_run, task, model, machine.choose_machine(tiny_run.params), rows, rows, equalize=False)
    model.freeze_backbone("all")
    assert not epochs.some_get_no_gradient(state)
    model.spare = torch.nn.LayerNorm(4)
    assert epochs.some_get_no_gradient(state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_does_not_fit_into_memory_says_what_to_set(tiny_run, monkeypatch):
    def never(*_) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(epochs, "batch_loss", never)
    with pytest.raises(DeviceMemoryError, match=r"batches of 4 crops of 32 pixels do not fit .* set batch_size: 2"):
        train(tiny_run, "A", build_manifest(tiny_run, "A"))


def test_a_gpu_that_fails_costs_no_saved_epoch(tiny_run, monkeypatch, capsys):
    run, loss, calls = changed(tiny_run, epochs_finetune=2), epochs.batch_loss, []

    def fails_once(state, batch) -> torch.Tensor:
        calls.append(state.updates)
        if len(calls) == 2 * state.updates + 2:  # in the last epoch
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return loss(state, batch)

    monkeypatch.setattr(epochs, "batch_loss", fails_once)
    with pytest.raises(DeviceLostError, match=r"unspecified launch failure.*last saved epoch are whole.*same command goes on"):
        train(run, "A", build_manifest(run, "A"))
    history = train(run, "A", build_manifest(run, "A"))
    assert "taking up the training of this name after step finetune, epoch 1" in capsys.readouterr().out
    assert history["epoch"].tolist() == [1, 1, 2] and len(calls) == 3 * calls[0] + 2
