"""Each way in which stored results are broken on purpose is told in words, and a healthy run has no finding."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from conftest import changed

from forensics_lib.__main__ import main
from forensics_lib.data.manifest import build_manifest
from forensics_lib.images.masks import save_mask
from forensics_lib.inference.predict import inference_settings
from forensics_lib.reports.doctor import SEVERITIES, WRONG, _inverted_iou, diagnose
from forensics_lib.reports.report import build_report
from forensics_lib.run import Run
from forensics_lib.training.resume import append_history
from forensics_lib.utils.files import update_json, write_csv

IMAGES = 40  # of validation, half of them positive


@dataclass
class Results:
    """What a healthy run stores of a task, to be broken and then written."""

    run: Run
    task: str
    manifest: pd.DataFrame
    table: pd.DataFrame
    thresholds: dict
    facts: dict
    history: list[dict]
    mask: np.ndarray  # of each test image, before it is cut to its size

    def write(self) -> Run:
        write_csv(self.run.val_probs(self.task), self.table)
        update_json(self.run.thresholds, **{self.task: self.thresholds})
        self.run.record(params=self.run.params.model_dump(), data=str(self.run.data))
        self.run.record(**{f"task{self.task}_{name}": value for name, value in self.facts.items()})
        for line in self.history:
            append_history(self.run, {"task": self.task, **line})
        if self.task == "B":
            names = sorted(path.name for path in self.run.test_folder("B").iterdir())
            write_csv(self.run.test_probs("B"), pd.DataFrame({"image_id": names, "prob": 0.9}))
            for name in names:
                save_mask(self.run.masks / f"{name.rpartition('.')[0]}.npz", self.mask)
        return self.run

    def told(self) -> str:
        """The diagnosis in one line of text."""
        return " ".join(str(diagnose(self.write(), self.task, self.manifest)).split())


@pytest.fixture(params=["A", "B"])
def healthy(request, tiny_run, rng) -> Results:
    return healthy_results(tiny_run, request.param, rng)


@pytest.fixture
def of_masks(tiny_run, rng) -> Results:
    return healthy_results(tiny_run, "B", rng)


def healthy_results(run: Run, task: str, rng: np.random.Generator) -> Results:
    labels = np.arange(IMAGES) % 2
    probs = np.where(labels, 0.6, 0.05) + 0.3 * rng.random(IMAGES)
    probs[:4] = 0.4, 0.45, 0.5, 0.35  # not without mistakes
    names = [f"val{number}.png" for number in range(IMAGES)]
    table = pd.DataFrame({"image_id": names, "prob": probs, "label": labels, "group": names, "path": names, "deciding": True})
    if task == "B":
        scores = {
            "iou": 0.6 * labels,
            "submitted_iou": 0.6 * labels + (1 - labels),
            "flagged": 0.2 * labels,
            "truth": 0.2 * labels,
        }
        table = table.assign(**scores, pixel_auc=np.where(labels, 0.9, np.nan))
    settings = inference_settings(run.params, task)
    chosen = {"threshold": 0.4250001, "loc_threshold": 0.4} if task == "B" else {"threshold": 0.4250001}
    sources = [{"source": "both", "split": split, "authentic": 9, "positive": 9} for split in ("train", "val")]
    facts = {"data": sources, "chosen_on": {"rule": "all validation images", "images": IMAGES, "positive": 20, "others": 0}}
    facts |= {"left_out": [], "validation": {"f1": 0.9}, "findings": {"rows": []}, "data_fingerprint": "x"}
    facts["inferred"] = {"thresholds": chosen, "test_folder": str(run.test_folder(task)), **settings}
    history = [{"step": step, "epoch": 1, "train_loss": loss} for step, loss in (("head", 0.69), ("finetune", 0.3))]
    mask = np.zeros((70, 90))  # the size of the tiny test images of Task B
    mask[:20, :20] = 0.9
    return Results(run, task, build_manifest(run, task), table, chosen | settings, facts, history, mask)


def test_a_healthy_run_has_no_finding(healthy):
    found = diagnose(healthy.write(), healthy.task, healthy.manifest)
    assert found.findings == [] and found.unchecked == {}
    text = str(found)
    assert "nothing wrong was found" in text and "Checked: that the run is evaluated, the training" in text
    assert "has 0.667" in text, "F1 of an answer that is always positive"
    assert ("flagging every pixel has 0.200, an empty mask 0" in text) == (healthy.task == "B")
    assert ("empty masks everywhere have 0.500" in " ".join(text.split())) == (healthy.task == "B")
    assert "40 of 40 validation images decide" in text and "No labelled image is left out" in text


def constant(results: Results) -> None:
    results.table["prob"] = 0.5


def inverted(results: Results) -> None:
    results.table["prob"] = 1 - results.table["prob"]


def all_positive(results: Results) -> None:
    results.thresholds["threshold"] = 0.0000005


def none_positive(results: Results) -> None:
    results.thresholds["threshold"] = 0.9999999


def trained_on(results: Results) -> None:
    train = results.manifest[results.manifest["split"] == "train"]
    results.table.loc[:2, "path"] = train["path"].to_numpy()[:3]


def photographs_trained_on(results: Results) -> None:
    results.table.loc[:4, "group"] = results.manifest.loc[results.manifest["split"] == "train", "group"].to_numpy()[0]
    results.facts["validation_without_overlap"] = {"f1": 0.7}


def equal_files(results: Results) -> None:
    results.facts["findings"]["rows"] = [{"finding": "equal files in several splits", "count": 3, "remedy": "remove them"}]


def shortcut(results: Results) -> None:
    results.facts["shortcut_auc_of_crops"] = 0.93


def one_class(results: Results) -> None:
    results.facts["data"].append({"source": "camera", "split": "train", "authentic": 7, "positive": 0})


def stopped(results: Results) -> None:
    results.history.pop()


def not_finite(results: Results) -> None:
    results.history[-1]["train_loss"] = float("nan")


def never_fell(results: Results) -> None:
    results.history[-1]["train_loss"] = 0.7


def other_crops(results: Results) -> None:
    results.thresholds["inference"] = results.thresholds["inference"] | {"crop_size": 64}
    results.facts["inferred"]["inference"] = results.thresholds["inference"]


def older_predictions(results: Results) -> None:
    results.facts["inferred"]["thresholds"] = {"threshold": 0.3}


def other_precision(results: Results) -> None:
    results.thresholds["precision"] = "fp16"


def never_evaluated(results: Results) -> None:
    results.thresholds = {}


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (constant, "the output is constant: all 40 probabilities lie between 0.5000 and 0.5000"),
        (inverted, "probabilities are inverted: AUC 0.0"),
        (all_positive, "is at the edge of the range: all 40 validation images"),
        (all_positive, "F1 0.667 is no better than that of calling every image"),
        (none_positive, "is at the edge of the range: none of 40 validation images"),
        (trained_on, "validation trains: 3 of 40 validation images are training images"),
        (
            photographs_trained_on,
            "photographs of 5 of 40 validation images are in training too (F1 without them 0.700, with them 0.9",
        ),
        (equal_files, "WRONG: equal files in several splits: 3"),
        (shortcut, "facts of their files tell the classes with AUC 0.93"),
        (one_class, "one class is missing in 1 of 2 training sources: camera (7 authentic, 0"),
        (stopped, "training stopped early: step finetune has 0 of 1 epochs"),
        (not_finite, "the training loss is not finite from step finetune, epoch 1 on"),
        (never_fell, "the training loss never fell: 0.690 in the first of 2 epochs, 0.700"),
        (other_crops, "chosen with other inference settings than those in use: crop_size=64 then, crop_size=32 now"),
        (older_predictions, "the test images were predicted with other thresholds"),
        (other_precision, "thresholds were chosen in fp16, this machine predicts in fp32"),
        (never_evaluated, "the run was not evaluated: nothing of Task"),
    ],
)
def test_what_is_broken_is_told(breaks, words, healthy):
    breaks(healthy)
    told = healthy.told()
    assert words in told
    assert "Why it matters: " in told and "What to do: " in told


def few_called(results: Results) -> None:
    results.thresholds["threshold"] = 0.85


def masks_inverted(results: Results) -> None:
    results.table.loc[results.table["label"] == 1, ["iou", "flagged", "pixel_auc"]] = 0.02, 0.79, 0.2


def masks_empty(results: Results) -> None:
    results.table.loc[results.table["label"] == 1, ["iou", "flagged"]] = 0.0, 0.0


def masks_full(results: Results) -> None:
    results.table.loc[results.table["label"] == 1, ["iou", "flagged"]] = 0.2, 1.0


def edge_of_pixels(results: Results) -> None:
    results.thresholds["loc_threshold"] = 1 / 256


def written_turned(results: Results) -> None:
    results.mask = results.mask.T


def written_empty(results: Results) -> None:
    results.mask = np.zeros((70, 90))


def written_full(results: Results) -> None:
    results.mask = np.ones((70, 90))


def truth_inverted(results: Results) -> None:
    rows = [{"finding": "sets whose regions fill over 60% of an image", "count": 1, "remedy": "inverted? TGIF median 90%"}]
    results.facts["findings"]["rows"] = rows


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (few_called, "DOUBTFUL: F1 0."),
        (few_called, "the threshold lets at most 10% of the authentic validation images be called manipulated, which misses 1"),
        (few_called, "of 20 manipulated ones; without this limit F1 would be 0.9"),
        (masks_inverted, "masks are inverted: mean IoU 0.020 over 20 manipulated images, and 0.787"),
        (masks_empty, "masks are nearly empty: under 0.1% of the pixels are flagged in 100% of 20 manipulated images"),
        (masks_full, "masks are nearly full: over 95% of the pixels are flagged in 100% of 20"),
        (masks_full, "the mean IoU 0.200 over manipulated images is no better than that of flagging every pixel (0.200)"),
        (edge_of_pixels, "the localization threshold 0.0039 is at the edge of the range"),
        (
            written_turned,
            "4 of 4 masks of test images that were read: b0.jpg has 90 x 70 pixels, its mask 70 x 90",
        ),
        (written_empty, "masks of test images are nearly empty: 4 of 4 that are called manipulated"),
        (written_full, "masks of test images are nearly full: 4 of 4"),
        (truth_inverted, "inverted? TGIF median 90%"),
    ],
)
def test_masks_that_are_broken_are_told(breaks, words, of_masks):
    breaks(of_masks)
    assert words in of_masks.told()


def test_a_mask_that_is_missing_is_told(of_masks):
    run = of_masks.write()
    (run.masks / "b1.npz").unlink()
    assert "masks are missing: 1: b1.npz" in str(diagnose(run, "B", of_masks.manifest))


def test_the_iou_of_an_inverted_mask_follows_from_what_is_stored(rng):
    """IoU of 1 - mask by its formula, and as counted."""
    mask, truth = rng.random((20, 30)) > 0.3, rng.random((20, 30)) > 0.6
    row = {"iou": (mask & truth).sum() / (mask | truth).sum(), "flagged": mask.mean(), "truth": truth.mean()}
    assert _inverted_iou(pd.DataFrame([row]))[0] == pytest.approx((~mask & truth).sum() / (~mask | truth).sum())


def test_the_worst_comes_first_and_the_report_shows_it(healthy):
    for breaks in (other_precision, one_class, photographs_trained_on, stopped):
        breaks(healthy)
    found = diagnose(healthy.write(), healthy.task, healthy.manifest)
    severities = [finding.severity for finding in found.findings]
    assert severities == sorted(severities) and severities[0] == WRONG and len(set(severities)) == len(SEVERITIES)
    run = changed(healthy.run, tasks=[healthy.task])
    page = build_report(run).read_text()
    assert "Why the scores are what they are" in page and "training stopped early: step finetune" in page


def test_the_command_tells_of_every_task_and_of_data_that_is_gone(healthy, capsys):
    trained_on(healthy)
    run = healthy.write()
    run.record(params=run.params.model_dump() | {"tasks": [healthy.task]})
    assert main(["doctor", "tiny"]) == 0
    assert "validation trains: 3 of 40" in capsys.readouterr().out
    run.data.rename(run.data.with_name("elsewhere"))
    assert main(["doctor", "tiny"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "cannot be read" in told and "Not checked: validation images in training, since the data of the run" in told
    assert main(["doctor", "other"]) == 1
    assert "no run other" in capsys.readouterr().err
