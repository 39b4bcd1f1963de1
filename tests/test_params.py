from pathlib import Path

import nbformat
import pytest
import yaml

from forensics_lib.params import (
    REMOVED,
    InferenceKeys,
    MachineKeys,
    ModelKeys,
    Params,
    ParamsError,
    TrainingKeys,
    keys_of,
    load_params,
    make_params,
    without_removed,
)
from forensics_lib.utils.files import project_root
from forensics_lib.utils.notebook_cells import assigned_names

SHIPPED = sorted((project_root() / "params").glob("*.yaml"))
NOTEBOOKS = sorted((project_root() / "notebooks").glob("0*.ipynb"))


def test_the_constrained_file_names_every_parameter_and_the_others_what_differs_from_it():
    reference = yaml.safe_load((project_root() / "params/constrained.yaml").read_text())
    assert set(reference) == set(Params.model_fields)
    for path in SHIPPED:
        values = yaml.safe_load(path.read_text())
        same = [key for key in values if values[key] == reference[key]]
        assert load_params(path) and (path.stem == "constrained" or not same), path


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_says_so_whatever_its_value(key):
    outer, _, inner = key.partition(".")
    for value in (REMOVED[key][0], 0.3):
        with pytest.raises(ParamsError, match=rf"{key}: removed in 0\.2: .+ Delete this line"):
            make_params({outer: {inner: value} if inner else value, "run_type": "open"}, "own.yaml")


def test_a_removed_kind_of_residuals_says_so():
    with pytest.raises(ParamsError, match=r"frontend: found 'npr'; removed in 0\.2"):
        make_params({"frontend": "npr"}, "own.yaml")


def test_parameters_that_an_earlier_version_recorded_are_read_where_they_mean_the_same():
    recorded = {
        "seed": 3,
        "mixup": 0.0,
        "tile_overlap": 64,
        "run_type": "open",
        "aligned": {"count": 7, "side": 512, "mix": 0.5},
    }
    found = make_params(without_removed(recorded), "run.json")
    assert (found.seed, found.aligned.count) == (3, 7)
    for changed in ({"mixup": 0.2}, {"aligned": {"side": 64}}):
        with pytest.raises(ParamsError, match=r"removed in 0\.2"):
            make_params(without_removed(recorded | changed), "run.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_parameter_has_a_line_that_says_what_it_does(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(len(line.partition(" # ")[2]) > 8 for line in lines)


def test_constrained_file_holds_the_defaults():
    assert load_params("params/constrained.yaml") == Params()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_parameters_are_known_and_default_to_the_constrained_run(path):
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    assert cells[0].source.startswith("# Parameters")
    names = assigned_names(cells[0].source)
    assert names[0] == "params_file"
    assert set(names[1:]) <= set(Params.model_fields)
    scope: dict = {}
    exec(cells[0].source, scope)  # noqa: S102 (our own cell)
    assert scope["params_file"] == "params/constrained.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_yaml_injected_by_papermill_means_the_same_as_the_file(path):
    injected = yaml.safe_load(path.read_text())  # papermill -f: every key over the notebook's own file
    assert load_params("params/constrained.yaml", injected) == load_params(path)


def test_unknown_key_names_the_nearest_one():
    with pytest.raises(ParamsError, match=r"batchsize: unknown key \(value 3\); did you mean 'batch_size'"):
        make_params({"batchsize": 3}, "own.yaml")


def test_wrong_value_names_key_found_and_allowed():
    with pytest.raises(ParamsError, match="edition: found 2031; input should be 2025 or 2026"):
        make_params({"edition": 2031}, "own.yaml")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ParamsError, match="2 problem") as caught:
        make_params({"crop_size": 10, "epochs_head": -1}, "own.yaml")
    assert "crop_size" in str(caught.value)
    assert "epochs_head" in str(caught.value)


def test_number_written_as_text_is_coerced():
    assert make_params({"lr_head": "1e-3"}, "own.yaml").lr_head == 0.001


@pytest.mark.parametrize("value", [True, "fast", None, float("nan"), -1])
def test_a_rate_must_be_a_positive_number(value):
    with pytest.raises(ParamsError, match="lr_head"):
        make_params({"lr_head": value}, "own.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {"pretrained": False, "pretrained_file": "w.pth"},
        {"epochs_head": 0, "epochs_finetune": 0},
        {"tasks": []},
        {"tasks": ["A", "A"]},
        {"run_name": "../elsewhere"},
        {"finetune_stages": -1},
    ],
)
def test_contradictions_fail(values):
    with pytest.raises(ParamsError):
        make_params(values, "own.yaml")


def test_file_that_is_no_mapping(tmp_path: Path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ParamsError, match="key: value"):
        load_params(path)


def test_missing_file_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"params/constrained\.yaml"):
        load_params("params/nothing.yaml")


def test_a_data_set_without_a_task_is_recorded_as_before_there_was_one():
    plain, named = (make_params({"data": [{"root": "x"} | more]}, "t").model_dump()["data"][0] for more in ({}, {"task": "B"}))
    assert list(plain) == ["root", "layout", "split", "coco_root", "lsun_root"]
    assert named == plain | {"task": "B"}
    assert make_params({"data": [named]}, "t").data[0].task == "B"


def test_every_parameter_stands_in_one_group_and_in_the_order_of_the_file():
    groups = [set(group.model_fields) for group in Params.__bases__]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(Params.model_fields)
    assert list(yaml.safe_load((project_root() / "params" / "constrained.yaml").read_text())) == list(Params.model_fields)


@pytest.mark.parametrize("group", [ModelKeys, TrainingKeys, InferenceKeys])
def test_what_is_said_to_be_of_one_task_is_marked_so(group):
    for name, field in group.model_fields.items():
        for task, other in ("AB", "BA"):
            if f"Task {task}" in field.description:
                assert name not in keys_of(group, other)


CHANGES = {
    "A": {"degrade": {"jpeg": 0.1}, "equalize": "never", "seed": 1, "batch_size": 2},
    "B": {"degrade_b": {"jpeg": 0.1}, "paste": 0.1, "authentic_weight": 2.0, "seed": 1, "dropout": 0.1},
}


@pytest.mark.parametrize("task", ["A", "B"])
def test_a_training_depends_on_its_keys_alone(task):
    plain = Params().of_training(task)
    for key, value in CHANGES[task].items():
        assert make_params({key: value}, "own").of_training(task) != plain, key
    only_other = {key: value for key, value in CHANGES["AB".replace(task, "")].items() if key not in CHANGES[task]}
    others = {key: value for key, value in only_other.items() if key not in ("batch_size", "equalize", "dropout")}
    for key, value in (others | {"device": "cpu", "precision": "fp32", "tile_size": 96, "crops_per_image": 1}).items():
        assert make_params({key: value}, "own").of_training(task) == plain, key
    assert not set(plain) & set(MachineKeys.model_fields)


def test_seeds_have_a_stated_limit():
    with pytest.raises(ParamsError, match=rf"seed: found {2**64}; input should be less than {2**64}"):
        make_params({"seed": 2**64}, "own")
    seeds = [Params(seed=seed).seed_for(*more) for seed in (0, 1, 2**32, 2**63) for more in ((), (1,), (1, 7))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("team", ["007", "1e3", "on", "2025-11-26", "0x1f", "plain", "'007'"])
def test_a_name_in_a_file_stays_as_it_is_written(tmp_path, team):
    (tmp_path / "own.yaml").write_text(f"run_name: 2025\nteam: {team}\npretrained_file: null\nbatch_size: 8\n")
    params = load_params(tmp_path / "own.yaml")
    assert (params.run_name, params.team, params.pretrained_file, params.batch_size) == ("2025", team.strip("'"), None, 8)
