"""How good the answers are: metrics, calibration, thresholds and robustness on validation images."""
