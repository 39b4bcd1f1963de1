"""What is reported of a model follows from the images that decide, and stands also where they are few."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import changed, picture, save, square_mask

from forensics_lib.data.manifest import build_manifest, sources
from forensics_lib.evaluation import evaluate as evaluation
from forensics_lib.evaluation import robustness
from forensics_lib.evaluation.evaluate import _platform, evaluate, evaluate_held_out, evaluate_robustness
from forensics_lib.evaluation.metrics import FALSE_ALARMS, THRESHOLD_FREE, binned, f1_score, threshold_free_scores, value_counts
from forensics_lib.evaluation.predictions import Predictions
from forensics_lib.models.checkpoint import read_checkpoint, save_checkpoint
from forensics_lib.models.combined import build_model
from forensics_lib.reports import captions, compare
from forensics_lib.reports import figures as plots
from forensics_lib.reports.browser import browse_evaluated_masks
from forensics_lib.reports.compare import compare as compare_runs
from forensics_lib.reports.figures import mask_examples
from forensics_lib.reports.model_card import build_card
from forensics_lib.reports.report import build_report
from forensics_lib.run import Run, Thresholds, stored_thresholds
from forensics_lib.utils.files import read_json, update_json


@pytest.fixture
def answers(monkeypatch):
    """A function from rows to probabilities stands for the model; masks are the truth's at that probability."""

    def use(prob):
        def predicted(model, task, rows, *_):
            probs = np.asarray(prob(rows), float)
            if task == "A":
                return Predictions(probs, {})
            truth = np.stack([square_mask(40, 40) > 0, np.zeros((40, 40), bool)])
            marks = [truth[0 if label else 1] for label in rows["label"]]
            counts = [value_counts(np.where(mark, value, 0.1), mark) for mark, value in zip(marks, probs, strict=True)]
            exact = pd.DataFrame([threshold_free_scores(found) for found in counts], columns=THRESHOLD_FREE)
            return Predictions(probs, {}, np.stack([binned(found) for found in counts]), exact)

        for module in (evaluation, robustness):
            monkeypatch.setattr(module, "predict_labelled", predicted)

    return use


def prepared(run: Run, task: str) -> tuple[Run, pd.DataFrame]:
    """A run with a checkpoint that nobody trained, and its manifest."""
    save_checkpoint(run.finetuned_model(task), build_model(run.params, task))
    manifest = build_manifest(run, task)
    run.record(**{f"task{task}_data": sources(manifest).to_dict("records")})
    return run, manifest


@pytest.fixture
def opened(tiny_run, rng):
    """An open run whose own validation images differ in what suits them from those of the official folder."""
    for split in ("train", "val"):
        for label in ("0_real", "1_fake"):
            for number in range(4):
                save(tiny_run.data / "dataset_open" / split / label / "more" / f"{number}.png", picture(rng))
    return changed(tiny_run, run_type="open")


def test_thresholds_and_headline_scores_are_of_the_official_images_alone(opened, answers, capsys):
    """The official images ask for a threshold around 0.3, those of the open sets for one around 0.9."""

    def probs(rows):
        spread = rows.groupby("label").cumcount() * 0.01
        return np.where(rows["source"] == "more", 0.8, 0.2) + rows["label"] * 0.15 + spread.to_numpy()

    answers(probs)
    run, manifest = prepared(opened, "A")
    found = evaluation.evaluate(run, "A", manifest)
    assert found.judged["source"].unique().tolist() == ["src"] and len(found.judged) == 8 and len(found.table) == 16
    official, others = found.judged, found.table[~found.table["deciding"]]
    assert found.metrics["f1"] == found.metrics["auc"] == 1 and found.metrics["images"] == 8
    assert others["prob"].min() > found.thresholds.threshold and found.others["fpr"] == 1 and found.others["images"] == 8
    assert found.summary().columns.tolist()[-1] == "other validation images"
    assert set(found.by("source")["source"]) == {"src", "more"}, "tables by source hold every image"
    written = pd.read_csv(run.val_probs("A"))
    assert len(written) == 16 and written["deciding"].sum() == 8
    stored, record = read_json(run.thresholds)["A"], read_json(run.folder / "run.json")
    assert stored["chosen_on"] == record["taskA_chosen_on"] == found.chosen_on
    assert (stored["chosen_on"]["images"], stored["chosen_on"]["others"], stored["images"]) == (8, 8, 8)
    assert "chosen on 8 of 16 validation images: the official validation set" in capsys.readouterr().out
    for text in (build_card(run, "A").read_text(), build_report(run).read_text()):
        assert "on 8 validation images" in text and "other validation images" in text
    alone = evaluation.evaluate(run, "A", manifest[manifest["source"] == "src"].reset_index(drop=True))
    assert alone.thresholds == found.thresholds and alone.intervals == found.intervals and alone.others is None
    assert alone.metrics == found.metrics
    sweep = evaluation.evaluate_robustness(run, "A", manifest)
    assert sweep["images"].eq(len(official)).all()


def test_a_comparison_is_of_the_images_that_decide(opened, answers, monkeypatch):
    answers(lambda rows: np.where(rows["source"] == "more", 0.1, 0.3) + rows["label"] * 0.4)
    _, manifest = prepared(opened, "A")
    for name in ("one", "two"):
        run = changed(opened, run_name=name)
        evaluation.evaluate(prepared(run, "A")[0], "A", manifest)
    monkeypatch.setattr(compare, "ROUNDS", 3)
    assert compare_runs(["one", "two"])["differences"]["images"].eq(8).all()


def few(run: Run, counts: tuple[int, int]) -> pd.DataFrame:
    """The Task B manifest of which validation keeps so many authentic and manipulated images."""
    manifest = build_manifest(run, "B")
    official = manifest[(manifest["split"] == "val") & (manifest["layout"] == "task_b_validation")]
    kept = pd.concat([official[official["label"] == label].head(count) for label, count in enumerate(counts)])
    return pd.concat([manifest[manifest["split"] != "val"], kept], ignore_index=True)


def test_edition_2026_chooses_by_iou_of_regenerated_images_and_reports_spliced_ones_beside(tiny_run, answers):
    """The model sees spliced images surely, and one authentic image among the regenerated ones."""
    surely = {"sp": 0.9, "fr": 0.5, "orig": 0.1}
    alarm = "0_orig.png"
    answers(lambda rows: np.where(rows["path"].str.endswith(alarm), 0.6, rows["kind"].map(surely)))
    run, manifest = prepared(changed(tiny_run, edition=2026), "B")
    found = evaluation.evaluate(run, "B", manifest)
    assert set(found.judged["kind"]) == {"orig", "fr"} and list(found.other_kinds) == ["sp"]
    assert found.other_kinds["sp"]["recall"] == 1 and "sp beside" in found.summary()
    chosen = read_json(run.thresholds)["B"]
    assert "IoU as submitted" in chosen["rule"] and chosen["edition"] == 2026
    assert "sp beside" in build_report(run).read_text()
    earlier = changed(tiny_run, run_name="earlier")
    before = evaluation.evaluate(earlier, "B", prepared(earlier, "B")[1])
    assert not before.other_kinds and "at most 10%" in read_json(earlier.thresholds)["B"]["rule"]


@pytest.mark.parametrize(("counts", "prob"), [((1, 1), None), ((1, 1), 0.0), ((2, 1), 0.4), ((1, 2), 1.0)])
def test_everything_is_reported_of_a_handful_of_images(tiny_run, answers, counts, prob, rng):
    answers((lambda rows: rng.random(len(rows))) if prob is None else (lambda rows: np.full(len(rows), prob)))
    run, _ = prepared(tiny_run, "B")
    manifest = few(run, counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluation.evaluate(run, "B", manifest)
        sweep = evaluation.evaluate_robustness(run, "B", manifest)
        assert found.metrics["submitted_flagged_authentic"] <= FALSE_ALARMS, "the rule of the image threshold"
        held_out = evaluation.evaluate_held_out(run, "B", manifest)
        tables = [found.summary(), found.threshold_table(), found.by("source", "kind"), held_out.summary()]
        assert all(len(table) for table in tables)
        figures = [plots.score_curves(found, "B"), plots.confusion(found, "B"), plots.reliability_diagram(found, "B")]
        figures += [plots.robustness_curves(sweep, "B"), plots.example_gallery(run, found, "best")]
        figures += [plots.example_gallery(run, found, which) for which in ("worst", "borderline", "alarms")]
        for figure in figures:
            figure.canvas.draw()
        told = [
            getattr(captions, name)(found, "B") for name in ("score_curves", "confusion", "reliability_diagram", "most_wrong")
        ]
        told += [captions.robustness_curves(sweep, "B"), captions.group_table(found.by("source", "kind"), "B")]
        told += [captions.example_gallery(found, which) for which in plots.EXAMPLES]
        assert not any("nan" in sentence for sentence in told)
    browse_evaluated_masks(run, found)
    card = build_card(run, "B").read_text()
    assert "Limits" in card and f"tiles of {run.params.tile_size} pixels" in card and build_report(run).is_file()


def test_galleries_without_an_image_say_so(tiny_run):
    results = pd.DataFrame({"image_id": ["a.jpg"], "path": ["a.jpg"], "prob": [0.5], "error": ["unreadable"]})
    figure = plots.test_gallery(tiny_run, results, 0.5)
    assert "no such image" in figure.axes[0].texts[0].get_text()


def test_the_f1_of_a_calibrated_threshold_is_that_of_the_raw_probabilities(opened, answers, rng):
    """Calibration moves probabilities, not their order."""
    raw = {}

    def probs(rows):
        raw["probs"] = np.clip(rng.normal(0.1 + 0.05 * rows["label"], 0.05), 0, 1)
        return raw["probs"]

    answers(probs)
    run, manifest = prepared(opened, "A")
    found = evaluation.evaluate(run, "A", manifest)
    labels, decides = found.table["label"].to_numpy(int), found.table["deciding"].to_numpy()
    best = max(f1_score(labels[decides], raw["probs"][decides] >= value) for value in raw["probs"][decides])
    assert found.metrics["f1"] == pytest.approx(best)


def test_photographs_that_stand_elsewhere_are_left_out_beside_all(tiny_run, answers):
    run, manifest = prepared(tiny_run, "B")
    answers(lambda rows: np.linspace(0.2, 0.9, len(rows)))
    assert evaluation.evaluate(run, "B", manifest).without_overlap is None, "both official photographs are TGIF's"
    official = manifest["layout"].eq("task_b_validation")
    alone = [manifest.index[official & manifest["label"].eq(label)][0] for label in (0, 1)]
    manifest.loc[alone, "group"] = "coco:900"
    found = evaluation.evaluate(run, "B", manifest)
    assert found.without_overlap["images"] == 2 < found.metrics["images"]
    assert "without overlap" in found.summary().columns


def test_validation_writes_probabilities_and_thresholds(trained):
    run, manifest = trained("B")
    evaluation = evaluate(run, "B", manifest)
    written = pd.read_csv(run.val_probs("B"))
    assert written.columns[:2].tolist() == ["image_id", "prob"]
    assert len(written) == len(evaluation.table) == 10
    thresholds = stored_thresholds(run, "B")
    assert set(thresholds.facts()) == {"threshold", "loc_threshold", "temperature", "intercept"}
    assert read_checkpoint(run.finetuned_model("B"))["thresholds"] == thresholds.facts()
    assert {"iou_manipulated", "iou_all", "flagged_authentic"} <= set(evaluation.metrics)
    assert evaluation.without_overlap is None, "the official set's photographs are all TGIF's here"
    assert evaluation.summary().columns.tolist() == ["deciding images", "95% from", "to", "other validation images"]
    held_out = evaluate_held_out(run, "B", manifest)
    assert set(held_out.table["split"]) == {"test"}
    assert held_out.thresholds == thresholds
    assert evaluation.by("source", "kind")["images"].sum() == 10
    assert all(example.truth.any() for example in mask_examples(run, evaluation, "best", 3))
    assert not any(example.truth.any() for example in mask_examples(run, evaluation, "alarms", 3))
    ranked = evaluation.table[evaluation.table["label"] == 1].sort_values("iou")
    for which, row in (("worst", ranked.iloc[0]), ("best", ranked.iloc[-1])):
        (first,) = mask_examples(run, evaluation, which, 1)
        assert f"IoU {row['iou']:.2f}" in first.title
    (nearest,) = mask_examples(run, evaluation, "borderline", 1)
    assert plots.mask_gallery([nearest], 0.5, "borderline")
    unknown = replace(evaluation, table=evaluation.table.assign(method=None))
    assert "\nmanipulated (" in mask_examples(run, unknown, "best", 1)[0].title
    browser = browse_evaluated_masks(run, evaluation)
    browser.forth.click()
    assert "IoU" in browser.text.value
    assert {"loc_threshold", "iou_manipulated", "threshold"} <= set(evaluation.intervals)
    by_size = evaluation.by("kind", "size")
    assert set(by_size.loc[by_size["label"] == 0, "size"]) == {"none"}
    assert "none" not in set(by_size.loc[by_size["label"] == 1, "size"])


def test_an_evaluation_tells_what_stands_behind_its_scores(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    for low, high in evaluation.intervals.values():
        assert low <= high
    assert set(evaluation.intervals) >= {"auc", "f1", "fpr", "threshold", "tpr_at_5_fpr"}
    table = evaluation.threshold_table()
    assert table.loc["best in hindsight", "f1"] >= table["f1"].max() - 1e-9
    wrong = evaluation.most_wrong()
    called = wrong["prob"] >= evaluation.thresholds.threshold
    assert (called != wrong["label"].astype(bool)).all()
    sweep = evaluate_robustness(run, "A", manifest)
    assert sweep["images"].eq(8).all()
    card = build_card(run, "A").read_text()
    assert "chosen on 8 validation images (4 of them positive)" in card and "log(4 / 4)" in card
    facts = read_json(run.folder / "run.json")
    update_json(run.folder / "run.json", taskA_chosen_on=None)  # as a version that fitted no intercept left it
    assert "fitted no intercept" in build_card(run, "A").read_text()
    update_json(run.folder / "run.json", **facts)
    for part in ("Intended use", "| AUC |", "Scores by generator", "after common changes", "test_convnext", "Limits"):
        assert part in card
    for figure in (
        plots.reliability_diagram(evaluation, "A"),
        plots.robustness_curves(sweep, "A"),
        plots.attribution_gallery(run, evaluation.surest(), "surest"),
    ):
        figure.canvas.draw()


def test_without_a_mistake_the_gallery_of_mistakes_is_empty(trained):
    run, manifest = trained("A")
    evaluation = evaluate(run, "A", manifest)
    evaluation.table["prob"] = evaluation.table["label"].astype(float)
    assert evaluation.most_wrong().empty
    plots.attribution_gallery(run, evaluation.most_wrong(), "none").canvas.draw()


def test_the_typical_image_is_the_median_of_the_positive_ones_that_decide():
    table = pd.DataFrame({"label": [0, 1, 1, 1, 1], "prob": [0.8, 0.7, 0.9, 0.1, 0.8], "deciding": [True] * 4 + [False]})
    found = evaluation.Evaluation(table, Thresholds(threshold=0.5), {}, [])
    assert found.typical()["prob"] == 0.7
    found.table = table.assign(iou=[0.0, 0.2, 0.4, 0.3, 0.9])
    assert found.typical()["iou"] == 0.3
    found.table = table[table["label"] == 0]
    with pytest.raises(ValueError, match="no positive image"):
        found.typical()


def test_platforms_are_known_by_source_or_name():
    assert _platform("itw_sm/facebook", "a.jpg") == "facebook"
    assert _platform("src", "X_618.jpg") == "x"
    assert _platform("src", "holiday_1.jpg") is None
