"""Synthetic and manipulated images: an autoencoder, forgeries, and the built-in sample."""
