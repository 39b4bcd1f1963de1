import os

import numpy as np
import pandas as pd
import pytest

from forensics_lib.__main__ import main
from forensics_lib.params import Params
from forensics_lib.reports.compare import ComparisonError, compare, comparison_figure, recent_runs
from forensics_lib.run import Run
from forensics_lib.utils.files import home, update_json, write_csv


def made_run(name: str, probs: np.ndarray, labels: np.ndarray, copies: int = 1, **params) -> None:
    """What an evaluated run leaves behind; ``copies`` images are of each photograph."""
    folder = home() / "outputs" / name
    scores = {"auc": 0.9, "f1": 0.8, "fpr": 0.1, "ece": 0.05}
    update_json(
        folder / "run.json",
        params={"run_name": name, "seed": 0, "degrade": {"jpeg": 0.4}, **params},
        taskA_validation=scores,
        taskA_validation_intervals={key: [value - 0.05, value + 0.05] for key, value in scores.items()},
        taskA_training_seconds=100.0,
        machine="x86_64, 2 cores",
    )
    update_json(folder / "thresholds.json", A={"threshold": 0.5})
    table = pd.DataFrame({"prob": probs, "label": labels, "group": range(len(labels))}).loc[lambda t: t.index.repeat(copies)]
    table.insert(0, "path", [f"/data/{number}.jpg" for number in range(len(table))])
    write_csv(home() / "outputs" / f"{name}_val_probs.csv", table)


@pytest.fixture
def runs(rng) -> list[str]:
    labels = np.arange(200) % 2
    noise = rng.normal(0, 0.2, 200)
    made_run("weak", np.clip(0.5 + (labels - 0.5) * 0.2 + noise, 0, 1), labels)
    made_run("strong", np.clip(0.5 + (labels - 0.5) * 0.6 + noise, 0, 1), labels, batch_size=8)
    made_run("same", np.clip(0.5 + (labels - 0.5) * 0.6 + noise, 0, 1), labels, degrade={"jpeg": 0.1})
    return ["weak", "strong", "same"]


def test_a_real_difference_is_told_from_none(runs):
    tables = compare(runs)
    found = tables["differences"].set_index(["difference of", "score"])
    better, equal = found.loc[("strong minus weak", "auc")], found.loc[("same minus strong", "auc")]
    assert better["from"] > 0
    assert better["from"] <= better["value"] <= better["to"]
    assert (equal[["value", "from", "to"]] == 0).all()
    assert (found["images"] == 200).all()


def test_copies_of_photographs_make_no_difference_surer(rng):
    labels, noise = np.arange(100) % 2, rng.normal(0, 0.3, (2, 100))
    width = {}
    for copies in (1, 5):
        for name, of_run in zip(("one", "other"), noise, strict=True):
            made_run(name, np.clip(0.5 + (labels - 0.5) * 0.4 + of_run, 0, 1), labels, copies)
        found = compare(["one", "other"])["differences"]
        assert (found["images"] == 100 * copies).all()
        width[copies] = (found["to"] - found["from"]).to_numpy()
    np.testing.assert_allclose(width[5], width[1], rtol=0.25)


def test_only_what_differs_is_listed(runs):
    tables = compare(runs)
    assert set(tables["parameters"].index) == {"batch_size", "degrade"}
    assert tables["scores"]["run"].nunique() == 3
    assert tables["cost"].loc["task A, training, s"].tolist() == [100.0] * 3


def test_runs_that_share_no_images_have_no_difference(runs):
    labels = np.arange(20) % 2
    made_run("elsewhere", labels * 0.9, labels)
    path = home() / "outputs" / "elsewhere_val_probs.csv"
    path.write_text(path.read_text().replace("/data/", "/other/"))
    assert compare(["weak", "elsewhere"])["differences"].empty


@pytest.mark.parametrize(
    ("names", "fault"), [(["weak"], "two or more"), (["weak", "gone"], "no evaluated run gone; there are")]
)
def test_what_cannot_be_compared_is_named(runs, names, fault):
    with pytest.raises(ComparisonError, match=fault):
        compare(names)


def test_the_command_prints_tables_and_keeps_the_figure(runs, capsys):
    assert main(["compare", *runs]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("scores", "differences", "parameters", "cost", "strong minus weak"))
    assert (home() / "outputs" / "comparison_weak_strong_same.png").stat().st_size > 5000
    assert main(["compare", "gone", "weak"]) == 1


def test_the_figure_has_a_panel_for_each_score(runs):
    figure = comparison_figure(compare(runs))
    assert [axis.get_title() for axis in figure.axes] == [f"Task A: {score}" for score in ("auc", "f1", "fpr", "ece")]


def test_the_latest_others_stand_before_a_run(runs):
    for age, name in enumerate(["same", "weak", "strong"]):
        os.utime(home() / "outputs" / name / "run.json", (1000 - age, 1000 - age))
    update_json(home() / "outputs" / "unfinished" / "run.json", params={})
    run = Run(Params(run_name="new"), home())
    assert recent_runs(run) == ["weak", "same", "new"]
    assert recent_runs(run, others=5) == ["strong", "weak", "same", "new"]
    assert recent_runs(Run(Params(run_name="weak"), home())) == ["strong", "same", "weak"]
