"""Predictions of trained models: probabilities and masks, for the test images of a run or for any image."""
