"""The localization benchmark's report."""

import json

import bench_localization
import numpy as np
import pandas as pd
import pytest

from forensics_lib.evaluation.metrics import value_counts
from forensics_lib.run import Thresholds


def made_run(iou: float, **values) -> dict:
    keys = ("iou", "pixel_f1", "best_pixel_f1", "pixel_auc", "iou_all", "f1", "auc", "iou_sp", "iou_fr")
    keys += tuple(f"submitted_{key}" for key in ("iou", "iou_all", "iou_sp", "iou_fr", "flagged_authentic"))
    split = dict.fromkeys(keys, iou) | {"flagged_authentic": 0.3, "fpr": 0.1, "by_method": {"paste": iou}}
    facts = {"recipe": "ours", "seed": 0, "label": "", "settings": {}, "seconds": 500.0, "machine": "m", "torch": "t"}
    facts["params"] = bench_localization.params_for("official", 0, "now", {}).model_dump(mode="json")
    return facts | dict.fromkeys(("val", "simulated", "test"), split) | {"real": split | {"iou_fr": None}} | values


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_localization, "BUILD", tmp_path / "build")
    monkeypatch.setattr(bench_localization, "DOCS", tmp_path / "docs")
    (tmp_path / "build").mkdir()
    return tmp_path


def report(folders, **runs: dict) -> str:
    for name, run in runs.items():
        (folders / "build" / f"{name}.json").write_text(json.dumps(run))
    bench_localization.report()
    return (folders / "docs" / "localization.md").read_text().replace("\n  ", " ")


def test_targets_are_judged_by_medians_and_against_the_naive_recipe(folders):
    runs = {f"ours-{seed}": made_run(iou, seed=seed) for seed, iou in enumerate((0.4, 0.6, 0.7))}
    runs |= {"ours-open-0": made_run(0.75, data="open", start="clip", edits=runs["ours-0"]["val"])}
    text = report(folders, **runs, naive=made_run(0.4, recipe="naive"), floors={"centre box": made_run(0.5)})
    assert "| simulated SP, mean IoU, official data alone | at least 0.55 | 0.600 | met |" in text
    assert "| simulated SP, mean IoU | at least 0.55 | 0.750 | met |" in text
    assert "| real pairs, mean IoU, times the best floor | at least 1.50 | 1.500 | met |" in text
    assert "| edits, pixel AUC | at least 0.75 | 0.400 | MISSED |" in text
    assert "| test: authentic images with over 1% of pixels flagged, as submitted | at most 0.10 | 0.750 | MISSED |" in text
    assert "IoU 0.60 where its training has these kinds alone" in text
    assert "pixel AUC 0.75 (best floor: centre box 0.50; a small backbone: nan)" in text
    assert "floor: centre box" in text and "| ours, open data, CLIP |" in text


def test_ablations_stand_apart_and_earlier_runs_are_kept(folders, monkeypatch):
    former = made_run(0.4)
    tried = made_run(0.9, label="tried", settings={"paste": 0.1, "mask_loss": "focal_dice", "pastes": "squares"})
    tried["params"] |= {"paste": 0.1, "mask_loss": "focal_dice"}
    text = report(folders, a=former, b=tried)
    assert "| simulated SP, mean IoU, official data alone | at least 0.55 | 0.400 | MISSED |" in text
    assert "not measured" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| tried ")]
    assert "| pastes: squares, paste 0.1, mask_loss focal_dice |" in line
    (folders / "build" / "a.json").unlink()
    assert "0.400 | MISSED" in report(folders)


def test_scores_of_a_set_tell_kinds_and_methods_apart():
    truth = np.zeros((3, 8, 8), bool)
    truth[1:, :4] = True
    masks = np.stack([np.zeros((8, 8)), truth[1] * 1.0, np.ones((8, 8))])
    counts = [value_counts(mask, true) for mask, true in zip(masks, truth, strict=True)]
    rows = pd.DataFrame({"label": [0, 1, 1], "kind": ["orig", "sp", "fr"], "method": [None, "a", "b"]})
    thresholds = Thresholds(threshold=0.5, loc_threshold=0.5)
    found = bench_localization.scored(rows, bench_localization.predictions([0.1, 0.9, 0.9], counts), thresholds)
    assert (found["iou_sp"], found["iou_fr"], found["iou"]) == (1.0, 0.5, 0.75)
    assert found["by_method"] == {"a": 1.0, "b": 0.5}
    assert (found["f1"], found["flagged_authentic"]) == (1.0, 0.0)
    assert found["submitted_iou_all"] == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-4)
    assert (found["pixel_auc"], found["best_pixel_f1"]) == (0.75, pytest.approx((1 + 2 / 3) / 2, abs=1e-4))
    spliced = bench_localization.scored(rows[:2], bench_localization.predictions([0.1, 0.9], counts[:2]), thresholds)
    assert spliced["iou_fr"] is None


def test_without_a_corpus_it_says_so_and_stops(folders, monkeypatch, capsys):
    monkeypatch.setattr(bench_localization, "CORPUS", folders / "nothing")
    monkeypatch.setattr("sys.argv", ["bench_localization.py", "run"])
    bench_localization.main()
    assert "set FORENSICS_CORPUS" in capsys.readouterr().out
