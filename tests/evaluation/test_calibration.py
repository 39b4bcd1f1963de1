import numpy as np
import pytest
from scipy.special import expit, logit

from forensics_lib.evaluation.calibration import (
    LIMITS,
    expected_calibration_error,
    fit_calibration,
    reliability,
)
from forensics_lib.inference.probabilities import calibrated
from forensics_lib.run import Calibration, Thresholds


def overconfident(rng, temperature: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from calibrated probabilities, and those probabilities with their log-odds multiplied."""
    odds = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(int)
    return labels, 1 / (1 + np.exp(-odds * temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_made_probabilities_is_found(temperature, rng):
    labels, probs = overconfident(rng, temperature)
    found = fit_calibration(labels, probs)
    assert abs(found.temperature / temperature - 1) < 0.1 and abs(found.intercept) < 0.1
    assert expected_calibration_error(labels, calibrated(probs, found)) < 0.02


def test_scaling_lowers_the_error_and_keeps_the_order(rng):
    labels, probs = overconfident(rng, 4.0)
    scaled = calibrated(probs, fit_calibration(labels, probs))
    assert expected_calibration_error(labels, scaled) < expected_calibration_error(labels, probs) / 3
    assert (np.diff(scaled[np.argsort(probs)]) >= 0).all()


def test_certain_and_missing_probabilities():
    scaled = calibrated(np.array([0.0, 1.0, np.nan, 0.5]), Calibration(temperature=2.0))
    assert scaled[0] < 1e-5 and scaled[1] > 1 - 1e-5 and np.isnan(scaled[2]) and scaled[3] == 0.5


def test_one_class_alone_is_left_as_it_is():
    assert fit_calibration(np.ones(5, int), np.linspace(0.1, 0.9, 5)) == Calibration()


def test_reliability_counts_every_image_by_hand():
    found = reliability(np.array([0, 1, 1, 1]), np.array([0.01, 0.03, 0.99, 1.0]))
    np.testing.assert_allclose(found, [[0.02, 0.5, 2], [0.995, 1.0, 2]])
    assert expected_calibration_error(np.array([0, 1, 1, 1]), np.array([0.01, 0.03, 0.99, 1.0])) == pytest.approx(0.2425)


def detector(rng, share: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a share of positives, and the overconfident probabilities of a detector that learned from even classes."""
    labels = (rng.random(count) < share).astype(int)
    odds = 2 * rng.normal(np.where(labels == 1, 1.0, -1.0), 1.0)  # of even classes: what the value says, exactly
    return labels, expit(1.5 * odds)


@pytest.mark.parametrize("share", [0.77, 0.05])
@pytest.mark.parametrize("other", [0.15, 0.5, 0.9])
def test_the_correction_for_another_share_of_positives_holds(share, other, rng):
    """What the model card says to add to the log-odds."""
    found = fit_calibration(*detector(rng, share))
    labels, probs = detector(rng, other)
    scaled = calibrated(probs, found)
    shifted = expit(logit(scaled) + np.log(other / (1 - other)) - np.log(share / (1 - share)))
    assert expected_calibration_error(labels, shifted) < 0.02 < expected_calibration_error(labels, scaled)


def test_even_odds_are_not_those_of_validation(rng):
    """A temperature alone leaves the odds of training's even classes, which the correction would make worse."""
    labels, probs = detector(rng, 0.77)
    found = fit_calibration(labels, probs)
    alone = calibrated(probs, Calibration(temperature=found.temperature))
    assert expected_calibration_error(labels, calibrated(probs, found)) < 0.02
    assert expected_calibration_error(labels, alone) > 0.05


@pytest.mark.parametrize(
    ("labels", "probs"),
    [
        ([0, 1], [0.4, 0.6]),
        ([0, 1], [0.0, 0.0]),
        ([0, 0, 1, 1], [0.3] * 4),
        ([0, 0, 0, 1], [0.0, 1.0, 0.0, 1.0]),
        ([0] * 300 + [1] * 300, [1e-9] * 300 + [1 - 1e-9] * 300),
        ([0] * 300 + [1] * 300, [0.499] * 300 + [0.501] * 300),
        ([0] * 50 + [1] * 50, [0.9] * 50 + [0.1] * 50),
        ([0] * 2000 + [1] * 2, [1e-5] * 2000 + [2e-4] * 2),
    ],
)
def test_few_equal_separated_and_reversed_probabilities_claim_no_certainty(labels, probs):
    labels, probs = np.array(labels), np.array(probs)
    found = fit_calibration(labels, probs)
    assert LIMITS[0] <= found.temperature <= LIMITS[1]
    scaled = calibrated(probs, found)
    assert (np.diff(scaled[np.argsort(probs, kind="stable")]) >= 0).all()
    assert scaled.min() > 1e-5 and scaled.max() < 1 - 1e-5
    assert scaled.mean() == pytest.approx(labels.mean(), abs=0.15)


def test_a_calibration_without_an_intercept_divides_the_log_odds():
    assert calibrated(expit(3.0), Thresholds.of({"temperature": 1.5, "threshold": 0.5})) == pytest.approx(expit(2.0))
    assert calibrated(expit(3.0), Calibration(temperature=1.5, intercept=-1.0)) == pytest.approx(expit(1.0))


def test_no_image_has_no_calibration_error():
    assert np.isnan(expected_calibration_error(np.zeros(0, int), np.zeros(0)))
