"""The whole run through papermill on tiny data, with bad files among the good ones."""

import zipfile

import pandas as pd
import pytest
from conftest import TINY, make_tiny_data

from forensics_lib import pipeline
from forensics_lib.__main__ import main, parse_settings
from forensics_lib.pipeline import PipelineError, run_pipeline
from forensics_lib.submission import validate_submission

SETTINGS = {key: value for key, value in TINY.items() if key != "run_name"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORENSICS_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_from_data_to_valid_archives(home, capsys):
    data = make_tiny_data(home / "elsewhere")
    for folder, name in (
        ("dataset/train/1_fake/src", "bad.png"),
        ("dataset/val/0_real/src", "bad.png"),
        ("test/taskA", "bad.jpg"),
    ):
        (data / folder / name).write_bytes(b"corrupt")
    (data / "test" / "taskB" / "bad.jpg").write_bytes(b"corrupt")
    run = run_pipeline("params/constrained.yaml", {"data_root": str(data), **SETTINGS})
    assert run.name == "constrained"
    outputs = home / "outputs"
    for infix in ("", "_taskB"):
        for ending in ("classifier_model.pth", "finetuned_model.pth", "val_probs.csv", "test_probs.csv"):
            assert (outputs / f"constrained{infix}_{ending}").is_file()
    assert sorted(p.stem for p in (outputs / "constrained" / "notebooks").iterdir()) == list(pipeline.NOTEBOOKS)
    names = {"team_constrained.zip": "A", "team_localization_masks.zip": "B"}
    assert {path.name for path in (home / "submission").iterdir()} == {*names, "scores.csv"}
    for name, task in names.items():
        assert validate_submission(home / "submission" / name, task, data / "test" / f"task{task}").valid
    with zipfile.ZipFile(home / "submission" / "team_constrained.zip") as archive:
        table = pd.read_csv(archive.open("team_constrained.csv"))
    assert table.loc[table["image_id"] == "bad.jpg", "prob"].item() == 0.5
    report = (outputs / "constrained" / "report.html").read_text()
    assert "bad.png" in report
    assert "SAMPLE DATA" not in report
    assert "Data that went in" in report and "without overlap" in report and "File facts alone" in report


@pytest.mark.slow
def test_open_run_and_a_notebook_whose_task_is_not_in_it(home):
    data = make_tiny_data(home / "elsewhere")
    (data / "dataset_open").symlink_to(data / "dataset")
    run_pipeline("params/open.yaml", {"data_root": str(data), **SETTINGS, "epochs_finetune": 0})
    assert [path.name for path in (home / "submission").iterdir()] == ["team_open.zip"]
    skipped = (home / "outputs" / "open" / "notebooks" / "03_train_taskB.ipynb").read_text()
    assert "Task B is not in this run" in skipped
    report = (home / "outputs" / "open" / "report.html").read_text()
    assert str(data / "dataset_open") in report, "every source that went in is listed"


@pytest.mark.slow
def test_a_failed_cell_stops_with_notebook_cell_cause_and_resume_command(home):
    data = make_tiny_data(home / "elsewhere")
    with pytest.raises(PipelineError) as caught:
        run_pipeline("params/constrained.yaml", {"data_root": str(data), **SETTINGS}, start="04_infer")
    block = str(caught.value)
    assert "notebook 04_infer, cell [" in block
    assert "run the training notebook of this run first" in block
    assert "make run PARAMS=params/constrained.yaml FROM=04_infer" in block


def test_a_killed_kernel_is_recognised(home, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    def dies(*_):
        raise DeadKernelError("Kernel died")

    data = make_tiny_data(home / "elsewhere")
    monkeypatch.setattr(pipeline, "_execute", dies)
    with pytest.raises(PipelineError, match="out of memory"):
        run_pipeline("params/constrained.yaml", {"data_root": str(data)})


def test_a_notebook_that_ends_without_its_files_does_not_count(home, monkeypatch):
    data = make_tiny_data(home / "elsewhere")
    monkeypatch.setattr(pipeline, "_execute", lambda *_: None)
    with pytest.raises(PipelineError, match=r"ended without .*constrained_classifier_model"):
        run_pipeline("params/constrained.yaml", {"data_root": str(data)})


def test_settings_are_read_as_yaml():
    assert parse_settings(["batch_size=8", "tasks=[A]", "lr_head=1e-3"]) == {"batch_size": 8, "tasks": ["A"], "lr_head": "1e-3"}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_settings(["batch_size"])


def test_the_command_line_says_what_is_wrong_without_a_traceback(home, capsys):
    assert main(["run", "--params", "params/constrained.yaml", "--set", "batchsize=8"]) == 1
    assert "did you mean 'batch_size'" in capsys.readouterr().err
    assert main(["run", "--params", "params/none.yaml"]) == 1
    assert main(["run", "--params", "params/sample.yaml", "--from", "07"]) == 1


def test_the_validator_from_the_shell(home, capsys):
    data = make_tiny_data(home / "elsewhere")
    archive = home / "x.zip"
    archive.write_bytes(b"no zip")
    assert main(["validate", str(archive), "--task", "A", "--images", str(data / "test" / "taskA")]) == 1
    assert "not a zip archive" in capsys.readouterr().out
