"""Data sets as they lie on disk, the manifest of a run, and the crops that training sees."""
