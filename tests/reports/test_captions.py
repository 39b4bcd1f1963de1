"""Sentences say what the numbers are, in correct English, and nothing where the numbers say nothing."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import photo_table, picture, save

from forensics_lib.data.audit import ShortcutAudit
from forensics_lib.data.duplicates import NearDuplicates
from forensics_lib.data.rows import DONOR
from forensics_lib.evaluation.calibration import expected_calibration_error
from forensics_lib.evaluation.evaluate import Evaluation
from forensics_lib.evaluation.metrics import image_metrics
from forensics_lib.evaluation.robustness import SWEEP
from forensics_lib.images import spectra
from forensics_lib.reports import captions, data_figures
from forensics_lib.run import Thresholds

NAN = float("nan")
SIDE = 128


def evaluation_of(labels, probs, threshold=0.5, interval=(0.8, 1.0), before=0.25, **columns) -> Evaluation:
    labels, probs = np.array(labels), np.array(probs, float)
    table = pd.DataFrame({"label": labels, "prob": probs, "deciding": True, **columns})
    scores = {"ece": expected_calibration_error(labels, probs), "ece_uncalibrated": before}
    scores |= image_metrics(labels, probs, threshold)
    return Evaluation(table, Thresholds(threshold=threshold), scores, [], {"auc": interval})


def images(authentic: int, positive: int, **columns) -> pd.DataFrame:
    labels = np.repeat([0, 1], [authentic, positive])
    facts = {"label": labels, "split": "train", "source": "one", "error": None, "width": 1000, "height": 1000, "bytes": 10**6}
    return pd.DataFrame(facts | {"jpeg_quality": 90.0} | columns)


def test_balance_counts_usable_images_and_names_sources_of_one_class():
    both = images(3, 2)
    assert captions.balance_bars(both, "A") == "Usable images: training 3 authentic and 2 synthetic."
    rows = pd.concat([both, images(1000, 1, split="val", source="two"), images(4, 0, source="two")])
    rows.iloc[0, rows.columns.get_loc("error")] = "cut off"
    assert captions.balance_bars(rows, "B") == (
        "Usable images: training 6 authentic and 2 manipulated, validation 1,000 authentic and 1 manipulated; "
        "1 of 2 sources of training images with one class alone."
    )
    assert captions.balance_bars(both.assign(error="cut off"), "A") == ""


def test_files_differ_in_format_or_in_what_differs_most(rng):
    rows = images(20, 20)
    assert captions.file_distributions(rows.assign(jpeg_quality=np.where(rows["label"], NAN, 90.0)), "A") == (
        "100% of the authentic and 0% of the synthetic images are JPEG files: the format alone says much about the class."
    )
    assert captions.file_distributions(rows.assign(jpeg_quality=np.where(rows["label"], 80.0, 90.0)), "B") == (
        "Of single facts the classes differ most in JPEG quality, with a median of 90 for authentic and 80 for "
        "manipulated images: in 100% of all pairs of both classes the manipulated image has the lower value."
    )
    assert captions.file_distributions(rows, "A").startswith("No file fact alone is clearly higher")
    assert captions.file_distributions(images(20, 3), "A") == "" == captions.file_distributions(images(20, 0), "A")
    few = rows.assign(jpeg_quality=np.where(np.isin(rows.index, [0, 39]), 80.0 + rows["label"], NAN))
    assert captions.file_distributions(few, "A").startswith("No file fact alone is"), "two JPEG files say nothing"


@pytest.mark.parametrize(
    ("auc", "facts", "told"),
    [
        (NAN, {}, "There are too few images"),
        (0.55, {"format": 0.5}, "File facts alone reach AUC 0.55, not more than the limit of 0.60: they are no shortcut."),
        (0.93, {"JPEG quality": 0.91, "format": 0.5}, "0.93, mostly by JPEG quality (0.91 alone): a model shown these files as "
         "they are could learn the codec instead"),
        (0.7, {"short side": 0.69, "format": 0.5}, "mostly by short side (0.69 alone): a model shown these files as they are "
         "could learn them"),
        (0.7, {"short side": 0.59}, "0.70, by several together: a model"),
    ],
)  # fmt: skip
def test_a_shortcut_is_named_with_what_a_model_would_learn(auc, facts, told):
    assert told in captions.shortcut_bars(ShortcutAudit(auc, pd.Series(facts, dtype=float)), "A")


def near(*pairs: tuple[int, str, str]) -> NearDuplicates:
    columns = {"distance": [pair[0] for pair in pairs]}
    for place, end in enumerate("ab", start=1):
        columns |= {f"path_{end}": [f"{end}{i}" for i in range(len(pairs))], f"split_{end}": [pair[place] for pair in pairs]}
    return NearDuplicates(pd.DataFrame(columns).astype({"distance": int}), 10, 10)


def audit_of(found: NearDuplicates, equal: int = 0) -> SimpleNamespace:
    exact = pd.DataFrame({"split": ["val"] * equal})
    return SimpleNamespace(near=found, exact=exact, groups=pd.DataFrame(columns=["train", "val"], dtype=int))


def test_soundness_names_what_is_found_where_there_is_most_of_it():
    rows = pd.concat([images(200, 200), images(5, 5, split="val")], ignore_index=True)
    assert captions.soundness_bars(audit_of(near()), rows, "A") == "Every image can be used, and none stands twice."
    rows.loc[0, "error"] = "cut off"
    found = audit_of(near((2, "train", "val")), equal=2)
    assert captions.soundness_bars(found, rows, "A") == (
        "Highest shares: left out, 0.2% of the training images; equal files, 20% of the validation images; look-alikes, 10% of "
        "the validation images."
    )


def test_soundness_names_donors_of_pasted_regions():
    rows = pd.concat([images(200, 200), images(0, 5, split=DONOR)], ignore_index=True)
    rows.loc[len(rows) - 1, "error"] = "cut off"
    assert captions.soundness_bars(audit_of(near()), rows, "B") == "Highest shares: left out, 20% of the donor images."


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([], ""),
        ([(2, "train", "train")], "The hashes of a pair differ in 2 of 64 bits; no pair joins two splits."),
        (
            [(0, "train", "val"), (4, "val", "val")],
            "in 0 to 4 of 64 bits; 1 of 2 pairs joins two splits, which can make scores",
        ),
        ([(1, "train", "val"), (1, "val", "train")], "in 1 of 64 bits; 2 of 2 pairs join two splits, which"),
    ],
)
def test_look_alikes_across_splits_are_told(pairs, told):
    said = captions.near_duplicate_pairs(near(*pairs))
    assert told in said if told else said == ""


def noise_spectrum(seed: int, wave: float = 0.0, period: int = 4, level: float = 0.0) -> np.ndarray:
    """The average spectrum of 20 pictures of noise with a faint wave of ``period`` pixels; ``level`` in dB."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(20, SIDE, SIDE)) + wave * np.cos(np.arange(SIDE) * 2 * np.pi / period)
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(pixels * np.outer(np.hanning(SIDE), np.hanning(SIDE))), axes=(1, 2)))
    return 20 * np.log10(amplitude.mean(0)) + level


@pytest.mark.parametrize(
    ("authentic", "synthetic", "told"),
    [
        ({}, {"wave": 0.2}, ["of the synthetic images has a peak at a quarter of the sampling rate", "repeats every 4 pixels"]),
        ({}, {"wave": 0.2, "period": 8}, ["has a peak at an eighth", "every 8 pixels"]),
        ({}, {"wave": 0.2, "period": 2}, ["has a peak at half", "every 2 pixels"]),
        ({"wave": 0.2}, {}, ["of the authentic images has a peak at a quarter", "dB above the synthetic images"]),
        ({"wave": 0.2}, {"wave": 0.2}, ["Neither class has a peak that the other has not"]),
        ({}, {"wave": 0.2, "period": 5}, ["Neither class has a peak"]),
        ({}, {"wave": 0.2, "level": -30}, ["Neither class has a peak", "the synthetic images have 3", "dB less"]),
        ({}, {}, ["nowhere more than 0."]),
    ],
)
def test_a_peak_is_named_where_one_class_has_it_and_only_there(authentic, synthetic, told, monkeypatch):
    both = [noise_spectrum(1, **authentic), noise_spectrum(2, **synthetic)]
    monkeypatch.setattr(data_figures, "class_spectra", lambda manifest: both)
    said = captions.spectra(images(10, 10), "A")
    assert all(part in said for part in told), said


def test_noise_alone_has_no_peak():
    for seed in range(0, 16, 2):
        assert spectra.periodic_peak(noise_spectrum(seed), noise_spectrum(seed + 1)) is None


def test_figure_and_sentence_share_the_spectra_and_without_any_nothing_is_said(tmp_path, rng, monkeypatch):
    read, paths = [], [save(tmp_path / f"{i}.png", picture(rng, SIDE, SIDE)) for i in range(20)]
    rows = photo_table(paths).assign(label=np.arange(20) % 2)
    true_reader = spectra.read_image
    monkeypatch.setattr(spectra, "read_image", lambda path: read.append(path) or true_reader(path))
    data_figures.spectra(rows, "A")
    assert captions.spectra(rows, "A").startswith("Neither class") and sorted(read) == sorted(rows["path"])
    assert captions.spectra(rows.head(10), "A") == "" == captions.spectra(rows[rows["label"] == 0], "A")


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([], ""),
        ([NAN], ""),
        ([0.2], "The largest of 1 manipulated region covers 20% of its image."),
        ([0.002] * 2 + [0.06] * 8 + [0.8], "Half of the manipulated regions cover less than 6% of their image and a tenth less "
         "than 0.2%; the largest covers 80%."),
    ],
)  # fmt: skip
def test_sizes_of_regions(shares, told):
    assert captions.mask_area_distribution(pd.DataFrame({"share": shares}, dtype=float)) == told


@pytest.mark.parametrize(
    ("score", "loss", "told"),
    [
        ([], [], ""),
        ([NAN, NAN], [1, 1], ""),
        ([0.7], [1], "There is one epoch alone, which shows no trend."),
        ([0.7, NAN, 0.9], [1, 0.9, 0.8], "The best epoch is 3 of 3, with a validation AUC of 0.900: it is the last one"),
        ([0.7, 0.9, 0.9], [1, 0.9, 0.8], "2 of 3, with a validation AUC of 0.900; after it the loss falls from 0.90 to 0.80, "
         "but the score no longer rises"),
        ([0.7, 0.9, 0.8], [1, 0.9, 0.8], "but the score falls too, to 0.800: more epochs would overfit."),
        ([0.9, 0.7], [1, 1], "The best epoch is 1 of 2, with a validation AUC of 0.900; after it neither the loss falls nor"),
    ],
)  # fmt: skip
def test_learning_curves_tell_the_best_epoch_and_what_came_after(score, loss, told):
    said = captions.learning_curves(pd.DataFrame({"score": score, "train_loss": loss}, dtype=float), "A")
    assert told in said if told else said == ""


def test_scores_of_an_evaluation():
    found = evaluation_of([0] * 25 + [1] * 8, [0.1] * 23 + [0.6] * 2 + [0.9] * 7 + [0.2], threshold=0.31)
    assert captions.confusion(found, "A") == (
        "At the threshold 0.31 the model calls 8% of the authentic images synthetic and misses 12% of the synthetic images."
    )
    assert captions.score_curves(found, "A") == (
        "In 99% of all pairs of a synthetic and an authentic image the synthetic one has the higher probability (the AUC); "
        "with at most 5% false alarms 88% of the synthetic images are found."
    )
    assert captions.reliability_diagram(found, "A") == (
        "Where the model says 0.10, 0.00 of 23 images are synthetic, which is the gap that counts most; the calibration "
        "error is 0.152, and was 0.250 before calibration."
    )
    assert captions.most_wrong(found, "A") == (
        "3 of 33 images are on the wrong side of the threshold: 2 authentic, with probabilities up to 0.60; 1 synthetic, with "
        "probabilities down to 0.20."
    )


def test_scores_that_say_nothing():
    same = evaluation_of([0, 1], [0.5, 0.5])
    assert captions.score_curves(same, "B").startswith("All images have the same probability")
    assert captions.confusion(same, "B").endswith(
        "calls 100% of the authentic images manipulated and misses 0% of the manipulated images."
    )
    chance = evaluation_of([0, 1, 1], [0.5, 0.6, 0.4], interval=(0.2, 0.8))
    assert captions.score_curves(chance, "A") == "AUC 0.500 could be chance: its 95% interval, 0.200 to 0.800, holds 0.5."
    authentic = evaluation_of([0, 0], [0.2, 0.3])
    assert captions.score_curves(authentic, "A") == ""
    assert captions.confusion(authentic, "A") == "At the threshold 0.50 the model calls 0% of the authentic images synthetic."
    assert captions.most_wrong(authentic, "A") == "None of 2 images is on the wrong side of the threshold."
    none = Evaluation(authentic.table.head(0), authentic.thresholds, {}, [])
    assert captions.confusion(none, "A") == "" == captions.reliability_diagram(none, "A")


def groups(*rows: tuple, keys=("source",), iou: bool = False) -> pd.DataFrame:
    columns = [*keys, "label", "images", "called_positive", *(["mean_iou"] if iou else [])]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (groups(), ""),
        (groups(("a", 0, 50, 0.1), ("b", 1, 50, 0.9)), ""),
        (groups(("a", 0, 50, 0.1), ("b", 0, 9, 0.9)), ""),
        (groups(("a", 0, 50, 0.1), ("b", 0, 50, 0.3), ("c", 1, 50, 0.8)),
         "By source the model errs most on the 50 authentic images of b: it calls 30% of them synthetic."),
        (groups(("a", 0, 50, 0.1), ("-", 1, 50, 0.8), ("c", 1, 50, 0.9)),
         "By source the model errs most on the 50 synthetic images of no known source: it misses 20% of them."),
        (groups(("a", 0, 50, 0.0), ("b", 0, 50, 0.0)), "No source with at least 10 images has an error."),
    ],
)  # fmt: skip
def test_the_group_with_most_errors_is_named(table, told):
    assert captions.group_table(table, "A") == told


def test_the_groups_with_the_worst_and_the_best_masks_are_named():
    rows = [
        ("sp", "x", 1, 50, 0.9, 0.3),
        ("sp", "y", 1, 50, 0.9, 0.6),
        ("fr", "x", 1, 5, 0.9, 0.1),
        ("-", "-", 0, 50, 0.9, NAN),
    ]
    table = groups(*rows, keys=("kind", "method"), iou=True)
    assert captions.group_table(table, "B") == "Masks are worst for sp x (mean IoU 0.30) and best for sp y (mean IoU 0.60)."
    assert captions.group_table(table.iloc[1:], "B") == "" == captions.group_table(table.head(0), "B")


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([0.95, 0.94, 0.81], "JPEG quality 50 costs most: AUC 0.95 to 0.81."),
        ([0.95, 0.5, NAN], "Enlarging by 1.5 costs most: AUC 0.95 to 0.50."),
        ([0.95, 0.96, 0.945], "No change costs more than 0.01 of the AUC, which is 0.95."),
        ([0.95, NAN, NAN], ""),
        ([NAN, 0.5, 0.5], ""),
    ],
)
def test_the_change_that_costs_most_is_named(scores, told):
    table = pd.DataFrame({"change": ["unchanged", "enlarged", "JPEG quality"], "strength": [NAN, 1.5, 50], "auc": scores})
    assert captions.robustness_curves(table, "A") == told
    assert captions.robustness_curves(table.rename(columns={"auc": "iou"}), "B") == told.replace("AUC", "mean IoU")


def test_every_change_of_the_sweep_has_a_name():
    assert set(captions.CHANGES) == set(SWEEP)


def test_galleries_of_masks_are_told_with_all_images():
    found = evaluation_of([0, 0, 1, 1], [0.1, 0.46, 0.9, 0.8], iou=[0, 0, 0.72, 0.05], flagged=[0.0, 0.4, 0.1, 0.1])
    assert captions.example_gallery(found, "best") == "The best mask has IoU 0.72; 50% of the manipulated images reach 0.5."
    assert (
        captions.example_gallery(found, "worst") == "The worst mask has IoU 0.05; 50% of the manipulated images stay below 0.1."
    )
    assert captions.example_gallery(found, "alarms") == (
        "50% of the authentic images have over 1% of their pixels flagged, at most 40%."
    )
    assert captions.example_gallery(found, "borderline").startswith("1 of 4 images is within 0.05 of the threshold 0.50")
    found.table = found.table.head(0)
    assert {captions.example_gallery(found, which) for which in ("best", "worst", "alarms")} == {""}


def test_what_is_submitted():
    table = pd.DataFrame({"prob": [0.1, 0.28, 0.33, 0.9], "label": [0, 0, 1, 1], "threshold": 0.31})
    assert captions.submitted_probabilities(table, "A") == (
        "50% of the test images are called synthetic; 2 of 4 images are within 0.05 of the threshold 0.31, where a small "
        "change turns the label."
    )
    assert captions.submitted_probabilities(table.assign(prob=0.5), "A") == (
        "All 4 test images have the same probability, 0.50: the model tells none from another."
    )
    assert captions.submitted_probabilities(table.head(0), "A") == ""


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-5, "under 0.1%"), (0.004, "0.4%"), (0.06, "6%"), (0.996, "99.6%"), (0.99999, "over 99.9%"), (1, "100%")],
)
def test_a_share_is_0_or_100_percent_only_where_it_is(share, text):
    assert captions._percent(share) == text
