"""Functions of the user's own that parameters name as ``module:function``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forensics_lib.utils.files import home

PATTERN = r"[\w.]+:\w+"


def source_of(name: str) -> Path | None:
    """The file of the module that ``module:function`` names; None where there is none."""
    if str(home()) not in sys.path:
        sys.path.append(str(home()))
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.has_location else None


def load_callable(name: str, parameter: str, wanted: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules are also looked for in the project's folder.

    Raises ``ValueError`` naming the ``parameter`` and what is ``wanted`` there.
    """
    module, _, function = name.partition(":")
    if str(home()) not in sys.path:
        sys.path.append(str(home()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{parameter}: {name!r} cannot be loaded ({error}); {wanted}") from None
