import numpy as np
import pytest
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from sklearn.metrics import f1_score as sklearn_f1

from forensics_lib.metrics import (
    best_f1_threshold,
    best_iou_threshold,
    bin_threshold,
    bootstrap_interval,
    bootstrap_intervals,
    crossfit_f1,
    equal_error_rate,
    f1_score,
    image_metrics,
    localization_intervals,
    localization_metrics,
    pixel_curves,
    pixel_histogram,
    pixel_table,
    round_probs,
    threshold_bin,
    written_mask,
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


@pytest.mark.parametrize("seed", range(20))
def test_no_probability_equals_the_threshold(seed):
    """Probabilities of other images neither, nor after they went through a CSV."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 60) | (np.arange(60) == 0)
    probs = [rng.random(60) ** 30, rng.integers(0, 3, 60) / 2, 0.3 + rng.integers(0, 4, 60) * 1e-6, rng.random(60)][seed % 4]
    threshold = best_f1_threshold(labels, probs)
    assert 0 < threshold < 1
    near = threshold + np.arange(-5, 6) * 1e-6
    for values in (round_probs(probs), round_probs(near), [float(f"{p:.6f}") for p in round_probs(probs)]):
        for written in (threshold, float(f"{threshold:.8f}")):
            assert ((np.array(values) > written) == (np.array(values) >= written)).all()
    best = max(sklearn_f1(labels, round_probs(probs) >= p) for p in np.unique(round_probs(probs)))
    assert sklearn_f1(labels, round_probs(probs) > threshold) == best


@pytest.mark.parametrize("prob", [0.0, 1e-6, 1e-7, 0.5, 1.0])
def test_equal_probabilities_are_all_called_positive(prob):
    threshold = best_f1_threshold(np.array([0, 1, 1]), np.full(3, prob))
    assert 0 < threshold < round_probs(prob) < 1
    assert image_metrics(np.array([0, 1, 1]), np.full(3, prob), threshold)["recall"] == 1


HALVES = np.arange(15361, dtype=np.uint16).view(np.float16)  # every float16 number in [0, 1]


@pytest.mark.parametrize("number", range(1, 256))
def test_no_pixel_equals_a_localization_threshold(number):
    threshold = bin_threshold(number)
    assert threshold_bin(threshold) == threshold_bin(number / 256) == number
    masks = HALVES.astype(np.float64)
    for written in (threshold, float(np.format_float_positional(threshold, min_digits=6)), np.float32(threshold)):
        assert ((masks > written) == (masks >= number / 256)).all()
        assert ((masks >= written) == (masks >= number / 256)).all()
    halves = written_mask(HALVES)  # compared in float16, as NumPy does with a Python number
    assert ((halves > threshold) == (number / 256 <= HALVES)).all()
    assert ((halves >= threshold) == (number / 256 <= HALVES)).all()


def test_a_written_mask_is_the_mask_but_for_its_last_bit(rng):
    assert written_mask(np.array([0.0, 1.0, 0.5])).tolist() == [0.0, 1.0, 0.5]
    mask = rng.random((50, 60)).astype(np.float32)
    assert (np.abs(written_mask(mask) - mask) <= mask / 500).all()
    truth = mask > 0.6
    assert (pixel_histogram(written_mask(mask), truth) == pixel_histogram(mask, truth)).all()


def test_the_best_localization_threshold_flags_from_its_bin_on(rng):
    truth = np.zeros((5, 12, 12), bool)
    truth[:, :6] = True
    masks = written_mask(np.clip(truth * 0.3 + rng.random(truth.shape) * 0.6, 0, 1))
    histograms = np.stack([pixel_histogram(mask, true) for mask, true in zip(masks, truth, strict=True)])
    threshold = best_iou_threshold(histograms)
    for flagged in (masks > threshold, masks >= threshold):
        ious = [jaccard_score(true.ravel(), found.ravel()) for true, found in zip(truth, flagged, strict=True)]
        assert pixel_table(histograms, threshold)["iou"].tolist() == pytest.approx(ious)


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1), (3, 3), (0, 2), (2, 0)])
@pytest.mark.parametrize("prob", [None, 0.0, 0.7, 1.0])
def test_scores_of_a_handful_of_images(counts, prob, rng):
    labels = np.repeat([0, 1], counts)
    probs = rng.random(len(labels)) if prob is None else np.full(len(labels), prob)
    scores = image_metrics(labels, probs, 0.5)
    assert np.isnan(scores["auc"]) == (0 in counts)
    assert np.isnan(crossfit_f1(labels, probs)) == (min(counts) < 2)
    low, high = bootstrap_intervals(lambda y, p: {"f1": f1_score(y, p >= 0.5)}, labels, probs, rounds=5)["f1"]
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("counts", [(1, 1), (0, 1), (2, 1), (3, 3), (3, 0)])
def test_pixel_scores_of_a_handful_of_images(counts, rng):
    truth = np.zeros((sum(counts), 6, 6), bool)
    truth[counts[0] :, :3] = True
    histograms = np.stack([pixel_histogram(rng.random((6, 6)), mask) for mask in truth])
    scores = localization_metrics(histograms, 0.5, np.ones(len(truth), bool))
    assert np.isnan(scores["iou_manipulated"]) == (counts[1] == 0)
    assert np.isnan(scores["flagged_authentic"]) == (counts[0] == 0)
    if counts[1]:
        assert "iou_manipulated" in localization_intervals(histograms, best_iou_threshold(histograms), rounds=3)


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
