"""The challenge's archives: built and validated."""
