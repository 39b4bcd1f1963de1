"""A trained model's answers: probabilities and masks, for a run's test images or for any image."""
