"""Building and validating the challenge's archives."""
