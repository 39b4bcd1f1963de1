import numpy as np
import pytest
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from sklearn.metrics import f1_score as sklearn_f1

from forensics_lib.metrics import (
    best_f1_threshold,
    best_iou_threshold,
    bootstrap_interval,
    crossfit_f1,
    equal_error_rate,
    f1_score,
    image_metrics,
    localization_intervals,
    localization_metrics,
    pixel_curves,
    pixel_histogram,
    pixel_table,
)


@pytest.fixture
def scored(rng):
    labels = rng.integers(0, 2, 200)
    return labels, np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)  # rounded: ties


def test_threshold_is_the_best_of_all(scored):
    labels, probs = scored
    best = sklearn_f1(labels, probs >= best_f1_threshold(labels, probs))
    assert best == max(sklearn_f1(labels, probs >= t) for t in np.unique(probs))


def test_threshold_survives_being_written_with_six_decimals():
    labels, probs = np.array([0, 1]), np.array([0.123456, 0.123457])
    threshold = float(f"{best_f1_threshold(labels, probs):.6f}")
    assert (probs >= threshold).tolist() == [False, True]


def test_threshold_without_positives():
    with pytest.raises(ValueError, match="no positive"):
        best_f1_threshold(np.zeros(3, int), np.ones(3))


def test_f1_agrees_with_sklearn_and_handles_nothing(scored):
    labels, probs = scored
    assert f1_score(labels, probs > 0.5) == pytest.approx(sklearn_f1(labels, probs > 0.5))
    assert f1_score(np.zeros(3), np.zeros(3)) == 0


def test_image_metrics_of_a_perfect_and_a_hopeless_detector():
    labels = np.array([0, 0, 1, 1])
    perfect = image_metrics(labels, np.array([0.1, 0.2, 0.8, 0.9]), 0.5)
    assert perfect["auc"] == perfect["f1"] == perfect["ap"] == 1
    assert perfect["fpr"] == perfect["eer"] == 0
    assert image_metrics(labels, np.array([0.9, 0.8, 0.2, 0.1]), 0.5)["eer"] == 1


def test_one_class_gives_no_auc():
    assert np.isnan(image_metrics(np.ones(3, int), np.array([0.1, 0.5, 0.9]), 0.5)["auc"])


def test_equal_error_rate_lies_between_points():
    assert equal_error_rate(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])) == pytest.approx(0.5)


def test_crossfit_is_below_the_fitted_score(scored):
    labels, probs = scored
    assert crossfit_f1(labels, probs) <= f1_score(labels, probs >= best_f1_threshold(labels, probs))


def test_bootstrap_interval_holds_the_value_and_repeats(scored):
    labels, probs = scored
    low, high = bootstrap_interval(lambda y, p: f1_score(y, p >= 0.5), labels, probs)
    assert low < f1_score(labels, probs >= 0.5) < high
    assert (low, high) == bootstrap_interval(lambda y, p: f1_score(y, p >= 0.5), labels, probs)


@pytest.mark.parametrize("threshold", [1 / 256, 0.25, 0.5, 255 / 256])
def test_pixel_scores_agree_with_sklearn(threshold, rng):
    prob = rng.random((20, 30)).astype(np.float16)
    truth = rng.random((20, 30)) < prob
    iou, f1, flagged = pixel_curves(pixel_histogram(prob, truth)[None])
    column = round(threshold * 256)
    assert iou[0, column] == pytest.approx(jaccard_score(truth.ravel(), prob.ravel() >= threshold))
    assert f1[0, column] == pytest.approx(sklearn_f1(truth.ravel(), prob.ravel() >= threshold))
    assert flagged[0, column] == pytest.approx((prob >= threshold).mean())


@pytest.mark.parametrize(
    ("prob", "truth", "expected"),
    [
        (0.0, False, 1.0),  # empty against empty
        (0.0, True, 0.0),  # all missed
        (1.0, True, 1.0),
        (1.0, False, 0.0),  # all falsely flagged
    ],
)
def test_corner_cases(prob, truth, expected):
    histogram = pixel_histogram(np.full((4, 4), prob), np.full((4, 4), truth))
    iou, f1, _ = pixel_curves(histogram[None])
    assert iou[0, 128] == f1[0, 128] == expected


def test_localization_conventions():
    truth = np.zeros((10, 10), bool)
    truth[:5] = True
    histograms = np.stack([pixel_histogram(truth.astype(float), truth), pixel_histogram(np.zeros((10, 10)), ~truth & truth)])
    scores = localization_metrics(histograms, best_iou_threshold(histograms))
    assert scores["iou_manipulated"] == scores["iou_all"] == 1
    assert scores["flagged_authentic"] == 0
    histograms[1] = pixel_histogram(np.full((10, 10), 0.9), np.zeros((10, 10), bool))
    scores = localization_metrics(histograms, 0.5)
    assert (scores["iou_manipulated"], scores["iou_all"], scores["flagged_authentic"]) == (1, 0.5, 1)
    assert "submitted_iou_all" not in scores


def test_what_is_submitted_is_empty_where_an_image_is_called_authentic():
    truth = np.zeros((4, 10, 10), bool)
    truth[:2, :5] = True
    histograms = np.stack([pixel_histogram(np.where(truth[0], 0.9, 0.1), mask) for mask in truth])
    scores = localization_metrics(histograms, 0.5, called=np.array([True, False, True, False]))
    assert (scores["iou_manipulated"], scores["submitted_iou_manipulated"]) == (1, 0.5)
    assert (scores["iou_all"], scores["submitted_iou_all"]) == (0.5, 0.5)
    assert (scores["flagged_authentic"], scores["submitted_flagged_authentic"]) == (1, 0.5)


def test_threshold_free_pixel_scores_agree_with_sklearn(rng):
    cut = np.floor(rng.random((3, 20, 30)) * 256) / 256
    truth = rng.random(cut.shape) < cut * 0.7
    histograms = np.stack([pixel_histogram(prob, mask) for prob, mask in zip(cut, truth, strict=True)])
    table = pixel_table(histograms, 0.5)
    for row, prob, mask in zip(table.to_dict("records"), cut, truth, strict=True):
        assert row["pixel_auc"] == pytest.approx(roc_auc_score(mask.ravel(), prob.ravel()))
        assert row["pixel_ap"] == pytest.approx(average_precision_score(mask.ravel(), prob.ravel()))
        best = max(sklearn_f1(mask.ravel(), prob.ravel() >= value) for value in np.unique(prob))
        assert row["best_pixel_f1"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("prob", "marked", "auc", "ap", "best"),
    [
        (0.0, 0, np.nan, np.nan, 1.0),  # empty truth, nothing found
        (0.0, 100, np.nan, 1.0, 1.0),  # full truth: the threshold 0 flags all of it
        (0.0, 25, 0.5, 0.25, 0.4),  # all-zero prediction tells nothing apart: a quarter is manipulated
    ],
)
def test_corner_cases_of_threshold_free_scores(prob, marked, auc, ap, best):
    truth = np.arange(100).reshape(10, 10) < marked
    row = pixel_table(pixel_histogram(np.full((10, 10), prob), truth)[None], 0.5).iloc[0]
    np.testing.assert_allclose([row["pixel_auc"], row["pixel_ap"], row["best_pixel_f1"]], [auc, ap, best])


def test_localization_intervals_hold_the_values_and_repeat(rng):
    truth = np.zeros((40, 10, 10), bool)
    truth[:20, :5] = True
    probs = np.clip(truth * 0.4 + rng.random(truth.shape) * 0.6, 0, 1)
    histograms = np.stack([pixel_histogram(prob, mask) for prob, mask in zip(probs, truth, strict=True)])
    scores, intervals = localization_metrics(histograms, 0.5), localization_intervals(histograms, 0.5, rounds=50)
    assert intervals.keys() == scores.keys()
    for name in ("iou_manipulated", "pixel_f1_manipulated", "iou_all", "pixel_auc_manipulated"):
        assert intervals[name][0] <= scores[name] <= intervals[name][1]
        assert intervals[name][0] < intervals[name][1]
    assert intervals == localization_intervals(histograms, 0.5, rounds=50)
