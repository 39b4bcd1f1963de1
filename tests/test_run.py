import json

import pytest
from conftest import make_tiny_data

from forensics_lib.params import ParamsError
from forensics_lib.run import MissingDataError, open_run, stored_thresholds
from forensics_lib.synthesis import sample


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A project without data, in which the sample is not built but only named."""
    monkeypatch.setenv("FORENSICS_HOME", str(tmp_path))
    monkeypatch.setattr(sample, "build_sample", lambda root: root)
    return tmp_path


@pytest.mark.parametrize(("file", "tasks"), [("constrained", ["A", "B"]), ("open", ["A"])])
def test_without_data_the_sample_takes_over_and_says_so(empty_home, capsys, file, tasks):
    run = open_run(f"params/{file}.yaml")
    said = capsys.readouterr().out
    assert "OFFICIAL DATA NOT FOUND" in said
    assert str(empty_home / "data" / "dataset" / "train") in said
    assert run.sample
    assert run.name == f"{file}_sample"
    assert (run.params.run_type, run.params.tasks) == (file, tasks)
    assert not run.params.pretrained
    assert run.data == empty_home / "data" / "sample"


def test_settings_hold_on_the_sample_too(empty_home):
    assert open_run("params/constrained.yaml", {"epochs_head": 3, "team": "us"}).params.epochs_head == 3


def test_a_sample_run_always_has_sample_in_its_name(empty_home):
    assert open_run("params/sample.yaml", {"run_name": "mine"}).name == "mine_sample"
    assert open_run("params/sample.yaml").name == "sample"


def test_a_data_root_named_on_purpose_must_be_complete(empty_home):
    with pytest.raises(MissingDataError, match="Task A training"):
        open_run("params/constrained.yaml", {"data_root": str(empty_home / "elsewhere")})


def test_a_part_of_the_data_is_an_error_that_names_the_rest(empty_home):
    make_tiny_data(empty_home / "data")
    (empty_home / "data" / "dataset_taskB" / "TGIF").rename(empty_home / "TGIF")
    with pytest.raises(MissingDataError, match=r"Task B training \(TGIF\)") as caught:
        open_run("params/constrained.yaml")
    assert "Task A" not in str(caught.value)
    assert open_run("params/constrained.yaml", {"tasks": ["A"]}).sample is False


def test_every_missing_data_set_is_named(empty_home):
    make_tiny_data(empty_home / "data")
    entries = [{"root": str(empty_home / name)} for name in ("one", "two")]
    with pytest.raises(MissingDataError, match=r"one\n.*two"):
        open_run("params/constrained.yaml", {"data": entries})


def test_own_data_is_used_and_recorded(empty_home):
    make_tiny_data(empty_home / "data")
    run = open_run("params/constrained.yaml")
    assert (run.sample, run.name) == (False, "constrained")
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["params"]["backbone"] == "convnext_base"
    assert facts["versions"]["torch"]


def test_test_folders_can_be_elsewhere(empty_home):
    make_tiny_data(empty_home / "data")
    (empty_home / "data" / "test" / "taskA").rename(empty_home / "images")
    run = open_run("params/constrained.yaml", {"test_folder_a": str(empty_home / "images")})
    assert run.test_folder("A") == empty_home / "images"


def test_a_typo_fails_before_anything_is_looked_for(empty_home):
    with pytest.raises(ParamsError, match="did you mean 'batch_size'"):
        open_run("params/constrained.yaml", {"batchsize": 3})


def test_a_task_that_is_not_in_the_run_ends_a_notebook_well(empty_home, capsys):
    run = open_run("params/open.yaml")
    run.require_task("A")
    with pytest.raises(SystemExit) as caught:
        run.require_task("B")
    assert caught.value.code == 0
    assert "Task B is not in this run" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["data"], ["data/dataset", "data/dataset_taskB", "data/test"]])
def test_the_sample_does_not_take_over_where_a_disk_is_not_mounted(empty_home, names):
    for name in names:
        (empty_home / name).parent.mkdir(exist_ok=True)
        (empty_home / name).symlink_to(f"/mnt/none/{name}")
    with pytest.raises(
        MissingDataError, match=rf"{names[0]} is a link to /mnt/none/{names[0]}, which is not there: is its disk"
    ):
        open_run("params/constrained.yaml")


def test_without_a_threshold_the_way_out_is_named(tiny_run):
    with pytest.raises(FileNotFoundError, match="training notebook"):
        stored_thresholds(tiny_run, "A")
