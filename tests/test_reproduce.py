import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import changed, picture, save, train_and_evaluate
from PIL import Image

from forensics_lib.__main__ import main
from forensics_lib.data.manifest import build_manifest
from forensics_lib.inference.shards import infer
from forensics_lib.models.checkpoint import read_checkpoint
from forensics_lib.pipeline import reproduce
from forensics_lib.reports.model_card import build_card
from forensics_lib.reports.report import build_report
from forensics_lib.run import Run, open_run, parameters_in_force, record_trained, trained_by
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home, read_json, update_json

pytestmark = pytest.mark.slow


def finished(run: Run, tasks: str = "AB") -> Run:
    for task in tasks:
        train_and_evaluate(run, task)
        infer(run, task)
    return run


def test_a_run_is_done_again_from_its_record(tiny_run, capsys):
    finished(open_run(tiny_run.write_params()))
    table = reproduce("tiny")
    assert len(table) == 4 + 4  # two tables a task, and the masks
    assert table["equal"].all()
    assert (table["largest_difference"] == 0).all()
    assert "is {" not in capsys.readouterr().out
    probs = tiny_run.test_probs("A")
    probs.write_text(probs.read_text().replace("a0.jpg,0", "a0.jpg,1", 1))
    update_json(tiny_run.folder / "run.json", versions={"torch": "0.1"})
    save(tiny_run.data / "dataset" / "train" / "0_real" / "src" / "0_real9.png", picture(np.random.default_rng(9)))
    assert main(["reproduce", "tiny"]) == 1
    said = capsys.readouterr().out
    assert "versions was {'torch': '0.1'}" in said
    assert "Task A: the data are not those of the first run" in said
    assert "tiny_test_probs.csv" in said
    assert main(["reproduce", "nothing"]) == 1


def weights(run: Run, task: str) -> dict[str, torch.Tensor]:
    state = read_checkpoint(run.folder / "checkpoints" / f"task{task}_state.pt")
    return state["model"] | state["average"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("task", ["A", "B"])
def test_neither_test_images_nor_labels_nor_validation_pixels_reach_training(task, homes, tiny_data, tmp_path):
    honest = homes("honest")
    train(honest, task, build_manifest(honest, task))
    tampered = tmp_path / "tampered"
    shutil.copytree(tiny_data, tampered)
    rng = np.random.default_rng(5)
    changed = [*(tampered / "dataset" / "val").rglob("*.png"), *(tampered / "test").rglob("*.jpg")]
    changed += [*(tampered / "dataset_taskB" / "validation").rglob("*.jpg")]
    changed += [p for s in ("validation", "testing") for p in (tampered / "dataset_taskB" / "TGIF").rglob(f"*/{s}/**/*.png")]
    assert len(changed) > 30
    for path in changed:
        if "mask" not in path.parts and "masks" not in path.parts:
            with Image.open(path) as image:
                width, height = image.size
            save(path, picture(rng, height, width))
    (tampered / "labels").mkdir()
    (tampered / "labels" / f"task{task}_test.csv").write_text("image_id,label\na0.jpg,1\n")
    dishonest = homes("dishonest", tampered)
    train(dishonest, task, build_manifest(dishonest, task))
    assert equal(weights(honest, task), weights(dishonest, task))
    assert build_manifest(dishonest, task)["path"].str.contains("/test/").sum() == 0


@pytest.mark.parametrize("task", ["A", "B"])
def test_workers_order_on_disk_and_batch_of_inference_change_nothing(task, homes, tiny_data, tmp_path):
    first = finished(homes("first"), task)
    other = tmp_path / "other"
    for path in sorted(tiny_data.rglob("*"), reverse=True):  # the last one is made first
        if path.is_file():
            (other / path.relative_to(tiny_data)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, other / path.relative_to(tiny_data))
    second = finished(homes("second", other, workers=2), task)
    assert equal(weights(first, task), weights(second, task))
    assert first.test_probs(task).read_bytes() == second.test_probs(task).read_bytes()
    again = changed(second, batch_size=7)
    infer(again, task)
    assert first.test_probs(task).read_bytes() == second.test_probs(task).read_bytes()
    for mask in first.masks.glob("*.npz"):
        assert mask.read_bytes() == (second.masks / mask.name).read_bytes()


def test_another_seed_gives_another_model(homes):
    models = []
    for seed in (0, 1):
        run = homes(f"seed{seed}", seed=seed)
        train(run, "A", build_manifest(run, "A"))
        models.append(weights(run, "A"))
    assert not equal(*models)


def test_the_record_says_what_a_repetition_needs(tiny_run):
    run = finished(open_run(tiny_run.write_params()), "A")
    facts = read_json(run.folder / "run.json")
    assert facts["params"]["seed"] == 0
    assert {"torch", "timm", "numpy"} <= set(facts["versions"])
    assert {"data", "machine", "python", "git", "taskA_data_fingerprint", "taskA_training_seconds"} <= set(facts)


def test_later_commands_do_not_change_what_trained(tiny_run):
    """Neither opening a run with other parameters nor training its other task changes the record, the report or the card."""
    file = tiny_run.write_params()
    run = finished(open_run(file, {"tasks": ["A"]}), "A")
    build_card(run, "A")
    record, card = read_json(run.folder / "run.json"), (run.folder / "taskA_model_card.md").read_text()
    other = open_run(file, {"tasks": ["B"], "seed": 5, "batch_size": 3, "backbone": "test_vit", "data_root": str(run.data)})
    assert read_json(run.folder / "run.json") == record
    assert trained_by(other, "A")["params"]["seed"] == 0
    record_trained(other, "A", record["taskA_trained"]["trained_with"], taken_up=True)
    assert read_json(run.folder / "run.json") == record, "a training that is taken up was done by the first command"
    build_card(other, "A")
    assert (run.folder / "taskA_model_card.md").read_text() == card
    record_trained(other, "B", {"data": "others"}, taken_up=False)
    facts = read_json(run.folder / "run.json")
    assert facts["taskA_trained"] == record["taskA_trained"]
    assert (facts["taskA_trained"]["params"]["batch_size"], facts["taskB_trained"]["params"]["batch_size"]) == (4, 3)
    found = parameters_in_force(run)
    assert (found["seed"], found["tasks"], found["crop_size"]) == ({"A": 0, "B": 5}, ["A", "B"], 32)
    report = build_report(open_run(file, {"tasks": ["A"], "seed": 9})).read_text()
    assert "Task B: manipulated regions" in report and "{&#39;A&#39;: 0, &#39;B&#39;: 5}" in report
    assert "test_convnext (A) and test_vit (B)" in report


def test_a_run_is_done_again_as_it_was_trained_whatever_was_opened_since(tiny_run, tmp_path):
    run = finished(open_run(tiny_run.write_params(), {"tasks": ["A"]}), "A")
    open_run(run.write_params(), {"seed": 7, "epochs_head": 3, "tasks": ["A", "B"]})
    table = reproduce("tiny")
    assert len(table) == 2 and table["equal"].all()
    update_json(home() / "outputs" / "tiny_again" / "run.json", repeats=None)
    with pytest.raises(FileExistsError, match="not known as a repetition"):
        reproduce("tiny")


def test_the_record_of_an_earlier_version_is_what_it_says_of_the_run(tiny_run):
    """Without a record of each task, the parameters that stand in run.json count, and stay."""
    run = open_run(tiny_run.write_params(), {"tasks": ["A"]})
    run.record(taskA_data_fingerprint="x")
    open_run(tiny_run.write_params(), {"tasks": ["A"], "seed": 4})
    assert trained_by(run, "A")["params"]["seed"] == parameters_in_force(run)["seed"] == 0
    record_trained(replace(run, params=run.params.model_copy(update={"seed": 8})), "A", "f", taken_up=True)
    assert read_json(run.folder / "run.json")["taskA_trained"]["params"]["seed"] == 0
    record_trained(replace(run, params=run.params.model_copy(update={"seed": 8})), "A", "g", taken_up=False)
    assert trained_by(run, "A")["params"]["seed"] == 8
    update_json(run.thresholds, A={"threshold": 0.5, "inference": {"crops_per_image": 9, "tile_size": 96}})
    chosen = parameters_in_force(run)
    assert (chosen["crops_per_image"], chosen["tile_size"]) == (9, 64), "of each task what its thresholds were chosen with"
