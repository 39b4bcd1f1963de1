"""User-defined functions that parameters name as ``module:function``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forensics_lib.utils.files import home

PATTERN = r"[\w.]+:\w+"


def source_of(name: str) -> Path | None:
    """The source file of the module in ``module:function``; None if there is none."""
    _search_home()
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin and found.has_location else None


def load_callable(name: str, parameter: str, wanted: str) -> Callable[..., Any]:
    """Import the function ``module:function``; the project's folder is on the search path as well.

    Raises ``ValueError`` naming the ``parameter`` and what is ``wanted`` there.
    """
    module, _, function = name.partition(":")
    _search_home()
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{parameter}: {name!r} cannot be loaded ({error}); {wanted}") from None


def _search_home() -> None:
    if str(home()) not in sys.path:
        sys.path.append(str(home()))
