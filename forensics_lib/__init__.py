"""Finding AI-generated images and AI-manipulated regions: the library behind the notebooks.

    from forensics_lib import open_run, predict

opens a run by its parameter file, and scores any images with a trained model.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forensics_lib.inference.predictor import predict as predict
    from forensics_lib.run import open_run as open_run

# Before torch: what Apple's GPUs lack, the CPU computes; and threads of an operation that wait for one whose core another
# process has give theirs up after microseconds, not milliseconds
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """Import the two names when asked for them: ``python -m forensics_lib --help`` must not wait for torch."""
    places = {"open_run": "forensics_lib.run", "predict": "forensics_lib.inference.predictor"}
    if name in places:
        return getattr(import_module(places[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has open_run and predict")
