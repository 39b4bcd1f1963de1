"""What a changed parameter of each group does to every file that a finished run has left."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import changed, train_and_evaluate

from forensics_lib.data.manifest import build_manifest
from forensics_lib.inference.shards import InferenceError, infer
from forensics_lib.params import DataKeys, InferenceKeys, MachineKeys, ModelKeys, Params, RunKeys, TrainingKeys
from forensics_lib.run import Run
from forensics_lib.submission.build import build_submission
from forensics_lib.training.loop import train
from forensics_lib.utils.files import home

CHANGES = {  # per group: a key that both tasks have, or one for each of them, with another value than the tiny run's
    RunKeys: {"team": "others"},
    DataKeys: {"test_folder_a": "elsewhere", "test_folder_b": "elsewhere"},
    ModelKeys: {"dropout": 0.35},
    TrainingKeys: {"lr_finetune": 3e-4},
    InferenceKeys: {"crops_per_image": 3, "mask_flips": True},
    MachineKeys: {"workers": 1},
}
RECORDS = ("run.json", "taskA.lock", "taskB.lock")


def files() -> dict[str, str]:
    """Every file below ``outputs`` and ``submission`` with a hash of its content, but for records of what was done when."""
    found = [path for folder in ("outputs", "submission") for path in (home() / folder).rglob("*") if path.is_file()]
    kept = [path for path in found if path.name not in RECORDS and not path.name.startswith(".")]
    return {str(path.relative_to(home())): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def finished(run: Run, task: str) -> dict[str, str]:
    train_and_evaluate(run, task)
    infer(run, task)
    build_submission(run, task)
    return files()


@pytest.mark.parametrize("task", ["A", "B"])
def test_each_group_of_parameters_changes_the_files_that_depend_on_it(task, trained):
    run, _ = trained(task)
    before = finished(run, task)
    trained = {Path(name).name for name in before if name.endswith((".pth", "_state.pt", "_probs.csv"))}
    assert len(trained) == 7, "two models, two best epochs, the state and two tables of probabilities"
    for group, values in CHANGES.items():
        assert set(values) <= set(group.model_fields)
        other = Run(Params(**run.params.model_dump() | values), run.data)
        train(other, task, build_manifest(other, task))
        after = files()
        if group not in (ModelKeys, TrainingKeys):
            assert {name: after.get(name) for name in before} == before, group
            continue
        moved = {Path(name).name: content for name, content in after.items() if "replaced" in name}
        assert trained <= set(moved), group
        assert {moved[Path(name).name] for name in before if Path(name).name in trained} <= set(before.values())
        others = {name: content for name, content in before.items() if name.startswith("submission") or ".npz" in name}
        assert others.items() <= after.items(), "archives and masks stay until others are made"
        assert len(train(run, task, build_manifest(run, task))) == 2
        before = finished(run, task)


@pytest.mark.parametrize("task", ["A", "B"])
def test_inference_with_other_settings_leaves_every_file(task, trained):
    run, _ = trained(task)
    before = finished(run, task)
    values = {"crops_per_image": 3} if task == "A" else {"mask_flips": True}
    with pytest.raises(InferenceError, match=next(iter(values))):
        infer(changed(run, **values), task)
    assert files() == before
