import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binomtest

from forensics_lib.__main__ import main
from forensics_lib.images.traits import TRAITS, traits_of
from forensics_lib.params import Params
from forensics_lib.reports.analysis import analyze, errors_of, other_type
from forensics_lib.reports.analysis_page import answer, write_analysis
from forensics_lib.reports.compare import ComparisonError
from forensics_lib.run import Run
from forensics_lib.utils.files import home, update_json, write_csv

COUNT = 80  # images, half of them authentic; every fourth of each class is a JPEG of quality 50


@pytest.fixture
def images(tmp_path, rng) -> pd.DataFrame:
    rows = []
    for number in range(COUNT):
        path, label, poor = tmp_path / f"{number}.jpg", number % 2, number % 8 < 2
        pixels = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=50 if poor else 95)
        source = f"photos{number % 3}" if label == 0 else "generated"
        generator = None if label == 0 else ("old" if number % 3 else "new")
        rows.append({"path": str(path), "label": label, "poor": poor, "source": source, "generator": generator})
    return pd.DataFrame(rows)


def evaluated(name: str, kind: str, task: str, table: pd.DataFrame, sources: tuple[str, ...] = ("photos0",)) -> None:
    """What a run leaves behind that was evaluated on ``table``."""
    folder, data = home() / "outputs" / name, home() / "data" / "dataset"
    rows = [{"data_set": str(data), "source": s, "split": "train", "authentic": 10, "positive": 0} for s in sources]
    facts = {"params": {"run_name": name, "run_type": kind}, f"task{task}_data": rows}
    update_json(folder / "run.json", **facts, **{f"task{task}_validation": {"auc": 0.9, "f1": 0.9, "fpr": 0.1}})
    update_json(folder / "thresholds.json", **{task: {"threshold": 0.5, "loc_threshold": 0.5}})
    kept = table.assign(group=range(len(table)), platform=None, format="JPEG", kind=None, method=None, deciding=True)
    middle = "_" if task == "A" else "_taskB_"
    write_csv(home() / "outputs" / f"{name}{middle}val_probs.csv", kept.drop(columns="poor"))


@pytest.fixture
def runs(images) -> tuple[str, str]:
    """The first run is right; the second takes photographs that were compressed much for synthetic, and misses one more."""
    right = np.where(images["label"] == 1, 0.8, 0.2) + np.linspace(0, 0.1, COUNT)
    wrong = np.where(images["poor"] & (images["label"] == 0), 0.9, right)
    wrong[1] = 0.1
    evaluated("plain", "constrained", "A", images.assign(prob=right))
    evaluated("more", "open", "A", images.assign(prob=wrong), ("photos0", "photos1"))
    return "plain", "more"


@pytest.fixture
def analysis(runs):
    return analyze(runs)[0]


def test_groups_tell_where_a_run_got_worse(analysis):
    rates = analysis.groups[analysis.groups["measure"] == "error rate"].set_index(["by", "group", "class"])
    poor, good = (rates.loc[("JPEG quality", name, "authentic")] for name in ("under 70", "90 and more"))
    assert (poor["plain"], poor["more"], poor["difference"], poor["from"], poor["to"]) == (0, 1, 1, 1, 1)
    assert (good["difference"], good["from"], good["to"]) == (0, 0, 0)
    everything = rates.loc[("all", "all images", "authentic")]
    assert everything["more"] == 10 / 40
    assert everything["from"] < 10 / 40 < everything["to"]
    assert ("generator", "old", "synthetic") in rates.index
    assert "format" not in rates.index.get_level_values("by")  # all are JPEG: nothing that the whole does not say


def test_data_that_training_added_is_told_apart(analysis):
    rates = analysis.groups[analysis.groups["by"] == "in training"]
    assert set(rates["group"]) == {"of both", "of more alone", "of neither"}
    assert analysis.training.set_index("source").loc["photos1"].tolist() == ["dataset", 0, 0, 10, 0]


def test_errors_of_either_run_alone_are_counted_and_tested(analysis):
    table = analysis.errors.set_index("error")
    assert table.loc["authentic called synthetic"].tolist() == [30, 0, 10, 0, round(binomtest(0, 10).pvalue, 4)]
    assert table.loc["synthetic called authentic"].tolist() == [39, 0, 1, 0, 1.0]
    assert (errors_of(analysis.images) == "second alone").sum() == 11


def test_traits_of_false_positives_are_found(analysis):
    traits = analysis.traits.set_index(["run", "error", "trait"])
    effect = traits.loc[("more", "authentic called synthetic", "JPEG quality")]
    assert (effect["effect"], effect["wrong"], effect["right"]) == (-1, 10, 30)
    assert "plain" not in traits.index.get_level_values("run")  # it has no errors that anything could mark
    brightness = traits.loc[("more", "authentic called synthetic", "brightness")]
    assert brightness["from"] < 0 < brightness["to"]


def test_the_answer_names_what_was_found(analysis):
    told = " ".join(answer(analysis))
    assert "AUC of more minus plain: -" in told
    assert "0 by plain alone, 10 by more alone (more than chance makes, p 0.002)" in told
    assert "JPEG quality under 70, authentic (+100%)" in told
    assert re.search(r"more: lower (JPEG quality|bytes per pixel) \(effect -1.00\)", told)


def test_tables_and_figures_are_written_for_a_paper(runs):
    page = write_analysis(analyze(runs))
    assert page == home() / "outputs" / "more" / "analysis" / "analysis.html"
    text = page.read_text()
    assert text.count("<img") == 5
    assert "http" not in re.sub(r"data:image/webp;base64,[^\"]*", "", text)
    groups = pd.read_csv(page.parent / "taskA_groups.csv")
    latex = (page.parent / "taskA_groups.tex").read_text()
    assert latex.count(r"\\") >= len(groups)
    assert r"\toprule" in latex
    for name in ("differences", "errors", "traits", "training"):
        assert (page.parent / f"taskA_{name}.tex").is_file()
        assert len(pd.read_csv(page.parent / f"taskA_{name}.csv"))


def test_task_b_compares_masks(images):
    iou = np.where(images["label"] == 1, 0.5, 0.0)
    table = images.assign(prob=np.where(images["label"] == 1, 0.8, 0.2), iou=iou, flagged=0.0, size="under 1%")
    evaluated("plain", "constrained", "B", table)
    evaluated("more", "open", "B", table.assign(iou=iou * 1.5, flagged=np.where(images["label"] == 1, 0, 0.02)))
    (found,) = analyze()
    groups = found.groups.set_index(["by", "group", "class", "measure"])
    assert groups.loc[("all", "all images", "manipulated", "mean IoU"), "difference"] == 0.25
    assert groups.loc[("all", "all images", "authentic", "flagged"), "difference"] == 1
    assert write_analysis([found]).read_text().count("<img") == 6


def test_an_image_that_is_gone_leaves_its_traits_open(runs, images):
    for path in images["path"][:4]:
        Path(path).unlink()
    analysis = analyze(runs)[0]
    assert len(analysis.images) == COUNT
    assert write_analysis([analysis]).is_file()
    assert np.isnan(traits_of([images["path"][0]])).all()


def test_many_images_are_drawn_from(runs, images, monkeypatch):
    monkeypatch.setattr("forensics_lib.reports.analysis.MOST", 10)
    traits = analyze(runs)[0].traits
    assert set(traits["right"]) <= {9, 10}


def test_without_names_the_latest_of_each_type_are_compared(runs, images, capsys):
    evaluated("other", "open", "A", images.assign(prob=images["label"] * 0.5 + 0.25))
    assert main(["analyze"]) == 0
    shown = capsys.readouterr().out
    assert "other minus plain" in shown
    assert str(home() / "outputs" / "other" / "analysis" / "analysis.html") in shown


def test_a_notebook_compares_its_run_with_the_latest_of_the_other_type(runs):
    plain, more = Run(Params(run_name="plain"), home()), Run(Params(run_name="more", run_type="open"), home())
    assert other_type(plain) == other_type(more) == ["plain", "more"]
    assert other_type(Run(Params(run_name="new", run_type="open", tasks=["B"]), home())) == []


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["plain"], "compares two runs"),
        (["plain", "more", "third"], "compares two runs"),
        (["plain", "gone"], "no evaluated run gone"),
        (["plain", "elsewhere"], "not evaluated on the same images"),
    ],
)
def test_what_cannot_be_compared_is_told(names, fault, runs, images):
    evaluated("elsewhere", "open", "A", images.assign(prob=0.5, path="/other/" + images["path"]))
    with pytest.raises(ComparisonError, match=fault):
        analyze(names)


def test_one_run_alone_has_nothing_to_be_compared_with(images):
    evaluated("plain", "constrained", "A", images.assign(prob=0.5))
    with pytest.raises(ComparisonError, match="found plain; evaluated are plain"):
        analyze()


def test_traits_are_those_of_the_pixels(tmp_path):
    from skimage.data import astronaut

    grey = np.full((64, 128, 3), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / "flat.png")
    Image.fromarray(astronaut()).save(tmp_path / "face.jpg", quality=80)
    found = traits_of([str(tmp_path / "flat.png"), str(tmp_path / "face.jpg")])
    flat, face = (dict(zip(TRAITS, values, strict=True)) for values in found)
    assert (flat["short side"], flat["brightness"], flat["contrast"], flat["saturation"], flat["texture"]) == (64, 100, 0, 0, 0)
    assert np.isnan(flat["JPEG quality"])
    assert (face["JPEG quality"], face["frontal face"], flat["frontal face"]) == (80, 1, 0)
    assert face["texture"] > 1
