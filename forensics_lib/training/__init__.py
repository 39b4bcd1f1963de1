"""Training in two steps, with everything needed to go on after a stop."""
