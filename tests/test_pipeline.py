"""The whole run through papermill on tiny data, with bad files among the good ones."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import zmq
from conftest import TINY, make_tiny_data
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from forensics_lib import pipeline
from forensics_lib.__main__ import _overrides, _parser, main
from forensics_lib.params import parse_settings
from forensics_lib.pipeline import PipelineError, run_pipeline
from forensics_lib.submission.validate import validate_submission
from forensics_lib.utils.files import project_root

SETTINGS = {key: value for key, value in TINY.items() if key != "run_name"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORENSICS_HOME", str(tmp_path))
    monkeypatch.delenv("FORENSICS_HEADLESS", raising=False)
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
    assert "Training data" in report and "Too few training images" in report


@pytest.mark.slow
def test_open_run_and_a_notebook_whose_task_is_not_in_it(home):
    data = make_tiny_data(home / "elsewhere")
    shutil.copytree(data / "dataset", data / "dataset_open")
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
    assert f"DATA={data}" in block and "batch_size=4" in block


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


@pytest.mark.parametrize(
    "error",
    [
        CellTimeoutError("A cell timed out while it was being executed"),
        CellExecutionError("traceback of the cell", "KeyError", "'gone'"),
        zmq.ZMQError(11),
        OSError(28, "No space left on device"),
        SystemExit(3),
        asyncio.CancelledError(),
        KeyError("prob"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["_execute", "_require_files"])
def test_whatever_ends_a_run_is_told_with_the_command_that_goes_on(home, monkeypatch, capsys, error, where):
    def fails(*_):
        raise error

    data = make_tiny_data(home / "my data")
    monkeypatch.setattr(pipeline, "_execute", lambda *_: None)
    monkeypatch.setattr(pipeline, where, fails)
    arguments = ["run", "--params", "params/constrained.yaml", "--data", str(data), "--set", "team=us", "--from", "02"]
    assert main(arguments) == 1
    block = capsys.readouterr().err
    assert "RUN STOPPED\n  notebook 02_train_taskA" in block
    assert f"{getattr(error, 'ename', type(error).__name__)}: " in block
    assert " run PARAMS=params/constrained.yaml FROM=02_train_taskA" in block and f"DATA='{data}' SET=team=us" in block
    if not isinstance(error, CellExecutionError):
        assert "Traceback" in (home / "outputs" / "constrained" / "traceback.txt").read_text()
    assert "FORENSICS_HEADLESS" not in os.environ


def test_ctrl_c_is_told_with_the_command_that_goes_on(home, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    data = make_tiny_data(home / "elsewhere")
    monkeypatch.setattr(pipeline, "_execute", interrupted)
    assert main(["run", "--params", "params/open.yaml", "--set", f"data_root={data}", "aligned={autoencoder: own}"]) == 130
    said = capsys.readouterr().err
    assert "make run PARAMS=params/open.yaml FROM=01_explore" in said and f"DATA={data}" in said


def test_the_command_that_goes_on_means_the_same_run_to_a_shell_and_make(home, monkeypatch):
    """It is executed: by a shell, by make with the project's Makefile, down to the settings that the library reads."""
    overrides = {
        "data_root": str(home / "it's  my $data"),
        "team": "007",
        "run_name": "null",
        "pretrained_file": None,
        "test_folder_a": 'with blank and "quotes" and \'',
        "tasks": ["A", "B"],
        "mask_flips": True,
        "lr_head": "1e-3",
        "data": [{"root": "/a b=c", "layout": "own"}],
    }
    params = home / "my $params.yaml"
    command = pipeline.resume_command(str(params), overrides, "03_train_taskB")
    seen = told_to_python(command, home)
    options = _parser().parse_args(seen[2:])
    assert (options.params, options.start, options.data) == (str(params), "03_train_taskB", overrides["data_root"])
    assert _overrides(options) == overrides
    monkeypatch.chdir(home)
    command = pipeline.resume_command("params/constrained.yaml", {"data_root": "relative"}, "01_explore")
    assert "DATA=" not in command and "SET=data_root=relative" in command
    assert _overrides(_parser().parse_args(told_to_python(command, home)[2:])) == {"data_root": "relative"}


def told_to_python(command: str, folder: Path) -> list[str]:
    """The arguments with which a make command ends up starting Python, by a Python that only notes them."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    noted = folder / "noted.json"
    fake = bin_folder / "python"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(noted)!r}, 'w'))\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    command = command.replace(" run ", " run -o .venv-active.stamp -o .venv/.ready BIN= ", 1)
    subprocess.run(["bash", "-c", command], cwd=project_root(), env=environment, check=True, capture_output=True)
    return json.loads(noted.read_text())


def test_a_parameter_file_is_found_from_the_notebooks_folder_too(home, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "_execute", lambda run, notebook, parameters: seen.append(parameters["params_file"]))
    monkeypatch.setattr(pipeline, "_require_files", lambda *_: None)
    data = make_tiny_data(home / "elsewhere")
    (home / "mine.yaml").write_text(f"data_root: {data}\n")
    monkeypatch.chdir(home)
    run_pipeline("mine.yaml", {})
    run_pipeline("params/constrained.yaml", {"data_root": str(data)})
    assert set(seen) == {str(home / "mine.yaml"), "params/constrained.yaml"}


def test_settings_are_read_as_yaml():
    assert parse_settings(["batch_size=8", "tasks=[A]", "lr_head=1e-3"]) == {"batch_size": 8, "tasks": ["A"], "lr_head": "1e-3"}
    for wrong in ("batch_size", "=8", "", "B] x=1"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_settings([wrong])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2025", "2025"), ("007", "007"), ("1e3", "1e3"), ("on", "on"), ("2025-11-26", "2025-11-26"), ("null", "null"),
     ("'a b'", "a b"), ('"x=1"', "x=1"), ("12:30", "12:30"), ("0x1F", "0x1F"), ("[A]", "[A]"), ("o'brien", "o'brien")],
)  # fmt: skip
def test_text_stays_text(text, value):
    assert parse_settings([f"team={text}", f"run_name={text}"]) == {"team": value, "run_name": value}
    assert parse_settings([f"team={text} epochs_head=1"]) == {"team": value, "epochs_head": 1}


def test_optional_text_can_be_taken_away():
    assert parse_settings(["pretrained_file=null", "test_folder_a=", "test_folder_b=~/x", "data=null"]) == {
        "pretrained_file": None, "test_folder_a": None, "test_folder_b": "~/x", "data": None
    }  # fmt: skip
    assert parse_settings(["test_folder_a='null'"]) == {"test_folder_a": "null"}


def test_values_may_hold_blanks():
    line = "data_root=/my data  tasks=[A, B] data=[{root: '/x y=1', layout: own}] degrade={jpeg: 0.1, blur: 0} team=us"
    assert parse_settings([line]) == {
        "data_root": "/my data",
        "tasks": ["A", "B"],
        "data": [{"root": "/x y=1", "layout": "own"}],
        "degrade": {"jpeg": 0.1, "blur": 0},
        "team": "us",
    }
    assert parse_settings(['tasks="[A, B]"', "lr_head='1e-3'"]) == {"tasks": ["A", "B"], "lr_head": "1e-3"}


@pytest.mark.parametrize("broken", ["tasks=[A", "degrade={a: b: c}", "data=[{root: x]", "edition=@", "tasks=*x", "team='a b"])
def test_broken_values_are_told_with_what_to_write(home, capsys, broken):
    key = broken.partition("=")[0]
    for arguments in (["--set", broken], ["--set", "seed=1", broken], ["--set", f"{broken} seed=1"]):
        assert main(["check-data", *arguments]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"{key}=") and "Traceback" not in said


def test_settings_add_up_and_none_is_given_twice(home, capsys):
    arguments = ["run", "--set", "run_name=mine", "seed=1", "--set", "epochs_head=2", "--set", "team=7 batch_size=3"]
    overrides = _overrides(_parser().parse_args(arguments))
    assert overrides == {"run_name": "mine", "seed": 1, "epochs_head": 2, "team": "7", "batch_size": 3}
    assert _overrides(_parser().parse_args(["run"])) == {}
    two_roots = ["--set", "data_root=/x", "--data", "/y"]
    for twice in (["--set", "seed=1", "--set", "seed=2"], ["--set", "seed=1 seed=1"], two_roots):
        assert main(["check-data", *twice]) == 1
        assert "is set twice" in capsys.readouterr().err
    assert main(["infer", "--tasks", "A", "--set", "tasks=[B]"]) == 1
    assert "tasks is set twice" in capsys.readouterr().err


def test_a_relative_home_is_refused(home, monkeypatch, capsys):
    monkeypatch.setenv("FORENSICS_HOME", "some where")
    monkeypatch.chdir(home)
    assert main(["sample"]) == 1
    assert f"FORENSICS_HOME='{home}/some where'" in capsys.readouterr().err
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("prob"), TypeError("no"), ZeroDivisionError(), RecursionError("deep")])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(home, monkeypatch, capsys, error):
    def fails(_):
        raise error

    monkeypatch.setattr("forensics_lib.data.check.check_data", fails)
    assert main(["check-data"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{type(error).__name__}: ") and "Traceback" not in said
    kept = (home / "outputs" / "traceback.txt").read_text()
    assert "Traceback" in kept and "in fails" in kept


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


SLOW = """
import time
from pathlib import Path
from forensics_lib.utils.locks import stop_requests
with stop_requests() as asked:
    Path("begun").touch()
    while not asked():
        time.sleep(0.1)
    time.sleep(6)  # a long batch
    Path("saved").touch()
"""


ENDLESS = """
import atexit, subprocess, sys, time
atexit.register(time.sleep, 60)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
"""


@pytest.fixture
def one_notebook(tiny_run, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a project of one notebook, ``only``, with this code; returns the folder where it runs."""

    def make(code: str) -> Path:
        folder = tmp_path / "notebooks"
        folder.mkdir()
        parameters = nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, folder / "only.ipynb")
        monkeypatch.setattr(pipeline, "project_root", lambda: tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(project_root()))
        return folder

    return make


def test_a_kernel_ends_with_its_last_cell_whatever_it_still_waits_for(tiny_run, one_notebook):
    one_notebook(ENDLESS)
    began = time.monotonic()
    pipeline._execute(tiny_run, "only", {})
    assert time.monotonic() - began < 25


@pytest.mark.slow
def test_a_notebook_may_take_its_time_to_stop(tiny_run, one_notebook):
    folder = one_notebook(SLOW)

    def interrupt():
        while not (folder / "begun").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises((KeyboardInterrupt, PapermillExecutionError, DeadKernelError)):
        pipeline._execute(tiny_run, "only", {})
    assert (folder / "saved").exists()
