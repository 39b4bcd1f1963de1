"""Data sets on disk, the manifest of a run, audits, and the crops of training and inference."""
