import numpy as np
import pytest

from forensics_lib.calibration import at_temperature, expected_calibration_error, fit_temperature, reliability


def overconfident(rng, temperature: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from calibrated probabilities, and those probabilities with their log-odds multiplied."""
    odds = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(int)
    return labels, 1 / (1 + np.exp(-odds * temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_made_probabilities_is_found(temperature, rng):
    labels, probs = overconfident(rng, temperature)
    found = fit_temperature(labels, probs)
    assert abs(found / temperature - 1) < 0.1
    assert expected_calibration_error(labels, at_temperature(probs, found)) < 0.02


def test_scaling_lowers_the_error_and_keeps_the_order(rng):
    labels, probs = overconfident(rng, 4.0)
    scaled = at_temperature(probs, fit_temperature(labels, probs))
    assert expected_calibration_error(labels, scaled) < expected_calibration_error(labels, probs) / 3
    assert (np.diff(scaled[np.argsort(probs)]) >= 0).all()


def test_certain_and_missing_probabilities():
    scaled = at_temperature(np.array([0.0, 1.0, np.nan, 0.5]), 2.0)
    assert scaled[0] < 1e-5 and scaled[1] > 1 - 1e-5 and np.isnan(scaled[2]) and scaled[3] == 0.5


def test_one_class_alone_is_left_as_it_is():
    assert fit_temperature(np.ones(5, int), np.linspace(0.1, 0.9, 5)) == 1.0


def test_reliability_counts_every_image_by_hand():
    found = reliability(np.array([0, 1, 1, 1]), np.array([0.01, 0.03, 0.99, 1.0]))
    np.testing.assert_allclose(found, [[0.02, 0.5, 2], [0.995, 1.0, 2]])
    assert expected_calibration_error(np.array([0, 1, 1, 1]), np.array([0.01, 0.03, 0.99, 1.0])) == pytest.approx(0.2425)
