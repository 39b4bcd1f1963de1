"""What every other room stands on: files, processes, locks, progress."""
