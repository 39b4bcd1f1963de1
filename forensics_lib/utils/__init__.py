"""Foundations of all other packages: files, processes, locks, progress."""
