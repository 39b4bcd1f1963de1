import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, jaccard_score, precision_recall_curve, roc_auc_score
from sklearn.metrics import f1_score as sklearn_f1

from forensics_lib.evaluation.metrics import (
    THRESHOLD_FREE,
    VALUES,
    best_f1_threshold,
    bin_threshold,
    binned,
    bootstrap_interval,
    bootstrap_intervals,
    crossfit_f1,
    equal_error_rate,
    f1_score,
    image_metrics,
    iou_thresholds,
    localization_intervals,
    localization_metrics,
    pixel_curves,
    pixel_histogram,
    pixel_table,
    quiet_thresholds,
    rank_auc,
    roc_auc,
    threshold_bin,
    threshold_free_scores,
    value_counts,
)
from forensics_lib.images.masks import written_mask
from forensics_lib.inference.probabilities import new_ties, round_probs
from forensics_lib.utils.files import decimal_text


@pytest.fixture
def scored(rng):
    labels = rng.integers(0, 2, 200)
    return labels, np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)  # rounded: ties


def test_threshold_is_the_best_of_all(scored):
    labels, probs = scored
    best = sklearn_f1(labels, probs >= best_f1_threshold(labels, probs))
    assert best == max(sklearn_f1(labels, probs >= t) for t in np.unique(probs))


def test_threshold_survives_being_written_as_probabilities_are():
    labels, probs = np.array([0, 1]), np.array([0.123456789012, 0.123456789013])
    threshold = float(f"{best_f1_threshold(labels, probs):.12f}")
    assert (probs >= threshold).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(20))
def test_no_probability_equals_the_threshold(seed):
    """Probabilities of other images neither, nor after they went through a CSV."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 60) | (np.arange(60) == 0)
    probs = [rng.random(60) ** 30, rng.integers(0, 3, 60) / 2, 0.3 + rng.integers(0, 4, 60) * 1e-12, rng.random(60)][seed % 4]
    threshold = best_f1_threshold(labels, probs)
    assert 0 < threshold < 1
    near = threshold + np.arange(-5, 6) * 1e-12
    for values in (round_probs(probs), round_probs(near), [float(decimal_text(p)) for p in round_probs(probs)]):
        for written in (threshold, float(decimal_text(threshold))):
            assert ((np.array(values) > written) == (np.array(values) >= written)).all()
    best = max(sklearn_f1(labels, round_probs(probs) >= p) for p in np.unique(round_probs(probs)))
    assert sklearn_f1(labels, round_probs(probs) > threshold) == best


@pytest.mark.parametrize("prob", [0.0, 1e-12, 1e-13, 0.5, 1.0])
def test_equal_probabilities_are_all_called_positive(prob):
    threshold = best_f1_threshold(np.array([0, 1, 1]), np.full(3, prob))
    assert 0 < threshold < round_probs(prob) < 1
    assert image_metrics(np.array([0, 1, 1]), np.full(3, prob), threshold)["recall"] == 1


def test_probabilities_keep_their_order_down_to_twelve_decimals_and_new_ties_are_counted():
    sure = np.array([0.5, 1 - 2e-12, 1 - 3e-12, 2e-12, 1e-9, np.nan, 0.5])
    assert new_ties(sure, round_probs(sure)) == 0
    surer = np.append(sure, [1e-14, 2e-14, 1e-13])
    assert new_ties(surer, round_probs(surer)) == 2


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
    _, threshold = quiet_thresholds(np.ones(5, int), rng.random(5), histograms)
    for flagged in (masks > threshold, masks >= threshold):
        ious = [jaccard_score(true.ravel(), found.ravel()) for true, found in zip(truth, flagged, strict=True)]
        assert pixel_table(histograms, threshold)["iou"].tolist() == pytest.approx(ious)


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_with_few_false_alarms_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    labels, probs = rng.permutation([0] * 10 + [1] * 8), rng.integers(1, 10, 18) / 10  # some are equal
    truth = np.zeros((18, 8, 8), bool)
    truth[labels == 1, :4] = True
    masks = (rng.random(truth.shape) + 0.3 * truth).clip(0, 1) * rng.random((18, 1, 1))
    histograms = np.stack([pixel_histogram(mask, true) for mask, true in zip(masks, truth, strict=True)])

    ious = [localization_metrics(histograms, bin_threshold(number))["iou_manipulated"] for number in range(1, 256)]
    for limit in (0.0, 0.1, 0.3, 1.0):
        threshold, loc_threshold = quiet_thresholds(labels, probs, histograms, limit)
        assert localization_metrics(histograms, loc_threshold)["iou_manipulated"] == pytest.approx(max(ious))
        quiet = [at for at in np.arange(0.05, 1.1, 0.1) if (probs[labels == 0] >= at).mean() <= limit]
        submitted = [
            localization_metrics(histograms, loc_threshold, probs >= at)["submitted_iou_manipulated"]
            for at in (threshold, *quiet)
        ]
        assert (probs[labels == 0] >= threshold).mean() <= limit
        assert submitted[0] == pytest.approx(max(submitted[1:]))

    threshold, loc_threshold = iou_thresholds(labels, probs, histograms)
    by_iou = [
        localization_metrics(histograms, loc_threshold, probs >= at)["submitted_iou_all"] for at in np.arange(0.05, 1.1, 0.1)
    ]
    assert localization_metrics(histograms, loc_threshold)["iou_manipulated"] == pytest.approx(max(ious))
    found = localization_metrics(histograms, loc_threshold, probs >= threshold)["submitted_iou_all"]
    assert found == pytest.approx(max(by_iou))


def test_authentic_images_are_not_called_where_that_shows_no_more_masks():
    truth = np.zeros((30, 8, 8), bool)
    truth[20:, :4] = True
    histograms = np.stack([pixel_histogram(0.9 * true.astype(float), true) for true in truth])
    probs = np.append(np.linspace(0.1, 0.5, 20), np.linspace(0.6, 0.9, 10))
    threshold, _ = quiet_thresholds(truth.any((1, 2)), probs, histograms, 0.5)
    assert 0.5 < threshold < 0.6
    probs[20] = 0.25  # below most authentic images: found if the limit allows them
    threshold, _ = quiet_thresholds(truth.any((1, 2)), probs, histograms, 0.5)
    assert 0.5 < threshold < 0.6
    threshold, _ = quiet_thresholds(truth.any((1, 2)), probs, histograms, 0.7)
    assert threshold < 0.25


def test_where_no_threshold_is_quiet_no_image_is_called():
    truth = np.zeros((4, 8, 8), bool)
    truth[2:, :4] = True
    histograms = np.stack([pixel_histogram(np.ones((8, 8)), true) for true in truth])
    threshold, _ = quiet_thresholds(truth.any((1, 2)), np.full(4, 0.7), histograms)
    assert 0.7 < threshold < 1


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
        probs = rng.random(len(truth))
        _, threshold = quiet_thresholds(truth.any((1, 2)), probs, histograms)
        found = localization_intervals(histograms, threshold, rounds=3, probs=probs)
        assert found.keys() >= {"iou_manipulated", "threshold", "loc_threshold"}


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
    scores = localization_metrics(histograms, 0.5)
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


SHAPES = {
    "everywhere": lambda noise, truth: noise,
    "near 0": lambda noise, truth: noise**4 * (1 + truth) / 500,
    "near 1": lambda noise, truth: 1 - noise * (2 - truth) / 500,
    "denormal": lambda noise, truth: noise * (1 + truth) / 60_000,
    "few values": lambda noise, truth: np.round((noise + truth) * 2) / 4,
    "one value": lambda noise, truth: noise * 0 + 0.3,
    "ends": lambda noise, truth: (noise + 0.3 * truth) > 0.6,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.005, 0.3, 0.995])
def test_threshold_free_pixel_scores_are_those_of_the_written_mask(shape, share, rng):
    truth = rng.random((60, 90)) < share
    mask = np.asarray(SHAPES[shape](rng.random(truth.shape), truth), np.float16)
    scores = threshold_free_scores(value_counts(mask, truth))
    flat, probs = truth.ravel(), mask.ravel().astype(float)
    assert scores["pixel_auc"] == pytest.approx(roc_auc_score(flat, probs), abs=1e-9)
    assert scores["pixel_ap"] == pytest.approx(average_precision_score(flat, probs), abs=1e-9)
    precision, recall, _ = precision_recall_curve(flat, probs)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
    assert scores["best_pixel_f1"] == pytest.approx(best, abs=1e-9)


def test_every_probability_that_a_mask_can_hold_is_counted_apart_and_falls_into_its_bin():
    values = np.arange(VALUES, dtype=np.uint16).view(np.float16)
    assert (values[0], values[-1]) == (0, 1)
    counts = value_counts(values[None], np.zeros((1, VALUES), bool))
    assert (counts[0] == 1).all() and not counts[1].any()
    expected = np.bincount(np.minimum(np.floor(values.astype(float) * 256), 255).astype(int), minlength=256)
    assert binned(counts)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("wrong", [-0.1, 1.01, np.nan, np.inf])
def test_probabilities_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        value_counts(np.array([[0.5, wrong]]), np.array([[False, True]]))


def test_negative_zero_is_zero():
    assert value_counts(np.array([[-0.0, 0.0]], np.float16), np.array([[True, False]]))[:, 0].tolist() == [1, 1]


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
    scores = threshold_free_scores(value_counts(np.full((10, 10), prob), truth))
    np.testing.assert_allclose([scores["pixel_auc"], scores["pixel_ap"], scores["best_pixel_f1"]], [auc, ap, best])


@pytest.fixture
def localized(rng):
    """Histograms and threshold-free scores of 40 images, half of them authentic."""
    truth = np.zeros((40, 10, 10), bool)
    truth[:20, :5] = True
    probs = np.clip(truth * 0.4 + rng.random(truth.shape) * 0.6, 0, 1)
    counts = [value_counts(prob, mask) for prob, mask in zip(probs, truth, strict=True)]
    return np.stack([binned(count) for count in counts]), pd.DataFrame([threshold_free_scores(count) for count in counts])


def test_localization_intervals_hold_the_values_and_repeat(localized):
    histograms, exact = localized
    options = {"exact": exact, "rounds": 50, "probs": np.linspace(0, 1, len(histograms))}
    scores = localization_metrics(histograms, 0.5, exact=exact)
    intervals = localization_intervals(histograms, 0.5, **options)
    assert intervals.keys() == scores.keys() | {"threshold"}
    assert scores["pixel_auc_manipulated"] == pytest.approx(exact["pixel_auc"][:20].mean())
    for name in ("iou_manipulated", "pixel_f1_manipulated", "iou_all", "pixel_auc_manipulated"):
        assert intervals[name][0] <= scores[name] <= intervals[name][1]
        assert intervals[name][0] < intervals[name][1]
    assert intervals == localization_intervals(histograms, 0.5, **options)


def test_scores_that_histograms_cannot_tell_are_not_made_up(localized):
    histograms, _ = localized
    assert not set(pixel_table(histograms, 0.5)) & set(THRESHOLD_FREE)
    assert "pixel_auc_manipulated" not in localization_metrics(histograms, 0.5)


# ---- Photographs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 4])
def test_copies_of_an_image_make_no_interval_narrower(scored, copies, rng):
    labels, probs = scored
    groups = np.array([f"photo {number}" for number in range(len(labels))], object)
    shuffled = rng.permutation(len(labels) * copies)
    many = [np.repeat(values, copies)[shuffled] for values in (labels, probs, groups)]

    def scores(y, p):
        return {"f1": f1_score(y, p >= 0.5), "auc": roc_auc(y, p), "fpr": (p[y == 0] >= 0.5).mean()}

    alone = bootstrap_intervals(scores, labels, probs)
    grouped = bootstrap_intervals(scores, *many[:2], groups=many[2])
    ignored = bootstrap_intervals(scores, *many[:2])
    for name, (low, high) in alone.items():
        assert np.subtract(*grouped[name][::-1]) == pytest.approx(high - low, rel=0.25)
        assert np.subtract(*ignored[name][::-1]) < 0.85 * (high - low)


def test_copies_of_an_image_make_no_interval_of_masks_narrower(localized):
    histograms, exact = localized
    many, more = histograms.repeat(4, 0), exact.loc[exact.index.repeat(4)]
    alone = localization_intervals(histograms, 0.5, exact=exact)
    grouped = localization_intervals(many, 0.5, exact=more, groups=np.arange(40).repeat(4))
    for name in ("iou_manipulated", "iou_all", "pixel_auc_manipulated", "pixel_ap_manipulated"):
        np.testing.assert_allclose(grouped[name], alone[name])


def test_a_draw_holds_whole_photographs_and_both_classes():
    labels = np.array([0, 1, 1, 0, 1, 1, 1, 0])
    groups = np.array(["a", "a", "a", "b", "c", "c", "d", "a"])
    drawn = []

    def seen(y, p):
        drawn.append(np.bincount(p.astype(int), minlength=8))
        assert set(y) == {0, 1}
        return {"share": y.mean()}

    bootstrap_intervals(seen, labels, np.arange(8), rounds=100, groups=groups)
    times = np.array(drawn)
    assert (times[:, [0, 1, 2, 7]] == 1).all()  # the one photograph with images of both classes
    assert (times[:, 3] == 1).all()  # the one that is authentic alone
    assert (times[:, 4] == times[:, 5]).all() and (times[:, 4] + times[:, 6] == 2).all()
    assert len(set(times[:, 6])) == 3


def test_an_image_without_a_photograph_is_an_error(scored):
    with pytest.raises(ValueError, match="1 of 200 images have no group"):
        bootstrap_interval(lambda y, p: y.mean(), *scored, groups=np.array([None] + ["a"] * 199, object))


def test_auc_is_the_library_s_to_the_last_digits(rng):
    for values in (rng.normal(size=300), rng.integers(0, 5, 300), np.zeros(300)):
        labels = rng.random(300) < 0.3
        assert rank_auc(labels, values) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert np.isnan(rank_auc(np.ones(3), np.arange(3)))


@pytest.mark.parametrize("score", [roc_auc, lambda labels, probs: image_metrics(labels, probs, 0.5)])
def test_logits_are_no_probabilities(score):
    """They would all be clipped to 0 and 1, and the score be a wrong one."""
    with pytest.raises(ValueError, match=r"from -2 to 3: probabilities lie in \[0, 1\]; are these logits\?"):
        score(np.array([0, 1, 1]), np.array([-2.0, 3.0, np.nan]))
