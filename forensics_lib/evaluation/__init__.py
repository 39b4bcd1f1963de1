"""Evaluation on validation images: metrics, calibration, thresholds and robustness."""
