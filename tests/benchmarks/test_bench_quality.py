"""The quality benchmark's report, and what the benchmark brings along."""

import json
import re

import bench_decisions
import bench_quality
import numpy as np
import pandas as pd
import pytest
import taef2

from forensics_lib.synthesis.autoencoder import load_autoencode


def made_run(auc: float, **values) -> dict:
    split = dict.fromkeys(("f1", "f1_oracle", "f1_half", "auc_social"), auc) | {"auc": auc, "fpr": 0.1}
    facts = {"recipe": "ours", "data": "constrained", "start": "clip", "seed": 0, "label": "", "settings": {}}
    facts["params"] = bench_quality.params_for("constrained", "clip", 0, "now", {}).model_dump(mode="json")
    facts["params"] |= values.get("settings", {})
    facts |= {"val": split, "test": split, "test_generators": {"GAN": auc}, "seconds": 500.0, "machine": "m", "torch": "t"}
    return facts | values


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_quality, "BUILD", tmp_path / "build")
    monkeypatch.setattr(bench_quality, "DOCS", tmp_path / "docs")
    (tmp_path / "build").mkdir()
    return tmp_path


def report(folders, **runs: dict) -> str:
    for name, run in runs.items():
        (folders / "build" / f"{name}.json").write_text(json.dumps(run))
    bench_quality.report()
    return (folders / "docs" / "quality.md").read_text()


def test_targets_are_judged_by_the_median_over_seeds(folders):
    runs = {f"s{seed}": made_run(auc, seed=seed) for seed, auc in enumerate((0.80, 0.93, 0.94))}
    text = report(folders, **runs, o=made_run(0.94, data="open"))
    assert "| constrained, AUC on val | at least 0.926 | 0.930 | met |" in text
    assert "| constrained, AUC on test | at least 0.949 | 0.930 | MISSED |" in text
    assert "| open minus constrained, AUC on val | at least 0.02 | 0.010 | MISSED |" in text
    assert "| scratch, AUC above the naive recipe's, val | at least 0.10 | nan | not measured |" in text
    assert "0.930 (0.800 to 0.940)" in text


def test_ablations_stand_apart_and_say_what_the_recipe_has_not(folders):
    shipped = {"dropout": bench_quality.load_params("params/clip.yaml").dropout, "crop_size": 160}
    text = report(
        folders,
        a=made_run(0.9),
        b=made_run(0.99, label="kept", settings=shipped),
        c=made_run(0.99, label="tried", settings={"mixup": 0.7}),
        d=made_run(0.99, label="gone", settings={"no_longer_there": 1}),
    )
    assert "| constrained, AUC on val | at least 0.926 | 0.900 | MISSED |" in text
    (kept,) = [line for line in text.splitlines() if line.startswith("| kept ")]
    (tried,) = [line for line in text.splitlines() if line.startswith("| tried ")]
    assert "| in nothing | 160 |" in kept and "| mixup 0.7 |" in tried


def test_runs_of_earlier_reports_are_kept_and_not_done_again(folders, monkeypatch):
    name = "ours-constrained-pretrained-0"
    report(folders, **{name: made_run(0.9)})
    (folders / "build" / f"{name}.json").unlink()
    assert "0.900 (0.900 to 0.900)" in report(folders)
    monkeypatch.setattr(bench_quality, "build_manifest", lambda *_: pytest.fail("done again"))
    bench_quality.run_one("ours", "constrained", "pretrained", 0, "", {})


def test_without_a_corpus_it_says_so_and_stops(folders, monkeypatch, capsys):
    monkeypatch.setattr(bench_quality, "CORPUS", folders / "nothing")
    monkeypatch.setattr("sys.argv", ["bench_quality.py", "run"])
    bench_quality.main()
    assert "set FORENSICS_CORPUS" in capsys.readouterr().out


def test_how_far_decisions_hold_is_told_by_set(folders):
    alarms = [{"source": "phones", "photographs": 40, "rate": 0.25, "from": 0.14, "to": 0.4}]
    found = {"recall": 0.8, "unsure": 0.2, "right if sure": 0.9, "right if unsure": 0.6, "alarms": alarms}
    joins = [{"crops": "the centre", "crops per image": 1.0, "AUC": 0.71}]
    (folders / "build" / "decisions").mkdir()
    (folders / "build" / "decisions" / "constrained.json").write_text(json.dumps({"joins": joins, "sets": {"val": found}}))
    text = report(folders, a=made_run(0.9))
    assert "| constrained | val | 0.800 | 0.200 | 0.900 | 0.600 |" in text
    assert "| val | phones | 40 | 0.250 | 0.140 | 0.400 |" in text and "| the centre | 1.000 | 0.710 |" in text
    (folders / "build" / "decisions" / "constrained.json").unlink()
    assert "| the centre | 1.000 | 0.710 |" in report(folders)  # as the last report held it


def test_an_image_is_unsure_where_a_change_turns_its_decision():
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "source": ["a", "a", "b", "b"]})
    before, after = np.array([0.1, 0.6, 0.7, 0.9]), np.array([0.1, 0.6, 0.4, 0.9])

    class Asked:
        def probs(self, _, change=None):
            return before if change is None else after

    found = bench_decisions.unsure(Asked(), rows, 0.5)
    assert (found["recall"], found["unsure"]) == (1.0, 0.25)
    assert found["right if sure"] == pytest.approx(2 / 3) and found["right if unsure"] == 1
    assert found["alarms"][0]["rate"] == 0.5 and found["alarms"][0]["from"] < 0.1 < 0.9 < found["alarms"][0]["to"]


@pytest.mark.skipif(not (taef2.CORPUS / "weights").is_dir(), reason=f"no weights in {taef2.CORPUS} (FORENSICS_CORPUS)")
def test_taef2_gives_an_image_back_nearly_as_it_was():
    y, x = np.mgrid[:72, :100]
    image = np.stack([128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), 128 + 60 * np.sin((x + y) / 11)], 2).astype(np.uint8)
    again = load_autoencode("taef2:load")(image)
    assert again.shape == image.shape and again.dtype == np.uint8
    assert 0 < np.abs(again.astype(int) - image).mean() < 12


def test_the_numbers_of_the_readme_are_those_that_were_measured():
    """The table of the first screen, against the runs that docs/*.json hold."""
    from bench_localization import DOCS, _of

    stored = {name: json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in ("quality", "localization")}
    of_start = {
        start: bench_quality.Groups(list(stored["quality"]["runs"].values()), start) for start in ("clip", "pretrained")
    }
    main_runs = [run for run in stored["localization"]["runs"].values() if not run["label"]]
    box = stored["localization"]["floors"]["centre box"]["real"]
    measured = [groups.of("ours", "constrained", split, "auc") for groups in of_start.values() for split in ("val", "test")]
    measured += [groups.of("ours", "modern", "modern", "auc") for groups in of_start.values()]
    for start, keys in (("clip", ("pixel_auc", "iou", "submitted_iou")), ("pretrained", ("pixel_auc", "iou"))):
        measured += [_of(main_runs, "ours", "real", key, "open", start) for key in keys]
    measured += [box["pixel_auc"], box["iou"]]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith(("| Task A:", "| Task B:"))]
    assert [float(number) for number in re.findall(r"\b0\.\d{3}\b", "".join(rows))] == [round(value, 3) for value in measured]
